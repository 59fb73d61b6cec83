"""SmoothQuant: smoothing scales from statistics, and their exact fold into the parameters.

(X / s)(s W) = X W for every positive s. Dividing the leaves that produce X by s, and multiplying
the rows of W by s, leaves the function as it was. But it moves outliers from activations, which are
hard to quantize because all channels of a token share one quantizer scale, to weights, which are
easy. Xiao et al. 2022, arXiv 2211.10438.

Here `s` always means smoothing scales: one number a channel, folded away before anything is
quantized. They are none of the quantizer's scales, which `sqjax.methods.quantization` makes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from numbers import Real
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._names import first_matches
from sqjax._trees import PyTree, check_finite, is_concrete, replicated
from sqjax.calibration.stats import Stats, weight_absmax
from sqjax.folding.apply import check_scales, expand, fold, leaves_by_path
from sqjax.folding.graph import Group, Site, paths_of
from sqjax.methods.described import check_stats, check_weights
from sqjax.numerics.smoothing import believable, smoothing_scales
from sqjax.weights.quant_weight import check_float

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
    """The smoothing scales of every group: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).

    That is equation 4 of Xiao et al. 2022. X_j is channel j of the activation that a group's sites
    share; max|X_j| comes from calibration. W_j is what multiplies it; max|W_j| runs over every
    output of every site in the group. max|W_j| and s have a floor of 1e-5, as in the authors' code.
    Channels that are tied (those of the query heads that share one key head) have one s, from the
    largest of their statistics.

    Which alpha: it says how much of the difficulty moves from the activations into the weights.
    With 1 every channel of X / s has the absmax 1, and the weights take all of the outliers; with 0
    every row of s W has it, and the activations stay hard; with 0.5 the two absmaxes of a channel
    become equal. 0.5 is right where the outliers are mild (OPT, BLOOM). Models with stronger ones
    want more: the authors take 0.75 for GLM-130B and 0.8 to 0.9 for Llama and Mistral. What tells
    is the error of the quantized model, so try 0.5, 0.7 and 0.85.

    Where we deviate: a channel that calibration never saw alive gets s = 1. The authors' code gives
    it 1e-5, which multiplies the norm by 100,000. A channel below 1/64 of the median channel is
    taken to be like that one (`sqjax.numerics.smoothing.believable`). And an expert that few tokens
    reached, n < 32, has s^(n / 32), because so few say little of the largest.

    Args:
        params: the calibrated parameters. All groups' scales come from these, so their order does
            not matter.
        stats: what `calibrate` returned.
        alpha: a number from 0 to 1; or a mapping from name patterns to numbers, in which the first
            pattern that is found in a site's path wins. A group takes the number of its first site
            that has one.
        groups: "all"; "norm" (what the authors' code smooths: groups that a norm absorbs, the head
            left out); or name patterns, searched in the sites' paths.
        attention: where calibration was asked for it, s_j = max|K_j|^attention between keys and
            queries too, K / s and s Q (SmoothAttention, Lin et al. 2024, arXiv 2405.04532, with
            0.5); None: not.
        round_scales: "pow2" rounds s to powers of two, which makes the fold exact in float32 and
            bfloat16 (to powers of four where a leaf carries the square root of s).

    Returns:
        {group name: float32 s, shape (the group's number of scales,)}, for `fold` and `fold_stats`.

    Raises:
        ValueError: what went wrong, and what to do:

            - params are not the calibrated tree (a leaf is missing, is new, has another shape):
              pass those, or calibrate these.
            - params hold NaN or infinity.
            - the statistics do not describe these params, which were smoothed or trained since:
              start from the calibrated ones, or calibrate these.
            - alpha, a number of the mapping, or attention is no number in [0, 1].
            - a pattern is no regular expression, or is found in no site's path: near misses are
              listed.
            - no pattern of alpha is found in any site of a group: end the mapping with ".*".
            - attention was asked for, and calibration has found no keys: calibrate(...,
              attention=True) looks for them.

            Values can not be checked under jit.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])])
        >>> sq.scales(params, stats, alpha=0.5)["w"].tolist()
        [1.0, 4.0]
    """
    check_stats(stats, "scales")
    check_float(params, "scales")
    leaves_by_path(params, stats.graph)
    check_finite(params, "parameter")
    if round_scales not in (None, "pow2"):
        raise ValueError(
            f"round_scales: expected 'pow2' or None, got {round_scales!r}"
        )
    chosen = stats.graph.select(groups)
    s = scales_of_groups(
        params, stats, alphas_of_groups(alpha, chosen), round_scales
    )
    if attention is not None:
        s |= _key_scales(stats, attention, round_scales)
    return s


def scales_of_groups(
    params: PyTree,
    stats: Stats,
    alphas: Mapping[str, Any],
    round_scales: Literal["pow2"] | None = None,
) -> dict[str, Array]:
    """`scales` of the groups that have an alpha here: {group: its alpha}.

    Raises:
        ValueError: the statistics do not describe these params.
    """
    leaves = leaves_by_path(params, stats.graph)
    chosen = [group for group in stats.graph.groups if group.name in alphas]
    check_weights(params, stats, _sites_of(chosen, stats), _SMOOTHED_ADVICE)
    s = {}
    for group in chosen:
        maxima = _maxima_of_sites(group, leaves, stats)
        exact = group.degree if round_scales == "pow2" else None
        s[group.name] = _group_scales(
            maxima, alphas[group.name], group.size, exact
        )
    return s


#: Smoothing what is smoothed already divides the activations by their old scales once more.
_SMOOTHED_ADVICE = (
    "scales of such statistics would smooth them a second time. To smooth anew, start from the "
    "parameters that were calibrated, or calibrate these; to go on with these parameters, pass "
    "fold_stats(stats, s), with the s that was folded in"
)


def _sites_of(groups: Iterable[Group], stats: Stats) -> list[Site]:
    """The sites of these groups, each once."""
    paths = set(chain(*map(attrgetter("paths"), groups)))
    return [site for site in stats.graph.sites if site.path in paths]


class Maxima(NamedTuple):
    """The channels of one site.

    Attributes:
        scale_of: which of the group's scales each channel has, counted from 1; 0 for those that
            have none.
        x_absmax: max |X_j|.
        w_absmax: max |W_j|.
        trust: from 0 (no token was seen) to 1 (enough were).
    """

    scale_of: Any
    x_absmax: Array
    w_absmax: Array
    trust: Array


def _maxima_of_sites(
    group: Group, leaves: Mapping[str, Any], stats: Stats
) -> list[Maxima]:
    """Of every site of a group what its scales are made of."""
    sites = stats.graph.sites
    site_of = dict(zip(paths_of(sites), sites, strict=True))
    found = []
    for path, labels in group.sites:
        site = site_of[path]
        seen = replicated(stats.absmax[path])
        x_absmax = believable(seen, len(site.batch))
        w_absmax = weight_absmax(site, leaves[path])
        found.append(
            Maxima(labels.array, x_absmax, w_absmax, stats.trust(site))
        )
    return found


def _key_scales(
    stats: Stats, exponent: Any, round_scales: str | None
) -> dict[str, Array]:
    """s_j = max|K_j|^exponent for the keys of attention: the formula with weights of 1."""
    _check_in_unit_interval("attention", exponent)
    groups = list(filter(attrgetter("keys"), stats.graph.groups))
    if not groups:
        raise ValueError(
            "scales: attention was asked for, but no scale can move between keys and queries: "
            "calibrate(..., attention=True) looks for them, and found none or was not called so"
        )
    s = {}
    for group in groups:
        # The first site is the keys themselves; the others are matmuls that the scale passes on its
        # way to a leaf.
        path, labels = group.sites[0]
        absmax = stats.absmax[path]
        ones = jnp.asarray(np.ones(absmax.shape, np.float32))
        maxima = Maxima(labels.array, absmax, ones, ones)
        exact = group.degree if round_scales == "pow2" else None
        s[group.name] = _group_scales([maxima], exponent, group.size, exact)
    return s


@partial(jax.jit, static_argnames=("size", "exact"))
def _group_scales(
    sites: list[Maxima], alpha: Any, size: int, exact: int | None
) -> Array:
    """s of a group of `size` scales, from the maxima of its sites.

    Example: a site of 4 channels in two tied pairs has scale_of [1, 1, 2, 2]. With x_absmax [1, 4,
    2, 2] the two scales are made of the maxima [4, 2].

    With `exact`, s is rounded to powers of 2**exact: of 4 where a leaf carries the square root of
    s, because that is then a power of two itself.
    """
    # Entry 0 takes the channels without a scale, and is dropped.
    x_absmax = w_absmax = trust = jnp.zeros(size + 1, jnp.float32)
    for site in sites:
        flat = Maxima(*map(jnp.ravel, map(replicated, site)))
        x_absmax = x_absmax.at[flat.scale_of].max(flat.x_absmax)
        w_absmax = w_absmax.at[flat.scale_of].max(flat.w_absmax)
        trust = trust.at[flat.scale_of].max(flat.trust)
    s = smoothing_scales(x_absmax[1:], w_absmax[1:], alpha)
    # Drawn towards 1 where few tokens were seen. (A power of 1 may round.)
    s = jnp.where(trust[1:] < 1, s ** trust[1:], s)
    if exact is None:
        return s
    return jnp.exp2(exact * jnp.round(jnp.log2(s) / exact))


def alphas_of_groups(alpha: Alpha, groups: Iterable[Group]) -> dict[str, Any]:
    """{group: its alpha}.

    Example: alpha = {"layers/1": 0.9, "down": 0.7, ".*": 0.5} gives layers/1/down 0.9, because the
    first pattern that is found wins. A group of q, k and v takes 0.7 of {"k_proj": 0.7, ".*": 0.5}
    only if k is its first site.
    """
    by_pattern = check_alpha("alpha", alpha)
    groups = list(groups)
    if not groups:  # nothing to smooth; no pattern can be found
        return {}
    sites = chain(*map(attrgetter("paths"), groups))
    pattern_of = first_matches(by_pattern, sites, "alpha pattern")

    alphas, missing = {}, []
    for group in groups:
        pattern = _first_pattern(group, pattern_of)
        if pattern is None:
            missing.append(group.name)
        else:
            alphas[group.name] = by_pattern[pattern]
    if missing:
        raise ValueError(
            f"alpha: no pattern matches {missing[:5]}; end the mapping with '.*' for the rest"
        )
    return alphas


def _first_pattern(
    group: Group, pattern_of: Mapping[str, str | None]
) -> str | None:
    """The pattern of the group's first site that has one."""
    for path in group.paths:
        if pattern_of[path] is not None:
            return pattern_of[path]
    return None


