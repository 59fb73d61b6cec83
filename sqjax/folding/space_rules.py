"""Rules: what else turns if some variables of an equation do, one rule for every primitive.

Each is asked with a search that knows some members, and makes others members, forwards and
backwards. What is found is believed only after `sqjax.folding.space_certificate` has checked it.
"""

from collections.abc import Sequence
from functools import partial

from sqjax.folding.search import Refused
from sqjax.folding.space import Along
from sqjax.folding.space_moves import MOVED, UNDONE
from sqjax.folding.space_search import Rule, SpaceSearch
from sqjax.program.entries import carried, entries
from sqjax.program.equations import Atom, Equation, Var
from sqjax.program.primitives import COPIES, RESHARDINGS
from sqjax.program.subprograms import Scan


def _move(s: SpaceSearch, e: Equation) -> None:
    """Data that moves takes its space along, both ways."""
    x, y = e.inputs[0], e.outputs[0]
    old, new = s.program.shape(x), s.program.shape(y)
    for along in s.of(x):
        moved = MOVED[e.name](along, s.size, e.params, old, new)
        if moved is not None:
            s.put(y, moved)
    for along in s.of(y):
        undone = UNDONE[e.name](along, s.size, e.params, old, new)
        if undone is not None:
            s.put(x, undone)
    product = s.product(x)
    if product is not None:
        moved = MOVED[e.name](product, s.size, e.params, old, new)
        if moved is not None:
            s.put_product(y, moved)


def _pairs(s: SpaceSearch, e: Equation) -> None:
    """Every result is the operand at its place."""
    for x, y in zip(e.inputs, e.outputs, strict=True):
        for along in s.of(x):
            s.put(y, along)
        for along in s.of(y):
            s.put(x, along)
        product = s.product(x)
        if product is not None:
            s.put_product(y, product)


def _alike(s: SpaceSearch, e: Equation, first: int = 0) -> None:
    """Sums and choices: all operands from the first one on turn with the result.

    One that is the same for all channels (an epsilon, the mean) turns into itself if Q keeps ones.
    """
    [y] = e.outputs
    terms = e.inputs[first:]
    for along in _all_of(s, [*terms, y]):
        if not all(s.is_constant(x, along) for x in e.inputs[:first]):
            raise Refused("a choice is made for every channel apart")
        for x in terms:
            s.put_or_keep(x, along)
        s.put(y, along)
    _no_products(s, terms)


def _all_of(s: SpaceSearch, atoms: Sequence[Atom]) -> list[Along]:
    """Where the space lies in any of these, each place once."""
    return list(dict.fromkeys(along for atom in atoms for along in s.of(atom)))


def _no_products(s: SpaceSearch, atoms: Sequence[Atom]) -> None:
    """Raises `Refused` for a product of members, which only a sum over the channels may read."""
    if any(s.product(atom) is not None for atom in atoms):
        raise Refused("it would need more than the sum of a product of members")


def _multiply(s: SpaceSearch, e: Equation) -> None:
    """A factor for each token leaves a member one; two members make a product.

    Example: x (tokens, 8) times the norm's factor (tokens, 1) is a member; q times k is a product.
    """
    [a, b], [y] = e.inputs, e.outputs
    for x, other in ((a, b), (b, a)):
        for along in s.of(x):
            _times(s, other, along, y)
        product = s.product(x)
        if product is not None:
            _check_constant(s, other, product)
            s.put_product(y, product)
    for along in s.of(y):
        s.put(_factor_that_turns(s, e, along), along)


def _times(s: SpaceSearch, other: Atom, along: Along, y: Var) -> None:
    """What a member times another operand is."""
    is_summed = _is_only_summed(s, y, along)
    if s.is_constant(other, along) or (
        not is_summed and s.note_gain(other, along)
    ):
        s.put(y, along)
        return
    # The sum over the channels of two members that turn alike does not change.
    s.put(other, along)
    s.put_product(y, along)


def _is_only_summed(s: SpaceSearch, y: Var, along: Along) -> bool:
    """Whether nothing reads a product but sums over its channels: then a leaf in it is no gain, but
    turns as the other factor does.
    """
    readers = s.program.readers.get(y, [])
    return y not in s.program.outputs and all(
        reader.name == "reduce_sum" and along.axis in reader.params["axes"]
        for reader in readers
    )


def _check_constant(s: SpaceSearch, atom: Atom, along: Along) -> None:
    if not s.is_constant(atom, along):
        raise Refused("a product of members is weighed channel by channel")


