"""`QTensor`: narrow values and float scales that stand for a float array."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sqjax._shapes import runs
from sqjax.numerics.formats import (
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
from sqjax.weights.text import tensor_text

#: What the first of two levels may use of int8: a second level that rounds in steps of up to 16 then stays inside 127
#: (QServe, Lin et al. 2024, arXiv 2405.04532).
FIRST_LEVEL = Format("int8", INT8.dtype, 119.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class QTensor:
    """A quantized array: (values - zero) * group_scale * scale, seen as the float array of a logical shape and dtype.

    Invariants (`check` holds them):

    - `values` has the dtype of its format `fmt` (int4 also int8, see `sqjax.numerics.formats.container`) and is stored with the
      contracted axes last: a Dense kernel of logical shape (in, out) is stored (out, in), which is what matrix units
      read without a transpose.
    - `scale` is float32, has the rank of `values`, and broadcasts against it: but in the last axis it may have one
      entry for every `group` consecutive elements (the last group may be shorter).
    - `zero`, the zero point, and `group_scale`, the integer scale of W4A8's second level, are int8 and of such a shape
      too, or None (0 and 1). (values - zero) * group_scale is then an integer in [-127, 127].
    - `order` gives the stored axis, counted from the end, of each of the last `len(order)` logical axes; the axes
      before those are stored in place. So leading axes (layers stacked for a scan) may come and go.
    - `dtype` is the logical dtype: what `dequantize` returns and a matmul's result is cast to.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> w = sq.QTensor.quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]), contracting=(0,))
        >>> w.shape, w.values.dtype.name
        ((2, 2), 'int8')
    """

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
            granularity: "per_channel" (one scale for every index of the other axes), "per_tensor", or a group size:
                one scale for so many consecutive elements of the last contracted axis (a shorter axis is one group).
            fmt: the number format.
            batch: axes that hold one matrix each (stacked layers, experts): stored first, with scales of their own.
            zero_point: whether the range is [min, max], by way of a zero point, and not [-absmax, absmax]; int4 only.

        Raises:
            ValueError: a zero point in another format than int4, or groups that do not fit.
        """
        moved, order, share = _stored(x, contracting, batch, granularity)
        if not zero_point:
            scale = scale_from_absmax(share.reduced(jnp.abs(moved), jnp.max), fmt)
            return cls(
                to_format(moved, share.spread(scale), fmt),
                scale,
                order,
                x.dtype,
                group=share.group,
                fmt=fmt,
            )
        if fmt != INT4:
            raise ValueError(
                f"quantize: zero points are for int4 weights, got {fmt.name}; use a symmetric range"
            )
        scale, zero = zero_point_range(share.reduced(moved, jnp.min), share.reduced(moved, jnp.max))
        values = to_codes(moved, share.spread(scale), share.spread(zero))
        return cls(values, scale, order, x.dtype, zero, group=share.group, fmt=fmt)

    @classmethod
    def quantize_twice(
        cls,
        x: Float[Array, "..."],
        contracting: tuple[int, ...],
        group: int,
        batch: tuple[int, ...] = (),
    ) -> "QTensor":
        """int4 in two levels: x = scale * q with int8 |q| <= 119 per channel, q = group_scale * (values - zero).

        The second level is in integers, so that a matmul expands int4 to int8 without a float and has one scale for
        every output: |dequantize - x| <= scale * (group_scale + 1) / 2. group_scale = max(ceil((max - min) / 15), 1) of
        the group's q. QServe (Lin et al. 2024, arXiv 2405.04532).
        """
        first = cls.quantize(x, contracting, "per_channel", FIRST_LEVEL, batch)
        moved, order, share = _stored(x, contracting, batch, group)
        q = to_format(moved, first.scale, FIRST_LEVEL).astype(jnp.int32)
        low, high = (
            jnp.minimum(share.reduced(q, jnp.min), 0),
            jnp.maximum(share.reduced(q, jnp.max), 0),
        )
        step = jnp.maximum((high - low + 14) // 15, 1)
        zero = -_nearest(low, step) - 8
        values = jnp.clip(_nearest(q, share.spread(step)) + share.spread(zero), -8, 7).astype(
            container(INT4)
        )
        zero, step = zero.astype(jnp.int8), step.astype(jnp.int8)
        return cls(values, first.scale, order, x.dtype, zero, step, share.group, INT4)

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
        return tuple(self.values.shape[a] for a in self.axes)

    @property
    def ndim(self) -> int:
        """The logical rank."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales, as a file or a GPU holds them: int4 takes half a byte (one in a CPU's memory)."""
        *rows, last = self.values.shape
        values = math.prod(rows) * (
            (last + 1) // 2 if self.fmt == INT4 else last * self.fmt.dtype.itemsize
        )
        scales = [x for x in (self.scale, self.zero, self.group_scale) if x is not None]
        return values + sum(math.prod(x.shape) * x.dtype.itemsize for x in scales)

    def stored_as(self, dtype: DTypeLike) -> "QTensor":
        """int4 values stored as jnp.int4 (for a GPU or TPU) or as int8 (for a CPU); other formats stay as they are."""
        return replace(self, values=self.values.astype(dtype)) if self.fmt == INT4 else self

    def codes(self) -> Array:
        """(values - zero) * group_scale, as stored: int8, or the float8 values."""
        q = self.values
        if self.zero is not None:
            q = q.astype(jnp.int8) - self.spread(self.zero)
        return q if self.group_scale is None else q.astype(jnp.int8) * self.spread(self.group_scale)

    def spread(self, x: Array) -> Array:
        """Scales, or zero points, in a shape that broadcasts against the values: those of groups are repeated."""
        return Sharing((), self.group, self.values.shape[-1]).spread(x)

    def transpose(self, permutation: tuple[int, ...]) -> "QTensor":
        """The logical transpose: only `order` changes, the stored values stay where they are."""
        return replace(self, order=_shortest(tuple(self.axes[p] - self.ndim for p in permutation)))

    def slice(self, cuts: Sequence[slice]) -> "QTensor | None":
        """The logical slice: values, and scales along the axes that have them, are cut; None if it would cut groups."""
        cut = {stored: c for stored, c in zip(self.axes, cuts, strict=True)}
        last = self.ndim - 1
        if self.group is not None and range(self.values.shape[last])[cut[last]] != range(
            self.values.shape[last]
        ):
            return None

        def part(x):
            whole = slice(None)
            return x[
                tuple(
                    whole if x.shape[a] == 1 or (a == last and self.group) else cut[a]
                    for a in range(self.ndim)
                )
            ]

        values = self.values[tuple(cut[a] for a in range(self.ndim))]
        return self._with(values, part)

    def _with(self, values: Array, change: Callable[[Array], Array], **others: Any) -> "QTensor":
        """Other values, and scales and zero points changed alike."""
        scales = {name: getattr(self, name) for name in ("scale", "zero", "group_scale")}
        changed: dict[str, Any] = {
            name: None if x is None else change(x) for name, x in scales.items()
        }
        return replace(self, values=values, **changed, **others)

    def reshape(self, shape: tuple[int, ...]) -> "QTensor | None":
        """The logical reshape; None if it would mix axes that are stored apart, or that do not share their scales."""
        old, new = (
            [a for a, n in enumerate(sizes) if n != 1] for sizes in (self.shape, shape)
        )  # 1s come and go
        stored: list[
            tuple[int, list[int], list[int]]
        ] = []  # (first stored axis, stored axes, logical axes)
        for sources, targets in runs([self.shape[a] for a in old], [shape[a] for a in new]):
            own = [self.axes[old[a]] for a in sources]
            if own != list(range(own[0], own[0] + len(own))):
                return None
            stored.append((own[0], own, [new[a] for a in targets]))
        stored = [(-1, [], [a for a, n in enumerate(shape) if n == 1]), *sorted(stored)]
        order = [a for _, _, targets in stored for a in targets]
        place = {a: i - len(shape) for i, a in enumerate(order)}
        sizes = {
            id(x): self._scale_shape(x, stored, shape)
            for x in (self.scale, self.zero, self.group_scale)
        }
        if not all(sizes.values()):
            return None
        return self._with(
            self.values.reshape([shape[a] for a in order]),
            lambda x: x.reshape(sizes[id(x)]),
            order=_shortest(tuple(place[a] for a in range(len(shape)))),
        )

    def _scale_shape(
        self, x: Any, stored: list[tuple[int, list[int], list[int]]], shape: Any
    ) -> tuple[int, ...] | None:
        """The shape of a scale where stored axes are reshaped to logical ones of `shape`; None if there is none."""
        sizes: list[int] = []
        for _, own, targets in stored:
            new, old = [shape[a] for a in targets], [self.values.shape[a] for a in own]
            had = [1 if x is None else x.shape[a] for a in own]
            if all(n == 1 for n in had):
                sizes += [1] * len(new)
            elif had == old:
                sizes += new
            elif (
                (g := self.group)
                and had[:-1] == old[:-1]
                and (old == new or (old[-1] % g == 0 == new[-1] % g))
            ):
                sizes += [*new[:-1], -(-new[-1] // g)]
            else:
                return None
        return tuple(sizes) or (1,) * len(shape)

    def check(self, where: str) -> None:
        """Raises ValueError, naming `where`, if an invariant does not hold."""
        problem = None
        if self.values.dtype not in (self.fmt.dtype, container(self.fmt)):
            problem = (
                f"values must be {self.fmt.name}, got {self.values.dtype.name}: was the tree cast?"
            )
        elif sorted(self.order) != list(range(-len(self.order), 0)):
            problem = f"order must permute the last {len(self.order)} axes, got {self.order}"
        elif len(self.order) > self.ndim:
            problem = (
                f"values of rank {len(self.order)} or more expected, got shape {self.values.shape}"
            )
        elif self.group is not None and self.group < 1:
            problem = f"a group size of 1 or more expected, got {self.group}"
        parts = {"scale": jnp.float32, "zero": jnp.int8, "group_scale": jnp.int8}
        for name, dtype in parts.items():
            if (x := getattr(self, name)) is not None:
                problem = problem or self._problem(name, x, dtype)
        if problem:
            raise ValueError(
                f"{where}: not a valid QTensor: {problem}; quantize the float leaf again"
            )

    def _problem(self, name: str, x: Any, dtype: Any) -> str | None:
        """What is wrong with scales or zero points."""
        if x.dtype != dtype:
            return f"{name} must be {jnp.dtype(dtype).name}, got {x.dtype.name}: was the tree cast?"
        if x.ndim != self.values.ndim:
            return f"{name} of rank {self.values.ndim} expected, got shape {x.shape}"
        fits = [s in (1, v) for s, v in zip(x.shape, self.values.shape, strict=True)]
        if self.group is not None and x.shape[-1] == -(-self.values.shape[-1] // self.group):
            fits[-1] = True
        if all(fits):
            return None
        groups = "" if self.group is None else f" in groups of {self.group}"
        return f"{name} {x.shape} does not broadcast against values {self.values.shape}{groups}"


class Sharing(NamedTuple):
    """Which stored elements share a scale: all along `axes`, and groups of `group` of the `length` of the last axis."""

    axes: tuple[int, ...]
    group: int | None
    length: int

    def reduced(self, x: Array, by: Callable[..., Array]) -> Array:
        """`by` (jnp.min or jnp.max) over what shares a scale."""
        x = by(x, axis=self.axes, keepdims=True)
        if self.group is None:
            return x
        short = -self.length % self.group
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)], mode="edge")
        return by(x.reshape(*x.shape[:-1], -1, self.group), axis=-1)

    def spread(self, x: Array) -> Array:
        """What broadcasts against the stored array."""
        if self.group is None or x.shape[-1] == 1:
            return x
        return jnp.repeat(x, self.group, axis=-1)[..., : self.length]


def dequantize(q: QTensor) -> Array:
    """(values - zero) * group_scale * scale, in the logical shape and dtype: the float array that `q` stands for.

    |dequantize(quantize(x)) - x| <= scale / 2 elementwise for integers; see `sqjax.numerics.formats.to_format` for float8.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> w = jnp.array([[1.0, -2.0], [0.5, 4.0]])
        >>> bool(jnp.abs(sq.dequantize(sq.QTensor.quantize(w, (0,))) - w).max() <= 4 / 127 / 2)
        True
    """
    return (q.codes().astype(jnp.float32) * q.spread(q.scale)).transpose(q.axes).astype(q.dtype)


def _stored(
    x: Array, contracting: tuple[int, ...], batch: tuple[int, ...], granularity: Granularity
) -> tuple[Array, tuple[int, ...], Sharing]:
    """(x as it is stored, its `order`, which elements share a scale)."""
    contracting = tuple(sorted(a % x.ndim for a in contracting))
    stored = (*batch, *(a for a in range(x.ndim) if a not in (*contracting, *batch)), *contracting)
    moved, last = x.transpose(stored), x.shape[contracting[-1]]
    order = _shortest(tuple(stored.index(a) - x.ndim for a in range(x.ndim)))
    if granularity in ("per_channel", "per_tensor"):
        shared = len(contracting) if granularity == "per_channel" else x.ndim - len(batch)
        return moved, order, Sharing(tuple(range(-shared, 0)), None, last)
    if not isinstance(granularity, int) or granularity < 1:
        raise ValueError(
            f"quantize: expected per_channel, per_tensor or a group size, got {granularity!r}"
        )
    group = min(granularity, last)
    if last % group and len(contracting) > 1:
        fitting = [g for g in (32, 64, 128, last) if last % g == 0]
        raise ValueError(
            f"quantize: groups of {granularity} do not divide the {last} elements of the last of several contracted "
            f"axes; sizes that do: {', '.join(map(str, fitting))}"
        )
    return moved, order, Sharing((), group, last)


def _nearest(n: Array, step: Array) -> Array:
    """round(n / step), halves upwards, in integers: compilers multiply floats by 1 / step, and miss the halves."""
    return (2 * n + step) // (2 * step)


def _shortest(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order without the leading axes that are stored in place."""
    moved = [i for i, a in enumerate(order) if a != i - len(order)]
    return order[moved[0] :] if moved else ()


def is_tensor(x: Any) -> bool:
    """Whether this is a quantized array."""
    return isinstance(x, QTensor)


def tensor_type(x: Any) -> jax.ShapeDtypeStruct | None:
    """The type of the float array that a quantized one stands for; None if x is no quantized array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, QTensor) else None
