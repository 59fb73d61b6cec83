"""Keys and queries of attention, between which a scale can move (SmoothAttention).

A score is q . k, so keys K and queries Q can become K / s and s Q, with one scale for each channel
of a head. That makes the keys flatter, which is good for a quantized cache.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from sqjax._shapes import sizes_along
from sqjax.folding.graph import Group, LabelMap, Site
from sqjax.folding.groups import Survey, close_labels, group_of
from sqjax.folding.labels import Labels, varying_axes
from sqjax.folding.per_step import Stack
from sqjax.folding.search import Refused
from sqjax.folding.sites import Side, normalised_over, sides_of
from sqjax.program.equations import Var


class Keys(NamedTuple):
    """Where keys meet queries.

    Attributes:
        site: stands for the keys in the graph and the statistics; it is no leaf, so it has no axes.
        activation: the keys.
        axes: the axes of the keys along which their scales differ.
        group: the group of these scales.
    """

    site: Site
    activation: Var
    axes: tuple[int, ...]
    group: Group


def find_keys(survey: Survey) -> list[Keys]:
    """The products of keys with queries between which a scale can move: K / s and s Q.

    Lin et al. 2024, arXiv 2405.04532. The keys are the operand over whose tokens the softmax runs.
    Where no leaf absorbs the scale on both sides, nothing is found.
    """
    program = survey.program
    found: dict[str, Keys] = {}
    # What the groups found so far have labelled: the keys themselves, too.
    met: set[Var] = set()
    for equation in program.equations:
        of_activations = program.from_leaves.isdisjoint(equation.inputs)
        if equation.name != "dot_general" or not of_activations:
            continue
        for side in sides_of(program, equation):
            if not isinstance(side.var, Var) or side.var in met:
                continue  # a literal, or keys whose scales another product has found
            if not normalised_over(program, equation, side.out):
                continue
            try:
                keys, labels = _keys(survey, side.var, side, found)
            except Refused:
                continue
            met.update(labels)
            found[keys.site.path] = keys
    return list(found.values())


def _keys(
    survey: Survey, activation: Var, side: Side, names: Collection[str]
) -> tuple[Keys, Mapping[Var, Labels]]:
    """The keys that are one operand of a product, and the labels of their group.

    Args:
        survey: the program and its sites.
        activation: the operand's variable.
        side: the operand.
        names: of the keys found before.

    Raises:
        Refused: no scale can move between them and the queries.
    """
    axes = (*side.batch, *side.contracted)
    found, closure = close_labels(survey, activation, axes, crossing=True)
    group = group_of(survey, "", found, closure)
    channels = _channels(survey, activation, found)
    if not group.absorbers:
        raise Refused("no leaf absorbs its scale")
    name = _name(group.absorbers[0], names)
    # The keys first, then the sites that the scale passes on its way.
    sites = ((name, LabelMap.of(channels)), *group.sites)
    keys = Keys(
        site=Site(name, (), channels.shape),
        activation=activation,
        axes=tuple(varying_axes(found[activation])),
        group=group._replace(name=name, sites=sites, keys=True),
    )
    return keys, found


def _channels(
    survey: Survey, activation: Var, found: Mapping[Var, Labels]
) -> Labels:
    """The labels of the keys' channels, with an axis for every scan or mesh axis around them.

    Example: keys of 2 heads with 4 channels, tied over rotary pairs, in a scan over 3 layers: an
    array of shape (3, 2, 4), in the first layer [[1, 2, 1, 2], [3, 4, 3, 4]].
    """
    program, labels = survey.program, found[activation]
    around = program.scopes[activation]
    steps = tuple(program.lengths[scope] for scope in around)
    varying = sizes_along(labels.shape, varying_axes(labels))
    one_step = -labels.reshape((1,) * len(steps) + varying)
    where = {scope: (i, 1) for i, scope in enumerate(around)}
    stack = Stack.of(program, found, survey.places)
    shape = (*steps, *varying)
    return np.broadcast_to(stack.along(one_step, where, shape), shape)


def _name(absorber: str, taken: Collection[str]) -> str:
    """A name for keys that none have yet: "k_proj/kernel (keys)", or "k_proj/kernel (keys, 2)" ...

    Layers of one stack need the number, because the same leaf absorbs the scales of each.
    """
    name, number = f"{absorber} (keys)", 1
    while name in taken:
        number += 1
        name = f"{absorber} (keys, {number})"
    return name
