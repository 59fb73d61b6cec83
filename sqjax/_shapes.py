"""Helpers for shapes: axes that a reshape keeps together, the mesh axes of a spec, how an array is sharded."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes of two shapes that have equal products: [(axes of old, axes of new), ...]."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[i0:i])) != (b := math.prod(new[j0:j])):
            if a < b:
                i += 1
            else:
                j += 1
        found.append((list(range(i0, i)), list(range(j0, j))))
    return found


def sharded_as(
    plain: jax.ShapeDtypeStruct, stored: Any, axes: Sequence[int]
) -> jax.ShapeDtypeStruct:
    """The type `plain`, sharded as the array `stored` is: axis i as its axis `axes[i]`.

    Only meshes with explicit axes say in an array's type how it is sharded; elsewhere the type stays as it is.
    """
    if not isinstance(stored, jax.Array):
        return plain
    sharding = jax.typeof(stored).sharding
    entries = [sharding.spec[a] for a in axes]
    if not any(entries):
        return plain
    return plain.update(sharding=sharding.update(spec=PartitionSpec(*entries)))
