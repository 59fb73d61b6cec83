"""Rules: how a channel scale passes through the equations of a program, one rule for every
primitive.

A rule is asked about one equation. Given the labels (see `sqjax.folding.labels`) of some of its
variables, it puts labels on the others: on the results given those of the operands (forwards), and
on the operands given those of the results (backwards). It must do both, because a scale that
reaches any variable of an equation concerns all of them. Where no labels would do it refuses.

Example: y = x * gain, where y carries [[-1, -2]], is divided by s. One factor must be divided by s
and the other must stay, so `_multiply` goes backwards and offers a choice, x: [[-1, -2]] or gain:
[[-1, -2]]. If x is an input of the function it can not be changed: the gain absorbs the scale.

What is found by these rules is believed only after `sqjax.folding.certificate` has checked it.
"""

from collections.abc import Sequence

import numpy as np

from sqjax.folding import labels as lab
from sqjax.folding.convolution_rules import convolve, pool
from sqjax.folding.labels import Labels
from sqjax.folding.moves import MOVES, UNDO, scattered_axes
from sqjax.folding.search import Closure, Refused, Rule
from sqjax.folding.sites import Side, sides_of
from sqjax.program.equations import Atom, Equation
from sqjax.program.primitives import (
    COMPARISONS,
    IDENTITIES,
    POOLINGS,
    REDUCTIONS,
    SCATTERS,
    SUMS_AND_MAXIMA,
)
from sqjax.program.replication import REDUCING, reduced_axes

# Data that moves ----------------------------------------------------------------------------------


def _move(c: Closure, e: Equation) -> None:
    """Data movement: labels move with the data, both ways."""
    x, y = e.inputs[0], e.outputs[0]
    old, new = c.program.shape(x), c.program.shape(y)

    def forwards(labels: Labels) -> Labels:
        moved = MOVES[e.name](labels, e.params, old, new)
        if moved is None:
            raise Refused(f"{e} does not take its channels whole")
        return moved

    def backwards(labels: Labels) -> Labels:
        undo = UNDO[e.name]
        return undo(labels, e.params, old, new, c.tie_along)

    c.carry(x, y, forwards)
    c.carry(y, x, backwards)


def _split(c: Closure, e: Equation) -> None:
    """Every piece carries its part of the operand's labels."""
    x, axis = e.inputs[0], e.params["axis"]
    sizes = list(map(int, e.params["sizes"]))
    _take_apart(c, x, e.outputs, axis, sizes)
    _put_together(c, x, e.outputs, axis, sizes)


def _concatenate(c: Closure, e: Equation) -> None:
    """Every piece carries its part of the result's labels."""
    y, axis = e.outputs[0], e.params["dimension"]
    sizes = [c.program.shape(x)[axis] for x in e.inputs]
    _take_apart(c, y, e.inputs, axis, sizes)
    _put_together(c, y, e.inputs, axis, sizes)


def _stack(c: Closure, e: Equation) -> None:
    """Every operand carries the labels at its place along the new axis."""
    y, axis = e.outputs[0], e.params["axis"]
    ones = [1] * len(e.inputs)
    pieces = lab.split(c.written(y), axis, ones)
    for x, piece in zip(e.inputs, pieces, strict=True):
        c.put(x, piece.squeeze(axis))
    operands = [np.expand_dims(c.written(x), axis) for x in e.inputs]
    c.put(y, lab.concatenate(operands, axis, ones))


def _take_apart(
    c: Closure,
    whole: Atom,
    parts: Sequence[Atom],
    axis: int,
    sizes: Sequence[int],
) -> None:
    """Puts the labels of the whole on its parts: [1, 2, 3] on parts of sizes 1, 2: [1] and [2,
    3].
    """
    pieces = lab.split(c.written(whole), axis, sizes)
    for part, piece in zip(parts, pieces, strict=True):
        c.put(part, piece)


def _put_together(
    c: Closure,
    whole: Atom,
    parts: Sequence[Atom],
    axis: int,
    sizes: Sequence[int],
) -> None:
    """Puts the labels of the parts on the whole, 0 where a part has none (yet)."""
    pieces = list(map(c.written, parts))
    c.put(whole, lab.concatenate(pieces, axis, sizes))


