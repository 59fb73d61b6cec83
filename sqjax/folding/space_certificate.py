"""The certificate of a space: does every equation pass the rotation on?

It does not know how the members were found, and shares no code with the search or its rules.

**The claim.** Let members be variables with the axes along which they shall be multiplied by Q, and
let every equation that touches one obey its primitive's law: whenever its operands change like
that, so do its results, and what is no member stays what it is. Let neither inputs, outputs nor
constants be members. Then for every orthogonal Q (with 1 Q = 1 if `keeps_ones`) the leaves may be
multiplied by Q where they are members, and fn stays what it is, in exact numbers: by induction over
the equations, as in `sqjax.folding.certificate`.

Data movement is checked by the positions: each element of a member is at one of the n places of its
vector. The laws of scales (`sqjax.folding.laws`) say what a movement makes of labels, so the
positions are given to these. Where all elements move, in order, positions tell vectors apart: in
row-major order place k + 1 stands as far behind place k as place k is repeated. Where only some are
taken, or zeros are put in between, they do not: of places 1 1 2 2 the middle ones are 1 2, of two
vectors. So there a step from place to place must be as long before as after, too.

Products of two members are found on the way. Of these nothing may be read but a sum over the
channels: (x Q) . (y Q) = x . y. They may leave neither the function nor the body of a scan.

What it takes for granted: `gains` are ones. Whoever rotates has to check their values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sqjax.folding.claims import Claim
from sqjax.folding.laws import LAWS
from sqjax.folding.space import Along, Space
from sqjax.program.constant_axes import is_constant_along, leaf_of
from sqjax.program.entries import Carried, carried, entries
from sqjax.program.equations import Atom, Equation, Var
from sqjax.program.facts import Program
from sqjax.program.subprograms import Scan

Members = Mapping[Var, frozenset[Along]]
NONE: frozenset[Along] = frozenset()
#: A number that is rounded to fewer bits than bfloat16 has is quantized, not computed.
FEWEST_BITS = 7


class Turning(NamedTuple):
    """What is claimed, and what was found of products so far."""

    program: Program
    size: int
    members: Members
    products: dict[Var, Along]
    gains: frozenset[str]
    keeps_ones: bool

    def of(self, atom: Atom) -> frozenset[Along]:
        """Along what an operand or result shall be multiplied by Q."""
        return self.members.get(atom, NONE) if isinstance(atom, Var) else NONE

    def is_product(self, atom: Atom) -> bool:
        """Whether it is a product of two members."""
        return isinstance(atom, Var) and atom in self.products

    def is_constant(self, atom: Atom, along: Along) -> bool:
        """Whether an operand is the same for all channels."""
        return is_constant_along(self.program, atom, along.axis)

    def positions(self, atom: Atom, along: Along | None) -> np.ndarray:
        """1 ... n at the places of each vector; 0 where there is none."""
        shape = self.program.shape(atom)
        if along is None:
            return np.zeros((1,) * len(shape), int)
        places = np.zeros(shape[along.axis], int)
        one = np.repeat(1 + np.arange(self.size), along.after)
        last = along.start + along.length(self.size)
        places[along.start : last] = np.tile(one, along.before)
        sizes = [1] * len(shape)
        sizes[along.axis] = -1
        return places.reshape(sizes)


SpaceLaw = Callable[[Turning, Equation], bool]


def certify_space(
    program: Program, size: int, members: Members, space: Space
) -> str | None:
    """None if a space is lawful; otherwise what is wrong.

    Args:
        program: the program.
        size: the rows of Q.
        members: {variable: where it shall be multiplied by Q}.
        space: what is claimed besides: its gains, and whether Q keeps ones.
    """
    gains = frozenset(space.gains)
    turning = Turning(program, size, members, {}, gains, space.keeps_ones)
    return (
        _wrong_members(turning)
        or _wrong_leaves(turning, space)
        or _unlawful(turning)
    )


def _wrong_members(turning: Turning) -> str | None:
    """What is wrong with the members, whatever equations read them."""
    if turning.size < 2:
        return "expected two channels or more"
    for var, places in turning.members.items():
        problem = _fixed(turning.program, var) or _misfit(turning, var, places)
        if problem is not None:
            return problem
    return None


def _wrong_leaves(turning: Turning, space: Space) -> str | None:
    """What is wrong with the leaves that are named: they must be the members among the leaves."""
    # Because a leaf named twice would be multiplied by Q twice.
    if len(set(space.leaves)) < len(space.leaves):
        return "expected each leaf and axis once"
    listed = {
        path: frozenset(along for other, along in space.leaves if other == path)
        for path, _ in space.leaves
    }
    whole = {
        path: turning.of(var) for path, var in turning.program.whole.items()
    }
    if listed != {path: places for path, places in whole.items() if places}:
        return "the leaves of the space are not those of its members"
    return None


def _unlawful(turning: Turning) -> str | None:
    """The first equation that breaks its law. What they make of products is noted on the way."""
    for equation in turning.program.equations:
        if not _concerns(turning, equation):
            continue
        law = SPACE_LAWS.get(equation.name)
        if law is None or not law(turning, equation):
            return f"{equation} does not pass the rotation on"
    if any(map(turning.is_product, turning.program.results)):
        return "a product that turns, not summed up, is an output of fn"
    return None


def _concerns(turning: Turning, equation: Equation) -> bool:
    """Whether a member or a product is read or made, or enters or leaves a body."""
    atoms = [*equation.inputs, *equation.outputs]
    for body in equation.bodies:
        atoms += [*body.inputs, *body.outputs]
    return any(turning.of(a) or turning.is_product(a) for a in atoms)


def _fixed(program: Program, var: Var) -> str | None:
    """Why no rotation may change a variable; None if one may."""
    if var in program.results:
        return "an output of fn would turn"
    is_input = var in program.inputs and var not in program.whole.values()
    if is_input or var in program.constants:
        return f"{program.roots.get(var, 'a constant')} would turn"
    if var in program.offsets or not program.is_float(var):
        return f"a leaf plus a number, or no float, would turn: {var}"
    return None


def _misfit(turning: Turning, var: Var, places: frozenset[Along]) -> str | None:
    """What is wrong with where a space lies in a variable."""
    shape = turning.program.shape(var)
    axes = [along.axis for along in places]
    inside = all(
        0 <= along.axis < len(shape)
        and along.start >= 0
        and min(along.before, along.after) > 0
        and along.start + along.length(turning.size) <= shape[along.axis]
        for along in places
    )
    if not inside or len(set(axes)) < len(axes):
        return f"a space of {turning.size} does not fit into {shape}"
    return None


# Movements ----------------------------------------------------------------------------------------


def _moved(turning: Turning, equation: Equation) -> bool:
    """Each vector of the operand is one of the result."""
    # A sum over channels is rounded elsewhere after a rotation, and then to another number.
    if equation.params.get("mantissa_bits", FEWEST_BITS) < FEWEST_BITS:
        return False
    x, [y] = equation.inputs[0], equation.outputs
    if any(turning.of(other) for other in equation.inputs[1:]):
        return False
    left = set(turning.of(y))
    for along in turning.of(x):
        found = [to for to in left if _is_moved(turning, equation, along, to)]
        if found:
            left.discard(found[0])
        elif not _is_moved(turning, equation, along, None):
            return False
    if left:
        return False
    return not turning.is_product(x) or _product_moved(turning, equation)


def _is_moved(
    turning: Turning, equation: Equation, along: Along, to: Along | None
) -> bool:
    x, [y] = equation.inputs[0], equation.outputs
    if to is not None and not _keeps_steps(equation, along, to):
        return False
    xs = [turning.positions(x, along)]
    xs += [turning.positions(other, None) for other in equation.inputs[1:]]
    ys = [turning.positions(y, to)]
    return LAWS[equation.name](Claim(turning.program, equation, xs, ys))


def _keeps_steps(equation: Equation, along: Along, to: Along) -> bool:
    """Whether the places of a vector are as far apart after a slice as they were before."""
    if equation.name != "slice":
        return True  # all elements move
    strides = equation.params["strides"]
    return along.after == to.after and (
        strides is None or strides[along.axis] == 1
    )


def _product_moved(turning: Turning, equation: Equation) -> bool:
    """A product of members lies along one axis of the result, as it did along the operand's."""
    x, [y] = equation.inputs[0], equation.outputs
    assert isinstance(x, Var)
    along = turning.products[x]
    shape = turning.program.shape(y)
    for axis, length in enumerate(shape):
        to = along._replace(axis=axis)
        fits = to.start + to.length(turning.size) <= length
        if fits and _is_moved(turning, equation, along, to):
            turning.products[y] = to
            return True
    return False


