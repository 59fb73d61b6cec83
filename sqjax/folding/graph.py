"""`Graph`: what folding found in a program, as plain hashable data (strings, numbers, tuples)."""

import math
import re
from collections.abc import Iterable
from itertools import chain, filterfalse
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from sqjax._arguments import expect
from sqjax._names import braced, first_matches, near_misses
from sqjax._tables import aligned
from sqjax.folding.labels import channels_and_degrees
from sqjax.folding.space import Space, summary


class LabelMap(NamedTuple):
    """A label array (see `sqjax.folding.labels`) that can be hashed: +(c + 1) multiplies by scale
    c, -(c + 1) divides.

    Examples:
        >>> import numpy as np
        >>> from sqjax.folding.graph import LabelMap
        >>> LabelMap.of(np.array([[1], [2]])).array.tolist()
        [[1], [2]]
    """

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, labels: np.ndarray) -> "LabelMap":
        """The label array as a `LabelMap`."""
        return cls(
            labels.shape, np.ascontiguousarray(labels, np.int32).tobytes()
        )

    @property
    def array(self) -> np.ndarray:
        """The label array."""
        return np.frombuffer(self.data, np.int32).reshape(self.shape)


class Kernel(NamedTuple):
    """What a site's leaf is that is the kernel of a convolution.

    Attributes:
        summed: its axes that the convolution sums over: the window, and the input channels.
        groups: in how many groups the channels are, each with outputs of its own; 1 also where
            every output reads one channel (depthwise) and the channels are counted as outputs.
        outputs: the axis of all groups' outputs; of no meaning without groups.
    """

    summed: tuple[int, ...]
    groups: int = 1
    outputs: int = -1


class Site(NamedTuple):
    """A leaf that an activation is multiplied with.

    Attributes:
        path: the leaf's name.
        axes: its contracted axes.
        channels: the sizes of `batch`, then of `axes`: the shape of the site's statistics.
        batch: its axes that hold one matrix each: layers that a scan runs over, experts.
        kernel: what it is as the kernel of a convolution; None for a matmul. `axes` is then the
            axis of the channels alone, and in groups `channels` counts those of all groups.

    Examples: a stack of weights of shape (layers, experts, inputs, outputs) = (2, 3, 4, 5), each
    multiplied as x @ w, is the site with `axes` (2,), `channels` (2, 3, 4) and `batch` (0, 1). A
    kernel (3, 3, 64, 128) over images of 64 channels has `axes` (2,), `channels` (64,) and a
    `kernel` with `summed` (0, 1, 2). A depthwise kernel (3, 3, 1, 64) has `axes` (3,).
    """

    path: str
    axes: tuple[int, ...]
    channels: tuple[int, ...]
    batch: tuple[int, ...] = ()
    kernel: Kernel | None = None

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes along which the leaf's elements share a quantizer's scale."""
        return self.axes if self.kernel is None else self.kernel.summed

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The leaf's axes that the axes of `channels` are."""
        return (*self.batch, *self.axes)

    @property
    def feature_axes(self) -> tuple[int, ...]:
        """The axes of `channels` within one matrix: those after the batch axes."""
        return tuple(range(len(self.batch), len(self.channels)))


def paths_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """The paths of some sites, in order."""
    return tuple(map(attrgetter("path"), sites))


