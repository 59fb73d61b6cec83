"""Scales into parameters: the exact fold, its inverse, and what both check."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from sqjax._arguments import check_mapping, expect
from sqjax._trees import PyTree, is_concrete, map_named, named_leaves
from sqjax.folding.graph import Graph
from sqjax.folding.labels import Labels, channels_and_degrees


def leaves_by_path(params: PyTree, graph: Graph) -> dict[str, Any]:
    """{path: leaf}, checked against the tree that was calibrated.

    Raises:
        ValueError: a leaf is missing, is new, or has another shape; the first ten such leaves are
            listed.
    """
    check_graph(graph)
    paths, leaves, _ = named_leaves(params)
    got, expected = dict(zip(paths, leaves, strict=True)), dict(graph.leaves)
    problems = _differences(got, expected)
    if problems:
        listed = "\n  ".join(problems[:10])
        raise ValueError(
            f"the parameters are not the tree that was calibrated ({len(problems)} leaves differ); "
            f"calibrate this model, or pass its own Stats:\n  {listed}"
        )
    return got


def check_graph(graph: Any) -> None:
    """Raises ValueError for what is no graph: statistics, say, or arguments in another order."""
    is_graph = isinstance(graph, Graph)
    expect(
        is_graph, "fold", "a graph, as in fold(params, stats.graph, s)", graph
    )


def _differences(
    got: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is wrong with leaves, where leaves of these shapes are expected: one line each."""
    problems: list[str] = []
    for path in expected:
        if path not in got:
            problems.append(f"{path}: expected {expected[path]}, missing")
    for path, leaf in got.items():
        shape = tuple(jnp.shape(leaf))
        if path not in expected:
            problems.append(f"{path}: not in the calibrated tree")
        elif shape != expected[path]:
            problems.append(
                f"{path}: expected shape {expected[path]}, got {shape}"
            )
    return problems


def expand(s: Mapping[str, Array], graph: Graph) -> dict[str, Array]:
    """{site: s of each of its channels} for the groups in `s`; 1 for channels that no group scales.

    Example: a group "w" with the scales [3, 5] whose site w has the labels [0, 1, 2] gives {"w":
    [1, 3, 5]}.
    """
    factors: dict[str, Array] = {}
    for group in graph.groups:
        if group.name not in s:
            continue
        # Different groups scale different channels of a site, so the other one's factor is 1.
        for path, labels in group.sites:
            own = _times_labelled(
                factors.get(path), s[group.name], labels.array
            )
            factors[path] = own
    return factors


@jax.jit
def _times_labelled(factor: Any, s: Array, labels: Array) -> Array:
    """A factor of each channel, or None, times the s that its label says."""
    own = _with_one(s)[labels]
    return own if factor is None else factor * own


def fold(params: PyTree, graph: Graph, s: Mapping[str, Array]) -> PyTree:
    """Moves the scales into the parameters: site weights are multiplied by s, absorbing leaves
    divided by it.

    (X / s)(s W) = X W: the result has the same tree, shapes and dtypes, and is the same function.
    Computed in float32, cast back once.

    Args:
        params: the calibrated tree.
        graph: `stats.graph`.
        s: {group name: s}, as `scales` returns it, every s of shape (group.size,); groups that are
            left out stay as they are.

    Raises:
        ValueError: params are not the calibrated tree; a group is unknown; an s has another size,
            or numbers that are not above 0 and finite (not checked under jit).

    Examples:
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


def fold_any_sign(
    params: PyTree, graph: Graph, s: Mapping[str, Array]
) -> PyTree:
    """`fold` without its checks, for scales that may be negative or, where no leaf that matters is
    divided by them, zero. Whoever calls it knows that every equation on the way allows that.
    """
    return _scaled(params, graph, s, 1)


def _scaled(
    params: PyTree, graph: Graph, s: Mapping[str, Array], sign: int
) -> PyTree:
    """The parameters with s folded in (sign 1) or taken out again (sign -1, which exchanges times
    and divided by).
    """
    factors: dict[str, list[tuple[Array, Any]]] = {}
    for group in graph.groups:
        if group.name in s:
            for path, labels in group.leaves:
                # An array again, because of one without axes numpy makes a number here.
                signed = np.asarray(sign * labels.array)
                parts = _by_degree(s[group.name], signed)
                factors.setdefault(path, []).extend(parts)
    offsets = dict(graph.offsets)

    def scaled(path: str, leaf: Any) -> Any:
        if path not in factors:
            return leaf
        return _scale_leaf(leaf, factors[path], offsets.get(path, 0.0))

    return map_named(scaled, params)


def _by_degree(s: Array, labels: Labels) -> list[tuple[Array, Labels]]:
    """(d-th root of s, labels) for every degree d of roots in labels, which become plain ones."""
    channels, degrees = channels_and_degrees(labels)
    parts = []
    for degree in np.unique(degrees):
        plain = np.where(degrees == degree, np.sign(labels) * channels, 0)
        root = s
        # Degrees are powers of two, and square roots are exact where s is such a power of two.
        for _ in range(int(degree).bit_length() - 1):
            root = jnp.sqrt(root)
        parts.append((root, plain))
    return parts


@partial(jax.jit, static_argnames="offset")
def _scale_leaf(
    leaf: Array, factors: list[tuple[Array, Array]], offset: float
) -> Array:
    """The leaf times s where its label is positive, divided by s where it is negative, for every
    (s, labels).

    With an offset c it is c + leaf that is scaled: the function reads that sum, so (c + leaf) / s -
    c is stored.
    """
    # In float32 at least: two roundings to bfloat16 would be one too many.
    value = leaf.astype(
        leaf.dtype if leaf.dtype == jnp.float64 else jnp.float32
    )
    value = value + offset if offset else value
    for scale, labels in factors:
        with_one = _with_one(scale, value.dtype)
        # A label of the other sign is clipped to 0, whose scale is 1.
        times, divided = labels.clip(min=0), (-labels).clip(min=0)
        value = value * with_one[times] / with_one[divided]
    return (value - offset if offset else value).astype(leaf.dtype)


def _with_one(scale: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """[1, s[0], s[1], ...]: what a label multiplies by, found at the label itself."""
    return jnp.concatenate([jnp.ones(1, dtype), scale.astype(dtype)])


def check_scales(graph: Graph, s: Mapping[str, Array]) -> None:
    """Raises ValueError naming a group that the graph does not have, or whose s has another
    size.
    """
    check_mapping(s, "s", "{group: its scales}, as sqjax.scales returns it")
    sizes = {g.name: g.size for g in graph.groups}
    for name, scale in s.items():
        if name not in sizes:
            raise ValueError(
                f"no group is named {name!r}; the groups are {list(sizes)[:5]} ..."
            )
        expected, shape = (sizes[name],), jnp.shape(scale)
        if shape != expected:
            raise ValueError(
                f"{name}: expected s of shape {expected}, got {shape}"
            )
        _check_positive(name, scale)


def _check_positive(name: str, scale: Any) -> None:
    """Raises ValueError if a scale is not above 0 and finite; values are not known under jit."""
    if not is_concrete(scale):
        return
    # A known array under jit: to read it must not become a part of the compiled program.
    with jax.ensure_compile_time_eval():
        values = np.asarray(scale, np.float64)
    wrong = ~((values > 0) & np.isfinite(values))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: expected scales above 0 and finite, got {values[first]} at {first} "
            f"({int(wrong.sum())} of {values.size} are not): dividing by these is no smoothing. "
            "A channel that shall stay as it is has s = 1"
        )