def _pad(c: Closure, e: Equation) -> None:
    """Zeros all round carry any label, because 0 times any scale is 0."""
    x, value = e.inputs
    y, padding = e.outputs[0], e.params["padding_config"]
    # A negative width takes elements off.
    narrowest = np.min(padding, initial=0)
    if narrowest < 0 or not c.program.is_scale_free(value):
        raise Refused(f"{e} pads it with something else than zeros")
    shape = c.program.shape(x)
    c.carry(x, y, lambda labels: lab.pad(labels, padding, shape))
    c.carry(y, x, lambda labels: lab.unpad(labels, padding, shape))


def _update(c: Closure, e: Equation) -> None:
    """A slice is overwritten: both arrays carry the result's labels.

    These must not vary along the axes that are written to in part, because nobody knows where the
    slice begins: they are tied.
    """
    operand, update = e.inputs[:2]
    written = lab.changed_axes(
        c.program.shape(operand), c.program.shape(update)
    )
    _share(c, [operand, update, e.outputs[0]], tied_along=written)


def _scatter(c: Closure, e: Equation) -> None:
    """Updates are written somewhere into an operand, or added to it: all carry the same labels.

    These may vary along the axes that are written whole only. Example: zeros((5, 4)).at[ids].set(x)
    with labels [[1, 2, 3, 4]] on x has them on the result too; the zeros carry any.
    """
    operand, _, updates = e.inputs
    y = e.outputs[0]
    shapes = c.program.shape(operand), c.program.shape(updates)
    whole = scattered_axes(e.params, *shapes)
    sides = [
        (operand, list(whole)),
        (updates, list(whole.values())),
        (y, list(whole)),
    ]
    for source, axes in sides:
        labels = c.written(source)
        others = lab.other_axes(labels.ndim, axes)
        if source != y and lab.varies(labels, others):
            raise Refused(f"{e} does not take its channels whole")
        tied = c.tie_along(labels, others)
        row = lab.take_axes(tied, axes)
        for target, places in sides:
            c.put(target, lab.put_axes(row, places, c.rank(target)))


def _sort(c: Closure, e: Equation) -> None:
    """A line keeps its order when all of it is divided by one s > 0, and what goes along keeps its
    labels if they are the same all along the line.
    """
    for x, y in zip(e.inputs, e.outputs, strict=True):
        _keep_along(c, e, x, y, e.params["dimension"])


def _top(c: Closure, e: Equation) -> None:
    """The largest of a line; which they are does not depend on a scale of the whole line."""
    x, y = e.inputs[0], e.outputs[0]
    _keep_along(c, e, x, y, e.params.get("axis", c.rank(x) - 1))


def _keep_along(c: Closure, e: Equation, x: Atom, y: Atom, axis: int) -> None:
    """The result carries the operand's labels, which must be one all along an axis."""
    if lab.varies(c.written(x), [axis]):
        raise Refused(f"{e} compares its channels")
    c.put(y, c[x])
    c.carry(y, x, lambda labels: c.tie_along(labels, [axis]))


def _largest(c: Closure, e: Equation) -> None:
    """Where the largest of a line is does not depend on a scale of the whole line."""
    labels = c.written(e.inputs[0])
    if lab.varies(labels, e.params["axes"]):
        raise Refused(f"{e} compares its channels")


def _pairwise(c: Closure, e: Equation) -> None:
    """Every result is one operand."""
    for x, y in zip(e.inputs, e.outputs, strict=True):
        c.put(y, c[x])
        c.put(x, c[y])


def _collective(c: Closure, e: Equation) -> None:
    """Sums and maxima over devices: each element meets its like on other devices.

    These carry the same scale, because `sqjax.folding.per_step` gives all devices along such a mesh
    axis one scale vector.
    """
    if reduced_axes(c.program, e) is None:
        raise Refused(
            f"{e} reduces over axes that are none of a known shard_map"
        )
    _pairwise(c, e)


# Sums, comparisons, products ----------------------------------------------------------------------


def _alike(c: Closure, e: Equation) -> None:
    """Sums, maxima: every term and the result carry the same labels, as s a + s b = s (a + b)."""
    _share(c, [*e.inputs, e.outputs[0]])


def _select(c: Closure, e: Equation) -> None:
    """Every case and the result carry the same labels; what chooses among them carries none."""
    condition, *cases = e.inputs
    _share(c, [*cases, e.outputs[0]])
    if c[condition] is not None:
        raise Refused(f"{e} chooses by it")


