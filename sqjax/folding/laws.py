"""Laws: what a primitive's operands and results must carry for a change of variables to be lawful.

The certificate (`sqjax.folding.certificate`) asks the law of every equation that it checks. A law
is given the labels of all operands and results of one equation, the *claim*, and says whether the
results really change like that when the operands do. It finds nothing, so it is simpler than a rule
of the search, and it knows nothing of these: where both are wrong, they must be wrong in two ways
that agree.

How a label is written is said in `sqjax.folding.labels`; that is all that is taken from there.

Example: for y = x * gain with the labels x: 0, gain: [-1, -2], y: [[-1, -2]] the law of `mul` adds
the labels of the factors and compares. With y: [[-1, -1]] it does not hold, because the second
column is divided by s[1] in fact.
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from sqjax._shapes import runs, sizes_along
from sqjax.folding.claims import (
    Claim,
    Labels,
    Law,
    all_carry,
    all_equal,
    are_equal,
    beside,
    collapses_to,
    first_along,
    has_one_label,
    is_constant,
    other_axes,
    product_of,
)
from sqjax.folding.convolution_laws import convolve, pool
from sqjax.folding.labels import DEGREE
from sqjax.program.replication import REDUCING, reduced_axes

# Movements ----------------------------------------------------------------------------------------
# Each element of the result is one of the operand's, or made of several with one label. The
# statements below take an equation's parameters and the whole label arrays of its first operand and
# its result: they say that the primitive, run on the operand's labels, gives the result's.


def _kept(params: dict, x: Labels, y: Labels) -> bool:
    return are_equal(x, y)


def _transposed(params: dict, x: Labels, y: Labels) -> bool:
    return are_equal(x.transpose(params["permutation"]), y)


def _reshaped(params: dict, x: Labels, y: Labels) -> bool:
    """A reshape keeps the elements' row-major order.

    Runs of axes with equal products are independent of each other; along those where neither array
    varies one index stands for all, so that they need not be written out.
    """
    if params.get("dimensions") is not None:
        x = x.transpose(params["dimensions"])
    if x.size == 0:
        return True
    for sources, targets in runs(x.shape, y.shape):
        if is_constant(x, sources) and is_constant(y, targets):
            x, y = first_along(x, sources), first_along(y, targets)
    return bool((x.ravel() == y.ravel()).all())


def _squeezed(params: dict, x: Labels, y: Labels) -> bool:
    return are_equal(x.squeeze(tuple(params["dimensions"])), y)


def _broadcast(params: dict, x: Labels, y: Labels) -> bool:
    return are_equal(beside(x, params["broadcast_dimensions"], y.shape), y)


def _sliced(params: dict, x: Labels, y: Labels) -> bool:
    strides = params["strides"] or (1,) * x.ndim
    index = tuple(
        map(slice, params["start_indices"], params["limit_indices"], strides)
    )
    return are_equal(x[index], y)


def _reversed(params: dict, x: Labels, y: Labels) -> bool:
    return are_equal(np.flip(x, params["dimensions"]), y)


def _accumulated(params: dict, x: Labels, y: Labels) -> bool:
    """A running sum or maximum is made of elements along one axis, which must carry one label."""
    return is_constant(x, [params["axis"]]) and are_equal(x, y)


def _transformed(params: dict, x: Labels, y: Labels) -> bool:
    """Each element along the last axes is a sum over all of them."""
    count = len(params["fft_lengths"])
    axes = range(x.ndim - count, x.ndim)
    return collapses_to(x, axes, y)


def _tiled(params: dict, x: Labels, y: Labels) -> bool:
    """The operand's labels, over and over; an axis without labels has one index for all."""
    reps = list(params["reps"])
    for a in range(x.ndim):
        if is_constant(x, [a]) and is_constant(y, [a]):
            x, y, reps[a] = first_along(x, [a]), first_along(y, [a]), 1
    return are_equal(np.tile(x, reps), y)


def _sliced_anywhere(params: dict, x: Labels, y: Labels) -> bool:
    """Wherever the slice starts its labels must be the same; then those of the first slice are
    they.
    """
    partly = np.flatnonzero(np.not_equal(x.shape, y.shape)).tolist()
    at_the_start = x[tuple(map(slice, y.shape))]
    return is_constant(x, partly) and are_equal(at_the_start, y)


