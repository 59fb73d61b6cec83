"""`Graph`: what folding found in a program, as plain hashable data (strings, numbers, tuples)."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sqjax.trees import first_matches


class LabelMap(NamedTuple):
    """A label array (see `sqjax.labels`) that can be hashed: +(c + 1) multiplies by scale c, -(c + 1) divides."""

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, labels: np.ndarray) -> "LabelMap":
        return cls(labels.shape, np.ascontiguousarray(labels, np.int32).tobytes())

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, np.int32).reshape(self.shape)


class Site(NamedTuple):
    """A leaf that an activation is multiplied with.

    Attributes:
        path: the leaf's name.
        axes: its contracted axes.
        channels: the sizes of `batch`, then of `axes`: the shape of the site's statistics.
        batch: its axes that hold one matrix each: layers that a scan runs over, experts.
    """

    path: str
    axes: tuple[int, ...]
    channels: tuple[int, ...]
    batch: tuple[int, ...] = ()


class Group(NamedTuple):
    """Sites that share an activation, and the leaves that can absorb its scale.

    Attributes:
        name: the first site's path.
        size: the number of scales: channels that are tied share one.
        sites: (path, which scale each of the site's channels has).
        leaves: (path, how each element of the leaf scales); the sites' own leaves are among them.
        norm: whether only norms (leaves that are no matmul's weight) absorb, and the sites are not the model's head:
            the groups that the authors' code smooths.
    """

    name: str
    size: int
    sites: tuple[tuple[str, LabelMap], ...]
    leaves: tuple[tuple[str, LabelMap], ...]
    norm: bool

    @property
    def absorbers(self) -> tuple[str, ...]:
        """The paths of the leaves that are divided by the scale."""
        return tuple(path for path, labels in self.leaves if (labels.array < 0).any())


class Graph(NamedTuple):
    """The leaves, sites and groups of a program, and why the other sites are in no group.

    Attributes:
        leaves: (path, shape) of every leaf of the parameter tree.
        sites: every matmul of an activation with a leaf.
        groups: what can be folded. Every group has passed the certificate.
        refused: (site, reason).
        offsets: (leaf, c) of leaves that `fn` reads as c + leaf only (Gemma's 1 + w): that sum is rescaled.
    """

    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    refused: tuple[tuple[str, str], ...]
    offsets: tuple[tuple[str, float], ...] = ()

    def select(self, groups: str | Iterable[str]) -> tuple[Group, ...]:
        """The groups meant by "all", "norm", one name pattern or several (searched in the sites' paths).

        Raises:
            ValueError: a pattern that matches no site of any group.
        """
        if groups == "all":
            return self.groups
        if groups == "norm":
            return tuple(g for g in self.groups if g.norm)
        patterns = [groups] if isinstance(groups, str) else list(groups)
        paths = [path for g in self.groups for path, _ in g.sites]
        found = first_matches(patterns, paths, "groups pattern")
        return tuple(g for g in self.groups if any(found[path] is not None for path, _ in g.sites))

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups, {len(self.sites)} sites"]
        for g in self.groups:
            channels = max(np.count_nonzero(labels.array) for _, labels in g.sites)
            tied = f" ({channels} channels tied)" if channels != g.size else ""
            sites = ", ".join(path for path, _ in g.sites)
            lines.append(f"  {g.size} scales{tied}: {', '.join(g.absorbers)} -> {sites}")
        lines += [f"  refused {path}: {reason}" for path, reason in self.refused]
        return "\n".join(lines)
