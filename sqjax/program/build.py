"""`Flat`: a traced function as one list of equations, without its dead code."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from sqjax.program.primitives import IDENTITIES
from sqjax.program.subprograms import (
    Scan,
    ShardMap,
    inner_program,
    plain,
    scan_in,
    shard_map_in,
    source_of,
)
from sqjax.program.trace import Traced
from sqjax.program.views import VIEWS


class Var(int):
    """A variable of a program: its number, in the order in which the variables were made.

    An int, because variables are keys of almost every table here: they hash, compare and sort as fast as numbers do.
    """

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Known:
    """A number that stands in the program itself, such as the 2.0 of `2.0 * x`; two are never the same one."""

    value: np.ndarray

    def __str__(self) -> str:
        return str(self.value)


#: What an equation reads. `isinstance(atom, Var)` tells the two apart.
Atom = Var | Known


class Equation(NamedTuple):
    """One primitive applied to variables (numbers) or literals.

    Attributes:
        body: what a scan runs at every step, a shard_map on every device; None for everything else.
    """

    name: str
    inputs: tuple[Atom, ...]
    outputs: tuple[Var, ...]
    origin: JaxprEqn
    params: dict[str, Any]
    body: "Body | None" = None

    @property
    def variables(self) -> list[Var]:
        """The variables among its inputs."""
        return [v for v in self.inputs if isinstance(v, Var)]

    @property
    def read(self) -> list[Var]:
        """The variables it reads itself; what a scan's body reads is read there."""
        consts = (
            self.body.call.consts
            if self.body is not None and isinstance(self.body.call, Scan)
            else 0
        )
        return [v for v in self.inputs[consts:] if isinstance(v, Var)]

    def behind(self, result: Var) -> list[Var]:
        """The variables that one of its results is made of.

        All that it reads; but an identity of several operands (`optimization_barrier`) passes on one of them each.
        """
        if self.name not in IDENTITIES:
            return self.variables
        operand = self.inputs[self.outputs.index(result)]
        return [operand] if isinstance(operand, Var) else []

    @property
    def runs_a_program(self) -> bool:
        return any(True for _ in jaxprs_in_params(self.params))

    def __str__(self) -> str:
        return f"`{self.name}` at {source_of(self.origin)}"


class Body(NamedTuple):
    """One step of a scan, or what one device does in a shard_map.

    A scan's constants are the outer variables themselves; carry and xs, and all operands of a shard_map, are variables
    of its own.

    Attributes:
        scopes: of a scan the number of its family, of a shard_map one number for each of its mesh axes.
        call: how often and in what order it runs, or on which devices.
        inputs: the carry, then a slice of each of the xs; one device's block of every operand.
        outputs: the next carry, then a slice of each of the ys; one device's block of every result.
        equations: in order.
    """

    scopes: tuple[int, ...]
    call: Scan | ShardMap
    inputs: tuple[Var, ...]
    outputs: tuple[Atom, ...]
    equations: tuple[Equation, ...]

    @property
    def everything(self) -> Iterator[Equation]:
        """The equations of this body and of those within."""
        return _all(self.equations)