def _gathered(params: dict, x: Labels, y: Labels) -> bool:
    """Whatever the indices, the labels must be the same: x does not vary along the axes that are
    not taken whole.

    Out of range an index gives the fill value, which must be 0 or NaN: these are the same at any
    scale.

    Example: y = x[:, ids] of x of shape (2, 3, 4), with the indices' axis last: y is (2, 4, n). The
    axes 0 and 2 are taken whole and become 0 and 1; along axis 1 the labels of x, and along axis 2
    those of y, must not vary.
    """
    fill = params["fill_value"]
    if fill not in (None, 0) and not np.isnan(fill):
        return False
    if x.size == 0:  # every index is out of range: there is the fill value only
        return not y.any()
    whole = _taken_whole(params, x.shape)
    picked = other_axes(x.ndim, whole)
    if not is_constant(x, picked):
        return False
    row = first_along(x, picked).squeeze(picked)
    return are_equal(beside(row, list(whole.values()), y.shape), y)


def _taken_whole(params: dict, shape: Sequence[int]) -> dict[int, int]:
    """{axis of the operand: axis of the result} of the axes that a gather takes whole."""
    numbers = params["dimension_numbers"]
    # The windows' axes are the operand's, without those that are dropped, in their order.
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = other_axes(len(shape), dropped)
    whole: dict[int, int] = {}
    for a, b in zip(windows, numbers.offset_dims, strict=True):
        is_whole = params["slice_sizes"][a] == shape[a]
        if is_whole and a not in numbers.start_index_map:
            whole[a] = b
    return whole


def _movement(statement: Callable[[dict, Labels, Labels], bool]) -> Law:
    """The law of a primitive that moves the data of its first operand; the others are indices,
    without labels.
    """

    def law(claim: Claim) -> bool:
        program, equation = claim.program, claim.equation
        # What a cast makes of s x is s times what it makes of x among floats only.
        floats = map(
            program.is_scalable, (equation.inputs[0], equation.outputs[0])
        )
        if not all(floats) or any(map(np.any, claim.xs[1:])):
            return False
        [x, *_], [y] = claim.whole_xs(), claim.whole_ys()
        return statement(claim.params, x, y)

    return law


def _split(claim: Claim) -> bool:
    """Every result is its part of the operand."""
    [x] = claim.whole_xs()
    parts = _parts(x, claim.params["axis"], claim.params["sizes"])
    return all_equal(parts, claim.whole_ys())


def _concatenate(claim: Claim) -> bool:
    """Every piece that is not zero carries its part of the result's labels."""
    axis, pieces = claim.params["dimension"], claim.whole_xs()
    [y] = claim.whole_ys()
    parts = _parts(y, axis, [piece.shape[axis] for piece in pieces])
    return _are_at_their_places(claim, parts)


def _parts(labels: Labels, axis: int, sizes: Sequence[int]) -> list[Labels]:
    """An array taken apart along an axis into parts of these sizes."""
    return np.split(labels, np.cumsum(sizes)[:-1], axis)


def _pad(claim: Claim) -> bool:
    """What is padded carries its part of the result's labels; the padding is zeros, which may carry
    any.
    """
    padding = claim.params["padding_config"]
    _, value = claim.equation.inputs
    # A negative width takes elements off.
    narrowest = np.min(padding, initial=0)
    if narrowest < 0 or not claim.program.is_scale_free(value):
        return False
    [x, _], [y] = claim.whole_xs(), claim.whole_ys()
    after_the_padding = tuple(
        slice(before, None, 1 + between) for before, _, between in padding
    )
    inside = y[after_the_padding][tuple(map(slice, x.shape))]
    return are_equal(inside, x)


def _stack(claim: Claim) -> bool:
    """Every operand that is not zero carries the result's labels at its place."""
    [y] = claim.whole_ys()
    places = np.moveaxis(y, claim.params["axis"], 0)
    return _are_at_their_places(claim, list(places))


def _are_at_their_places(claim: Claim, parts: Sequence[Labels]) -> bool:
    """Whether every operand that is not zero carries its part of the result's labels."""
    pieces = claim.whole_xs()
    return all(are_equal(parts[i], pieces[i]) for i, _ in claim.terms())


def _scatter(claim: Claim) -> bool:
    """Updates are written anywhere into the operand, or added to it: one label at each place of the
    axes that are not written at indices.

    Example: x of (3, 4), written into (5, 4) at rows: labels may vary along the axis 1 of both.
    """
    numbers = claim.params["dimension_numbers"]
    *_, updates = claim.whole_xs()
    [y] = claim.whole_ys()
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = other_axes(y.ndim, dropped)
    whole = {}
    for a, b in zip(windows, numbers.update_window_dims, strict=True):
        at_indices = a in numbers.scatter_dims_to_operand_dims
        if not at_indices and y.shape[a] == updates.shape[b]:
            whole[a] = b
    elsewhere = other_axes(y.ndim, whole)
    row = first_along(y, elsewhere).squeeze(elsewhere)
    written = _beside_in_order(row, list(whole.values()), updates.shape)
    expected = {0: first_along(y, elsewhere), 2: written}
    carried = all(
        are_equal(expected[i], x) for i, x in claim.terms() if i in expected
    )
    return is_constant(y, elsewhere) and carried and not claim.xs[1].any()


