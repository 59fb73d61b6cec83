"""`Ties`: which channels share one scale."""

import numpy as np

from sqjax.folding.labels import (
    DEGREE,
    Labels,
    channels_and_degrees,
    compress,
)


class Ties:
    """A union-find of channels: tied channels share one scale.

    Attributes:
        roots: for every channel the one that stands for all that are tied with it, the smallest.

    Examples:
        >>> import numpy as np
        >>> from sqjax.folding.ties import Ties
        >>> ties = Ties(np.arange(4))
        >>> ties.join(np.array([0, 3]), np.array([2, 2]))  # 0 with 2, and 3 with 2
        >>> ties.roots.tolist(), ties.of(np.array([-1, -2, -3, -4])).tolist()
        ([0, 1, 0, 0], [-1, -2, -1, -1])
    """

    def __init__(self, roots: np.ndarray):
        self.roots = roots

    def of(self, labels: Labels) -> Labels:
        """The labels with every channel replaced by the one that stands for it."""
        channels, degrees = channels_and_degrees(labels)
        # 0 where there is no label, which is sorted out below.
        first = self.roots[channels - 1] + 1
        standing = np.sign(labels) * (first + (degrees - 1) * DEGREE)
        return compress(np.where(labels == 0, 0, standing))

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Ties channel a[i] with channel b[i]; the smallest of them stands for all that are
        tied.
        """
        while (differ := self.roots[a] != self.roots[b]).any():
            p, q = self.roots[a[differ]], self.roots[b[differ]]
            # The larger root of each pair gets the smaller one as its parent. A root in several
            # pairs keeps the smallest, so the loop comes back for the others.
            parent = np.arange(self.roots.size)
            np.minimum.at(parent, np.maximum(p, q), np.minimum(p, q))
            while (parent != (grandparent := parent[parent])).any():
                parent = grandparent
            self.roots = parent[self.roots]

    def numbered(self) -> "Ties":
        """The same ties, with the channels that stand for others numbered 0, 1, 2 ... in order."""
        used, number = np.unique(self.roots, return_inverse=True)
        assert (used[number] == self.roots).all()
        return Ties(number)
