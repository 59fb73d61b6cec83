"""Grouping: the sites of a program, and for each the leaves that can absorb its activation's scale.

Ask of a site's input x: could x be x / s? Labels (see `sqjax.labels`) start at x and go wherever the rules of
`sqjax.folding` carry them, until all of them end in leaves, or something refuses. What is found is believed only after
`sqjax.certificate` has checked it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sqjax import labels as lab
from sqjax.certificate import certify
from sqjax.closure import Closure, Refused
from sqjax.folding import RULES
from sqjax.graph import Graph, Group, LabelMap, Site
from sqjax.labels import Labels
from sqjax.program import Program, Var
from sqjax.sites import Place, find_heads, find_sites, normalised_over, sides_of
from sqjax.stacks import Stack
from sqjax.tables import find_tables


def find_graph(
    program: Program,
    shared: Mapping[str, str],
    stated: Mapping[str, Sequence[str]] | None = None,
    attention: bool = False,
) -> Graph:
    """Finds the sites and the groups of a program.

    Args:
        program: the traced function.
        shared: {path: another path} of leaves that are the same array at two places of the tree.
        stated: {site: the leaves that shall absorb its scale} of groups that are stated by hand; they come first.
        attention: whether to look for scales between keys and queries too.

    Raises:
        ValueError: a stated group is not lawful, or is not as stated.
    """
    places, refused = find_sites(program)
    search = Search(program, shared, places, find_heads(program, places))
    groups = [_stated_group(search, site, absorbers) for site, absorbers in (stated or {}).items()]
    grouped = {p.name for p in places if any(_covers(group, p) for group in groups)}
    ways: dict[str, tuple[str, ...]] = {}
    for place in places:
        if place.name in grouped:
            continue
        try:
            group = find_group(search, place)
        except Refused as reason:
            refused[place.name], ways[place.name] = str(reason) + _looked_up(program, place), reason.way
        else:
            groups.append(group)
            paths = dict(group.sites)
            grouped.update(p.name for p in places if p.site.path in paths and _covers(group, p))
    refused = {name: reason for name, reason in refused.items() if name not in grouped}
    keys = find_keys(search) if attention else []
    return Graph(
        leaves=tuple((program.leaves[var], program.shape(var)) for var in program.inputs if var in program.leaves),
        sites=tuple(dict.fromkeys(p.site for p in places)),
        groups=(*groups, *(k.group for k in keys)),
        refused=tuple(refused.items()),
        offsets=tuple({program.leaves[var]: c for var, c in program.offsets.items()}.items()),
        ways=tuple((path, way) for path, way in ways.items() if path in refused),
        keys=tuple(k.site for k in keys),
        tables=find_tables(program, frozenset(p.site.path for p in places)),
    )


def _looked_up(program: Program, place: Place) -> str:
    """What more to say of a tied head: its leaf is an embedding too."""
    lookups = [e for e in program.equations if e.name == "gather"]
    views = [(e, program.views.get(v)) for e in lookups for v in e.variables[:1]]
    found = next((e for e, view in views if view is not None and view.path == place.site.path), None)
    return "" if found is None else f"; the same leaf is an embedding, looked up by {found}"


class Search(NamedTuple):
    """What the search for groups needs to know of a program: its sites, the shared leaves, and the sites at its end."""

    program: Program
    shared: Mapping[str, str]
    places: Sequence[Place]
    heads: frozenset[str]


def find_group(search: Search, place: Place, absorbers: frozenset[str] | None = None) -> Group:
    """The group of one site's activation, certified; `absorbers` are the only leaves that may absorb (None: any).

    Raises:
        Refused: with the reason.
    """
    found, closure = _close(search, place.activation, place.axes, absorbers)
    group = _group(search, place.name, found, closure)
    if not group.absorbers or not _covers(group, place):
        raise Refused("no leaf absorbs its scale")
    return group


def _covers(group: Group, place: Place) -> bool:
    """Whether a place is among the sites of a group."""
    labels = dict(group.sites).get(place.site.path)
    return labels is not None and bool(labels.array[place.entry].any())


def _close(
    search: Search,
    activation: Var,
    axes: Sequence[int],
    absorbers: frozenset[str] | None = None,
    crossing: bool = False,
) -> tuple[dict[Var, Labels], Closure]:
    """Lawful labels for an activation that is divided by a scale of its own for every index of these axes."""
    program = search.program
    sizes = [program.shape(activation)[a] for a in axes]
    size = int(np.prod(sizes))
    closure = Closure(program, RULES, search.shared, size, absorbers, crossing)
    seed = -1 - np.arange(size).reshape(sizes)
    closure.put(activation, lab.put_axes(seed, axes, len(program.shape(activation))))
    closure = closure.close()
    found = closure.numbered()
    if activation not in found:
        raise Refused("it holds only zeros" if size else "it has no channels")
    if problem := certify(program, found):
        raise Refused(problem)
    return found, closure


def _stated_group(search: Search, site: str, absorbers: Sequence[str]) -> Group:
    """A group stated by hand: the one that the search finds with these absorbers, if it is what was stated."""
    place = next((p for p in search.places if p.name == site), None)
    if place is None:
        known = sorted({p.name for p in search.places})
        raise ValueError(f"groups: {site!r} is no site; the sites are {known[:5]} ...")
    try:
        group = find_group(search, place, frozenset(absorbers))
    except Refused as reason:
        raise ValueError(f"groups: {site}: {list(absorbers)} can not absorb its scale: {reason}") from None
    if idle := set(absorbers).difference(group.absorbers):
        raise ValueError(f"groups: {site}: {sorted(idle)} absorb nothing of its scale; {group.absorbers} do")
    return group


def _group(search: Search, name: str, found: Mapping[Var, Labels], closure: Closure) -> Group:
    """Labels as a group: those of variables become those of leaves and sites, one scale vector a step of a scan."""
    program = search.program
    stack = Stack.of(program, found, search.places)
    variables = {program.leaves[v]: v for v in found if v in program.leaves}
    leaves = {path: stack.of_leaf(v, found[v]) for path, v in variables.items()}
    sites = _scaled_sites(search, stack, found)
    absorbers = {path for path, labels in leaves.items() if (labels < 0).any()}
    return Group(
        name=name,
        size=stack.size * math.prod(stack.steps),
        sites=tuple((path, LabelMap.of(labels)) for path, labels in sites.items()),
        leaves=tuple((path, LabelMap.of(labels)) for path, labels in leaves.items()),
        norm=not absorbers.intersection(p.site.path for p in search.places) and not search.heads.intersection(sites),
        ways=tuple((path, closure.way_to(closure.causes[v])) for path, v in variables.items()),
        steps=stack.steps,
    )


def _scaled_sites(search: Search, stack: Stack, found: Mapping[Var, Labels]) -> dict[str, Labels]:
    """{site: the labels of its channels} for the sites whose activation carries labels."""
    sites: dict[str, Labels] = {}
    known: dict[str, np.ndarray] = {}  # which channels of a site have been seen
    labelled = {place.site.path for place in search.places if place.activation in found}
    for place in search.places:
        if place.site.path not in labelled:
            continue
        activation = found.get(place.activation)
        if activation is not None and lab.varies(
            activation, [a for a in range(activation.ndim) if a not in place.axes]
        ):
            raise Refused(f"its scale passes through {place.site.path} at {place.equation}")
        labels = stack.of_site(place, activation)
        if (labels < 0).any():
            raise Refused(f"its scale would multiply what {place.name} reads at {place.equation}")
        path, own = place.site.path, np.zeros(place.site.channels, bool)
        own[place.entry] = True
        before = sites.get(path, labels)
        if (own & known.get(path, own) & (before != labels)).any():
            raise Refused(f"{place.equation} multiplies another part of {place.name} with something else")
        sites[path], known[path] = np.where(own, labels, before), own | known.get(path, own)
    return {path: labels for path, labels in sites.items() if labels.any()}


class Keys(NamedTuple):
    """Where keys meet queries: the keys, the axes along which their scales differ, and the group of those scales."""

    site: Site
    activation: Var
    axes: tuple[int, ...]
    group: Group


def find_keys(search: Search) -> list[Keys]:
    """The products of keys with queries between which a scale can move: K / s and s Q (SmoothAttention).

    Lin et al. 2024, arXiv 2405.04532. The keys are the operand over whose tokens the softmax runs. Where no leaf
    absorbs the scale on both sides, nothing is found.
    """
    program = search.program
    found: list[Keys] = []
    met: set[Var] = set()
    for equation in program.equations:
        if equation.name != "dot_general" or program.from_leaves.intersection(equation.variables):
            continue
        for side in sides_of(program, equation):
            if isinstance(side.var, int) and side.var not in met and normalised_over(program, equation, side.out):
                try:
                    labels, closure = _close(search, side.var, (*side.batch, *side.contracted), crossing=True)
                    keys = _keys(search, side.var, labels, closure, {k.site.path for k in found})
                except Refused:
                    continue
                met.update(labels)
                found.append(keys)
    return found


def _keys(
    search: Search, activation: Var, found: Mapping[Var, Labels], closure: Closure, taken: Collection[str]
) -> Keys:
    program, labels = search.program, found[activation]
    group = _group(search, "", found, closure)
    axes = tuple(a for a, size in enumerate(labels.shape) if size > 1)
    stack = Stack.of(program, found, search.places)
    steps = program.scopes[activation]
    channels = (*(program.lengths[scan] for scan in steps), *(labels.shape[a] for a in axes))
    own = -labels.reshape((1,) * len(steps) + tuple(labels.shape[a] for a in axes))
    spread = np.broadcast_to(stack.along(own, {scope: (i, 1) for i, scope in enumerate(steps)}, channels), channels)
    if not group.absorbers:
        raise Refused("no leaf absorbs its scale")
    names = [f"{group.absorbers[0]} (keys{f', {n}' if n > 1 else ''})" for n in range(1, len(taken) + 2)]
    name = next(name for name in names if name not in taken)  # layers of one stack have keys of their own
    site = Site(name, (), channels)
    sites = ((name, LabelMap.of(spread)), *group.sites)  # and those that the scale passes on its way
    return Keys(site, activation, axes, group._replace(name=name, sites=sites, keys=True))
