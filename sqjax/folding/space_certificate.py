"""The certificate of a space: does every equation pass the rotation on?

It does not know how the members were found, and shares no code with the search or its rules.

**The claim.** Let members be variables with the axes along which they shall be multiplied by Q, and
let every equation that touches one obey its primitive's law: whenever its operands change like
that, so do its results, and what is no member stays what it is. Let neither inputs, outputs nor
constants be members. Then for every orthogonal Q (with 1 Q = 1 if `keeps_ones`) the leaves may be
multiplied by Q where they are members, and fn stays what it is, in exact numbers: by induction over
the equations, as in `sqjax.folding.certificate`.

The laws, one for each primitive, are in `sqjax.folding.space_laws`.

What it takes for granted: `gains` are ones. Whoever rotates has to check their values.
"""

from sqjax.folding.space import Along, Space
from sqjax.folding.space_laws import SPACE_LAWS, Members, Turning
from sqjax.program.equations import Equation, Var
from sqjax.program.facts import Program


def certify_space(
    program: Program, size: int, members: Members, space: Space
) -> str | None:
    """None if a space is lawful; otherwise what is wrong.

    Args:
        program: the program.
        size: the rows of Q.
        members: {variable: where it shall be multiplied by Q}.
        space: what is claimed besides: its gains, and whether Q keeps ones.
    """
    gains = frozenset(space.gains)
    turning = Turning(program, size, members, {}, gains, space.keeps_ones)
    return (
        _wrong_members(turning)
        or _wrong_leaves(turning, space)
        or _unlawful(turning)
    )


def _wrong_members(turning: Turning) -> str | None:
    """What is wrong with the members, whatever equations read them."""
    if turning.size < 2:
        return "expected two channels or more"
    for var, places in turning.members.items():
        problem = _fixed(turning.program, var) or _misfit(turning, var, places)
        if problem is not None:
            return problem
    return None


def _wrong_leaves(turning: Turning, space: Space) -> str | None:
    """What is wrong with the leaves that are named: they must be the members among the leaves."""
    # Because a leaf named twice would be multiplied by Q twice.
    if len(set(space.leaves)) < len(space.leaves):
        return "expected each leaf and axis once"
    listed = {
        path: frozenset(along for other, along in space.leaves if other == path)
        for path, _ in space.leaves
    }
    whole = {
        path: turning.of(var) for path, var in turning.program.whole.items()
    }
    if listed != {path: places for path, places in whole.items() if places}:
        return "the leaves of the space are not those of its members"
    return None


def _unlawful(turning: Turning) -> str | None:
    """The first equation that breaks its law. What they make of products is noted on the way."""
    for equation in turning.program.equations:
        if not _concerns(turning, equation):
            continue
        law = SPACE_LAWS.get(equation.name)
        if law is None or not law(turning, equation):
            return f"{equation} does not pass the rotation on"
    if any(map(turning.is_product, turning.program.results)):
        return "a product that turns, not summed up, is an output of fn"
    return None


def _concerns(turning: Turning, equation: Equation) -> bool:
    """Whether a member or a product is read or made, or enters or leaves a body."""
    atoms = [*equation.inputs, *equation.outputs]
    for body in equation.bodies:
        atoms += [*body.inputs, *body.outputs]
    return any(turning.of(a) or turning.is_product(a) for a in atoms)


def _fixed(program: Program, var: Var) -> str | None:
    """Why no rotation may change a variable; None if one may."""
    if var in program.results:
        return "an output of fn would turn"
    is_input = var in program.inputs and var not in program.whole.values()
    if is_input or var in program.constants:
        return f"{program.roots.get(var, 'a constant')} would turn"
    if var in program.offsets or not program.is_float(var):
        return f"a leaf plus a number, or no float, would turn: {var}"
    return None


def _misfit(turning: Turning, var: Var, places: frozenset[Along]) -> str | None:
    """What is wrong with where a space lies in a variable."""
    shape = turning.program.shape(var)
    axes = [along.axis for along in places]
    inside = all(
        0 <= along.axis < len(shape)
        and along.start >= 0
        and min(along.before, along.after) > 0
        and along.start + along.length(turning.size) <= shape[along.axis]
        for along in places
    )
    if not inside or len(set(axes)) < len(axes):
        return f"a space of {turning.size} does not fit into {shape}"
    return None