def _at_their_places(turning: Turning, equation: Equation) -> bool:
    """What lies side by side, or is written into an array: by the law of scales."""
    atoms = [*equation.inputs, *equation.outputs]
    if any(turning.is_product(a) or len(turning.of(a)) > 1 for a in atoms):
        return False
    # All have one axis and one step from place to place, and nothing is put in between.
    steps = {(a.axis, a.after) for atom in atoms for a in turning.of(atom)}
    padding = equation.params.get("padding_config", ())
    if len(steps) > 1 or any(between for _, _, between in padding):
        return False
    # Infinity is the same at any scale, but no vector of it is turned.
    if any(_is_infinite(turning, atom) for atom in equation.inputs):
        return False

    def positions(atom: Atom) -> np.ndarray:
        return turning.positions(atom, next(iter(turning.of(atom)), None))

    xs, ys = (
        list(map(positions, of)) for of in (equation.inputs, equation.outputs)
    )
    claim = Claim(turning.program, equation, xs, ys)
    return LAWS[equation.name](claim)


def _is_infinite(turning: Turning, atom: Atom) -> bool:
    """Whether an operand is known to be the same at any scale, but is not zero."""
    program = turning.program
    return program.is_scale_free(atom) and not program.is_zero(atom)


def _pairwise(turning: Turning, equation: Equation) -> bool:
    for x, y in zip(equation.inputs, equation.outputs, strict=True):
        if turning.of(x) != turning.of(y):
            return False
        if turning.is_product(x):
            assert isinstance(x, Var)
            turning.products[y] = turning.products[x]
    return True


