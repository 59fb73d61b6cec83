"""int8 attention: the batched matmuls of two activations, q k^T and p V, on int8.

The program is walked with its parameters as leaves, and what is computed from leaves alone is a
leaf again. So a batched matmul in which no operand is a leaf is one of two activations.
"""

import functools
import math
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Array

from sqjax._arguments import check_function
from sqjax._shapes import sizes_along
from sqjax._trees import named_leaves
from sqjax.numerics.dots import LONGEST_CONTRACTION, DimensionNumbers, int8_dot
from sqjax.program.registry import Kind, Registry, Special
from sqjax.program.subprograms import emit
from sqjax.program.trace import trace
from sqjax.program.walk import run
from sqjax.runtime.shared_rules import barrier
from sqjax.weights.qtensor import tensor_type


def int8_attention(
    fn: Callable[..., Any],
    granularity: Literal["per_token", "per_tensor"] = "per_token",
) -> Callable[..., Any]:
    """`fn` with attention's q k^T and p V on int8 (the paper's INT8 BMM).

    These are the batched matmuls of two activations. Both operands are quantized at run time,
    symmetric. A batched matmul with an operand that is computed from parameters alone (a stack of
    experts) stays as it is, and so does every other matmul: compose with `quantized` for those. The
    values' scales of a causal attention are taken over all its tokens, later ones too. The
    derivative is that of the float matmul (straight-through).

    Args:
        fn: fn(params, *args), as for `calibrate`; calibrate and verify `fn` itself, not the result.
        granularity: "per_token": a scale for every row (token and head) of q, k and p, and every
            channel of V: whatever is not summed over. "per_tensor": one scale for each operand.

    Raises:
        ValueError: `fn` is no function, but a model or a tree.
        ValueError: when called, if a batched matmul sums over more than 133,144 products.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"])
        >>> params, x = {"q": jnp.eye(2), "k": jnp.eye(2)}, jnp.array([[[1.0, 2.0], [3.0, 1.0]]])
        >>> jax.jit(sq.int8_attention(fn))(params, x).round(1).tolist()
        [[[5.0, 5.0], [5.0, 10.0]]]
    """
    check_function(fn, "int8_attention", "(fn)(params, *inputs)")
    if granularity not in ("per_token", "per_tensor"):
        raise ValueError(
            f"int8_attention: expected granularity per_token or per_tensor, got {granularity!r}"
        )
    rules = _rules(granularity)

    @functools.wraps(fn)
    def wrapper(params, *args, **kwargs):
        # Taken apart whole, so that the arrays of a quantized weight are leaves of their own: `fn`
        # may be `quantized(...)`, whose program computes with them.
        paths, leaves, treedef = named_leaves(params)

        def of_leaves(leaves, *args, **kwargs):
            return fn(
                jax.tree_util.tree_unflatten(treedef, leaves), *args, **kwargs
            )

        traced, inputs = trace(
            of_leaves, leaves, args, kwargs, of_args=tensor_type
        )
        own = [Special(path, x) for path, x in zip(paths, leaves, strict=True)]
        outputs = run(traced.jaxpr, [*own, *inputs], rules)
        return jax.tree_util.tree_unflatten(traced.treedef, outputs)

    return wrapper


def _rules(granularity: str) -> Registry:
    """The rules of a walk in which parameters, and what is computed from them alone, are leaves."""

    def dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Any:
        # A product with a parameter is a matmul with weights, or with a stack of experts.
        of_parameters = isinstance(lhs, Special) or isinstance(rhs, Special)
        if of_parameters or not _is_batched(equation):
            return _as_it_was(equation, lhs, rhs)
        dimensions = equation.params["dimension_numbers"]
        _check_length(lhs, dimensions)
        result: Any = equation.outvars[0].aval
        return int8_dot(dimensions, granularity, lhs, rhs).astype(result.dtype)

    # A scan may slice a leaf, and a shard_map shard it, as any array. What a loop carries becomes
    # an activation, because its later steps may put anything in the place of a parameter.
    parameters = Kind(
        object,  # an array of any class
        otherwise=_as_it_was,
        slices=lambda equation, leaf, length: leaf,
        specs=lambda equation, leaf, spec: Special(leaf.path, spec),
        carry=lambda equation, leaf: leaf.value,
        leave=lambda leaf: leaf.value,
    )
    rules = Registry(parameters, concerns=_has_batched)
    rules.register(("dot_general",), parameters)(dot)
    rules.register(("optimization_barrier",), parameters)(barrier)
    return rules


def _check_length(lhs: Array, dimensions: DimensionNumbers) -> None:
    """Raises ValueError if an int32 sum over the contracted axes could overflow."""
    (contracted, _), _ = dimensions
    products = math.prod(sizes_along(lhs.shape, contracted))
    if products > LONGEST_CONTRACTION:
        raise ValueError(
            f"int8_attention: dot_general sums over {products} products; int32 sums are exact up "
            f"to {LONGEST_CONTRACTION}: attend to fewer tokens at once"
        )


def _values(operands: Any) -> list[Any]:
    return [x.value if isinstance(x, Special) else x for x in operands]


def _as_it_was(equation: JaxprEqn, *operands: Any) -> Any:
    """The equation again. What it computes from parameters alone is a leaf."""
    results = emit(equation, *_values(operands))
    path = _path_of_parameters(equation, operands)
    if path is not None:
        results = [Special(path, x) for x in results]
    return results if equation.primitive.multiple_results else results[0]


def _path_of_parameters(
    equation: JaxprEqn, operands: Sequence[Any]
) -> str | None:
    """The path of the first leaf, if all operands are leaves or literal numbers; else None."""
    path = None
    for atom, operand in zip(equation.invars, operands, strict=True):
        if isinstance(operand, Special):
            path = path or operand.path
        elif not isinstance(atom, core.Literal):
            return None
    return path


def _is_batched(equation: JaxprEqn) -> bool:
    """Whether this is a batched matmul of floats."""
    if equation.primitive.name != "dot_general":
        return False
    _, (batch, _) = equation.params["dimension_numbers"]
    return bool(batch) and all(map(_is_float, equation.invars))


def _is_float(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _has_batched(equation: JaxprEqn) -> bool:
    """Whether a batched matmul is in an equation, or in a program inside it."""
    if _is_batched(equation):
        return True
    programs = _programs_among(list(equation.params.values()))
    equations = chain.from_iterable(map(attrgetter("eqns"), programs))
    return any(map(_has_batched, equations))


def _programs_among(values: list[Any]) -> list[Jaxpr]:
    """The programs among an equation's parameters, and in the tuples and lists among these."""
    programs = []
    for value in jax.tree.leaves(values):
        if isinstance(value, ClosedJaxpr):
            programs.append(value.jaxpr)
        elif isinstance(value, Jaxpr):
            programs.append(value)
    return programs
