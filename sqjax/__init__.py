"""sqjax: SmoothQuant and post-training quantization for any JAX function of parameters.

calibrate -> smooth -> quantize -> jax.jit(quantized(fn)): see the README for the five lines, and
each function's docstring for its shapes, errors and source.

Every name is imported when it is first used, so that `sqjax --help` need not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqjax.calibration.calibrate import calibrate
    from sqjax.calibration.stats import Stats, gram_bytes
    from sqjax.choosing.alphas import search_alpha
    from sqjax.choosing.awq import awq, smooth_awq
    from sqjax.choosing.by_search import (
        prepare_by_search,
        quantize_by_search,
    )
    from sqjax.choosing.gptq import gptq
    from sqjax.choosing.gptq_blocks import gptq_blocks
    from sqjax.choosing.learned import learn
    from sqjax.choosing.precision import choose_precision
    from sqjax.choosing.recommend import recommend
    from sqjax.files.loading import load, load_saved
    from sqjax.files.saving import save
    from sqjax.folding.apply import fold
    from sqjax.methods.quantization import quantize, smoothquant
    from sqjax.methods.rotation import rotate, rotate_stats, rotations
    from sqjax.methods.site_errors import site_errors
    from sqjax.methods.smoothing import fold_stats, scales, smooth
    from sqjax.methods.verification import verify
    from sqjax.proving.proof import prove
    from sqjax.runtime.caches import quantize_cache
    from sqjax.runtime.int8_attention import int8_attention
    from sqjax.runtime.quantized import quantized
    from sqjax.streaming.act_scales import stats_from_act_scales
    from sqjax.streaming.calibration import calibrate_layers
    from sqjax.streaming.loading import load_quantized
    from sqjax.weights.kernels import with_kernel
    from sqjax.weights.qtensor import QTensor, dequantize
    from sqjax.weights.quant_weight import QuantWeight
    from sqjax.weights.schemes import (
        EMBEDDING_INT4,
        EMBEDDING_INT8,
        FP8,
        FP8_E5M2,
        W4A4,
        W4A4_ROTATED,
        W4A8,
        W4A16,
        W4A16_G64,
        W8A8,
        W8A8_O1,
        W8A8_O2,
        W8A8_O3,
        W8A8_O3_ROTATED,
        W8A8_OUTLIERS,
        W8A16,
        Float8,
        Indices,
        Int4,
        Int8,
        PerTensor,
        PerToken,
        Scheme,
        Static,
    )
    from sqjax.weights.sharding import shardings
    from sqjax.weights.training import merge, split

__all__ = [
    "EMBEDDING_INT4",
    "EMBEDDING_INT8",
    "FP8",
    "FP8_E5M2",
    "W4A4",
    "W4A4_ROTATED",
    "W4A8",
    "W4A16",
    "W4A16_G64",
    "W8A8",
    "W8A8_O1",
    "W8A8_O2",
    "W8A8_O3",
    "W8A8_O3_ROTATED",
    "W8A8_OUTLIERS",
    "W8A16",
    "Float8",
    "Indices",
    "Int4",
    "Int8",
    "PerTensor",
    "PerToken",
    "QTensor",
    "QuantWeight",
    "Scheme",
    "Static",
    "Stats",
    "awq",
    "calibrate",
    "calibrate_layers",
    "choose_precision",
    "dequantize",
    "fold",
    "fold_stats",
    "gptq",
    "gptq_blocks",
    "gram_bytes",
    "int8_attention",
    "learn",
    "load",
    "load_quantized",
    "load_saved",
    "merge",
    "prepare_by_search",
    "prove",
    "quantize",
    "quantize_by_search",
    "quantize_cache",
    "quantized",
    "recommend",
    "rotate",
    "rotate_stats",
    "rotations",
    "save",
    "scales",
    "search_alpha",
    "shardings",
    "site_errors",
    "smooth",
    "smooth_awq",
    "smoothquant",
    "split",
    "stats_from_act_scales",
    "verify",
    "with_kernel",
]

__version__ = "0.1.0"

#: Namespaces; flax takes a second to import.
_NAMESPACES = {
    "linen": "sqjax.linen",
    "models": "sqjax.models",
    "mosaic": "sqjax.numerics.mosaic",
    "nnx": "sqjax.nnx",
    "plots": "sqjax.plots",
    "report": "sqjax.report",
    "triton": "sqjax.numerics.triton",
}
#: {module: the public names that are in it}, as type checkers see them above.
_NAMES = {
    "sqjax.calibration.calibrate": "calibrate",
    "sqjax.calibration.stats": "Stats gram_bytes",
    "sqjax.choosing.by_search": "prepare_by_search quantize_by_search",
    "sqjax.choosing.gptq": "gptq",
    "sqjax.choosing.learned": "learn",
    "sqjax.choosing.precision": "choose_precision",
    "sqjax.choosing.recommend": "recommend",
    "sqjax.choosing.gptq_blocks": "gptq_blocks",
    "sqjax.choosing.alphas": "search_alpha",
    "sqjax.choosing.awq": "awq smooth_awq",
    "sqjax.files.loading": "load load_saved",
    "sqjax.files.saving": "save",
    "sqjax.folding.apply": "fold",
    "sqjax.proving.proof": "prove",
    "sqjax.methods.quantization": "quantize smoothquant",
    "sqjax.methods.rotation": "rotate rotate_stats rotations",
    "sqjax.methods.site_errors": "site_errors",
    "sqjax.methods.smoothing": "fold_stats scales smooth",
    "sqjax.methods.verification": "verify",
    "sqjax.runtime.caches": "quantize_cache",
    "sqjax.runtime.int8_attention": "int8_attention",
    "sqjax.runtime.quantized": "quantized",
    "sqjax.streaming.act_scales": "stats_from_act_scales",
    "sqjax.streaming.calibration": "calibrate_layers",
    "sqjax.streaming.loading": "load_quantized",
    "sqjax.weights.kernels": "with_kernel",
    "sqjax.weights.qtensor": "QTensor dequantize",
    "sqjax.weights.quant_weight": "QuantWeight",
    "sqjax.weights.schemes": (
        "EMBEDDING_INT4 EMBEDDING_INT8 FP8 FP8_E5M2 Float8 Indices Int4 "
        "Int8 PerTensor PerToken Scheme Static W4A16 W4A16_G64 W4A4 "
        "W4A4_ROTATED W4A8 W8A16 W8A8 W8A8_O1 W8A8_O2 W8A8_O3 "
        "W8A8_O3_ROTATED W8A8_OUTLIERS "
    ),
    "sqjax.weights.sharding": "shardings",
    "sqjax.weights.training": "merge split",
}
_MODULE_OF = {
    name: module for module, names in _NAMES.items() for name in names.split()
}


def __getattr__(name: str) -> Any:
    """Imports a public name, or a namespace, when it is first used."""
    if name in _NAMESPACES:
        return importlib.import_module(_NAMESPACES[name])
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sqjax' has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULE_OF[name]), name)
    # Kept, because so it is looked up once only.
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names: not the rooms that the code is in."""
    return sorted([*__all__, *_NAMESPACES, "__version__"])
