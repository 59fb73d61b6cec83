"""Fold groups: the sites of a program, and for each the leaves that can absorb its activation's
scale.

Ask of a site's input x: could x be x / s? Labels (see `sqjax.folding.labels`) start at x and go
wherever the rules of `sqjax.folding.rules` carry them, until all of them end in leaves, or
something refuses. What is found is believed only after `sqjax.folding.certificate` has checked it.
"""

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from sqjax._shapes import sizes_along
from sqjax.folding.certificate import certify
from sqjax.folding.graph import Group, LabelMap
from sqjax.folding.heads import find_heads
from sqjax.folding.labels import (
    Labels,
    channels_and_degrees,
    other_axes,
    put_axes,
    varies,
)
from sqjax.folding.per_step import Stack
from sqjax.folding.rules import RULES
from sqjax.folding.search import Closure, Question, Refused
from sqjax.folding.sites import Place, find_sites
from sqjax.folding.ties import Ties
from sqjax.program.equations import Var
from sqjax.program.facts import Program


class Survey(NamedTuple):
    """What the search for groups needs to know of a program.

    Made once, because finding the sites takes time, and handed on to whoever looks for groups or
    keys, or observes.

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
        return cls(
            program, shared, places, refused, find_heads(program, places)
        )


def find_group(
    survey: Survey, place: Place, absorbers: frozenset[str] | None = None
) -> Group:
    """The group of one site's activation, certified.

    Args:
        survey: the program and its sites.
        place: the site.
        absorbers: the only leaves that may absorb; None: any.

    Raises:
        Refused: with the reason.
    """
    _check_no_norm(place)
    found, closure = close_labels(
        survey, place.activation, place.axes, absorbers
    )
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
    """Lawful labels for an activation divided by a scale of its own for every index of these axes.

    Example: an activation of shape (tokens, 3) and the axis 1 start the search with [[-1, -2, -3]].

    Raises:
        Refused: the search found none, or the certificate does not pass them.
    """
    program = survey.program
    sizes = sizes_along(program.shape(activation), axes)
    channels = int(np.prod(sizes))
    question = Question(program, RULES, survey.shared, absorbers, crossing)
    closure = Closure(question, Ties(np.arange(channels)))
    divided = -1 - np.arange(channels).reshape(sizes)
    closure.put(
        activation, put_axes(divided, axes, len(program.shape(activation)))
    )
    closure = closure.close()  # another one, if there was a choice
    found = closure.numbered()
    if activation not in found:
        raise Refused(
            "it holds only zeros" if channels else "it has no channels"
        )
    if problem := certify(program, found):
        raise Refused(problem)
    return found, closure


def stated_group(survey: Survey, site: str, absorbers: Sequence[str]) -> Group:
    """A group stated by hand: the one that the search finds with these absorbers.

    Raises:
        ValueError: there is no such site, the search finds none, or it does not need all of them.
    """
    place_of = {place.name: place for place in reversed(survey.places)}
    if site not in place_of:
        known = sorted(place_of)
        raise ValueError(
            f"groups: {site!r} is no site; the sites are {known[:5]} ..."
        )
    try:
        group = find_group(survey, place_of[site], frozenset(absorbers))
    except Refused as reason:
        stated = list(absorbers)
        raise ValueError(
            f"groups: {site}: {stated} can not absorb its scale: {reason}"
        ) from None
    idle = sorted(set(absorbers).difference(group.absorbers))
    if idle:
        raise ValueError(
            f"groups: {site}: {idle} absorb nothing of its scale; {group.absorbers} do; leave out "
            "the others"
        )
    return group


def group_of(
    survey: Survey, name: str, found: Mapping[Var, Labels], closure: Closure
) -> Group:
    """Labels of variables as a group: as labels of leaves and of the channels of sites.

    Where the group lives in a scan or shard_map it has one scale vector for each step or device.

    Raises:
        Refused: a site can not tell these scales by its channels.
    """
    program = survey.program
    stack = Stack.of(program, found, survey.places)
    variables = {program.leaves[v]: v for v in found if v in program.leaves}
    leaves, ways = {}, {}
    for path, var in variables.items():
        leaves[path] = stack.of_leaf(var, found[var])
        ways[path] = closure.way_to(closure.causes[var])
    sites = _scaled_sites(survey, stack, found)
    group = Group(
        name=name,
        size=stack.size * math.prod(stack.steps),
        sites=_label_maps(sites),
        leaves=_label_maps(leaves),
        norm=False,
        ways=tuple(ways.items()),
        steps=stack.steps,
    )
    # What the authors' code smooths: norms absorb, no matmul does, and the head is left out.
    weights = set(map(attrgetter("site.path"), survey.places))
    norm = weights.isdisjoint(group.absorbers) and survey.heads.isdisjoint(
        sites
    )
    return group._replace(norm=norm)


def _label_maps(
    labels: Mapping[str, Labels],
) -> tuple[tuple[str, LabelMap], ...]:
    return tuple((path, LabelMap.of(array)) for path, array in labels.items())


def _scaled_sites(
    survey: Survey, stack: Stack, found: Mapping[Var, Labels]
) -> dict[str, Labels]:
    """{site: the labels of its channels} for the sites whose activation carries labels.

    A leaf may be read at several places: as a whole, or one matrix of a stack here and another
    there. Each place knows the labels of the channels that it reads; where two know the same
    channel they must agree, because a channel of a site has one scale.
    """
    sites: dict[str, Labels] = {}
    known: dict[
        str, np.ndarray
    ] = {}  # which channels of a site some place has read
    # Only these sites are looked at, because each look costs as much as the site has channels.
    labelled = {
        place.site.path for place in survey.places if place.activation in found
    }
    for place in survey.places:
        path = place.site.path
        if path not in labelled:
            continue
        labels = _at_place(stack, place, found.get(place.activation))
        reads = np.zeros(place.site.channels, bool)
        reads[place.entry] = True
        # An earlier place may have read other channels of it, or the same.
        before = sites.get(path, labels)
        read_before = known.get(path, np.zeros_like(reads))
        if (reads & read_before & (before != labels)).any():
            raise Refused(
                f"{place.equation} multiplies another part of {place.name} with something else"
            )
        sites[path] = np.where(reads, labels, before)
        known[path] = reads | read_before
    return {path: labels for path, labels in sites.items() if labels.any()}


def _at_place(stack: Stack, place: Place, activation: Labels | None) -> Labels:
    """The labels of a site's channels that one place reads, given its activation's (None: none).

    Raises:
        Refused: the activation's scales differ along other axes than the site's channels, or it
            would be multiplied, where it must be divided.
    """
    others = other_axes(len(stack.program.shape(place.activation)), place.axes)
    if activation is not None and varies(activation, others):
        raise Refused(
            f"its scale passes through {place.site.path} at {place.equation}"
        )
    labels = stack.of_site(place, activation)
    if labels.any():
        _check_no_norm(place)
    _, degrees = channels_and_degrees(labels)
    if (degrees > 1).any():
        raise Refused(
            f"{place.equation} multiplies {place.name} with what is squared elsewhere: "
            "only a root of its scale may pass"
        )
    if (labels < 0).any():
        raise Refused(
            f"its scale would multiply what {place.name} reads at {place.equation}"
        )
    return labels


def _check_no_norm(place: Place) -> None:
    """A weight that fn divides by its own norm takes no scale: the norm would be another one.

    (One scale for all channels it could take, but that smooths nothing.)

    Raises:
        Refused: this is one.
    """
    if place.view.normed:
        raise Refused(
            f"{place.equation} multiplies {place.name} as fn has scaled it by its own norm, which "
            "a smoothing scale would change"
        )
