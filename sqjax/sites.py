"""Sites: the matmuls of an activation with a leaf, as they stand in a program."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sqjax.graph import Site
from sqjax.program import Equation, Program, Var


class Place(NamedTuple):
    """A site in the program: the matmul's activation, and its contracted axes in the order of the leaf's."""

    site: Site
    equation: Equation
    activation: Var
    axes: tuple[int, ...]


class Side(NamedTuple):
    """One operand of a dot_general: its axes, and where its free axes stand in the result."""

    var: Var | np.ndarray
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    out: tuple[int, ...]


def sides_of(program: Program, e: Equation) -> tuple[Side, Side]:
    """The two operands of a dot_general."""
    contracting, batch = e.params["dimension_numbers"]
    sides, start = [], len(batch[0])
    for var, c, b in zip(e.inputs, contracting, batch, strict=True):
        ndim = len(program.shape(var))
        free = tuple(a for a in range(ndim) if a not in c and a not in b)
        sides.append(Side(var, tuple(c), tuple(b), free, tuple(range(start, start + len(free)))))
        start += len(free)
    return sides[0], sides[1]


def find_sites(program: Program) -> tuple[list[Place], dict[str, str]]:
    """(the matmuls of an activation with a leaf, {leaf: why it is none} of other leaves that a matmul may meet)."""
    places: list[Place] = []
    others: dict[str, str] = {}
    for equation in program.equations:
        if equation.runs_a_program:  # scan, while, cond, custom kernels
            read = [
                program.leaves_behind(v) for v in equation.inputs if isinstance(v, int) and v in program.from_leaves
            ]
            others.update(dict.fromkeys(sorted(set().union(*read)), f"{equation} reads it, and is not looked into"))
        if equation.name != "dot_general":
            continue
        sides = sides_of(program, equation)
        for me, other in (sides, sides[::-1]):
            if not isinstance(me.var, int) or me.var not in program.from_leaves:
                continue
            if not isinstance(other.var, int) or other.var in program.from_leaves:
                continue
            view = program.views.get(me.var)
            if view is None or me.batch:
                maker = program.maker.get(me.var)
                what = f"what {maker} makes of it" if maker else f"it in {program.avals[me.var].dtype}"
                why = f"{equation} has batch axes" if view else f"{equation} multiplies {what}"
                others.update(dict.fromkeys(program.leaves_behind(me.var), why))
                continue
            order = np.argsort([view.axes[a] for a in me.contracted])
            axes = tuple(view.axes[me.contracted[i]] for i in order)
            shape = program.shape(me.var)
            site = Site(view.path, axes, tuple(shape[me.contracted[i]] for i in order))
            places.append(Place(site, equation, other.var, tuple(other.contracted[i] for i in order)))
    seen: dict[str, Site] = {}
    for place in places:
        if seen.setdefault(place.site.path, place.site) != place.site:
            others[place.site.path] = f"it is contracted along different axes; {place.equation} is the second use"
    return [p for p in places if p.site.path not in others], others


def find_heads(program: Program, places: Sequence[Place]) -> frozenset[str]:
    """The sites whose product reaches an output of fn through no other site."""
    weights = {p.equation.outputs[0]: p.site.path for p in places}
    reaching, heads = set(program.outputs), set()
    for equation in reversed(program.equations):
        if reaching.intersection(equation.outputs):
            if (path := weights.get(equation.outputs[0])) is not None:
                heads.add(path)
            else:
                reaching.update(v for v in equation.inputs if isinstance(v, int))
    return frozenset(heads)
