"""`Stats`: what each matmul saw during calibration, raw and mergeable, and the graph of what can be folded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from sqjax.graph import Graph, Site
from sqjax.trees import PyTree, named_leaves


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

    @property
    def unreached(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """{site: its batch entries, (layer, expert, ...), that saw nothing but zeros}; their scales stay 1."""
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for site in self.graph.sites:
            if site.batch:
                seen = np.asarray(self.absmax[site.path])
                dead = ~seen.any(axis=tuple(range(len(site.batch), seen.ndim)))
                if dead.any():
                    found[site.path] = tuple(tuple(int(i) for i in entry) for entry in np.argwhere(dead))
        return found

    def merge(self, other: "Stats") -> "Stats":
        """The statistics of both calibrations of one model: maxima by max, sums and counts by +.

        Raises:
            ValueError: the two describe different programs.
        """
        if self.graph != other.graph:
            raise ValueError("merge: the two Stats have different graphs; merge calibrations of one fn and one tree")
        return Stats(
            jax.tree.map(jnp.maximum, self.absmax, other.absmax),
            jax.tree.map(jnp.add, self.abs_sum, other.abs_sum),
            jax.tree.map(jnp.add, self.count, other.count),
            self.weight_absmax,
            self.folded,
            self.graph,
        )


def weight_absmax(site: Site, leaf: ArrayLike) -> Array:
    """max over outputs of |W| for every channel of the site: float32, the channels' shape."""
    return _absmax(leaf, (*site.batch, *site.axes))


@partial(jax.jit, static_argnums=1)
def _absmax(x: ArrayLike, kept: tuple[int, ...]) -> Array:
    first = jnp.moveaxis(jnp.abs(x).astype(jnp.float32), kept, range(len(kept)))
    return jnp.max(first, axis=tuple(range(len(kept), jnp.ndim(x))))


def leaves_by_path(params: PyTree, graph: Graph) -> dict[str, Any]:
    """{path: leaf}, checked against the tree that was calibrated.

    Raises:
        ValueError: a leaf is missing, is new, or has another shape.
    """
    paths, leaves, _ = named_leaves(params)
    got, expected = dict(zip(paths, leaves, strict=True)), dict(graph.leaves)
    problems = [f"{p}: expected {expected[p]}, missing" for p in expected if p not in got]
    problems += [f"{p}: not in the calibrated tree" for p in got if p not in expected]
    problems += [
        f"{p}: expected shape {expected[p]}, got {tuple(jnp.shape(x))}"
        for p, x in got.items()
        if p in expected and tuple(jnp.shape(x)) != expected[p]
    ]
    if problems:
        listed = "\n  ".join(problems[:10])
        raise ValueError(
            f"the parameters are not the tree that was calibrated ({len(problems)} leaves differ); calibrate this "
            f"model, or pass its own Stats:\n  {listed}"
        )
    return got


def expand(s: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    """{site: s of each of its channels} for the groups in `s`; 1 for channels that no group scales."""
    factors: dict[str, Array] = {}
    for group in graph.groups:
        if group.name in s:
            with_one = jnp.concatenate([jnp.ones(1, jnp.float32), s[group.name].astype(jnp.float32)])
            for path, labels in group.sites:
                factor = with_one[labels.array]
                factors[path] = factors[path] * factor if path in factors else factor
    return factors
