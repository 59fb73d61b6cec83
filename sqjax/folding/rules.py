"""Folding: how a channel scale passes through the equations of a program, one rule for every primitive.

Ask of a site's input x: could x be x / s? Labels (see `sqjax.labels`) start at x and go wherever equations carry them,
to the operands and to every reader, until all of them end in leaves, or something refuses. One rule for every
primitive: given the labels of some of an equation's variables, it puts labels on the others. What is found here is
believed only after `sqjax.certificate` has checked it.
"""

from collections.abc import Sequence

import numpy as np

from sqjax.folding import labels as lab
from sqjax.folding.labels import Labels
from sqjax.folding.search import Closure, Refused, Rule
from sqjax.folding.sites import Side, sides_of
from sqjax.program.build import Atom, Equation, Var
from sqjax.program.primitives import COMPARISONS, IDENTITIES, REDUCTIONS, RUNNING, SUMS_AND_MAXIMA
from sqjax.program.replication import REDUCING, reduced_axes


def _move(c: Closure, e: Equation) -> None:
    """Data movement: labels move with the data, both ways."""
    x, y = e.inputs[0], e.outputs[0]
    old, new = c.program.shape(x), c.program.shape(y)
    if (labels := c[x]) is not None:
        moved = lab.MOVES[e.name](labels, e.params, old, new)
        if moved is None:
            raise Refused(f"{e} does not take its channels whole")
        c.put(y, moved)
    if (labels := c[y]) is not None:
        c.put(x, _UNDO.get(e.name, _same)(c, labels, e.params, old, new))


def _same(c, labels, params, old, new):
    return labels


def _undo_transpose(c, labels, params, old, new):
    return labels.transpose(np.argsort(params["permutation"]))


def _undo_reshape(c, labels, params, old, new):
    if (order := params.get("dimensions")) is None:
        return lab.reshape(labels, new, old)
    return lab.reshape(labels, new, tuple(old[a] for a in order)).transpose(np.argsort(order))


def _undo_squeeze(c, labels, params, old, new):
    return np.expand_dims(labels, tuple(params["dimensions"]))


def _undo_broadcast(c, labels, params, old, new):
    axes = params["broadcast_dimensions"]
    repeated = [a for a in range(len(new)) if a not in axes or old[axes.index(a)] != new[a]]
    return lab.take_axes(c.tie_along(labels, repeated), axes)


