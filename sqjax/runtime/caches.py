"""Quantized arrays among a function's arguments (a key/value cache): made, and made leaves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sqjax._names import first_matches
from sqjax._trees import PyTree, map_named, named_leaves
from sqjax.numerics.formats import INT8
from sqjax.program.registry import Special
from sqjax.program.trace import is_array
from sqjax.weights.qtensor import QTensor, is_tensor


def quantize_cache(cache: PyTree, pattern: str = "") -> PyTree:
    """A function's key/value cache with int8 arrays, for `quantized(fn)`, which returns it updated.

    Every float array of rank 2 or more becomes a `QTensor` with a scale for each index of all axes
    but the last: for keys and values of shape (batch, slots, heads, head_dim) that is one for every
    token and head. Anything else stays.

    One channel that is much larger than the others, as keys with a large bias have, takes their
    digits: with it 20 times as large, a tenth of their size is lost. Quantize the values alone
    then (`pattern="value"`), or take the cache of `sqjax.models`, which rotates keys first.

    Args:
        cache: the tree that `fn` takes and returns, for example what `init_cache` of a Hugging Face
            Flax model gives.
        pattern: a regular expression searched in the names of the arrays: which to quantize.

    Raises:
        ValueError: no float array of rank 2 or more has such a name.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> cache = sq.quantize_cache({"key": jnp.ones((1, 8, 2, 64)), "index": jnp.int32(0)})
        >>> cache["key"].values.dtype.name, cache["key"].scale.shape
        ('int8', (1, 8, 2, 1))
    """
    paths, leaves, _ = named_leaves(cache)
    able = [
        path
        for path, x in zip(paths, leaves, strict=True)
        if _can_be_quantized(x)
    ]
    if not able:
        raise ValueError(
            f"quantize_cache: expected float arrays of rank 2 or more, got {paths}; give it the "
            "tree that holds the keys and values"
        )
    matches = first_matches([pattern], able, "quantize_cache pattern")

    def quantized(path: str, x: Any) -> Any:
        if matches.get(path) is None:
            return x
        return QTensor.quantize(jnp.asarray(x), (-1,))

    return map_named(quantized, cache)


def _can_be_quantized(x: Any) -> bool:
    return jnp.ndim(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating)


def cache_leaves(
    names: Sequence[str], arguments: Sequence[Any], inputs: Sequence[Any]
) -> list[Any]:
    """The program's inputs as the rules take them: quantized arrays as leaves with their names.

    Args:
        names: of all arguments of the function.
        arguments: the same arguments.
        inputs: those that are arrays, or quantized arrays, in the same order: a bool or a string is
            no input of the program.
    """
    # The names of arguments are known, those of inputs not, so the other arguments are left out.
    found = []
    named = zip(names, arguments, strict=True)
    names_of_inputs = [name for name, x in named if is_array(x) or is_tensor(x)]
    for name, x in zip(names_of_inputs, inputs, strict=True):
        found.append(_cache_leaf(name, x) if is_tensor(x) else x)
    return found


def _cache_leaf(name: str, x: QTensor) -> Special:
    """A quantized argument as the rules take it: stored as it is seen.

    Raises:
        ValueError: it is no int8 array with plain scales.
    """
    x.check(name)
    groups_or_zeros = jax.tree.leaves((x.group, x.zero, x.group_scale))
    if x.fmt != INT8 or groups_or_zeros:
        raise ValueError(
            f"{name}: expected an int8 array with symmetric scales, as quantize_cache makes them, "
            f"got {x}"
        )
    values, scale = x.values.transpose(x.axes), x.scale.transpose(x.axes)
    return Special(name, replace(x, values=values, scale=scale, order=()))