def _beside_in_order(
    row: Labels, axes: Sequence[int], shape: Sequence[int]
) -> Labels:
    """The labels, axis i at `axes[i]`, whatever their order, repeated along all other axes."""
    order = np.argsort(axes)
    ascending = sizes_along(axes, order.tolist())
    return beside(row.transpose(order), ascending, shape)


def _sorted(claim: Claim) -> bool:
    """One label all along each line that is sorted; the results carry the operands' labels."""
    line = [claim.params["dimension"]]
    lines = all(map(is_constant, claim.xs, repeat(line)))
    return lines and all_equal(claim.xs, claim.ys)


def _top(claim: Claim) -> bool:
    """One label all along the line of which the largest are taken; their indices carry none."""
    x, values = claim.xs[0], claim.ys[0]
    line = [claim.params.get("axis", x.ndim - 1)]
    indices = claim.ys[1]
    return collapses_to(x, line, values) and not indices.any()


def _which(claim: Claim) -> bool:
    """One label all along the line in which the largest is sought; its index carries none."""
    x, index = claim.xs[0], claim.ys[0]
    return is_constant(x, claim.params["axes"]) and not index.any()


def _update(claim: Claim) -> bool:
    """An update is written somewhere into the operand, and both, where not zero, carry the result's
    labels.

    Along the axes on which the update is the smaller one, the labels must be the same wherever it
    is written.
    """
    operand, update = map(claim.program.shape, claim.equation.inputs[:2])
    written = np.flatnonzero(np.not_equal(operand, update)).tolist()
    [y] = claim.ys
    return is_constant(y, written) and all_carry(
        claim.terms(stop=2), first_along(y, written)
    )


# Arithmetic ---------------------------------------------------------------------------------------


def _never(claim: Claim) -> bool:
    """No label may be near."""
    return not any(map(np.any, (*claim.xs, *claim.ys)))


def _unlabelled_result(claim: Claim) -> bool:
    """A sign is the same after division by s > 0."""
    return not claim.ys[0].any()


def _compare(claim: Claim) -> bool:
    """A comparison with zero is one of signs, which are the same after division by s > 0."""
    with_zero = any(map(claim.program.is_scale_free, claim.equation.inputs))
    return with_zero and _unlabelled_result(claim)


def _pairwise(claim: Claim) -> bool:
    """Every result is one operand."""
    return all_equal(claim.xs, claim.ys)


def _collective(claim: Claim) -> bool:
    """Every result is one operand, summed or compared over devices which `Stack` gives one scale
    vector.
    """
    return reduced_axes(
        claim.program, claim.equation
    ) is not None and _pairwise(claim)


def _alike(claim: Claim) -> bool:
    """Sum, maximum: every term that is not zero carries the result's labels."""
    return all_carry(claim.terms(), claim.ys[0])


def _select(claim: Claim) -> bool:
    """The choice does not depend on s, and every case that is not zero carries the result's
    labels.
    """
    condition = claim.xs[0]
    return not condition.any() and all_carry(claim.terms(start=1), claim.ys[0])


def _multiply(claim: Claim) -> bool:
    """Exponents add."""
    x, other = claim.equation.inputs
    if x == other:
        return _raised(claim, 2)
    product = product_of(*claim.xs)
    return product is not None and are_equal(product, claim.ys[0])


def _square(claim: Claim) -> bool:
    return _raised(claim, 2)


def _integer_power(claim: Claim) -> bool:
    return _raised(claim, claim.params["y"])


def _raised(claim: Claim, exponent: int) -> bool:
    """Exponents are multiplied: (t x)^n = t^n x^n, so where x carries the (n d)-th root of s[c]
    its n-th power carries the d-th root.
    """
    x, y = claim.xs[0], claim.ys[0]
    if exponent < 1 or x.shape != y.shape:
        return False
    # |label| - 1 is c + (degree - 1) * DEGREE.
    beyond_x, channel_x = np.divmod(np.abs(x) - 1, DEGREE)
    beyond_y, channel_y = np.divmod(np.abs(y) - 1, DEGREE)
    is_root = beyond_x + 1 == exponent * (beyond_y + 1)
    same = (np.sign(x) == np.sign(y)) & (channel_x == channel_y)
    return bool((((x == 0) & (y == 0)) | (same & is_root)).all())


def _divide(claim: Claim) -> bool:
    """Exponents subtract."""
    dividend, divisor = claim.xs
    quotient = product_of(dividend, np.asarray(-divisor))
    return quotient is not None and are_equal(quotient, claim.ys[0])


