"""Quantized arrays among a function's arguments (a key/value cache): how they pass through a program."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal
from jaxtyping import Array

from sqjax._names import first_matches
from sqjax._trees import PyTree, map_named, named_leaves
from sqjax.numerics.formats import INT8, scale_from_absmax, to_format
from sqjax.program.primitives import COPIES
from sqjax.program.subprograms import source_of
from sqjax.program.walk import Leaf
from sqjax.weights.qtensor import QTensor


def quantize_cache(cache: PyTree, pattern: str = "") -> PyTree:
    """A function's key/value cache with int8 arrays: an argument of `quantized(fn)`, which returns it updated.

    Every float array of rank 2 or more becomes a `QTensor` with a scale for each index of all axes but the last: for
    keys and values of shape (batch, slots, heads, head_dim) one for every token and head. Anything else stays.

    Args:
        cache: the tree that `fn` takes and returns, for example what a Hugging Face Flax model's `init_cache` gives.
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
    able = [
        p
        for p, x in zip(paths, leaves, strict=True)
        if jnp.ndim(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    found = first_matches([pattern], able, "quantize_cache pattern")
    chosen = {path for path, which in found.items() if which is not None}
    if not chosen:
        raise ValueError(f"quantize_cache: expected float arrays of rank 2 or more, got {paths}")
    return map_named(
        lambda path, x: QTensor.quantize(jnp.asarray(x), (-1,)) if path in chosen else x, cache
    )


def is_cache(x: Any) -> bool:
    """Whether this is a leaf that stands for a quantized argument."""
    return isinstance(x, Leaf) and isinstance(x.value, QTensor)


def cache_leaf(name: str, x: QTensor) -> Leaf:
    """A quantized argument on its way through the program, stored as it is seen.

    Raises:
        ValueError: it is no int8 array with plain scales.
    """
    x.check(name)
    if x.fmt != INT8 or x.group is not None or x.zero is not None or x.group_scale is not None:
        raise ValueError(
            f"{name}: expected an int8 array with symmetric scales, as quantize_cache makes them, got {x}"
        )
    return _of(Leaf(name, x), x.values.transpose(x.axes), x.scale.transpose(x.axes))


def refuse(equation: JaxprEqn, *operands: Any) -> Any:
    """Raises ValueError: the primitive has no rule for a quantized argument."""
    leaf = next(x for x in operands if is_cache(x))
    raise ValueError(
        f"{leaf.path}: a quantized argument, but `{equation.primitive.name}` at {source_of(equation)} has no rule for "
        "quantized values; keep this array in float"
    )


def _of(leaf: Leaf, values: Array, scale: Array, **changes: Any) -> Leaf:
    return Leaf(leaf.path, replace(leaf.value, values=values, scale=scale, order=(), **changes))


def _both(change: Callable[[JaxprEqn, Array], Array]) -> Callable[..., Any]:
    """A rule that does the same to values and scales, whose axes of size 1 stay so."""

    def rule(equation: JaxprEqn, leaf: Leaf) -> Leaf:
        return _of(leaf, *(change(equation, x) for x in (leaf.value.values, leaf.value.scale)))

    return rule


def _transpose(equation: JaxprEqn, x: Array) -> Array:
    return x.transpose(equation.params["permutation"])


def _squeeze(equation: JaxprEqn, x: Array) -> Array:
    return lax.squeeze(x, equation.params["dimensions"])


def _copy(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    return leaf


def barrier(equation: JaxprEqn, *operands: Any) -> list[Any]:
    """optimization_barrier of several values: it stands before the arrays of the quantized ones too."""
    return list(lax.optimization_barrier(operands))


def _convert(equation: JaxprEqn, leaf: Leaf) -> Any:
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return refuse(equation, leaf)
    return Leaf(leaf.path, replace(leaf.value, dtype=jnp.dtype(dtype)))


def _broadcast(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    """Also the repetition of key/value heads over their queries."""
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    scale = leaf.value.scale
    of_scale = [
        n if a not in axes else (1 if scale.shape[axes.index(a)] == 1 else n)
        for a, n in enumerate(shape)
    ]
    return _of(
        leaf,
        lax.broadcast_in_dim(leaf.value.values, shape, axes),
        lax.broadcast_in_dim(scale, of_scale, axes),
    )


def _reshape(equation: JaxprEqn, leaf: Leaf) -> Any:
    result: Any = equation.outvars[0].aval
    found = None if equation.params["dimensions"] is not None else leaf.value.reshape(result.shape)
    if found is None:
        return refuse(equation, leaf)
    moved = [x.transpose(found.axes) for x in (found.values, found.scale)]
    return _of(leaf, *moved)


def _slice(equation: JaxprEqn, leaf: Leaf) -> Any:
    params = equation.params
    strides = params["strides"] or (1,) * leaf.value.ndim
    cuts = [
        slice(*cut)
        for cut in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ]
    return Leaf(leaf.path, leaf.value.slice(cuts))


def _dynamic_slice(equation: JaxprEqn, leaf: Any, *starts: Any) -> Any:
    if not is_cache(leaf) or any(isinstance(x, Leaf) for x in starts):
        return refuse(equation, leaf, *starts)
    sizes, scale = equation.params["slice_sizes"], leaf.value.scale
    of_scale = [min(n, m) for n, m in zip(sizes, scale.shape, strict=True)]
    return _of(
        leaf,
        lax.dynamic_slice(leaf.value.values, starts, sizes),
        lax.dynamic_slice(scale, _at(starts, scale), of_scale),
    )


def _at(starts: Any, scale: Array) -> list[Any]:
    """Where to begin along the axes of a scale: those of size 1 have one place only."""
    return [x if n > 1 else jnp.zeros_like(x) for x, n in zip(starts, scale.shape, strict=True)]


def _update(equation: JaxprEqn, leaf: Any, new: Any, *starts: Any) -> Any:
    """New tokens are quantized as they are written: a scale for every index of the axes that have them."""
    if not is_cache(leaf) or any(isinstance(x, Leaf) for x in starts):
        return refuse(equation, leaf, new, *starts)
    values, scale = leaf.value.values, leaf.value.scale
    shared = [
        a for a, (n, m) in enumerate(zip(values.shape, scale.shape, strict=True)) if n > 1 == m
    ]
    if not is_cache(new):
        if any(new.shape[a] != values.shape[a] for a in shared):
            return refuse(equation, leaf)
        fresh = scale_from_absmax(jnp.max(jnp.abs(new), axis=tuple(shared), keepdims=True))
        new = Leaf(leaf.path, QTensor(to_format(new, fresh), fresh, (), leaf.value.dtype))
    if new.value.scale.shape != tuple(
        min(n, m) for n, m in zip(new.value.values.shape, scale.shape, strict=True)
    ):
        return refuse(equation, leaf)
    return _of(
        leaf,
        lax.dynamic_update_slice(values, new.value.values, starts),
        lax.dynamic_update_slice(scale, new.value.scale, _at(starts, scale)),
    )


def _select(equation: JaxprEqn, which: Any, *cases: Any) -> Any:
    """A mask: quantized arrays with scales of one shape, and zeros."""
    leaf = next(x for x in cases if is_cache(x))
    arrays: list[tuple[Array, Array]] = []
    for atom, x in zip(equation.invars[1:], cases, strict=True):
        if is_cache(x):
            arrays.append((x.value.values, x.value.scale))
        elif _is_zero(atom, x):
            arrays.append((jnp.zeros_like(leaf.value.values), jnp.ones_like(leaf.value.scale)))
        else:
            return refuse(equation, leaf)
    if isinstance(which, Leaf) or len({scale.shape for _, scale in arrays}) > 1:
        return refuse(equation, leaf)
    codes = lax.select_n(which, *(values for values, _ in arrays))
    if jnp.ndim(which) == 0:
        return _of(leaf, codes, lax.select_n(which, *(scale for _, scale in arrays)))
    if (
        sum(map(is_cache, cases)) > 1
    ):  # which of the scales would differ along the axes that share one
        return refuse(equation, leaf)
    return _of(leaf, codes, leaf.value.scale)


def _is_zero(atom: Any, x: Any) -> bool:
    """Whether an operand is known to be zeros."""
    value = atom.val if isinstance(atom, Literal) else x
    return not isinstance(value, jax.core.Tracer) and not np.any(np.asarray(value))


def _dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Array:
    """int8 x int8 -> int32 of an activation, quantized here, with a quantized array on either side."""
    (l_axes, r_axes), (l_batch, r_batch) = equation.params["dimension_numbers"]
    if isinstance(lhs, Leaf) and isinstance(rhs, Leaf):
        return refuse(equation, lhs, rhs)
    result: Any = equation.outvars[0].aval
    if is_cache(rhs):
        return cached_dot(equation, lhs, rhs, (l_axes, r_axes), (l_batch, r_batch)).astype(
            result.dtype
        )
    out = cached_dot(equation, rhs, lhs, (r_axes, l_axes), (r_batch, l_batch))
    batch, own = len(l_batch), lhs.value.ndim - len(l_axes) - len(l_batch)
    return jnp.moveaxis(out, range(-own, 0), range(batch, batch + own)).astype(result.dtype)


def cached_dot(equation: JaxprEqn, x: Array, leaf: Leaf, contracted: Any, batch: Any) -> Array:
    """lax.dot_general(x, leaf) in float32.

    Scales that vary along contracted axes (the values' tokens) go to x, the others (the keys' tokens) to the sums;
    then x is quantized, a scale for everything that is not summed over.
    """
    (x_axes, axes), (x_batch, own_batch) = contracted, batch
    values, scale = leaf.value.values, leaf.value.scale
    free = [a for a in range(values.ndim) if a not in (*axes, *own_batch)]
    x = x.astype(jnp.float32)
    if any(scale.shape[a] > 1 for a in axes):
        if any(scale.shape[a] > 1 for a in free):
            return refuse(equation, leaf)
        to = {**dict(zip(axes, x_axes, strict=True)), **dict(zip(own_batch, x_batch, strict=True))}
        kept = sorted(to, key=lambda a: to[a])
        moved = scale.transpose(*kept, *free).reshape([scale.shape[a] for a in kept])
        x = x * jnp.expand_dims(moved, [a for a in range(x.ndim) if a not in to.values()])
        scale = jnp.ones((1,) * values.ndim, jnp.float32)
    if math.prod(x.shape[a] for a in x_axes) > (2**31 - 1) // 127**2:
        return refuse(equation, leaf)
    x_scale = scale_from_absmax(jnp.max(jnp.abs(x), axis=tuple(x_axes), keepdims=True, initial=0.0))
    numbers = ((tuple(x_axes), tuple(axes)), (tuple(x_batch), tuple(own_batch)))
    sums = lax.dot_general(to_format(x, x_scale), values, numbers, preferred_element_type=jnp.int32)
    x_free = [a for a in range(x.ndim) if a not in (*x_axes, *x_batch)]
    of_x = x_scale.transpose(*x_batch, *x_free, *x_axes).reshape(
        [x_scale.shape[a] for a in (*x_batch, *x_free)]
    )
    of_leaf = scale.transpose(*own_batch, *free, *axes).reshape(
        [scale.shape[a] for a in (*own_batch, *free)]
    )
    lead = len(own_batch)
    of_x = of_x.reshape(*of_x.shape, *(1,) * len(free))
    of_leaf = of_leaf.reshape(*of_leaf.shape[:lead], *(1,) * len(x_free), *of_leaf.shape[lead:])
    return sums.astype(jnp.float32) * of_x * of_leaf


#: What quantized arguments may meet; anything else is refused.
CACHE_RULES: dict[str, Callable[..., Any]] = {
    "dot_general": _dot,
    "dynamic_update_slice": _update,
    "dynamic_slice": _dynamic_slice,
    "slice": _slice,
    "transpose": _both(_transpose),
    "squeeze": _both(_squeeze),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "convert_element_type": _convert,
    "select_n": _select,
    **dict.fromkeys((*COPIES, "sharding_constraint"), _copy),
    "optimization_barrier": barrier,
}
