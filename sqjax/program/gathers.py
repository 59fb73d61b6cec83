"""How a gather lays out the rows that it reads."""

from jax.lax import GatherDimensionNumbers


def rows_last(numbers: GatherDimensionNumbers, rank: int) -> bool:
    """Whether a gather with indices of this rank puts the axes of a row last.

    There the groups and outliers of a quantized embedding are sought.

    Example: `table[ids]` with ids of shape (2, 5) and rows of 64 has indices of rank 3, because
    their last axis holds what is looked up along. The result (2, 5, 64) has the row as its axis 2
    == rank - 1: `offset_dims == (2,)`.
    """
    first = rank - 1
    offsets = tuple(numbers.offset_dims)
    return offsets == tuple(range(first, first + len(offsets)))
