"""sqjax: SmoothQuant and post-training quantization for any JAX function of parameters.

calibrate -> smooth -> quantize -> jax.jit(quantized(fn)): see the README for the five lines, and each function's
docstring for its shapes, errors and source.
"""

import importlib
from typing import Any

from sqjax import exporting as exporting
from sqjax.attention import int8_attention as int8_attention
from sqjax.caches import quantize_cache as quantize_cache
from sqjax.calibration import calibrate as calibrate
from sqjax.execution import quantized as quantized
from sqjax.files import load as load
from sqjax.files import save as save
from sqjax.matmul import QuantWeight as QuantWeight
from sqjax.qtensor import QTensor as QTensor
from sqjax.qtensor import dequantize as dequantize
from sqjax.quantization import quantize as quantize
from sqjax.quantization import smoothquant as smoothquant
from sqjax.schemes import EMBEDDING_INT4 as EMBEDDING_INT4
from sqjax.schemes import EMBEDDING_INT8 as EMBEDDING_INT8
from sqjax.schemes import FP8 as FP8
from sqjax.schemes import FP8_E5M2 as FP8_E5M2
from sqjax.schemes import W4A8 as W4A8
from sqjax.schemes import W4A16 as W4A16
from sqjax.schemes import W4A16_G64 as W4A16_G64
from sqjax.schemes import W8A8 as W8A8
from sqjax.schemes import W8A8_O1 as W8A8_O1
from sqjax.schemes import W8A8_O2 as W8A8_O2
from sqjax.schemes import W8A8_O3 as W8A8_O3
from sqjax.schemes import W8A8_OUTLIERS as W8A8_OUTLIERS
from sqjax.schemes import W8A16 as W8A16
from sqjax.schemes import Scheme as Scheme
from sqjax.sharding import shardings as shardings
from sqjax.smoothing import fold as fold
from sqjax.smoothing import fold_stats as fold_stats
from sqjax.smoothing import scales as scales
from sqjax.smoothing import smooth as smooth
from sqjax.statistics import Stats as Stats
from sqjax.verification import verify as verify

_NAMESPACES = ("linen", "models", "nnx")


def __getattr__(name: str) -> Any:
    """Loads `sqjax.linen`, `sqjax.nnx` and `sqjax.models` when they are first used: flax takes a second to import."""
    if name in _NAMESPACES:
        return importlib.import_module(f"sqjax.{name}")
    raise AttributeError(f"module 'sqjax' has no attribute {name!r}")
