"""Facts that rotations ask for: which arrays are the same all along an axis, which are one leaf."""

from sqjax.program.equations import Atom, Equation, Var
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
        return False  # an input, whose values are not known
    if equation.name == "broadcast_in_dim":
        return _repeats_along(program, equation, axis)
    if equation.name not in _BY_ELEMENT:
        return False
    sources = equation.inputs
    if equation.name in IDENTITIES:
        # Each result is the one operand at its place, whatever the others are.
        sources = (equation.inputs[equation.outputs.index(atom)],)
    return all(is_constant_along(program, x, axis) for x in sources)


def _repeats_along(program: Program, equation: Equation, axis: int) -> bool:
    """Whether a `broadcast_in_dim` repeats its operand along an axis, or what is repeated in it."""
    axes = equation.params["broadcast_dimensions"]
    if axis not in axes:
        return True
    return is_constant_along(program, equation.inputs[0], axes.index(axis))


def gain_of(program: Program, atom: Atom, axis: int) -> str | None:
    """The leaf that a factor is, repeated, reshaped or cast, times what is the same along an axis.

    None if it is none. Where that leaf is ones, the factor is the same all along the axis.

    Example: g * rsqrt(mean(x * x)), as flax's norms have it, is g times one number for each token.
    """
    if not isinstance(atom, Var):
        return None
    equation = program.maker.get(atom)
    if equation is None or atom in program.leaves:
        return program.leaves.get(atom)
    name = equation.name
    if name in ("mul", "div"):
        varying = _varying_factor(program, equation, axis)
        return None if varying is None else gain_of(program, varying, axis)
    if name in (*IDENTITIES, "convert_element_type"):
        same = equation.inputs[equation.outputs.index(atom)]
        return gain_of(program, same, axis)
    if name == "broadcast_in_dim":
        axes = equation.params["broadcast_dimensions"]
        if axis in axes:
            return gain_of(program, equation.inputs[0], axes.index(axis))
    return _leaf_of(program, atom)


def _varying_factor(
    program: Program, equation: Equation, axis: int
) -> Atom | None:
    """The one factor that differs along an axis; None if both do, or if it is divided by."""
    x, factor = equation.inputs
    if is_constant_along(program, factor, axis):
        return x
    if equation.name == "mul" and is_constant_along(program, x, axis):
        return factor
    return None


def _leaf_of(program: Program, atom: Atom) -> str | None:
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
