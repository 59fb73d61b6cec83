"""A site's leaf as a stack of plain matrices: what searches walk along, one after the other."""

import math

from jaxtyping import Array

from sqjax._shapes import other_axes, sizes_along
from sqjax.folding.graph import Site


def stacked(leaf: Array, site: Site) -> Array:
    """The leaf with its batch axes first and as one.

    Example: a leaf (in, experts, out) with batch (1,) becomes (experts, in, out); one without batch
    axes (1, in, out).
    """
    outer = other_axes(leaf.ndim, site.batch)
    count = math.prod(sizes_along(leaf.shape, site.batch))
    moved = leaf.transpose(*site.batch, *outer)
    return moved.reshape(count, *sizes_along(leaf.shape, outer))


def in_matrix(site: Site) -> tuple[int, ...]:
    """The contracted axes of one matrix, once the batch axes are gone.

    Example: those of a leaf (experts, in, heads, out) with batch (0,) and axes (1,) are (0,).
    """
    return tuple(
        axis - sum(taken < axis for taken in site.batch) for axis in site.axes
    )
