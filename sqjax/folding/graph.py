"""`Graph`: what folding found in a program, as plain hashable data (strings, numbers, tuples)."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sqjax._names import braced, first_matches, near_misses


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

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The leaf's axes that the axes of `channels` are."""
        return (*self.batch, *self.axes)

    @property
    def feature_axes(self) -> tuple[int, ...]:
        """The axes of `channels` within one matrix: those after the batch axes."""
        return tuple(range(len(self.batch), len(self.channels)))


class Group(NamedTuple):
    """Sites that share an activation, and the leaves that can absorb its scale.

    Attributes:
        name: the first site's path, with its index if it is one of a stack of matrices: layers/kernel[3].
        size: the number of scales: channels that are tied share one.
        sites: (path, which scale each of the site's channels has).
        leaves: (path, how each element of the leaf scales); the sites' own leaves are among them.
        norm: whether only norms (leaves that are no matmul's weight) absorb, and the sites are not the model's head:
            the groups that the authors' code smooths.
        ways: (leaf, the equations from the sites' activation to it).
        steps: the lengths of the scans, and of the mesh axes of shard_maps, over which the scales are stacked: one
            scale vector for each step, or device.
        keys: whether the scale moves from keys to queries, and `sites` names the keys first: SmoothAttention.
    """

    name: str
    size: int
    sites: tuple[tuple[str, LabelMap], ...]
    leaves: tuple[tuple[str, LabelMap], ...]
    norm: bool
    ways: tuple[tuple[str, tuple[str, ...]], ...] = ()
    steps: tuple[int, ...] = ()
    keys: bool = False

    @property
    def absorbers(self) -> tuple[str, ...]:
        """The paths of the leaves that are divided by the scale."""
        return tuple(path for path, labels in self.leaves if (labels.array < 0).any())

    def account(self, path: str) -> list[str]:
        """Lines that tell which part a leaf has in the group; none if it has none."""
        lines: list[str] = []
        if path in dict(self.sites):
            lines += [
                f"{path} is a site of the group {self.name}: {self.row()[0]} scales, absorbed by"
            ]
            for absorber in self.absorbers:
                lines += [
                    f"  {absorber}",
                    *(f"    {step}" for step in dict(self.ways).get(absorber, ())),
                ]
        if path in self.absorbers:
            lines += [f"{path} absorbs the scales of the group {self.name}"]
            lines += _steps("the sites' activation", dict(self.ways).get(path, ()))
        return lines

    def row(self) -> tuple[str, str, str]:
        """(number of scales, absorbers, sites), as texts."""
        steps = math.prod(self.steps)
        channels = max(np.count_nonzero(labels.array) for _, labels in self.sites)
        scales = (
            f"{'x'.join(map(str, self.steps))} x {self.size // steps}"
            if self.steps
            else f"{self.size}"
        )
        tied = "" if channels == self.size else f" of {channels // steps} channels"
        matrix = (
            self.name[len(self.sites[0][0]) :]
            if self.name.startswith(f"{self.sites[0][0]}[")
            else ""
        )
        return (
            scales + tied,
            braced(self.absorbers),
            braced([path for path, _ in self.sites]) + matrix,
        )


class Graph(NamedTuple):
    """The leaves, sites and groups of a program, and why the other sites are in no group.

    Attributes:
        leaves: (path, shape) of every leaf of the parameter tree.
        sites: every matmul of an activation with a leaf.
        groups: what can be folded. Every group has passed the certificate.
        refused: (site, or leaf that a matmul may meet, reason).
        offsets: (leaf, c) of leaves that `fn` reads as c + leaf only (Gemma's 1 + w): that sum is rescaled.
        ways: (refused site, the equations from its activation to what stands in the way).
        keys: the keys of attention between which and queries a scale can move; no sites, their weight is the query.
        tables: leaves that only rows are looked up in, with the axes of a row: embeddings that are no head.
    """

    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    refused: tuple[tuple[str, str], ...]
    offsets: tuple[tuple[str, float], ...] = ()
    ways: tuple[tuple[str, tuple[str, ...]], ...] = ()
    keys: tuple[Site, ...] = ()
    tables: tuple[Site, ...] = ()

    def select(self, groups: str | Iterable[str]) -> tuple[Group, ...]:
        """The groups meant by "all", "norm", one name pattern or several (searched in the sites' paths), without keys.

        Raises:
            ValueError: a pattern that matches no site of any group.
        """
        of_sites = tuple(g for g in self.groups if not g.keys)
        if groups == "all":
            return of_sites
        if groups == "norm":
            return tuple(g for g in of_sites if g.norm)
        patterns = [groups] if isinstance(groups, str) else list(groups)
        paths = [path for g in of_sites for path, _ in g.sites]
        found = first_matches(patterns, paths, "groups pattern")
        return tuple(g for g in of_sites if any(found[path] is not None for path, _ in g.sites))

    def explain(self, path: str) -> str:
        """Why a leaf is in a group, in which part, or in none: the equations of the program, with their lines.

        Raises:
            ValueError: there is no such leaf; names near misses.
        """
        known = [leaf for leaf, _ in self.leaves]
        if path not in known:
            raise ValueError(
                f"explain: {path!r} is no leaf. Near misses: {near_misses(path, known)}"
            )
        lines = [line for group in self.groups for line in group.account(path)]
        for leaf, reason in self.refused:
            if leaf == path or leaf.startswith(f"{path}["):  # one of a stack of matrices
                lines += [
                    f"{leaf} is in no group: {reason}",
                    *_steps("its activation", dict(self.ways).get(leaf, ())),
                ]
        return "\n".join(
            lines or [f"{path}: no matmul of an activation meets it, and no group needs it"]
        )

    def __str__(self) -> str:
        title = f"{len(self.groups)} groups, {len(self.sites)} sites"
        rows = [("scales", "absorbed by", "sites"), *(group.row() for group in self.groups)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        table = (
            [f"  {a:>{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
            if self.groups
            else []
        )
        return "\n".join(
            [title, *table, *(f"  refused {path}: {reason}" for path, reason in self.refused)]
        )


def _steps(start: str, way: tuple[str, ...]) -> list[str]:
    return [f"  from {start}, through", *(f"    {step}" for step in way)] if way else []
