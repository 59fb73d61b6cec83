"""Flax NNX: a module as a pure function of its parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array

from sqjax._arguments import expect
from sqjax._trees import PyTree, named_leaves
from sqjax.program.subprograms import handed_through
from sqjax.program.trace import trace
from sqjax.weights.qtensor import tensor_type
from sqjax.weights.quant_weight import is_quantized


class QuantParam(nnx.Variable):
    """The NNX variable that holds a `QuantWeight`.

    It is no `nnx.Param`, so that `nnx.grad` and optimizers pass it over.
    """


@dataclass(frozen=True, eq=False)
class Functional:
    """fn(params, *args, **kwargs) of an NNX module; `functional` makes it.

    Two are equal, and share what is compiled, if their modules have the same structure, the same
    method and bit for bit the same constants.

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
            ValueError: params are not the module's; or the call changes the module's state, and
                `discard` is False.
        """
        module = self.module(params)
        before = _values(module)
        out = getattr(module, self.method)(*args, **kwargs)
        if not self.discard and _differing(before, _values(module)):
            # Some variable holds another object. That may be its old value passed through nnx.jit,
            # so only now is the costlier question asked.
            self._check_unchanged(params, args, kwargs)
        return out

    def module(self, params: PyTree) -> Any:
        """A new module of the original class that holds `params` and the constants."""
        paths, leaves, _ = named_leaves(params, is_leaf=is_quantized)
        keys = dict(self.names)
        missing = sorted(keys.keys() - set(paths))
        unknown = sorted(set(paths) - keys.keys())
        if missing or unknown:
            raise ValueError(
                f"the parameters are not this module's: missing {missing[:5]}, "
                f"unknown {unknown[:5]}; pass the tree that sqjax.nnx.functional returned, or "
                "what sqjax made of it"
            )
        # By NNX's own keys, because a path says "0" both for an index of a list and for a name.
        state = {
            keys[path]: leaf for path, leaf in zip(paths, leaves, strict=True)
        }
        return nnx.merge(
            self.graphdef, nnx.from_flat_state(state), _copied(self.constants)
        )

    def _check_unchanged(self, params: PyTree, args: Any, kwargs: Any) -> None:
        """Raises ValueError naming what the call changes.

        A variable that went through nnx.jit holds a new object of the same value. So the call is
        traced, and a variable counts as unchanged if the program hands its input on untouched.
        """

        def states_around_call(_, params, constants, args, kwargs):
            # This function with the constants as inputs, so that they are seen to change too.
            fn = Functional(
                self.graphdef, self.names, constants, self.method, discard=True
            )
            module = fn.module(params)
            before = _values(module)
            getattr(module, self.method)(*args, **kwargs)
            return before, _values(module)

        # All that the module holds is an input here, so that each variable has a source.
        inputs = (params, self.constants, args, kwargs)
        traced, _ = trace(
            states_around_call, {}, inputs, {}, of_args=tensor_type
        )
        inputs_of = traced.jaxpr.jaxpr.invars
        handed = handed_through(traced.jaxpr)
        # For every output the input that it is, or a new object.
        sources = []
        for i in range(len(traced.jaxpr.jaxpr.outvars)):
            sources.append(inputs_of[handed[i]] if i in handed else object())
        before, after = jax.tree.unflatten(traced.treedef, sources)
        changed = _differing(before, after)
        if changed:
            raise ValueError(
                f"{changed[0]}: the call changes this variable ({len(changed)} in all), and a "
                "pure function would lose that; call module.eval() before sqjax.nnx.functional "
                "(dropout and batch statistics), switch the cache off, or pass discard=True if "
                "the change may be lost"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Functional):
            return False
        if self is other:
            return True
        if self._static != other._static:
            return False
        own, others = (
            jax.tree.leaves(self.constants),
            jax.tree.leaves(other.constants),
        )
        return all(map(_identical, own, others))

    def __hash__(self) -> int:
        return hash(self._static)

    def __repr__(self) -> str:
        return (
            f"<{self.method} of an NNX module of {len(self.names)} parameters>"
        )

    @property
    def _static(self) -> tuple[Any, ...]:
        """What can be hashed: all but the values of the constants."""
        structure = jax.tree.structure(self.constants)
        return (self.graphdef, self.names, structure, self.method, self.discard)


def functional(
    module: nnx.Module, *, method: str = "__call__", discard: bool = False
) -> tuple[Callable[..., Any], dict[Any, Any]]:
    """An NNX module as (fn, params): fn(params, *args, **kwargs) is pure, as `calibrate` needs it.

    Only what stands in `nnx.Param` is a parameter (and a `QuantWeight` in a `QuantParam`).
    Everything else (batch statistics, RNG state, buffers) is kept by `fn` as it is now, as
    constants. A Param that the module holds twice stands in the tree once, under its first path.
    The module itself is not touched.

    `fn` can be hashed, and functions of modules of one structure are equal, so `quantized(fn)`
    and `jax.jit` keep what they have compiled.

    Args:
        module: any `nnx.Module`; call `module.eval()` first where dropout or batch statistics are
            in it.
        method: the method that `fn` calls.
        discard: what to do where the call changes the module's state (the RNG of dropout, batch
            statistics, a KV cache): False refuses when `fn` is called, True drops the change, so
            that every call starts from the same state. Intermediates that the module sows are
            always dropped.

    Returns:
        (fn, params): params is a nested dict of arrays, whose paths read "layers/0/kernel".

    Raises:
        ValueError: a Param holds something other than an array.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> from flax import nnx
        >>> fn, params = sq.nnx.functional(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> {name: x.shape for name, x in params.items()}
        {'bias': (2,), 'kernel': (3, 2)}
        >>> fn(params, jnp.ones((1, 3))).shape
        (1, 2)
    """
    # `...` is the rest: whatever is no parameter is a constant of the function.
    expect(
        isinstance(module, nnx.Module),
        "functional",
        "an NNX module (a function of (params, *inputs) needs no conversion)",
        module,
    )
    graphdef, *states = nnx.split(module, _is_parameter, ...)
    parameters, constants = states
    names = []
    for path, variable in nnx.to_flat_state(parameters):
        value = variable.get_value()
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise ValueError(
                f"{_name(path)}: expected a Param of one array, got one of "
                f"{type(value).__name__}; split it"
            )
        names.append((_name(path), path))
    fn = Functional(graphdef, tuple(names), _copied(constants), method, discard)
    return fn, nnx.to_pure_dict(parameters)


def _is_parameter(path: Any, value: Any) -> bool:
    # A Param of None is how NNX writes "no bias".
    held = isinstance(value, nnx.Param | QuantParam)
    return held and value.get_value() is not None


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _copied(state: Any) -> Any:
    """The state in new variables; arrays of numpy, which can be written to, are copied."""

    def own(x: Any) -> Any:
        return jnp.array(x) if isinstance(x, np.ndarray) else x

    return jax.tree.map(own, state)


def _values(module: nnx.Module) -> dict[str, list[Any]]:
    """{path: what the variable holds}, without what the module has sown."""
    values = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if not isinstance(variable, nnx.Intermediate):
            values[_name(path)] = jax.tree.leaves(variable)
    return values


def _differing(
    before: dict[str, list[Any]], after: dict[str, list[Any]]
) -> list[str]:
    """The names of what is not the same object as before, or was not there.

    Objects and not values are compared, because values may be tracers.
    """
    names = []
    for name, new in after.items():
        old = before.get(name, [])
        if list(map(id, new)) != list(map(id, old)):
            names.append(name)
    return names


def _identical(a: Any, b: Any) -> bool:
    """Whether two constants are the same bits: a program that holds one serves for the other."""
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False  # a tracer has no bits to compare
    # Bits and not values: NaN is equal to itself, and 0.0 and -0.0 are two constants.
    if isinstance(a, jax.Array) and isinstance(b, jax.Array):
        return jax.typeof(a) == jax.typeof(b) and _bits(a) == _bits(b)
    return type(a) is type(b) and bool(a == b)


def _bits(x: Array) -> bytes:
    """The bytes of an array, of random keys too."""
    # Constants have values while a jitted function is traced; the context computes with them then.
    with jax.ensure_compile_time_eval():
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes()


def check_plain(layer: nnx.Module, product: dict[str, Any], where: str) -> None:
    """Raises ValueError if a layer computes its product in a way of its own.

    `product` is {the field that holds the product: what stands there in Flax's own layer}.
    """
    plain = {
        **product,
        "promote_dtype": promote_dtype,
        "preferred_element_type": None,
    }
    for name, default in plain.items():
        if getattr(layer, name) is not default:
            raise ValueError(
                f"{where}: the layer has a {name} of its own, which int8 would drop; "
                "keep it in float"
            )
