"""`quantized(fn)`: the same function on a tree whose weights are quantized."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax.interpreter import Leaf, Rules, source_of, trace, walk
from sqjax.matmul import QuantWeight, quantized_dot_general
from sqjax.trees import named_leaves


def quantized(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, able to run on parameters that `quantize` has changed.

    quantized(fn)(qparams, *args, **kwargs) is fn(params, *args, **kwargs) in which every matmul with a quantized weight
    runs int8 x int8 -> int32; everything else is re-emitted as it was. On a float tree it is `fn` itself. Wrap it in
    jax.jit: outside, every call traces `fn` anew. The same `fn` gives the same wrapper, so jit keeps its cache; the
    last 256 functions are remembered. Where a quantized weight itself flows into a function with a custom derivative,
    that derivative is lost; the matmul's own is straight-through.

    Raises:
        ValueError: when called, if a quantized weight meets a primitive that has no rule; names the primitive, the
            leaf and the line that made it.

    Example:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.0, 2.0]])
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
        >>> jax.jit(sq.quantized(fn))(qparams, x).round(1).tolist()
        [[1.0, 2.0]]
    """
    try:
        return _cached(fn)
    except TypeError:  # an fn that can not be hashed
        return _wrap(fn)


def _wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def run(params, *args, **kwargs):
        paths, leaves, _ = named_leaves(params, is_leaf=_is_quantized)
        if not any(map(_is_quantized, leaves)):
            return fn(params, *args, **kwargs)
        traced, inputs = trace(fn, params, args, kwargs)
        values = [Leaf(path, x) if _is_quantized(x) else x for path, x in zip(paths, leaves, strict=True)]
        outputs = walk(traced.jaxpr.jaxpr, traced.jaxpr.consts, [*values, *inputs], RULES)
        if escaped := [x.path for x in outputs if isinstance(x, Leaf)]:
            raise ValueError(f"{escaped[0]}: fn returns this quantized leaf; keep it in float with a rule of None")
        return jax.tree_util.tree_unflatten(traced.treedef, outputs)

    return run


_cached = functools.lru_cache(maxsize=256)(_wrap)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantWeight)


def _refuse(equation: JaxprEqn, *operands: Any) -> Any:
    leaf = next(x for x in operands if isinstance(x, Leaf))
    raise ValueError(
        f"{leaf.path}: quantized, but `{equation.primitive.name}` at {source_of(equation)} has no rule for quantized "
        f"values; keep this leaf in float with a rule of None: quantize(params, stats, {{{leaf.path!r}: None, ...}})"
    )


def _dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Array:
    """int8 x int8 -> int32, with the weight on either side."""
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = equation.params["dimension_numbers"]
    if isinstance(lhs, Leaf) and isinstance(rhs, Leaf):
        return _refuse(equation, lhs, rhs)
    if isinstance(rhs, Leaf):
        dimensions = ((lhs_axes, rhs_axes), (lhs_batch, rhs_batch))
        out = quantized_dot_general(lhs, rhs.value, dimensions, rhs.path)
    else:
        dimensions = ((rhs_axes, lhs_axes), (rhs_batch, lhs_batch))
        out = quantized_dot_general(rhs, lhs.value, dimensions, lhs.path)
        weight_axes = lhs.value.ndim - len(lhs_axes)
        out = jnp.moveaxis(out, range(-weight_axes, 0), range(weight_axes))
    result: Any = equation.outvars[0].aval
    return out.astype(result.dtype)


def _transpose(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    tensor = leaf.value.tensor.transpose(equation.params["permutation"])
    return Leaf(leaf.path, replace(leaf.value, tensor=tensor))


def _convert(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return _refuse(equation, leaf)
    return Leaf(leaf.path, replace(leaf.value, tensor=replace(leaf.value.tensor, dtype=jnp.dtype(dtype))))


def _copy(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    return leaf


def _gather(equation: JaxprEqn, leaf: Any, indices: Any) -> Array:
    """Rows of a quantized embedding: int8 rows are gathered, and only they are dequantized."""
    if not isinstance(leaf, Leaf) or isinstance(indices, Leaf):
        return _refuse(equation, leaf, indices)
    tensor, numbers = leaf.value.tensor, equation.params["dimension_numbers"]
    tensor.check(leaf.path)
    whole_rows = tuple(equation.params["slice_sizes"]) == (1, *tensor.shape[1:])
    stored_as_seen = tensor.axes == tuple(range(tensor.ndim))
    if not (whole_rows and stored_as_seen and tuple(numbers.start_index_map) == (0,) and leaf.value.smoothing is None):
        return _refuse(equation, leaf, indices)
    # Rows out of range are 1 times the fill value: int8 has no NaN, jnp.take's usual one.
    values = equation.primitive.bind(tensor.values, indices, **{**equation.params, "fill_value": 1})
    scale = jnp.broadcast_to(tensor.scale, (*tensor.shape[:1], *tensor.scale.shape[1:]))
    params = {**equation.params, "slice_sizes": (1, *scale.shape[1:])}
    return (values.astype(jnp.float32) * equation.primitive.bind(scale, indices, **params)).astype(tensor.dtype)


RULES = Rules(
    {
        "dot_general": _dot,
        "transpose": _transpose,
        "convert_element_type": _convert,
        "copy": _copy,
        "gather": _gather,
    },
    _refuse,
)
