"""The walk: runs a program in which some values are special, by the rules of a registry."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from sqjax._trees import is_concrete
from sqjax.program.known_values import ZEROS_AND_ONES, values_made
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
    program: ClosedJaxpr,
    operands: Sequence[Any],
    rules: Registry,
    known: Sequence[Any] = (),
) -> list[Any]:
    """What a program, or a body, returns on these operands, special values among them.

    Equations that meet no special value are emitted again as they were, custom gradients included.
    `known` says what is known of the operands' values, of the first ones or of none.
    """
    return rules.leave(_walk(program, operands, rules, known))


def _walk(
    program: ClosedJaxpr,
    operands: Sequence[Any],
    rules: Registry,
    known: Sequence[Any],
) -> list[Any]:
    """The results of a program, special values among them as they are."""
    jaxpr, consts = program.jaxpr, program.consts
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))
    values_of = _known_first(program, known)

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        known = list(map(partial(_known, values_of=values_of), equation.invars))
        made = _known_results(equation, known)
        values_of |= _noted(equation.outvars, made)
        with source_info_util.user_context(equation.source_info.traceback):
            results = _apply(equation, operands, known, rules)
        env.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _apply(
    equation: JaxprEqn,
    operands: list[Any],
    known: list[Any],
    rules: Registry,
) -> list[Any]:
    """The results of one equation.

    As it was, if nothing special is in it; a call walked in place; a loop or branch by its own
    walk; else by its rule, or the kind's `otherwise`.
    """
    if not specials_among(operands) and not rules.concerns(equation):
        return emit(equation, *operands)
    if (inner := inner_program(equation)) is not None:
        return _walk(inner, operands, rules, known)
    if (through := _BODIES.get(equation.primitive.name)) is not None:
        return through(equation, operands, known, rules)
    rule = rules.rule(equation, operands).given(known)
    results = rule(equation, *operands)
    if results is None:
        results = rules.owner(operands).otherwise(equation, *operands)
    return listed(equation, results)


# What is known of values while tracing, as in `sqjax.program.known_values`. Only rules that ask for
# it are told, because everything else needs the array itself.


def _known(atom: Any, values_of: Mapping[Any, Any]) -> Any:
    """What is known of an operand's values."""
    if isinstance(atom, Literal):
        return atom.val
    is_boolean = getattr(atom.aval, "dtype", None) == np.dtype(bool)
    return values_of.get(atom, ZEROS_AND_ONES if is_boolean else None)


def _known_first(program: ClosedJaxpr, known: Sequence[Any]) -> dict[Any, Any]:
    """{variable: what is known of its values} of a program's inputs and captured arrays."""
    jaxpr = program.jaxpr
    captured = map(_captured, jaxpr.constvars, program.consts)
    return _noted(jaxpr.invars, known) | _noted(jaxpr.constvars, captured)


def _known_results(equation: JaxprEqn, known: Sequence[Any]) -> Sequence[Any]:
    """What is known of an equation's results, given what is of its operands; of the first ones."""
    if (inner := inner_program(equation)) is None:
        return values_made(equation.primitive.name, known)
    values_of = _known_first(inner, known)
    known_inside = partial(_known, values_of=values_of)
    for step in inner.jaxpr.eqns:
        made = _known_results(step, list(map(known_inside, step.invars)))
        values_of |= _noted(step.outvars, made)
    return list(map(known_inside, inner.jaxpr.outvars))


def _noted(variables: Iterable[Any], values: Iterable[Any]) -> dict[Any, Any]:
    """{variable: what is known of its values}, of those of which something is known."""
    pairs = zip(variables, values, strict=False)
    return {v: x for v, x in pairs if x is not None}


def _captured(variable: Any, value: Any) -> Any:
    """What is known of an array that a program has captured: all; nothing of a jax.random key."""
    is_key = jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.extended)
    return value if is_concrete(value) and not is_key else None


# Bodies: each runs the same loop, branch or map with a body that walks. Special values that the
# body only reads are seen from outside; what a scan runs over, or what is given to devices, must be
# arrays, so the special value's kind says which.


def _scan(
    equation: JaxprEqn, operands: list[Any], known: list[Any], rules: Registry
) -> list[Any]:
    """A scan gives one layer's arrays of a stacked special value to each step."""
    scan: Any = scan_in(equation)
    consts, first, xs = scan.sort(scan.given(operands))
    of_consts, of_first, of_xs = scan.sort(scan.given(known))
    # A slice holds what the whole does; what is carried changes.
    inside = [*of_consts, *[None] * len(of_first), *of_xs]

    def step(carry, slices):
        each = [*consts, *carry, *slices]
        outputs = run(scan.program, each, rules, inside)
        return outputs[: scan.carry], outputs[scan.carry :]

    sliced = rules.slices(equation, xs, scan.length)
    carry, ys = scan.run(step, rules.carry(equation, first), sliced)
    return scan.results(operands, [*carry, *ys])


def _shard_map(
    equation: JaxprEqn, operands: list[Any], known: list[Any], rules: Registry
) -> list[Any]:
    """Every device has its block of a special value's arrays."""
    shards: Any = shard_map_in(equation)
    specs = []
    for x, spec in zip(operands, shards.in_specs, strict=True):
        if isinstance(x, Special):
            spec = rules.kind_of(x).specs(equation, x, spec)
        specs.append(spec)

    def block(*blocks):
        return run(shards.program, blocks, rules, known)

    return shards.run(block, tuple(specs), list(shards.out_specs), operands)


def _while(
    equation: JaxprEqn, operands: list[Any], known: list[Any], rules: Registry
) -> list[Any]:
    """Special values are constants of its test or of its body; of one in the carry its kind says
    what the loop carries. (`_while` in evaluate.py is another: it takes statistics in loops.)
    """
    loop = while_in(equation)
    of_test, of_body, first = loop.sort(operands)
    _, known_of_body, _ = loop.sort(known)

    def test(changing):
        carry = loop.carry(operands, changing)
        [goes_on] = run(loop.test, [*of_test, *carry], rules)
        return goes_on

    def body(changing):
        carry = loop.carry(operands, changing)
        return run(loop.body, [*of_body, *carry], rules, known_of_body)

    last = lax.while_loop(test, body, rules.carry(equation, first))
    return loop.carry(operands, last)


def _cond(
    equation: JaxprEqn, operands: list[Any], known: list[Any], rules: Registry
) -> list[Any]:
    """Each branch runs with the special values it is given."""
    index, *given = operands
    _, *known_of_given = known
    choice = cond_in(equation)
    branches = [
        lambda program=program: run(program, given, rules, known_of_given)
        for program in choice.branches
    ]
    return choice.results(operands, lax.switch(index, branches))


_BODIES = {
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
    "cond": _cond,
}
