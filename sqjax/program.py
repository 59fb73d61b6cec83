"""`Program`: a traced function as one flat list of equations, with its leaves named and its dead code gone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from sqjax.interpreter import Traced, inner_program, source_of

Var = int


class Equation(NamedTuple):
    """One primitive applied to variables (numbers) or literals (arrays)."""

    name: str
    inputs: tuple[Var | np.ndarray, ...]
    outputs: tuple[Var, ...]
    origin: JaxprEqn

    @property
    def params(self) -> dict[str, Any]:
        return self.origin.params

    @property
    def runs_a_program(self) -> bool:
        return any(True for _ in jaxprs_in_params(self.params))

    def __str__(self) -> str:
        return f"`{self.name}` at {source_of(self.origin)}"


class View(NamedTuple):
    """A leaf seen through transposes and casts: axis i of the view is axis `axes[i]` of the leaf."""

    path: str
    axes: tuple[int, ...]


#: The primitives that keep a leaf a leaf: how a view's axes pass through, given the equation's parameters.
VIEWS: dict[str, Callable[[Any, tuple[int, ...]], tuple[int, ...]]] = {
    "transpose": lambda params, axes: tuple(axes[p] for p in params["permutation"]),
    "convert_element_type": lambda params, axes: axes,
    "copy": lambda params, axes: axes,
}


class Program:
    """The flat program of `traced`; calls (jit, remat, custom gradients) are written out in place.

    Attributes:
        equations: in order, those that some output depends on.
        avals: the shape and dtype of every variable.
        leaves: {variable: path} of the parameter leaves.
        roots: {variable: what it is} of the other variables that no equation makes: inputs and constants.
        outputs: the variables that the function returns.
        maker, readers: {variable: equation that makes it}, {variable: equations that read it}.
        from_leaves: variables computed from leaves and literals alone.
        zeros: variables known to hold only zeros.
        views: {variable: View} of the variables that are a leaf, transposed or cast.
    """

    def __init__(self, traced: Traced):
        self.equations: list[Equation] = []
        self.avals: list[Any] = []
        self.leaves: dict[Var, str] = {}
        self.roots: dict[Var, str] = {}
        jaxpr = traced.jaxpr.jaxpr
        constants = [self._root(v.aval, "a constant captured by fn") for v in jaxpr.constvars]
        inputs = [self._new(v.aval) for v in jaxpr.invars]
        self.leaves.update(zip(inputs, traced.paths, strict=False))
        for number, v in enumerate(inputs[len(traced.paths) :]):
            self.roots[v] = f"input {number} of fn"
        results = self._flatten(jaxpr, constants, inputs)
        self.outputs = frozenset(v for v in results if isinstance(v, int))
        self._drop_dead_code()
        self._index()

    def _new(self, aval: Any) -> Var:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _root(self, aval: Any, what: str) -> Var:
        var = self._new(aval)
        self.roots[var] = what
        return var

    def _flatten(self, jaxpr: Jaxpr, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

        def read(atom):
            return np.asarray(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(read(v) for v in eqn.invars)
            if (inner := inner_program(eqn)) is not None:
                held = [self._root(v.aval, "a constant captured by fn") for v in inner.jaxpr.constvars]
                results = self._flatten(inner.jaxpr, held, operands)
            else:
                results = [self._new(v.aval) for v in eqn.outvars]
                self.equations.append(Equation(eqn.primitive.name, operands, tuple(results), eqn))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _drop_dead_code(self) -> None:
        alive, kept = set(self.outputs), []
        for equation in reversed(self.equations):
            if alive.intersection(equation.outputs) or equation.origin.effects:
                kept.append(equation)
                alive.update(v for v in equation.inputs if isinstance(v, int))
        self.equations = kept[::-1]

    def _index(self) -> None:
        self.maker: dict[Var, Equation] = {}
        self.readers: dict[Var, list[Equation]] = {}
        self.from_leaves: set[Var] = set(self.leaves)
        self.zeros: set[Var] = set()
        self.views = {v: View(p, tuple(range(len(self.shape(v))))) for v, p in self.leaves.items() if self.is_float(v)}
        for equation in self.equations:
            variables = [v for v in equation.inputs if isinstance(v, int)]
            for v in variables:
                self.readers.setdefault(v, []).append(equation)
            self.maker.update(dict.fromkeys(equation.outputs, equation))
            if variables and all(v in self.from_leaves for v in variables):
                self.from_leaves.update(equation.outputs)
            if equation.name in _KEEPS_ZEROS and self.is_zero(equation.inputs[0]):
                self.zeros.update(equation.outputs)
            if equation.name in VIEWS and variables and self.is_float(equation.outputs[0]):
                (x,), (y,) = variables, equation.outputs
                if x in self.views:
                    path, axes = self.views[x]
                    self.views[y] = View(path, VIEWS[equation.name](equation.params, axes))

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
            elif v in self.maker:
                stack += [x for x in self.maker[v].inputs if isinstance(x, int)]
        return paths

    def shape(self, atom: Var | np.ndarray) -> tuple[int, ...]:
        return tuple(self.avals[atom].shape if isinstance(atom, int) else atom.shape)

    def is_float(self, atom: Var | np.ndarray) -> bool:
        """Whether an operand may carry a scale: float8 has too few exponents for that."""
        dtype = self.avals[atom].dtype if isinstance(atom, int) else atom.dtype
        return jax.numpy.issubdtype(dtype, jax.numpy.floating) and dtype.itemsize > 1


_KEEPS_ZEROS = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose", "copy"}
