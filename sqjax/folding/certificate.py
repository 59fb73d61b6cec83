"""The certificate: is an assignment of labels to a program's variables a legal change of variables?

Independent of how the labels were found. Every equation that touches a labelled variable must obey its primitive's
law, over all operands and results; then by induction every variable's value is the old one times its label's scale,
and the outputs, which carry no label, are unchanged for every positive s.

In the body of a shard_map the induction runs over pairs (variable, device). What a body is given and returns carries no
label, but for blocks of leaves. Between collectives every device computes from its own values alone, and each equation
there obeys its law, so device d may have a vector s(d) of its own, provided that each block of a labelled leaf is
scaled by one vector: that of every device which holds it. A leaf that is cut along a mesh axis is another block on
every device along it; so s(d) may differ along the mesh axes that cut every labelled leaf, and is one vector along all
others. A collective that sums or compares labelled values over devices is lawful if s(d) is one vector along its axes:
then all terms of an element carry one scale. `sqjax.stacks` chooses the axes along which s(d) differs by these two
rules. Every other collective on labelled values (gathers, permutations) has no law here and is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sqjax.folding import labels as lab
from sqjax.folding.labels import Labels
from sqjax.program.build import Equation, Var
from sqjax.program.facts import Program
from sqjax.program.replication import REDUCING, reduced_axes


def certify(program: Program, labels: Mapping[Var, Labels]) -> str | None:
    """None if the labels are lawful; otherwise what is wrong."""
    touched = {v for v, array in labels.items() if array.any()}
    for var in touched:
        if var in program.roots:
            return f"{program.roots[var]} can not be rescaled"
        if var in program.outputs:
            return f"{program.outputs[var]} would be rescaled"
        if var in program.barred:
            return program.barred[var]
        if not program.is_float(var):
            return f"a value of dtype {program.avals[var].dtype} can not be rescaled"
        if labels[var].ndim != len(program.shape(var)):
            return f"labels of rank {labels[var].ndim} on a value of rank {len(program.shape(var))}"
        if any(
            size not in (1, full)
            for size, full in zip(labels[var].shape, program.shape(var), strict=True)
        ):
            return f"labels of shape {labels[var].shape} on a value of shape {program.shape(var)}"
    for equation in {id(e): e for var in sorted(touched) for e in program.touching(var)}.values():
        law = LAWS.get(equation.name)
        if law is None or not law(program, equation, *_operands(program, equation, labels)):
            return f"{equation} does not pass the scale on"
    return None


def _operands(
    program: Program, equation: Equation, labels: Mapping[Var, Labels]
) -> tuple[list[Labels], list[Labels]]:
    def of(atom):
        found = labels.get(atom) if isinstance(atom, Var) else None
        return np.zeros((1,) * len(program.shape(atom)), int) if found is None else found

    return [of(v) for v in equation.inputs], [of(v) for v in equation.outputs]


def _equal(a: Labels, b: Labels) -> bool:
    """Equal element by element; a scalar stands beside any rank."""
    return bool((a == b).all()) if a.ndim == b.ndim or 0 in (a.ndim, b.ndim) else False


def _moved(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """The result's labels are the operand's, moved as the data is; indices carry none."""
    old, new = program.shape(e.inputs[0]), program.shape(e.outputs[0])
    floats = program.is_float(e.inputs[0]) and program.is_float(e.outputs[0])
    moved = lab.MOVES[e.name](lab.compress(xs[0]), e.params, old, new)
    return (
        floats and moved is not None and not any(x.any() for x in xs[1:]) and _equal(moved, ys[0])
    )


def _sign(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """A sign is the same after division by s > 0."""
    return not ys[0].any()


def _pairwise(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Every result is one operand."""
    return all(_equal(x, y) for x, y in zip(xs, ys, strict=True))