# Arithmetic ---------------------------------------------------------------------------------------


def _linear(turning: Turning, equation: Equation, first: int = 0) -> bool:
    """(x + y) Q = x Q + y Q; and c 1 Q = c 1 if Q keeps ones."""
    [y] = equation.outputs
    places = turning.of(y)
    for x in equation.inputs[first:]:
        if turning.is_product(x):
            return False
        if turning.of(x) == places or turning.program.is_zero(x):
            continue
        same = all(turning.is_constant(x, along) for along in places)
        if turning.of(x) or not same or not turning.keeps_ones:
            return False
    return all(
        turning.is_constant(x, along) and not turning.of(x)
        for x in equation.inputs[:first]
        for along in places
    )


def _selected(turning: Turning, equation: Equation) -> bool:
    return _linear(turning, equation, first=1)


def _scaled(turning: Turning, x: Atom, factor: Atom) -> bool:
    """Whether a factor is one number for each vector of x, or a gain of ones."""
    if turning.of(factor) or turning.is_product(factor):
        return False
    if leaf_of(turning.program, factor) in turning.gains:
        return True
    return all(turning.is_constant(factor, along) for along in turning.of(x))


def _multiplied(turning: Turning, equation: Equation) -> bool:
    [a, b], [y] = equation.inputs, equation.outputs
    for x, factor in ((a, b), (b, a)):
        if turning.is_product(x):
            return _weighed(turning, equation, x, factor)
        if turning.of(y) and turning.of(x):
            same = turning.of(x) == turning.of(y)
            return same and _scaled(turning, x, factor)
    if turning.of(y) or turning.of(a) != turning.of(b):
        return False
    return _made_product(turning, a, y)


def _weighed(
    turning: Turning, equation: Equation, product: Atom, factor: Atom
) -> bool:
    """A product of members times, or divided by, one number for each vector."""
    [y] = equation.outputs
    assert isinstance(product, Var)
    along = turning.products[product]
    if turning.of(factor) or turning.of(y) or turning.is_product(factor):
        return False
    turning.products[y] = along
    return turning.is_constant(factor, along)


def _made_product(turning: Turning, x: Atom, y: Var) -> bool:
    """Notes the product of two members that turn alike."""
    if len(turning.of(x)) != 1:
        return False
    [turning.products[y]] = turning.of(x)
    return True


def _divided(turning: Turning, equation: Equation) -> bool:
    [x, divisor], [y] = equation.inputs, equation.outputs
    if turning.is_product(x):
        return _weighed(turning, equation, x, divisor)
    # Not by a gain: x / 1 is x, but no fold makes it so.
    same = turning.of(x) == turning.of(y) and not turning.of(divisor)
    return (
        same
        and not turning.is_product(divisor)
        and all(turning.is_constant(divisor, a) for a in turning.of(x))
    )


def _squared(turning: Turning, equation: Equation) -> bool:
    [x], [y] = equation.inputs, equation.outputs
    is_square = equation.name == "square" or equation.params["y"] == 2
    if not is_square or turning.of(y) or turning.is_product(x):
        return False
    return _made_product(turning, x, y)


def _summed(turning: Turning, equation: Equation) -> bool:
    """Over the channels the sum of a product is free of Q, that of a member only if 1 Q = 1."""
    [x], [y] = equation.inputs, equation.outputs
    axes = sorted(equation.params["axes"])

    def after(along: Along) -> Along:
        return along.at(along.axis - sum(axis < along.axis for axis in axes))

    places = turning.of(x)
    if any(along.axis in axes for along in places) and not turning.keeps_ones:
        return False
    left = {after(along) for along in places if along.axis not in axes}
    if turning.is_product(x):
        assert isinstance(x, Var)
        product = turning.products[x]
        if product.axis not in axes:
            turning.products[y] = after(product)
    return turning.of(y) == left


