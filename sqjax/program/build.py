"""`build`: a traced function as one list of equations (see equations.py), without its dead code.

A jaxpr is a tree of programs: calls hold programs, scans and shard_maps hold programs. Here calls
(jit, remat, custom gradients) are written out in place. Bodies of scans, shard_maps and while
loops, and branches of a cond, stay where they are, as part of their equation.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
)

from sqjax.program.equations import (
    Atom,
    Body,
    Equation,
    FlatProgram,
    Known,
    Scopes,
    Var,
    alive,
    variables_in,
)
from sqjax.program.subprograms import (
    Cond,
    Scan,
    ShardMap,
    While,
    cond_in,
    inner_program,
    kept,
    passed_on,
    plain,
    scan_in,
    shard_map_in,
    while_in,
    with_handed,
)
from sqjax.program.trace import Traced
from sqjax.program.views import VIEWS


def build(traced: Traced) -> FlatProgram:
    """The program of a traced function."""
    return _Builder(traced).build()


class _Builder:
    """A `FlatProgram` under construction; `scope` is where the equations being written out live."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.avals: list[Any] = []
        self.scopes: list[Scopes] = []
        self.lengths: dict[int, int] = {}
        self.mesh_axes: dict[int, str] = {}
        self.leaves: dict[Var, str] = {}
        self.roots: dict[Var, str] = {}
        self.outputs: dict[Var, str] = {}
        self.constants: dict[Var, Any] = {}
        self.slices: dict[tuple[Atom, Scopes], list[Var]] = {}
        self.scope: Scopes = ()
        self._numbers: dict[tuple[Scopes, Any], int] = {}
        self._leafy: set[Var] = set()
        self._leafy_views: dict[tuple[str, Any, str], Var] = {}
        self._in_branch = False

    def build(self) -> FlatProgram:
        """Writes out the whole program."""
        jaxpr = self.traced.jaxpr.jaxpr
        captured = self._capture(jaxpr, self.traced.jaxpr.consts)
        inputs = tuple(self._new(v.aval) for v in jaxpr.invars)
        leaves = len(self.traced.paths)  # the first inputs
        self.leaves.update(zip(inputs[:leaves], self.traced.paths, strict=True))
        self._leafy.update(self.leaves)
        for number, v in enumerate(inputs[leaves:]):
            self.roots[v] = f"input {number} of fn"
        equations, results = self._write_out(jaxpr, captured, inputs)
        self._note_outputs(results, "an output of fn")
        return FlatProgram(
            main=alive(equations, set(variables_in(results))),
            inputs=inputs,
            results=tuple(results),
            avals=self.avals,
            scopes=self.scopes,
            lengths=self.lengths,
            mesh_axes=self.mesh_axes,
            leaves=self.leaves,
            roots=self.roots,
            outputs=self.outputs,
            constants=self.constants,
            slices=self.slices,
        )

    def _new(self, aval: Any) -> Var:
        """A new variable of this shape and dtype, in the scope that is being written out."""
        self.avals.append(aval)
        self.scopes.append(self.scope)
        return Var(len(self.avals) - 1)

    def _capture(self, jaxpr: Jaxpr, values: Sequence[Any]) -> list[Var]:
        """Variables for the arrays that a program has captured."""
        captured = [self._new(v.aval) for v in jaxpr.constvars]
        self.roots.update(dict.fromkeys(captured, "a constant captured by fn"))
        self.constants.update(zip(captured, values, strict=True))
        return captured

    def _note_outputs(self, atoms: Sequence[Atom], what: str) -> None:
        """Notes that something outside of the equations reads these: the first reader counts."""
        for v in variables_in(atoms):
            self.outputs.setdefault(v, what)

    def _write_out(
        self, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any]
    ) -> tuple[list[Equation], list[Any]]:
        """(the equations of a program, what it returns), given its constants and inputs."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        equations: list[Equation] = []

        def read(atom: Any) -> Any:
            return _literal(atom) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(map(read, eqn.invars))
            # A call's variables become those of its operands, so that no equation says "call".
            if (inner := inner_program(eqn)) is not None:
                captured = self._capture(inner.jaxpr, inner.consts)
                written, results = self._write_out(
                    inner.jaxpr, captured, operands
                )
            else:
                written, results = self._write_one(eqn, operands)
            equations += written
            env.update(zip(eqn.outvars, results, strict=True))
        return equations, list(map(read, jaxpr.outvars))

    def _write_one(
        self, eqn: JaxprEqn, operands: tuple[Any, ...]
    ) -> tuple[list[Equation], list[Any]]:
        """(an equation, its results); no equation if some variable holds the result already."""
        results = [self._new(v.aval) for v in eqn.outvars]
        params = {name: plain(value) for name, value in eqn.params.items()}
        equation = Equation(
            eqn.primitive.name, operands, tuple(results), eqn, params
        )
        if (same := self._same_view(equation)) is not None:
            return [], [same]
        handed = passed_on(eqn)
        made = [results[i] for i in kept(len(results), handed)]
        equation = equation._replace(outputs=tuple(made))
        if (scan := scan_in(eqn)) is not None:
            given = tuple(scan.given(operands))
            equation = equation._replace(inputs=given)
        # What a loop only hands through is the operand itself, before and after it.
        results = with_handed(operands, made, handed)
        if eqn.primitive.name in ("while", "cond"):
            return [self._with_branches(equation)], results
        return [self._with_body(equation)], results

    def _same_view(self, equation: Equation) -> Var | None:
        """The variable that is this very view of a leaf already, or None.

        Two functions that share parameters (a prefill and a step) cast and transpose the same
        leaves. They share the results too, because a leaf that two scans read through one variable
        is read once for both.
        """
        is_view = equation.name in VIEWS and len(equation.inputs) == 1
        # What is made in a body is known to that body only.
        if not is_view or self.scope or self._in_branch:
            return None
        [x], [y] = equation.inputs, equation.outputs
        if x not in self._leafy:
            return None
        known = self._leafy_views.setdefault(
            (equation.name, x, str(equation.params)), y
        )
        self._leafy.add(known)
        return None if known is y else known

    def _with_body(self, equation: Equation) -> Equation:
        """The equation with the body that it runs, written out in a scope of its own."""
        call = scan_in(equation.origin) or shard_map_in(equation.origin)
        if call is None:
            return equation
        outside = self.scope
        jaxpr = call.program.jaxpr
        constants: list[
            Atom
        ] = []  # a shard_map has none: all its operands are blocks
        if isinstance(call, Scan):
            scopes = self._enter_scan(call)
            captured = self._capture(jaxpr, call.program.consts)
            constants, _, xs = call.sort(equation.inputs)
            inputs = self._inputs_of_step(equation, call, xs)
            leaving = f"what leaves a step of {equation}"
        else:
            scopes = self._enter_shard_map(call)
            captured = self._capture(jaxpr, call.program.consts)
            inputs = self._inputs_of_block(equation, call)
            leaving = f"what leaves {equation}"
        equations, outputs = self._write_out(
            jaxpr, captured, [*constants, *inputs]
        )
        self._note_outputs(outputs, leaving)
        self.scope = outside
        body = Body(scopes, call, inputs, tuple(outputs), tuple(equations))
        return equation._replace(body=body)

    def _with_branches(self, equation: Equation) -> Equation:
        """A while loop with its test and body, or a cond with its branches, written out."""
        outside, self._in_branch = self._in_branch, True
        if equation.name == "while":
            branches = self._of_loop(equation, while_in(equation.origin))
        else:
            branches = self._of_cond(equation, cond_in(equation.origin))
        self._in_branch = outside
        return equation._replace(branches=branches)

    def _of_loop(self, equation: Equation, loop: While) -> tuple[Body, ...]:
        """The test of a while loop and its body, each with variables of its own for the carry."""
        of_test, of_body, _ = loop.sort(equation.inputs)
        bodies = []
        for program, outer in ((loop.test, of_test), (loop.body, of_body)):
            # The test runs before the body, and once more: so both have a carry of their own.
            shapes = [v.aval for v in loop.sort(equation.origin.invars)[2]]
            inputs = tuple(map(self._new, shapes))
            self.roots.update(dict.fromkeys(inputs, f"the carry of {equation}"))
            carry = loop.carry(equation.inputs, inputs)
            bodies.append(
                self._branch(equation, loop, program, [*outer, *carry], inputs)
            )
        return tuple(bodies)

    def _of_cond(self, equation: Equation, choice: Cond) -> tuple[Body, ...]:
        """The branches of a cond, which all are given the operands after the index."""
        given = equation.inputs[1:]
        bodies = []
        for program in choice.branches:
            bodies.append(self._branch(equation, choice, program, given, ()))
        return tuple(bodies)

    def _branch(
        self,
        equation: Equation,
        call: While | Cond,
        program: ClosedJaxpr,
        operands: Sequence[Atom],
        inputs: tuple[Var, ...],
    ) -> Body:
        """A program that runs once, many times, or never, on these operands.

        `inputs` are those of them that are the program's own: the carry.
        """
        captured = self._capture(program.jaxpr, program.consts)
        # Copies, because a branch that is not taken must not count as a reader (see `Body`).
        copies: dict[Atom, Equation] = {}
        for x in operands:
            if x not in inputs and not self._is_seen_inside(x):
                copies.setdefault(x, self._copy(equation, x))
        given = [copies[x].outputs[0] if x in copies else x for x in operands]
        equations, outputs = self._write_out(program.jaxpr, captured, given)
        self._note_outputs(outputs, f"what leaves {equation}")
        inside = (*copies.values(), *equations)
        return Body((), call, inputs, tuple(outputs), inside)

    def _is_seen_inside(self, atom: Atom) -> bool:
        """Whether a branch reads the outer operand itself: a number, a leaf, a captured array."""
        if not isinstance(atom, Var):
            return True
        dtype = self.avals[atom].dtype
        is_key = jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
        return is_key or atom in self._leafy or atom in self.constants

    def _copy(self, equation: Equation, x: Atom) -> Equation:
        """An equation that names an outer variable anew, inside a branch of this equation."""
        outer = equation.origin
        origin = _naming().replace(source_info=outer.source_info, ctx=outer.ctx)
        aval = self.avals[x] if isinstance(x, Var) else x.value
        params = dict(origin.params)
        return Equation("name", (x,), (self._new(aval),), origin, params)

    def _enter_scan(self, scan: Scan) -> Scopes:
        """Goes into a scan's body; scans of one length in one scope share a number."""
        return (self._enter(scan.length, scan.length),)

    def _enter_shard_map(self, shards: ShardMap) -> Scopes:
        """Goes into a shard_map's body; its mesh axes have numbers of their own."""
        # Part of the key, because no other shard_map has this number.
        own = len(self._numbers)
        numbers = []
        for name, size in shards.sizes.items():
            number = self._enter((own, name), size)
            self.mesh_axes[number] = name
            numbers.append(number)
        return tuple(numbers)

    def _enter(self, key: Any, length: int) -> int:
        """Goes into a scope, and returns its number: the one that this key has here already."""
        number = self._numbers.setdefault((self.scope, key), len(self._numbers))
        self.lengths[number] = length
        self.scope = (*self.scope, number)
        return number

    def _inputs_of_step(
        self, equation: Equation, scan: Scan, xs: Sequence[Atom]
    ) -> tuple[Var, ...]:
        """The variables of a scan's carry, and of one step's slices of what it runs over."""
        _, carry, slices = scan.sort(scan.program.jaxpr.invars)
        carried = [self._new(v.aval) for v in carry]
        sliced = []
        for x, v in zip(xs, slices, strict=True):
            sliced.append(self._slice(x, v.aval))
        self.roots.update(dict.fromkeys(carried, f"the carry of {equation}"))
        self.roots.update(dict.fromkeys(sliced, f"what {equation} runs over"))
        return (*carried, *sliced)

    def _slice(self, outer: Atom, aval: Any) -> Var:
        """The variable of one step's slice, which all scans of a family share."""
        known = self.slices.setdefault((outer, self.scope), [])
        # One entry for each body, and always the same variable.
        known.append(known[0] if known else self._new(aval))
        return known[0]

    def _inputs_of_block(
        self, equation: Equation, shards: ShardMap
    ) -> tuple[Var, ...]:
        """The variables of one device's blocks of a shard_map's operands."""
        inputs = tuple(self._new(v.aval) for v in shards.program.jaxpr.invars)
        for x, v in zip(equation.inputs, inputs, strict=True):
            self.slices.setdefault((x, self.scope), [v])
        self.roots.update(dict.fromkeys(inputs, f"what {equation} is given"))
        return inputs


@cache
def _naming() -> JaxprEqn:
    """An equation that hands on its operand, and costs nothing when it runs."""
    named = jax.make_jaxpr(partial(checkpoint_name, name="given"))(0.0)
    [equation] = named.eqns
    return equation


def _literal(atom: Any) -> Known:
    return Known(np.asarray(atom.val, atom.aval.dtype))
