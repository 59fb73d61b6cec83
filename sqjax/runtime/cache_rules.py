"""What each primitive does to a quantized cache; a primitive without a rule is refused.

A cache is a `Special` that holds a `QTensor`: int8 values, and scales that have size 1 along the
axes that share one. It is stored as it is seen (`order` is empty), so the axes of both arrays are
those of the equations. A rule is called as rule(equation, *operands), and returns an array, or a
`Special` where the result is quantized still; None where it does not serve, and the cache is
refused.
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

from sqjax._shapes import entries_at, other_axes, sizes_along
from sqjax.numerics.dots import (
    LONGEST_CONTRACTION,
    DimensionNumbers,
    aligned,
    beside_lhs,
)
from sqjax.numerics.formats import absmax, scale_from_absmax, to_format
from sqjax.program.primitives import COPIES
from sqjax.program.registry import Registry, Special
from sqjax.runtime.kinds import CACHES, is_cache
from sqjax.runtime.shared_rules import (
    barrier,
    copy,
    on_either_side,
    sharded_as_the_result,
    slices_of,
)
from sqjax.weights.qtensor import QTensor

CACHE_RULES = Registry(CACHES)


def _changed(leaf: Special, values: Array, scale: Array) -> Special:
    """The leaf with other arrays."""
    return Special(
        leaf.path, replace(leaf.value, values=values, scale=scale, order=())
    )


# Movements ----------------------------------------------------------------------------------------


@CACHE_RULES.register(("transpose",), CACHES)
def _transpose(equation: JaxprEqn, leaf: Special) -> Special:
    permutation = equation.params["permutation"]
    values, scale = leaf.value.values, leaf.value.scale
    return _changed(
        leaf, values.transpose(permutation), scale.transpose(permutation)
    )


@CACHE_RULES.register(("squeeze",), CACHES)
def _squeeze(equation: JaxprEqn, leaf: Special) -> Special:
    axes = equation.params["dimensions"]
    values, scale = leaf.value.values, leaf.value.scale
    return _changed(leaf, lax.squeeze(values, axes), lax.squeeze(scale, axes))


@CACHE_RULES.register(("convert_element_type",), CACHES)
def _convert(equation: JaxprEqn, leaf: Special) -> Any:
    """A cast to another float dtype changes what the cache stands for, and none of its arrays."""
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return leaf.holding(replace(leaf.value, dtype=jnp.dtype(dtype)))


@CACHE_RULES.register(("broadcast_in_dim",), CACHES)
def _broadcast(equation: JaxprEqn, leaf: Special) -> Special:
    """Values and scales are repeated alike, but a scale stays of size 1 where one is shared.

    This is also how key/value heads are repeated for their queries: values (batch, slots, 2, 16)
    with scales (batch, slots, 2, 1), broadcast to (batch, slots, 2, 4, 16), get scales (batch,
    slots, 2, 4, 1).
    """
    shape, axes = (
        equation.params["shape"],
        equation.params["broadcast_dimensions"],
    )
    values, scale = leaf.value.values, leaf.value.scale
    # Along new axes, those that are not in `axes`, scales are repeated as the values are.
    scale_shape = list(shape)
    for size, axis in zip(scale.shape, axes, strict=True):
        if size == 1:
            scale_shape[axis] = 1
    return _changed(
        leaf,
        lax.broadcast_in_dim(values, shape, axes),
        lax.broadcast_in_dim(scale, scale_shape, axes),
    )


@CACHE_RULES.register(("reshape",), CACHES)
def _reshape(equation: JaxprEqn, leaf: Special) -> Any:
    """Where no axes are mixed that share their scales and that do not: see `QTensor.reshape`."""
    result: Any = equation.outvars[0].aval
    permuted = equation.params["dimensions"] is not None
    found = None if permuted else leaf.value.reshape(result.shape)
    if found is None:
        return None
    # `QTensor.reshape` stores axes of size 1 first, but a cache is stored as it is seen.
    values, scale = (
        found.values.transpose(found.axes),
        found.scale.transpose(found.axes),
    )
    return _changed(leaf, values, scale)


# Parts of a cache, and what is written to it ------------------------------------------------------


@CACHE_RULES.register(("slice",), CACHES)
def _slice(equation: JaxprEqn, leaf: Special) -> Special | None:
    return leaf.holding(leaf.value.slice(slices_of(equation)))


@CACHE_RULES.register(("dynamic_slice",), CACHES)
def _dynamic_slice(equation: JaxprEqn, leaf: Special, *starts: Any) -> Special:
    """The same slice of values and scales, but all of a scale that an axis shares."""
    values, scale = leaf.value.values, leaf.value.scale
    sizes = equation.params["slice_sizes"]
    return _changed(
        leaf,
        lax.dynamic_slice(values, starts, sizes),
        lax.dynamic_slice(
            scale, _scale_starts(starts, scale), _scale_sizes(sizes, scale)
        ),
    )


def _scale_starts(starts: Any, scale: Array) -> list[Any]:
    """Where a slice begins in a scale: at 0 along the axes that share one entry."""
    found = []
    for start, entries in zip(starts, scale.shape, strict=True):
        found.append(start if entries > 1 else jnp.zeros_like(start))
    return found


def _scale_sizes(sizes: Any, scale: Array) -> list[int]:
    """The shape of a slice of a scale: 1 along the axes that share one, else as the values'."""
    return np.minimum(sizes, scale.shape).tolist()


