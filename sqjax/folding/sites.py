"""Sites: the matmuls of an activation with a leaf, as they stand in a program."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sqjax.folding import labels as lab
from sqjax.folding.graph import Site
from sqjax.program.build import Atom, Equation, Var
from sqjax.program.facts import Program
from sqjax.program.primitives import ELEMENTWISE
from sqjax.program.subprograms import ShardMap
from sqjax.program.views import View

#: The matmuls that can be sites.
MATMULS = ("dot_general", "ragged_dot_general")


class Place(NamedTuple):
    """A site in the program: the matmul's activation, and its batch and contracted axes in the order of the leaf's.

    Along `axes` the activation has the site's channels, but for the steps of scans around it.
    """

    site: Site
    equation: Equation
    activation: Var
    axes: tuple[int, ...]
    view: View

    @property
    def entry(self) -> tuple[Any, ...]:
        """Which of the site's channels this matmul reads: all, or those of one of a stack of matrices."""
        return tuple(
            slice(None) if taken.scan is not None else taken.at for taken in self.view.taken
        )

    @property
    def name(self) -> str:
        """The site's path, with the indices of a matrix in a stack: layers/kernel[3]."""
        return self.site.path + "".join(f"[{taken.at}]" for taken in self.view.fixed)


class Side(NamedTuple):
    """One operand of a matmul: its axes, and where its free axes stand in the result.

    `stack` is the axis along which a ragged dot chooses one matrix for every row; it is not in the result.
    """

    var: Atom
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    out: tuple[int, ...]
    stack: tuple[int, ...] = ()


def sides_of(program: Program, e: Equation) -> tuple[Side, Side]:
    """The two operands of a matmul."""
    if e.name == "ragged_dot_general":
        numbers = e.params["ragged_dot_dimension_numbers"]
        contracting, batch = numbers.dot_dimension_numbers
        stacks = ((), tuple(numbers.rhs_group_dimensions))
    else:
        (contracting, batch), stacks = e.params["dimension_numbers"], ((), ())
    sides, start = [], len(batch[0])
    for var, c, b, stack in zip(e.inputs[:2], contracting, batch, stacks, strict=True):
        free = tuple(a for a in range(len(program.shape(var))) if a not in (*c, *b, *stack))
        sides.append(
            Side(var, tuple(c), tuple(b), free, tuple(range(start, start + len(free))), stack)
        )
        start += len(free)
    return sides[0], sides[1]


def find_sites(program: Program) -> tuple[list[Place], dict[str, str]]:
    """(the matmuls of an activation with a leaf, {leaf: why it is none} of other leaves that a matmul may meet)."""
    places: list[Place] = []
    others: dict[str, str] = {}
    loops: dict[str, str] = {}
    for equation in program.equations:
        if equation.name not in MATMULS:
            unseen = loops if equation.name in ("while", "cond") else others
            unseen.update(_not_looked_into(program, equation))
            continue
        sides = sides_of(program, equation)
        for me, other in (sides, sides[::-1]):
            if not isinstance(me.var, Var) or me.var not in program.from_leaves:
                others.update(_picked(program, equation, me.var, other.var))
                continue
            if not isinstance(other.var, Var) or other.var in program.from_leaves:
                continue
            place = _place(program, equation, me, other, me.var, other.var)
            if isinstance(place, Place):
                places.append(place)
            else:
                others.update(dict.fromkeys(program.leaves_behind(me.var), place))
    seen: dict[str, Place] = {}
    for place in places:
        first = seen.setdefault(place.site.path, place)
        if first.site != place.site:
            others[place.site.path] = (
                f"it is contracted along different axes; {place.equation} is the second use"
            )
        elif first.view.stacked != place.view.stacked:
            others[place.site.path] = f"{place.equation} reads its layers in another way"
    places = [p for p in places if p.site.path not in others]
    sites = {p.site.path for p in places}  # quantized weights may enter loops
    return places, {path: why for path, why in loops.items() if path not in sites} | others


def _not_looked_into(program: Program, equation: Equation) -> Mapping[str, str]:
    """{leaf: why it is no site} of the leaves that another kind of matmul reads."""
    opaque = equation.runs_a_program and equation.body is None  # while, cond, custom kernels
    if opaque:
        why = f"{equation} reads it, and is not looked into: not calibrated, it stays float"
    elif equation.name == "conv_general_dilated":
        why = f"{equation} is a convolution: it stays float"
    else:
        return {}
    read = [program.leaves_behind(v) for v in equation.variables if v in program.from_leaves]
    return dict.fromkeys(sorted(set().union(*read)), why)


