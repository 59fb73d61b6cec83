"""Norms: what reads a weight only to multiply it with a gain, as in g * v / norm(v)."""

import math
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter

from sqjax.program.equations import Equation, Var
from sqjax.program.facts import Program
from sqjax.program.primitives import POWERS, REDUCTIONS, SCALINGS
from sqjax.program.views import View


def is_of_a_norm(
    program: Program, var: Var, equation: Equation, channels: Sequence[int]
) -> bool:
    """Whether an equation reads a leaf, seen as `var`, for a norm that becomes a gain of that leaf.

    The weight must be quantized still where the norm begins, so its channels must be apart from
    other axes there: of v.reshape(-1) there are no codes.

    Example: y = x @ (v / sqrt((v * v).sum(0, keepdims=True))) reads v by `mul` for one.

    Args:
        program: the program.
        var: how the leaf is seen.
        equation: what reads it.
        channels: the leaf's axes that its matmuls contract.
    """
    begins = equation.name in ("mul", *POWERS)
    if not begins or {var} != set(equation.inputs) or var not in program.seen:
        return False
    apart = _keeps_apart(program.seen[var], channels)
    return apart and _becomes_a_gain(program, var, equation)


#: What may read powers of a weight, which are as large as it is, until they are summed.
_READ_POWERS = {*POWERS, "convert_element_type", *REDUCTIONS}


def _keeps_apart(view: View, channels: Sequence[int]) -> bool:
    """Whether no axis of a view of a leaf runs over channels and over other axes."""
    is_channel = set(channels).__contains__
    axis_of = attrgetter("axis")
    kinds = [set(map(is_channel, map(axis_of, axis))) for axis in view.axes]
    return max(map(len, kinds), default=0) <= 1


def _becomes_a_gain(program: Program, var: Var, equation: Equation) -> bool:
    """Whether all that is made of a leaf's powers ends in multiples of the leaf."""
    elements = math.prod(program.shape(var))
    may_go_on = program.steady.difference(program.outputs)
    waiting = list(equation.outputs)
    while waiting:
        y = waiting.pop()
        readers = program.readers.get(y, [])
        names = set(map(attrgetter("name"), readers))
        is_multiple = program.path_of(y) == program.path_of(var)
        if is_multiple:
            # What is added to the leaf, as its mean is taken away, is no gain.
            readers, names = [], {program.maker[y].name}.difference(SCALINGS)
        is_summed = math.prod(program.shape(y)) < elements
        may_be_read = is_summed or names <= _READ_POWERS
        if y not in may_go_on or not may_be_read:
            return False
        waiting += chain(*map(attrgetter("outputs"), readers))
    return True
