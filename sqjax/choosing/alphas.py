"""`search_alpha`: the strength of smoothing for each fold group, from the data.

The authors of SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) give one alpha for a model, found by
hand. Here every group gets the one whose quantized output is nearest to the float one.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._arguments import expect
from sqjax._trees import PyTree
from sqjax.calibration.stats import Stats
from sqjax.choosing.candidates import (
    choose,
    searched_groups,
    searched_schemes,
)
from sqjax.folding.graph import Group
from sqjax.methods.described import check_known, check_stats
from sqjax.methods.quantization import Rules
from sqjax.methods.smoothing import check_alpha, scales_of_groups

#: 0, 0.05, ... 1.
GRID = tuple((np.arange(21) / 20).tolist())


class AlphaSearch(NamedTuple):
    """What `search_alpha` found.

    Attributes:
        s: {group: its smoothing scales}, for `fold` and `fold_stats`: what `scales` gives for the
            alpha, or ones.
        alphas: {group: its alpha}, a number; for stacked layers an array with one for each step.
            NaN where no smoothing was best.
        errors: {group: the error of every candidate}: (1 + len(grid),), the first of no smoothing;
            for stacked layers (1 + len(grid), steps). It is the sum over the group's sites of the
            mean over tokens of |x W - quantized|^2 / |x W|^2, to be plotted against the grid.
        grid: the alphas that were tried.
    """

    s: dict[str, Array]
    alphas: dict[str, Any]
    errors: dict[str, np.ndarray]
    grid: np.ndarray


def search_alpha(
    params: PyTree,
    stats: Stats,
    scheme: Rules,
    *,
    grid: Sequence[float] = GRID,
    groups: str | Iterable[str] = "all",
) -> AlphaSearch:
    """For each fold group the alpha whose quantized output is nearest to the float one.

    Every alpha of the grid is tried, and no smoothing (s = 1) first. What is compared is

        sum over the group's sites of the mean over tokens of |x W - Q(x / s) Q(s W)|^2 / |x W|^2

    with the scheme's own quantizers, for the sample of tokens x in the statistics. So by this
    measure no group is worse than unsmoothed. A static scale is that of all calibration tokens. A
    scale that a whole tensor shares is the one to expect of new tokens, which exceed those of
    calibration (`sqjax.numerics.tails`). Where activations stay float, the error is that of all
    tokens together, |X W - X Q(s W) / s|^2 / |X W|^2, from the Gram matrix if there is one.

    Args:
        params: the calibrated parameters.
        stats: of `calibrate(..., sample=512)`.
        scheme: what `quantize` will be given: a scheme, or rules. Sites that stay float count for
            nothing, and groups without others are not in the result.
        grid: the alphas to try, each in [0, 1].
        groups: as for `scales`: "all", "norm", or name patterns.

    Returns:
        `AlphaSearch`. Layers stacked for a scan have an alpha each. Groups with convolutions are
        not in it: they stay as they are.

    Raises:
        ValueError: the statistics have no sample, or do not describe these params; the grid is
            empty, or holds something else than numbers in [0, 1]; a scheme with smoothing at run
            time or outliers; what `quantize` refuses of rules, and `scales` of groups.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(4), "w": jax.random.normal(jax.random.key(0), (4, 3))}
        >>> x = jax.random.normal(jax.random.key(1), (64, 4)) * jnp.array([1.0, 1.0, 1.0, 99.0])
        >>> stats = sq.calibrate(fn, params, [x], sample=64)
        >>> found = sq.search_alpha(params, stats, sq.W8A8_O3)
        >>> found.alphas["w"] > 0.3, found.errors["w"].shape
        (True, (22,))
        >>> smoothed = sq.fold(params, stats.graph, found.s)
        >>> qparams = sq.quantize(smoothed, sq.fold_stats(stats, found.s), sq.W8A8_O3)
    """
    check_stats(stats, "search_alpha")
    check_known(params, stats, "search_alpha")
    schemes = searched_schemes(stats, scheme, "search_alpha")
    tried = checked_grid(grid, "search_alpha")
    chosen = searched_groups(stats, groups, schemes, "search_alpha")
    candidates = alpha_candidates(params, stats, chosen, tried)
    found = choose(params, stats, schemes, candidates)
    alphas = found.values(np.append(np.nan, tried))
    return AlphaSearch(found.s, alphas, found.errors, tried)


def alpha_candidates(
    params: PyTree, stats: Stats, groups: Iterable[Group], alphas: np.ndarray
) -> dict[str, Array]:
    """{group: s = 1, and s for each alpha}, (1 + alphas, group.size).

    Raises:
        ValueError: the statistics do not describe these params.
    """
    names = [group.name for group in groups]

    def of_alpha(alpha: Array) -> dict[str, Array]:
        return scales_of_groups(params, stats, dict.fromkeys(names, alpha))

    found = jax.vmap(of_alpha)(jnp.asarray(alphas, jnp.float32))
    return {
        name: jnp.concatenate([jnp.ones_like(s[:1]), s])
        for name, s in found.items()
    }


def checked_grid(grid: Sequence[float], what: str) -> np.ndarray:
    """The numbers of a grid, float64.

    Raises:
        ValueError: there are none, or one is not in [0, 1].
    """
    expect(
        np.ndim(grid) == 1 and len(grid) > 0,
        f"{what}: grid",
        "numbers in [0, 1], such as [0.5, 0.7, 0.85]",
        grid,
    )
    for number in grid:
        check_alpha(f"{what}: grid", number)
    return np.asarray(grid, np.float64)
