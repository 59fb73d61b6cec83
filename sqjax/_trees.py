"""Parameter trees: leaves named by their path, and checks of all leaves that name the first bad
one."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


def named_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[tuple[str, ...], list[Any], jax.tree_util.PyTreeDef]:
    """(paths, leaves, treedef): each path is the leaf's keys joined by "/", as in
    "layers/0/q_proj/kernel". The path of a tree that is one leaf alone is "".

    `is_leaf` says what else is a leaf, as `jax.tree.flatten` takes it: a quantized weight, say.

    Raises:
        ValueError: two leaves have one path, as in {"a/b": x, "a": {"b": y}}.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    names = []
    leaves = []
    for keys, leaf in flat:
        names.append(jax.tree_util.keystr(keys, simple=True, separator="/"))
        leaves.append(leaf)
    paths = tuple(names)
    if len(set(paths)) < len(paths):
        twice = sorted(
            path for path, times in Counter(paths).items() if times > 1
        )
        raise ValueError(
            f"two leaves of the tree have one path, {twice[:5]}; rename a key that holds a '/'"
        )
    return paths, leaves, treedef


def map_named(change: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """The tree with every leaf replaced by change(path, leaf)."""
    paths, leaves, treedef = named_leaves(tree)
    return jax.tree_util.tree_unflatten(
        treedef, list(map(change, paths, leaves))
    )


def is_concrete(x: Any) -> bool:
    """False for a tracer or an abstract value: checks of values are possible only outside jit."""
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def replicated(x: Any) -> Any:
    """A sharded array as one copy on every device; anything else as it is.

    Only meshes with explicit axes say in an array's type how it is sharded. There an operation on
    arrays that are sharded in different ways is an error, so these are replicated first.
    """
    sharding = jax.typeof(x).sharding
    if all(entry is None for entry in sharding.spec):
        return x
    return jax.sharding.reshard(
        x, NamedSharding(sharding.mesh, PartitionSpec())
    )


def is_float(x: Any) -> bool:
    """Whether a leaf is a floating-point array."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def quickly_read(x: Any) -> np.ndarray | None:
    """A small array in host memory, for numpy to look at; None of any other, and of a tracer.

    Because each shape would have to be compiled, which takes longer than numpy takes to read it.
    """
    if not is_concrete(x) or np.size(x) > 2**20:
        return None
    if isinstance(x, jax.Array):
        platforms = {device.platform for device in x.devices()}
        if not x.is_fully_addressable or platforms != {"cpu"}:
            return None
    return np.asarray(x)


def check_arrays(params: PyTree) -> None:
    """Raises ValueError naming the first leaf of `params` that is no array, or is quantized."""

    def is_quantized(x: Any) -> bool:
        return hasattr(type(x), "is_no_array")

    for path, leaf in _pairs(params, is_quantized):
        if is_quantized(leaf):
            raise ValueError(
                f"parameter {path or '(the tree itself)'}: expected a float array, got {leaf!r}; "
                "calibrate the float parameters, with fn itself, and quantize these afterwards"
            )
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(
                f"parameter {path or '(the tree itself)'}: expected an array, got "
                f"{type(leaf).__name__}; keep what is no array out of params (close fn over it)"
            )


def check_finite(tree: PyTree, what: str, but: float | None = None) -> None:
    """Raises ValueError naming the first leaf of `tree` that holds a NaN or an infinity, other than
    `but`. Tracers are passed over."""
    floats = []
    for path, leaf in _pairs(tree):
        if is_float(leaf) and is_concrete(leaf):
            floats.append((path, leaf))
    # Also while a jitted function is traced that has closed over these values: they are known
    # there.
    with jax.ensure_compile_time_eval():
        finite = jax.device_get([_is_finite(x, but) for _, x in floats])
    for (path, leaf), fine in zip(floats, finite, strict=True):
        if fine:
            continue
        numbers = np.asarray(leaf, np.float32)
        bad = int(np.sum(~(np.isfinite(numbers) | (numbers == but))))
        raise ValueError(
            f"{what} {path or '(the array itself)'}: {bad} of {leaf.size} values are NaN or "
            "infinite; finite numbers are expected: mend or drop them first"
        )


def _pairs(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf."""
    paths, leaves, _ = named_leaves(tree, is_leaf)
    return zip(paths, leaves, strict=True)


def _is_finite(x: Any, but: float | None) -> Any:
    """Whether every number is finite, or `but`."""
    near = quickly_read(x)
    if near is not None:
        return _all_finite(near, but, np)
    return _compiled_all_finite(x, but)


def _all_finite(x: Any, but: float | None, numpy: Any = jnp) -> Any:
    allowed = numpy.isfinite(x)
    if but is not None:
        allowed |= x == numpy.asarray(but, x.dtype)
    return allowed.all()


_compiled_all_finite = partial(jax.jit, static_argnums=1)(_all_finite)
