"""Which variables a space would have to turn: every way in which the certificate could pass it.

The leaves are given; all else is sought without the search of spaces, forwards through the program:
of each equation's results every place that its law in the certificate lets pass is tried. So a
space that is refused here is refused by the certificate alone, whatever the search would have said.
"""

from collections.abc import Iterator
from itertools import product

from sqjax.folding.space import Along
from sqjax.folding.space_certificate import SPACE_LAWS, Turning, certify_space
from sqjax.program.entries import carried, entries
from sqjax.program.equations import Var

NONE = frozenset()


def accepted(program, space):
    """Whether the certificate passes a space with any members at all."""
    members = {}
    for path, place in space.leaves:
        var = program.whole.get(path)
        if var is None:
            return False
        members[var] = members.get(var, NONE) | {place}
    # The laws take for granted that it fits where it is said to be.
    problem = certify_space(program, space.size, members, space)
    if problem is None or "fit" in problem or "expected" in problem:
        return problem is None
    steps = list(_steps(program.main))
    for found in _extended(program, space, steps, members, {}):
        turning = {var: places for var, places in found.items() if places}
        if certify_space(program, space.size, turning, space) is None:
            return True
    return False


def _steps(equations):
    """("enter", equation) before a body, ("run", equation) for what no body has, or after it."""
    for equation in equations:
        if equation.body is not None:
            yield "enter", equation
            yield from _steps(equation.body.equations)
        yield "run", equation


def _extended(program, space, steps, members, products) -> Iterator[dict]:
    """The members, with those of all results, in every lawful way."""
    for number, (kind, equation) in enumerate(steps):
        turning = _turning(program, space, members, products)
        atoms = (*equation.inputs, *(equation.body.outputs if equation.body else ()))
        if not any(turning.of(a) or turning.is_product(a) for a in atoms):
            continue
        ways = list((_entered if kind == "enter" else _results)(turning, equation))
        for more, new_products in ways:
            rest = steps[number + 1 :]
            yield from _extended(program, space, rest, {**members, **more}, new_products)
        return
    yield members


def _turning(program, space, members, products):
    gains = frozenset(space.gains)
    return Turning(program, space.size, members, dict(products), gains, space.keeps_ones)


def _entered(turning, equation):
    """What a scan's body is given turns as the operands do; what starts with zeros, in any way."""
    more = {}
    for entry in entries(equation):
        more[entry.inner] = frozenset(a.at(a.axis - 1) for a in turning.of(entry.outer) if a.axis)
    free = []
    for value in carried(equation):
        if turning.program.is_zero(value.first):
            free.append(value.inner)
        else:
            more[value.inner] = turning.of(value.first)
    for places in product(*(_places(turning, var) for var in free)):
        yield {**more, **dict(zip(free, places, strict=True))}, turning.products


def _results(turning, equation):
    """The lawful places of an equation's results, with the products that are known then."""
    law = SPACE_LAWS.get(equation.name)
    if law is None:
        return
    if equation.body is not None:
        yield _left(turning, equation), turning.products
        return
    for places in product(*(_places(turning, var) for var in equation.outputs)):
        more = dict(zip(equation.outputs, places, strict=True))
        tried = turning._replace(
            members={**turning.members, **more}, products=dict(turning.products)
        )
        if law(tried, equation):
            yield more, tried.products


def _left(turning, equation):
    """What leaves a scan turns as what its body gives."""
    values = carried(equation)
    count = len(values)
    more = {}
    for value, result in zip(values, equation.outputs[:count], strict=True):
        more[result] = turning.of(value.inner)
    made = zip(equation.outputs[count:], equation.body.outputs[count:], strict=True)
    for outer, inner in made:
        more[outer] = frozenset(a.at(a.axis + 1) for a in turning.of(inner))
    return more


def _places(turning, var: Var):
    """Where a space may lie in a variable: nowhere, along an axis, or along two alike."""
    shape = turning.program.shape(var)
    size = turning.size
    places = []
    for axis, length in enumerate(shape):
        for before in range(1, length // size + 1):
            for after in range(1, length // (size * before) + 1):
                for start in range(length - before * size * after + 1):
                    places.append(Along(axis, before, after, start))
    pairs = []
    if any(len(p) > 1 for p in turning.members.values()):
        pairs = [(a, b) for a in places for b in places if a.axis < b.axis]
    return [NONE, *(frozenset([p]) for p in places), *map(frozenset, pairs)]
