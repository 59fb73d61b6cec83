"""How quantized leaves print: what they stand for, in a line, whatever arrays, specs or shardings they hold."""

import dataclasses
from typing import Any


def tensor_text(tensor: Any) -> str:
    """The repr of a `QTensor`: logical shape and dtype, format, scales."""
    if not _is_array(tensor.values):
        return _listed("QTensor", [tensor.fmt.name, *_fields(tensor)])
    scales = (
        f"scale {list(tensor.scale.shape)}"
        if _is_array(tensor.scale)
        else f"scale={_short(tensor.scale)}"
    )
    return _listed("QTensor", [_kind(tensor), *_grouping(tensor), scales])


def weight_text(weight: Any) -> str:
    """The repr of a `QuantWeight`: that of its tensor, how weights and activations are quantized, what is beside."""
    tensor = weight.tensor
    if not (_is_array(getattr(tensor, "values", None)) and _is_array(tensor.scale)):
        return _listed("QuantWeight", _fields(weight))
    formats = (
        "float"
        if weight.activations is None
        else f"{weight.activation_format} {weight.activations}"
    )
    parts = [
        _kind(tensor),
        *(_grouping(tensor) or [_granularity(weight)]),
        f"activations {formats}",
    ]
    if weight.smoothing is not None:
        parts.append("smoothing at run time")
    if weight.outliers is not None:
        channels: Any = getattr(weight.outliers, "channels", None)
        parts.append(f"{channels.shape[-1] if _is_array(channels) else 'some'} outlier channels")
    return _listed("QuantWeight", parts)


def _listed(name: str, parts: list[str]) -> str:
    return f"{name}({', '.join(parts)})"


def _kind(tensor: Any) -> str:
    return f"{tensor.shape} {tensor.dtype.name} as {tensor.fmt.name}"


def _grouping(tensor: Any) -> list[str]:
    """What is said of groups, zero points and second levels."""
    group = [] if tensor.group is None else [f"groups of {tensor.group}"]
    level = [] if tensor.group_scale is None else ["integer group scales"]
    return group + level + ([] if tensor.zero is None else ["zero points"])


def _granularity(weight: Any) -> str:
    """Whether the outputs of a matrix have scales of their own, or one for all; a stack's matrices have their own."""
    first = weight.tensor.values.ndim - weight.contracted
    outputs = zip(
        weight.tensor.scale.shape[:first], weight.tensor.values.shape[:first], strict=True
    )
    return (
        "per_channel"
        if [own for own, n in outputs if n > 1][-1:] not in ([], [1])
        else "per_tensor"
    )


def _fields(part: Any) -> list[str]:
    """name=value of the fields that are not None and not static: where jax has put something else than arrays."""
    fields = [f.name for f in dataclasses.fields(part) if not f.metadata.get("static")]
    return [f"{name}={_short(x)}" for name in fields if (x := getattr(part, name)) is not None]


def _short(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if _is_array(x) else repr(x)


def _is_array(x: Any) -> bool:
    """Arrays, tracers and ShapeDtypeStructs; no sharding, no spec, none of the stand-ins with which flax prints."""
    return all(hasattr(x, name) for name in ("shape", "dtype", "ndim"))
