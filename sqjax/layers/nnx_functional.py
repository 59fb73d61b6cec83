"""Flax NNX: a module as a pure function of its parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal
from jaxtyping import Array

from sqjax._trees import PyTree, named_leaves
from sqjax.program.subprograms import inner_program
from sqjax.program.trace import trace
from sqjax.weights.qtensor import tensor_type
from sqjax.weights.quant_weight import is_quantized


class QuantParam(nnx.Variable):
    """The NNX variable that holds a `QuantWeight`. It is no `nnx.Param`, so `nnx.grad` and optimizers pass it over."""


@dataclass(frozen=True, eq=False)
class Functional:
    """fn(params, *args, **kwargs) of an NNX module; `functional` makes it.

    Two are equal, and share what is compiled, if their modules have the same structure, the same method and bit for
    bit the same constants.

    Attributes:
        graphdef: the module without its values.
        names: {path: key in NNX's state} of the parameters, as pairs.
        constants: NNX's state of everything that is no parameter.
        method: the name of the method that is called.
        discard: whether changes of the module's state by the call are dropped without a word.
    """

    graphdef: Any
    names: tuple[tuple[str, tuple[Any, ...]], ...]
    constants: Any
    method: str
    discard: bool

    def __call__(self, params: PyTree, *args: Any, **kwargs: Any) -> Any:
        """Calls the module that holds `params`.

        Raises:
            ValueError: params are not the module's; or the call changes the module's state, and `discard` is False.
        """
        module = self.module(params)
        before = _values(module)
        out = getattr(module, self.method)(*args, **kwargs)
        if not self.discard and _differing(before, _values(module)):
            self._check_unchanged(params, args, kwargs)
        return out

    def module(self, params: PyTree) -> Any:
        """A new module of the original class that holds `params` and the constants."""
        paths, leaves, _ = named_leaves(params, is_leaf=is_quantized)
        values, keys = dict(zip(paths, leaves, strict=True)), dict(self.names)
        missing, unknown = (
            [p for p in keys if p not in values],
            [p for p in values if p not in keys],
        )
        if missing or unknown:
            raise ValueError(
                f"the parameters are not this module's: missing {missing[:5]}, unknown {unknown[:5]}; pass the tree "
                "that sqjax.nnx.functional returned, or what sqjax made of it"
            )
        state = nnx.from_flat_state({keys[path]: value for path, value in values.items()})
        return nnx.merge(self.graphdef, state, _copied(self.constants))

    def _check_unchanged(self, params: PyTree, args: Any, kwargs: Any) -> None:
        """Raises ValueError naming what the call changes; values that only pass through nnx.jit are not changed."""

        def run(_, params, constants, args, kwargs):
            module = Functional(self.graphdef, self.names, constants, self.method, True).module(
                params
            )
            before = _values(module)
            getattr(module, self.method)(*args, **kwargs)
            return before, _values(module)

        traced, _ = trace(run, {}, (params, self.constants, args, kwargs), {}, of_args=tensor_type)
        variables = jax.tree.unflatten(
            traced.treedef, _sources(traced.jaxpr.jaxpr, traced.jaxpr.jaxpr.invars)
        )
        if changed := _differing(*variables):
            raise ValueError(
                f"{changed[0]}: the call changes this variable ({len(changed)} in all), and a pure function would lose "
                "that; call module.eval() before sqjax.nnx.functional (dropout and batch statistics), switch "
                "the cache off, or pass discard=True if the change may be lost (what nnx.scan or nnx.cond hands back "
                "counts as changed)"
            )

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Functional):
            return self is other
        same = self._static == other._static
        return same and all(
            map(_identical, jax.tree.leaves(self.constants), jax.tree.leaves(other.constants))
        )

    def __hash__(self) -> int:
        return hash(self._static)

    def __repr__(self) -> str:
        return f"<{self.method} of an NNX module of {len(self.names)} parameters>"

    @property
    def _static(self) -> tuple[Any, ...]:
        return (
            self.graphdef,
            self.names,
            jax.tree.structure(self.constants),
            self.method,
            self.discard,
        )


def functional(
    module: nnx.Module, *, method: str = "__call__", discard: bool = False
) -> tuple[Callable[..., Any], dict[Any, Any]]:
    """An NNX module as (fn, params), with fn(params, *args, **kwargs) a pure function: what `calibrate` takes.

    Only what stands in `nnx.Param` is a parameter (and a `QuantWeight` in a `QuantParam`). Everything else (batch
    statistics, RNG state, buffers) is kept by `fn` as it is now, as constants. A Param that the module holds twice
    stands in the tree once, under its first path. The module itself is not touched.

    `fn` can be hashed, and functions of modules of one structure are equal, so `quantized(fn)` and `jax.jit` keep what
    they have compiled.

    Args:
        module: any `nnx.Module`; call `module.eval()` first where dropout or batch statistics are in it.
        method: the method that `fn` calls.
        discard: what to do where the call changes the module's state (the RNG of dropout, batch statistics, a KV
            cache): False refuses when `fn` is called, True drops the change, so that every call starts from the same
            state. Intermediates that the module sows are always dropped.

    Returns:
        (fn, params): params is a nested dict of arrays, whose paths read "layers/0/kernel".

    Raises:
        ValueError: a Param holds something other than an array.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> from flax import nnx
        >>> fn, params = sq.nnx.functional(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> {name: x.shape for name, x in params.items()}
        {'bias': (2,), 'kernel': (3, 2)}
        >>> fn(params, jnp.ones((1, 3))).shape
        (1, 2)
    """
    graphdef, *states = nnx.split(module, _is_parameter, ...)
    state, constants = states
    flat = [(path, variable.get_value()) for path, variable in nnx.to_flat_state(state)]
    for path, value in flat:
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise ValueError(
                f"{_name(path)}: a Param of one array is expected, got {type(value).__name__}; split it"
            )
    names = tuple((_name(path), path) for path, _ in flat)
    return Functional(graphdef, names, _copied(constants), method, discard), nnx.to_pure_dict(state)


def _is_parameter(path: Any, value: Any) -> bool:
    held = isinstance(value, nnx.Param | QuantParam)
    return held and value.get_value() is not None


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _copied(state: Any) -> Any:
    """The state in new variables; arrays of numpy, which can be written to, are copied."""
    return jax.tree.map(lambda x: jnp.array(x) if isinstance(x, np.ndarray) else x, state)


def _values(module: nnx.Module) -> dict[str, list[Any]]:
    """{path: what the variable holds}, without what the module has sown."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {
        _name(path): jax.tree.leaves(x) for path, x in flat if not isinstance(x, nnx.Intermediate)
    }


def _differing(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    """The names of what is not the same object as before, or was not there."""
    return [
        name
        for name, new in after.items()
        if list(map(id, new)) != list(map(id, before.get(name, ())))
    ]


def _sources(jaxpr: Any, inputs: list[Any]) -> list[Any]:
    """For every output of a program: the input that it is, passed on through calls untouched, or a new object."""
    env = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return object() if isinstance(atom, Literal) else env.setdefault(atom, object())

    for equation in jaxpr.eqns:
        inner, operands = inner_program(equation), [read(atom) for atom in equation.invars]
        results = (
            [object() for _ in equation.outvars]
            if inner is None
            else _sources(inner.jaxpr, operands)
        )
        env.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _identical(a: Any, b: Any) -> bool:
    """Whether two constants are the same bits, so that a program that holds one serves for the other."""
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b
    if not (isinstance(a, jax.Array) and isinstance(b, jax.Array)):
        return type(a) is type(b) and bool(a == b)
    return jax.typeof(a) == jax.typeof(b) and _bits(a) == _bits(b)


def _bits(x: Array) -> bytes:
    with jax.ensure_compile_time_eval():  # also while a jitted function is traced
        return np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ).tobytes()
