"""How a gather lays out the rows that it reads."""

from jax.lax import GatherDimensionNumbers


def rows_last(numbers: GatherDimensionNumbers, rank: int) -> bool:
    """Whether a gather with indices of this rank puts the axes of a row last, where groups and outliers are sought."""
    offsets = tuple(numbers.offset_dims)
    return offsets == tuple(range(rank - 1, rank - 1 + len(offsets)))