@CACHE_RULES.register(("dynamic_update_slice",), CACHES)
def _update(equation: JaxprEqn, leaf: Any, new: Any, *starts: Any) -> Any:
    """New tokens are quantized as they are written, with scales along the axes that have them.

    For example a cache (batch, slots, heads, 16) with scales (batch, slots, heads, 1) gets one
    token (batch, 1, heads, 16): its absmax over the last axis gives scales (batch, 1, heads, 1).
    """
    # A cache is written to a float array, or a weight to a cache.
    if not is_cache(leaf) or (isinstance(new, Special) and not is_cache(new)):
        return None
    part = new.value if is_cache(new) else _quantized_like(leaf.value, new)
    if part is None:
        return None
    values, scale = leaf.value.values, leaf.value.scale
    # A cache that is written to another must have its scales along the same axes.
    if list(part.scale.shape) != _scale_sizes(part.values.shape, scale):
        return None
    return _changed(
        leaf,
        lax.dynamic_update_slice(values, part.values, starts),
        lax.dynamic_update_slice(
            scale, part.scale, _scale_starts(starts, scale)
        ),
    )


@CACHE_RULES.register(("scatter",), CACHES)
def _scatter(equation: JaxprEqn, leaf: Any, indices: Any, new: Any) -> Any:
    """cache.at[rows, slots].set(new): new vectors are quantized, and so are written with a scale.

    For example a cache (batch, slots, heads, 16) with scales (batch, slots, heads, 1) gets for each
    row a token (rows, heads, 16). Its absmax over the last axis gives scales (rows, heads, 1).
    """
    if not is_cache(leaf) or isinstance(new, Special):
        return None
    params = equation.params
    numbers = params["dimension_numbers"]
    values, scale = leaf.value.values, leaf.value.scale
    # Where each axis of the cache is among those of `new`, if it is a whole axis there.
    without = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    whole = other_axes(values.ndim, without)
    place = dict(zip(whole, numbers.update_window_dims, strict=True))
    shared = _shared_axes(leaf.value)
    # All that shares a scale must be written at once, because the rest would need another.
    if not place.keys() >= set(shared):
        return None
    own = entries_at(place, shared)
    if sizes_along(new.shape, own) != sizes_along(values.shape, shared):
        return None
    scales = scale_from_absmax(absmax(new, own))

    def written(array: Array, part: Array) -> Array:
        return lax.scatter(
            array,
            indices,
            part,
            numbers,
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"],
            mode=params["mode"],
        )

    codes = to_format(new, scales)
    return _changed(leaf, written(values, codes), written(scale, scales))


def _shared_axes(cache: QTensor) -> list[int]:
    """The axes along which elements share a scale."""
    sizes = zip(cache.values.shape, cache.scale.shape, strict=True)
    return [axis for axis, (size, own) in enumerate(sizes) if size > own]


def _quantized_like(cache: QTensor, x: Array) -> QTensor | None:
    """An array with its scales along the same axes as a cache.

    None if it is only a part of the cache along an axis that shares a scale: the part would need
    another scale than the rest.
    """
    shared = _shared_axes(cache)
    whole = sizes_along(cache.values.shape, shared)
    if sizes_along(x.shape, shared) != whole:
        return None
    scale = scale_from_absmax(absmax(x, tuple(shared)))
    return QTensor(to_format(x, scale), scale, order=(), dtype=cache.dtype)


