"""How a float array is laid out when it is quantized: the order of its axes, what shares a scale.

On shapes and plain arrays: `QTensor` is built on this.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from sqjax._shapes import runs
from sqjax.numerics.formats import Granularity


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
        x = by(x, axis=self.axes, keepdims=True)
        if self.group is None:
            return x
        # A shorter last group is filled with its last element, which changes no minimum or maximum.
        missing = -self.length % self.group
        padding = [(0, 0)] * (x.ndim - 1) + [(0, missing)]
        x = jnp.pad(x, padding, mode="edge")
        grouped = x.reshape(*x.shape[:-1], -1, self.group)
        return by(grouped, axis=-1)

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
    contracting = tuple(sorted(a % x.ndim for a in contracting))
    outer = [a for a in range(x.ndim) if a not in (*contracting, *batch)]
    stored_axes = (*batch, *outer, *contracting)
    order = tuple(stored_axes.index(a) - x.ndim for a in range(x.ndim))
    sharing = _sharing(x, contracting, len(batch), granularity)
    return Layout(x.transpose(stored_axes), shortest(order), sharing)


def _sharing(
    x: Array, contracting: tuple[int, ...], batch: int, granularity: Granularity
) -> Sharing:
    """What shares a scale; `contracting` is sorted."""
    last = x.shape[contracting[-1]]
    if granularity == "per_channel":
        return Sharing(tuple(range(-len(contracting), 0)), None, last)
    if granularity == "per_tensor":
        return Sharing(tuple(range(batch - x.ndim, 0)), None, last)
    if not isinstance(granularity, int) or granularity < 1:
        raise ValueError(
            f"quantize: expected per_channel, per_tensor or a group size, got {granularity!r}"
        )
    group = min(granularity, last)
    # With several contracted axes a group may not reach into the next row of the last one.
    if last % group and len(contracting) > 1:
        fitting = ", ".join(
            str(g) for g in (32, 64, 128, last) if last % g == 0
        )
        raise ValueError(
            f"quantize: groups of {granularity} do not divide the {last} elements of the last of "
            f"several contracted axes; sizes that do: {fitting}"
        )
    return Sharing((), group, last)


def shortest(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order without the leading axes that are stored in place: (-3, -1, -2) is (-1, -2)."""
    for i, axis in enumerate(order):
        if axis != i - len(order):
            return order[i:]
    return ()


# Reshapes -----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Consecutive stored axes, and the new logical axes that a reshape makes of them."""

    stored: list[int]
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
        [old_shape[a] for a in old], [new_shape[a] for a in new]
    ):
        stored = [axes[old[a]] for a in sources]
        first = stored[0]
        if stored != list(range(first, first + len(stored))):
            return None
        found.append(Run(stored, [new[a] for a in targets]))
    found.sort(key=lambda run: run.stored)
    return [Run([], ones), *found]


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
        own = [scale[a] for a in run.stored]
        before = [values[a] for a in run.stored]
        after = [new_shape[a] for a in run.logical]
        if all(n == 1 for n in own):
            sizes += [1] * len(
                after
            )  # all of them share a scale, and go on sharing it
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
    if own[:-1] != before[:-1]:
        return False
    return before == after or (
        before[-1] % group == 0 and after[-1] % group == 0
    )
