"""What each primitive does to a quantized cache; a primitive without a rule is refused.

A cache is a quantized array among a function's arguments: int8 values, and scales that have size 1
along the axes that share one. In the program it is a `Leaf` that holds a `QTensor` stored as it is
seen (`order` is empty), so the axes of its arrays are those of the equations. A rule is called as
rule(equation, *operands), and returns an array, or a leaf where the result is quantized still.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax._names import first_matches
from sqjax._trees import PyTree, map_named, named_leaves
from sqjax.numerics.dots import LONGEST_CONTRACTION, DimensionNumbers, aligned
from sqjax.numerics.formats import INT8, scale_from_absmax, to_format
from sqjax.program.primitives import COPIES
from sqjax.program.registry import Leaf
from sqjax.runtime.kinds import CACHES, RULES, is_cache, refuse_cache
from sqjax.runtime.shared_rules import (
    barrier,
    copy,
    on_either_side,
    sharded_as_the_result,
    slices_of,
)
from sqjax.weights.qtensor import QTensor, is_tensor


def quantize_cache(cache: PyTree, pattern: str = "") -> PyTree:
    """A function's key/value cache with int8 arrays: an argument of `quantized(fn)`, which returns
    it updated.

    Every float array of rank 2 or more becomes a `QTensor` with a scale for each index of all axes
    but the last: for keys and values of shape (batch, slots, heads, head_dim) that is one for every
    token and head. Anything else stays.

    Args:
        cache: the tree that `fn` takes and returns, for example what `init_cache` of a Hugging Face
            Flax model gives.
        pattern: a regular expression searched in the names of the arrays: which to quantize.

    Raises:
        ValueError: no float array of rank 2 or more has such a name.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> cache = sq.quantize_cache({"key": jnp.ones((1, 8, 2, 64)), "index": jnp.int32(0)})
        >>> cache["key"].values.dtype.name, cache["key"].scale.shape
        ('int8', (1, 8, 2, 1))
    """
    paths, leaves, _ = named_leaves(cache)
    able = [path for path, x in zip(paths, leaves, strict=True) if _can_be_quantized(x)]
    found = first_matches([pattern], able, "quantize_cache pattern")
    chosen = {path for path, match in found.items() if match is not None}
    if not chosen:
        raise ValueError(
            f"quantize_cache: expected float arrays of rank 2 or more, got {paths}; give it the "
            "tree that holds the keys and values"
        )

    def quantized(path: str, x: Any) -> Any:
        return QTensor.quantize(jnp.asarray(x), (-1,)) if path in chosen else x

    return map_named(quantized, cache)


def _can_be_quantized(x: Any) -> bool:
    return jnp.ndim(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating)


def cache_leaves(
    names: Sequence[str], arguments: Sequence[Any], inputs: Sequence[Any]
) -> list[Any]:
    """The program's inputs as the rules take them: quantized arrays as leaves with their names.

    The inputs are those of the arguments that are arrays or stand for one, in the same order, so
    their quantized arrays are the same ones.
    """
    named = zip(names, arguments, strict=True)
    leaves = iter([_cache_leaf(name, x) for name, x in named if is_tensor(x)])
    return [next(leaves) if is_tensor(x) else x for x in inputs]


def _cache_leaf(name: str, x: QTensor) -> Leaf:
    """A quantized argument as the rules take it: stored as it is seen.

    Raises:
        ValueError: it is no int8 array with plain scales.
    """
    x.check(name)
    plain = x.group is None and x.zero is None and x.group_scale is None
    if x.fmt != INT8 or not plain:
        raise ValueError(
            f"{name}: expected an int8 array with symmetric scales, as quantize_cache makes them, "
            f"got {x}"
        )
    return _changed(Leaf(name, x), x.values.transpose(x.axes), x.scale.transpose(x.axes))


def _changed(leaf: Leaf, values: Array, scale: Array) -> Leaf:
    """The leaf with other arrays."""
    return Leaf(leaf.path, replace(leaf.value, values=values, scale=scale, order=()))


# Movements ----------------------------------------------------------------------------------------


@RULES.register(("transpose",), CACHES)
def _transpose(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    permutation = equation.params["permutation"]
    values, scale = leaf.value.values, leaf.value.scale
    return _changed(leaf, values.transpose(permutation), scale.transpose(permutation))


@RULES.register(("squeeze",), CACHES)
def _squeeze(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    axes = equation.params["dimensions"]
    values, scale = leaf.value.values, leaf.value.scale
    return _changed(leaf, lax.squeeze(values, axes), lax.squeeze(scale, axes))


@RULES.register(("convert_element_type",), CACHES)
def _convert(equation: JaxprEqn, leaf: Leaf) -> Any:
    """A cast to another float dtype changes what the cache stands for, and none of its arrays."""
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return refuse_cache(equation, leaf)
    return Leaf(leaf.path, replace(leaf.value, dtype=jnp.dtype(dtype)))


@RULES.register(("broadcast_in_dim",), CACHES)
def _broadcast(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    """Values and scales are repeated alike, but a scale stays of size 1 where one is shared.

    This is also how key/value heads are repeated for their queries: values (batch, slots, 2, 16)
    with scales (batch, slots, 2, 1), broadcast to (batch, slots, 2, 4, 16), get scales (batch,
    slots, 2, 4, 1).
    """
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    values, scale = leaf.value.values, leaf.value.scale
    scale_shape = list(shape)
    for size, axis in zip(scale.shape, axes, strict=True):
        if size == 1:
            scale_shape[axis] = 1
    return _changed(
        leaf,
        lax.broadcast_in_dim(values, shape, axes),
        lax.broadcast_in_dim(scale, scale_shape, axes),
    )


@RULES.register(("reshape",), CACHES)
def _reshape(equation: JaxprEqn, leaf: Leaf) -> Any:
    """Where no axes are mixed that share their scales and that do not: see `QTensor.reshape`."""
    result: Any = equation.outvars[0].aval
    permuted = equation.params["dimensions"] is not None
    found = None if permuted else leaf.value.reshape(result.shape)
    if found is None:
        return refuse_cache(equation, leaf)
    # `QTensor.reshape` may store axes of size 1 first; a cache is stored as it is seen.
    return _changed(leaf, found.values.transpose(found.axes), found.scale.transpose(found.axes))


# Parts of a cache, and what is written to it ------------------------------------------------------


@RULES.register(("slice",), CACHES)
def _slice(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    # Never None, as a slice of groups would be, because a cache has none.
    return Leaf(leaf.path, leaf.value.slice(slices_of(equation)))


@RULES.register(("dynamic_slice",), CACHES)
def _dynamic_slice(equation: JaxprEqn, leaf: Any, *starts: Any) -> Any:
    """The same slice of values and scales, but all of a scale that an axis shares."""
    if not is_cache(leaf) or any(isinstance(x, Leaf) for x in starts):
        return refuse_cache(equation, leaf, *starts)
    values, scale = leaf.value.values, leaf.value.scale
    sizes = equation.params["slice_sizes"]
    return _changed(
        leaf,
        lax.dynamic_slice(values, starts, sizes),
        lax.dynamic_slice(scale, _scale_starts(starts, scale), _scale_sizes(sizes, scale)),
    )


def _scale_starts(starts: Any, scale: Array) -> list[Any]:
    """Where a slice begins in a scale: at 0 along the axes that share one entry."""
    return [x if n > 1 else jnp.zeros_like(x) for x, n in zip(starts, scale.shape, strict=True)]


def _scale_sizes(sizes: Any, scale: Array) -> list[int]:
    """The shape of the scales of values of these sizes: 1 along the axes that share one entry."""
    return [min(n, m) for n, m in zip(sizes, scale.shape, strict=True)]


@RULES.register(("dynamic_update_slice",), CACHES)
def _update(equation: JaxprEqn, leaf: Any, new: Any, *starts: Any) -> Any:
    """New tokens are quantized as they are written, with scales along the axes that have them.

    For example a cache (batch, slots, heads, 16) with scales (batch, slots, heads, 1) gets one
    token (batch, 1, heads, 16): its absmax over the last axis gives scales (batch, 1, heads, 1).
    """
    if not is_cache(leaf) or any(isinstance(x, Leaf) for x in starts):
        return refuse_cache(equation, leaf, new, *starts)
    values, scale = leaf.value.values, leaf.value.scale
    if not is_cache(new):
        shared = _shared_axes(leaf.value)
        # A scale shared along an axis could not be another for a part of that axis.
        if any(new.shape[a] != values.shape[a] for a in shared):
            return refuse_cache(equation, leaf)
        new = _quantized_along(leaf, new, shared)
    expected = _scale_sizes(new.value.values.shape, scale)
    if list(new.value.scale.shape) != expected:
        return refuse_cache(equation, leaf)
    return _changed(
        leaf,
        lax.dynamic_update_slice(values, new.value.values, starts),
        lax.dynamic_update_slice(scale, new.value.scale, _scale_starts(starts, scale)),
    )


def _shared_axes(cache: QTensor) -> tuple[int, ...]:
    """The axes along which all values share a scale."""
    sizes = zip(cache.values.shape, cache.scale.shape, strict=True)
    return tuple(a for a, (size, scales) in enumerate(sizes) if size > 1 and scales == 1)


def _quantized_along(leaf: Leaf, x: Array, axes: tuple[int, ...]) -> Leaf:
    """An array as a cache like the leaf's, with scales that are shared along `axes`."""
    scale = scale_from_absmax(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    return Leaf(leaf.path, QTensor(to_format(x, scale), scale, (), leaf.value.dtype))


@RULES.register(("select_n",), CACHES, fills=True)
def _select(equation: JaxprEqn, which: Any, *cases: Any, fills: Sequence[Any]) -> Any:
    """A mask, or a choice, among quantized arrays with scales of one shape, and zeros.

    A zero is the code 0 with any scale. So where an array is masked by zeros, its scales stay. Of
    two arrays one can be chosen as a whole, and its scales with it; an element of each can not,
    because elements that share a scale would need two.
    """
    leaf = next(x for x in cases if is_cache(x))
    pairs = zip(cases, fills[1:], strict=True)
    parts = [_values_and_scale(case, fill, leaf.value) for case, fill in pairs]
    if isinstance(which, Leaf) or any(part is None for part in parts):
        return refuse_cache(equation, leaf)
    values, scales = zip(*parts, strict=True)
    if len({scale.shape for scale in scales}) > 1:
        return refuse_cache(equation, leaf)
    chosen = lax.select_n(which, *values)
    if jnp.ndim(which) == 0:
        return _changed(leaf, chosen, lax.select_n(which, *scales))
    several = sum(map(is_cache, cases)) > 1
    return refuse_cache(equation, leaf) if several else _changed(leaf, chosen, leaf.value.scale)


def _values_and_scale(x: Any, fill: Any, like: QTensor) -> tuple[Array, Array] | None:
    """An operand as quantized arrays; None if it is neither a cache nor zeros."""
    if is_cache(x):
        return x.value.values, x.value.scale
    if _is_zero(x if fill is None else fill):
        return jnp.zeros_like(like.values), jnp.ones_like(like.scale)
    return None


def _is_zero(x: Any) -> bool:
    """Whether numbers are known to be zeros while the program is traced."""
    return not isinstance(x, jax.core.Tracer) and not np.any(np.asarray(x))


# Matmuls ------------------------------------------------------------------------------------------


@RULES.register(("dot_general",), CACHES)
@sharded_as_the_result
def _dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Array:
    """int8 x int8 -> int32 of an activation, quantized here, with a cache on either side."""
    if isinstance(lhs, Leaf) and isinstance(rhs, Leaf):
        return refuse_cache(equation, lhs, rhs)

    def product(x, leaf, dimensions):
        out = _dot_of_cache(x, leaf.value, dimensions)
        return refuse_cache(equation, leaf) if out is None else out

    return on_either_side(equation, lhs, rhs, product)


def _dot_of_cache(x: Array, cache: QTensor, dimensions: DimensionNumbers) -> Array | None:
    """lax.dot_general(x, cache, dimensions) in float32; None if scales or int32 do not allow it.

    Scales that vary along the contracted axes (a scale for each token of the values, where
    attention sums over tokens) can not be taken out of the sum, so x is multiplied by them. Scales
    that vary along other axes (the keys' tokens) multiply the sums. Then x is quantized, with a
    scale for everything that is not summed over.
    """
    (x_axes, axes), (_, batch) = dimensions
    scale = cache.scale
    free = [a for a in range(cache.ndim) if a not in (*axes, *batch)]
    x = x.astype(jnp.float32)
    if any(scale.shape[a] > 1 for a in axes):
        if any(scale.shape[a] > 1 for a in free):
            return None  # a scale for each token and output has no place on either side
        x = x * _as_x(scale, x.ndim, free, dimensions)
        scale = jnp.ones((1,) * cache.ndim, jnp.float32)
    if math.prod(x.shape[a] for a in x_axes) > LONGEST_CONTRACTION:
        return None
    absmax = jnp.max(jnp.abs(x), axis=tuple(x_axes), keepdims=True, initial=0.0)
    x_scale = scale_from_absmax(absmax)
    codes = to_format(x, x_scale)
    sums = lax.dot_general(codes, cache.values, dimensions, preferred_element_type=jnp.int32)
    of_x, of_cache = aligned(x_scale, scale, dimensions)
    return sums.astype(jnp.float32) * of_x * of_cache


def _as_x(scale: Array, rank: int, free: list[int], dimensions: DimensionNumbers) -> Array:
    """The cache's scales in a shape that broadcasts against x, each axis where x has its partner.

    For values v: (batch, slots, heads, 16) with scales (batch, slots, heads, 1), and x the weights
    (batch, heads, queries, slots) of "bhqk,bkhd->bhqd", the scales become (batch, heads, 1, slots).

    Args:
        scale: of size 1 along the free axes.
        rank: of x.
        free: the cache's axes that are neither contracted nor batch axes.
        dimensions: of the product of x and the cache.
    """
    (x_axes, axes), (x_batch, batch) = dimensions
    pairs = zip((*x_axes, *x_batch), (*axes, *batch), strict=True)
    partner = {axis: x_axis for x_axis, axis in pairs}
    in_order_of_x = sorted(partner, key=lambda axis: partner[axis])
    moved = scale.transpose(*in_order_of_x, *free)
    moved = moved.reshape([scale.shape[a] for a in in_order_of_x])
    return jnp.expand_dims(moved, [a for a in range(rank) if a not in partner.values()])


RULES.register((*COPIES, "sharding_constraint"), CACHES)(copy)
RULES.register(("optimization_barrier",), CACHES)(barrier)