def check_alpha(what: str, alpha: Alpha) -> Mapping[str, Any]:
    """An alpha as a mapping from name patterns to numbers.

    Raises:
        ValueError: one of them is no number in [0, 1]; names it.
    """
    by_pattern = alpha if isinstance(alpha, Mapping) else {"": alpha}
    for pattern, value in by_pattern.items():
        of_pattern = f"{what} for {pattern!r}" if pattern else what
        _check_in_unit_interval(of_pattern, value)
    return by_pattern


def _check_in_unit_interval(what: str, alpha: Any) -> None:
    if not is_concrete(alpha):
        return
    is_number = isinstance(alpha, Real | np.ndarray | jax.Array)
    is_number = is_number and np.size(alpha) == 1
    # Not "alpha < 0 or alpha > 1": NaN is outside, too.
    if not (is_number and 0 <= float(alpha) <= 1):
        raise ValueError(f"{what}: expected a number in [0, 1], got {alpha!r}")


def fold_stats(stats: Stats, s: Mapping[str, Array]) -> Stats:
    """The statistics of the folded model: absmax, abs_sum and sample of every site divided by s.

    The Gram matrix of X / s is X^T X with its rows and columns divided by s.

    Equal to calibrating the folded parameters, up to rounding, without running the model. Static
    quantizer scales must come from these, because a folded model's activations are X / s. A
    histogram of X says nothing about X / s: histograms stay those of X, and serve only at sites
    whose s is all ones (`quantize` holds that); for the others, calibrate the folded parameters.

    Args:
        stats: what `calibrate` returned.
        s: {group name: s}, the same that `fold` is given.

    Raises:
        ValueError: a group is unknown, or its s has another size or is not above 0.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 1))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])])
        >>> sq.fold_stats(stats, {"w": jnp.array([1.0, 4.0])}).absmax["w"].tolist()
        [1.0, 4.0]
    """
    check_stats(stats, "fold_stats(stats, s)")
    check_scales(stats.graph, s)
    return fold_stats_any_sign(stats, s)


