"""The walk: runs a traced program in which some values are special, and hands those to a table of rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from sqjax.program.primitives import KEEP_A_FILL
from sqjax.program.registry import Leaf as Leaf
from sqjax.program.registry import Registry
from sqjax.program.subprograms import emit, inner_program, program_in, scan_in, shard_map_in


class Rules(NamedTuple):
    """What to do where a `Leaf` meets a primitive: a rule by the primitive's name, else `otherwise`.

    A rule is called as rule(equation, *operands) and returns the result (a list of them, if the primitive has
    several). Where `concerns(equation)`, the same happens though no leaf is there.
    """

    table: Mapping[str, Callable[..., Any]]
    otherwise: Callable[..., Any]
    concerns: Callable[[JaxprEqn], bool] = lambda equation: False


def walk(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rules: Rules | Registry
) -> list[Any]:
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
        with source_info_util.user_context(equation.source_info.traceback):
            if isinstance(rules, Registry):
                numbers = [
                    v.val if isinstance(v, Literal) else fills.get(v) for v in equation.invars
                ]
                results = _apply(equation, operands, numbers, rules)
            else:
                if equation.primitive.name == "select_n" and any(
                    isinstance(x, Leaf) for x in operands
                ):
                    equation = equation.replace(invars=[_filled(fills, v) for v in equation.invars])
                results = _step(equation, operands, rules)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _apply(
    equation: JaxprEqn, operands: list[Any], fills: Sequence[Any], rules: Registry
) -> list[Any]:
    """The results of one equation."""
    special = any(isinstance(x, Leaf) for x in operands)
    name = equation.primitive.name
    if not special and not rules.concerns(equation):
        results = emit(equation, *operands)
    elif (inner := inner_program(equation)) is not None:
        return walk(inner.jaxpr, inner.consts, operands, rules)
    elif name in _BODIES:
        return _BODIES[name](equation, operands, rules)
    else:
        rule = rules.rule(equation, operands)
        asked = {"fills": list(fills)} if rule.fills else {}
        results = rule.run(equation, *operands, **asked)
    return results if equation.primitive.multiple_results else [results]


def run(program: ClosedJaxpr, operands: Sequence[Any], rules: Registry) -> list[Any]:
    """What a program, or a body, returns on these operands, special values among them."""
    return rules.leave(walk(program.jaxpr, program.consts, operands, rules))


def _scan(equation: JaxprEqn, operands: list[Any], rules: Registry) -> list[Any]:
    """A scan gives one layer's arrays of a stacked leaf to each step; constants are the leaves themselves."""
    scan: Any = scan_in(equation)
    consts, carry, xs = scan.sort(operands)

    def step(carry, slices):
        outputs = run(scan.step, [*consts, *carry, *slices], rules)
        return outputs[: scan.carry], outputs[scan.carry :]

    sliced = [
        rules.kind_of(x).slices(equation, x, scan.length) if isinstance(x, Leaf) else x for x in xs
    ]
    carry, ys = scan.run(step, rules.carry(equation, carry), sliced)
    return [*carry, *ys]


def _shard_map(equation: JaxprEqn, operands: list[Any], rules: Registry) -> list[Any]:
    """Every device has its block of a leaf's arrays."""
    shards: Any = shard_map_in(equation)
    specs = tuple(
        rules.kind_of(x).specs(equation, x, spec) if isinstance(x, Leaf) else spec
        for x, spec in zip(operands, shards.in_specs, strict=True)
    )

    def block(*blocks):
        return run(shards.block, blocks, rules)

    return shards.run(block, specs, list(shards.out_specs), operands)


def _while(equation: JaxprEqn, operands: list[Any], rules: Registry) -> list[Any]:
    """Leaves are constants of the loop, of its test or of its body."""
    params = equation.params
    test, body = (program_in(equation, params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    of_body = params["cond_nconsts"]
    first = of_body + params["body_nconsts"]
    return lax.while_loop(
        lambda carry: run(test, [*operands[:of_body], *carry], rules)[0],
        lambda carry: run(body, [*operands[of_body:first], *carry], rules),
        rules.carry(equation, operands[first:]),
    )


def _cond(equation: JaxprEqn, operands: list[Any], rules: Registry) -> list[Any]:
    """Each branch runs with the leaves it is given."""
    index, *given = operands
    programs = [program_in(equation, branch) for branch in equation.params["branches"]]
    branches = [lambda program=program: run(program, given, rules) for program in programs]
    return lax.switch(index, branches)


_BODIES = {"scan": _scan, "shard_map": _shard_map, "while": _while, "cond": _cond}


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
