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
from sqjax.folding.sites import Place, find_heads, find_sites
from sqjax.program.build import Var
from sqjax.program.facts import Program


class Survey(NamedTuple):
    """What the search for groups needs to know of a program.

    Made once, because finding the sites takes time, and handed on to whoever looks for groups or keys, or observes.

    Attributes:
        program: the traced function.
        shared: {path: another path} of leaves that are the same array at two places of the tree.
        places: the matmuls of an activation with a leaf.
        refused: {leaf: why it is no site} of other leaves that a matmul may meet.
        heads: the sites whose product reaches an output of the function through no other site.
    """

    program: Program
    shared: Mapping[str, str]
    places: Sequence[Place]
    refused: Mapping[str, str]
    heads: frozenset[str]

    @classmethod
    def of(cls, program: Program, shared: Mapping[str, str]) -> "Survey":
        """Finds the sites of a program."""
        places, refused = find_sites(program)
        return cls(program, shared, places, refused, find_heads(program, places))


def find_group(survey: Survey, place: Place, absorbers: frozenset[str] | None = None) -> Group:
    """The group of one site's activation, certified; `absorbers` are the only leaves that may absorb (None: any).

    Raises:
        Refused: with the reason.
    """
    found, closure = close_labels(survey, place.activation, place.axes, absorbers)
    group = group_of(survey, place.name, found, closure)
    if not group.absorbers or not covers(group, place):
        raise Refused("no leaf absorbs its scale")
    return group


def covers(group: Group, place: Place) -> bool:
    """Whether a place is among the sites of a group."""
    labels = dict(group.sites).get(place.site.path)
    return labels is not None and bool(labels.array[place.entry].any())


def close_labels(
    survey: Survey,
    activation: Var,
    axes: Sequence[int],
    absorbers: frozenset[str] | None = None,
    crossing: bool = False,
) -> tuple[dict[Var, Labels], Closure]:
    """Lawful labels for an activation that is divided by a scale of its own for every index of these axes."""
    program = survey.program
    sizes = [program.shape(activation)[a] for a in axes]
    size = int(np.prod(sizes))
    closure = Closure(program, RULES, survey.shared, size, absorbers, crossing)
    seed = -1 - np.arange(size).reshape(sizes)
    closure.put(activation, lab.put_axes(seed, axes, len(program.shape(activation))))
    closure = closure.close()
    found = closure.numbered()
    if activation not in found:
        raise Refused("it holds only zeros" if size else "it has no channels")
    if problem := certify(program, found):
        raise Refused(problem)
    return found, closure


def stated_group(survey: Survey, site: str, absorbers: Sequence[str]) -> Group:
    """A group stated by hand: the one that the search finds with these absorbers, if it is what was stated."""
    place = next((p for p in survey.places if p.name == site), None)
    if place is None:
        known = sorted({p.name for p in survey.places})
        raise ValueError(f"groups: {site!r} is no site; the sites are {known[:5]} ...")
    try:
        group = find_group(survey, place, frozenset(absorbers))
    except Refused as reason:
        raise ValueError(
            f"groups: {site}: {list(absorbers)} can not absorb its scale: {reason}"
        ) from None
    if idle := set(absorbers).difference(group.absorbers):
        raise ValueError(
            f"groups: {site}: {sorted(idle)} absorb nothing of its scale; {group.absorbers} do"
        )
    return group


def group_of(survey: Survey, name: str, found: Mapping[Var, Labels], closure: Closure) -> Group:
    """Labels as a group: those of variables become those of leaves and sites, one scale vector a step of a scan."""
    program = survey.program
    stack = Stack.of(program, found, survey.places)
    variables = {program.leaves[v]: v for v in found if v in program.leaves}
    leaves = {path: stack.of_leaf(v, found[v]) for path, v in variables.items()}
    sites = _scaled_sites(survey, stack, found)
    absorbers = {path for path, labels in leaves.items() if (labels < 0).any()}
    return Group(
        name=name,
        size=stack.size * math.prod(stack.steps),
        sites=tuple((path, LabelMap.of(labels)) for path, labels in sites.items()),
        leaves=tuple((path, LabelMap.of(labels)) for path, labels in leaves.items()),
        norm=not absorbers.intersection(p.site.path for p in survey.places)
        and not survey.heads.intersection(sites),
        ways=tuple((path, closure.way_to(closure.causes[v])) for path, v in variables.items()),
        steps=stack.steps,
    )


def _scaled_sites(survey: Survey, stack: Stack, found: Mapping[Var, Labels]) -> dict[str, Labels]:
    """{site: the labels of its channels} for the sites whose activation carries labels."""
    sites: dict[str, Labels] = {}
    known: dict[str, np.ndarray] = {}  # which channels of a site have been seen
    labelled = {place.site.path for place in survey.places if place.activation in found}
    for place in survey.places:
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
