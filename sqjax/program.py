"""`Program`: a traced function as one list of equations, with its leaves named and its dead code gone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from sqjax.equations import Scan, ShardMap, inner_program, plain, scan_in, shard_map_in, source_of
from sqjax.interpreter import Traced
from sqjax.views import VIEWS, View

Var = int


class Equation(NamedTuple):
    """One primitive applied to variables (numbers) or literals (arrays).

    Attributes:
        body: what a scan runs at every step, a shard_map on every device; None for everything else.
    """

    name: str
    inputs: tuple[Var | np.ndarray, ...]
    outputs: tuple[Var, ...]
    origin: JaxprEqn
    params: dict[str, Any]
    body: "Body | None" = None

    @property
    def variables(self) -> list[Var]:
        """The variables among its inputs."""
        return [v for v in self.inputs if isinstance(v, int)]

    @property
    def read(self) -> list[Var]:
        """The variables it reads itself; what a scan's body reads is read there."""
        consts = self.body.call.consts if self.body is not None and isinstance(self.body.call, Scan) else 0
        return [v for v in self.inputs[consts:] if isinstance(v, int)]

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
    outputs: tuple[Var | np.ndarray, ...]
    equations: tuple[Equation, ...]

    @property
    def everything(self) -> Iterator[Equation]:
        """The equations of this body and of those within."""
        return _all(self.equations)


