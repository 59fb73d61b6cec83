"""SmoothQuant: per-channel scales from statistics, and their exact fold into the parameters.

(X / s)(s W) = X W for every positive s: dividing the leaves that produce X by s and multiplying the rows of W by s
leaves the function as it was, while outliers move from activations, which are hard to quantize, to weights, which
are easy. Xiao et al. 2022, arXiv 2211.10438.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sqjax._names import first_matches
from sqjax._trees import PyTree, check_finite, is_concrete, replicated
from sqjax.calibration.stats import Stats, weight_absmax
from sqjax.folding.apply import check_scales, expand, fold, leaves_by_path
from sqjax.folding.graph import Group
from sqjax.numerics.smoothing import smoothing_scales

Alpha = Any  # a number (or a traced scalar), or a mapping from name patterns to numbers


def scales(
    params: PyTree,
    stats: Stats,
    alpha: Alpha = 0.5,
    *,
    groups: str | Iterable[str] = "all",
    attention: float | None = None,
    round_scales: Literal["pow2"] | None = None,
) -> dict[str, Array]:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for every group (Xiao et al. 2022, equation 4).

    max|W_j| runs over every output of every site in the group; max|W_j| and s have a floor of 1e-5, as in the
    authors' code. Tied channels share one s, from the largest of their statistics. Where we deviate: a channel that
    calibration never saw alive gets s = 1 (the authors' code gives 1e-5 there and multiplies the norm by 100,000).

    Args:
        params: the calibrated parameters. All groups' scales come from these, so their order does not matter.
        stats: what `calibrate` returned.
        alpha: from 0 (s depends on the weights only) to 1 (on the activations only: all difficulty moves into the
            weights); or a mapping from name patterns to numbers, the first pattern that matches a group's site wins.
        groups: "all"; "norm" (what the authors' code smooths: groups that a norm absorbs, the head left out); or name
            patterns, searched in the sites' paths.
        attention: where calibration was asked for it, s_j = max|K_j|^attention between keys and queries too, K / s and
            s Q (SmoothAttention, Lin et al. 2024, arXiv 2405.04532, with 0.5); None: not.
        round_scales: "pow2" rounds s to powers of two, which makes the fold exact in float32 and bfloat16.

    Returns:
        {group name: float32 s, shape (the group's number of scales,)}.

    Raises:
        ValueError: params are not the calibrated tree, or hold NaN or infinity; alpha is outside [0, 1]; a pattern
            matches nothing, or a group has no pattern. (Values can not be checked under jit.)

    Example:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])])
        >>> sq.scales(params, stats, alpha=0.5)["w"].tolist()
        [1.0, 4.0]
    """
    leaves = leaves_by_path(params, stats.graph)
    check_finite(params, "parameter")
    chosen = stats.graph.select(groups)
    alphas = _alphas(alpha, chosen)
    s = {g.name: _group_scales(g, leaves, stats, alphas[g.name], round_scales) for g in chosen}
    return s if attention is None else s | _keys_scales(stats, attention, round_scales)


def _keys_scales(stats: Stats, exponent: float, round_scales: str | None) -> dict[str, Array]:
    """max|K_j|^exponent: the formula with no weight."""
    groups = [g for g in stats.graph.groups if g.keys]
    if not groups:
        raise ValueError(
            "scales: attention was asked for, but no scale can move between keys and queries: "
            "calibrate(..., attention=True) looks for them, and found none or was not called so"
        )
    seen = {
        g.name: [(labels.array.ravel(), stats.absmax[path].ravel()) for path, labels in g.sites[:1]]
        for g in groups
    }
    ones = {
        name: [(scale_of, x, jnp.ones_like(x)) for scale_of, x in found]
        for name, found in seen.items()
    }
    return {g.name: _scales_of(ones[g.name], exponent, g.size, round_scales) for g in groups}


