"""The layouts of compressed-tensors, which llm-compressor writes: int8, int4 and float8, of Linear
layers.

A module's tensors, outputs first, for 64 inputs and 32 outputs:

    weight             (32, 64) int8 or float8: the codes ("int-quantized", "float-quantized",
                       "naive-quantized")
    weight_packed      (32, 8) int32: codes of 4 bits, 8 inputs a word ("pack-quantized")
    weight_shape       (2,): 32 and 64, beside packed codes
    weight_scale       (1,), (32, 1), or (32, 4) in groups of 16
    weight_zero_point  of the scale's shape; packed (4, 4), 8 outputs a word
    weight_g_idx       (64,): the group of each input
    input_scale        (1,), of static activations

and w = scale * (q - zero). Which modules are quantized, and how, the configuration says by groups
of modules. The tensors say which modules are.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np

from sqjax._warnings import warn
from sqjax.models.checkpoints.names import Shape
from sqjax.models.checkpoints.quantized.compressed_schemes import (
    FORMATS,
    Scheme,
    read_scheme,
)
from sqjax.models.checkpoints.quantized.keys import (
    PATTERNS,
    names,
    only,
    refuse_others,
)
from sqjax.models.checkpoints.quantized.modules import (
    FLOATS,
    Arrays,
    Format,
    Part,
    Quantization,
    Tensors,
    check_groups,
    check_zero_points,
    in_float32,
    matrix_shape,
    scales,
    several_groups,
    words,
)
from sqjax.models.checkpoints.quantized.stored_weight import StoredWeight
from sqjax.models.checkpoints.quantized.unpacking import (
    centred,
    per_word,
    unpack,
)
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.fields import MAPPING, What, one_of
from sqjax.numerics.formats import E4M3

_ENDINGS = (
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
#: (out, in) of a weight, as a tensor.
_SHAPE = Part(dict.fromkeys(("I64", "I32"), ((2,),)))
#: Scales of a key/value cache. Here a cache's format is chosen when it is made, and its scales are
#: those of what it holds.
_OF_CACHES = (
    *(f"{of}_{part}" for of in "qkv" for part in ("scale", "zero_point")),
    "output_scale",
    "output_zero_point",
)
#: Keys that would change what the model computes, with their values that change nothing.
_HARMLESS = {
    "quantization_status": ("compressed",),
    "transform_config": ({}, {"config_groups": {}}),
}


_GROUPS = What(
    "an object with at least one group", lambda x: MAPPING.holds(x) and bool(x)
)


def read_compressed_tensors(settings: Settings) -> Quantization:
    """What a configuration of the method "compressed-tensors" says."""
    usual = settings("format", one_of(*FORMATS), None)
    refuse_others(settings, _HARMLESS)
    settings.within("sparsity_config")("format", only("dense"), "dense")
    ignored = settings("ignore", PATTERNS, [])
    settings("config_groups", _GROUPS)
    groups = settings.within("config_groups")
    schemes = []
    for name in groups.values:
        schemes.append(read_scheme(groups.within(name), usual))
    unused: tuple[str, ...] = ()
    if settings("kv_cache_scheme", MAPPING, None) is not None:
        unused = _OF_CACHES
        warn(
            "quantization_config: kv_cache_scheme is not used: choose the cache's format by "
            "model.init_cache(..., kind='int8') or generate(..., cache='int8'); its scales are "
            "then those of what it holds, and not the file's"
        )
    return Quantization(
        frozenset(_ENDINGS),
        partial(_format_of, schemes, ignored),
        frozenset(unused),
    )


# The modules --------------------------------------------------------------------------------------


def _scheme_of(schemes: Sequence[Scheme], module: str) -> Scheme | None:
    """The scheme of a module: a group that names it goes before one of its class."""
    by_name = (
        lambda target: target == module,
        lambda target: names(target, module),
        lambda target: target == "Linear",
    )
    for is_meant in by_name:
        for scheme in schemes:
            if any(map(is_meant, scheme.targets)):
                return scheme
    return None


def _format_of(
    schemes: Sequence[Scheme],
    ignored: Sequence[str],
    module: str,
    ends: Collection[str],
) -> Format | str:
    """The format of a module; in words what it should be instead."""
    scheme = _scheme_of(schemes, module)
    if "Linear" in ignored or any(names(entry, module) for entry in ignored):
        scheme = None
    if scheme is None:
        return (
            "expected a float weight alone, because the configuration's groups name no such "
            f"module, or its ignore does; got {sorted(ends)} too"
        )
    packed = scheme.packed
    if packed is None:
        packed = "weight_packed" in ends
    if packed:
        return Format(
            ("weight_packed", "weight_shape"),
            _packed_shape,
            partial(_packed_parts, scheme),
            partial(_decode, scheme),
        )
    return Format(
        ("weight",),
        partial(matrix_shape, end="weight"),
        partial(_plain_parts, scheme),
        partial(_decode, scheme),
    )


def _packed_shape(tensors: Tensors) -> Shape:
    """The shape that is stored as a tensor, because words may be padded at the end."""
    matrix_shape(tensors, "weight_packed")
    stated = tensors["weight_shape"]
    problem = _SHAPE.problem(stated.entry)
    if problem is not None:
        raise ValueError(f"weight_shape: {problem}")
    outputs, inputs = map(int, stated.read())
    if min(outputs, inputs) < 1:
        raise ValueError(
            f"weight_shape: expected sizes of at least 1, got {(outputs, inputs)}"
        )
    return outputs, inputs


def _packed_parts(scheme: Scheme, shape: Shape) -> dict[str, Part]:
    outputs, inputs = shape
    bits = scheme.bits
    _, groups = scheme.blocks.scales(shape)
    in_words = -(-outputs // per_word(bits)), groups
    plain = _scale_shapes(scheme, shape)
    zero = Part({"I32": (in_words,), "I8": plain}, not scheme.symmetric)
    return {
        **_common_parts(scheme, shape),
        "weight_packed": words((outputs, -(-inputs // per_word(bits)))),
        "weight_shape": _SHAPE,
        "weight_zero_point": zero,
    }


def _plain_parts(scheme: Scheme, shape: Shape) -> dict[str, Part]:
    dtype = "F8_E4M3" if scheme.kind.fmt == E4M3 else "I8"
    shapes = _scale_shapes(scheme, shape)
    # What float8 stores as zero points is 0, in a dtype of the writer's choice.
    dtypes = ("I8", *FLOATS, "F8_E4M3") if scheme.symmetric else ("I8",)
    zero = Part(dict.fromkeys(dtypes, shapes), not scheme.symmetric)
    return {
        **_common_parts(scheme, shape),
        "weight": Part({dtype: (shape,)}),
        "weight_zero_point": zero,
    }


def _common_parts(scheme: Scheme, shape: Shape) -> dict[str, Part]:
    """The tensors beside the codes that do not depend on how these are stored."""
    parts = {
        "weight_scale": scales(*_scale_shapes(scheme, shape)),
        "weight_g_idx": words((shape[1],), required=scheme.ordered),
    }
    if scheme.kind.activations == "static":
        one = ((1,), ())
        parts["input_scale"] = scales(*one)
        dtypes = ("I8", *FLOATS, "F8_E4M3")
        parts["input_zero_point"] = Part(dict.fromkeys(dtypes, one), False)
    return parts


def _scale_shapes(scheme: Scheme, shape: Shape) -> tuple[Shape, ...]:
    """The shapes that scales may have: without an axis of size 1 too."""
    usual = scheme.blocks.scales(shape)
    if usual == (1, 1):
        return usual, (1,), ()
    return (usual, usual[:1]) if usual[1] == 1 else (usual,)


# The weight ---------------------------------------------------------------------------------------


def _decode(scheme: Scheme, arrays: Arrays, shape: Shape) -> StoredWeight:
    """The weight of arrays as `_packed_parts` or `_plain_parts` describes them."""
    inputs = shape[1]
    group = scheme.blocks.inputs
    if "weight_g_idx" in arrays:
        of_channels = arrays["weight_g_idx"]
        # It is -1 where a module was made for an order of channels, and has none.
        if (of_channels != -1).any():
            check_groups("weight_g_idx", of_channels, group or inputs)
    kind = scheme.kind._replace(group=several_groups(group, inputs))
    scale = in_float32(arrays["weight_scale"])
    return StoredWeight(
        kind,
        _codes(scheme, arrays, shape),
        scheme.blocks.by_output(scale, shape),
        _zero_points(scheme, arrays, shape),
        _input_scale(arrays),
    )


def _codes(scheme: Scheme, arrays: Arrays, shape: Shape) -> np.ndarray:
    if "weight_packed" not in arrays:
        codes = arrays["weight"]
        if scheme.bits == 4 and not (-8 <= codes.min() <= codes.max() <= 7):
            raise ValueError(
                f"weight: expected codes of 4 bits, got {codes.min()} to {codes.max()}"
            )
        return codes
    codes = unpack(arrays["weight_packed"], scheme.bits)[:, : shape[1]]
    return np.ascontiguousarray(centred(codes, scheme.bits))


def _zero_points(
    scheme: Scheme, arrays: Arrays, shape: Shape
) -> np.ndarray | None:
    """int8 zero points of the scales' shape; None where all are 0 and the scheme has none."""
    name = "weight_zero_point"
    if name not in arrays:
        return None
    zero = arrays[name]
    if scheme.symmetric:
        _check_all_zero(name, zero)
        return None
    if zero.dtype == np.int32:
        rows = scheme.blocks.scales(shape)[0]
        codes = unpack(zero.T, scheme.bits)[:, :rows].T
        zero = np.ascontiguousarray(centred(codes, scheme.bits))
    check_zero_points(name, zero, scheme.bits)
    if scheme.bits != 4:
        return None
    return scheme.blocks.by_output(zero, shape)


def _check_all_zero(name: str, x: Any) -> None:
    if x.astype(np.float32).any():
        raise ValueError(
            f"{name}: expected 0, because the configuration says symmetric, got {x.max()}"
        )


def _input_scale(arrays: Arrays) -> np.ndarray | None:
    """The scale of static activations."""
    if "input_zero_point" in arrays:
        _check_all_zero("input_zero_point", arrays["input_zero_point"])
    if "input_scale" not in arrays:
        return None
    scale = in_float32(arrays["input_scale"]).reshape(())
    if not scale > 0:
        raise ValueError(f"input_scale: expected a scale above 0, got {scale}")
    return scale
