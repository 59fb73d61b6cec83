"""Running a `Program`, with a look at some of its variables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from sqjax.program.build import Atom, Body, Equation, Var
from sqjax.program.facts import Program
from sqjax.program.subprograms import Scan, emit

Env = dict[Var, Any]
#: {variable: what to make of its value}.
Probes = Mapping[Var, Callable[[Array], Any]]


def evaluate(
    program: Program, leaves: Iterable[Any], inputs: Iterable[Any], probes: Probes
) -> tuple[list[Any], dict[Var, Any]]:
    """Runs a program on its leaves and inputs.

    Returns:
        What the function returns (flat), and {variable: what its probe made of it}; for a variable in bodies that has
        a leading axis for each of the variable's scopes: one entry a step, one for each device along a mesh axis.
    """
    env: Env = {**program.constants, **dict(zip(program.inputs, [*leaves, *inputs], strict=True))}
    seen = _run(program, program.main, env, probes, ())
    return _read(env, program.results), seen


def _read(env: Env, atoms: Iterable[Atom]) -> list[Any]:
    return [env[atom] if isinstance(atom, Var) else atom.value for atom in atoms]


def _run(
    program: Program,
    equations: Sequence[Equation],
    env: Env,
    probes: Probes,
    scope: tuple[int, ...],
) -> dict[Var, Any]:
    """Adds what the equations make to `env`; returns what the probes of this scope, and of those within, see."""
    seen: dict[Var, Any] = {}
    for equation in equations:
        operands = _read(env, equation.inputs)
        if equation.body is not None:
            run = _run_scan if isinstance(equation.body.call, Scan) else _run_shard_map
            results, within = run(program, equation.body, operands, env, probes, scope)
            seen |= within
        else:
            results = emit(equation.origin, *operands)
            results = results if equation.origin.primitive.multiple_results else [results]
        env.update(zip(equation.outputs, results, strict=True))
    return seen | {
        v: look(env[v]) for v, look in probes.items() if program.scopes[v] == scope and v in env
    }


def _run_scan(
    program: Program,
    body: Body,
    operands: Sequence[Any],
    env: Env,
    probes: Probes,
    scope: tuple[int, ...],
) -> tuple[list[Any], dict[Var, Any]]:
    scan: Any = body.call
    _, first, xs = scan.sort(operands)

    def step(carry, slices):
        inner = {**env, **dict(zip(body.inputs, [*carry, *slices], strict=True))}
        seen = _run(program, body.equations, inner, probes, (*scope, *body.scopes))
        outputs = _read(inner, body.outputs)
        return outputs[: scan.carry], (outputs[scan.carry :], seen)

    carry, (ys, seen) = lax.scan(step, first, xs, length=scan.length, **scan.options)
    return [*carry, *ys], seen


def _run_shard_map(
    program: Program,
    body: Body,
    operands: Sequence[Any],
    env: Env,
    probes: Probes,
    scope: tuple[int, ...],
) -> tuple[list[Any], dict[Var, Any]]:
    shards: Any = body.call
    captured = {v: env[v] for v in program.constants}

    def block(*operands):
        inner = {**captured, **dict(zip(body.inputs, operands, strict=True))}
        seen = _run(program, body.equations, inner, probes, (*scope, *body.scopes))
        lead = (1,) * len(shards.sizes)
        return _read(inner, body.outputs), jax.tree.map(lambda x: x.reshape(*lead, *x.shape), seen)

    out_specs = [*shards.out_specs], PartitionSpec(*shards.sizes)
    results, seen = shards.run(block, shards.in_specs, out_specs, operands)
    return results, seen
