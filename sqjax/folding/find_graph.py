"""The graph of a program: its sites, its groups, and why the other sites are in none."""

from collections.abc import Mapping, Sequence

from sqjax.folding.attention_keys import Keys
from sqjax.folding.embeddings import find_tables
from sqjax.folding.graph import Graph
from sqjax.folding.groups import Survey, covers, find_group, stated_group
from sqjax.folding.search import Refused
from sqjax.folding.sites import Place
from sqjax.program.facts import Program


def find_graph(
    survey: Survey,
    keys: Sequence[Keys] = (),
    stated: Mapping[str, Sequence[str]] | None = None,
) -> Graph:
    """Finds the groups of a program.

    Args:
        survey: the program and its sites.
        keys: what `find_keys(survey)` found, if scales between keys and queries are wanted.
        stated: {site: the leaves that shall absorb its scale} of groups that are stated by hand; they come first.

    Raises:
        ValueError: a stated group is not lawful, or is not as stated.
    """
    program, places, refused = survey.program, survey.places, dict(survey.refused)
    groups = [stated_group(survey, site, absorbers) for site, absorbers in (stated or {}).items()]
    grouped = {p.name for p in places if any(covers(group, p) for group in groups)}
    ways: dict[str, tuple[str, ...]] = {}
    for place in places:
        if place.name in grouped:
            continue
        try:
            group = find_group(survey, place)
        except Refused as reason:
            refused[place.name], ways[place.name] = (
                str(reason) + _looked_up(program, place),
                reason.way,
            )
        else:
            groups.append(group)
            paths = dict(group.sites)
            grouped.update(p.name for p in places if p.site.path in paths and covers(group, p))
    refused = {name: reason for name, reason in refused.items() if name not in grouped}
    return Graph(
        leaves=tuple(
            (program.leaves[var], program.shape(var))
            for var in program.inputs
            if var in program.leaves
        ),
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
    found = next(
        (e for e, view in views if view is not None and view.path == place.site.path), None
    )
    return "" if found is None else f"; the same leaf is an embedding, looked up by {found}"
