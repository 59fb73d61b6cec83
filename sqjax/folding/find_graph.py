"""The graph of a program: its sites, its groups, and why the other sites are in none."""

from collections.abc import Mapping, Sequence

from sqjax.folding.attention_keys import find_keys
from sqjax.folding.embeddings import find_tables
from sqjax.folding.graph import Graph
from sqjax.folding.groups import Search, covers, find_group, stated_group
from sqjax.folding.search import Refused
from sqjax.folding.sites import Place, find_heads, find_sites
from sqjax.program.facts import Program


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
    groups = [stated_group(search, site, absorbers) for site, absorbers in (stated or {}).items()]
    grouped = {p.name for p in places if any(covers(group, p) for group in groups)}
    ways: dict[str, tuple[str, ...]] = {}
    for place in places:
        if place.name in grouped:
            continue
        try:
            group = find_group(search, place)
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
    keys = find_keys(search) if attention else []
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
