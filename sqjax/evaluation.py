"""Running a `Program`, with a look at some of its variables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax import lax
from jaxtyping import Array

from sqjax.equations import emit
from sqjax.program import Body, Equation, Program, Var

Env = dict[Var, Any]
#: {variable: what to make of its value}.
Probes = Mapping[Var, Callable[[Array], Any]]


def evaluate(
    program: Program, leaves: Iterable[Any], inputs: Iterable[Any], probes: Probes
) -> tuple[list[Any], dict[Var, Any]]:
    """Runs a program on its leaves and inputs.

    Returns:
        What the function returns (flat), and {variable: what its probe made of it}; for a variable in the body of a
        scan that has a leading axis, one entry a step.
    """
    env: Env = {**program.constants, **dict(zip(program.inputs, [*leaves, *inputs], strict=True))}
    seen = _run(program, program.main, env, probes, ())
    return _read(env, program.results), seen


def _read(env: Env, atoms: Iterable[Any]) -> list[Any]:
    return [env[atom] if isinstance(atom, int) else atom for atom in atoms]


def _run(
    program: Program, equations: Sequence[Equation], env: Env, probes: Probes, scope: tuple[int, ...]
) -> dict[Var, Any]:
    """Adds what the equations make to `env`; returns what the probes of this scope, and of those within, see."""
    seen: dict[Var, Any] = {}
    for equation in equations:
        operands = _read(env, equation.inputs)
        if equation.body is not None:
            results, within = _run_scan(program, equation.body, operands, env, probes, scope)
            seen |= within
        else:
            results = emit(equation.origin, *operands)
            results = results if equation.origin.primitive.multiple_results else [results]
        env.update(zip(equation.outputs, results, strict=True))
    return seen | {v: look(env[v]) for v, look in probes.items() if program.scopes[v] == scope and v in env}


def _run_scan(
    program: Program, body: Body, operands: Sequence[Any], env: Env, probes: Probes, scope: tuple[int, ...]
) -> tuple[list[Any], dict[Var, Any]]:
    _, first, xs = body.scan.sort(operands)

    def step(carry, slices):
        inner = {**env, **dict(zip(body.inputs, [*carry, *slices], strict=True))}
        seen = _run(program, body.equations, inner, probes, (*scope, body.number))
        outputs = _read(inner, body.outputs)
        return outputs[: body.scan.carry], (outputs[body.scan.carry :], seen)

    carry, (ys, seen) = lax.scan(step, first, xs, length=body.scan.length, **body.scan.options)
    return [*carry, *ys], seen
