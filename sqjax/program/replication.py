"""What differs from device to device in the bodies of shard_maps."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqjax.program.build import Body, Equation, Var
from sqjax.program.facts import Program
from sqjax.program.subprograms import Scan

Scopes = frozenset[int]

#: Collectives after which all devices along their axes hold the same (without groups of devices).
AGREEING = {
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
    "all_gather",
    "all_gather_invariant",
    "all_gather_reduced",
}
#: Collectives that add up or compare each element over devices.
REDUCING = {"psum", "psum_invariant", "pmax", "pmin"}


def varying(program: Program) -> dict[Var, Scopes]:
    """{variable: the mesh axes along which devices may hold different values of it}; it may name too many."""
    found: dict[Var, Scopes] = {}
    _follow(program, program.main, found)
    return found


def reduced_axes(program: Program, equation: Equation) -> Scopes | None:
    """The mesh axes that a collective reduces over; None if one of its axes is none of a shard_map that is known."""
    scope_of = _named(program, equation.outputs[0])
    names = equation.params["axes"]
    return (
        frozenset(scope_of[name] for name in names)
        if all(name in scope_of for name in names)
        else None
    )


def _follow(program: Program, equations: Sequence[Equation], found: dict[Var, Scopes]) -> None:
    for equation in equations:
        operands = [_of(found, v) for v in equation.inputs]
        if equation.body is not None:
            enter = _repeat if isinstance(equation.body.call, Scan) else _divide
            results = enter(program, equation.body, operands, found)
        else:
            results = [_after(program, equation, frozenset().union(*operands))] * len(
                equation.outputs
            )
        found.update(
            (v, axes.intersection(program.scopes[v]))
            for v, axes in zip(equation.outputs, results, strict=True)
        )


def _of(found: Mapping[Var, Scopes], atom: Any) -> Scopes:
    return found.get(atom, frozenset()) if isinstance(atom, Var) else frozenset()


def _repeat(
    program: Program, body: Body, operands: Sequence[Scopes], found: dict[Var, Scopes]
) -> list[Scopes]:
    """Through a scan's body, until the carry differs along no further mesh axes."""
    scan: Any = body.call
    _, carry, xs = scan.sort(operands)
    while True:
        found.update(zip(body.inputs, [*carry, *xs], strict=True))
        _follow(program, body.equations, found)
        results = [_of(found, v) for v in body.outputs]
        grown = [a | b for a, b in zip(carry, results, strict=False)]
        if grown == carry:
            return results
        carry = grown


def _divide(
    program: Program, body: Body, operands: Sequence[Scopes], found: dict[Var, Scopes]
) -> list[Scopes]:
    """Through a shard_map's body, whose inputs differ along the mesh axes that cut them."""
    shards: Any = body.call
    scope_of = dict(zip(shards.sizes, body.scopes, strict=True))
    for axes, inner, spec in zip(operands, body.inputs, shards.in_specs, strict=True):
        found[inner] = axes.union(
            scope_of[name] for names in shards.cuts(spec).values() for name in names
        )
    _follow(program, body.equations, found)
    return [_of(found, v) for v in body.outputs]


def _after(program: Program, equation: Equation, before: Scopes) -> Scopes:
    """The mesh axes along which an equation's results may differ, given those of its operands."""
    if not equation.outputs or equation.name == "pvary":
        return before
    if equation.runs_a_program:  # who knows what it does
        return before.union(_named(program, equation.outputs[0]).values())
    agreeing = equation.name in AGREEING and equation.params.get("axis_index_groups") is None
    return (
        before - _axes_of(program, equation) if agreeing else before | _axes_of(program, equation)
    )


def _axes_of(program: Program, equation: Equation) -> Scopes:
    """The mesh axes that an equation names."""
    given = (equation.params.get(key, ()) for key in ("axes", "axis_name"))
    named = [
        name
        for names in given
        for name in ((names,) if isinstance(names, str) else tuple(names or ()))
    ]
    scope_of = _named(program, equation.outputs[0])
    return frozenset(scope_of[name] for name in named if isinstance(name, str) and name in scope_of)


def _named(program: Program, var: Var) -> dict[str, int]:
    """{name: mesh axis} of the mesh axes around a variable."""
    return {
        program.mesh_axes[scope]: scope
        for scope in program.scopes[var]
        if scope in program.mesh_axes
    }
