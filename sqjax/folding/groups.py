"""Grouping: the sites of a program, and for each the leaves that can absorb its activation's scale.

Ask of a site's input x: could x be x / s? Labels (see `sqjax.folding.labels`) start at x and go wherever the rules of
`sqjax.folding.rules` carry them, until all of them end in leaves, or something refuses. What is found is believed only after
`sqjax.folding.certificate` has checked it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sqjax.folding import labels as lab
from sqjax.folding.certificate import certify
from sqjax.folding.graph import Group, LabelMap
from sqjax.folding.labels import Labels
from sqjax.folding.per_step import Stack
from sqjax.folding.rules import RULES
from sqjax.folding.search import Closure, Refused
from sqjax.folding.sites import Place
from sqjax.program.build import Var
from sqjax.program.facts import Program


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
    found, closure = close_labels(search, place.activation, place.axes, absorbers)
    group = group_of(search, place.name, found, closure)
    if not group.absorbers or not covers(group, place):
        raise Refused("no leaf absorbs its scale")
    return group


def covers(group: Group, place: Place) -> bool:
    """Whether a place is among the sites of a group."""
    labels = dict(group.sites).get(place.site.path)
    return labels is not None and bool(labels.array[place.entry].any())


def close_labels(
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


def stated_group(search: Search, site: str, absorbers: Sequence[str]) -> Group:
    """A group stated by hand: the one that the search finds with these absorbers, if it is what was stated."""
    place = next((p for p in search.places if p.name == site), None)
    if place is None:
        known = sorted({p.name for p in search.places})
        raise ValueError(f"groups: {site!r} is no site; the sites are {known[:5]} ...")
    try:
        group = find_group(search, place, frozenset(absorbers))
    except Refused as reason:
        raise ValueError(
            f"groups: {site}: {list(absorbers)} can not absorb its scale: {reason}"
        ) from None
    if idle := set(absorbers).difference(group.absorbers):
        raise ValueError(
            f"groups: {site}: {sorted(idle)} absorb nothing of its scale; {group.absorbers} do"
        )
    return group


def group_of(search: Search, name: str, found: Mapping[Var, Labels], closure: Closure) -> Group:
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
        norm=not absorbers.intersection(p.site.path for p in search.places)
        and not search.heads.intersection(sites),
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
            raise Refused(
                f"{place.equation} multiplies another part of {place.name} with something else"
            )
        sites[path], known[path] = np.where(own, labels, before), own | known.get(path, own)
    return {path: labels for path, labels in sites.items() if labels.any()}
