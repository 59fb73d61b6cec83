"""The laws by which a space turns: for each primitive, whether it passes the rotation on.

They share no code with the search or its rules, which `sqjax.folding.space_certificate` checks by
them.

Data movement is checked by the positions: each element of a member is at one of the n places of its
vector. The laws of scales (`sqjax.folding.laws`) say what a movement makes of labels, so the
positions are given to these. Where all elements move, in order, positions tell vectors apart: in
row-major order place k + 1 stands as far behind place k as place k is repeated. Where only some are
taken, or zeros are put in between, they do not: of places 1 1 2 2 the middle ones are 1 2, of two
vectors. So there a step from place to place must be as long before as after, too.

Products of two members are found on the way. Of these nothing may be read but a sum over the
channels: (x Q) . (y Q) = x . y. They may leave neither the function nor the body of a scan.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sqjax.folding.claims import Claim
from sqjax.folding.laws import LAWS
from sqjax.folding.space import Along
from sqjax.program.constant_axes import gain_of, is_constant_along
from sqjax.program.entries import Carried, carried, entries
from sqjax.program.equations import Atom, Equation, Var
from sqjax.program.facts import Program
from sqjax.program.subprograms import Scan

Members = Mapping[Var, frozenset[Along]]
NONE: frozenset[Along] = frozenset()
#: A number that is rounded to fewer bits than bfloat16 has is quantized, not computed.
FEWEST_BITS = 7


class Turning(NamedTuple):
    """What is claimed, and what was found of products so far.

    Attributes:
        program: the program.
        size: the rows of Q.
        members: {variable: where it shall be multiplied by Q}.
        products: {variable: where} of products of two members; the laws write them here.
        gains: leaves that are ones, and so may multiply members element by element.
        keeps_ones: whether 1 Q = 1.
    """

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
        """1 ... n at the places of each vector; 0 where there is none.

        Example: of 2 channels, Along(0, before=2, start=1) in an axis of 6: [0, 1, 2, 1, 2, 0].
        """
        shape = self.program.shape(atom)
        if along is None:
            return np.zeros((1,) * len(shape), int)
        places = np.zeros(shape[along.axis], int)
        one = np.repeat(1 + np.arange(self.size), along.after)
        last = along.start + along.length(self.size)
        places[along.start : last] = np.tile(one, along.before)
        # All other axes have length 1, because the places are the same all along them.
        sizes = [1] * len(shape)
        sizes[along.axis] = -1
        return places.reshape(sizes)


SpaceLaw = Callable[[Turning, Equation], bool]


# Movements ----------------------------------------------------------------------------------------


def _moved(turning: Turning, equation: Equation) -> bool:
    """Each vector of the operand is one of the result."""
    # A sum over channels is rounded elsewhere after a rotation, and then to another number.
    if equation.params.get("mantissa_bits", FEWEST_BITS) < FEWEST_BITS:
        return False
    x, [y] = equation.inputs[0], equation.outputs
    if any(turning.of(other) for other in equation.inputs[1:]):
        return False
    if not _all_moved(turning, equation, turning.of(x), turning.of(y)):
        return False
    return not turning.is_product(x) or _product_moved(turning, equation)


def _all_moved(
    turning: Turning,
    equation: Equation,
    places: frozenset[Along],
    claimed: frozenset[Along],
) -> bool:
    """Whether the spaces at these places of the operand are those claimed of the result."""
    left = set(claimed)
    for along in places:
        found = [to for to in left if _is_moved(turning, equation, along, to)]
        if found:
            left.discard(found[0])
        # Or nothing is left of it: a slice has taken other channels.
        elif not _is_moved(turning, equation, along, None):
            return False
    return not left


def _is_moved(
    turning: Turning, equation: Equation, along: Along, to: Along | None
) -> bool:
    """Whether the operand's vectors `along` are the result's vectors `to`; None: are not in it.

    The law of scales is asked: of labels 1 ... n at the places of each vector.
    """
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
    # Where it lies is tried, because nobody has claimed it.
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
    if not _keep_one_step(turning, equation):
        return False
    # Infinity is the same at any scale, but no vector of it is turned.
    if any(_is_infinite(turning, atom) for atom in equation.inputs):
        return False

    def positions(atom: Atom) -> np.ndarray:
        return turning.positions(atom, next(iter(turning.of(atom)), None))

    xs = list(map(positions, equation.inputs))
    ys = list(map(positions, equation.outputs))
    claim = Claim(turning.program, equation, xs, ys)
    return LAWS[equation.name](claim)


def _keep_one_step(turning: Turning, equation: Equation) -> bool:
    """Whether all have one axis and one step from place to place, and nothing is put in between."""
    atoms = [*equation.inputs, *equation.outputs]
    steps = {(a.axis, a.after) for atom in atoms for a in turning.of(atom)}
    padding = equation.params.get("padding_config", ())
    return len(steps) <= 1 and not any(between for _, _, between in padding)


def _is_infinite(turning: Turning, atom: Atom) -> bool:
    """Whether an operand is known to be the same at any scale, but is not zero."""
    program = turning.program
    return program.is_scale_free(atom) and not program.is_zero(atom)


def _pairwise(turning: Turning, equation: Equation) -> bool:
    """Every result is the operand at its place, so it turns as that one does."""
    for x, y in zip(equation.inputs, equation.outputs, strict=True):
        if turning.of(x) != turning.of(y):
            return False
        if turning.is_product(x):
            assert isinstance(x, Var)
            turning.products[y] = turning.products[x]
    return True


# Arithmetic ---------------------------------------------------------------------------------------


def _linear(turning: Turning, equation: Equation, first: int = 0) -> bool:
    """(x + y) Q = x Q + y Q; and c 1 Q = c 1 if Q keeps ones.

    The operands before the first choose between the others, and must choose alike for all channels.
    """
    [y] = equation.outputs
    places = turning.of(y)
    choosing, terms = equation.inputs[:first], equation.inputs[first:]
    if not all(_is_term(turning, x, places) for x in terms):
        return False
    return all(_is_same_along(turning, x, places) for x in choosing)


def _is_term(turning: Turning, x: Atom, places: frozenset[Along]) -> bool:
    """Whether x may be a summand of a sum that turns at these places."""
    if turning.is_product(x):
        return False
    if turning.of(x) == places or turning.program.is_zero(x):
        return True
    return turning.keeps_ones and _is_same_along(turning, x, places)


def _is_same_along(turning: Turning, x: Atom, places: frozenset[Along]) -> bool:
    """Whether x is no member, and the same for all channels of the space at these places."""
    if turning.of(x):
        return False
    return all(turning.is_constant(x, along) for along in places)


def _selected(turning: Turning, equation: Equation) -> bool:
    """The first operand chooses between the others."""
    return _linear(turning, equation, first=1)


def _scaled(turning: Turning, x: Atom, factor: Atom) -> bool:
    """Whether a factor is one number for each vector of x, or a gain of ones."""
    if turning.of(factor) or turning.is_product(factor):
        return False
    return all(
        turning.is_constant(factor, along)
        or gain_of(turning.program, factor, along.axis) in turning.gains
        for along in turning.of(x)
    )


def _multiplied(turning: Turning, equation: Equation) -> bool:
    """c (x Q) = (c x) Q; a member times a member is a product."""
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
    # Where two axes turn, the sum over one of them would still turn along the other.
    if len(turning.of(x)) != 1:
        return False
    [turning.products[y]] = turning.of(x)
    return True


def _divided(turning: Turning, equation: Equation) -> bool:
    """(x Q) / c = (x / c) Q."""
    [x, divisor], [y] = equation.inputs, equation.outputs
    if turning.is_product(x):
        return _weighed(turning, equation, x, divisor)
    if turning.is_product(divisor) or turning.of(x) != turning.of(y):
        return False
    # Not by a gain: x / 1 is x, but no fold makes it so.
    return _is_same_along(turning, divisor, turning.of(x))


def _squared(turning: Turning, equation: Equation) -> bool:
    """x^2 is a product of x with itself; other powers are lawful nowhere."""
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
        # Each summed axis before it is gone from the result.
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
    """A matmul."""
    numbers = equation.params["dimension_numbers"]
    return _matmul(turning, equation, numbers, ((), ()))


def _contracted_in_groups(turning: Turning, equation: Equation) -> bool:
    """A matmul of experts: each row meets the matrix of its group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    groups = tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    (contracted, _), _ = numbers.dot_dimension_numbers
    # Rows that are grouped and summed over as well are another operation: a sum for each group.
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

    (x Q) (Q^T W) = x W, and x (W Q) = (x W) Q.

    `grouped` are the axes along which a row of the left operand meets another matrix of the right
    one.
    """
    (contracted, batch), [y] = numbers, equation.outputs
    operands = equation.inputs[:2]
    inside: list[set] = [
        set(),
        set(),
    ]  # of each operand, what turns and is summed over
    expected = set()  # what must turn in the result
    begin = len(batch[0])
    for side, x in enumerate(operands):
        if turning.is_product(x):
            return False
        # Another row would meet another matrix, so Q must not mix them.
        one_matrix_each = {*batch[side], *grouped[side]}
        # The matrices are no axis of the result, the rows are one.
        fixed = {*contracted[side], *batch[side], *(grouped[1] if side else ())}
        rank = len(turning.program.shape(x))
        free = [axis for axis in range(rank) if axis not in fixed]
        for along in turning.of(x):
            if along.axis in one_matrix_each:
                return False
            if along.axis in contracted[side]:
                # Axes have other numbers in the other operand, so they are compared by their turn.
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
        # An accumulator may begin with zeros, because 0 Q = 0.
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
