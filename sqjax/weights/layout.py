"""How a float array is laid out when it is quantized: the order of its axes, what shares a scale.

On shapes and plain arrays: `QTensor` is built on this.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from sqjax._shapes import from_front, other_axes, runs, sizes_along
from sqjax.numerics.formats import Granularity

#: The group sizes that errors offer.
_USUAL_GROUPS = (16, 32, 64, 128, 256)


class Sharing(NamedTuple):
    """Which stored elements share a scale.

    Attributes:
        axes: one scale for all elements along these axes (counted from the end); () with groups.
        group: one scale for so many consecutive elements of the last axis; None: no groups.
        length: of the last axis. In groups of 4, 10 elements have 3 scales, the last for 2 of them.
    """

    axes: tuple[int, ...]
    group: int | None
    length: int

    def reduced(self, x: Array, by: Callable[..., Array]) -> Array:
        """`by` (jnp.min or jnp.max) over what shares a scale.

        For x of shape (7, 10): (7, 1) along axes (-1,), and (7, 3) in groups of 4.
        """
        # A range holds 0, also that of no elements.
        x = by(x, axis=self.axes, keepdims=True, initial=0)
        if self.group is None:
            return x
        # A shorter last group is filled with its last element, which changes no minimum or maximum.
        missing = -self.length % self.group
        padding = [(0, 0)] * (x.ndim - 1) + [(0, missing)]
        x = jnp.pad(x, padding, mode="edge")
        grouped = x.reshape(*x.shape[:-1], -1, self.group)
        return by(grouped, axis=-1, initial=0)

    def spread(self, x: Array) -> Array:
        """Scales in a shape that broadcasts against the stored array: (7, 3) becomes (7, 10)."""
        if self.group is None or x.shape[-1] == 1:
            return x
        return jnp.repeat(x, self.group, axis=-1)[..., : self.length]


class Layout(NamedTuple):
    """An array as it is stored, the `order` of its `QTensor`, and what shares a scale in it."""

    stored: Array
    order: tuple[int, ...]
    sharing: Sharing


def lay_out(
    x: Array,
    contracting: tuple[int, ...],
    batch: tuple[int, ...],
    granularity: Granularity,
) -> Layout:
    """Batch axes first, contracted axes last, because matrix units read the latter in a row.

    A kernel x of shape (experts, in, out) with contracting=(1,) and batch=(0,) is stored as
    (experts, out, in), with the order (-1, -2).

    Raises:
        ValueError: the granularity is unknown, or its groups do not fit.
    """
    contracting = tuple(sorted(from_front(contracting, x.ndim)))
    outer = other_axes(x.ndim, contracting, batch)
    stored = [*batch, *outer, *contracting]
    sharing = _sharing(x, contracting, len(batch), granularity)
    return Layout(x.transpose(stored), order_of(stored), sharing)


def _sharing(
    x: Array, contracting: tuple[int, ...], batch: int, granularity: Granularity
) -> Sharing:
    """What shares a scale; `contracting` is sorted."""
    last = x.shape[contracting[-1]]
    shared_axes = {
        "per_channel": len(contracting),
        "per_tensor": x.ndim - batch,
    }
    if granularity in shared_axes:
        first = -shared_axes[granularity]
        return Sharing(tuple(range(first, 0)), None, last)
    if not isinstance(granularity, int) or granularity < 1:
        raise ValueError(
            f"quantize: expected per_channel, per_tensor or a group size, got {granularity!r}"
        )
    group = min(granularity, last)
    # With several contracted axes a group may not reach into the next row of the last one.
    if last % group and len(contracting) > 1:
        raise ValueError(
            f"quantize: groups of {granularity} do not divide the {last} elements of the last of "
            f"several contracted axes; sizes that do: {group_sizes_for(last)}"
        )
    return Sharing((), group, last)


def group_sizes_for(length: int) -> str:
    """The usual group sizes that divide a length, and the length itself, as a text for errors."""
    sizes = sorted({*_USUAL_GROUPS, length})
    return ", ".join(str(size) for size in sizes if length % size == 0)


def order_of(stored: Sequence[int]) -> tuple[int, ...]:
    """The `order` of an array, given the logical axis of each stored one.

    A kernel (experts, in, out) that is stored as [0, 2, 1] has the order (-1, -2).
    """
    places = [stored.index(axis) for axis in range(len(stored))]
    return shortest(tuple(place - len(stored) for place in places))


def shortest(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order without the leading axes that are stored in place: (-3, -1, -2) is (-1, -2)."""
    for i, axis in enumerate(order):
        if axis != i - len(order):
            return order[i:]
    return ()


# Reshapes -----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Consecutive stored axes, and the new logical axes that a reshape makes of them."""

    stored: slice
    logical: list[int]


def reshape_runs(
    axes: Sequence[int], old_shape: Sequence[int], new_shape: Sequence[int]
) -> list[Run] | None:
    """A logical reshape as reshapes of stored axes, in the order in which these are stored.

    A kernel (2, 3, 4) that is stored as (4, 2, 3) becomes (6, 4) by two runs: the stored axis 0
    stays, as the logical axis 1, and the stored axes 1 and 2 become the logical axis 0. None if it
    would mix axes that are not stored side by side: that kernel as (2, 12).

    Args:
        axes: the stored axis of every logical one.
        old_shape: the logical shape.
        new_shape: what it becomes.
    """
    # Axes of size 1 may come and go anywhere: those that come are put first.
    old, _ = _by_size(old_shape)
    new, ones = _by_size(new_shape)
    found = []
    for sources, targets in runs(
        sizes_along(old_shape, old), sizes_along(new_shape, new)
    ):
        stored = sizes_along(axes, sizes_along(old, sources))
        first, end = stored[0], stored[0] + len(stored)
        if stored != tuple(range(first, end)):
            return None
        found.append(Run(slice(first, end), [*sizes_along(new, targets)]))
    found.sort(key=lambda run: run.stored.start)
    return [Run(slice(0, 0), ones), *found]


def _by_size(shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """(the axes of other sizes, the axes of size 1)."""
    longer: list[int] = []
    ones: list[int] = []
    for axis, size in enumerate(shape):
        (ones if size == 1 else longer).append(axis)
    return longer, ones


def reshaped_scale(
    scale: Sequence[int],
    values: Sequence[int],
    group: int | None,
    into: list[Run],
    new_shape: Sequence[int],
) -> list[int] | None:
    """The shape of a scale after a reshape of the values; None if the scales do not follow it.

    Args:
        scale: the scale's shape.
        values: the stored values' shape.
        group: the group size, or None.
        into: of `reshape_runs`.
        new_shape: the new logical shape.
    """
    sizes: list[int] = []
    for run in into:
        own, before = list(scale[run.stored]), list(values[run.stored])
        after = list(sizes_along(new_shape, run.logical))
        if math.prod(own) == 1:
            # All of them share a scale, and go on sharing it.
            sizes += [1] * len(after)
        elif own == before:
            sizes += after  # each has its own
        elif group is not None and _keeps_groups(own, before, after, group):
            sizes += [*after[:-1], -(-after[-1] // group)]
        else:
            return None
    return sizes


def _keeps_groups(
    own: list[int], before: list[int], after: list[int], group: int
) -> bool:
    """Whether groups of the last axis are groups of the last axis after a reshape too.

    In groups of 4, (2, 12) may become (24,) or (6, 4), but (2, 10) can not become (20,): its groups
    of 4, 4 and 2 would not be groups of 4.
    """
    whole_groups = before[-1] % group == after[-1] % group == 0
    same_scales = own[:-1] == before[:-1]
    return same_scales and (before == after or whole_groups)
