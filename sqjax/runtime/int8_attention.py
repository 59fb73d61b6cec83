"""int8 attention: the batched matmuls of two activations, q k^T and p V, on int8."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Array, Float

from sqjax._trees import named_leaves
from sqjax.numerics.dots import LONGEST_CONTRACTION
from sqjax.numerics.formats import scale_from_absmax, to_format
from sqjax.program.bodies import Bodies, body_rules
from sqjax.program.subprograms import emit
from sqjax.program.trace import trace
from sqjax.program.walk import Leaf, Rules, walk
from sqjax.weights.qtensor import tensor_type


def int8_attention(
    fn: Callable[..., Any], granularity: Literal["per_token", "per_tensor"] = "per_token"
) -> Callable[..., Any]:
    """`fn` with every batched matmul of two activations on int8: attention's q k^T and p V (the paper's INT8 BMM).

    Both operands are quantized at run time, symmetric. A batched matmul with an operand that is computed from
    parameters alone (a stack of experts) stays as it is, and so does every other matmul: compose with `quantized` for
    those. The values' scales of a causal attention are taken over all its tokens, later ones too. The derivative is
    that of the float matmul (straight-through).

    Args:
        fn: fn(params, *args), as for `calibrate`; calibrate and verify `fn` itself, not the result.
        granularity: "per_token": a scale for every row (token and head) of q, k and p, and every channel of V:
            whatever is not summed over. "per_tensor": one scale for each operand.

    Raises:
        ValueError: when called, if a batched matmul sums over more than 133,144 products.

    Example:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"])
        >>> params, x = {"q": jnp.eye(2), "k": jnp.eye(2)}, jnp.array([[[1.0, 2.0], [3.0, 1.0]]])
        >>> jax.jit(sq.int8_attention(fn))(params, x).round(1).tolist()
        [[[5.0, 5.0], [5.0, 10.0]]]
    """
    if granularity not in ("per_token", "per_tensor"):
        raise ValueError(
            f"int8_attention: expected granularity per_token or per_tensor, got {granularity!r}"
        )
    rules = _rules(granularity)

    @functools.wraps(fn)
    def run(params, *args, **kwargs):
        paths, leaves, treedef = named_leaves(
            params
        )  # the arrays of quantized weights are leaves of their own

        def of_leaves(leaves, *args, **kwargs):
            return fn(jax.tree_util.tree_unflatten(treedef, leaves), *args, **kwargs)

        traced, inputs = trace(of_leaves, leaves, args, kwargs, of_args=tensor_type)
        own = [Leaf(path, x) for path, x in zip(paths, leaves, strict=True)]
        outputs = walk(traced.jaxpr.jaxpr, traced.jaxpr.consts, [*own, *inputs], rules)
        return jax.tree_util.tree_unflatten(traced.treedef, _values(outputs))

    return run


def _rules(granularity: str) -> Rules:
    """Values computed from parameters alone are leaves; batched matmuls of what is no leaf are quantized."""

    def dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Any:
        if isinstance(lhs, Leaf) or isinstance(rhs, Leaf) or not _is_batched(equation):
            return _as_it_was(equation, lhs, rhs)
        numbers = equation.params["dimension_numbers"]
        inner = [lhs.shape[a] for a in numbers[0][0]]
        if (terms := functools.reduce(int.__mul__, inner, 1)) > LONGEST_CONTRACTION:
            raise ValueError(
                f"int8_attention: {equation.primitive.name} sums over {terms} products; int32 sums are exact up to "
                f"{LONGEST_CONTRACTION}: attend to fewer tokens at once"
            )
        result: Any = equation.outvars[0].aval
        return int8_dot(numbers, granularity, lhs, rhs).astype(result.dtype)

    bodies = Bodies(
        per_step=lambda equation, leaf, length: leaf,
        cut=lambda equation, leaf, spec: Leaf(leaf.path, spec),
        carried=lambda equation, operands: _values(operands),
        outputs=_values,
    )
    rules = Rules(
        {"dot_general": dot, "optimization_barrier": _barrier, **body_rules(lambda: rules, bodies)},
        _as_it_was,
        _has_batched,
    )
    return rules


def _values(operands: Any) -> list[Any]:
    return [x.value if isinstance(x, Leaf) else x for x in operands]


def _as_it_was(equation: JaxprEqn, *operands: Any) -> Any:
    """The equation again; a leaf, if its operands are leaves, and numbers in the program."""
    results = emit(equation, *_values(operands))
    paths = [x.path for x in operands if isinstance(x, Leaf)]
    numbers = [isinstance(v, core.Literal) for v in equation.invars]
    if not paths or len(paths) + sum(numbers) < len(operands):
        return results
    path = paths[0]
    return (
        [Leaf(path, x) for x in results]
        if equation.primitive.multiple_results
        else Leaf(path, results)
    )


def _barrier(equation: JaxprEqn, *operands: Any) -> list[Any]:
    """Every result is an operand, so leaves stay leaves beside activations."""
    return list(lax.optimization_barrier(operands))


def _is_batched(equation: JaxprEqn) -> bool:
    """Whether this is a batched matmul of floats."""
    if equation.primitive.name != "dot_general" or not equation.params["dimension_numbers"][1][0]:
        return False
    operands: Any = [v.aval for v in equation.invars]
    return all(jnp.issubdtype(x.dtype, jnp.floating) for x in operands)


def _has_batched(equation: JaxprEqn) -> bool:
    """Whether a batched matmul is in an equation, or in a program inside it."""
    if _is_batched(equation):
        return True
    stack = list(equation.params.values())
    while stack:
        value = stack.pop()
        if isinstance(value, tuple | list):
            stack += value
        elif isinstance(value, Jaxpr | ClosedJaxpr):
            jaxpr = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if any(map(_has_batched, jaxpr.eqns)):
                return True
    return False


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def int8_dot(
    dimensions: Any, granularity: str, lhs: Float[Array, "..."], rhs: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`lax.dot_general` of two float arrays, both quantized here: (q_l . q_r) * scale_l * scale_r, the sum in int32."""
    (l_axes, r_axes), (l_batch, r_batch) = dimensions
    operands = []
    for x, axes in ((lhs, l_axes), (rhs, r_axes)):
        shared = tuple(axes) if granularity == "per_token" else None
        scale = scale_from_absmax(jnp.max(jnp.abs(x), axis=shared, keepdims=True, initial=0.0))
        operands.append(
            (to_format(x, scale), jnp.broadcast_to(scale, _kept(x.shape, axes)), x.ndim)
        )
    (q_l, s_l, _), (q_r, s_r, _) = operands
    sums = lax.dot_general(q_l, q_r, dimensions, preferred_element_type=jnp.int32).astype(
        jnp.float32
    )
    batch = len(l_batch)
    s_l = _batch_first(s_l, l_batch, l_axes)
    s_r = _batch_first(s_r, r_batch, r_axes)
    s_l = s_l.reshape(*s_l.shape, *(1,) * (s_r.ndim - batch))
    s_r = s_r.reshape(*s_r.shape[:batch], *(1,) * (sums.ndim - s_r.ndim), *s_r.shape[batch:])
    return sums * s_l * s_r


@int8_dot.defjvp
def _straight_through(dimensions, granularity, primals, tangents):
    def dot(x, y):
        return lax.dot_general(x.astype(jnp.float32), y.astype(jnp.float32), dimensions)

    (lhs, rhs), (dl, dr) = primals, tangents
    return int8_dot(dimensions, granularity, lhs, rhs), dot(dl, rhs) + dot(lhs, dr)


def _kept(shape: tuple[int, ...], axes: Any) -> tuple[int, ...]:
    return tuple(1 if a in axes else n for a, n in enumerate(shape))


def _batch_first(scale: Array, batch: Any, contracted: Any) -> Array:
    """Scales with the batch axes first, without the contracted ones, as dot_general orders its result."""
    free = [a for a in range(scale.ndim) if a not in (*batch, *contracted)]
    return scale.transpose(*batch, *free, *contracted).reshape(
        [scale.shape[a] for a in (*batch, *free)]
    )
