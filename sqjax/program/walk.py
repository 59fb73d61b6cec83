"""The walk: runs a traced program in which some values are special, and hands those to a table of rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from sqjax.program.primitives import KEEP_A_FILL
from sqjax.program.subprograms import emit, inner_program


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Leaf:
    """A parameter leaf on its way through the program: its path, and the value it has taken on so far."""

    path: str = field(metadata={"static": True})
    value: Any


class Rules(NamedTuple):
    """What to do where a `Leaf` meets a primitive: a rule by the primitive's name, else `otherwise`.

    A rule is called as rule(equation, *operands) and returns the result (a list of them, if the primitive has
    several). Where `concerns(equation)`, the same happens though no leaf is there.
    """

    table: Mapping[str, Callable[..., Any]]
    otherwise: Callable[..., Any]
    concerns: Callable[[JaxprEqn], bool] = lambda equation: False


def walk(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rules: Rules) -> list[Any]:
    """Runs `jaxpr`. Equations that meet no `Leaf` are emitted again as they were, custom gradients included."""
    env: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )
    fills: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for equation in jaxpr.eqns:
        operands = [read(v) for v in equation.invars]
        if equation.primitive.name in KEEP_A_FILL:
            _note_fills(fills, equation, operands)
        elif equation.primitive.name == "select_n" and any(isinstance(x, Leaf) for x in operands):
            equation = equation.replace(invars=[_filled(fills, v) for v in equation.invars])
        with source_info_util.user_context(equation.source_info.traceback):
            results = _step(equation, operands, rules)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _note_fills(fills: dict[Any, Any], equation: JaxprEqn, operands: Sequence[Any]) -> None:
    """Notes what number is everywhere in the results of an equation, if that is known while tracing."""
    for source, operand, result in zip(equation.invars, operands, equation.outvars, strict=False):
        number = operand if isinstance(source, Literal) else fills.get(source, operand)
        if not isinstance(number, jax.core.Tracer | Leaf) and np.ndim(number) == 0:
            fills[result] = number


def _filled(fills: Mapping[Any, Any], atom: Any) -> Any:
    """A variable that one number fills as that number, by which rules know a mask; anything else as it is."""
    return (
        atom if isinstance(atom, Literal) or atom not in fills else Literal(fills[atom], atom.aval)
    )


def _step(equation: JaxprEqn, operands: list[Any], rules: Rules) -> list[Any]:
    if not any(isinstance(x, Leaf) for x in operands) and not rules.concerns(equation):
        results = emit(equation, *operands)
    elif (inner := inner_program(equation)) is not None:
        return walk(inner.jaxpr, inner.consts, operands, rules)
    else:
        results = rules.table.get(equation.primitive.name, rules.otherwise)(equation, *operands)
    return results if equation.primitive.multiple_results else [results]
