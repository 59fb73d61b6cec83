"""How quantized leaves print: what they stand for, in a line.

Where jax or flax has put specs, shardings or placeholders in place of arrays, these are shown.
"""

import dataclasses
from functools import partial
from typing import Any


def tensor_text(tensor: Any) -> str:
    """The repr of a `QTensor`: logical shape and dtype, format, scales."""
    if not _is_array(tensor.values):
        return _listed("QTensor", [tensor.fmt.name, *_fields(tensor)])
    if _is_array(tensor.scale):
        scales = f"scale {list(tensor.scale.shape)}"
    else:
        scales = f"scale={_short(tensor.scale)}"
    return _listed("QTensor", [_kind(tensor), *_grouping(tensor), scales])


def weight_text(weight: Any) -> str:
    """The repr of a `QuantWeight`: its tensor, how activations are quantized, what is beside."""
    tensor = weight.tensor
    if not (
        _is_array(getattr(tensor, "values", None)) and _is_array(tensor.scale)
    ):
        return _listed("QuantWeight", _fields(weight))
    activations = "float"
    if weight.activations is not None:
        activations = f"{weight.activation_format} {weight.activations}"
    scales = _grouping(tensor) or [_granularity(weight)]
    channels: Any = getattr(weight.outliers, "channels", None)
    count = channels.shape[-1] if _is_array(channels) else "some"
    beside = {
        "smoothing at run time": weight.smoothing,
        f"rotated in blocks of {weight.rotation}": weight.rotation,
        f"{count} outlier channels": weight.outliers,
        f"kernel {weight.kernel}": weight.kernel,
    }
    parts = [_kind(tensor), *scales, f"activations {activations}"]
    return _listed("QuantWeight", parts + _of_what_is_there(beside))


def _listed(name: str, parts: list[str]) -> str:
    return f"{name}({', '.join(parts)})"


def _kind(tensor: Any) -> str:
    return f"{tensor.shape} {tensor.dtype.name} as {tensor.fmt.name}"


def _grouping(tensor: Any) -> list[str]:
    """What is said of groups, zero points and second levels."""
    return _of_what_is_there(
        {
            f"groups of {tensor.group}": tensor.group,
            "integer group scales": tensor.group_scale,
            "zero points": tensor.zero,
        }
    )


def _of_what_is_there(parts: dict[str, Any]) -> list[str]:
    """The texts of those parts that are not None."""
    return [text for text, part in parts.items() if part is not None]


def _granularity(weight: Any) -> str:
    """Whether the outputs of a matrix have scales of their own, or one for all.

    The last outer axis with more than one entry decides, because the axes of a stack, which stand
    before it, have scales of their own in any case.
    """
    first = weight.tensor.values.ndim - weight.contracted
    sizes = weight.tensor.values.shape[:first]
    scales = [
        own
        for own, n in zip(weight.tensor.scale.shape, sizes, strict=False)
        if n > 1
    ]
    return "per_tensor" if not scales or scales[-1] == 1 else "per_channel"


def _fields(part: Any) -> list[str]:
    """name=value of the fields that are not None and not static."""
    texts = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if value is not None and not field.metadata.get("static"):
            texts.append(f"{field.name}={_short(value)}")
    return texts


def _short(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if _is_array(x) else repr(x)


def _is_array(x: Any) -> bool:
    """Whether x has a shape and dtype: an array, a tracer, a ShapeDtypeStruct; no sharding or spec.

    Nor one of the placeholders with which flax prints a tree.
    """
    return all(map(partial(hasattr, x), ("shape", "dtype", "ndim")))