def _share(
    c: Closure, terms: Sequence[Atom], tied_along: Sequence[int] = ()
) -> None:
    """Puts the labels of each term on all of them, tied along some axes."""
    for labels in list(map(c.written, terms)):
        tied = c.tie_along(labels, tied_along)
        for v in terms:
            c.put(v, tied)


def _sign(c: Closure, e: Equation) -> None:
    """A sign does not change when x is divided by s > 0: no label passes."""


def _compare(c: Closure, e: Equation) -> None:
    """x > 0 does not change when x is divided by s > 0: no label passes."""
    if not any(map(c.program.is_scale_free, e.inputs)):
        raise Refused(f"{e} compares it")


def _multiply(c: Closure, e: Equation) -> None:
    """The result carries the labels of one factor; which one, the result's own labels do not
    say.
    """
    y = e.outputs[0]
    if e.inputs[0] == e.inputs[1]:
        _raise(c, e, 2)
        return
    scaled = [x for x in e.inputs if c[x] is not None]
    if len(scaled) == 2:  # s times s: there is no label for a square
        raise Refused(f"{e} multiplies two values of that scale")
    for x in scaled:
        c.carry(x, y, lambda labels: _as_rank(labels, c.rank(y)))
        c.put(x, c[y])
    labels = c[y]
    if not scaled and labels is not None:
        c.choose(e, [(x, labels) for x in e.inputs])


def _square(c: Closure, e: Equation) -> None:
    """The operand carries the square root of what its square carries."""
    _raise(c, e, 2)


def _power(c: Closure, e: Equation) -> None:
    """The operand carries the n-th root of what its n-th power carries."""
    _raise(c, e, e.params["y"])


def _raise(c: Closure, e: Equation, exponent: int) -> None:
    """Labels through a power: s on x is s^n on x^n, and s on x^n is the n-th root of s on x."""
    x, y = e.inputs[0], e.outputs[0]
    # Other roots are not exact, so nothing would prove them.
    if exponent not in (2, 4, 8):
        raise Refused(f"{e} stands in the way")

    def forwards(labels: Labels) -> Labels:
        raised = lab.power(labels, exponent)
        if raised is None:  # s times s: there is no label for a square
            raise Refused(f"{e} multiplies two values of that scale")
        return raised

    def backwards(labels: Labels) -> Labels:
        rooted = lab.root(labels, exponent)
        if rooted is None:
            raise Refused(f"{e} takes too high a power")
        return rooted

    c.carry(x, y, forwards)
    c.carry(y, x, backwards)


def _divide(c: Closure, e: Equation) -> None:
    """The result carries the labels of the numerator."""
    x, divisor = e.inputs
    y = e.outputs[0]
    # The quotient could carry the opposite labels; but that is not looked for.
    if c[divisor] is not None:
        raise Refused(f"{e} divides by it")
    c.carry(x, y, lambda labels: _as_rank(labels, c.rank(y)))
    c.put(x, c[y])


def _as_rank(labels: Labels, ndim: int) -> Labels:
    """The labels of a scalar that stands beside an array, as those of an array of that rank."""
    return labels if labels.ndim == ndim else labels.reshape((1,) * ndim)


def _reduce(c: Closure, e: Equation) -> None:
    """Sums and maxima along axes on which labels do not vary."""
    x, y = e.inputs[0], e.outputs[0]
    axes = tuple(e.params["axes"])

    def forwards(labels: Labels) -> Labels:
        if lab.varies(labels, axes):
            if e.name == "reduce_sum":
                raise Refused(f"{e} adds up its channels")
            raise Refused(f"{e} compares its channels")
        return labels.squeeze(axes)

    c.carry(x, y, forwards)
    c.carry(y, x, lambda labels: np.expand_dims(labels, axes))


# Matmuls ------------------------------------------------------------------------------------------


def _dot(c: Closure, e: Equation) -> None:
    """Labels along contracted axes must meet their opposites; labels along the others pass through.

    Example: y = h @ w of shapes (tokens, 2) and (2, 3).

        h [[-1, -2]] varies along the contracted axis, so w gets [[1], [2]] and y no label (`_meet`)
        w [[-1, -2, -3]] varies along a free axis, so y gets [[-1, -2, -3]] (`_carry`)
        y [[-1, -2, -3]] must come from h or from w; its axis 1 is w's, so w [[-1, -2, -3]], or h
        with all three channels tied, [[-1]] (`_carry_back`)
    """
    sides = sides_of(c.program, e)
    carriers: list[
        Side
    ] = []  # the operands whose labels pass on to the product
    for me, other in (sides, sides[::-1]):
        labels = c[me.var]
        if labels is None or _cancelled(labels, c[other.var]):
            continue  # nothing of this operand's scale is left in the product
        if _must_cancel(c, labels, me, other):
            _meet(c, e, labels, me, other)
        else:
            carriers.append(me)
            _carry(c, e, labels, me)
    if (labels := c[e.outputs[0]]) is not None:
        _carry_back(c, e, labels, carriers)


