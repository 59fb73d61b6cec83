"""Helpers for shapes: runs of axes that a reshape keeps together, mesh axes of a spec, how an array
is sharded."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

Shape = tuple[int, ...]
Entry = TypeVar("Entry")


def entries_at(
    entries: Sequence[Entry] | Mapping[int, Entry], places: Iterable[int]
) -> tuple[Entry, ...]:
    """The entries at these places, in the order of the places.

    Example: of ("a", "b", "c") and [2, 0] these are ("c", "a").
    """
    return tuple(entries[place] for place in places)


def sizes_along(shape: Sequence[int], axes: Iterable[int]) -> Shape:
    """The sizes along these axes, in their order: of (2, 3, 4) and [2, 0] these are (4, 2)."""
    return entries_at(shape, axes)


def from_front(axes: Iterable[int], ndim: int) -> Shape:
    """Axes of an array of rank `ndim`, counted from the front: (-1, 0) of 3 axes are (2, 0)."""
    return tuple(a % ndim for a in axes)


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names: None names none, ("a", "b") two."""
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry)


def other_axes(ndim: int, *taken: Sequence[int]) -> list[int]:
    """The axes of an array of rank `ndim` that are in none of these sequences, ascending.

    Example: other_axes(4, (0,), (3,)) is [1, 2].
    """
    return sorted(set(range(ndim)).difference(*taken))


def runs(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes of two shapes that have equal products: [(axes of old, axes of
    new), ...].

    A reshape mixes the axes of one run, and leaves the runs apart.

    Example: (2, 6, 4) -> (2, 3, 2, 4) has the runs ([0], [0]), ([1], [1, 2]) and ([2], [3]),
    because 6 = 3 * 2."""
    found: list[tuple[list[int], list[int]]] = []
    old_end = new_end = 0
    while old_end < len(old) or new_end < len(new):
        old_start, new_start = old_end, new_end
        # One side may have run out of axes: what is left on the other side is of size 1.
        old_end = min(old_end + 1, len(old))
        new_end = min(new_end + 1, len(new))
        while True:
            of_old = math.prod(old[old_start:old_end])
            of_new = math.prod(new[new_start:new_end])
            if of_old == of_new:
                break
            if of_old < of_new:
                old_end += 1
            else:
                new_end += 1
        axes_of_old = list(range(old_start, old_end))
        axes_of_new = list(range(new_start, new_end))
        found.append((axes_of_old, axes_of_new))
    return found


def sharded_as(
    plain: jax.ShapeDtypeStruct, stored: Any, axes: Sequence[int]
) -> jax.ShapeDtypeStruct:
    """The type `plain`, sharded as the array `stored` is: axis i as its axis `axes[i]`.

    Only meshes with explicit axes say in an array's type how it is sharded; elsewhere the type
    stays as it is. Inside a shard_map it also says over which mesh axes the numbers vary.

    Example: a transposed view of a stored array with the spec P("model", None) has axes (1, 0) and
    P(None, "model")."""
    if not isinstance(stored, jax.Array):
        return plain
    stored_type = jax.typeof(stored)
    sharding, manual = stored_type.sharding, stored_type.manual_axis_type
    entries = entries_at(tuple(sharding.spec), axes)
    if not any(entries) and not manual.varying:
        return plain
    moved = sharding.update(spec=PartitionSpec(*entries))
    return plain.update(sharding=moved, manual_axis_type=manual)
