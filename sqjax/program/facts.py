"""`Program`: a traced function as one list of equations, with its leaves named."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from sqjax.program.build import Atom as Atom
from sqjax.program.build import Body as Body
from sqjax.program.build import Equation as Equation
from sqjax.program.build import Flat
from sqjax.program.build import Var as Var
from sqjax.program.primitives import KEEP_A_FILL
from sqjax.program.subprograms import Scan
from sqjax.program.trace import Traced
from sqjax.program.views import VIEWS, View


class Program(Flat):
    """What is known of the variables of a traced function: which are leaves, seen how, read where.

    A body is a world of its own: what flows in and out of it, at every step or on every device, carries no scale. Only
    the slices or blocks of leaves are leaves inside too, with one scale vector a step, or for each device along a mesh
    axis that cuts them all.

    Attributes (besides those of `Flat`):
        leaves: {variable: path} of the parameter leaves, of their slices and blocks in bodies, and of `offsets`.
        offsets: {variable: c} of variables c + leaf (Gemma's 1 + w) that stand for the leaf: it has no other reader.
        barred: {variable: why it can carry no scale}.
        maker, readers: {variable: equation that makes it}, {variable: equations that read it}.
        from_leaves: variables computed from leaves and literals alone.
        picked: {variable: what picked it from a leaf by an index}: rows of an embedding, a layer of a stack.
        zeros: variables known to hold only zeros.
        views: {variable: View} of the variables that are a leaf, seen through `sqjax.views`.
        leaf_views: the same for `leaves`: how a variable's axes are the leaf's.
    """

    def __init__(self, traced: Traced):
        super().__init__(traced)
        self.offsets: dict[Var, float] = {}
        self.barred: dict[Var, str] = {}
        self._index()

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
            self.maker.update(dict.fromkeys(equation.outputs, equation))
            if equation.name in ("dynamic_slice", "gather"):
                self._pick(equation)
            if equation.body is None:
                for y in equation.outputs:
                    self._pass_on(equation, y)

    def _pass_on(self, equation: Equation, y: Var) -> None:
        """What is known of one result of an equation that runs no body, given its operands."""
        sources = equation.behind(y)
        if sources and all(v in self.from_leaves for v in sources):
            self.from_leaves.add(y)
        if equation.name in KEEP_A_FILL:
            position = equation.outputs.index(y)
            self._pass_constant(equation.inputs[position], y)
        if equation.name in VIEWS and len(sources) == 1:
            [x] = sources
            if x in self.picked:
                self.picked[y] = self.picked[x]
            if x in self.views:
                self._pass_view(equation, x, y)

    def _pick(self, equation: Equation) -> None:
        """Notes what an index picks from a leaf."""
        operand = equation.inputs[0]
        if operand in self.from_leaves:
            self.picked[equation.outputs[0]] = equation

    def _pass_constant(self, x: Atom, y: Var) -> None:
        """Copies of one literal are that literal; copies of zeros are zeros."""
        value = self._values.get(x) if isinstance(x, Var) else x.value
        if (
            value is not None
            and value.size == 1
            and jax.numpy.issubdtype(self.avals[y].dtype, np.number)
        ):
            self._values[y] = value.astype(self.avals[y].dtype)
        if self.is_zero(x):
            self.zeros.add(y)

    def _pass_view(self, equation: Equation, x: Var, y: Var) -> None:
        view = VIEWS[equation.name](self.views[x], equation.params, self.shape(x), self.shape(y))
        if view is not None and self.is_float(y):
            self.views[y] = view

    def _enter(self, equation: Equation, body: Body) -> None:
        """Slices and blocks of leaves are leaves in a body."""
        for outer, inner, part in _parts(equation, body):
            if not isinstance(outer, Var) or outer not in self.from_leaves:
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
            if not isinstance(leaf, Var):
                continue
            view = self.views.get(leaf)
            constant = self._values.get(other) if isinstance(other, Var) else other.value
            if view is None or view.places is None or constant is None or constant.size != 1:
                continue
            if (
                self.shape(leaf) != self.shape(y)
                or not constant.any()
                or not self._read_once(self._chain(leaf))
            ):
                continue
            self._is_leaf(y, view)
            self.offsets[y] = c = float(constant.item())
            del self.maker[y]
            narrow = min(
                (self.avals[v].dtype for v in (*self._chain(leaf), y)),
                key=lambda dtype: dtype.itemsize,
            )
            if narrow.itemsize < 4:
                self.barred[y] = (
                    f"{equation} computes {c:g} + {view.path}, in {narrow} too coarse to rescale: keep this leaf, and "
                    "that sum, in float32"
                )
            elif abs(c) > 256 or not (c * 256).is_integer():
                self.barred[y] = (
                    f"{equation} adds {c:g}, with which a sum can not be rescaled exactly"
                )

    def _chain(self, var: Var) -> list[Var]:
        """The variables from a leaf to a view of it."""
        chain = [var]
        while (v := chain[0]) in self.maker or v in self._slices:
            chain.insert(0, self.maker[v].behind(v)[0] if v in self.maker else self._slices[v])
        return chain

    def _read_once(self, variables: Sequence[Var]) -> bool:
        """Whether each of these variables is read at one place only."""
        return all(self._reads(v) <= 1 for v in variables)

    def _reads(self, var: Var) -> int:
        return sum(e.read.count(var) for e in self.readers.get(var, ())) + (var in self.outputs)

    def is_zero(self, atom: Atom) -> bool:
        """Whether an operand is known to hold only zeros."""
        return atom in self.zeros if isinstance(atom, Var) else not np.any(atom.value)

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
                stack += self.maker[v].behind(v)
        return paths

    def shape(self, atom: Atom) -> tuple[int, ...]:
        return tuple(self.avals[atom].shape if isinstance(atom, Var) else atom.value.shape)

    def is_float(self, atom: Atom) -> bool:
        """Whether an operand may carry a scale: float8 has too few exponents for that."""
        dtype = self.avals[atom].dtype if isinstance(atom, Var) else atom.value.dtype
        return jax.numpy.issubdtype(dtype, jax.numpy.floating) and dtype.itemsize > 1


def _parts(
    equation: Equation, body: Body
) -> Iterator[tuple[Any, Var, Callable[[View], View | None]]]:
    """(an operand, the variable that holds its slice or block in the body, the view of that given the operand's)."""
    if isinstance(body.call, Scan):
        [scan] = body.scopes
        _, _, xs = body.call.sort(equation.inputs)
        for outer, inner in zip(xs, body.inputs[body.call.carry :], strict=True):
            yield outer, inner, partial(View.slice_of_scan, scan=scan)
        return
    devices = {
        name: (scope, body.call.sizes[name])
        for name, scope in zip(body.call.sizes, body.scopes, strict=True)
    }
    for outer, inner, spec in zip(equation.inputs, body.inputs, body.call.in_specs, strict=True):
        cuts = {
            axis: [devices[name] for name in names] for axis, names in body.call.cuts(spec).items()
        }
        yield outer, inner, partial(View.block, cuts=cuts)