def _picked(program: Program, equation: Equation, me: Any, other: Any) -> Mapping[str, str]:
    """{leaf: why it is no site} where an activation is multiplied with what an index has picked of a leaf."""
    if me not in program.picked or not isinstance(other, Var) or other in program.from_leaves:
        return {}
    source = program.picked[me]
    if other in program.picked and source.name == "gather":
        return {}  # rows of an embedding: the activation
    why = f"{equation} multiplies what {source} picks of it by an index: it stays float"
    return dict.fromkeys(program.leaves_behind(source.variables[0]), why)


def _place(
    program: Program, equation: Equation, me: Side, other: Side, leaf: Var, activation: Var
) -> Place | str:
    """A leaf's matmul as a `Place`, or why it is none."""
    view = program.views.get(leaf)
    if leaf in program.offsets:
        return f"{equation} multiplies {program.offsets[leaf]:g} + it"
    if view is None:
        maker = program.maker.get(program.scanned.get(leaf, leaf))
        return (
            f"{equation} multiplies what {maker} makes of it"
            if maker
            else (f"{equation} multiplies it in {program.avals[leaf].dtype}")
        )
    pairs = [
        sorted(zip(mine, its, strict=True), key=lambda pair: view.position_of(pair[0]))
        for mine, its in ((me.batch, other.batch), (me.contracted, other.contracted))
    ]
    (batch, axes) = (view.whole_axes([a for a, _ in found]) for found in pairs)
    if batch is None or not axes:
        return f"{equation} contracts parts or mixtures of its axes (through {program.maker.get(leaf)})"
    if any(taken.axis == a for taken in view.fixed for _, _, a in view.blocks):
        return f"{equation} multiplies another one of its matrices on every device"
    batch = (*(taken.axis for taken in view.taken), *batch)
    site = Site(view.path, axes, tuple(view.full_shape[a] for a in (*batch, *axes)), batch)
    return Place(site, equation, activation, tuple(a for found in pairs for _, a in found), view)


def normalised_over(program: Program, product: Equation, axes: Sequence[int]) -> bool:
    """Whether a softmax runs over one of these axes of a product: the first maximum after it is taken there."""
    y = product.outputs[0]
    sizes = [program.shape(y)[a] for a in axes]
    marks = {
        y: lab.put_axes(np.arange(int(np.prod(sizes))).reshape(sizes), axes, len(program.shape(y)))
    }
    waiting = [y]
    while waiting:
        x = waiting.pop(0)
        for equation in program.readers.get(x, []):
            if equation.name == "reduce_max":
                return lab.varies(marks[x], equation.params["axes"])
            for result in equation.outputs:
                if x not in equation.behind(result) or result in marks:
                    continue
                moved = _moved(program, equation, marks[x], x, result)
                if moved is not None:
                    marks[result] = moved
                    waiting.append(result)
    return False


def _moved(
    program: Program, equation: Equation, marks: lab.Labels, x: Var, result: Var
) -> lab.Labels | None:
    """The marks of an operand on a result that holds its elements; None where a primitive does something else."""
    old, new = program.shape(x), program.shape(result)
    if equation.name in ELEMENTWISE and old == new:
        return marks
    move = lab.MOVES.get(equation.name)
    return None if move is None else move(marks, equation.params, old, new)


def find_heads(program: Program, places: Sequence[Place]) -> frozenset[str]:
    """The sites whose product reaches an output of fn through no other site."""
    weights = {p.equation.outputs[0]: p.site.path for p in places}
    heads: set[str] = set()
    _reach(program.main, {v for v in program.results if isinstance(v, Var)}, weights, heads)
    return frozenset(heads)


def _reach(
    equations: Sequence[Equation], reaching: set[Var], weights: Mapping[Var, str], heads: set[str]
) -> None:
    """Adds to `reaching` the variables that reach those in it through no site, and to `heads` the sites met."""
    for equation in reversed(equations):
        if not reaching.intersection(equation.outputs):
            continue
        body = equation.body
        if (path := weights.get(equation.outputs[0])) is not None:
            heads.add(path)
        elif body is not None and isinstance(body.call, ShardMap):
            results = zip(equation.outputs, body.outputs, strict=True)
            inner = {v for outer, v in results if outer in reaching and isinstance(v, Var)}
            _reach(body.equations, inner, weights, heads)
            operands = zip(equation.inputs, body.inputs, strict=True)
            reaching.update(outer for outer, v in operands if v in inner and isinstance(outer, Var))
        elif body is None or not any(
            e.outputs and e.outputs[0] in weights for e in body.everything
        ):
            reaching.update(equation.variables)