def fold_stats_any_sign(stats: Stats, s: Mapping[str, Array]) -> Stats:
    """`fold_stats` without its checks: where s is negative, absmax and abs_sum become so, too."""
    s_of_site = expand(s, stats.graph)
    absmax, abs_sum = dict(stats.absmax), dict(stats.abs_sum)
    gram, sample = dict(stats.gram), dict(stats.sample)
    folded = dict(stats.folded)
    batch = {site.path: len(site.batch) for site in stats.graph.sites}
    for path, divisor in s_of_site.items():
        if path in absmax:
            absmax[path] = absmax[path] / divisor
            abs_sum[path] = abs_sum[path] / divisor
        # Of all contracted axes as one: (*batch, features).
        flat = divisor.reshape(*divisor.shape[: batch.get(path, 0)], -1)
        if path in gram:
            both = flat[..., :, None] * flat[..., None, :]
            gram[path] = gram[path] / both
        if path in sample:
            rows = sample[path].rows / flat[..., None, :]
            sample[path] = replace(sample[path], rows=rows)
    # What is folded twice is divided by both.
    for name, scale in s.items():
        folded[name] = folded[name] * scale
    return replace(
        stats,
        absmax=absmax,
        abs_sum=abs_sum,
        folded=folded,
        gram=gram,
        sample=sample,
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
    """SmoothQuant: the same function with its activation outliers moved into the weights.

    It is `fold` of `scales`.

    Pure; works under jit, and is differentiable with respect to alpha and params.
    Arguments and errors are those of `scales`, which also says which alpha to take. A static scheme
    then needs the statistics of what comes out: `fold_stats(stats, scales(params, stats, alpha))`,
    with the params from before; `smoothquant` does the whole sequence.

    Returns:
        The tree of params, with the same shapes and dtypes: the sites' weights multiplied by s, the
        leaves before them (a norm's gain, say) divided by it.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])])
        >>> sq.smooth(params, stats, 0.5)["norm"].tolist()
        [1.0, 0.25]
    """
    s = scales(
        params,
        stats,
        alpha,
        groups=groups,
        attention=attention,
        round_scales=round_scales,
    )
    return fold(params, stats.graph, s)
