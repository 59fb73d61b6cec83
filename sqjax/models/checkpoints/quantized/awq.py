"""AutoAWQ's layout: 4 bits, groups of input channels with zero points, inputs first.

For a Linear layer of 64 inputs and 32 outputs in groups of 16:

    qweight (64, 4) int32    8 outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7
    qzeros  (4, 4) int32     the groups' zero points, packed alike
    scales  (4, 32) float16

and w = scale * (q - zero), with q and zero from 0 to 15.
"""

from functools import partial

import numpy as np

from sqjax.models.checkpoints.names import Shape
from sqjax.models.checkpoints.quantized.keys import (
    first_stated,
    group_size,
    only,
)
from sqjax.models.checkpoints.quantized.modules import (
    Arrays,
    Format,
    Part,
    Quantization,
    Tensors,
    group_count,
    in_float32,
    matrix_shape,
    scales,
    several_groups,
    words,
)
from sqjax.models.checkpoints.quantized.stored_weight import Kind, StoredWeight
from sqjax.models.checkpoints.quantized.unpacking import (
    centred,
    in_order_of_outputs,
    per_word,
    unpack,
)
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.fields import FLAG, one_of
from sqjax.numerics.formats import INT4

_BITS = 4


def read_awq(settings: Settings) -> Quantization:
    """What a configuration of the method "awq" says."""
    first_stated(settings, ("bits", "w_bit"), only(_BITS), _BITS)
    keys = ("version", "checkpoint_format", "format")
    first_stated(settings, keys, one_of("gemm", "GEMM"), "gemm")
    group = group_size(settings, "group_size", "q_group_size")
    has_zeros = settings("zero_point", FLAG, True)
    format_ = Format(
        ("qweight",),
        _shape,
        partial(_parts, group, has_zeros),
        partial(_decode, group),
    )
    endings = frozenset(("qweight", "qzeros", "scales"))
    return Quantization(endings, lambda module, ends: format_)


def _shape(tensors: Tensors) -> Shape:
    inputs, in_words = matrix_shape(tensors, "qweight")
    return in_words * per_word(_BITS), inputs


def _parts(group: int | None, has_zeros: bool, shape: Shape) -> dict[str, Part]:
    outputs, inputs = shape
    in_words = outputs // per_word(_BITS)
    groups = group_count(group, inputs)
    return {
        "qweight": words((inputs, in_words)),
        "qzeros": words((groups, in_words), required=has_zeros),
        "scales": scales((groups, outputs)),
    }


def _decode(group: int | None, arrays: Arrays, shape: Shape) -> StoredWeight:
    def outputs_first(in_words: np.ndarray) -> np.ndarray:
        codes = in_order_of_outputs(unpack(in_words, _BITS))
        return np.ascontiguousarray(centred(codes, _BITS).T)

    zero = None
    if "qzeros" in arrays:
        zero = outputs_first(arrays["qzeros"])
    return StoredWeight(
        Kind(INT4, several_groups(group, shape[1])),
        outputs_first(arrays["qweight"]),
        in_float32(arrays["scales"].T),
        zero,
    )
