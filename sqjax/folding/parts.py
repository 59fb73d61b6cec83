"""Parts of a graph: what it says of some leaves alone, and which leaves belong together.

A model that does not fit in memory is read, calibrated and quantized in parts, a layer at a time.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import chain
from typing import Any

from sqjax.folding.graph import Graph, Group, LabelMap, Site
from sqjax.folding.space import Space

#: A path or a name -> the same in another tree.
Renaming = Callable[[str], str]


def part_of_graph(
    graph: Graph, leaves: Collection[str], prefix: str = ""
) -> Graph:
    """What a graph says of some leaves: the graph of a tree that holds no others.

    Groups that scale other leaves too are left out (`straddling` names them), and so are spaces
    that rotate others.

    Args:
        graph: of the whole tree.
        leaves: the paths of the part's leaves.
        prefix: what all of them begin with, such as "model/layers/3/". It is taken off all paths
            and names, so that layers that are alike have parts that are equal. (It stays where a
            sentence speaks of a path: in a reason, or on the way through the program.)

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> from sqjax.folding.parts import part_of_graph
        >>> fn = lambda p, x: x @ p["a"]["w"] @ p["b"]["w"]
        >>> params = {"a": {"w": jnp.ones((2, 3))}, "b": {"w": jnp.ones((3, 4))}}
        >>> graph = sq.calibrate(fn, params, [jnp.ones((5, 2))]).graph
        >>> part_of_graph(graph, ["b/w"], "b/").leaves
        (('w', (3, 4)),)
    """
    within = frozenset(leaves)
    groups = [g for g in graph.groups if leaves_of_group(g) <= within]
    # Keys of attention are named by their group, and are no leaf.
    names = within.union(group.name for group in groups)

    def pairs(named: Iterable[tuple[str, Any]]) -> tuple[Any, ...]:
        return tuple(item for item in named if _leaf(item[0]) in names)

    def sites(all_sites: Iterable[Site]) -> tuple[Site, ...]:
        return tuple(site for site in all_sites if site.path in names)

    part = Graph(
        leaves=pairs(graph.leaves),
        sites=sites(graph.sites),
        groups=tuple(groups),
        refused=pairs(graph.refused),
        offsets=pairs(graph.offsets),
        ways=pairs(graph.ways),
        keys=sites(graph.keys),
        tables=sites(graph.tables),
        branches=pairs(graph.branches),
        spaces=tuple(s for s in graph.spaces if leaves_of_space(s) <= within),
        space_refusals=pairs(graph.space_refusals),
    )
    return renamed_graph(part, lambda name: name.removeprefix(prefix))


def renamed_graph(graph: Graph, rename: Renaming) -> Graph:
    """The graph with other paths and names."""
    pairs = partial(_renamed_pairs, rename)
    sites = partial(_renamed_sites, rename)
    return Graph(
        leaves=pairs(graph.leaves),
        sites=sites(graph.sites),
        groups=tuple(_renamed_group(rename, group) for group in graph.groups),
        refused=pairs(graph.refused),
        offsets=pairs(graph.offsets),
        ways=pairs(graph.ways),
        keys=sites(graph.keys),
        tables=sites(graph.tables),
        branches=pairs(graph.branches),
        spaces=tuple(_renamed_space(rename, space) for space in graph.spaces),
        space_refusals=pairs(graph.space_refusals),
    )


def _renamed_group(rename: Renaming, group: Group) -> Group:
    def labels(
        named: Iterable[tuple[str, LabelMap]],
    ) -> tuple[tuple[str, LabelMap], ...]:
        return _renamed_pairs(rename, named)

    return group._replace(
        name=rename(group.name),
        sites=labels(group.sites),
        leaves=labels(group.leaves),
        ways=_renamed_pairs(rename, group.ways),
    )


def _renamed_space(rename: Renaming, space: Space) -> Space:
    return space._replace(
        name=rename(space.name),
        leaves=_renamed_pairs(rename, space.leaves),
        gains=tuple(map(rename, space.gains)),
        sites=tuple(map(rename, space.sites)),
    )


def _renamed_pairs(
    rename: Renaming, named: Iterable[tuple[str, Any]]
) -> tuple[Any, ...]:
    return tuple((rename(path), of_path) for path, of_path in named)


def _renamed_sites(rename: Renaming, sites: Iterable[Site]) -> tuple[Site, ...]:
    return tuple(site._replace(path=rename(site.path)) for site in sites)


def _leaf(name: str) -> str:
    """The leaf of a name, which may be that of one of a stack of matrices: kernel[3]."""
    return name.partition("[")[0]


def leaves_of_group(group: Group) -> frozenset[str]:
    """The paths of the leaves that a group scales, its sites' own among them."""
    return frozenset(path for path, _ in group.leaves)


def leaves_of_space(space: Space) -> frozenset[str]:
    """The paths of the leaves that a space rotates, and of those that must be ones."""
    return frozenset(path for path, _ in space.leaves).union(space.gains)


def joined_graph(leaves: Any, parts: Iterable[tuple[str, Graph]]) -> Graph:
    """The graph of a tree of these (path, shape), from the (prefix, graph) of each of its parts.

    The inverse of `part_of_graph` where no group straddles two parts.
    """
    whole = [renamed_graph(part, prefix.__add__) for prefix, part in parts]
    fields = {
        name: tuple(chain(*(getattr(graph, name) for graph in whole)))
        for name in Graph._fields
    }
    return Graph(**{**fields, "leaves": tuple(leaves)})


def straddling(graph: Graph, parts: Iterable[Collection[str]]) -> list[str]:
    """The names of the groups that scale leaves of several parts."""
    sets = list(map(frozenset, parts))
    return [
        group.name
        for group in graph.groups
        if not any(leaves_of_group(group) <= part for part in sets)
    ]


def held_together(graph: Graph) -> list[tuple[str, ...]]:
    """All leaves, in sets that must be in memory together to be folded.

    Leaves of one group are together; so are those of groups that share a leaf. A leaf that no
    group scales is alone.

    Example: with a group of the leaves norm and q, one of q and o, and a leaf embed, the sets are
    (norm, q, o) and (embed,).
    """
    together: dict[str, tuple[str, ...]] = {
        path: (path,) for path, _ in graph.leaves
    }
    for group in graph.groups:
        joined: dict[str, None] = {}
        for path, _ in group.leaves:
            joined.update(dict.fromkeys(together[path]))
        together.update(dict.fromkeys(joined, tuple(joined)))
    return list(dict.fromkeys(together.values()))
