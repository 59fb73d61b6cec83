"""Parameter trees: leaves named by their path, and regular expressions that choose among the names."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


def named_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[tuple[str, ...], list[Any], jax.tree_util.PyTreeDef]:
    """(paths, leaves, treedef): each path is the leaf's keys joined by "/", as in "layers/0/q_proj/kernel".

    Raises:
        ValueError: two leaves have one path, as in {"a/b": x, "a": {"b": y}}.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat)
    if len(set(paths)) < len(paths):
        twice = sorted(path for path, times in Counter(paths).items() if times > 1)
        raise ValueError(
            f"two leaves of the tree have one path, {twice[:5]}; rename a key that holds a '/'"
        )
    return paths, [leaf for _, leaf in flat], treedef


def map_named(change: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """The tree with every leaf replaced by change(path, leaf)."""
    paths, leaves, treedef = named_leaves(tree)
    return jax.tree_util.tree_unflatten(
        treedef, [change(p, x) for p, x in zip(paths, leaves, strict=True)]
    )


def is_concrete(x: Any) -> bool:
    """False for a tracer or an abstract value: checks of values are possible only outside jit."""
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def replicated(x: Any) -> Any:
    """One copy on every device of an array whose type says how it is cut (meshes with explicit axes); else x itself."""
    sharding = jax.typeof(x).sharding
    cut = any(entry is not None for entry in sharding.spec)
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec())) if cut else x


def is_float(x: Any) -> bool:
    """Whether a leaf is a floating-point array."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def check_arrays(params: PyTree) -> None:
    """Raises ValueError naming the first leaf of `params` that is no array."""
    paths, leaves, _ = named_leaves(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(
                f"parameter {path or '(the tree itself)'}: expected an array, got {type(leaf).__name__}; keep what is "
                "no array out of params (close fn over it)"
            )


def check_finite(tree: PyTree, what: str) -> None:
    """Raises ValueError naming the first leaf of `tree` that holds a NaN or an infinity. Tracers are passed over."""
    paths, leaves, _ = named_leaves(tree)
    floats = [(p, x) for p, x in zip(paths, leaves, strict=True) if is_float(x) and is_concrete(x)]
    with (
        jax.ensure_compile_time_eval()
    ):  # also where a jitted function has closed over these values
        flags = jax.device_get(_all_finite([x for _, x in floats]))
    for (path, leaf), fine in zip(floats, flags, strict=True):
        if not fine:
            bad = int(np.sum(~np.isfinite(np.asarray(leaf, np.float32))))
            raise ValueError(
                f"{what} {path or '(the array itself)'}: {bad} of {leaf.size} values are NaN or infinite; "
                "finite numbers are expected: mend or drop them first"
            )


@jax.jit
def _all_finite(arrays: list[Any]) -> list[Any]:
    return [jnp.all(jnp.isfinite(x)) for x in arrays]