class Group(NamedTuple):
    """A fold group: sites that share an activation, and the leaves that can absorb its scale.

    Attributes:
        name: the first site's path, with its index if it is one of a stack of matrices:
            layers/kernel[3].
        size: the number of scales: channels that are tied share one.
        sites: (path, which scale each of the site's channels has).
        leaves: (path, how each element of the leaf scales); the sites' own leaves are among them.
        norm: whether only norms (leaves that are no matmul's weight) absorb, and the sites are not
            the model's head: the groups that the authors' code smooths.
        ways: (leaf, the equations from the sites' activation to it).
        steps: the lengths of the scans, and of the mesh axes of shard_maps, over which the scales
            are stacked: one scale vector for each step, or device.
        keys: whether the scale moves from keys to queries, and `sites` names the keys first:
            SmoothAttention.

    Example: for y = (x * norm) @ w with two channels, `size` is 2, `sites` is w: [1, 2], and
    `leaves` are
    norm: [-1, -2] and w: [[1], [2]].
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
    def paths(self) -> tuple[str, ...]:
        """The paths of the sites."""
        return tuple(path for path, _ in self.sites)

    @property
    def absorbers(self) -> tuple[str, ...]:
        """The paths of the leaves that are divided by the scale."""
        return tuple(
            path for path, labels in self.leaves if (labels.array < 0).any()
        )

    @property
    def degree(self) -> int:
        """The degree of the roots of its scales that leaves carry, all together: 2 where r**2 is
        divided by s, and a leaf before r by the square root of s.
        """
        degrees = [
            channels_and_degrees(labels.array)[1] for _, labels in self.leaves
        ]
        return math.lcm(*np.unique(np.concatenate(degrees, None)).tolist())

    def account(self, path: str) -> list[str]:
        """Lines that tell which part a leaf has in the group; none if it has none."""
        ways = dict(self.ways)
        lines: list[str] = []
        if path in dict(self.sites):
            scales, _, _ = self.row()
            lines.append(
                f"{path} is a site of the group {self.name}: {scales} scales, absorbed by"
            )
            for absorber in self.absorbers:
                lines.append(f"  {absorber}")
                lines += _indented(ways.get(absorber, ()))
        if path in self.absorbers:
            lines.append(f"{path} absorbs the scales of the group {self.name}")
            lines += _steps("the sites' activation", ways.get(path, ()))
        return lines

    def row(self) -> tuple[str, str, str]:
        """(number of scales, absorbers, sites), as texts: ("2 x 4", "norm", "{q, k}/kernel") for 2
        steps of a scan.
        """
        steps = math.prod(self.steps)
        scales = f"{self.size}"
        if self.steps:
            scales = f"{'x'.join(map(str, self.steps))} x {self.size // steps}"
        channels = max(
            np.count_nonzero(labels.array) for _, labels in self.sites
        )
        if channels != self.size:  # some are tied
            scales += f" of {channels // steps} channels"
        paths = self.paths
        matrix = ""  # the index of one of a stack of matrices: the [3] of layers/kernel[3]
        if self.name.startswith(f"{paths[0]}["):
            matrix = self.name.removeprefix(paths[0])
        return scales, braced(self.absorbers), braced(paths) + matrix


class Graph(NamedTuple):
    """The leaves, sites and groups of a program, and why the other sites are in no group.

    Attributes:
        leaves: (path, shape) of every leaf of the parameter tree.
        sites: every leaf that an activation is multiplied with.
        groups: what can be folded. Every group has passed the certificate.
        refused: (site, or leaf that a matmul may meet, reason).
        offsets: (leaf, c) of leaves that `fn` reads as c + leaf only (Gemma's 1 + w): that sum is
            rescaled.
        ways: (refused site, the equations from its activation to what stands in the way).
        keys: the keys of attention between which and queries a scale can move; no sites, their
            weight is the query.
        tables: leaves that only rows are looked up in, with the axes of a row: embeddings that are
            no head.
        branches: (site, or one of a stack: layers/kernel[3]; what leaves it without tokens) of
            those that are read in branches of a cond and in while loops only: "branch 1 of `cond`
            at model.py:7 (fn) was not taken".
        spaces: what can be rotated. Every space has passed its certificate.
        space_refusals: (site, why its activation is in no space).
    """

    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    refused: tuple[tuple[str, str], ...]
    offsets: tuple[tuple[str, float], ...] = ()
    ways: tuple[tuple[str, tuple[str, ...]], ...] = ()
    keys: tuple[Site, ...] = ()
    tables: tuple[Site, ...] = ()
    branches: tuple[tuple[str, str], ...] = ()
    spaces: tuple[Space, ...] = ()
    space_refusals: tuple[tuple[str, str], ...] = ()

    def select(self, groups: str | Iterable[str]) -> tuple[Group, ...]:
        """The groups meant by "all", "norm", one name pattern or several (searched in the sites'
        paths), without keys.

        Raises:
            ValueError: a pattern that matches no site of any group.
        """
        of_sites = tuple(filterfalse(attrgetter("keys"), self.groups))
        if groups == "all":
            return of_sites
        if groups == "norm":
            return tuple(filter(attrgetter("norm"), of_sites))
        expect(
            isinstance(groups, Iterable),
            "groups",
            "'all', 'norm', or patterns of names",
            groups,
        )
        patterns = [groups] if isinstance(groups, str) else list(groups)
        return _matching(of_sites, patterns)

    def explain(self, path: str) -> str:
        """Why a leaf is in a group or a space, in which part, or in none: the equations of the
        program, with their lines.

        Raises:
            ValueError: there is no such leaf; names near misses.
        """
        known = list(dict(self.leaves))
        expect(isinstance(path, str), "explain", "the path of a leaf", path)
        if path not in known:
            raise ValueError(
                f"explain: {path!r} is no leaf. Near misses: {near_misses(path, known)}"
            )
        lines: list[str] = []
        for group in self.groups:
            lines += group.account(path)
        ways = dict(self.ways)
        # A refused site may be one of a stack of matrices, path[3], whose leaf is path.
        for leaf, reason in self.refused:
            if leaf == path or leaf.startswith(f"{path}["):
                lines.append(f"{leaf} is in no group: {reason}")
                lines += _steps("its activation", ways.get(leaf, ()))
        if path in dict(self.ways):
            lines.append(_AT_RUN_TIME)
        lines += self._spaces_of(path)
        if not lines:
            return f"{path}: no matmul of an activation meets it, and no group needs it"
        return "\n".join(lines)

    def _spaces_of(self, path: str) -> list[str]:
        """Lines that tell in which spaces a leaf turns, and why its activation is in none."""
        lines: list[str] = []
        for space in self.spaces:
            lines += space.account(path)
        for leaf, reason in self.space_refusals:
            if leaf == path or leaf.startswith(f"{path}["):
                lines.append(
                    f"the activation of {leaf} is in no space: {reason}"
                )
        return lines

    def __str__(self) -> str:
        """A table with a row for every group, and the refused leaves with their reasons."""
        lines = [f"{len(self.groups)} groups, {len(self.sites)} sites"]
        floats = len(self._not_sites())
        if floats:
            every = len(self.sites) + floats
            lines[0] += (
                f": {len(self.sites)} of {every} leaves that matmuls read; the others stay float"
            )
        if self.groups:
            lines += _table(map(Group.row, self.groups))
        if self.spaces:
            lines.append(f"  {summary(self.spaces)}")
        lines += self._refusals()
        # Only sites can be smoothed at run time, and a leaf that is refused need not be one.
        named = {path.partition("[")[0] for path, _ in self.refused}
        if any(site.path in named for site in self.sites):
            lines.append(f"  {_AT_RUN_TIME}")
        return "\n".join(lines)

    def _refusals(self) -> list[str]:
        """A line for each refused leaf; one for all that differ by the numbers in them only.

        Example: of 12 layers refused for one reason the line reads "refused layers/{0, 1, 2, 3,
        ...}/up: ... (12 alike; this is of the first)".
        """
        alike: dict[tuple[str, str], list[tuple[str, str]]] = {}
        absorbers = self._absorbers()
        sites = paths_of(self.sites)
        for path, reason in self.refused:
            # A leaf that absorbs does what it can; of a site its own activation is meant.
            if path in absorbers and path not in sites:
                continue
            if path in absorbers:
                reason += "; it absorbs another site's scale all the same"
            # layers/3/up and layers/4/up are of one kind: layers/#/up.
            kind = _NUMBER.sub("#", path), _NUMBER.sub("#", reason)
            alike.setdefault(kind, []).append((path, reason))
        return list(chain(*map(_lines_of, alike.values())))

    def _absorbers(self) -> set[str]:
        """The leaves that absorb the scale of some group."""
        return set(chain(*map(attrgetter("absorbers"), self.groups)))

    def _not_sites(self) -> set[str]:
        """The refused leaves that are no sites: a matmul reads them in a way that is not known."""
        leaves = {path.partition("[")[0] for path, _ in self.refused}
        return leaves.difference(paths_of(self.sites), self._absorbers())


def _table(groups: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines with a row for every group: numbers to the right, names to the left."""
    rows = [("scales", "absorbed by", "sites"), *groups]
    return [f"  {line}" for line in aligned(rows, left={1, 2})]


