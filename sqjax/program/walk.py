"""The walk: runs a program in which some values are special, by the rules of a registry."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from sqjax.program.primitives import KEEP_A_FILL
from sqjax.program.registry import Registry, Special, specials_among
from sqjax.program.subprograms import (
    cond_in,
    emit,
    inner_program,
    listed,
    scan_in,
    shard_map_in,
    while_in,
)


def run(
    program: ClosedJaxpr, operands: Sequence[Any], rules: Registry
) -> list[Any]:
    """What a program, or a body, returns on these operands, special values among them.

    Equations that meet no special value are emitted again as they were, custom gradients included.
    """
    results = _walk(program.jaxpr, program.consts, operands, rules, {})
    return rules.leave(results)


def _walk(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    operands: Sequence[Any],
    rules: Registry,
    known_numbers: Mapping[Any, Any],
) -> list[Any]:
    """The results of a program, special values among them as they are.

    `known_numbers` says which numbers fill its inputs, as far as known: see `_note_number_filling`.
    It is empty for a whole program and for a body, whose inputs are not known while tracing; a call
    is told what its operands are filled with.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))
    number_filling = dict(known_numbers)

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for equation in jaxpr.eqns:
        values = list(map(read, equation.invars))
        _note_number_filling(number_filling, equation, values)
        with source_info_util.user_context(equation.source_info.traceback):
            results = _apply(equation, values, number_filling, rules)
        env.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _apply(
    equation: JaxprEqn,
    operands: list[Any],
    number_filling: Mapping[Any, Any],
    rules: Registry,
) -> list[Any]:
    """The results of one equation.

    As it was, if nothing special is in it; a call walked in place; a loop or branch by its own
    walk; else by its rule, or the kind's `otherwise`.
    """
    if not specials_among(operands) and not rules.concerns(equation):
        return emit(equation, *operands)
    if (inner := inner_program(equation)) is not None:
        numbers = zip(
            inner.jaxpr.invars,
            _numbers_filling(equation, number_filling),
            strict=True,
        )
        known = {v: number for v, number in numbers if number is not None}
        return _walk(inner.jaxpr, inner.consts, operands, rules, known)
    if (through := _BODIES.get(equation.primitive.name)) is not None:
        return through(equation, operands, rules)
    results = _by_rule(equation, operands, number_filling, rules)
    if results is None:
        results = rules.owner(operands).otherwise(equation, *operands)
    return listed(equation, results)


def _by_rule(
    equation: JaxprEqn,
    operands: list[Any],
    number_filling: Mapping[Any, Any],
    rules: Registry,
) -> Any:
    """What the rule of an equation makes of its operands."""
    rule = rules.rule(equation, operands)
    numbers = _numbers_filling(equation, number_filling)
    return rule.given(numbers)(equation, *operands)


def _numbers_filling(
    equation: JaxprEqn, number_filling: Mapping[Any, Any]
) -> list[Any]:
    """The number that fills each operand, or None where none is known."""
    return [
        v.val if isinstance(v, Literal) else number_filling.get(v)
        for v in equation.invars
    ]


def _note_number_filling(
    number_filling: dict[Any, Any], equation: JaxprEqn, operands: Sequence[Any]
) -> None:
    """Notes which number fills the results of an equation, if that is known while tracing.

    Example: `jnp.zeros((2, 3))` is a broadcast_in_dim of the literal 0.0; 0.0 fills its result, and
    a reshape of it. Only rules that ask for it are told, because everything else needs the array
    itself.
    """
    if equation.primitive.name not in KEEP_A_FILL:
        return
    for source, operand, result in zip(
        equation.invars, operands, equation.outvars, strict=False
    ):
        is_literal = isinstance(source, Literal)
        number = operand if is_literal else number_filling.get(source, operand)
        is_known = not isinstance(number, jax.core.Tracer | Special)
        if is_known and np.ndim(number) == 0:
            number_filling[result] = number


# Bodies: each runs the same loop, branch or map with a body that walks. Special values that the
# body only reads are seen from outside; what a scan runs over, or what is given to devices, must be
# arrays, so the special value's kind says which.


def _scan(
    equation: JaxprEqn, operands: list[Any], rules: Registry
) -> list[Any]:
    """A scan gives one layer's arrays of a stacked special value to each step."""
    scan: Any = scan_in(equation)
    consts, first, xs = scan.sort(scan.given(operands))

    def step(carry, slices):
        outputs = run(scan.program, [*consts, *carry, *slices], rules)
        return outputs[: scan.carry], outputs[scan.carry :]

    sliced = rules.slices(equation, xs, scan.length)
    carry, ys = scan.run(step, rules.carry(equation, first), sliced)
    return scan.results(operands, [*carry, *ys])


def _shard_map(
    equation: JaxprEqn, operands: list[Any], rules: Registry
) -> list[Any]:
    """Every device has its block of a special value's arrays."""
    shards: Any = shard_map_in(equation)
    specs = []
    for x, spec in zip(operands, shards.in_specs, strict=True):
        if isinstance(x, Special):
            spec = rules.kind_of(x).specs(equation, x, spec)
        specs.append(spec)

    def block(*blocks):
        return run(shards.program, blocks, rules)

    return shards.run(block, tuple(specs), list(shards.out_specs), operands)


def _while(
    equation: JaxprEqn, operands: list[Any], rules: Registry
) -> list[Any]:
    """Special values are constants of its test or of its body; of one in the carry its kind says
    what the loop carries. (`_while` in evaluate.py is another: it takes statistics in loops.)
    """
    loop = while_in(equation)
    of_test, of_body, first = loop.sort(operands)

    def test(changing):
        carry = loop.carry(operands, changing)
        [goes_on] = run(loop.test, [*of_test, *carry], rules)
        return goes_on

    def body(changing):
        carry = loop.carry(operands, changing)
        return run(loop.body, [*of_body, *carry], rules)

    last = lax.while_loop(test, body, rules.carry(equation, first))
    return loop.carry(operands, last)


def _cond(
    equation: JaxprEqn, operands: list[Any], rules: Registry
) -> list[Any]:
    """Each branch runs with the special values it is given."""
    index, *given = operands
    choice = cond_in(equation)
    branches = [
        lambda program=program: run(program, given, rules)
        for program in choice.branches
    ]
    return choice.results(operands, lax.switch(index, branches))


_BODIES = {
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
    "cond": _cond,
}
