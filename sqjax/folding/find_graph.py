"""The graph of a program: its sites, its fold groups, and why the other sites are in none."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter

from sqjax.folding.attention_keys import Keys
from sqjax.folding.embeddings import find_tables
from sqjax.folding.find_spaces import find_spaces
from sqjax.folding.graph import Graph, Group, paths_of
from sqjax.folding.groups import Survey, covers, find_group, stated_group
from sqjax.folding.search import Refused
from sqjax.folding.sites import Place
from sqjax.program.equations import Body, Equation
from sqjax.program.facts import Program


def find_graph(
    survey: Survey,
    keys: Sequence[Keys] = (),
    stated: Mapping[str, Sequence[str]] | None = None,
) -> Graph:
    """Finds the groups and the spaces of a program.

    Args:
        survey: the program and its sites.
        keys: what `find_keys(survey)` found, if scales between keys and queries are wanted.
        stated: {site: the leaves that shall absorb its scale} of groups that are stated by hand;
            they come first.

    Raises:
        ValueError: a stated group is not lawful, or is not as stated.
    """
    groups = [stated_group(survey, *item) for item in (stated or {}).items()]
    refused, ways = _group_the_rest(survey, groups)
    spaces, space_refusals = find_spaces(survey)
    return graph_without_groups(survey)._replace(
        groups=(*groups, *map(attrgetter("group"), keys)),
        refused=tuple(refused.items()),
        ways=tuple(ways.items()),
        keys=tuple(map(attrgetter("site"), keys)),
        spaces=spaces,
        space_refusals=space_refusals,
    )


def graph_without_groups(survey: Survey) -> Graph:
    """The leaves, sites and tables of a program; no group is looked for, and no site refused."""
    program = survey.program
    leaves = {path: program.shape(v) for path, v in program.whole.items()}
    offsets = {
        program.leaves[var]: constant
        for var, constant in program.offsets.items()
    }
    sites = tuple(dict.fromkeys(map(attrgetter("site"), survey.places)))
    return Graph(
        leaves=tuple(leaves.items()),
        sites=sites,
        groups=(),
        refused=(),
        offsets=tuple(offsets.items()),
        tables=find_tables(program, frozenset(paths_of(sites))),
        branches=tuple(_branches(program, survey.places).items()),
    )


def _branches(program: Program, places: Sequence[Place]) -> dict[str, str]:
    """{name of a place: which loop or branch has to run} of those that are read nowhere else."""
    inside: dict[int, str] = {}
    # Those of inner branches come first, and stand: the inner one has to be taken, too.
    for equation in program.equations:
        for body, text in _conditions(equation):
            for inner in body.everything:
                inside.setdefault(id(inner), text)
    found: dict[str, list[str]] = {}
    for place in places:
        where = inside.get(id(place.equation), "")
        found.setdefault(place.name, []).append(where)
    return {
        name: " and ".join(dict.fromkeys(texts))
        for name, texts in found.items()
        if all(texts)
    }


def _conditions(equation: Equation) -> list[tuple[Body, str]]:
    """(body, what it means that it saw nothing) of what a cond or a while loop may not run."""
    if equation.name == "while":
        _, body = equation.branches  # its test runs once at least
        return [(body, f"the body of {equation} never ran")]
    return [
        (branch, f"branch {number} of {equation} was not taken")
        for number, branch in enumerate(equation.branches)
    ]


def _group_the_rest(
    survey: Survey, groups: list[Group]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Adds to `groups` those of all sites that are in none yet.

    Returns:
        {site, or other leaf that a matmul may meet: why it is in no group}, and {site: the
        equations from its activation to what stands in the way}.
    """
    refused: dict[str, str] = dict(survey.refused)
    ways: dict[str, tuple[str, ...]] = {}
    grouped = set(chain(*map(partial(_covered, survey), groups)))
    for place in survey.places:
        if place.name in grouped:
            continue
        try:
            group = find_group(survey, place)
        except Refused as reason:
            refused[place.name] = (
                f"{reason}{_also_an_embedding(survey.program, place)}"
            )
            ways[place.name] = reason.way
            continue
        groups.append(group)
        grouped |= _covered(survey, group)
    # A site that was refused may be in the group of another one after all.
    for name in grouped.intersection(refused):
        del refused[name]
        ways.pop(name, None)
    return refused, ways


def _covered(survey: Survey, group: Group) -> set[str]:
    """The names of the places that are in a group."""
    return {place.name for place in survey.places if covers(group, place)}


def _also_an_embedding(program: Program, place: Place) -> str:
    """What more to say of a tied head: its leaf is an embedding too, which shares its scale."""
    for equation in program.equations:
        is_lookup = equation.name == "gather"
        if is_lookup and program.path_of(equation.inputs[0]) == place.site.path:
            return f"; the same leaf is an embedding, looked up by {equation}"
    return ""
