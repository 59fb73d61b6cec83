"""Norms: what reads a weight only to multiply it with a gain, as in g * v / norm(v)."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter

from sqjax.program.equations import Equation, Var
from sqjax.program.facts import Program
from sqjax.program.primitives import ADDITIONS, OF_NORMS
from sqjax.program.views import View


def is_of_a_norm(
    program: Program, var: Var, equation: Equation, channels: Sequence[int]
) -> bool:
    """Whether an equation reads a leaf, seen as `var`, for a norm that becomes a gain of that leaf.

    The norm reads the quantized weight as floats, so its channels must stay apart from other axes.
    Where a view mixes them, as `jnp.linalg.norm(v)` does when it flattens v, codes are no view.

    Example: y = x @ (v / sqrt((v * v).sum(0, keepdims=True))) reads v by `mul` for one.

    Args:
        program: the program.
        var: how the leaf is seen.
        equation: what reads it.
        channels: the leaf's axes that its matmuls contract.
    """
    measures = equation.name in ("mul", *OF_NORMS)
    if not measures or {var} != set(equation.inputs) or var not in program.seen:
        return False
    view = program.seen[var]
    apart = _keeps_apart(view, channels)
    return apart and _becomes_a_gain(program, view.path, equation)


def _keeps_apart(view: View, channels: Sequence[int]) -> bool:
    """Whether no axis of a view of a leaf runs over channels and over other axes."""
    is_channel = set(channels).__contains__
    axis_of = attrgetter("axis")
    kinds = [set(map(is_channel, map(axis_of, axis))) for axis in view.axes]
    return max(map(len, kinds), default=0) <= 1


def _becomes_a_gain(program: Program, path: str, equation: Equation) -> bool:
    """Whether all that is made of an equation's results ends in multiples of a leaf."""
    may_go_on = program.steady.difference(program.outputs)
    waiting = [*equation.outputs]
    while waiting:
        y = waiting.pop()
        is_leaf = program.path_of(y) == path
        # What is added to the leaf, as its mean is taken away, is no gain.
        is_sum = program.maker[y].name in ADDITIONS
        if y not in may_go_on or (is_leaf and is_sum):
            return False
        readers = () if is_leaf else program.readers.get(y, ())
        waiting += chain(*map(attrgetter("outputs"), readers))
    return True
