"""The layout of DeepSeek-V3's float8 (quant_method "fp8"): e4m3, with a scale for each block.

A Linear layer's tensors, outputs first, for 256 inputs and 300 outputs in blocks of 128 x 128:

    weight            (300, 256) float8
    weight_scale_inv  (3, 2) float32: what the codes of a block are multiplied by

and w = scale * q. What has no scales is float.
"""

from collections.abc import Collection
from functools import partial

from sqjax.models.checkpoints.names import Shape
from sqjax.models.checkpoints.quantized.compressed_schemes import (
    TWO_SIZES,
    Blocks,
    warn_of_groups,
)
from sqjax.models.checkpoints.quantized.keys import only
from sqjax.models.checkpoints.quantized.modules import (
    Arrays,
    Format,
    Part,
    Quantization,
    in_float32,
    matrix_shape,
    scales,
    several_groups,
)
from sqjax.models.checkpoints.quantized.stored_weight import Kind, StoredWeight
from sqjax.models.checkpoints.settings import Settings
from sqjax.numerics.formats import E4M3

_SCALES = "weight_scale_inv"


def read_fp8(settings: Settings) -> Quantization:
    """What a configuration of the method "fp8" says."""
    settings("fmt", only("e4m3"), "e4m3")
    settings("activation_scheme", only("dynamic"), "dynamic")
    sizes = settings("weight_block_size", TWO_SIZES)
    # None was a problem, which is raised before a module is looked at.
    blocks = Blocks(*(sizes or (1, 1)))
    # What is refused needs no warning.
    if not settings.problems:
        warn_of_groups()
    format_ = Format(
        ("weight",),
        partial(matrix_shape, end="weight"),
        partial(_parts, blocks),
        partial(_decode, blocks),
    )
    return Quantization(frozenset({_SCALES}), partial(_format_of, format_))


def _format_of(format_: Format, module: str, ends: Collection[str]) -> Format:
    """All modules that have scales are alike."""
    del module, ends
    return format_


def _parts(blocks: Blocks, shape: Shape) -> dict[str, Part]:
    return {
        "weight": Part({"F8_E4M3": (shape,)}),
        _SCALES: scales(blocks.scales(shape)),
    }


def _decode(blocks: Blocks, arrays: Arrays, shape: Shape) -> StoredWeight:
    group = several_groups(blocks.inputs, shape[1])
    scale = blocks.by_output(in_float32(arrays[_SCALES]), shape)
    kind = Kind(E4M3, group, "per_token", "e4m3")
    return StoredWeight(kind, arrays["weight"], scale)