def _group_scales(
    group: Group, leaves: Mapping[str, Any], stats: Stats, alpha: Any, round_scales: str | None
) -> Array:
    sites = {site.path: site for site in stats.graph.sites}
    seen = [
        (
            labels.array.ravel(),
            stats.absmax[path].ravel(),
            weight_absmax(sites[path], leaves[path]).ravel(),
        )
        for path, labels in group.sites
    ]
    return _scales_of(seen, alpha, group.size, round_scales)


@partial(jax.jit, static_argnames=("size", "round_scales"))
def _scales_of(
    seen: list[tuple[Array, Array, Array]], alpha: Any, size: int, round_scales: str | None
) -> Array:
    """s of a group, from (which scale, absmax, weight absmax) of the channels of each of its sites."""
    x_max = w_max = jnp.zeros(size + 1, jnp.float32)  # entry 0 takes the channels without a scale
    for scale_of, x, w in seen:
        x_max, w_max = x_max.at[scale_of].max(replicated(x)), w_max.at[scale_of].max(replicated(w))
    s = smoothing_scales(x_max[1:], w_max[1:], alpha)
    return jnp.exp2(jnp.round(jnp.log2(s))) if round_scales == "pow2" else s


def _alphas(alpha: Alpha, groups: Iterable[Group]) -> dict[str, Any]:
    groups = list(groups)
    if not isinstance(alpha, Mapping):
        alpha = {"": alpha}
    for pattern, value in alpha.items():
        if is_concrete(value) and not 0 <= float(value) <= 1:
            raise ValueError(
                f"alpha{f' for {pattern!r}' if pattern else ''}: expected a number in [0, 1], got {value}"
            )
    paths = [path for g in groups for path, _ in g.sites]
    found = first_matches(alpha, paths, "alpha pattern") if paths else {}
    chosen = {
        g.name: next((found[p] for p, _ in g.sites if found[p] is not None), None) for g in groups
    }
    if missing := [name for name, pattern in chosen.items() if pattern is None]:
        raise ValueError(
            f"alpha: no pattern matches {missing[:5]}; end the mapping with '.*' for the rest"
        )
    return {name: alpha[pattern] for name, pattern in chosen.items()}


def fold_stats(stats: Stats, s: Mapping[str, Array]) -> Stats:
    """The statistics of the folded model: absmax and abs_sum of every site divided by s.

    Equal to calibrating again up to rounding. Static activation scales must come from these. A histogram of X says
    nothing about X / s: histograms stay those of X, and serve only at sites whose s is all ones (`quantize` holds
    that); for the others, calibrate the folded parameters.

    Args:
        stats: what `calibrate` returned.
        s: {group name: s}, the same that `fold` is given.

    Raises:
        ValueError: a group is unknown or its s has another size.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 1))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])])
        >>> sq.fold_stats(stats, {"w": jnp.array([1.0, 4.0])}).absmax["w"].tolist()
        [1.0, 4.0]
    """
    check_scales(stats.graph, s)
    divisors = expand(s, stats.graph)

    def divided(statistic):
        return {
            path: x / divisors[path] if path in divisors else x for path, x in statistic.items()
        }

    folded = {name: x * s[name] if name in s else x for name, x in stats.folded.items()}
    return replace(
        stats, absmax=divided(stats.absmax), abs_sum=divided(stats.abs_sum), folded=folded
    )


def smooth(
    params: PyTree,
    stats: Stats,
    alpha: Alpha = 0.5,
    *,
    groups: str | Iterable[str] = "all",
    attention: float | None = None,
    round_scales: Literal["pow2"] | None = None,
) -> PyTree:
    """SmoothQuant: the same function with its activation outliers moved into the weights; `fold` of `scales`.

    Pure; works under jit, and is differentiable with respect to alpha and params. Arguments and errors are those of
    `scales`. Static activation scales then need `fold_stats(stats, scales(params, stats, alpha))`; `smoothquant`
    does the whole sequence.

    Example:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])])
        >>> sq.smooth(params, stats, 0.5)["norm"].tolist()
        [1.0, 0.25]
    """
    s = scales(params, stats, alpha, groups=groups, attention=attention, round_scales=round_scales)
    return fold(params, stats.graph, s)
