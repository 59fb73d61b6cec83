"""`Space`: variables that may all be rotated together, as plain hashable data."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

#: Kinds of spaces (a size, and a number of leaves) that a summary lists.
_KINDS_SHOWN = 3


class Along(NamedTuple):
    """Where a space lies in an array: along one axis, or along a part or a factor of it.

    `before * size * after` indices of the axis, from `start` on, are seen as (before, size, after)
    in row-major order, and the matrix acts on `size`.

    Example: heads of 64 channels, 9 of them, written side by side along the axis 1 of (in, 576):
    a matrix of 64 x 64 that acts on every head is Along(axis=1, before=9, after=1). Where the axis
    holds queries, keys and values side by side, those of the values start at 2 x 576.

    Attributes:
        axis: of the array, counted from 0.
        before, after: the factors beside the size of the space.
        start: the first index.
    """

    axis: int
    before: int = 1
    after: int = 1
    start: int = 0

    def length(self, size: int) -> int:
        """How many indices of the axis it takes, in a space of this size."""
        return self.before * size * self.after

    def is_whole(self, size: int, shape: Sequence[int]) -> bool:
        """Whether it takes the whole axis of an array of this shape."""
        return self.length(size) == shape[self.axis]

    def at(self, axis: int, start: int | None = None) -> "Along":
        """The same along another axis, or from another index on."""
        begin = self.start if start is None else start
        return self._replace(axis=axis, start=begin)


class Space(NamedTuple):
    """An axis of a set of variables that may all become x Q, for any orthogonal Q of its size.

    The function stays what it is if every leaf is multiplied by Q along its `Along`. It is one rule
    for all leaves, because Q is orthogonal: a kernel that makes x becomes W Q; one that reads x
    becomes Q^T W, which is W multiplied by Q along its first axis.

    Attributes:
        name: the first site that reads it.
        size: the rows of Q.
        leaves: (path, where the space lies in it); of stacked layers all have one Q. A leaf stands
            here twice if two of its axes are rotated.
        gains: leaves that multiply it element by element. They must be ones there (of 1 + w: w must
            be zeros), which an ordinary fold of s = gain achieves.
        keeps_ones: whether Q must fix the vector of ones, 1 Q = 1: a LayerNorm takes the mean.
        sites: the sites whose activation is rotated.
    """

    name: str
    size: int
    leaves: tuple[tuple[str, Along], ...]
    gains: tuple[str, ...] = ()
    keeps_ones: bool = False
    sites: tuple[str, ...] = ()

    @property
    def effect(self) -> "Space":
        """The space without its name and sites: what a rotation does, and asks for."""
        return self._replace(name="", sites=())

    def account(self, path: str) -> list[str]:
        """Lines that tell which part a leaf has in the space; none if it has none."""
        lines = []
        axes = [along.axis for other, along in self.leaves if other == path]
        others = len({other for other, _ in self.leaves} - {path})
        if axes:
            along = " and ".join(map(str, axes))
            lines.append(
                f"{path} turns along its axis {along} in the space {self.name}: "
                f"{self.size} channels, with {others} other leaves"
            )
            if self.keeps_ones:
                lines.append("  by rotations that keep the vector of ones only")
        if path in self.gains:
            lines.append(
                f"{path} must be folded into what reads it before the space {self.name} turns"
            )
        return lines


def summary(spaces: Sequence[Space]) -> str:
    """How many spaces there are, and what the largest of them are like, in a line.

    Example: "31 spaces that may turn: 1 with 576 channels in 211 leaves, 30 with 64 channels in 2
    leaves". (Of a group "1 of 576 channels" says that others have no scale.)
    """
    # By the leaves only, because a leaf may turn along two axes.
    kinds = Counter((space.size, len(dict(space.leaves))) for space in spaces)
    largest = sorted(kinds, key=math.prod, reverse=True)
    texts = [
        f"{kinds[kind]} with {kind[0]} channels in {kind[1]} leaves"
        for kind in largest[:_KINDS_SHOWN]
    ]
    more = ", ..." if len(largest) > _KINDS_SHOWN else ""
    what = "space that may turn" if len(spaces) == 1 else "spaces that may turn"
    return f"{len(spaces)} {what}: {', '.join(texts)}{more}"