def _reduce(claim: Claim) -> bool:
    """All that is added up or compared carries one label: the result's."""
    axes = tuple(claim.params["axes"])
    return has_one_label(claim.xs[0], axes, claim.ys[0])


def _dot(claim: Claim) -> bool:
    """All products that are added up carry one label: the result's."""
    lhs, rhs = claim.xs
    return _products(claim.params["dimension_numbers"], lhs, rhs, claim.ys[0])


def _products(numbers: Any, lhs: Labels, rhs: Labels, result: Labels) -> bool:
    """The law of a dot_general with these dimension numbers.

    Both operands are laid out along the same axes, (batch, free of lhs, free of rhs, contracted),
    and multiplied element by element; what is left is a sum along the contracted axes.

    Example: lhs [[-1, -2]] of (tokens, 2), rhs [[1], [2]] of (2, outputs) are laid out as [[[-1,
    -2]]], [[[1, 2]]]; the product is [[[0, 0]]], one label along the contracted axis, and the
    result carries 0.
    """
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = numbers
    lhs_free = other_axes(lhs.ndim, (*lhs_contracted, *lhs_batch))
    rhs_free = other_axes(rhs.ndim, (*rhs_contracted, *rhs_batch))
    lhs = lhs.transpose(*lhs_batch, *lhs_free, *lhs_contracted)
    rhs = rhs.transpose(*rhs_batch, *rhs_free, *rhs_contracted)

    begin_lhs = len(lhs_batch)
    begin_rhs = begin_lhs + len(lhs_free)
    begin_contracted = begin_rhs + len(rhs_free)
    lhs = np.expand_dims(lhs, tuple(range(begin_rhs, begin_contracted)))
    rhs = np.expand_dims(rhs, tuple(range(begin_lhs, begin_rhs)))
    product = product_of(lhs, rhs)
    if product is None:
        return False
    return has_one_label(
        product, tuple(range(begin_contracted, product.ndim)), result
    )


def _ragged_dot(claim: Claim) -> bool:
    """Each row meets one matrix of a stack: as a dot where labels are the same for all of them."""
    numbers = claim.params["ragged_dot_dimension_numbers"]
    (lhs_contracted, rhs_contracted), batch = numbers.dot_dimension_numbers
    stack = tuple(numbers.rhs_group_dimensions)
    lhs, rhs = claim.xs[:2]
    if any(batch) or not stack or not is_constant(rhs, stack):
        return False
    one_matrix = first_along(rhs, stack).squeeze(stack)
    kept = other_axes(rhs.ndim, stack)
    contracted = lhs_contracted, tuple(map(kept.index, rhs_contracted))
    no_batch = (), ()
    return _products((contracted, no_batch), lhs, one_matrix, claim.ys[0])


# The names stand here once more, apart from the tables that the search reads: a primitive that gets
# into one of those by mistake has no law here.
#
# Element by element the operand again, in another dtype or layout; and s > 0 comes out of a
# negation, of a magnitude, of a real part: |s x| = s |x|.
_KEEP = """
neg abs real imag convert_element_type reduce_precision copy copy_p name stop_gradient
sharding_constraint layout_constraint reshard mesh_cast pvary reduced_vary_cast reduced_vary_cast_p
"""
_SCATTERS = "scatter scatter-add scatter-sub scatter-min scatter-max"
LAWS: dict[str, Law] = {
    "transpose": _movement(_transposed),
    "reshape": _movement(_reshaped),
    "squeeze": _movement(_squeezed),
    "broadcast_in_dim": _movement(_broadcast),
    "slice": _movement(_sliced),
    "rev": _movement(_reversed),
    "dynamic_slice": _movement(_sliced_anywhere),
    "gather": _movement(_gathered),
    **dict.fromkeys(("cumsum", "cummax", "cummin"), _movement(_accumulated)),
    **dict.fromkeys(_KEEP.split(), _movement(_kept)),
    # What they make is still to be summed over devices, which may have scales of their own.
    **dict.fromkeys(("vary_unreduced_cast", "vary_unreduced_cast_p"), _never),
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "tile": _movement(_tiled),
    "fft": _movement(_transformed),
    **dict.fromkeys(_SCATTERS.split(), _scatter),
    "sort": _sorted,
    "top_k": _top,
    **dict.fromkeys(("argmax", "argmin"), _which),
    "pad": _pad,
    "dynamic_update_slice": _update,
    **dict.fromkeys(("add", "add_any", "sub", "max", "min"), _alike),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne"), _compare),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(REDUCING, _collective),
    "select_n": _select,
    "mul": _multiply,
    "square": _square,
    "integer_pow": _integer_power,
    "div": _divide,
    "sign": _unlabelled_result,
    "optimization_barrier": _pairwise,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": convolve,
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"), pool
    ),
}
