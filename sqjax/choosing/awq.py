"""AWQ: smoothing scales and clipped ranges for narrow weights, by the error of the output.

Lin et al. 2023, arXiv 2306.00978. A weight that meets a large activation costs more if it is
rounded than others do. Multiplying its row by s makes it large within its group, so that it is
rounded more finely, and the activation is divided by s. It is the fold of SmoothQuant, for another
purpose.

    s_j = (mean |X_j|)^r, divided by sqrt(max s * min s)

with the r of a grid that makes |X W - X Q(s W) / s|^2 least. Where the authors run the model on
some tokens for each r, here the Gram matrix of calibration gives that error of all tokens exactly:
the model is not run again. Ranges are clipped afterwards, on the folded weights: see
`sqjax.choosing.clips`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._trees import PyTree
from sqjax.calibration.stats import Stats
from sqjax.choosing.alphas import alpha_candidates, checked_grid
from sqjax.choosing.candidates import (
    Schemes,
    choose,
    searched_groups,
    searched_schemes,
)
from sqjax.choosing.clips import search_clips
from sqjax.folding.apply import fold
from sqjax.folding.graph import Group
from sqjax.methods.described import check_known, check_leaves, check_stats
from sqjax.methods.quantization import Rules
from sqjax.methods.smoothing import fold_stats
from sqjax.numerics.smoothing import believable
from sqjax.weights.schemes import W4A8, W4A16

#: 0, 0.05, ... 0.95: the first is s = 1.
EXPONENTS = tuple((np.arange(20) / 20).tolist())
#: Of the hybrid, which runs the sample of tokens once for each.
ALPHAS = tuple((np.arange(3, 20) / 20).tolist())


class Awq(NamedTuple):
    """What `awq` and `smooth_awq` found.

    Attributes:
        s: {group: its smoothing scales}, for `fold` and `fold_stats`.
        clips: {site: the share of each range that is kept}, for `quantize`.
        exponents: {group: its r}, a number; for stacked layers an array with one for each step. 0
            is s = 1.
        alphas: {group: the alpha of smoothing before}, of `smooth_awq`; NaN where none was best.
        errors: {group: the relative error of each r}, (len(grid),), or (len(grid), steps): the sum
            over its sites.
        grid: the r that were tried.
    """

    s: dict[str, Array]
    clips: dict[str, Array]
    exponents: dict[str, Any]
    alphas: dict[str, Any]
    errors: dict[str, np.ndarray]
    grid: np.ndarray


def awq(
    params: PyTree,
    stats: Stats,
    scheme: Rules = W4A16,
    *,
    grid: Sequence[float] = EXPONENTS,
    groups: str | Iterable[str] = "all",
    clip: bool = True,
) -> Awq:
    """AWQ's scales and clipped ranges, of which the output's error is least.

    Of every fold group, v -> o and up -> down among them, each r of the grid is tried, by the Gram
    matrix: the sum over its sites of |X W - X Q(s W) / s|^2 / |X W|^2. So by this measure no group
    is worse than with s = 1, and no output is worse clipped than unclipped.

    Args:
        params: the calibrated parameters.
        stats: of `calibrate(..., gram=True)`.
        scheme: what `quantize` will be given: a scheme such as W4A16 or W8A16, or rules. Of a
            scheme with narrow activations the weights alone are looked at.
        grid: the r to try, each in [0, 1]; 0, which is s = 1, is put first if it is not there.
        groups: as for `scales`.
        clip: whether ranges are searched too.

    Returns:
        `Awq`. Apply it with fold(params, stats.graph, found.s), fold_stats(stats, found.s) and
        quantize(..., clips=found.clips).

    Raises:
        ValueError: the statistics have no Gram matrices, or do not describe these params; the grid
            is empty or holds something else than numbers in [0, 1]; what `quantize` refuses of
            rules, and `scales` of groups.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(8), "w": jax.random.normal(jax.random.key(0), (8, 3))}
        >>> x = jax.random.normal(jax.random.key(1), (64, 8)) * jnp.ones(8).at[3].set(50.0)
        >>> stats = sq.calibrate(fn, params, [x], gram=True)
        >>> found = sq.awq(params, stats, sq.W4A16_G64)
        >>> found.exponents["w"] > 0, found.clips["w"].shape
        (True, (3, 1))
        >>> folded, after = sq.fold(params, stats.graph, found.s), sq.fold_stats(stats, found.s)
        >>> qparams = sq.quantize(folded, after, sq.W4A16_G64, clips=found.clips)
    """
    check_stats(stats, "awq")
    check_known(params, stats, "awq")
    schemes = searched_schemes(stats, scheme, "awq")
    tried = _with_zero(checked_grid(grid, "awq"))
    chosen = searched_groups(stats, groups, schemes, "awq", weights_only=True)
    _check_described(params, stats, schemes)
    candidates = {
        group.name: awq_scales(group, stats, tried) for group in chosen
    }
    found = choose(params, stats, schemes, candidates, weights_only=True)
    clips = _clips_after(params, stats, found.s, schemes) if clip else {}
    exponents = found.values(tried)
    return Awq(found.s, clips, exponents, {}, found.errors, tried)


def smooth_awq(
    params: PyTree,
    stats: Stats,
    scheme: Rules = W4A8,
    *,
    alphas: Sequence[float] = ALPHAS,
    grid: Sequence[float] = EXPONENTS,
    groups: str | Iterable[str] = "all",
    clip: bool = True,
) -> Awq:
    """SmoothQuant for the activations, then AWQ for the narrow weights, in one call.

    Three steps, each of which sees what the ones before it left:

    1. Of every group the alpha of smoothing, or none, with which the output is nearest to the float
       one, under the whole scheme: narrow activations and narrow weights.
    2. Of what that leaves the r of AWQ, with the same measure: s is s_alpha times AWQ's own of
       X / s_alpha. r = 0 changes nothing, so a group is never worse than after step 1.
    3. The ranges of the folded weights are clipped, by the Gram matrix, as in `awq`.

    Args:
        params: the calibrated parameters.
        stats: of `calibrate(..., sample=512, gram=True)`; without Gram matrices nothing is clipped.
        scheme: what `quantize` will be given: W4A8, say, or rules.
        alphas: the alphas to try, each in [0, 1]; no smoothing is tried first.
        grid: the r to try, as for `awq`.
        groups: as for `scales`.
        clip: whether ranges are searched too.

    Returns:
        `Awq`, with the alphas.

    Raises:
        ValueError: as `search_alpha` and `awq`.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(8), "w": jax.random.normal(jax.random.key(0), (8, 3))}
        >>> x = jax.random.normal(jax.random.key(1), (64, 8)) * jnp.ones(8).at[3].set(50.0)
        >>> stats = sq.calibrate(fn, params, [x], sample=64, gram=True)
        >>> found = sq.smooth_awq(params, stats, sq.W4A8)
        >>> found.s["w"].shape, found.clips["w"].shape
        ((8,), (3, 1))
    """
    check_stats(stats, "smooth_awq")
    check_known(params, stats, "smooth_awq")
    schemes = searched_schemes(stats, scheme, "smooth_awq")
    of_smoothing = checked_grid(alphas, "smooth_awq")
    tried = _with_zero(checked_grid(grid, "smooth_awq"))
    chosen = searched_groups(stats, groups, schemes, "smooth_awq")
    _check_described(params, stats, schemes)

    smoothing = alpha_candidates(params, stats, chosen, of_smoothing)
    first = choose(params, stats, schemes, smoothing)
    candidates = {}
    for group in chosen:
        before = first.s[group.name]  # of step 1
        left = awq_scales(group, stats, tried, before)
        candidates[group.name] = before[None] * left
    found = choose(params, stats, schemes, candidates)

    clips = _clips_after(params, stats, found.s, schemes) if clip else {}
    return Awq(
        found.s,
        clips,
        found.values(tried),
        first.values(np.append(np.nan, of_smoothing)),
        found.errors,
        tried,
    )


def awq_scales(
    group: Group,
    stats: Stats,
    exponents: np.ndarray,
    before: Array | None = None,
) -> Array:
    """s_j = (mean |X_j|)^r / sqrt(max s * min s) for each r: (exponents, group.size).

    Tied channels have the largest of their means. A channel far below the median is taken to be
    like that one (`sqjax.numerics.smoothing.believable`), and one that was never seen alive has
    s = 1. Layers of a stack are each normalised by themselves. `before` is an s that X is divided
    by first.
    """
    # Label 0, no scale, has a place of its own, which is left out below.
    largest = jnp.zeros(group.size + 1, jnp.float32)
    for path, labels in group.sites:
        scale_of = labels.array.reshape(-1)
        largest = largest.at[scale_of].max(stats.abs_sum[path].reshape(-1))
    # Sums will do, because a number of tokens that all channels share is normalised away.
    sums = largest[1:] if before is None else largest[1:] / before
    steps = math.prod(group.steps)
    return _normalised(sums.reshape(steps, -1), jnp.asarray(exponents))


@jax.jit
def _normalised(sums: Array, exponents: Array) -> Array:
    """(sums / sqrt(max sums * min sums))^r of each row, for each r; 1 for channels never alive."""
    seen = believable(sums, 1)
    alive = seen > 0
    logs = jnp.log(jnp.where(alive, seen, 1))
    highest = jnp.max(jnp.where(alive, logs, -jnp.inf), axis=1, keepdims=True)
    lowest = jnp.min(jnp.where(alive, logs, jnp.inf), axis=1, keepdims=True)
    # In logs the root of max * min is the middle between the highest and the lowest.
    centred = jnp.where(alive, logs - (highest + lowest) / 2, 0).reshape(1, -1)
    powers = exponents.astype(jnp.float32).reshape(-1, 1)
    return jnp.exp(powers * centred)


def _check_described(params: PyTree, stats: Stats, schemes: Schemes) -> None:
    """Raises ValueError if the statistics are of other parameters."""
    # All sites and not those of groups alone, because the others are clipped too.
    sites = [site for site in stats.graph.sites if site.path in schemes]
    advice = "pass fold_stats(stats, s), with the s that was folded in, or calibrate these"
    check_leaves(params, stats, sites, advice)


def _clips_after(
    params: PyTree, stats: Stats, s: dict[str, Array], schemes: Schemes
) -> dict[str, Array]:
    """The clipped ranges of the folded weights."""
    folded = fold(params, stats.graph, s)
    return search_clips(folded, fold_stats(stats, s), schemes)


def _with_zero(grid: np.ndarray) -> np.ndarray:
    """The exponents with 0, which is s = 1, first."""
    return np.append(0.0, grid[grid != 0])
