"""`Stats`: what each matmul saw in calibration, and the graph of what can be folded."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from sqjax._arguments import expect
from sqjax._serialized import serialized
from sqjax._tables import aligned
from sqjax._trees import is_concrete, is_float, quickly_read
from sqjax.folding.graph import Graph, Group, Kernel, LabelMap, Site, paths_of
from sqjax.folding.space import Along, Space
from sqjax.numerics.channels import Channels, channel_absmax
from sqjax.numerics.formats import INT8, Format
from sqjax.numerics.ranges import Histogram, Range, find_range
from sqjax.numerics.samples import Sample

#: Sites that a printed `Stats` lists.
MOST_ROWS = 40
#: Experts that less tokens reached are warned of.
FEW_TOKENS = 32


@serialized(Graph, Site, Group, LabelMap, Kernel, Channels, Space, Along)
@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Stats:
    """Calibration statistics: for each site what the channels of its activation X were like.

    A site is a parameter leaf W that an activation is multiplied with, named by the leaf's path.
    Its channels are the input features that are summed over: X_j is the j-th of every token, W_j
    the weights that it meets. The shape of the channels is (features,) for a plain matmul,
    (layers, features) for a stack of layers. `scales` makes smoothing scales of these numbers,
    `quantize` makes static quantizer scales of them.

    The statistics are raw sums and maxima, so those of two halves of the data merge exactly. A
    `Stats` is a pytree: it can be an argument of a jitted function. `sqjax.save` writes one, so
    that one machine may calibrate and another quantize.

    Attributes:
        absmax: {site: max |X_j| over all tokens}, float32, the channels' shape. Sites that
            `rotate_stats` has rotated have neither this nor abs_sum: no maximum tells that of X Q.
        abs_sum: {site: sum |X_j| over all tokens}, float32, the channels' shape; the mean of |X_j|
            is abs_sum / count.
        count: {site: the number of tokens}, int32 scalars.
        weight_absmax: {site: max |W_j| over all outputs}, float32, the channels' shape; of the
            parameters that were calibrated.
        folded: {group: s}, the smoothing scales that `fold_stats` has divided out since; ones at
            first.
        graph: the sites, the groups, and why the other sites are in none (static, hashable).
        leaf_sizes: {leaf: (max |w|, mean |w|)} of the parameters that were calibrated, float32: by
            these it is seen later whether other parameters are meant.
        reached: {site: how many tokens were not all zeros}, int32, one for each matrix of its
            stack: (layers, experts), also of the experts of a `ragged_dot`.
        histogram: {site: `Histogram` of |X|, one for each matrix of a stack} if
            `calibrate(..., histogram=True)` asked for it, else empty. `fold_stats` leaves them as
            they are, because the histogram of X says nothing about that of X / s.
        gram: {site: the Gram matrix X^T X, one for each matrix of a stack, float32, (*batch,
            features, features)} if `calibrate(..., gram=True)` asked for it, else empty. Features
            are all contracted axes of a site as one, in their order. Not of convolutions, nor of a
            head whose rows are looked up too.
        sample: {site: a `Sample` of its tokens} if `calibrate(..., sample=512)` asked for it.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> batches = jnp.array([[1.0, 16.0]]), jnp.array([[-3.0, 0.5]])
        >>> first, second = (sq.calibrate(fn, params, [x]) for x in batches)
        >>> stats = first.merge(second)
        >>> stats.absmax["w"].tolist(), int(stats.count["w"])
        ([3.0, 16.0], 2)
        >>> print(stats)
        1 sites, 1 groups
          tokens  max |X|  max / median  site
               2       16          1.68  w
        >>> print(stats.graph)
        1 groups, 1 sites
          scales  absorbed by  sites
               2  norm         w
    """

    absmax: dict[str, Any]
    abs_sum: dict[str, Any]
    count: dict[str, Any]
    weight_absmax: dict[str, Any]
    folded: dict[str, Any]
    graph: Graph = field(metadata={"static": True})
    histogram: dict[str, Histogram] = field(default_factory=dict)
    leaf_sizes: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, Any] = field(default_factory=dict)
    gram: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Sample] = field(default_factory=dict)

    def __repr__(self) -> str:
        """A table with a row for every site; of more than 40 the first ones."""
        head = f"{len(self.graph.sites)} sites, {len(self.graph.groups)} groups"
        rows = [("tokens", "max |X|", "max / median", "site")]
        rows += map(self._row, self.graph.sites[:MOST_ROWS])
        lines = [head, *(f"  {line}" for line in aligned(rows, left={3}))]
        more = len(self.graph.sites) - MOST_ROWS
        if more > 0:
            lines.append(f"  ... and {more} sites more")
        return "\n".join(lines)

    def _row(self, site: Site) -> tuple[str, str, str, str]:
        """(tokens, absmax, outlier ratio, path) of a site, as texts; "?" under jit."""
        absmax, tokens = self.absmax.get(site.path), self.count[site.path]
        if absmax is None or not is_concrete(absmax) or not is_concrete(tokens):
            return "?", "?", "?", site.path
        largest = float(np.asarray(absmax).max(initial=0))
        ratio = outlier_ratio(absmax)
        return str(int(tokens)), f"{largest:.3g}", f"{ratio:.3g}", site.path

    @property
    def unreached(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """{site: the matrices of its stack that saw nothing but zeros}.

        Example: {"experts/up": ((0, 3), (5, 1)), "vision": ((),)} says that no token reached expert
        3 of layer 0, nor expert 1 of layer 5; and that none reached "vision", which is one matrix.
        """
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for site in self.graph.sites:
            unseen = np.argwhere(self._tokens_of(site) == 0).tolist()
            if unseen:
                found[site.path] = tuple(map(tuple, unseen))
        return found

    def scarce(self, few: int) -> list[tuple[str, tuple[int, ...], int]]:
        """(site, expert, its tokens) of the experts that some tokens reached, but less than `few`.

        Only of stacks that have a matrix with more: else nobody asked for more.
        """
        found = []
        for site in self.graph.sites:
            tokens = self._tokens_of(site)
            if tokens.max(initial=0) < few:
                continue
            for entry in np.argwhere((tokens > 0) & (tokens < few)):
                found.append(
                    (
                        site.path,
                        tuple(entry.tolist()),
                        int(tokens[tuple(entry)]),
                    )
                )
        return found

    def trust(self, site: Site) -> Array:
        """How far a site's ranges are believed: 1, but of experts that few tokens reached n / 32.

        Where no expert of the stack saw 32 tokens, nobody asked for more: then an eighth of the
        most are enough. float32, the channels' shape.
        """
        # A single matrix has no others to be compared with.
        if site.path not in self.reached or not site.batch:
            return jnp.asarray(np.ones(site.channels, np.float32))
        return _trust(self.reached[site.path], len(site.batch), site.channels)

    def _tokens_of(self, site: Site) -> np.ndarray:
        """How many tokens reached each matrix of a site's stack."""
        if site.path in self.reached:
            return np.asarray(self.reached[site.path])
        # Statistics from before these numbers were kept: some token, or none.
        alive = np.asarray(self.absmax[site.path]).any(axis=site.feature_axes)
        return np.where(alive, np.iinfo(np.int32).max, 0)

    def merge(self, other: "Stats") -> "Stats":
        """The statistics of both calibrations of one model.

        Maxima merge by max; sums, counts and histograms by +.

        Raises:
            ValueError: the two are of different programs, or of different parameters (one was
                smoothed, say; values can not be checked under jit); or only one has histograms.
        """
        expect(isinstance(other, Stats), "merge", "other Stats", other)
        if self.graph != other.graph:
            raise ValueError(
                "merge: the two Stats have different graphs; "
                "merge calibrations of one fn and one tree"
            )
        self._check_kept_alike(other)
        self._check_same_parameters(other)
        return Stats(
            jax.tree.map(jnp.maximum, self.absmax, other.absmax),
            _sums(self.abs_sum, other.abs_sum),
            _sums(self.count, other.count),
            self.weight_absmax,
            self.folded,
            self.graph,
            _sums(self.histogram, other.histogram),
            self.leaf_sizes,
            _sums(self.reached, other.reached),
            _sums(self.gram, other.gram),
            _sums(self.sample, other.sample),
        )

    def _check_kept_alike(self, other: "Stats") -> None:
        """Raises ValueError if one of them has histograms, say, and the other one has not."""
        for option, asked in _ASKED_FOR.items():
            if getattr(self, option).keys() != getattr(other, option).keys():
                raise ValueError(
                    f"merge: one of the two Stats has no {asked}; "
                    f"call calibrate(..., {option}=...) for both"
                )
        for path, mine in self.sample.items():
            theirs = other.sample[path]
            if mine.priority.shape != theirs.priority.shape:
                raise ValueError(
                    f"merge: {path}: expected samples of one size, got "
                    f"{mine.priority.shape[-1]} and {theirs.priority.shape[-1]} tokens; call "
                    "calibrate(..., sample=...) alike"
                )

    def _check_same_parameters(self, other: "Stats") -> None:
        """Raises ValueError where weights, or what was folded into them, differ."""
        of_parameters = attrgetter("folded", "leaf_sizes", "weight_absmax")
        mine, theirs = of_parameters(self), of_parameters(other)
        # Under jit there are no values to compare.
        if not all(map(is_concrete, jax.tree.leaves((mine, theirs)))):
            return
        named, others = jax.tree.leaves_with_path(mine), jax.tree.leaves(theirs)
        for (path, x), y in zip(named, others, strict=True):
            if not np.array_equal(x, y):
                raise ValueError(
                    f"merge: the two Stats are of other parameters at {path[-1].key} "
                    "(was one smoothed?); merge calibrations of one tree, and fold_stats the result"
                )

    def input_range(
        self, path: str, how: Range = "absmax", fmt: Format = INT8
    ) -> Array:
        """The range of |X| that a site's static quantizer scale shall cover.

        Args:
            path: the site.
            how: "absmax" covers all that calibration saw; "mse" the range whose rounding and
                clipping errors are least together (`sqjax.numerics.ranges.mse_range`); a fraction
                p covers that part of the values (`sqjax.numerics.ranges.percentile_range`).
            fmt: the format that X is rounded to.

        Returns:
            float32, one for each matrix of the site's stack: the shape of its batch axes, () for a
            plain matmul.

        Raises:
            ValueError: `rotate_stats` has rotated the site; or "mse" or a percentile, but there are
                no histograms, or `fold_stats` has divided X by s since. (Under jit values can not
                be checked: the range is NaN then.)
        """
        self.check_ranges("input_range", [path])
        # An absmax needs no histogram, and `fold_stats` has divided it by s: it is always right.
        if how == "absmax":
            place = paths_of(self.graph.sites).index(path)
            site = self.graph.sites[place]
            return jnp.max(self.absmax[path], axis=site.feature_axes)
        if path not in self.histogram:
            raise ValueError(
                f"{path}: the range {how!r} needs a histogram of its activation, and these "
                "statistics have none; call calibrate(..., histogram=True), or use the range "
                "'absmax'"
            )
        unfolded = self._is_unfolded(path)
        if is_concrete(unfolded) and not unfolded:
            raise ValueError(
                f"{path}: the range {how!r} needs a histogram of its activation X / s, but these "
                "statistics, which fold_stats derived, have that of X; calibrate the smoothed "
                "parameters: calibrate(fn, smoothed, batches, histogram=True), as smoothquant does"
            )
        covered = find_range(self.histogram[path], how, fmt)
        return jnp.where(unfolded, covered, jnp.float32(jnp.nan))

    def check_ranges(self, what: str, sites: Iterable[str]) -> None:
        """Raises ValueError, naming the function, if one of these sites has no absmax."""
        for path in sites:
            if path not in self.absmax:
                raise ValueError(
                    f"{what}: {path}: the range of its activation is needed, and rotate_stats, "
                    "which made these statistics, can not know it; calibrate the rotated parameters"
                )

    def _is_unfolded(self, path: str) -> Any:
        """Whether `fold_stats` has left a site's activation as it was: every s is 1 there."""
        folded = []
        for group in self.graph.groups:
            if path in dict(group.sites):
                folded.append(self.folded[group.name])
        if all(map(is_concrete, folded)):
            return all(np.all(np.asarray(s) == 1) for s in folded)
        # Under jit nobody knows yet, so the answer is an array, too.
        return jnp.all(jnp.concatenate(folded) == 1)


