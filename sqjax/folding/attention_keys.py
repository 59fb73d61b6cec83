"""Keys and queries of attention, between which a scale can move (SmoothAttention)."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from sqjax.folding.graph import Group, LabelMap, Site
from sqjax.folding.groups import Survey, close_labels, group_of
from sqjax.folding.labels import Labels
from sqjax.folding.per_step import Stack
from sqjax.folding.search import Closure, Refused
from sqjax.folding.sites import normalised_over, sides_of
from sqjax.program.build import Var


class Keys(NamedTuple):
    """Where keys meet queries: the keys, the axes along which their scales differ, and the group of those scales."""

    site: Site
    activation: Var
    axes: tuple[int, ...]
    group: Group


def find_keys(survey: Survey) -> list[Keys]:
    """The products of keys with queries between which a scale can move: K / s and s Q (SmoothAttention).

    Lin et al. 2024, arXiv 2405.04532. The keys are the operand over whose tokens the softmax runs. Where no leaf
    absorbs the scale on both sides, nothing is found.
    """
    program = survey.program
    found: list[Keys] = []
    met: set[Var] = set()
    for equation in program.equations:
        if equation.name != "dot_general" or program.from_leaves.intersection(equation.variables):
            continue
        for side in sides_of(program, equation):
            if (
                isinstance(side.var, Var)
                and side.var not in met
                and normalised_over(program, equation, side.out)
            ):
                try:
                    labels, closure = close_labels(
                        survey, side.var, (*side.batch, *side.contracted), crossing=True
                    )
                    keys = _keys(survey, side.var, labels, closure, {k.site.path for k in found})
                except Refused:
                    continue
                met.update(labels)
                found.append(keys)
    return found


def _keys(
    survey: Survey,
    activation: Var,
    found: Mapping[Var, Labels],
    closure: Closure,
    taken: Collection[str],
) -> Keys:
    program, labels = survey.program, found[activation]
    group = group_of(survey, "", found, closure)
    axes = tuple(a for a, size in enumerate(labels.shape) if size > 1)
    stack = Stack.of(program, found, survey.places)
    steps = program.scopes[activation]
    channels = (*(program.lengths[scan] for scan in steps), *(labels.shape[a] for a in axes))
    own = -labels.reshape((1,) * len(steps) + tuple(labels.shape[a] for a in axes))
    spread = np.broadcast_to(
        stack.along(own, {scope: (i, 1) for i, scope in enumerate(steps)}, channels), channels
    )
    if not group.absorbers:
        raise Refused("no leaf absorbs its scale")
    names = [
        f"{group.absorbers[0]} (keys{f', {n}' if n > 1 else ''})" for n in range(1, len(taken) + 2)
    ]
    name = next(
        name for name in names if name not in taken
    )  # layers of one stack have keys of their own
    site = Site(name, (), channels)
    sites = (
        (name, LabelMap.of(spread)),
        *group.sites,
    )  # and those that the scale passes on its way
    return Keys(site, activation, axes, group._replace(name=name, sites=sites, keys=True))
