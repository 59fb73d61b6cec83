"""`Stats`: what each matmul saw during calibration, raw and mergeable, and the graph of what can be folded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
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
    """

    absmax: dict[str, Array]
    abs_sum: dict[str, Array]
    count: dict[str, Array]
    weight_absmax: dict[str, Array]
    folded: dict[str, Array]
    graph: Graph = field(metadata={"static": True})

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


def weight_absmax(site: Site, leaf: Array) -> Array:
    """max over outputs of |W| for every channel of the site: float32, the channels' shape."""
    others = tuple(a for a in range(leaf.ndim) if a not in site.axes)
    return jnp.max(jnp.abs(leaf).astype(jnp.float32), axis=others)


def leaves_by_path(params: PyTree, graph: Graph) -> dict[str, Array]:
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
    """{site: s of each of its channels} for the groups in `s`."""
    return {
        path: s[group.name][labels.array - 1]
        for group in graph.groups
        if group.name in s
        for path, labels in group.sites
    }
