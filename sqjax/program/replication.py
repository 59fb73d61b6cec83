"""What differs from device to device in the bodies of shard_maps."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax

from sqjax.program.entries import carried, entries
from sqjax.program.equations import Atom, Equation, Var
from sqjax.program.facts import Program

#: Mesh axes by their numbers in a program.
MeshAxes = frozenset[int]
#: {variable: the mesh axes along which it may differ}; what is not there yet differs along none.
Found = defaultdict[Atom, MeshAxes]

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


def varying(program: Program) -> Mapping[Atom, MeshAxes]:
    """{variable: the mesh axes along which it may differ from device to device}.

    It may name too many mesh axes, never too few.

    Example: under the spec P("data", None) the block of an input differs along "data"; its psum
    over "data" does not.
    """
    found: Found = defaultdict(frozenset)
    _follow(program, program.main, found)
    return found


def reduced_axes(program: Program, equation: Equation) -> MeshAxes | None:
    """The mesh axes that a collective reduces over; None if one is of no known shard_map."""
    numbers = _mesh_axes_around(program, equation.outputs[0])
    names = equation.params["axes"]
    if not numbers.keys() >= set(names):
        return None
    return frozenset(map(numbers.__getitem__, names))


def _follow(
    program: Program,
    equations: Sequence[Equation],
    found: Found,
) -> None:
    """Adds the results of the equations, in order, to `found`."""
    for equation in equations:
        if equation.body is not None:
            results = _through_body(program, equation, found)
        else:
            operands = map(found.__getitem__, equation.inputs)
            after = _after(program, equation, frozenset().union(*operands))
            results = [after] * len(equation.outputs)
        if equation.branches:
            _through_branches(program, equation, found)
        for v, axes in zip(equation.outputs, results, strict=True):
            # A result lives outside the body, where the body's own mesh axes have no meaning.
            found[v] = axes.intersection(program.scopes[v])


def _through_body(
    program: Program, equation: Equation, found: Found
) -> list[MeshAxes]:
    """Through a body: inputs differ as operands do, and along the mesh axes that shard them.

    A scan's body is followed again until what it carries differs along no further mesh axes,
    because a value that differs after the first step differs before the second.
    """
    assert equation.body is not None
    for entry in entries(equation):
        found[entry.inner] = found[entry.outer] | entry.mesh_axes
    for value in carried(equation):
        found[value.inner] = found[value.first]
    grew = True
    while grew:
        _follow(program, equation.body.equations, found)
        grew = False
        for value in carried(equation):
            grew |= not found[value.following] <= found[value.inner]
            found[value.inner] |= found[value.following]
    return list(map(found.__getitem__, equation.body.outputs))


def _through_branches(
    program: Program, equation: Equation, found: Found
) -> None:
    """In loops and branches all may differ: another branch, or more steps, on every device."""
    around: MeshAxes = frozenset()
    for v in equation.outputs:
        around |= frozenset(_mesh_axes_around(program, v).values())
    for body in equation.branches:
        _follow(program, body.equations, found)
        for v in body.own:
            found[v] |= around


def _after(program: Program, equation: Equation, before: MeshAxes) -> MeshAxes:
    """The mesh axes along which an equation's results may differ, given those of its operands.

    Example: `axis_index("data")` differs along "data" though it has no operand; `psum` over "data"
    no longer does.
    """
    if not equation.outputs or equation.name == "pvary":
        return before
    if equation.runs_a_program:  # who knows what it does
        return before.union(
            _mesh_axes_around(program, equation.outputs[0]).values()
        )
    named = _axes_of(program, equation)
    agreeing = (
        equation.name in AGREEING
        and equation.params.get("axis_index_groups") is None
    )
    return before - named if agreeing else before | named


def _axes_of(program: Program, equation: Equation) -> MeshAxes:
    """The mesh axes that an equation names; integers among the names are axes of arrays."""
    numbers = _mesh_axes_around(program, equation.outputs[0])
    params = equation.params
    # One name, a tuple of names, or None.
    names = jax.tree.leaves((params.get("axes"), params.get("axis_name")))
    return frozenset(numbers[name] for name in numbers.keys() & set(names))


def _mesh_axes_around(program: Program, var: Var) -> dict[str, int]:
    """{name: mesh axis} of the mesh axes around a variable."""
    names = program.mesh_axes
    scopes = program.scopes[var]
    return {names[scope]: scope for scope in scopes if scope in names}