#: {field of `Stats` that is filled on request only: what errors call it}.
_ASKED_FOR = {
    "histogram": "histograms",
    "gram": "Gram matrices",
    "sample": "samples",
}


def _sums(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """{path: the sum of both}."""
    return {path: x + theirs[path] for path, x in mine.items()}


def gram_bytes(graph: Graph) -> int:
    """How many bytes the Gram matrices of all sites take at most: `calibrate(..., gram=True)`.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> stats = sq.calibrate(fn, {"w": jnp.ones((8, 3))}, [jnp.ones((2, 8))])
        >>> sq.gram_bytes(stats.graph)  # 8 x 8 float32
        256
    """
    total = 0
    for site in graph.sites:
        if site.kernel is None:
            stack = math.prod(site.channels[: len(site.batch)])
            features = math.prod(site.channels[len(site.batch) :])
            total += 4 * stack * features**2
    return total


def outlier_ratio(absmax: Any) -> float:
    """The largest of the channels' absmaxes over their median, without those of dead channels.

    Example: the channels' absmaxes 1, 2, 3, 0 and 40 give 40 / 2.5 = 16.
    """
    channels = np.asarray(absmax, np.float64).reshape(-1)
    # Without dead channels, because many of these would make the median 0.
    alive = channels[channels > 0]
    return float(alive.max() / np.median(alive)) if alive.size else 0.0


@partial(jax.jit, static_argnums=(1, 2))
def _trust(tokens: Array, batch: int, channels: tuple[int, ...]) -> Array:
    """`Stats.trust` of a stack, from how many tokens reached each of its matrices."""
    # The experts of a ragged dot share one activation, and all of its tokens count.
    summed = tokens.sum(range(batch, tokens.ndim))
    of_matrix = summed.astype(jnp.float32)
    # Where even the best matrix saw few tokens, an eighth of its own is enough for the others.
    most = jnp.max(of_matrix, initial=0)
    enough = jnp.where(most >= FEW_TOKENS, FEW_TOKENS, most / 8)
    # Where no token reached any matrix of the stack this is 0 / 1e-3, and not the NaN of 0 / 0.
    trust = jnp.clip(of_matrix / jnp.maximum(enough, 1e-3), 0, 1)
    spread = trust.reshape(trust.shape + (1,) * (len(channels) - batch))
    return jnp.broadcast_to(spread.astype(jnp.float32), channels)


def weight_absmax(site: Site, leaf: ArrayLike) -> Array:
    """max |W_j| over all outputs, for every channel j of a site: float32, the channels' shape.

    Example: a leaf of shape (3 layers, 8 inputs, 5 outputs) that is contracted along its axis 1
    gives (3, 8).
    """
    return _absmax_of(leaf, leaf_channels(site))


def weight_absmaxes(
    sites: Iterable[Site], leaves: Mapping[str, Any]
) -> dict[str, Array]:
    """{site: `weight_absmax` of its leaf}."""
    sites = tuple(sites)
    kept = dict(zip(paths_of(sites), map(leaf_channels, sites), strict=True))
    return {
        path: _absmax_of(leaves[path], where) for path, where in kept.items()
    }


def leaf_channels(site: Site) -> Channels:
    """Where the channels of a site are in its leaf."""
    if site.kernel is None:
        return Channels(site.channel_axes)
    return Channels(site.channel_axes, site.kernel.groups, site.kernel.outputs)


def leaf_sizes(leaves: Mapping[str, Any]) -> dict[str, Array]:
    """{leaf: (max |w|, mean |w|)} of the float leaves that have elements."""
    return {
        path: _size(leaf)
        for path, leaf in leaves.items()
        if is_float(leaf) and leaf.size
    }


def _size(leaf: ArrayLike) -> Array:
    near = quickly_read(leaf)
    if near is None:
        return _compiled_size(leaf)
    magnitude = np.abs(near.astype(np.float32))
    return jnp.asarray(np.stack([magnitude.max(), magnitude.mean()]))


@jax.jit
def _compiled_size(leaf: Array) -> Array:
    magnitude = jnp.abs(leaf.astype(jnp.float32))
    return jnp.stack([jnp.max(magnitude), jnp.mean(magnitude)])


@partial(jax.jit, static_argnums=1)
def _absmax_of(leaf: ArrayLike, channels: Channels) -> Array:
    return channel_absmax(jnp.asarray(leaf), channels)
