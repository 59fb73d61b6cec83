"""The methods of quantization whose checkpoints are read."""

from collections.abc import Callable, Mapping
from typing import Any

from sqjax.models.checkpoints.problems import raise_problems
from sqjax.models.checkpoints.quantized.awq import read_awq
from sqjax.models.checkpoints.quantized.compressed_tensors import (
    read_compressed_tensors,
)
from sqjax.models.checkpoints.quantized.fp8 import read_fp8
from sqjax.models.checkpoints.quantized.gptq import read_gptq
from sqjax.models.checkpoints.quantized.modules import NOTHING, Quantization
from sqjax.models.checkpoints.settings import Settings

#: {quant_method: what reads its configuration}.
METHODS: Mapping[str, Callable[[Settings], Quantization]] = {
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "gptq": read_gptq,
}


def read_quantization(values: Mapping[str, Any], source: str) -> Quantization:
    """What the ``quantization_config`` of a ``config.json`` says.

    Raises:
        ValueError: an unknown method, or keys that ask for what is not read here; lists them.
    """
    stated = values.get("quantization_config")
    if stated is None:
        return NOTHING
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"{source}: quantization_config: expected quant_method to be one of {sorted(METHODS)}, "
            f"got {method!r}; load the float checkpoint, and quantize it with sqjax.quantize"
        )
    settings = Settings(stated, "quantization_config: ")
    quantization = METHODS[method](settings)
    raise_problems(source, settings.problems)
    return quantization