def _lines_of(refusals: list[tuple[str, str]]) -> list[str]:
    """A line for each of (path, reason); one for three or more that are alike."""
    if len(refusals) < 3:
        return [f"  refused {path}: {reason}" for path, reason in refusals]
    named = braced([path for path, _ in refusals[:4]])
    if len(refusals) > 4:
        # The dots go into the first braces, as in layers/{0, 1, 2, 3, ...}/up.
        shortened = named.replace("}", ", ...}", 1)
        named = shortened if "}" in named else f"{named}, ..."
    _, reason = refusals[0]
    return [
        f"  refused {named}: {reason} ({len(refusals)} alike; this is of the first)"
    ]


#: What can be done for a site whose scale no leaf absorbs.
_AT_RUN_TIME = (
    "a refused site is quantized all the same; to smooth it too, do so at run time: a scheme with "
    "smoothing=0.5, as in sqjax.W8A8.replace(smoothing=0.5), or smoothquant(..., runtime=0.5)"
)
_NUMBER = re.compile(r"\d+")


def _matching(
    groups: tuple[Group, ...], patterns: list[str]
) -> tuple[Group, ...]:
    """The groups with a site whose path matches one of these patterns, each of which must match."""
    paths = chain(*map(attrgetter("paths"), groups))
    words = ("all", "norm")
    found = first_matches(patterns, paths, "groups pattern", also=words)

    def is_chosen(group: Group) -> bool:
        return any(found[path] is not None for path in group.paths)

    return tuple(filter(is_chosen, groups))


def _steps(start: str, way: tuple[str, ...]) -> list[str]:
    """Lines for the equations on the way from `start`; none if there is no way."""
    if not way:
        return []
    return [f"  from {start}, through", *_indented(way)]


def _indented(way: tuple[str, ...]) -> list[str]:
    """A line for each equation of a way."""
    return [f"    {step}" for step in way]
