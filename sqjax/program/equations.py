"""What a program is here: its variables, its equations and their bodies; `alive` drops dead code.

Variables are numbers that are never used twice, because then a fact about a variable can be kept in
a plain table. `build` writes a jaxpr out as a `FlatProgram`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, jaxprs_in_params

from sqjax.program.primitives import IDENTITIES
from sqjax.program.subprograms import Cond, Scan, ShardMap, While, source_of


class Var(int):
    """A variable of a program: its number, in the order in which the variables were made.

    An int, because variables are keys of almost every table here: they hash, compare and sort as
    fast as numbers do.
    """

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Known:
    """A number that stands in the program itself, such as the 2.0 of `2.0 * x`."""

    value: np.ndarray

    def __str__(self) -> str:
        return str(self.value)


#: What an equation reads. `isinstance(atom, Var)` tells the two apart.
Atom = Var | Known

#: The scans and mesh axes around a variable, by number, outermost first.
Scopes = tuple[int, ...]


class Equation(NamedTuple):
    """One primitive applied to variables or literals.

    Attributes:
        name: the primitive's.
        inputs, outputs: its operands and results.
        origin: the equation of the jaxpr, which knows how to run and which line of the user's
            program made it.
        params: the primitive's parameters, with Python's integers in place of numpy's.
        body: what a scan runs at every step, a shard_map on every device; None for everything else.
        branches: what a cond chooses from; of a while loop its test, and its body.
    """

    name: str
    inputs: tuple[Atom, ...]
    outputs: tuple[Var, ...]
    origin: JaxprEqn
    params: dict[str, Any]
    body: "Body | None" = None
    branches: "tuple[Body, ...]" = ()

    @property
    def bodies(self) -> "tuple[Body, ...]":
        """All that it runs: its body, or its branches; none for most equations."""
        return self.branches if self.body is None else (self.body,)

    @property
    def variables(self) -> list[Var]:
        """The variables among its inputs."""
        return variables_in(self.inputs)

    @property
    def read(self) -> list[Var]:
        """The variables it reads itself.

        Not a loop's constants, nor what a branch is given: bodies read the outer variables, so
        equations of the body are the readers.
        """
        if not self.bodies:
            return self.variables
        return variables_in(self.bodies[0].call.own(self.inputs))

    def behind(self, result: Var) -> list[Var]:
        """The variables that one of its results is made of.

        All that it reads; but an identity of several operands (`optimization_barrier`) passes on
        one of them each.
        """
        if self.name not in IDENTITIES:
            return self.variables
        operand = self.inputs[self.outputs.index(result)]
        return variables_in([operand])

    @property
    def runs_a_program(self) -> bool:
        """Whether a program is among its parameters: it is a scan, a loop, a custom kernel ..."""
        return next(iter(jaxprs_in_params(self.params)), None) is not None

    def __str__(self) -> str:
        return f"`{self.name}` at {source_of(self.origin)}"


class Body(NamedTuple):
    """One step of a scan or while loop, a branch, or what one device does in a shard_map.

    A scan's constants are the outer variables themselves. Its carry and the slices of what it runs
    over, and all operands of a shard_map, are variables of the body's own.

    While loops and branches see outer leaves as they are. Of any other variable they have a copy of
    their own, which their first equations make: what a branch reads is seen only if it is taken,
    what a loop reads once for every step.

    Attributes:
        scopes: of a scan the number of its family, of a shard_map one number for each of its mesh
            axes. () of a loop or branch: who knows how often it runs?
        call: how often and in what order it runs, or on which devices.
        inputs: the carry, then a slice of each of the xs; one device's block of every operand; the
            carry of a while loop; nothing for a branch.
        outputs: the next carry, then a slice of each of the ys; one device's block of every result.
        equations: in order.
    """

    scopes: Scopes
    call: Scan | ShardMap | While | Cond
    inputs: tuple[Var, ...]
    outputs: tuple[Atom, ...]
    equations: tuple[Equation, ...]

    @property
    def everything(self) -> Iterator[Equation]:
        """The equations of this body and of those within."""
        return all_equations(self.equations)

    @property
    def own(self) -> Iterator[Var]:
        """The variables of this body and of those within."""
        yield from self.inputs
        for equation in self.everything:
            yield from equation.outputs
            for body in equation.bodies:
                yield from body.inputs


class FlatProgram(NamedTuple):
    """A function as equations, and where its variables live.

    Scans of one length in one scope are a family. They share the slices of a leaf that several of
    them run over (a prefill and a step over the same layers), because a scale of such a slice is a
    scale for both.

    Attributes:
        main: the equations that some output depends on, in order; those of scans and shard_maps
            hold their bodies.
        inputs: the variables of fn's inputs, the leaves first.
        results: what the function returns.
        avals: the shape and dtype of every variable.
        scopes: for every variable the families of scans and the mesh axes in whose bodies it lives.
        lengths: {family of scans, or mesh axis: the number of steps, or devices}.
        mesh_axes: {mesh axis: its name} of those of shard_maps.
        leaves: {variable: path} of the parameter leaves.
        roots: {variable: what it is} of the other variables that no equation makes: inputs,
            constants, carries.
        outputs: {variable: what reads it} of results and of what leaves a body.
        constants: {variable: value} of the arrays that fn has captured.
        slices: {(operand, scopes): the variable of its slice or block in these scopes, once for
            each body given one}.
    """

    main: tuple[Equation, ...]
    inputs: tuple[Var, ...]
    results: tuple[Atom, ...]
    avals: list[Any]
    scopes: list[Scopes]
    lengths: dict[int, int]
    mesh_axes: dict[int, str]
    leaves: dict[Var, str]
    roots: dict[Var, str]
    outputs: dict[Var, str]
    constants: dict[Var, Any]
    slices: dict[tuple[Atom, Scopes], list[Var]]


def variables_in(atoms: Sequence[Atom]) -> list[Var]:
    """The variables among operands or results."""
    return [atom for atom in atoms if isinstance(atom, Var)]


def all_equations(equations: Sequence[Equation]) -> Iterator[Equation]:
    """These equations and those of their bodies, which come before the equation that runs them."""
    for equation in equations:
        for body in equation.bodies:
            yield from all_equations(body.equations)
        yield equation


def alive(
    equations: Sequence[Equation], needed: set[Var]
) -> tuple[Equation, ...]:
    """The equations without dead code; what they read is added to `needed`."""
    kept = []
    for equation in reversed(equations):
        # Prints and other effects count, though nothing reads a result of theirs.
        if (
            not needed.intersection(equation.outputs)
            and not equation.origin.effects
        ):
            continue
        if equation.body is not None:
            equation = equation._replace(
                body=_alive_body(equation.body, needed)
            )
        branches = [_alive_body(body, needed) for body in equation.branches]
        needed.update(equation.variables)
        kept.append(equation._replace(branches=tuple(branches)))
    return tuple(reversed(kept))


def _alive_body(body: Body, needed: set[Var]) -> Body:
    """A body without dead code."""
    # All outputs, also of results that nothing reads: a carry is read by the next step.
    needed.update(variables_in(body.outputs))
    return body._replace(equations=alive(body.equations, needed))
