"""Scales into parameters: the exact fold, its inverse, and what both check."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sqjax._trees import PyTree, map_named, named_leaves
from sqjax.folding.graph import Graph


def leaves_by_path(params: PyTree, graph: Graph) -> dict[str, Any]:
    """{path: leaf}, checked against the tree that was calibrated.

    Raises:
        ValueError: a leaf is missing, is new, or has another shape.
    """
    paths, leaves, _ = named_leaves(params)
    got, expected = dict(zip(paths, leaves, strict=True)), dict(graph.leaves)
    problems = [f"{p}: expected {expected[p]}, missing" for p in expected if p not in got]
    problems += [f"{p}: not in the calibrated tree" for p in got if p not in expected]
    problems += [
        f"{p}: expected shape {expected[p]}, got {tuple(jnp.shape(x))}"
        for p, x in got.items()
        if p in expected and tuple(jnp.shape(x)) != expected[p]
    ]
    if problems:
        listed = "\n  ".join(problems[:10])
        raise ValueError(
            f"the parameters are not the tree that was calibrated ({len(problems)} leaves differ); calibrate this "
            f"model, or pass its own Stats:\n  {listed}"
        )
    return got


def expand(s: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    """{site: s of each of its channels} for the groups in `s`; 1 for channels that no group scales."""
    factors: dict[str, Array] = {}
    for group in graph.groups:
        if group.name in s:
            with_one = jnp.concatenate(
                [jnp.ones(1, jnp.float32), s[group.name].astype(jnp.float32)]
            )
            for path, labels in group.sites:
                factor = with_one[labels.array]
                factors[path] = factors[path] * factor if path in factors else factor
    return factors


def fold(params: PyTree, graph: Graph, s: Mapping[str, Array]) -> PyTree:
    """Moves the scales into the parameters: site weights are multiplied by s, absorbing leaves divided by it.

    The result has the same tree, shapes and dtypes and is the same function. Computed in float32, cast back once.

    Args:
        params: the calibrated tree.
        graph: `stats.graph`.
        s: {group name: s}, as `scales` returns it; groups that are left out stay as they are.

    Raises:
        ValueError: params are not the calibrated tree, or a group is unknown or of another size.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 1))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])])
        >>> folded = sq.fold(params, stats.graph, {"w": jnp.array([1.0, 4.0])})
        >>> folded["norm"].tolist(), folded["w"].tolist()
        ([1.0, 0.25], [[1.0], [4.0]])
    """
    leaves_by_path(params, graph)
    check_scales(graph, s)
    return _scaled(params, graph, s, 1)


def unfold(params: PyTree, graph: Graph, s: Mapping[str, Array]) -> PyTree:
    """The inverse of `fold`: the parameters before s was folded in, up to rounding."""
    return _scaled(params, graph, s, -1)


def _scaled(params: PyTree, graph: Graph, s: Mapping[str, Array], sign: int) -> PyTree:
    factors: dict[str, list[tuple[Array, Any]]] = {}
    offsets = dict(graph.offsets)
    for group in graph.groups:
        if group.name in s:
            for path, labels in group.leaves:
                factors.setdefault(path, []).append((s[group.name], sign * labels.array))

    def scaled(path: str, leaf: Any) -> Any:
        return _scale_leaf(leaf, factors[path], offsets.get(path, 0.0)) if path in factors else leaf

    return map_named(scaled, params)


@partial(jax.jit, static_argnames="offset")
def _scale_leaf(leaf: Array, factors: list[tuple[Array, Array]], offset: float) -> Array:
    """The leaf times s where its label is positive, divided by s where it is negative, for every (s, labels).

    With an offset c it is c + leaf that is scaled: (c + leaf) / s - c.
    """
    value = leaf.astype(leaf.dtype if leaf.dtype == jnp.float64 else jnp.float32)
    value = value + offset if offset else value
    for scale, labels in factors:
        with_one = jnp.concatenate([jnp.ones(1, jnp.float32), scale.astype(jnp.float32)]).astype(
            value.dtype
        )
        value = value * with_one[labels.clip(min=0)] / with_one[(-labels).clip(min=0)]
    return (value - offset if offset else value).astype(leaf.dtype)


def check_scales(graph: Graph, s: Mapping[str, Array]) -> None:
    """Raises ValueError naming a group that the graph does not have, or whose s has another size."""
    sizes = {g.name: g.size for g in graph.groups}
    for name, scale in s.items():
        if name not in sizes:
            raise ValueError(f"no group is named {name!r}; the groups are {list(sizes)[:5]} ...")
        if jnp.shape(scale) != (sizes[name],):
            raise ValueError(
                f"{name}: expected s of shape {(sizes[name],)}, got {jnp.shape(scale)}"
            )