def _cancelled(labels: Labels, other: Labels | None) -> bool:
    """Whether one channel's scale meets its inverse: all channels are tied, or there is one
    only.
    """
    if other is None:
        return False
    return labels.size == other.size == 1 and labels.item() == -other.item()


def _must_cancel(c: Closure, labels: Labels, me: Side, other: Side) -> bool:
    """Whether one operand's labels must meet their opposites in the other operand.

    They must if they vary along the contracted axes, because the sum would mix channels. A single
    label could as well pass through; it ends here if the other operand is made of leaves.
    """
    leaves = c.program.from_leaves
    meets_leaf = other.var in leaves and me.var not in leaves
    return lab.varies(labels, me.contracted) or (
        labels.size == 1 and meets_leaf
    )


def _meet(
    c: Closure, e: Equation, labels: Labels, me: Side, other: Side
) -> None:
    """Puts the opposite labels on the other operand: [[-1, -2]] of h becomes [[1], [2]] of w."""
    # One weight w[c, j] meets h[t, c] of every token t, so all of them must have one label.
    if lab.varies(labels, me.free + me.stack):
        raise Refused(f"{e} adds up its channels")
    c.check_may_meet(e, me.var, other.var)
    met = lab.take_axes(labels, me.batch + me.contracted)
    opposite = -lab.put_axes(
        met, other.batch + other.contracted, c.rank(other.var)
    )
    c.put(other.var, opposite)


def _carry(c: Closure, e: Equation, labels: Labels, me: Side) -> None:
    """Puts an operand's labels on the product."""
    y = e.outputs[0]
    # Which matrix of a stack a row meets is not known here, so all of them share their labels.
    labels = c.tie_along(labels, me.stack)
    passing = lab.take_axes(labels, me.batch + me.free)
    axes = (*range(len(me.batch)), *me.out)
    c.put(y, lab.put_axes(passing, axes, c.rank(y)))


def _carry_back(
    c: Closure, e: Equation, labels: Labels, carriers: Sequence[Side]
) -> None:
    """Labels of a product are those of one factor."""
    if len(carriers) == 2:  # s times s
        raise Refused(f"{e} multiplies two values of that scale")
    if carriers:
        c.put(carriers[0].var, _into(c, labels, carriers[0]))
        return
    # Each option ties channels in a copy, because only the one that is taken may tie them here.
    first, second = sides_of(c.program, e)
    of_first = _into(c.copy(), labels, first)
    of_second = _into(c.copy(), labels, second)
    c.choose(e, [(first.var, of_first), (second.var, of_second)])


def _into(c: Closure, labels: Labels, side: Side) -> Labels:
    """The product's labels as labels of one operand: tied along the other operand's free axes."""
    mine = (*range(len(side.batch)), *side.out)
    tied = c.tie_along(labels, lab.other_axes(labels.ndim, mine))
    passing = lab.take_axes(tied, mine)
    return lab.put_axes(passing, side.batch + side.free, c.rank(side.var))


# A primitive that is not here stands in the way of any scale.
RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(IDENTITIES, _pairwise),
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "sort": _sort,
    "top_k": _top,
    **dict.fromkeys(("argmax", "argmin"), _largest),
    **dict.fromkeys(SCATTERS, _scatter),
    "pad": _pad,
    "dynamic_update_slice": _update,
    **dict.fromkeys(REDUCING, _collective),
    **dict.fromkeys(SUMS_AND_MAXIMA, _alike),
    **dict.fromkeys(COMPARISONS, _compare),
    **dict.fromkeys(REDUCTIONS, _reduce),
    "select_n": _select,
    "sign": _sign,
    "mul": _multiply,
    "square": _square,
    "integer_pow": _power,
    "div": _divide,
    "dot_general": _dot,
    "ragged_dot_general": _dot,
    "conv_general_dilated": convolve,
    **dict.fromkeys(POOLINGS, pool),
}
