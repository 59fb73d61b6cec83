"""`Stats`: what each matmul saw during calibration, raw and mergeable, and the graph of what can be folded."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from sqjax._trees import is_concrete
from sqjax.folding.graph import Graph, Site
from sqjax.numerics.formats import INT8, Format
from sqjax.numerics.ranges import Histogram, Range, find_range


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stats:
    """A pytree of calibration statistics; every mapping is keyed by the site's path (the leaf's name).

    Attributes:
        absmax: float32, the channels' shape: max |X_j| over all tokens.
        abs_sum: float32, the channels' shape: sum |X_j| over all tokens (abs_sum / count is the mean).
        count: int32 scalar: the number of tokens.
        weight_absmax: float32, the channels' shape: max over outputs of |W_j|, of the parameters that were calibrated.
        folded: {group: s} that `fold_stats` has divided out since; ones at first.
        graph: the sites and groups (static, hashable).
        histogram: {site: `Histogram` of |X|, one for each matrix of a stack}, where `calibrate(..., histogram=True)`
            asked for it; else empty. Of the parameters that were calibrated: `fold_stats` leaves them as they are.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> batches = jnp.array([[1.0, 16.0]]), jnp.array([[-3.0, 0.5]])
        >>> first, second = (sq.calibrate(fn, params, [x]) for x in batches)
        >>> stats = first.merge(second)
        >>> stats.absmax["w"].tolist(), int(stats.count["w"])
        ([3.0, 16.0], 2)
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

    @property
    def unreached(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """{site: its batch entries, (layer, expert, ...), that saw nothing but zeros}; their scales stay 1."""
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for site in self.graph.sites:
            if site.batch:
                seen = np.asarray(self.absmax[site.path])
                dead = ~seen.any(axis=tuple(range(len(site.batch), seen.ndim)))
                if dead.any():
                    found[site.path] = tuple(
                        tuple(int(i) for i in entry) for entry in np.argwhere(dead)
                    )
        return found

    def merge(self, other: "Stats") -> "Stats":
        """The statistics of both calibrations of one model: maxima by max, sums, counts and histograms by +.

        Raises:
            ValueError: the two describe different programs, or other parameters (smoothed ones; this can not be
                checked under jit), or only one has histograms.
        """
        if self.graph != other.graph:
            raise ValueError(
                "merge: the two Stats have different graphs; merge calibrations of one fn and one tree"
            )
        if self.histogram.keys() != other.histogram.keys():
            raise ValueError(
                "merge: one of the two Stats has no histograms; call calibrate(..., histogram=True) twice"
            )
        self._check_same_parameters(other)
        return Stats(
            jax.tree.map(jnp.maximum, self.absmax, other.absmax),
            jax.tree.map(jnp.add, self.abs_sum, other.abs_sum),
            jax.tree.map(jnp.add, self.count, other.count),
            self.weight_absmax,
            self.folded,
            self.graph,
            {path: histogram + other.histogram[path] for path, histogram in self.histogram.items()},
        )

    def _check_same_parameters(self, other: "Stats") -> None:
        mine, its = ({"weight_absmax": s.weight_absmax, "folded": s.folded} for s in (self, other))
        if not all(is_concrete(x) for x in jax.tree.leaves((mine, its))):
            return
        for (path, x), y in zip(jax.tree.leaves_with_path(mine), jax.tree.leaves(its), strict=True):
            if not np.array_equal(x, y):
                name = path[-1].key
                raise ValueError(
                    f"merge: the two Stats are of other parameters at {name} (was one smoothed?); merge calibrations "
                    "of one tree, and fold_stats what comes out"
                )

    def input_range(self, path: str, how: Range = "absmax", fmt: Format = INT8) -> Array:
        """The range of |X| that a static scale shall cover at a site: float32, the shape of the site's batch axes.

        Args:
            path: the site.
            how: "absmax"; "mse" (`sqjax.numerics.ranges.mse_range`); a percentile as a fraction (`percentile_range`).
            fmt: the format that X is rounded to.

        Raises:
            ValueError: there are no histograms, or X has been divided by s since. (Under jit values can not be
                checked: the range is NaN then.)
        """
        if how == "absmax":
            absmax, site = (
                self.absmax[path],
                next(site for site in self.graph.sites if site.path == path),
            )
            return jnp.max(absmax, axis=tuple(range(len(site.batch), absmax.ndim)))
        if path not in self.histogram:
            raise ValueError(
                f"{path}: the range {how!r} needs a histogram of its activation, and these statistics have none; call "
                "calibrate(..., histogram=True), or use the range 'absmax'"
            )
        unscaled = self._unscaled(path)
        if is_concrete(unscaled) and not unscaled:
            raise ValueError(
                f"{path}: the range {how!r} needs a histogram of its activation X / s, but these statistics, which "
                "fold_stats derived, have that of X; calibrate the smoothed parameters: calibrate(fn, smoothed, "
                "batches, histogram=True), as smoothquant does"
            )
        return jnp.where(unscaled, find_range(self.histogram[path], how, fmt), jnp.float32(jnp.nan))

    def _unscaled(self, path: str) -> Any:
        """Whether `fold_stats` has left a site's activation as it was."""
        s = [
            self.folded[g.name]
            for g in self.graph.groups
            if any(path == site for site, _ in g.sites)
        ]
        if all(is_concrete(x) for x in s):
            return all((np.asarray(x) == 1).all() for x in s)
        return jnp.all(jnp.concatenate(s) == 1)


def weight_absmax(site: Site, leaf: ArrayLike) -> Array:
    """max over outputs of |W| for every channel of the site: float32, the channels' shape."""
    return _absmax(leaf, (*site.batch, *site.axes))


@partial(jax.jit, static_argnums=1)
def _absmax(x: ArrayLike, kept: tuple[int, ...]) -> Array:
    first = jnp.moveaxis(jnp.abs(x).astype(jnp.float32), kept, range(len(kept)))
    return jnp.max(first, axis=tuple(range(len(kept), jnp.ndim(x))))