class Program:
    """The program of `traced`; calls (jit, remat, custom gradients) and bodies (scan, shard_map) are written out.

    A body is a world of its own: what flows in and out of it, at every step or on every device, carries no scale. Only
    the slices or blocks of leaves are leaves inside too, with one scale vector a step, or for each device along a mesh
    axis that cuts them all. Scans of one length at one place are a
    family, and share the slices of a leaf that several of them run over (a prefill and a step over the same layers).

    Attributes:
        main: the equations that some output depends on, in order; those of scans and shard_maps hold their bodies.
        avals: the shape and dtype of every variable.
        scopes: for every variable the families of scans and the mesh axes, outermost first, in whose bodies it lives.
        lengths: {family of scans, or mesh axis: the number of steps, or devices}.
        mesh_axes: {mesh axis: its name} of those of shard_maps.
        leaves: {variable: path} of the parameter leaves, of their slices and blocks in bodies, and of `offsets`.
        offsets: {variable: c} of variables c + leaf (Gemma's 1 + w) that stand for the leaf: it has no other reader.
        roots: {variable: what it is} of the other variables that no equation makes: inputs, constants, carries.
        barred: {variable: why it can carry no scale}.
        results: what the function returns.
        outputs: {variable: what reads it} of results and of what leaves a body.
        constants: {variable: value} of the arrays that fn has captured.
        maker, readers: {variable: equation that makes it}, {variable: equations that read it}.
        from_leaves: variables computed from leaves and literals alone.
        picked: {variable: what picked it from a leaf by an index}: rows of an embedding, a layer of a stack.
        zeros: variables known to hold only zeros.
        views: {variable: View} of the variables that are a leaf, seen through `sqjax.views`.
        leaf_views: the same for `leaves`: how a variable's axes are the leaf's.
    """

    def __init__(self, traced: Traced):
        self.avals: list[Any] = []
        self.scopes: list[tuple[int, ...]] = []
        self.lengths: dict[int, int] = {}
        self.mesh_axes: dict[int, str] = {}
        self.leaves: dict[Var, str] = {}
        self.offsets: dict[Var, float] = {}
        self.roots: dict[Var, str] = {}
        self.barred: dict[Var, str] = {}
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
        self.main = self._alive(equations, {v for v in self.results if isinstance(v, int)})
        self._index()

    @property
    def equations(self) -> Iterator[Equation]:
        """All equations, those of a body before the one that runs it."""
        return _all(self.main)

    def _new(self, aval: Any) -> Var:
        self.avals.append(aval)
        self.scopes.append(self._scope)
        return len(self.avals) - 1

    def _capture(self, jaxpr: Jaxpr, values: Sequence[Any]) -> list[Var]:
        captured = [self._new(v.aval) for v in jaxpr.constvars]
        self.roots.update(dict.fromkeys(captured, "a constant captured by fn"))
        self.constants.update(zip(captured, values, strict=True))
        return captured

    def _leaves_out(self, atoms: Sequence[Any], what: str) -> None:
        self.outputs.update({v: what for v in atoms if isinstance(v, int) and v not in self.outputs})

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
                written, results = self._flatten(inner.jaxpr, self._capture(inner.jaxpr, inner.consts), operands)
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
        slices = [self._slice(x, v.aval) for x, v in zip(xs, step.invars[len(consts) + len(carry) :], strict=True)]
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
            if isinstance(x, int):
                self._slices_of.setdefault((x, self._scope), [v])
        self.roots.update({v: f"what {equation} is given" for v in inputs})
        equations, outputs = self._flatten(shards.block.jaxpr, captured, inputs)
        self._leaves_out(outputs, f"what leaves {equation}")
        return Body(tuple(names), shards, inputs, tuple(outputs), tuple(equations))

    def _slice(self, outer: Any, aval: Any) -> Var:
        """The variable of one step's slice: one and the same in all scans of a family that run over it."""
        if not isinstance(outer, int):
            return self._new(aval)
        known = self._slices_of.setdefault((outer, self._scope), [])
        known.append(known[0] if known else self._new(aval))
        return known[0]

    def _view_once(self, equation: Equation) -> Var | None:
        """The variable that is this very view of a leaf already, or None; so two functions share what they cast."""
        x = equation.inputs[0] if len(equation.inputs) == 1 else None
        if equation.name not in VIEWS or not isinstance(x, int) or x not in self._leafy or self._scope:
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
                    alive.update(v for v in equation.body.outputs if isinstance(v, int))
                    body = equation.body._replace(equations=self._alive(equation.body.equations, alive))
                    equation = equation._replace(body=body)
                kept.append(equation)
                alive.update(equation.variables)
        return tuple(kept[::-1])

    def _index(self) -> None:
        self.maker: dict[Var, Equation] = {}
        self.readers: dict[Var, list[Equation]] = {}
        self.from_leaves: set[Var] = set(self.leaves)
        self.zeros: set[Var] = set()
        self.picked: dict[Var, Equation] = {}
        self.leaf_views = {v: View.of(path, self.shape(v)) for v, path in self.leaves.items()}
        self.views = {v: view for v, view in self.leaf_views.items() if self.is_float(v)}
        self._values: dict[Var, np.ndarray] = {}
        self._slices: dict[Var, Var] = {}
        self.scanned: dict[Var, Var] = {}
        self._visit(self.main)
        for equation in self.equations:
            for v in set(equation.read):
                self.readers.setdefault(v, []).append(equation)
        for var, outer in self._slices.items():
            slices = self._slices_of[outer, self.scopes[var]]
            if not self._read_once(self._chain(outer)[:-1]) or self._reads(outer) != len(slices):
                body = "shard_map" if self.scopes[var][-1] in self.mesh_axes else "scan"
                self.barred[var] = f"{self.leaves[var]} is read outside this {body} too"
        for equation in [e for e in self.equations if e.name == "add"]:
            self._note_offset(equation)

    def _visit(self, equations: Sequence[Equation]) -> None:
        """Passes on, in order of execution, what is known of variables: makers, leaves, zeros, views."""
        for equation in equations:
            if equation.body is not None:
                self._enter(equation, equation.body)
                self._visit(equation.body.equations)
            variables = equation.variables
            self.maker.update(dict.fromkeys(equation.outputs, equation))
            if variables and all(v in self.from_leaves for v in variables) and equation.body is None:
                self.from_leaves.update(equation.outputs)
            if equation.name in _KEEPS_VALUES:
                self._pass_constant(equation)
            if equation.name in ("dynamic_slice", "gather") and equation.inputs[0] in self.from_leaves:
                self.picked[equation.outputs[0]] = equation
            elif equation.name in VIEWS and variables and variables[0] in self.picked:
                self.picked[equation.outputs[0]] = self.picked[variables[0]]
            if equation.name in VIEWS and len(variables) == 1 and variables[0] in self.views:
                self._pass_view(variables[0], equation)

    def _pass_constant(self, equation: Equation) -> None:
        """Copies of one literal are that literal; copies of zeros are zeros."""
        x, y = equation.inputs[0], equation.outputs[0]
        value = self._values.get(x) if isinstance(x, int) else x
        if value is not None and value.size == 1 and jax.numpy.issubdtype(self.avals[y].dtype, np.number):
            self._values[y] = value.astype(self.avals[y].dtype)
        if self.is_zero(x):
            self.zeros.add(y)

    def _pass_view(self, x: Var, equation: Equation) -> None:
        y = equation.outputs[0]
        view = VIEWS[equation.name](self.views[x], equation.params, self.shape(x), self.shape(y))
        if view is not None and self.is_float(y):
            self.views[y] = view

    def _enter(self, equation: Equation, body: Body) -> None:
        """Slices and blocks of leaves are leaves in a body."""
        for outer, inner, part in _parts(equation, body):
            if not isinstance(outer, int) or outer not in self.from_leaves:
                continue
            self.from_leaves.add(inner)
            self.scanned[inner] = outer
            if outer in self.views and (view := part(self.views[outer])) is not None:
                self.views[inner] = view
                if view.places is not None:
                    self._slices[inner] = outer
                    self._is_leaf(inner, view)
                    self.roots.pop(inner, None)

    def _is_leaf(self, var: Var, view: View) -> None:
        self.leaves[var], self.leaf_views[var] = view.path, view

    def _note_offset(self, equation: Equation) -> None:
        """c + w stands for the leaf w where w has no other reader: w' = (c + w) / s - c rescales it."""
        y = equation.outputs[0]
        for leaf, other in (equation.inputs, equation.inputs[::-1]):
            if not isinstance(leaf, int):
                continue
            view = self.views.get(leaf)
            constant = self._values.get(other) if isinstance(other, int) else other
            if view is None or view.places is None or constant is None or constant.size != 1:
                continue
            if self.shape(leaf) != self.shape(y) or not constant.any() or not self._read_once(self._chain(leaf)):
                continue
            self._is_leaf(y, view)
            self.offsets[y] = c = float(constant.item())
            del self.maker[y]
            narrow = min((self.avals[v].dtype for v in (*self._chain(leaf), y)), key=lambda dtype: dtype.itemsize)
            if narrow.itemsize < 4:
                self.barred[y] = (
                    f"{equation} computes {c:g} + {view.path}, in {narrow} too coarse to rescale: keep this leaf, and "
                    "that sum, in float32"
                )
            elif abs(c) > 256 or not (c * 256).is_integer():
                self.barred[y] = f"{equation} adds {c:g}, with which a sum can not be rescaled exactly"

    def _chain(self, var: Var) -> list[Var]:
        """The variables from a leaf to a view of it."""
        chain = [var]
        while (v := chain[0]) in self.maker or v in self._slices:
            made = self.maker[v].inputs if v in self.maker else (self._slices[v],)
            chain.insert(0, next(x for x in made if isinstance(x, int)))
        return chain

    def _read_once(self, variables: Sequence[Var]) -> bool:
        """Whether each of these variables is read at one place only."""
        return all(self._reads(v) <= 1 for v in variables)

    def _reads(self, var: Var) -> int:
        return sum(e.read.count(var) for e in self.readers.get(var, ())) + (var in self.outputs)

    def is_zero(self, atom: Var | np.ndarray) -> bool:
        """Whether an operand is known to hold only zeros."""
        return atom in self.zeros if isinstance(atom, int) else not np.any(atom)

    def touching(self, var: Var) -> list[Equation]:
        """The equations a variable stands in: its maker, then its readers."""
        return [*([self.maker[var]] if var in self.maker else []), *self.readers.get(var, [])]

    def leaves_behind(self, var: Var) -> set[str]:
        """The paths of the leaves that a variable is computed from."""
        paths, seen, stack = set(), set(), [var]
        while stack:
            if (v := stack.pop()) in seen:
                continue
            seen.add(v)
            if v in self.leaves:
                paths.add(self.leaves[v])
            elif v in self.scanned:
                stack.append(self.scanned[v])
            elif v in self.maker:
                stack += self.maker[v].variables
        return paths

    def shape(self, atom: Var | np.ndarray) -> tuple[int, ...]:
        return tuple(self.avals[atom].shape if isinstance(atom, int) else atom.shape)

    def is_float(self, atom: Var | np.ndarray) -> bool:
        """Whether an operand may carry a scale: float8 has too few exponents for that."""
        dtype = self.avals[atom].dtype if isinstance(atom, int) else atom.dtype
        return jax.numpy.issubdtype(dtype, jax.numpy.floating) and dtype.itemsize > 1


def _parts(equation: Equation, body: Body) -> Iterator[tuple[Any, Var, Callable[[View], View | None]]]:
    """(an operand, the variable that holds its slice or block in the body, the view of that given the operand's)."""
    if isinstance(body.call, Scan):
        [scan] = body.scopes
        _, _, xs = body.call.sort(equation.inputs)
        for outer, inner in zip(xs, body.inputs[body.call.carry :], strict=True):
            yield outer, inner, partial(View.slice_of_scan, scan=scan)
        return
    devices = {name: (scope, body.call.sizes[name]) for name, scope in zip(body.call.sizes, body.scopes, strict=True)}
    for outer, inner, spec in zip(equation.inputs, body.inputs, body.call.in_specs, strict=True):
        cuts = {axis: [devices[name] for name in names] for axis, names in body.call.cuts(spec).items()}
        yield outer, inner, partial(View.block, cuts=cuts)


def _literal(atom: Any) -> np.ndarray:
    return np.asarray(atom.val, atom.aval.dtype)


def _all(equations: Sequence[Equation]) -> Iterator[Equation]:
    for equation in equations:
        if equation.body is not None:
            yield from _all(equation.body.equations)
        yield equation


_KEEPS_VALUES = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose", "copy", "pvary"}
