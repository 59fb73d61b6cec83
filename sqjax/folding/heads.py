"""Heads: the sites whose product reaches an output of a function through no other site."""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter

from sqjax.folding.sites import Place
from sqjax.program.equations import Atom, Body, Equation, Var
from sqjax.program.facts import Program
from sqjax.program.subprograms import ShardMap


def find_heads(program: Program, places: Sequence[Place]) -> frozenset[str]:
    """The sites whose product reaches an output of fn through no other site."""
    weights: dict[Var, set[str]] = {}
    for place in places:
        product = place.equation.outputs[0]
        weights.setdefault(product, set()).add(place.site.path)
    heads: set[str] = set()
    _reach(program.main, set(program.results), weights, heads)
    return frozenset(heads)


def _reach(
    equations: Sequence[Equation],
    reaching: set[Atom],
    weights: Mapping[Var, set[str]],
    heads: set[str],
) -> None:
    """Walks equations backwards from what they return, up to the sites.

    Args:
        equations: in order.
        reaching: what reaches an output through no site; the variables found are added.
        weights: {variable: the sites whose product it is}.
        heads: the sites met, which are added.
    """
    for equation in reversed(equations):
        if reaching.isdisjoint(equation.outputs):
            continue
        paths = weights.get(equation.outputs[0])
        if paths is not None:
            # And no further: what it reads passes through these sites.
            heads |= paths
        else:
            reaching |= _behind(equation, reaching, weights, heads)


def _behind(
    equation: Equation,
    reaching: set[Atom],
    weights: Mapping[Var, set[str]],
    heads: set[str],
) -> set[Atom]:
    """What reaches an output through an equation that is no site itself."""
    body = equation.body
    if body is not None and isinstance(body.call, ShardMap):
        inner = _reach_into(equation, body, reaching, weights, heads)
        given = zip(equation.inputs, body.inputs, strict=True)
        return {operand for operand, v in given if v in inner}
    if not any(_holds_a_site(body, weights) for body in equation.bodies):
        return set(equation.variables)
    if equation.name != "cond":
        # A loop with a site in it is taken to lead through that site.
        return set()
    behind: set[Atom] = set()
    for branch in equation.branches:
        behind |= _reach_into(equation, branch, reaching, weights, heads)
    return behind


def _reach_into(
    equation: Equation,
    body: Body,
    reaching: set[Atom],
    weights: Mapping[Var, set[str]],
    heads: set[str],
) -> set[Atom]:
    """What reaches an output in a shard_map or in a branch, which runs once: it is walked like the
    rest.
    """
    returned = zip(equation.outputs, body.outputs, strict=True)
    inner = {v for outer, v in returned if outer in reaching}
    _reach(body.equations, inner, weights, heads)
    return inner


def _holds_a_site(body: Body, weights: Mapping[Var, set[str]]) -> bool:
    """Whether a product with a site's leaf is made somewhere in a body."""
    made = chain(*map(attrgetter("outputs"), body.everything))
    return not weights.keys().isdisjoint(made)
