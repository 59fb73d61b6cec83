"""Rotations: the same function with its activations' outliers spread over all channels.

(X Q) (Q^T W) = X W for every orthogonal Q. Smoothing divides a channel that is large in all tokens;
a rotation takes also what is large in a few tokens, because one number a becomes n of about a /
sqrt(n). QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; SpinQuant, Liu et al. 2024, arXiv
2405.16406.

What may be rotated is `graph.spaces`, found in the program and not by the model's name.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._arguments import came, check_mapping, expect
from sqjax._names import first_matches, near_misses
from sqjax._trees import PyTree, check_finite, is_concrete
from sqjax.calibration.stats import Stats, leaf_sizes, weight_absmaxes
from sqjax.folding.apply import expand, leaves_by_path
from sqjax.folding.graph import Graph, Site, paths_of
from sqjax.folding.space import Along, Space
from sqjax.folding.turn import (
    gain_scales,
    turned,
    turned_along,
    with_gains_of_one,
)
from sqjax.methods.described import check_stats, check_weights
from sqjax.methods.smoothing import fold_stats_any_sign
from sqjax.numerics.orthogonal import (
    keeping_ones,
    random_hadamard,
    random_orthogonal,
)
from sqjax.weights.quant_weight import check_float

#: How matrices are drawn.
DRAWN = {"hadamard": random_hadamard, "random": random_orthogonal}

#: Q Q^T and 1 Q of a matrix may be off by so much: float32 rounds the sums of thousands by less.
ORTHOGONAL = 1e-4


def rotations(
    stats: Stats,
    how: str = "hadamard",
    *,
    seed: int = 0,
    spaces: str | Iterable[str] = "all",
) -> dict[str, Array]:
    """An orthogonal matrix for each space of a program.

    Args:
        stats: what `calibrate` returned; of it only `stats.graph`. One batch is enough.
        how: "hadamard" (signs drawn at random, times a Hadamard matrix: the flattest there is) or
            "random" (drawn evenly among all rotations).
        seed: of the drawing. Every space gets a matrix of its own.
        spaces: "all", or patterns of names, of which one is found in the name of the space or of
            one of its sites.

    Returns:
        {the space's name: Q, (size, size)}, float32, or float64 where jax has that enabled. Where a
        LayerNorm takes the mean of the channels, Q fixes the vector of ones.

    Raises:
        ValueError: stats, `how`, `seed` or a pattern is not one of those; or the program has no
            space, with the reason of each site.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x @ p["v"]) @ p["o"]
        >>> params = {"v": jnp.ones((3, 4)), "o": jnp.ones((4, 2))}
        >>> stats = sq.calibrate(fn, params, [jnp.ones((5, 3))])
        >>> q = sq.rotations(stats)["o"]
        >>> jnp.allclose(q @ q.T, jnp.eye(4), atol=1e-6).item()
        True
    """
    check_stats(stats, "rotations", ranges=False)
    if how not in DRAWN:
        raise ValueError(
            f"rotate: how: expected 'hadamard', 'random' or {{space: matrix}}, got {how!r}"
        )
    is_seed = isinstance(seed, Integral) and seed >= 0
    expect(is_seed, "rotate: seed", "a whole number, 0 or above", seed)
    if not stats.graph.spaces:
        reasons = [f"{site}: {why}" for site, why in stats.graph.space_refusals]
        raise ValueError(
            "rotate: this program has no space that may turn"
            + "".join(f"\n  {reason}" for reason in reasons[:10])
        )
    chosen = {space.name for space in _chosen(stats.graph, spaces)}
    return {
        space.name: _drawn(
            space, how, np.random.default_rng([int(seed), index])
        )
        for index, space in enumerate(stats.graph.spaces)
        if space.name in chosen
    }


def _drawn(space: Space, how: str, rng: np.random.Generator) -> Array:
    """A matrix for a space; of one that must keep ones all but that direction is drawn."""
    draw = DRAWN[how]
    if space.keeps_ones:
        return jnp.asarray(keeping_ones(draw(space.size - 1, rng)))
    return jnp.asarray(draw(space.size, rng))


def _chosen(graph: Graph, spaces: str | Iterable[str]) -> tuple[Space, ...]:
    """The spaces that a pattern is found in."""
    if spaces == "all":
        return graph.spaces
    expect(
        isinstance(spaces, Iterable),
        "spaces",
        "'all', or patterns of names",
        spaces,
    )
    patterns = [spaces] if isinstance(spaces, str) else list(spaces)
    names = [(space.name, *space.sites) for space in graph.spaces]
    # The name of a space is that of its first site, and each is listed once.
    flat = dict.fromkeys(name for of_one in names for name in of_one)
    what = "rotate: pattern of spaces"
    # All sites, so that a pattern of those that can not turn is told why.
    reasons = {
        site: why for site, why in graph.space_refusals if site not in flat
    }
    found = first_matches(patterns, [*flat, *reasons], what)
    matched = {found[name] for name in flat}
    for site, why in reasons.items():
        if found[site] not in {None, *matched}:
            raise ValueError(
                f"{what} {found[site]!r} is found only in sites that are in no space, as in "
                f"{site}: {why}"
            )
    return tuple(
        space
        for space, of_one in zip(graph.spaces, names, strict=True)
        if any(found[name] is not None for name in of_one)
    )


def rotate(
    params: PyTree,
    stats: Stats,
    how: str | Mapping[str, Any] = "hadamard",
    *,
    seed: int = 0,
    spaces: str | Iterable[str] = "all",
) -> PyTree:
    """The same function with its activations rotated: every leaf of a space is multiplied by Q.

    Rotate first, because only float parameters with their gains still in place can be: then
    calibrate what comes out, then smooth, search, quantize. Gains of norms are folded into the
    kernels behind them beforehand (they become ones), as a rotation could not pass them.

    Pure; works under jit, and is differentiable with respect to the matrices and params: matrices
    may be learned (`sqjax.numerics.orthogonal.cayley`). Under jit the matrices and gains are not
    checked.

    Args:
        params: the calibrated parameters.
        stats: what `calibrate` returned; of it only `stats.graph`. One batch is enough.
        how: "hadamard" or "random", as in `rotations`; or what that returns, {space: matrix}, for
            matrices of your own. A space that is left out stays as it is.
        seed: of the drawing.
        spaces: as in `rotations`; for a mapping leave it at "all".

    Returns:
        The tree of params, with the same shapes and dtypes.

    Raises:
        ValueError: params are not the calibrated tree, or hold NaN or infinity; a space is unknown;
            a matrix has another size, is not orthogonal, or does not fix the vector of ones where a
            LayerNorm asks for that; a gain stands in the way that no fold group can move.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x @ p["v"]) @ p["o"]
        >>> params = {"v": jnp.array([[5.0, 0.0], [5.0, 0.0]]), "o": jnp.ones((2, 1))}
        >>> stats = sq.calibrate(fn, params, [jnp.ones((1, 2))])
        >>> turn = jnp.array([[0.6, 0.8], [0.8, -0.6]])
        >>> rotated = sq.rotate(params, stats, {"o": turn})
        >>> x = jnp.array([[1.0, 1.0]])
        >>> (x @ params["v"]).tolist(), (x @ rotated["v"]).round().astype(int).tolist()
        ([[10.0, 0.0]], [[6, 8]])
        >>> sq.verify(fn, params, rotated, x) < 1e-6
        True
    """
    check_stats(stats, "rotate", ranges=False)
    check_float(params, "rotate")
    leaves_by_path(params, stats.graph)
    check_finite(params, "parameter")
    if isinstance(how, str):
        how = rotations(stats, how, seed=seed, spaces=spaces)
    elif spaces != "all":
        raise ValueError(
            "rotate: spaces chooses what is drawn; of matrices of your own give only those wanted"
        )
    turns = _checked(stats.graph, how)
    chosen = [space for space, _ in turns]
    return turned(with_gains_of_one(params, stats.graph, chosen), turns)


def rotate_stats(
    params: PyTree, stats: Stats, matrices: Mapping[str, Any]
) -> Stats:
    """The statistics of the rotated model, as far as they are known without running it.

    Of X Q the Gram matrix is Q^T (X^T X) Q, and a sampled token x is x Q: with these `gptq` rounds
    the rotated weights, where activations stay float or have scales that are computed at run time.
    The largest |x| of a channel is not known, nor are mean |x| and histograms: sites that turn have
    none, and what needs them (a static scale, `scales`, a search) asks for a calibration of the
    rotated parameters, which is never wrong.

    Args:
        params: the calibrated parameters, not the rotated ones.
        stats: their statistics, from `calibrate(..., gram=True)`, say; nothing folded in.
        matrices: what `rotate` was given, or `rotations` returned.

    Returns:
        Statistics of the same sites, whose arrays have the same shapes: Gram matrices (*batch,
        features, features), samples (*batch, tokens, features).

    Raises:
        ValueError: as `rotate`; the statistics are of other parameters; or they are not known,
            because a gain is 0, or something was folded in.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x @ p["v"]) @ p["o"]
        >>> params = {"v": jnp.array([[5.0, 0.0], [5.0, 0.0]]), "o": jnp.ones((2, 1))}
        >>> stats = sq.calibrate(fn, params, [jnp.ones((1, 2))], gram=True)
        >>> turn = {"o": jnp.array([[0.6, 0.8], [0.8, -0.6]])}
        >>> sq.rotate_stats(params, stats, turn).gram["o"].round().tolist()
        [[36.0, 48.0], [48.0, 64.0]]
        >>> stats.gram["o"].tolist()
        [[100.0, 0.0], [0.0, 0.0]]
    """
    check_stats(stats, "rotate_stats", ranges=False)
    rotated = leaves_by_path(rotate(params, stats, matrices), stats.graph)
    check_weights(params, stats, stats.graph.sites, _OTHERS)
    _check_nothing_folded(stats)
    turns = _checked(stats.graph, matrices)
    s, _ = gain_scales(params, stats.graph, [space for space, _ in turns])
    scaled = _without_gains(stats, s)
    gram, sample = dict(scaled.gram), dict(scaled.sample)
    sites = dict(
        zip(paths_of(stats.graph.sites), stats.graph.sites, strict=True)
    )
    turning = {path for space, _ in turns for path in space.sites}
    for space, q in turns:
        for path, along in _contracted_axes(space, sites):
            site = sites[path]
            if path in gram:
                half = _turned_features(gram[path], site, along, q)
                other = jnp.swapaxes(half, -1, -2)
                gram[path] = _turned_features(other, site, along, q)
            if path in sample:
                rows = _turned_features(sample[path].rows, site, along, q)
                sample[path] = replace(sample[path], rows=rows)
    # A histogram of X says nothing about X / s either.
    unknown = turning | expand(s, stats.graph).keys()
    return replace(
        scaled,
        absmax=_without(scaled.absmax, turning),
        abs_sum=_without(scaled.abs_sum, turning),
        histogram=_without(scaled.histogram, unknown),
        weight_absmax=weight_absmaxes(stats.graph.sites, rotated),
        leaf_sizes=leaf_sizes(rotated),
        folded=stats.folded,
        gram=gram,
        sample=sample,
    )


_OTHERS = "rotate_stats takes the parameters that were calibrated, not the rotated ones"


def _check_nothing_folded(stats: Stats) -> None:
    """Raises ValueError for what `fold_stats` made, because it says nothing of the rotated X."""
    for group, s in stats.folded.items():
        if is_concrete(s) and (np.asarray(s) != 1).any():
            raise ValueError(
                f"rotate_stats: expected statistics as calibrate returns them, got s of {group} "
                "folded in; rotate first, or calibrate the smoothed parameters"
            )


def _without_gains(stats: Stats, s: Mapping[str, Array]) -> Stats:
    """The statistics after gains have become ones: every X divided by the gain that it lost."""
    for group, scale in s.items():
        if is_concrete(scale) and (np.asarray(scale) == 0).any():
            raise ValueError(
                f"rotate_stats: {group}: a gain before it is 0 in some channels, of which nothing "
                "is known without it; calibrate the rotated parameters"
            )
    divided = fold_stats_any_sign(stats, s)
    # A gain may be negative, a magnitude is not.
    return replace(
        divided,
        absmax=jax.tree.map(jnp.abs, divided.absmax),
        abs_sum=jax.tree.map(jnp.abs, divided.abs_sum),
    )


def _contracted_axes(
    space: Space, sites: Mapping[str, Site]
) -> Iterator[tuple[str, Along]]:
    """(site, where the space lies along its contracted axes) for the activations that turn."""
    for path, along in space.leaves:
        if path in space.sites and along.axis in sites[path].axes:
            yield path, along


def _turned_features(x: Array, site: Site, along: Along, q: Array) -> Array:
    """x (*batch, any, features) multiplied by q along the part of the features that turns.

    Example: of a leaf (4 heads, 8, out), whose features are 32, the axis 1 is that of the 8.
    """
    sizes = site.channels[len(site.batch) :]
    apart = x.reshape(*x.shape[:-1], *sizes)
    axis = x.ndim - 1 + site.axes.index(along.axis)
    return turned_along(apart, q.astype(x.dtype), along.at(axis)).reshape(
        x.shape
    )


def _without(numbers: Mapping[str, Any], paths: set[str]) -> dict[str, Any]:
    return {path: x for path, x in numbers.items() if path not in paths}


def _checked(
    graph: Graph, matrices: Mapping[str, Any]
) -> list[tuple[Space, Array]]:
    """(space, its matrix), in the order of the graph."""
    check_mapping(
        matrices,
        "rotate: how",
        "'hadamard', 'random' or {space: matrix}, as rotations returns it",
    )
    by_name = {space.name: space for space in graph.spaces}
    for name in matrices:
        if name not in by_name:
            raise ValueError(
                f"rotate: no space is named {name!r}. Near misses: "
                f"{near_misses(str(name), list(by_name))}"
            )
    turns = []
    for name, space in by_name.items():
        if name in matrices:
            turns.append((space, _matrix(space, matrices[name])))
    return turns


def _matrix(space: Space, given: Any) -> Array:
    """A matrix that a space may be multiplied by, checked."""
    expected = f"floats of shape {(space.size, space.size)}"
    try:
        q = jnp.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rotate: {space.name}: expected {expected}, got {came(given)}, which is no array"
        ) from error
    is_square = q.shape == (space.size, space.size)
    if not is_square or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"rotate: {space.name}: expected {expected}, got {q.dtype} {q.shape}; sqjax.rotations "
            "returns a matrix for each space"
        )
    if is_concrete(q):
        _check_values(space, np.asarray(q, np.float64))
    return q


def _check_values(space: Space, q: np.ndarray) -> None:
    """Raises ValueError for a matrix that is no rotation, or none for this space."""
    off = np.abs(q @ q.T - np.eye(space.size)).max()
    if not off <= ORTHOGONAL:
        raise ValueError(
            f"rotate: {space.name}: expected an orthogonal matrix, Q Q^T = 1; it is off by "
            f"{off:.2g}. sqjax.numerics.orthogonal.cayley makes one of any square matrix"
        )
    if space.keeps_ones:
        off = np.abs(q.sum(0) - 1).max()
        if not off <= ORTHOGONAL:
            raise ValueError(
                f"rotate: {space.name}: a LayerNorm takes the mean of these channels, so the "
                f"matrix must fix the vector of ones, 1 Q = 1; it is off by {off:.2g}. "
                "sqjax.numerics.orthogonal.keeping_ones makes such a matrix"
            )