def _collective(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Every result is one operand, summed or compared over devices which `Stack` gives one scale vector."""
    return reduced_axes(program, e) is not None and _pairwise(program, e, xs, ys)


def _pad(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """What is padded carries its part of the result's labels; zeros may carry any."""
    padding = e.params["padding_config"]
    lawful = program.is_zero(e.inputs[1]) and not any(n < 0 for widths in padding for n in widths)
    return lawful and _equal(
        lab.unpad(lab.compress(ys[0]), padding, program.shape(e.inputs[0])), lab.compress(xs[0])
    )


def _update(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Both that are not zero carry the result's labels, which do not vary along the axes that are written to."""
    operand, update = e.inputs[:2]
    written = lab.changed_axes(program.shape(operand), program.shape(update))
    terms = [(x, v) for x, v in zip(xs, e.inputs[:2], strict=False) if not program.is_zero(v)]
    return not lab.varies(lab.compress(ys[0]), written) and all(_equal(x, ys[0]) for x, _ in terms)


def _alike(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Sum, maximum: every term that is not zero carries the result's labels."""
    return all(
        _equal(x, ys[0]) for x, v in zip(xs, e.inputs, strict=True) if not program.is_zero(v)
    )


def _select(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """The choice does not depend on s, and every case that is not zero carries the result's labels."""
    cases = zip(xs[1:], e.inputs[1:], strict=True)
    return not xs[0].any() and all(_equal(x, ys[0]) for x, v in cases if not program.is_zero(v))


def _compare(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """A sign is the same after division by s > 0: one side is zero."""
    return not ys[0].any() and any(program.is_zero(v) for v in e.inputs)


def _product(a: Labels, b: Labels) -> Labels | None:
    """The labels of a product: at most one factor's scale stays, or two opposite ones cancel."""
    a, b = np.broadcast_arrays(a, b)
    lawful = (a == 0) | (b == 0) | (a == -b)
    return np.asarray(a + b) if lawful.all() else None


def _multiply(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Exponents add."""
    product = _product(*xs)
    return product is not None and _equal(product, ys[0])


def _divide(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Exponents subtract."""
    quotient = _product(xs[0], np.asarray(-xs[1]))
    return quotient is not None and _equal(quotient, ys[0])


def _reduce(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """All that is added up or compared carries one label."""
    axes = tuple(e.params["axes"])
    return not lab.varies(lab.compress(xs[0]), axes) and _equal(
        lab.compress(xs[0]).squeeze(axes), ys[0]
    )


def _dot(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """All products that are added up carry one label: the result's."""
    return _products(e.params["dimension_numbers"], xs, ys)


def _products(dimensions: Any, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dimensions
    lhs_free = [a for a in range(xs[0].ndim) if a not in (*lhs_axes, *lhs_batch)]
    rhs_free = [a for a in range(xs[1].ndim) if a not in (*rhs_axes, *rhs_batch)]
    lhs = xs[0].transpose(*lhs_batch, *lhs_free, *lhs_axes)
    rhs = xs[1].transpose(*rhs_batch, *rhs_free, *rhs_axes)
    lhs = np.expand_dims(
        lhs,
        tuple(
            range(len(lhs_batch) + len(lhs_free), len(lhs_batch) + len(lhs_free) + len(rhs_free))
        ),
    )
    rhs = np.expand_dims(rhs, tuple(range(len(rhs_batch), len(rhs_batch) + len(lhs_free))))
    product = _product(lhs, rhs)
    if product is None:
        return False
    product, summed = (
        lab.compress(product),
        tuple(range(product.ndim - len(lhs_axes), product.ndim)),
    )
    return not lab.varies(product, summed) and _equal(product.squeeze(summed), ys[0])


def _ragged_dot(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Rows meet one matrix of a stack each: as a dot where labels are the same for all of them."""
    numbers = e.params["ragged_dot_dimension_numbers"]
    stack = tuple(numbers.rhs_group_dimensions)
    ((lhs_axes, rhs_axes), batch), rhs = numbers.dot_dimension_numbers, lab.compress(xs[1])
    if any(batch) or lab.varies(rhs, stack) or not stack:
        return False
    kept = [a for a in range(rhs.ndim) if a not in stack]
    dimensions = (lhs_axes, tuple(kept.index(a) for a in rhs_axes)), ((), ())
    return _products(dimensions, [xs[0], rhs.squeeze(stack)], ys)


def _split(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    pieces = lab.split(xs[0], e.params["axis"], [int(n) for n in e.params["sizes"]])
    return all(_equal(piece, y) for piece, y in zip(pieces, ys, strict=True))


def _concatenate(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Every piece that is not zero carries its part of the result's labels."""
    axis = e.params["dimension"]
    sizes = [program.shape(v)[axis] for v in e.inputs]
    parts = zip(lab.split(ys[0], axis, sizes), xs, e.inputs, strict=True)
    return all(_equal(part, x) for part, x, v in parts if not program.is_zero(v))


Law = Callable[[Program, Equation, Sequence[Labels], Sequence[Labels]], bool]

LAWS: dict[str, Law] = {
    **dict.fromkeys(lab.MOVES, _moved),
    **dict.fromkeys(("add", "add_any", "sub", "max", "min"), _alike),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne"), _compare),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    "select_n": _select,
    "mul": _multiply,
    "div": _divide,
    "sign": _sign,
    "optimization_barrier": _pairwise,
    **dict.fromkeys(REDUCING, _collective),
    "pad": _pad,
    "dynamic_update_slice": _update,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "split": _split,
    "concatenate": _concatenate,
}
