"""`QTensor`: narrow values and float scales that stand for a float array."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sqjax._arguments import expect
from sqjax._serialized import exported
from sqjax._shapes import entries_at, sharded_as, sizes_along
from sqjax.numerics.formats import (
    FORMATS,
    INT4,
    INT8,
    Format,
    Granularity,
    container,
    scale_from_absmax,
    to_codes,
    to_format,
    zero_point_range,
)
from sqjax.weights.layout import (
    Sharing,
    lay_out,
    order_of,
    reshape_runs,
    reshaped_scale,
    shortest,
)
from sqjax.weights.no_array import NoArray
from sqjax.weights.text import tensor_text

#: What the first of two levels may use of int8: a second level that rounds in steps of up to 16
#: then stays inside 127 (QServe, Lin et al. 2024, arXiv 2405.04532).
FIRST_LEVEL = Format("int8", INT8.dtype, 119.0)

#: The dtypes of the arrays beside the values.
_SCALE_DTYPES: dict[str, np.dtype] = {
    "scale": np.dtype(np.float32),
    "zero": np.dtype(np.int8),
    "group_scale": np.dtype(np.int8),
}


@exported(
    order=(list, tuple),
    dtype=(attrgetter("name"), np.dtype),
    fmt=(attrgetter("name"), FORMATS.__getitem__),
)
@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class QTensor(NoArray):
    """A quantized array: (values - zero) * group_scale * scale, seen as a float array.

    Invariants (`check` holds them):

    - `values` has the dtype of its format `fmt` (int4 also int8, see
      `sqjax.numerics.formats.container`) and is stored with the contracted axes last: a Dense
      kernel of logical shape (in, out) is stored (out, in), which is what matrix units read without
      a transpose.
    - `scale` is float32, has the rank of `values`, and broadcasts against it: but in the last axis
      it may have one entry for every `group` consecutive elements (the last group may be shorter).
    - `zero`, the zero point, and `group_scale`, the integer scale of W4A8's second level, are int8
      and of such a shape too, or None (0 and 1). (values - zero) * group_scale is then an integer
      in [-127, 127].
    - `order` gives the stored axis, counted from the end, of each of the last `len(order)` logical
      axes; the axes before those are stored in place. So leading axes (layers stacked for a scan)
      may come and go.
    - `dtype` is the logical dtype: what `dequantize` returns and a matmul's result is cast to.

    A product does not take a `QTensor` but a `sqjax.numerics.weight_products.Matrix`, which
    `sqjax.weights.dot_general.matrices` makes of one. Both exist because they know different
    things: a QTensor is a leaf of a user's tree, with logical axes in any order and scales that
    broadcast; a Matrix is plain arrays of the shapes (outputs, inner) and (outputs, groups), with
    nothing left to look up.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> w = sq.QTensor.quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]), contracting=(0,))
        >>> w.shape, w.values.dtype.name
        ((2, 2), 'int8')
    """

    _instead = (
        "a quantized array is an argument of sqjax.quantized(fn); as a float array it is "
        "sqjax.dequantize(tensor)"
    )

    values: Any  # an Array; a ShapeDtypeStruct, a sharding, ... where jax maps over the tree
    scale: Any
    order: tuple[int, ...] = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})
    zero: Any = None
    group_scale: Any = None
    group: int | None = field(default=None, metadata={"static": True})
    fmt: Format = field(default=INT8, metadata={"static": True})

    @classmethod
    def quantize(
        cls,
        x: Float[Array, "..."],
        contracting: tuple[int, ...],
        granularity: Granularity = "per_channel",
        fmt: Format = INT8,
        batch: tuple[int, ...] = (),
        zero_point: bool = False,
    ) -> "QTensor":
        """Quantizes `x` along its logical axes `contracting`.

        Args:
            x: a float array (for example a Dense kernel, (in, out)).
            contracting: the axes that a matmul sums over; they share scales and are stored last.
            granularity: "per_channel" (one scale for every index of the other axes), "per_tensor",
                or a group size: one scale for so many consecutive elements of the last contracted
                axis (a shorter axis is one group).
            fmt: the number format.
            batch: axes that hold one matrix each (stacked layers, experts): stored first, with
                scales of their own.
            zero_point: whether the range is [min, max], by way of a zero point, and not [-absmax,
                absmax]; int4 only.

        Raises:
            ValueError: a zero point in another format than int4, or groups that do not fit.
        """
        return _quantized(
            x,
            contracting=tuple(contracting),
            granularity=granularity,
            fmt=fmt,
            batch=tuple(batch),
            zero_point=zero_point,
        )

    @classmethod
    def quantize_twice(
        cls,
        x: Float[Array, "..."],
        contracting: tuple[int, ...],
        group: int,
        batch: tuple[int, ...] = (),
    ) -> "QTensor":
        """int4 in two levels: x = scale * q, and q = step * (values - zero).

        The first level is int8 with |q| <= 119 and a scale for every channel.

        The `step` of a group is its `group_scale`, max(ceil((max - min) / 15), 1) of the group's q.
        The second level is in integers, so that a matmul expands int4 to int8 without a float and
        has one scale for every output: |dequantize - x| <= scale * (step + 1) / 2. QServe (Lin et
        al. 2024, arXiv 2405.04532).

        Args:
            x: a float array.
            contracting: the axes that a matmul sums over.
            group: how many consecutive elements of the last contracted axis share a step.
            batch: axes that hold one matrix each.

        Raises:
            ValueError: groups that do not fit.
        """
        return _quantized_twice(
            x, contracting=tuple(contracting), group=group, batch=tuple(batch)
        )

    def __repr__(self) -> str:
        return tensor_text(self)

    @property
    def axes(self) -> tuple[int, ...]:
        """The stored axis of every logical axis."""
        lead = self.ndim - len(self.order)
        return (*range(lead), *(a + self.ndim for a in self.order))

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return sizes_along(self.values.shape, self.axes)

    @property
    def ndim(self) -> int:
        """The logical rank."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales, as a file or a GPU holds them.

        int4 takes half a byte there, a row of odd length one nibble more (a CPU's memory holds it
        in one byte): int4 values of shape (3, 5) are 9 bytes.
        """
        *rows, last = self.values.shape
        row_bytes = (
            (last + 1) // 2
            if self.fmt == INT4
            else last * self.fmt.dtype.itemsize
        )
        scales = jax.tree.leaves(self._scales())
        of_scales = [math.prod(x.shape) * x.dtype.itemsize for x in scales]
        return math.prod(rows) * row_bytes + sum(of_scales)

    def _scales(self) -> dict[str, Any]:
        """The arrays beside the values, by name; None where there is none."""
        return {
            "scale": self.scale,
            "zero": self.zero,
            "group_scale": self.group_scale,
        }

    def map_scales(self, change: Callable[[Any], Any]) -> "QTensor":
        """The tensor with `change` made to its scales, and to its zero points if it has any."""
        return replace(self, **jax.tree.map(change, self._scales()))

    def as_stored(self, of_logical: Sequence[Any]) -> list[Any]:
        """What is given for each logical axis, in the order of the stored axes."""
        # The logical axis of each stored one is the inverse permutation of `axes`.
        return [*entries_at(of_logical, np.argsort(self.axes).tolist())]

    def stored_as(self, dtype: DTypeLike) -> "QTensor":
        """int4 values as jnp.int4 (for a GPU or TPU) or as int8 (for a CPU); others as they are."""
        return (
            replace(self, values=self.values.astype(dtype))
            if self.fmt == INT4
            else self
        )

    def codes(self) -> Array:
        """(values - zero) * group_scale, as stored: int8, or the float8 values."""
        q = self.values
        if self.zero is not None:
            q = q.astype(jnp.int8) - self.spread(self.zero)
        if self.group_scale is not None:
            q = q.astype(jnp.int8) * self.spread(self.group_scale)
        return q

    def spread(self, x: Array) -> Array:
        """Scales, or zero points, in a shape that broadcasts against the values."""
        return Sharing((), self.group, self.values.shape[-1]).spread(x)

    def transpose(self, permutation: tuple[int, ...]) -> "QTensor":
        """The logical transpose: only `order` changes, the stored values stay where they are."""
        order = tuple(self.axes[axis] - self.ndim for axis in permutation)
        return replace(self, order=shortest(order))

    def times(self, factor: Any) -> "QTensor":
        """The tensor times a number, or an array of its rank that does not vary where it shares a
        scale: the scale is that many times larger, and may be negative.
        """
        stored = self.stored(factor).astype(jnp.float32)
        return replace(self, scale=self.scale * stored)

    def where(self, mask: Any) -> "QTensor":
        """The tensor where a mask is true, an array of its rank or a number, and 0 elsewhere.

        The scales stay. Exactly 0 is the code `zero`, or 0 where there is no zero point.
        """
        zero = 0 if self.zero is None else self.spread(self.zero)
        code = jnp.asarray(zero).astype(self.values.dtype)
        values = jnp.where(self.stored(mask), self.values, code)
        return replace(self, values=values)

    def stored(self, x: Any) -> Array:
        """A logical array of the tensor's rank with its axes as the values' are; a number as it
        is.
        """
        x = jnp.asarray(x)
        return x.transpose(self.as_stored(range(self.ndim))) if x.ndim else x

    def slice(self, slices: Sequence[slice]) -> "QTensor | None":
        """The logical slice: values, and scales along the axes that have them.

        None if it would take a part of the axis that is in groups, because a group of which a part
        is gone is no group of this size any more.
        """
        stored = self.as_stored(slices)
        length = self.values.shape[-1]
        all_of_last = range(length)[stored[-1]] == range(length)
        if self.group is not None and not all_of_last:
            return None

        def part(x):
            # A slice that takes all channels takes all of their groups too.
            pairs = zip(x.shape, stored, strict=True)
            own = [slice(None) if size == 1 else taken for size, taken in pairs]
            return x[tuple(own)]

        values = self.values[tuple(stored)]
        return replace(self.map_scales(part), values=values)

    def reshape(self, shape: tuple[int, ...]) -> "QTensor | None":
        """The logical reshape, of values and scales.

        None if it would mix axes that are stored apart, or that do not share their scales, and for
        a scalar. See `reshape_runs` and `reshaped_scale` for examples.
        """
        into = reshape_runs(self.axes, self.shape, shape)
        if into is None or not shape:
            return None
        old = self.values.shape
        changed = {}
        for name, x in self._scales().items():
            if x is None:
                continue
            sizes = reshaped_scale(x.shape, old, self.group, into, shape)
            if sizes is None:
                return None
            changed[name] = x.reshape(sizes)
        stored = list(chain(*map(attrgetter("logical"), into)))
        values = self.values.reshape(sizes_along(shape, stored))
        return replace(self, values=values, order=order_of(stored), **changed)

    def check(self, where: str) -> None:
        """Raises ValueError, naming `where`, if an invariant does not hold."""
        problem = self._problem_of_values()
        for name, x in self._scales().items():
            problem = problem or self._problem_of_scale(name, x)
        if problem:
            raise ValueError(
                f"{where}: not a valid QTensor: {problem}; quantize the float leaf again"
            )

    def _problem_of_values(self) -> str | None:
        """What is wrong with the values, the order or the group size."""
        count = len(self.order)
        if self.values.dtype not in (self.fmt.dtype, container(self.fmt)):
            came = self.values.dtype.name
            return f"values must be {self.fmt.name}, got {came}: was the tree cast?"
        if sorted(self.order) != list(range(-count, 0)):
            return f"order must permute the last {count} axes, got {self.order}"
        if count > self.ndim:
            return f"values of rank {count} or more expected, got shape {self.values.shape}"
        if self.group is not None and self.group < 1:
            return f"a group size of 1 or more expected, got {self.group}"
        return None

    def _problem_of_scale(self, name: str, x: Any) -> str | None:
        """What is wrong with scales or zero points."""
        if x is None:
            return None
        dtype = _SCALE_DTYPES[name]
        if x.dtype != dtype:
            return f"{name} must be {dtype.name}, got {x.dtype.name}: was the tree cast?"
        if x.ndim != self.values.ndim:
            return f"{name} of rank {self.values.ndim} expected, got shape {x.shape}"
        sizes = list(self.values.shape)
        fits = [
            own in (1, size) for own, size in zip(x.shape, sizes, strict=True)
        ]
        groups = ""
        if self.group is not None:
            groups = f" in groups of {self.group}"
            count = -(-sizes[-1] // self.group)
            fits[-1] = fits[-1] or x.shape[-1] == count
        if all(fits):
            return None
        return f"{name} {x.shape} does not broadcast against values {self.values.shape}{groups}"


def dequantize(q: QTensor) -> Array:
    """The float array that `q` stands for: (values - zero) * group_scale * scale.

    |dequantize(quantize(x)) - x| <= scale / 2 elementwise for integers; see
    `sqjax.numerics.formats.to_format` for float8.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> w = jnp.array([[1.0, -2.0], [0.5, 4.0]])
        >>> bool(jnp.abs(sq.dequantize(sq.QTensor.quantize(w, (0,))) - w).max() <= 4 / 127 / 2)
        True
    """
    expect(
        is_tensor(q),
        "dequantize",
        "one QTensor (of a quantized weight that is `weight.tensor`; of a tree take each weight's, "
        "with jax.tree.map and is_leaf=lambda w: isinstance(w, sqjax.QuantWeight))",
        q,
    )
    return _dequantized(q)


# Compiled whole, because step by step each step is a program of its own --------------------------


@partial(
    jax.jit,
    static_argnames=(
        "contracting",
        "granularity",
        "fmt",
        "batch",
        "zero_point",
    ),
    inline=True,
)
def _quantized(
    x: Array,
    *,
    contracting: tuple[int, ...],
    granularity: Granularity,
    fmt: Format,
    batch: tuple[int, ...],
    zero_point: bool,
) -> QTensor:
    stored, order, sharing = lay_out(x, contracting, batch, granularity)
    if not zero_point:
        scale = scale_from_absmax(
            sharing.reduced(jnp.abs(stored), jnp.max), fmt
        )
        values = to_format(stored, sharing.spread(scale), fmt)
        return QTensor(
            values, scale, order, x.dtype, group=sharing.group, fmt=fmt
        )
    if fmt != INT4:
        raise ValueError(
            f"quantize: zero points are for int4 weights, got {fmt.name}; use a symmetric range"
        )
    lowest = sharing.reduced(stored, jnp.min)
    highest = sharing.reduced(stored, jnp.max)
    scale, zero = zero_point_range(lowest, highest)
    values = to_codes(stored, sharing.spread(scale), sharing.spread(zero))
    return QTensor(
        values, scale, order, x.dtype, zero, group=sharing.group, fmt=fmt
    )


@partial(
    jax.jit, static_argnames=("contracting", "group", "batch"), inline=True
)
def _quantized_twice(
    x: Array,
    *,
    contracting: tuple[int, ...],
    group: int,
    batch: tuple[int, ...],
) -> QTensor:
    first = QTensor.quantize(x, contracting, "per_channel", FIRST_LEVEL, batch)
    stored, order, sharing = lay_out(x, contracting, batch, group)
    q = to_format(stored, first.scale, FIRST_LEVEL).astype(jnp.int32)
    # The range holds 0, so that 0 has a code of its own.
    low = jnp.minimum(sharing.reduced(q, jnp.min), 0)
    high = jnp.maximum(sharing.reduced(q, jnp.max), 0)
    step = jnp.maximum((high - low + 14) // 15, 1)
    zero = -_nearest(low, step) - 8
    codes = _nearest(q, sharing.spread(step)) + sharing.spread(zero)
    values = jnp.clip(codes, -8, 7).astype(container(INT4))
    zero, step = zero.astype(jnp.int8), step.astype(jnp.int8)
    return QTensor(
        values, first.scale, order, x.dtype, zero, step, sharing.group, INT4
    )


@partial(jax.jit, inline=True)
def _dequantized(q: QTensor) -> Array:
    stored = q.codes().astype(jnp.float32) * q.spread(q.scale)
    return stored.transpose(q.axes).astype(q.dtype)


def _nearest(n: Array, step: Array) -> Array:
    """round(n / step), halves upwards, in integers.

    Not in floats, because compilers multiply those by 1 / step, and round some halves down.
    """
    return (2 * n + step) // (2 * step)


def is_tensor(x: Any) -> bool:
    """Whether this is a quantized array."""
    return isinstance(x, QTensor)


def tensor_type(x: Any) -> jax.ShapeDtypeStruct | None:
    """The type of the float array that a `QTensor` stands for; None for anything else."""
    if not isinstance(x, QTensor):
        return None
    plain = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return sharded_as(plain, x.values, x.axes)