def _factor_that_turns(s: SpaceSearch, e: Equation, along: Along) -> Atom:
    """The factor of a product that is a member, given that the product is one."""
    varying = [x for x in e.inputs if not s.is_constant(x, along)]
    if len(varying) == 2:
        # Of a leaf and an activation the leaf is the gain.
        varying = [x for x in varying if not s.note_gain(x, along)]
    if len(varying) != 1:
        raise Refused("it is multiplied channel by channel")
    return varying[0]


def _divide(s: SpaceSearch, e: Equation) -> None:
    """The divisor must be the same for all channels."""
    [x, divisor], [y] = e.inputs, e.outputs
    _no_products(s, [divisor])
    if s.of(divisor):
        raise Refused("it would be divided by")
    for along in _all_of(s, [x, y]):
        if not s.is_constant(divisor, along):
            raise Refused("it is divided channel by channel")
        s.put(x, along)
        s.put(y, along)
    product = s.product(x)
    if product is not None:
        _check_constant(s, divisor, product)
        s.put_product(y, product)


def _square(s: SpaceSearch, e: Equation) -> None:
    """x * x is a product of members, as RMSNorm sums it up."""
    [x], [y] = e.inputs, e.outputs
    if e.params.get("y", 2) != 2 or s.of(y) or s.product(x) is not None:
        raise Refused("only the sum of squares is free of a rotation")
    for along in s.of(x):
        s.put_product(y, along)


def _sum(s: SpaceSearch, e: Equation) -> None:
    """A sum over other axes keeps a member one; over the channels it is free of Q if 1 Q = 1."""
    [x], [y] = e.inputs, e.outputs
    rank = len(s.program.shape(x))
    summed = [axis % rank for axis in e.params["axes"]]
    kept = [axis for axis in range(rank) if axis not in summed]
    for along in s.of(x):
        if along.axis in summed:
            s.keeps_ones = True
        else:
            s.put(y, along.at(kept.index(along.axis)))
    for along in s.of(y):
        s.put(x, along.at(kept[along.axis]))
    product = s.product(x)
    if product is not None and product.axis not in summed:
        s.put_product(y, product.at(kept.index(product.axis)))


def _dot(s: SpaceSearch, e: Equation) -> None:
    """Along a contracted axis both operands turn; along a free one the result does."""
    contracted, batch = e.params["dimension_numbers"]
    _product(s, e, contracted, batch, ())


def _ragged_dot(s: SpaceSearch, e: Equation) -> None:
    """The same for experts: `rhs_group_dimensions` count the matrices of the right operand."""
    numbers = e.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    _product(s, e, contracted, batch, tuple(numbers.rhs_group_dimensions))


def _product(
    s: SpaceSearch,
    e: Equation,
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
    groups: tuple[int, ...],
) -> None:
    """The rule of a matmul; `groups` are axes of the right operand that hold one matrix each.

    Example: (5, 8) times (8, 3), contracted along 1 and 0. A space along axis 1 of the left operand
    is one along axis 0 of the right one; along axis 1 of the right one, it is along axis 1 of y.
    """
    operands, [y] = e.inputs[:2], e.outputs
    _no_products(s, operands)
    places = free_axes(s, operands, contracted, batch, groups)
    for side, x in enumerate(operands):
        for along in s.of(x):
            if along.axis in contracted[side]:
                # Both operands list their contracted axes in the same order.
                position = list(contracted[side]).index(along.axis)
                other = contracted[1 - side][position]
                s.put(operands[1 - side], along.at(other))
            elif (side, along.axis) in places:
                s.put(y, along.at(places.index((side, along.axis))))
            else:
                raise Refused("its channels are one matrix each")
    for along in s.of(y):
        where = places[along.axis]
        if where is None:
            raise Refused("its channels are one matrix each")
        side, axis = where
        s.put(operands[side], along.at(axis))


def free_axes(
    s: SpaceSearch,
    operands: Sequence[Atom],
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
    groups: tuple[int, ...],
) -> list[tuple[int, int] | None]:
    """For each axis of a matmul's result the (operand, axis) that it is; None of a batch axis."""
    # In the result the batch axes come first, then what is left of the left and the right operand.
    places: list[tuple[int, int] | None] = [None] * len(batch[0])
    for side, x in enumerate(operands):
        taken = {*contracted[side], *batch[side]}
        if side == 1:
            taken |= {*groups}
        rank = len(s.program.shape(x))
        places += [(side, axis) for axis in range(rank) if axis not in taken]
    return places


def _concatenate(s: SpaceSearch, e: Equation) -> None:
    [y], axis = e.outputs, e.params["dimension"]
    _put_together(s, e.inputs, y, axis)


def _split(s: SpaceSearch, e: Equation) -> None:
    [x], axis = e.inputs, e.params["axis"]
    _put_together(s, e.outputs, x, axis)


