"""Weights to which the function adds an array: x @ (w + d) runs as x @ w + x @ d.

So w keeps its scheme, and d stays float. That is LoRA, where d is a @ b; and w - d and d - w.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from sqjax.program.primitives import ADDITIONS, RESHARDINGS, SCALINGS
from sqjax.program.registry import Registry, Special, specials_among
from sqjax.program.subprograms import emit
from sqjax.runtime.kinds import SUMMED, WEIGHTS, SummedWeight, refuse_weight
from sqjax.runtime.norms import measure
from sqjax.runtime.shared_rules import barrier
from sqjax.runtime.weight_rules import WEIGHT_RULES

SUMMED_RULES = Registry(WEIGHTS, SUMMED)

#: What is linear in the weight: made of a sum, it is the sum of what is made of each term.
_LINEAR = (
    "dot_general",
    "ragged_dot_general",
    "conv_general_dilated",
    "transpose",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "slice",
    "convert_element_type",
    "neg",
    *SCALINGS,
    "copy",
    "copy_p",
    "stop_gradient",
    "name",
    *RESHARDINGS,
)


@SUMMED_RULES.register(ADDITIONS, WEIGHTS)
@SUMMED_RULES.register(ADDITIONS, SUMMED)
def _add(equation: JaxprEqn, lhs: Any, rhs: Any) -> Special | None:
    """A weight, or such a sum, plus or minus an array, on either side; None for two weights."""
    result: Any = equation.outvars[0].aval
    added = _terms(rhs, result.shape)
    if equation.primitive.name == "sub":
        added = tuple(map(_negative, added))
    every = (*_terms(lhs, result.shape), *added)
    leaf, *others = specials_among(every)
    # A weight of fewer elements would be repeated.
    if others or leaf.value.shape != result.shape:
        return None
    return Special(leaf.path, SummedWeight(every))


def _terms(x: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """What an operand is the sum of; an array is broadcast to the shape of the result."""
    if not isinstance(x, Special):
        return (jnp.broadcast_to(x, shape),)
    return x.value.terms if isinstance(x.value, SummedWeight) else (x,)


def _negative(term: Any) -> Any:
    if isinstance(term, Special):
        return Special(term.path, term.value.times(-1.0))
    return -term


@SUMMED_RULES.register(_LINEAR, SUMMED, asks=True)
def _of_each(equation: JaxprEqn, *operands: Any, known: Sequence[Any]) -> Any:
    """What an equation makes of each term: the sum of these, quantized still or not any more.

    Example: x @ (w + d) is x @ w, in int8, plus x @ d.
    """
    leaf, *others = specials_among(operands)
    if others:
        return measure(equation, leaf, *others) if others == [leaf] else None
    made = []
    for term in leaf.value.terms:
        mine = [term if x is leaf else x for x in operands]
        made.append(_of_term(equation, mine, known))
    if specials_among(made):
        return Special(leaf.path, SummedWeight(tuple(made)))
    return functools.reduce(operator.add, made)


def _of_term(
    equation: JaxprEqn, operands: Sequence[Any], known: Sequence[Any]
) -> Any:
    """The equation on one term: by the weight's rule where that is quantized."""
    if not specials_among(operands):
        return emit(equation, *operands)[0]
    rule = WEIGHT_RULES.rule(equation, operands)
    made = rule.given(known)(equation, *operands)
    return refuse_weight(equation, *operands) if made is None else made


SUMMED_RULES.register(("optimization_barrier",), SUMMED)(barrier)
