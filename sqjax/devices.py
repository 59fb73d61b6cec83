"""What differs from device to device in the bodies of shard_maps."""

from collections.abc import Sequence

from sqjax.equations import Scan
from sqjax.program import Body, Equation, Program, Var

Scopes = frozenset[int]

#: Collectives after which all devices along their axes hold the same (without groups of devices).
AGREEING = {"psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant", "all_gather_reduced"}
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
    return frozenset(scope_of[name] for name in names) if all(name in scope_of for name in names) else None


def _follow(program: Program, equations: Sequence[Equation], found: dict[Var, Scopes]) -> None:
    for equation in equations:
        before = frozenset().union(*(found.get(v, frozenset()) for v in equation.variables))
        if equation.body is not None:
            after = before.union(*(_added(program, e) for e in equation.body.everything))
            _enter(equation, equation.body, after, found)
            _follow(program, equation.body.equations, found)
        elif equation.name in AGREEING and equation.params.get("axis_index_groups") is None:
            after = before - _axes_of(program, equation)
        else:
            after = before | _added(program, equation)
        for v in equation.outputs:
            found[v] = after.intersection(program.scopes[v])


def _enter(equation: Equation, body: Body, carried: Scopes, found: dict[Var, Scopes]) -> None:
    if isinstance(body.call, Scan):
        found.update(dict.fromkeys(body.inputs, carried))
        return
    scope_of = dict(zip(body.call.sizes, body.scopes, strict=True))
    for outer, inner, spec in zip(equation.inputs, body.inputs, body.call.in_specs, strict=True):
        cut = {scope_of[name] for names in body.call.cuts(spec).values() for name in names}
        found[inner] = (found.get(outer, frozenset()) if isinstance(outer, int) else frozenset()) | cut


def _added(program: Program, equation: Equation) -> Scopes:
    """The mesh axes along which an equation's results may differ though its operands do not."""
    if equation.body is None and equation.runs_a_program:
        return frozenset(_named(program, equation.outputs[0]).values()) if equation.outputs else frozenset()
    agreeing = equation.name in AGREEING and equation.params.get("axis_index_groups") is None
    return frozenset() if agreeing or equation.name == "pvary" else _axes_of(program, equation)


def _axes_of(program: Program, equation: Equation) -> Scopes:
    """The mesh axes that an equation names."""
    if not equation.outputs:
        return frozenset()
    given = (equation.params.get(key, ()) for key in ("axes", "axis_name"))
    named = [name for names in given for name in ((names,) if isinstance(names, str) else tuple(names or ()))]
    scope_of = _named(program, equation.outputs[0])
    return frozenset(scope_of[name] for name in named if isinstance(name, str) and name in scope_of)


def _named(program: Program, var: Var) -> dict[str, int]:
    """{name: mesh axis} of the mesh axes around a variable."""
    return {program.mesh_axes[scope]: scope for scope in program.scopes[var] if scope in program.mesh_axes}
