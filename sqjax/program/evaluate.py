"""Running a `Program`, with a look at some of its variables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from sqjax.program.build import Atom, Body, Equation, Scopes, Var
from sqjax.program.facts import Program
from sqjax.program.subprograms import Scan, ShardMap, emit

#: {variable: what to make of its value}.
Probes = Mapping[Var, Callable[[Array], Any]]
#: {variable: what its probe has made of it}.
Seen = dict[Var, Any]
#: {variable: its value}, in one scope.
Env = dict[Var, Any]


def evaluate(
    program: Program,
    leaves: Iterable[Any],
    inputs: Iterable[Any],
    probes: Probes,
) -> tuple[list[Any], Seen]:
    """Runs a program on its leaves and inputs.

    Returns:
        What the function returns (flat), and {variable: what its probe made of it}; for a variable
        in bodies that has a leading axis for each of the variable's scopes: one entry a step, one
        for each device along a mesh axis.
        Example: the absmax of 64 channels in a scan over 32 layers has the shape (32, 64).
    """
    given = zip(program.inputs, [*leaves, *inputs], strict=True)
    env: Env = {**program.constants, **dict(given)}
    run = _Run(program, probes)
    seen = run.equations(program.main, env, ())
    return _read(env, program.results), seen


def _read(env: Env, atoms: Iterable[Atom]) -> list[Any]:
    return [
        env[atom] if isinstance(atom, Var) else atom.value for atom in atoms
    ]


class _Run(NamedTuple):
    """A run of a program with its probes."""

    program: Program
    probes: Probes

    def equations(
        self, equations: Sequence[Equation], env: Env, scopes: Scopes
    ) -> Seen:
        """Adds what the equations make to `env`; returns what probes here and in bodies see."""
        seen: Seen = {}
        for equation in equations:
            operands = _read(env, equation.inputs)
            if equation.body is None:
                results = emit(equation.origin, *operands)
            else:
                results, within = self._through_body(
                    equation.body, operands, env, scopes
                )
                seen |= within
            env.update(zip(equation.outputs, results, strict=True))
        # Probes look once all is computed, because a variable may be an input of this scope.
        for v, look in self.probes.items():
            if self.program.scopes[v] == scopes and v in env:
                seen[v] = look(env[v])
        return seen

    def _through_body(
        self, body: Body, operands: Sequence[Any], env: Env, scopes: Scopes
    ) -> tuple[list[Any], Seen]:
        """(the results of a scan or shard_map, what probes in its body see)."""
        inside = (*scopes, *body.scopes)
        if isinstance(body.call, Scan):
            return self._scan(body, body.call, operands, env, inside)
        return self._shard_map(body, body.call, operands, inside)

    def _scan(
        self,
        body: Body,
        scan: Scan,
        operands: Sequence[Any],
        env: Env,
        scopes: Scopes,
    ) -> tuple[list[Any], Seen]:
        _, first, xs = scan.sort(operands)

        def step(carry, slices):
            # A body reads the outer variables too: a scan's constants are those themselves.
            given = zip(body.inputs, [*carry, *slices], strict=True)
            inner = {**env, **dict(given)}
            seen = self.equations(body.equations, inner, scopes)
            outputs = _read(inner, body.outputs)
            return outputs[: scan.carry], (outputs[scan.carry :], seen)

        carry, (ys, seen) = scan.run(step, first, xs)
        return [*carry, *ys], seen

    def _shard_map(
        self,
        body: Body,
        shards: ShardMap,
        operands: Sequence[Any],
        scopes: Scopes,
    ) -> tuple[list[Any], Seen]:
        # Only the program's constants come from outside, because all else is an operand of the
        # shard_map.
        constants = self.program.constants

        def block(*blocks):
            inner = {**constants, **dict(zip(body.inputs, blocks, strict=True))}
            seen = self.equations(body.equations, inner, scopes)
            # A leading axis of size 1 for each mesh axis: the devices' parts are put together along
            # it.
            lead = (1,) * len(shards.sizes)
            of_device = jax.tree.map(lambda x: x.reshape(lead + x.shape), seen)
            return _read(inner, body.outputs), of_device

        out_specs = [*shards.out_specs], PartitionSpec(*shards.sizes)
        return shards.run(block, shards.in_specs, out_specs, operands)
