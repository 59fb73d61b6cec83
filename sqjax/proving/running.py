"""Runs a traced program in a prime field: every float becomes a residue modulo 2^31 - 1.

What depends on a leaf, or on an input of floats, is computed by the rules of `rules`. All
else is computed as always, by jax: positions, masks, constants; where such a float meets a residue
it is embedded. Calls are written out, scans and loops are run step by step, and of a cond the
branch that is taken.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from sqjax.program.subprograms import (
    cond_in,
    emit,
    inner_program,
    scan_in,
    source_of,
    while_in,
)
from sqjax.proving.rules import RULES
from sqjax.proving.values import Field, Value, residues_of, unknown

#: A loop that runs longer is taken for one that never ends.
MOST_STEPS = 10_000


def run(
    program: ClosedJaxpr, operands: Sequence[Value], seed: int
) -> list[Value]:
    """What a program returns.

    Args:
        program: a jaxpr with its constants.
        operands: its inputs, `Field`s or arrays.
        seed: 64 bits; other ones, other oracles.

    Raises:
        ValueError: a primitive that has no rule; it and its line are named.

    Examples:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from sqjax.proving.running import run
        >>> from sqjax.proving.values import Field
        >>> program = jax.make_jaxpr(lambda x: x @ x / 2)(jnp.ones(2))
        >>> [squares] = run(program, [Field(np.array([3, 5], np.uint32))], seed=0)
        >>> squares.residues.tolist()
        17
    """
    jaxpr = program.jaxpr
    env = dict(zip(jaxpr.constvars, program.consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))
    for equation in jaxpr.eqns:
        results = _results(equation, list(_read(env, equation.invars)), seed)
        env.update(zip(equation.outvars, results, strict=True))
    return list(_read(env, jaxpr.outvars))


def _read(env: dict[Any, Value], atoms: Sequence[Any]) -> Iterator[Value]:
    for atom in atoms:
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            yield np.asarray(atom.val, aval.dtype)
        else:
            yield env[atom]


def _results(
    equation: JaxprEqn, operands: list[Value], seed: int
) -> Sequence[Value]:
    """The results of one equation."""
    if not any(isinstance(x, Field) for x in operands):
        return emit(equation, *operands)
    if not equation.outvars:  # printing, for one
        return []
    if (inner := inner_program(equation)) is not None:
        return run(inner, operands, seed)
    name = equation.primitive.name
    if name in _LOOPS:
        return _LOOPS[name](equation, operands, seed)
    if name not in RULES:
        raise unknown(equation)
    results = RULES[name](equation, operands, seed)
    _check_shapes(equation, results)
    return results


def _check_shapes(equation: JaxprEqn, results: Sequence[Value]) -> None:
    """Raises AssertionError for a rule that makes something of another shape."""
    for var, value in zip(equation.outvars, results, strict=True):
        array = value.residues if isinstance(value, Field) else value
        aval: Any = var.aval
        if np.shape(array) != aval.shape:
            raise AssertionError(
                f"{equation.primitive.name} at {source_of(equation)}: the rule in the field made "
                f"{np.shape(array)}, not {aval.shape}; please report this program"
            )


def _scan(
    equation: JaxprEqn, operands: list[Value], seed: int
) -> Sequence[Value]:
    scan: Any = scan_in(equation)
    consts, carry, xs = scan.sort(scan.given(operands))
    steps = range(scan.length)
    order = reversed(steps) if scan.options["reverse"] else steps
    made: list[list[Value]] = [[]] * scan.length
    for step in order:
        slices = [_at(x, step) for x in xs]
        results = run(scan.program, [*consts, *carry, *slices], seed)
        carry, made[step] = results[: scan.carry], results[scan.carry :]
    outputs = scan.program.jaxpr.outvars[scan.carry :]
    ys = [
        _stacked([of_step[k] for of_step in made], var.aval)
        for k, var in enumerate(outputs)
    ]
    return scan.results(operands, [*carry, *ys])


def _at(x: Value, step: int) -> Value:
    return Field(x.residues[step]) if isinstance(x, Field) else x[step]


def _stacked(values: list[Value], aval: Any) -> Value:
    """Arrays, or `Field`s, of this type along a new first axis."""
    if not values:
        return jax.numpy.zeros((0, *aval.shape), aval.dtype)
    if not any(isinstance(x, Field) for x in values):
        return jax.numpy.stack(values)
    return Field(np.stack(list(map(residues_of, values))))


def _while(
    equation: JaxprEqn, operands: list[Value], seed: int
) -> Sequence[Value]:
    loop = while_in(equation)
    of_test, of_body, _ = loop.sort(operands)
    carry = list(operands[loop.of_test + loop.of_body :])
    handed = loop.handed
    for _ in range(MOST_STEPS):
        [goes_on] = run(loop.test, [*of_test, *carry], seed)
        if not bool(goes_on):
            return carry
        made = iter(run(loop.body, [*of_body, *carry], seed))
        carry = [x if k in handed else next(made) for k, x in enumerate(carry)]
    raise unknown(equation, f"a loop of more than {MOST_STEPS} steps")


def _cond(
    equation: JaxprEqn, operands: list[Value], seed: int
) -> Sequence[Value]:
    cond = cond_in(equation)
    which, *given = operands
    last = len(cond.branches) - 1
    branch = cond.branches[min(max(int(which), 0), last)]
    return cond.results(operands, run(branch, given, seed))


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