class Flat:
    """The equations of `traced`; calls (jit, remat, custom gradients) and bodies (scan, shard_map) are written out.

    Scans of one length at one place are a family, and share the slices of a leaf that several of them run over (a
    prefill and a step over the same layers).

    Attributes:
        main: the equations that some output depends on, in order; those of scans and shard_maps hold their bodies.
        avals: the shape and dtype of every variable.
        scopes: for every variable the families of scans and the mesh axes, outermost first, in whose bodies it lives.
        lengths: {family of scans, or mesh axis: the number of steps, or devices}.
        mesh_axes: {mesh axis: its name} of those of shard_maps.
        inputs: the variables of fn's inputs, the leaves first.
        leaves: {variable: path} of the parameter leaves.
        roots: {variable: what it is} of the other variables that no equation makes: inputs, constants, carries.
        results: what the function returns.
        outputs: {variable: what reads it} of results and of what leaves a body.
        constants: {variable: value} of the arrays that fn has captured.
    """

    def __init__(self, traced: Traced):
        self.avals: list[Any] = []
        self.scopes: list[tuple[int, ...]] = []
        self.lengths: dict[int, int] = {}
        self.mesh_axes: dict[int, str] = {}
        self.leaves: dict[Var, str] = {}
        self.roots: dict[Var, str] = {}
        self.outputs: dict[Var, str] = {}
        self.constants: dict[Var, Any] = {}
        self._scope: tuple[int, ...] = ()
        self._families: dict[tuple[tuple[int, ...], Any], int] = {}
        self._slices_of: dict[tuple[Var, tuple[int, ...]], list[Var]] = {}
        self._leafy_views: dict[tuple[str, Any, str], Var] = {}
        jaxpr = traced.jaxpr.jaxpr
        captured = self._capture(jaxpr, traced.jaxpr.consts)
        self.inputs = tuple(self._new(v.aval) for v in jaxpr.invars)
        self.leaves.update(zip(self.inputs, traced.paths, strict=False))
        self._leafy: set[Any] = set(self.leaves)
        for number, v in enumerate(self.inputs[len(traced.paths) :]):
            self.roots[v] = f"input {number} of fn"
        equations, self.results = self._flatten(jaxpr, captured, self.inputs)
        self._leaves_out(self.results, "an output of fn")
        self.main = self._alive(equations, {v for v in self.results if isinstance(v, Var)})

    @property
    def equations(self) -> Iterator[Equation]:
        """All equations, those of a body before the one that runs it."""
        return _all(self.main)

    def _new(self, aval: Any) -> Var:
        self.avals.append(aval)
        self.scopes.append(self._scope)
        return Var(len(self.avals) - 1)

    def _capture(self, jaxpr: Jaxpr, values: Sequence[Any]) -> list[Var]:
        captured = [self._new(v.aval) for v in jaxpr.constvars]
        self.roots.update(dict.fromkeys(captured, "a constant captured by fn"))
        self.constants.update(zip(captured, values, strict=True))
        return captured

    def _leaves_out(self, atoms: Sequence[Any], what: str) -> None:
        self.outputs.update(
            {v: what for v in atoms if isinstance(v, Var) and v not in self.outputs}
        )

    def _flatten(
        self, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any]
    ) -> tuple[list[Equation], list[Any]]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))
        equations: list[Equation] = []

        def read(atom: Any) -> Any:
            return _literal(atom) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(read(v) for v in eqn.invars)
            if (inner := inner_program(eqn)) is not None:
                written, results = self._flatten(
                    inner.jaxpr, self._capture(inner.jaxpr, inner.consts), operands
                )
                equations += written
            else:
                results = [self._new(v.aval) for v in eqn.outvars]
                params = {name: plain(value) for name, value in eqn.params.items()}
                equation = Equation(eqn.primitive.name, operands, tuple(results), eqn, params)
                if (same := self._view_once(equation)) is not None:
                    results = [same]
                else:
                    equations.append(self._with_body(equation))
            env.update(zip(eqn.outvars, results, strict=True))
        return equations, [read(v) for v in jaxpr.outvars]

    def _with_body(self, equation: Equation) -> Equation:
        outer = self._scope
        if (scan := scan_in(equation.origin)) is not None:
            body = self._step(equation, scan)
        elif (shards := shard_map_in(equation.origin)) is not None:
            body = self._block(equation, shards)
        else:
            return equation
        self._scope = outer
        return equation._replace(body=body)

    def _into(self, key: Any, length: int) -> int:
        """Goes into a body that runs so often; returns its number, which it shares with others of the same key."""
        number = self._families.setdefault((self._scope, key), len(self._families))
        self.lengths[number] = length
        self._scope = (*self._scope, number)
        return number

    def _step(self, equation: Equation, scan: Scan) -> Body:
        (consts, carry, xs), step = scan.sort(equation.inputs), scan.step.jaxpr
        number = self._into(scan.length, scan.length)
        captured = self._capture(step, scan.step.consts)
        carried = [self._new(v.aval) for v in step.invars[len(consts) :][: len(carry)]]
        slices = [
            self._slice(x, v.aval)
            for x, v in zip(xs, step.invars[len(consts) + len(carry) :], strict=True)
        ]
        inputs = (*carried, *slices)
        self.roots.update({v: f"the carry of {equation}" for v in inputs[: scan.carry]})
        self.roots.update({v: f"what {equation} runs over" for v in inputs[scan.carry :]})
        equations, outputs = self._flatten(step, captured, [*consts, *inputs])
        self._leaves_out(outputs, f"what leaves a step of {equation}")
        return Body((number,), scan, inputs, tuple(outputs), tuple(equations))

    def _block(self, equation: Equation, shards: ShardMap) -> Body:
        one = len(self._families)  # every shard_map is a family of its own
        names = {self._into((one, name), size): name for name, size in shards.sizes.items()}
        self.mesh_axes.update(names)
        captured = self._capture(shards.block.jaxpr, shards.block.consts)
        inputs = tuple(self._new(v.aval) for v in shards.block.jaxpr.invars)
        for x, v in zip(equation.inputs, inputs, strict=True):
            if isinstance(x, Var):
                self._slices_of.setdefault((x, self._scope), [v])
        self.roots.update({v: f"what {equation} is given" for v in inputs})
        equations, outputs = self._flatten(shards.block.jaxpr, captured, inputs)
        self._leaves_out(outputs, f"what leaves {equation}")
        return Body(tuple(names), shards, inputs, tuple(outputs), tuple(equations))

    def _slice(self, outer: Any, aval: Any) -> Var:
        """The variable of one step's slice: one and the same in all scans of a family that run over it."""
        if not isinstance(outer, Var):
            return self._new(aval)
        known = self._slices_of.setdefault((outer, self._scope), [])
        known.append(known[0] if known else self._new(aval))
        return known[0]

    def _view_once(self, equation: Equation) -> Var | None:
        """The variable that is this very view of a leaf already, or None; so two functions share what they cast."""
        x = equation.inputs[0] if len(equation.inputs) == 1 else None
        if (
            equation.name not in VIEWS
            or not isinstance(x, Var)
            or x not in self._leafy
            or self._scope
        ):
            return None
        key = (equation.name, x, str(equation.params))
        if key not in self._leafy_views:
            self._leafy_views[key] = equation.outputs[0]
            self._leafy.add(equation.outputs[0])
            return None
        return self._leafy_views[key]

    def _alive(self, equations: Sequence[Equation], alive: set[Var]) -> tuple[Equation, ...]:
        """The equations without dead code; what they read is added to `alive`."""
        kept = []
        for equation in reversed(equations):
            if alive.intersection(equation.outputs) or equation.origin.effects:
                if equation.body is not None:
                    alive.update(v for v in equation.body.outputs if isinstance(v, Var))
                    body = equation.body._replace(
                        equations=self._alive(equation.body.equations, alive)
                    )
                    equation = equation._replace(body=body)
                kept.append(equation)
                alive.update(equation.variables)
        return tuple(kept[::-1])


def _literal(atom: Any) -> Known:
    return Known(np.asarray(atom.val, atom.aval.dtype))


def _all(equations: Sequence[Equation]) -> Iterator[Equation]:
    for equation in equations:
        if equation.body is not None:
            yield from _all(equation.body.equations)
        yield equation
