"""Statistics of parts of a model, and of the whole from those of its parts."""

from collections.abc import Collection, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sqjax.calibration.analysis import common_groups
from sqjax.calibration.stats import Stats
from sqjax.folding.graph import Graph, paths_of
from sqjax.folding.parts import joined_graph, part_of_graph

#: The fields of `Stats` that hold something for each site, or each leaf.
_BY_PATH = (
    "absmax",
    "abs_sum",
    "count",
    "weight_absmax",
    "histogram",
    "leaf_sizes",
    "reached",
    "gram",
    "sample",
)


def part_of_stats(
    stats: Stats, leaves: Collection[str], prefix: str = ""
) -> Stats:
    """What statistics say of some leaves; arguments as of `part_of_graph`.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> from sqjax.calibration.parts import part_of_stats
        >>> fn = lambda p, x: x @ p["a"]["w"] @ p["b"]["w"]
        >>> params = {"a": {"w": jnp.ones((2, 3))}, "b": {"w": jnp.ones((3, 4))}}
        >>> stats = sq.calibrate(fn, params, [jnp.ones((5, 2))])
        >>> part_of_stats(stats, ["b/w"], "b/").absmax["w"].tolist()
        [2.0, 2.0, 2.0]
    """
    graph = part_of_graph(stats.graph, leaves, prefix)
    names = {path for path, _ in graph.leaves}.union(paths_of(graph.keys))
    kept: dict[str, Any] = {}
    for field in _BY_PATH:
        of_field = getattr(stats, field)
        kept[field] = {
            name: of_field[prefix + name]
            for name in names
            if prefix + name in of_field
        }
    folded = {}
    for group in graph.groups:
        whole = prefix + group.name
        if whole in stats.folded:
            folded[group.name] = stats.folded[whole]
    return Stats(folded=folded, graph=graph, **kept)


def stats_without_numbers(graph: Graph) -> Stats:
    """The statistics of a program that saw nothing: enough for schemes that take no number."""
    return Stats({}, {}, {}, {}, {}, graph)


def joined_stats(graph: Graph, parts: Iterable[tuple[str, Stats]]) -> Stats:
    """The statistics of a whole program from those of its parts, which share no leaf.

    Args:
        graph: of the whole program. A group of it that is in no part has not passed the proof of
            any: its sites are refused.
        parts: (what all names of a part begin with in the whole, its statistics) of each.

    Raises:
        ValueError: no part has seen a site of the whole program.
    """
    found: dict[str, dict[str, Any]] = {field: {} for field in _BY_PATH}
    graphs: list[tuple[str, Graph]] = []
    for prefix, stats in parts:
        graphs.append((prefix, stats.graph))
        for field in _BY_PATH:
            of_field = getattr(stats, field)
            for name, value in of_field.items():
                found[field][prefix + name] = value
    unseen = [s.path for s in graph.sites if s.path not in found["absmax"]]
    if unseen:
        raise ValueError(
            f"{unseen[0]}: expected a layer that reads it, got none; calibrate the whole model"
        )
    joined = joined_graph(graph.leaves, graphs)
    common = common_groups(graph, joined, "its layer alone")
    # Not the spaces: they go through all layers, so the certificate of the whole counts.
    graph = common._replace(
        spaces=graph.spaces, space_refusals=graph.space_refusals
    )
    folded = {}
    for group in graph.groups:
        folded[group.name] = jnp.asarray(np.ones(group.size, np.float32))
    return Stats(folded=folded, graph=graph, **found)
