"""`quantized(fn)`: the same function on a tree whose weights are quantized."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import jax

from sqjax._arguments import check_function
from sqjax._trees import named_leaves
from sqjax.program.registry import Registry
from sqjax.program.trace import trace
from sqjax.program.walk import run
from sqjax.runtime.cache_rules import CACHE_RULES
from sqjax.runtime.caches import cache_leaves
from sqjax.runtime.joined_weights import JOINED_RULES
from sqjax.runtime.kinds import is_cache
from sqjax.runtime.norms import NORM_RULES
from sqjax.runtime.summed_weights import SUMMED_RULES
from sqjax.runtime.weight_rules import WEIGHT_RULES, weight_leaves
from sqjax.weights.qtensor import is_tensor, tensor_type
from sqjax.weights.quant_weight import is_quantized, weight_type

#: What primitives do to quantized values. An equation that meets both kinds belongs to the cache.
RULES = Registry.joined(
    CACHE_RULES, WEIGHT_RULES, JOINED_RULES, SUMMED_RULES, NORM_RULES
)


def quantized(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, able to run on parameters that `quantize` has changed.

    quantized(fn)(qparams, *args, **kwargs) is fn(params, *args, **kwargs) in which every matmul
    with a quantized weight runs int8 x int8 -> int32; everything else is emitted again as it was.
    Arguments may hold arrays that `quantize_cache` has quantized, and are returned so. On float
    trees it is `fn` itself.

    Wrap it in jax.jit, because outside of it every call traces `fn` anew. The same `fn` gives the
    same wrapper, so jit keeps its cache: a function keeps its wrapper as long as it lives itself,
    anything else that can be called (a bound method) as long as you hold the wrapper.

    Where a quantized weight itself flows into a function with a custom derivative, that derivative
    is lost. The matmul's own derivative is straight-through (in a scan, jax keeps that for first
    derivatives and for jacfwd of jacfwd only).

    Raises:
        ValueError: `fn` is no function, but a model or a tree.
        ValueError: when called, if a quantized weight meets a primitive that has no rule; names the
            primitive, the leaf and the line that made it.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.0, 2.0]])
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
        >>> jax.jit(sq.quantized(fn))(qparams, x).round(1).tolist()
        [[1.0, 2.0]]
    """
    check_function(fn, "quantized", "(fn)(qparams, *inputs)")
    if isinstance(fn, FunctionType):
        return _of_function(fn)
    try:
        known = _WRAPPERS.get(fn)
    except TypeError:  # an fn that can not be hashed can not be remembered
        return _wrap(fn)
    if known is None:
        known = _WRAPPERS[fn] = _wrap(fn)
    return known


#: The wrappers that somebody holds, by what they wrap: the same for the same, because jit's own
#: cache goes by the function's identity. With the last holder a wrapper goes, and what it wraps.
_WRAPPERS: WeakValueDictionary[Any, Callable[..., Any]] = WeakValueDictionary()


def _of_function(fn: FunctionType) -> Callable[..., Any]:
    """The wrapper of a function of Python, which holds it: both go when nobody holds either."""
    known = fn.__dict__.get(_ATTRIBUTE)
    # What `functools.wraps` made of this function has a copy of its attributes.
    if known is None or known.__wrapped__ is not fn:
        known = fn.__dict__[_ATTRIBUTE] = _wrap(fn)
    return known


_ATTRIBUTE = "__sqjax_quantized__"


def _wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapper(params, *args, **kwargs):
        paths, leaves, _ = named_leaves(params, is_leaf=is_quantized)
        names, arguments, _ = named_leaves((args, kwargs), is_leaf=is_tensor)
        # Float trees run `fn` itself, so that nothing of theirs is traced or emitted anew.
        if not any(map(is_quantized, leaves)) and not any(
            map(is_tensor, arguments)
        ):
            return fn(params, *args, **kwargs)
        traced, inputs = trace(
            fn, params, args, kwargs, weight_type, tensor_type
        )
        operands = [
            *weight_leaves(paths, leaves),
            *cache_leaves(names, arguments, inputs),
        ]
        # jit compiles what this emits, so the walk itself costs nothing at run time.
        results = run(traced.jaxpr, operands, RULES)
        outputs = [x.value if is_cache(x) else x for x in results]
        return jax.tree_util.tree_unflatten(traced.treedef, outputs)

    return wrapper
