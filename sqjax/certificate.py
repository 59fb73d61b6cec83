"""The certificate: is an assignment of labels to a program's variables a legal change of variables?

Independent of how the labels were found. Every equation that touches a labelled variable must obey its primitive's
law, over all operands and results; then by induction every variable's value is the old one times its label's scale,
and the outputs, which carry no label, are unchanged for every positive s.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sqjax import labels as lab
from sqjax.labels import Labels
from sqjax.program import Equation, Program, Var


def certify(program: Program, labels: Mapping[Var, Labels]) -> str | None:
    """None if the labels are lawful; otherwise what is wrong."""
    touched = {v for v, array in labels.items() if array.any()}
    for var in touched:
        if var in program.roots:
            return f"{program.roots[var]} can not be rescaled"
        if var in program.outputs:
            return "an output of fn would be rescaled"
        if not program.is_float(var):
            return f"a value of dtype {program.avals[var].dtype} can not be rescaled"
        if labels[var].ndim != len(program.shape(var)):
            return f"labels of rank {labels[var].ndim} on a value of rank {len(program.shape(var))}"
        if any(size not in (1, full) for size, full in zip(labels[var].shape, program.shape(var), strict=True)):
            return f"labels of shape {labels[var].shape} on a value of shape {program.shape(var)}"
    for equation in {id(e): e for var in sorted(touched) for e in program.touching(var)}.values():
        law = LAWS.get(equation.name)
        if law is None or not law(program, equation, *_operands(program, equation, labels)):
            return f"{equation} does not pass the scale on"
    return None


def _operands(program: Program, equation: Equation, labels: Mapping[Var, Labels]) -> tuple[list[Labels], list[Labels]]:
    def of(atom):
        found = labels.get(atom) if isinstance(atom, int) else None
        return np.zeros((1,) * len(program.shape(atom)), int) if found is None else found

    return [of(v) for v in equation.inputs], [of(v) for v in equation.outputs]


def _equal(a: Labels, b: Labels) -> bool:
    """Equal element by element; a scalar stands beside any rank."""
    return bool((a == b).all()) if a.ndim == b.ndim or 0 in (a.ndim, b.ndim) else False


def _moved(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """The result's labels are the operand's, moved as the data is."""
    old, new = program.shape(e.inputs[0]), program.shape(e.outputs[0])
    floats = program.is_float(e.inputs[0]) and program.is_float(e.outputs[0])
    return floats and _equal(lab.MOVES[e.name](xs[0], e.params, old, new), ys[0])


def _alike(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """Sum, maximum: every term that is not zero carries the result's labels."""
    return all(_equal(x, ys[0]) for x, v in zip(xs, e.inputs, strict=True) if not program.is_zero(v))


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
    return a + b if lawful.all() else None


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
    return not lab.varies(lab.compress(xs[0]), axes) and _equal(lab.compress(xs[0]).squeeze(axes), ys[0])


def _dot(program: Program, e: Equation, xs: Sequence[Labels], ys: Sequence[Labels]) -> bool:
    """All products that are added up carry one label: the result's."""
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = e.params["dimension_numbers"]
    lhs_free = [a for a in range(xs[0].ndim) if a not in (*lhs_axes, *lhs_batch)]
    rhs_free = [a for a in range(xs[1].ndim) if a not in (*rhs_axes, *rhs_batch)]
    lhs = xs[0].transpose(*lhs_batch, *lhs_free, *lhs_axes)
    rhs = xs[1].transpose(*rhs_batch, *rhs_free, *rhs_axes)
    lhs = np.expand_dims(
        lhs, tuple(range(len(lhs_batch) + len(lhs_free), len(lhs_batch) + len(lhs_free) + len(rhs_free)))
    )
    rhs = np.expand_dims(rhs, tuple(range(len(rhs_batch), len(rhs_batch) + len(lhs_free))))
    product = _product(lhs, rhs)
    if product is None:
        return False
    product, summed = lab.compress(product), tuple(range(product.ndim - len(lhs_axes), product.ndim))
    return not lab.varies(product, summed) and _equal(product.squeeze(summed), ys[0])


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
    "dot_general": _dot,
    "split": _split,
    "concatenate": _concatenate,
}
