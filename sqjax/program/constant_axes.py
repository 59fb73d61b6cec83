"""Facts that rotations ask for: which arrays are the same all along an axis, which are one leaf."""

from sqjax.program.equations import Atom, Var
from sqjax.program.facts import Program
from sqjax.program.primitives import (
    COMPARISONS,
    ELEMENTWISE,
    IDENTITIES,
    MOVEMENTS,
    POWERS,
)

_FUNCTIONS = """
and or not neg exp log log1p expm1 rsqrt sqrt logistic erf pow sign sin cos convert_element_type
reduce_precision clamp is_finite
"""
#: Where the operands are the same along an axis, so is what these make of them.
_BY_ELEMENT = {
    *ELEMENTWISE,
    *COMPARISONS,
    *POWERS,
    *IDENTITIES,
    *_FUNCTIONS.split(),
}


def is_constant_along(program: Program, atom: Atom, axis: int) -> bool:
    """Whether an array is the same all along an axis, as far as its shapes tell.

    Example: what `broadcast_in_dim` makes of (5, 1) is constant along the axis 1 of (5, 8), and so
    is its square root.
    """
    shape = program.shape(atom)
    # A scalar stands beside any rank.
    if not shape or shape[axis] == 1 or 0 in shape:
        return True
    if not isinstance(atom, Var):
        return bool((atom.value == atom.value.flat[0]).all())
    equation = program.maker.get(atom)
    if equation is None:
        return False
    if equation.name == "broadcast_in_dim":
        axes = equation.params["broadcast_dimensions"]
        if axis not in axes:
            return True
        [x, *_] = equation.inputs
        return is_constant_along(program, x, axes.index(axis))
    if equation.name not in _BY_ELEMENT:
        return False
    sources = equation.inputs
    if equation.name in IDENTITIES:
        sources = (equation.inputs[equation.outputs.index(atom)],)
    return all(is_constant_along(program, x, axis) for x in sources)


def leaf_of(program: Program, atom: Atom) -> str | None:
    """The leaf that an array is, repeated, reshaped or cast; None if it is none."""
    while isinstance(atom, Var):
        if atom in program.leaves:
            return program.leaves[atom]
        equation = program.maker.get(atom)
        passes = (*MOVEMENTS, *IDENTITIES, "convert_element_type")
        if equation is None or equation.name not in passes:
            return None
        if len(equation.inputs) != 1:
            return None
        [atom] = equation.inputs
    return None
