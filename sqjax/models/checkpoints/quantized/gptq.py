"""GPTQ's layout: 4 or 8 bits, groups of input channels with zero points, inputs first.

For a Linear layer of 64 inputs and 32 outputs, in groups of 16 and with 4 bits:

    qweight (8, 32) int32    8 inputs a word
    qzeros  (4, 4) int32     the groups' zero points less 1, 8 outputs a word
    scales  (4, 32) float16
    g_idx   (64,) int32      the group of each input

and w = scale * (q - zero), with q and zero from 0 to 15. In files of the format "gptq_v2" zero
points are stored as they are.
"""

from functools import partial

import numpy as np

from sqjax.models.checkpoints.names import Shape
from sqjax.models.checkpoints.quantized.keys import (
    first_stated,
    group_size,
    only,
    refuse_others,
)
from sqjax.models.checkpoints.quantized.modules import (
    Arrays,
    Format,
    Part,
    Quantization,
    Tensors,
    check_groups,
    check_zero_points,
    group_count,
    in_float32,
    matrix_shape,
    scales,
    several_groups,
    words,
)
from sqjax.models.checkpoints.quantized.stored_weight import Kind, StoredWeight
from sqjax.models.checkpoints.quantized.unpacking import (
    PACKED_BITS,
    centred,
    per_word,
    unpack,
    with_one_more,
)
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.fields import FLAG, one_of
from sqjax.numerics.formats import INT4, INT8

#: Keys that would change what the tensors mean, with their values that change nothing.
_HARMLESS = {
    "pack_dtype": ("int32",),
    "dynamic": ({},),
    "is_marlin_format": (False,),
    "adapter": ({},),
}


def read_gptq(settings: Settings) -> Quantization:
    """What a configuration of the method "gptq" says."""
    bits = settings("bits", only(*PACKED_BITS), 4)
    group = group_size(settings, "group_size")
    ordered = settings("desc_act", FLAG, False)
    symmetric = settings("sym", FLAG, True)
    keys = ("checkpoint_format", "format")
    version = first_stated(settings, keys, one_of("gptq", "gptq_v2"), "gptq")
    refuse_others(settings, _HARMLESS)
    format_ = Format(
        ("qweight",),
        partial(_shape, bits),
        partial(_parts, bits, group, ordered),
        partial(_decode, bits, group, symmetric, version == "gptq"),
    )
    endings = frozenset(("qweight", "qzeros", "scales", "g_idx"))
    # Tools have given every module a bias, 0 where the model has none.
    return Quantization(endings, lambda module, ends: format_, zero_biases=True)


def _shape(bits: int, tensors: Tensors) -> Shape:
    in_words, outputs = matrix_shape(tensors, "qweight")
    return outputs, in_words * per_word(bits)


def _parts(
    bits: int, group: int | None, ordered: bool, shape: Shape
) -> dict[str, Part]:
    outputs, inputs = shape
    groups = group_count(group, inputs)
    return {
        "qweight": words((inputs // per_word(bits), outputs)),
        "qzeros": words((groups, -(-outputs // per_word(bits)))),
        "scales": scales((groups, outputs)),
        "g_idx": words((inputs,), required=ordered),
    }


def _decode(
    bits: int,
    group: int | None,
    symmetric: bool,
    less_one: bool,
    arrays: Arrays,
    shape: Shape,
) -> StoredWeight:
    outputs, inputs = shape
    if "g_idx" in arrays:
        check_groups("g_idx", arrays["g_idx"], group or inputs)
    values = centred(unpack(arrays["qweight"].T, bits), bits)
    zero = _zero_points(bits, outputs, less_one, arrays["qzeros"])
    check_zero_points("qzeros", zero, bits)
    # In the middle of the codes they are 0, and a leaf without any computes faster.
    has_zeros = zero.any() or not symmetric
    return StoredWeight(
        Kind(INT4 if bits == 4 else INT8, several_groups(group, inputs)),
        values,
        in_float32(arrays["scales"].T),
        zero if has_zeros and bits == 4 else None,
    )


def _zero_points(
    bits: int, outputs: int, less_one: bool, stored: np.ndarray
) -> np.ndarray:
    """(outputs, groups) int8, relative to the middle of the codes."""
    in_words = with_one_more(stored, bits) if less_one else stored
    codes = unpack(in_words, bits)[:, :outputs]
    return np.ascontiguousarray(centred(codes, bits).T)