@CACHE_RULES.register(("select_n",), CACHES, asks=True)
def _select(
    equation: JaxprEqn, which: Any, *cases: Any, known: Sequence[Any]
) -> Any:
    """A mask, or a choice, among quantized arrays with scales of one shape, and zeros.

    A zero is the code 0 with any scale. So where an array is masked by zeros, its scales stay. Of
    two arrays one can be chosen as a whole, and its scales with it; an element of each can not,
    because elements that share a scale would need two.
    """
    leaf = next(filter(is_cache, cases))
    pairs = zip(cases, known[1:], strict=True)
    parts = [
        _values_and_scale(case, values, leaf.value) for case, values in pairs
    ]
    if None in parts:
        return None
    values, scales = zip(*parts, strict=True)
    # select_n takes arrays of one shape, and so it must be for the scales too.
    if len(set(map(jnp.shape, scales))) > 1:
        return None
    chosen = lax.select_n(which, *values)
    if jnp.ndim(which) == 0:  # one choice for all elements
        return _changed(leaf, chosen, lax.select_n(which, *scales))
    # Element by element there can be one scale only: the other cases must be zeros.
    if sum(map(is_cache, cases)) > 1:
        return None
    return _changed(leaf, chosen, leaf.value.scale)


def _values_and_scale(
    x: Any, known: Any, like: QTensor
) -> tuple[Array, Array] | None:
    """An operand as quantized arrays; None if it is neither a cache nor zeros."""
    if is_cache(x):
        return x.value.values, x.value.scale
    if _is_zero(x if known is None else known):
        return jnp.zeros_like(like.values), jnp.ones_like(like.scale)
    return None


def _is_zero(x: Any) -> bool:
    """Whether numbers are known to be zeros while the program is traced."""
    return not isinstance(x, jax.core.Tracer) and not np.any(np.asarray(x))


# Matmuls ------------------------------------------------------------------------------------------


@CACHE_RULES.register(("dot_general",), CACHES)
@sharded_as_the_result
def _dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Array | None:
    """int8 x int8 -> int32 of an activation, quantized here, with a cache on either side."""

    def product(x, leaf, dimensions):
        return _dot_of_cache(x, leaf.value, dimensions)

    return on_either_side(equation, lhs, rhs, product)


def _dot_of_cache(
    x: Array, cache: QTensor, dimensions: DimensionNumbers
) -> Array | None:
    """lax.dot_general(x, cache, dimensions) in float32; None if scales or int32 do not allow it.

    Scales that vary along other axes than the contracted ones (a scale for each token of the keys)
    multiply the sums. Scales that vary along the contracted axes (a scale for each token of the
    values, because attention sums over tokens) can not be taken out of the sum, so x is multiplied
    by them before it is quantized. x gets a scale for everything that is not summed over.
    """
    (x_axes, axes), (_, batch) = dimensions
    scale = cache.scale
    free = other_axes(cache.ndim, axes, batch)
    x = x.astype(jnp.float32)
    if _varies(scale, axes):
        # A scale for each token and output could multiply neither x nor the sums.
        if _varies(scale, free):
            return None
        x = x * beside_lhs(scale, x.ndim, dimensions)
        # The scale is in x by now, so none is left for the sums.
        scale = jnp.ones((1,) * cache.ndim, jnp.float32)
    products = math.prod(sizes_along(x.shape, x_axes))
    if products > LONGEST_CONTRACTION:
        return None
    x_scale = scale_from_absmax(absmax(x, tuple(x_axes)))
    codes = to_format(x, x_scale)
    sums = lax.dot_general(
        codes, cache.values, dimensions, preferred_element_type=jnp.int32
    )
    of_x, of_cache = aligned(x_scale, scale, dimensions)
    return sums.astype(jnp.float32) * of_x * of_cache


def _varies(scale: Array, axes: Sequence[int]) -> bool:
    """Whether there is more than one scale along some of the axes."""
    return max(sizes_along(scale.shape, axes), default=1) > 1


# The rest -----------------------------------------------------------------------------------------

CACHE_RULES.register((*COPIES, "sharding_constraint"), CACHES)(copy)
CACHE_RULES.register(("optimization_barrier",), CACHES)(barrier)
