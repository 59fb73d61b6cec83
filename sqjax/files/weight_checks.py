"""Whether a quantized leaf is one that a scheme could have made: its parts, and their values.

`QTensor.check` holds the dtypes and shapes of a tensor. Here is what goes beyond: what stands
beside the tensor, which formats go together, and the numbers themselves. A file can hold anything.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sqjax.files.arrays import shown
from sqjax.numerics.formats import INT4
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight

#: What int4 in two levels expands to.
_LARGEST = 127.0
#: The codes and zero points of int4. Our quantizers give -8 beside zero points alone, and no -128
#: of int8, but those of other tools do, whose checkpoints are read too.
_OF_INT4 = (-8.0, 7.0)


def check_parts(path: str, leaf: QTensor | QuantWeight) -> None:
    """Raises ValueError, naming the path, if a leaf's parts do not go together.

    Only shapes, dtypes and fields are looked at, so the arrays may be abstract.
    """
    _check(path, leaf, _PARTS_OF_WEIGHT, _PARTS_OF_TENSOR)


def check_values(path: str, leaf: QTensor | QuantWeight) -> None:
    """Raises ValueError, naming the path, if a number in a leaf is none that a quantizer gives.

    The arrays are numpy's. The leaf has passed `check_parts` and `QTensor.check`.
    """
    _check(path, leaf, _VALUES_OF_WEIGHT, _VALUES_OF_TENSOR)


_Checks = tuple[Callable[[Any], str | None], ...]


def _check(
    path: str,
    leaf: QTensor | QuantWeight,
    of_weight: _Checks,
    of_tensor: _Checks,
) -> None:
    """A weight passes its own checks first, then its tensor those of a tensor."""
    if isinstance(leaf, QuantWeight):
        _refuse(path, "QuantWeight", leaf, of_weight)
        leaf = leaf.tensor
    _refuse(path, "QTensor", leaf, of_tensor)


def _refuse(path: str, kind: str, leaf: Any, checks: _Checks) -> None:
    for find_problem in checks:
        problem = find_problem(leaf)
        if problem is not None:
            raise ValueError(
                f"{shown(path)}: not a valid {kind}: {problem}; quantize the float leaf again"
            )


# The parts of a weight ----------------------------------------------------------------------------


def _wrong_classes(weight: QuantWeight) -> str | None:
    tensor, outliers = weight.tensor, weight.outliers
    if not isinstance(tensor, QTensor) or not isinstance(
        outliers, Outliers | None
    ):
        return f"expected a QTensor and Outliers or None, got {tensor!r} and {outliers!r}"
    if outliers is not None and not all(hasattr(x, "shape") for x in outliers):
        return f"expected two arrays as outliers, got {outliers!r}"
    if weight.contracted > weight.ndim:
        return f"expected at most {weight.ndim} contracted axes, got {weight.contracted}"
    return None


def _wrong_activations(weight: QuantWeight) -> str | None:
    is_static = weight.activations == "static"
    is_quantized = weight.activations is not None
    if is_static and weight.input_scale is None:
        return "static activations need an input_scale, got none"
    of_levels = weight.tensor.group_scale
    needs = [
        ("an input_scale needs static", weight.input_scale, is_static),
        ("outliers need quantized", weight.outliers, is_quantized),
        ("two levels need quantized", of_levels, is_quantized),
    ]
    for what, part, is_met in needs:
        if part is not None and not is_met:
            return f"{what} activations, got {weight.activations!r}"
    return None


def _wrong_formats(weight: QuantWeight) -> str | None:
    """A product takes two operands of one kind: integers (int4 becomes int8), or float8."""
    if weight.activations is None:
        return None
    of_weight, of_x = weight.tensor.fmt, weight.activation_format
    allowed = ("e4m3", "e5m2") if of_weight.floating else ("int8", "int4")
    if of_x not in allowed:
        return (
            f"expected an activation_format among {allowed} with weights of {of_weight.name}, "
            f"got {of_x!r}"
        )
    has_zero = weight.activations == "per_token_zero_point"
    if has_zero and of_x != "int4":
        return f"only int4 activations have zero points, got {of_x}"
    return None


def _wrong_dtypes(weight: QuantWeight) -> str | None:
    parts = [
        ("input_scale", weight.input_scale, jnp.float32),
        ("smoothing", weight.smoothing, jnp.float32),
    ]
    if weight.outliers is not None:
        parts.append(("channels", weight.outliers.channels, jnp.int32))
    for name, x, dtype in parts:
        if x is not None and getattr(x, "dtype", None) != dtype:
            return f"{name} must be {jnp.dtype(dtype).name}, got {x!r}"
    return None


def _own_of_smoothing(
    weight: QuantWeight, inner: tuple[int, ...]
) -> tuple[int, ...]:
    """The axes of one matrix's s: those of its contracted channels, `inner`.

    A convolution's kernel has an entry for every channel of the image and none for the taps of its
    window: for inner (3, 3, 64) it is (1, 1, 64), in 2 groups (1, 1, 128), and the outputs' number
    where it is depthwise, with inner (3, 3, 1).
    """
    *ones, channels = tuple(weight.smoothing.shape)[-len(inner) :] or (0,)
    fits = any(size and channels % size == 0 for size in inner)
    of_kernel = len(inner) > 1 and ones == [1] * (len(inner) - 1)
    return (*ones, channels) if of_kernel and fits else inner


def _wrong_shapes(weight: QuantWeight) -> str | None:
    """Beside the tensor every array has the first axes of a stack, then axes of its own.

    For a stack of values (4, out, in) an input_scale is () or (4,), a smoothing (in,) or (4, in).
    """
    sizes = tuple(weight.tensor.values.shape)
    first = len(sizes) - weight.contracted
    outer, inner = sizes[:first], sizes[first:]
    expected: list[tuple[str, Any, tuple[int, ...]]] = [
        ("input_scale", weight.input_scale, ()),
    ]
    if weight.smoothing is not None:
        own = _own_of_smoothing(weight, inner)
        expected.append(("smoothing", weight.smoothing, own))
    if weight.outliers is not None:
        channels, rows = weight.outliers
        expected.append(("channels", channels, tuple(channels.shape[-1:])))
        expected.append(("weight", rows, (*outer, *channels.shape[-1:])))
    for name, x, own in expected:
        if x is None:
            continue
        # As many axes of the stack as the array has beyond its own; none where all matrices share
        # it.
        stack = outer[: max(len(x.shape) - len(own), 0)]
        if tuple(x.shape) not in (own, (*stack, *own)):
            return f"{name} of shape {(*stack, *own)} expected, got {tuple(x.shape)}"
    return None


def _wrong_rotation(weight: QuantWeight) -> str | None:
    """A rotation is in whole blocks of the contracted channels, and none of them is apart."""
    if weight.rotation is None:
        return None
    sizes = tuple(weight.tensor.values.shape)
    channels = math.prod(sizes[len(sizes) - weight.contracted :])
    if channels % weight.rotation:
        return f"a rotation that divides {channels} channels expected, got {weight.rotation}"
    if weight.outliers is not None:
        return "outliers need unrotated channels, got a rotation"
    return None


# The parts of a tensor ----------------------------------------------------------------------------


def _wrong_levels(tensor: QTensor) -> str | None:
    if tensor.zero is not None and tensor.fmt != INT4:
        return f"only int4 has zero points, got {tensor.fmt.name}"
    if tensor.group_scale is None:
        return None
    if tensor.zero is None or tensor.group is None:
        return "integer group scales need groups and zero points"
    return None


def _wrong_logical_dtype(tensor: QTensor) -> str | None:
    if jnp.issubdtype(tensor.dtype, jnp.floating):
        return None
    return f"it stands for a float array, got the dtype {tensor.dtype.name}"


# Values -------------------------------------------------------------------------------------------


def _is_empty(x: Any) -> bool:
    """Whether there are no numbers to look at."""
    return x is None or x.size == 0


def _out_of_range(name: str, x: Any, low: float, high: float) -> str | None:
    """What is wrong with numbers that must lie in a range; NaN lies in none."""
    if _is_empty(x):
        return None
    least, most = x.min(), x.max()  # numpy's carry NaN
    if low <= least and most <= high:
        return None
    return f"{name} must be in [{low:g}, {high:g}], got [{least}, {most}]"


def _not_positive(name: str, x: Any) -> str | None:
    if _is_empty(x):
        return None
    if np.isfinite(x).all() and (x > 0).all():
        return None
    return f"{name} must be finite and above 0, got [{x.min()}, {x.max()}]"


def _wrong_codes(tensor: QTensor) -> str | None:
    values = tensor.values
    if tensor.fmt.floating:
        bound = tensor.fmt.bound
        return _out_of_range(
            f"{tensor.fmt.name} values",
            values.astype(np.float32),
            -bound,
            bound,
        )
    if tensor.fmt != INT4:
        return None  # every int8 is a code
    return _out_of_range(
        "int4 values", values.astype(np.int8, copy=False), *_OF_INT4
    )


def _wrong_scale(tensor: QTensor) -> str | None:
    return _not_positive("scale", tensor.scale)


def _wrong_zero(tensor: QTensor) -> str | None:
    return _out_of_range("zero", tensor.zero, *_OF_INT4)


def _wrong_group_scale(tensor: QTensor) -> str | None:
    return _out_of_range("group_scale", tensor.group_scale, 1.0, _LARGEST)


def _wrong_expansion(tensor: QTensor) -> str | None:
    """What two levels expand to must be int8, without the code that int8 does not use."""
    if tensor.group_scale is None:
        return None
    zero, step = map(_spread_like(tensor), (tensor.zero, tensor.group_scale))
    # In int16, because the largest that may stand there is (7 + 8) * 127 = 1905.
    expanded = (tensor.values.astype(np.int16) - zero) * step
    return _out_of_range(
        "(values - zero) * group_scale", expanded, -_LARGEST, _LARGEST
    )


def _spread_like(tensor: QTensor) -> Callable[[Any], np.ndarray]:
    """A function that repeats the scales of groups for each channel, in numpy."""
    length, group = tensor.values.shape[-1], tensor.group

    def spread(x: Any) -> np.ndarray:
        x = np.asarray(x, np.int16)
        if group is None or x.shape[-1] == 1:
            return x
        return np.repeat(x, group, axis=-1)[..., :length]

    return spread


def _wrong_input_scale(weight: QuantWeight) -> str | None:
    return _not_positive("input_scale", weight.input_scale)


def _wrong_smoothing(weight: QuantWeight) -> str | None:
    return _not_positive("smoothing", weight.smoothing)


def _wrong_outliers(weight: QuantWeight) -> str | None:
    if weight.outliers is None:
        return None
    channels, rows = weight.outliers
    inner = weight.tensor.values.shape[weight.ndim - weight.contracted :]
    # Channels are counted through all contracted axes as one: 0 to 511 for inner (8, 64).
    last = float(np.prod(inner)) - 1.0
    problem = _out_of_range("channels", channels, 0.0, last)
    if problem is not None:
        return problem
    # A channel that stands there twice would be multiplied twice.
    steps = np.diff(np.sort(channels, axis=-1), axis=-1)
    if (steps == 0).any():
        return f"every outlier channel once expected, got {channels.tolist()}"
    if not np.isfinite(rows.astype(np.float32)).all():
        return "the outliers' weight must be finite"
    return None


_PARTS_OF_WEIGHT = (
    _wrong_classes,
    _wrong_activations,
    _wrong_formats,
    _wrong_dtypes,
    _wrong_shapes,
    _wrong_rotation,
)
_PARTS_OF_TENSOR = (_wrong_levels, _wrong_logical_dtype)
_VALUES_OF_WEIGHT = (_wrong_input_scale, _wrong_smoothing, _wrong_outliers)
# In this order: what is expanded are codes, zero points and scales that are in range.
_VALUES_OF_TENSOR = (
    _wrong_codes,
    _wrong_scale,
    _wrong_zero,
    _wrong_group_scale,
    _wrong_expansion,
)