def _undo_slice(c, labels, params, old, new):
    strides = params["strides"] or (1,) * len(old)
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    partial = [(b - a) // s != n for (a, b, s), n in zip(cuts, old, strict=True)]
    full = np.zeros(
        [n if p or size > 1 else 1 for n, p, size in zip(old, partial, labels.shape, strict=True)],
        int,
    )
    full[tuple(slice(*cut) if p else slice(None) for cut, p in zip(cuts, partial, strict=True))] = (
        labels
    )
    return full


def _undo_running(c, labels, params, old, new):
    return c.tie_along(labels, [params["axis"]])


def _undo_dynamic_slice(c, labels, params, old, new):
    return c.tie_along(labels, lab.changed_axes(old, new))


def _undo_gather(c, labels, params, old, new):
    whole = lab.gathered_axes(params, old)
    tied = c.tie_along(labels, [a for a in range(len(new)) if a not in [b for _, b in whole]])
    return lab.put_axes(lab.take_axes(tied, [b for _, b in whole]), [a for a, _ in whole], len(old))


_UNDO = {
    **dict.fromkeys(RUNNING, _undo_running),
    "rev": lambda c, labels, params, old, new: np.flip(labels, params["dimensions"]),
    "dynamic_slice": _undo_dynamic_slice,
    "gather": _undo_gather,
    "transpose": _undo_transpose,
    "reshape": _undo_reshape,
    "squeeze": _undo_squeeze,
    "broadcast_in_dim": _undo_broadcast,
    "slice": _undo_slice,
}


def _split(c: Closure, e: Equation) -> None:
    axis, sizes = e.params["axis"], [int(n) for n in e.params["sizes"]]
    if (labels := c[e.inputs[0]]) is not None:
        for y, piece in zip(e.outputs, lab.split(labels, axis, sizes), strict=True):
            c.put(y, piece)
    _join(c, e.inputs[0], e.outputs, axis, sizes)


def _concatenate(c: Closure, e: Equation) -> None:
    axis = e.params["dimension"]
    sizes = [c.program.shape(x)[axis] for x in e.inputs]
    if (labels := c[e.outputs[0]]) is not None:
        for x, piece in zip(e.inputs, lab.split(labels, axis, sizes), strict=True):
            c.put(x, piece)
    _join(c, e.outputs[0], e.inputs, axis, sizes)


def _join(c: Closure, whole: Atom, parts: Sequence[Atom], axis: int, sizes) -> None:
    found = [c[p] for p in parts]
    if any(p is not None for p in found):
        blank = np.zeros((1,) * len(c.program.shape(whole)), int)
        c.put(whole, lab.concatenate([blank if p is None else p for p in found], axis, sizes))


def _alike(c: Closure, e: Equation) -> None:
    """Sums, maxima: every term and the result carry the same labels."""
    terms = [*(e.inputs[1:] if e.name == "select_n" else e.inputs), e.outputs[0]]
    for labels in [c[v] for v in terms]:
        for v in terms:
            c.put(v, labels)
    if e.name == "select_n" and c[e.inputs[0]] is not None:
        raise Refused(f"{e} chooses by it")


def _pairwise(c: Closure, e: Equation) -> None:
    """Every result is one operand."""
    for x, y in zip(e.inputs, e.outputs, strict=True):
        c.put(y, c[x])
        c.put(x, c[y])


def _collective(c: Closure, e: Equation) -> None:
    """Sums and maxima over devices: each element meets its like, which carries the same scale (see `sqjax.stacks`)."""
    if reduced_axes(c.program, e) is None:
        raise Refused(f"{e} reduces over axes that are none of a known shard_map")
    _pairwise(c, e)


def _pad(c: Closure, e: Equation) -> None:
    """Zeros all round carry any label."""
    (x, value), y, padding = e.inputs, e.outputs[0], e.params["padding_config"]
    if not c.program.is_zero(value) or any(n < 0 for widths in padding for n in widths):
        raise Refused(f"{e} pads it with something else than zeros")
    if (labels := c[x]) is not None:
        c.put(y, lab.pad(labels, padding, c.program.shape(x)))
    if (labels := c[y]) is not None:
        c.put(x, lab.unpad(labels, padding, c.program.shape(x)))


def _update(c: Closure, e: Equation) -> None:
    """Both carry the result's labels, which do not vary along the axes that are written to."""
    terms = [*e.inputs[:2], e.outputs[0]]
    written = lab.changed_axes(c.program.shape(terms[0]), c.program.shape(terms[1]))
    for labels in [c[v] for v in terms]:
        if labels is not None:
            tied = c.tie_along(labels, written)
            for v in terms:
                c.put(v, tied)


def _sign(c: Closure, e: Equation) -> None:
    """A sign does not change when x is divided by s > 0."""


def _compare(c: Closure, e: Equation) -> None:
    """x > 0 does not change when x is divided by s > 0."""
    if not any(c.program.is_zero(x) for x in e.inputs):
        raise Refused(f"{e} compares it")


def _multiply(c: Closure, e: Equation) -> None:
    """The result carries the labels of one factor."""
    y = e.outputs[0]
    factors = [(x, labels) for x in e.inputs if (labels := c[x]) is not None]
    if len(factors) == 2:
        raise Refused(f"{e} multiplies two values of that scale")
    if factors:
        [(x, labels)] = factors
        c.put(y, _spread(labels, c.program.shape(y)))
        c.put(x, c[y])
    elif (labels := c[y]) is not None:
        c.choose(e, [(x, labels) for x in e.inputs])


def _divide(c: Closure, e: Equation) -> None:
    """The result carries the labels of the numerator."""
    (x, divisor), y = e.inputs, e.outputs[0]
    if c[divisor] is not None:
        raise Refused(f"{e} divides by it")
    if (labels := c[x]) is not None:
        c.put(y, _spread(labels, c.program.shape(y)))
    c.put(x, c[y])


def _spread(labels: Labels, shape: tuple[int, ...]) -> Labels:
    return labels if labels.ndim == len(shape) else labels.reshape((1,) * len(shape))


def _reduce(c: Closure, e: Equation) -> None:
    """Sums and maxima along axes on which labels do not vary."""
    x, y, axes = e.inputs[0], e.outputs[0], tuple(e.params["axes"])
    if (labels := c[x]) is not None:
        if lab.varies(labels, axes):
            raise Refused(
                f"{e} adds up its channels"
                if e.name == "reduce_sum"
                else f"{e} compares its channels"
            )
        c.put(y, labels.squeeze(axes))
    if (labels := c[y]) is not None:
        c.put(x, np.expand_dims(labels, axes))


def _dot(c: Closure, e: Equation) -> None:
    """Labels along contracted axes must meet their opposites in a leaf; labels along the others pass through."""
    sides, y = sides_of(c.program, e), e.outputs[0]
    ndim = len(c.program.shape(y))
    carriers: list[Side] = []
    for me, other in (sides, sides[::-1]):
        if (labels := c[me.var]) is None or _cancelled(labels, c[other.var]):
            continue
        if _cancels(c, labels, me, other):
            _meet(c, e, labels, me, other)
        else:
            carriers.append(me)
            labels = c.tie_along(labels, me.stack)
            c.put(
                y,
                lab.put_axes(
                    lab.take_axes(labels, me.batch + me.free),
                    (*range(len(me.batch)), *me.out),
                    ndim,
                ),
            )
    if (labels := c[y]) is None:
        return
    _carry_back(c, e, labels, carriers)


def _carry_back(c: Closure, e: Equation, labels: Labels, carriers: Sequence[Side]) -> None:
    """Labels of a product are those of one factor."""
    if len(carriers) == 2:
        raise Refused(f"{e} multiplies two values of that scale")
    if carriers:
        c.put(carriers[0].var, _into(c, labels, carriers[0]))
    else:
        c.choose(e, [(s.var, _into(c.copy(), labels, s)) for s in sides_of(c.program, e)])


def _cancelled(labels: Labels, other: Labels | None) -> bool:
    """Whether one channel's scale meets its inverse: all channels are tied, or there is one only."""
    return other is not None and labels.size == other.size == 1 and labels.item() == -other.item()


def _cancels(c: Closure, labels: Labels, me: Side, other: Side) -> bool:
    meets_leaf = other.var in c.program.from_leaves and me.var not in c.program.from_leaves
    return lab.varies(labels, me.contracted) or (labels.size == 1 and meets_leaf)


def _meet(c: Closure, e: Equation, labels: Labels, me: Side, other: Side) -> None:
    if lab.varies(labels, me.free + me.stack):
        raise Refused(f"{e} adds up its channels")
    if not c.crossing and not c.program.from_leaves.intersection(
        v for v in (me.var, other.var) if isinstance(v, Var)
    ):
        raise Refused(f"{e} multiplies it with another activation")
    met = lab.take_axes(labels, me.batch + me.contracted)
    ndim = len(c.program.shape(other.var))
    c.put(other.var, -lab.put_axes(met, other.batch + other.contracted, ndim))


def _into(c: Closure, labels: Labels, side: Side) -> Labels:
    """The result's labels as labels of one operand: tied along the other operand's free axes."""
    mine = (*range(len(side.batch)), *side.out)
    tied = c.tie_along(labels, [a for a in range(labels.ndim) if a not in mine])
    ndim = len(c.program.shape(side.var))
    return lab.put_axes(lab.take_axes(tied, mine), side.batch + side.free, ndim)


RULES: dict[str, Rule] = {
    **dict.fromkeys(lab.MOVES, _move),
    **dict.fromkeys(IDENTITIES, _pairwise),
    **dict.fromkeys((*SUMS_AND_MAXIMA, "select_n"), _alike),
    **dict.fromkeys(COMPARISONS, _compare),
    **dict.fromkeys(REDUCTIONS, _reduce),
    "sign": _sign,
    **dict.fromkeys(REDUCING, _collective),
    "pad": _pad,
    "dynamic_update_slice": _update,
    "mul": _multiply,
    "div": _divide,
    "dot_general": _dot,
    "ragged_dot_general": _dot,
    "split": _split,
    "concatenate": _concatenate,
}