def _contracted(turning: Turning, equation: Equation) -> bool:
    numbers = equation.params["dimension_numbers"]
    return _matmul(turning, equation, numbers, ((), ()))


def _contracted_in_groups(turning: Turning, equation: Equation) -> bool:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    groups = tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    (contracted, _), _ = numbers.dot_dimension_numbers
    if not groups or set(rows).intersection(contracted):
        return False
    pairs = numbers.dot_dimension_numbers
    return _matmul(turning, equation, pairs, (rows, groups))


def _matmul(
    turning: Turning,
    equation: Equation,
    numbers: Sequence[Sequence[Sequence[int]]],
    grouped: tuple[tuple[int, ...], tuple[int, ...]],
) -> bool:
    """Contracted axes turn in both operands, or in none; free ones in the result; no others do.

    `grouped` are the axes along which a row of the left operand meets another matrix of the right
    one.
    """
    (contracted, batch), [y] = numbers, equation.outputs
    operands = equation.inputs[:2]
    inside: list[set] = [set(), set()]
    expected = set()
    begin = len(batch[0])
    for side, x in enumerate(operands):
        if turning.is_product(x):
            return False
        one_matrix_each = {*batch[side], *grouped[side]}
        # The matrices are no axis of the result, the rows are one.
        fixed = {*contracted[side], *batch[side], *(grouped[1] if side else ())}
        rank = len(turning.program.shape(x))
        free = [axis for axis in range(rank) if axis not in fixed]
        for along in turning.of(x):
            if along.axis in one_matrix_each:
                return False
            if along.axis in contracted[side]:
                position = list(contracted[side]).index(along.axis)
                inside[side].add((position, along.at(0)))
            else:
                expected.add(along.at(begin + free.index(along.axis)))
        begin += len(free)
    return inside[0] == inside[1] and expected == turning.of(y)


def _scanned(turning: Turning, equation: Equation) -> bool:
    """The induction over the steps: what is carried in turned is carried out turned."""
    body = equation.body
    if body is None or not isinstance(body.call, Scan):
        return False
    count = body.call.carry
    results = zip(carried(equation), equation.outputs[:count], strict=True)
    if not all(_carried_alike(turning, *pair) for pair in results):
        return False
    slices = [(entry.outer, entry.inner) for entry in entries(equation)]
    made = zip(equation.outputs[count:], body.outputs[count:], strict=True)
    return all(_sliced_alike(turning, *pair) for pair in [*slices, *made])


def _carried_alike(turning: Turning, value: Carried, result: Var) -> bool:
    """What is carried turns before the first step, after every step, and at the end."""
    places = turning.of(value.inner)
    if places != turning.of(result):
        return False
    for atom in (value.first, value.following):
        if turning.is_product(atom):
            return False
        # Zeros are zeros times Q, too.
        is_zero = turning.program.is_zero(atom)
        if turning.of(atom) != places and not is_zero:
            return False
    return True


def _sliced_alike(turning: Turning, outer: Atom, inner: Atom) -> bool:
    """A step sees one slice, so its axes are one less: axis 1 of the whole is axis 0 of a slice."""
    if turning.is_product(outer) or turning.is_product(inner):
        return False
    return turning.of(outer) == {a.at(a.axis + 1) for a in turning.of(inner)}


# The names stand here once more, so that a primitive that gets among the rules by mistake has no
# law.
_MOVING = """
transpose reshape squeeze broadcast_in_dim slice rev cumsum dynamic_slice gather neg
convert_element_type reduce_precision
"""
_KEEPING = """
copy copy_p stop_gradient name optimization_barrier sharding_constraint layout_constraint reshard
mesh_cast pvary
"""
SPACE_LAWS: dict[str, SpaceLaw] = {
    **dict.fromkeys(_MOVING.split(), _moved),
    **dict.fromkeys(_KEEPING.split(), _pairwise),
    **dict.fromkeys(
        ("concatenate", "split", "pad", "dynamic_update_slice"),
        _at_their_places,
    ),
    **dict.fromkeys(("add", "sub", "add_any"), _linear),
    "select_n": _selected,
    "mul": _multiplied,
    "div": _divided,
    **dict.fromkeys(("square", "integer_pow"), _squared),
    "reduce_sum": _summed,
    "dot_general": _contracted,
    "ragged_dot_general": _contracted_in_groups,
    "scan": _scanned,
}