def _put_together(
    s: SpaceSearch, pieces: Sequence[Atom], whole: Atom, axis: int
) -> None:
    """Pieces that lie side by side in a whole: all turn; or along this axis one of them does."""
    _no_products(s, [*pieces, whole])
    for along in _all_of(s, [*pieces, whole]):
        if along.axis != axis:
            for piece in pieces:
                s.put_or_keep(piece, along)
            s.put(whole, along)
    begin = 0
    for piece in pieces:
        for along in s.of(piece):
            if along.axis == axis:
                s.put(whole, along.at(axis, along.start + begin))
        for along in s.of(whole):
            if along.axis == axis:
                _put_piece(s, piece, along, begin)
        begin += s.program.shape(piece)[axis]


def _put_piece(s: SpaceSearch, piece: Atom, along: Along, begin: int) -> None:
    """A piece that begins at an index of the whole, where the whole turns along the same axis."""
    end = begin + s.program.shape(piece)[along.axis]
    last = along.start + along.length(s.size)
    if last <= begin or end <= along.start:
        return  # they do not meet
    if along.start < begin or last > end:
        raise Refused("its channels come from several pieces")
    s.put(piece, along.at(along.axis, along.start - begin))


def _pad(s: SpaceSearch, e: Equation) -> None:
    """Zeros around an array: its channels lie `low` later; no zero may come in between them."""
    [x, value], [y] = e.inputs, e.outputs
    _no_products(s, [x])
    padding = e.params["padding_config"]
    if _all_of(s, [x, y]) and not s.program.is_zero(value):
        raise Refused("it is padded with a number that is not zero")
    for along in s.of(x):
        low = _zeros_before(padding[along.axis])
        s.put(y, along.at(along.axis, along.start + low))
    for along in s.of(y):
        begin = along.start - _zeros_before(padding[along.axis])
        inside = s.program.shape(x)[along.axis]
        if begin < 0 or begin + along.length(s.size) > inside:
            raise Refused("its channels are cut, or drawn apart")
        s.put(x, along.at(along.axis, begin))


def _zeros_before(padding: tuple[int, int, int]) -> int:
    """How many zeros stand before an axis that is padded by (low, high, between)."""
    low, high, between = padding
    # A negative number of zeros cuts elements off.
    if min(low, high) < 0 or between:
        raise Refused("its channels are cut, or drawn apart")
    return low


def _update(s: SpaceSearch, e: Equation) -> None:
    """What is written into an array turns with it; along the channels it is written whole."""
    x, update, *_ = e.inputs
    [y] = e.outputs
    _no_products(s, [x, update])
    for along in _all_of(s, [x, update, y]):
        shapes = map(s.program.shape, (x, update))
        if len({shape[along.axis] for shape in shapes}) > 1:
            raise Refused("some of its channels only are written")
        s.put_or_keep(x, along)
        s.put_or_keep(update, along)
        s.put(y, along)


def _scan(s: SpaceSearch, e: Equation) -> None:
    """What a scan carries turns at every step; of what it runs over every slice does."""
    body = e.body
    if body is None or not isinstance(body.call, Scan):
        raise Refused(f"{e} stands in the way")
    count = body.call.carry
    for value, result in zip(carried(e), e.outputs[:count], strict=True):
        # Before the first step, at its beginning, at its end, and after the last step.
        chain = [value.first, value.inner, value.following, result]
        for along in _all_of(s, chain):
            for atom in chain:
                s.put(atom, along)
    slices = [(entry.outer, entry.inner) for entry in entries(e)]
    made = zip(e.outputs[count:], body.outputs[count:], strict=True)
    for outer, inner in [*slices, *made]:
        _slice_of_a_step(s, e, outer, inner)


def _slice_of_a_step(
    s: SpaceSearch, e: Equation, outer: Atom, inner: Atom
) -> None:
    """What a scan runs over, `outer`, and what a step sees of it, `inner`: one axis less."""
    for along in s.of(outer):
        if along.axis == 0:
            raise Refused(f"{e} runs over its channels")
        s.put(inner, along.at(along.axis - 1))
    for along in s.of(inner):
        s.put(outer, along.at(along.axis + 1))
    _no_products(s, [outer, inner])


SPACE_RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVED, _move),
    **dict.fromkeys((*COPIES, *RESHARDINGS), _pairs),
    **dict.fromkeys(("add", "sub", "add_any"), _alike),
    "select_n": partial(_alike, first=1),
    "mul": _multiply,
    "div": _divide,
    **dict.fromkeys(("square", "integer_pow"), _square),
    "reduce_sum": _sum,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "concatenate": _concatenate,
    "split": _split,
    "pad": _pad,
    "dynamic_update_slice": _update,
    "scan": _scan,
}
