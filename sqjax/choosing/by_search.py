"""`quantize_by_search`: the search that suits each scheme, then the codes, in one call."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array

from sqjax._trees import PyTree
from sqjax.calibration.stats import Stats
from sqjax.choosing.alphas import search_alpha
from sqjax.choosing.awq import awq, smooth_awq
from sqjax.choosing.clips import search_clips
from sqjax.choosing.gptq import gptq
from sqjax.choosing.massive import massive_channels, without
from sqjax.folding.apply import fold
from sqjax.folding.graph import paths_of
from sqjax.methods.described import check_stats
from sqjax.methods.quantization import Rules, site_schemes
from sqjax.methods.smoothing import fold_stats
from sqjax.weights.schemes import W8A8, Int4, Scheme


class Prepared(NamedTuple):
    """What a search found, folded into a float tree: what `gptq` and `quantize` take.

    Attributes:
        params: the float tree with its scales folded in; the same function.
        stats: its statistics.
        rules: {a pattern for one path: its scheme}, of every leaf that is quantized.
        clips: {path: factors of its ranges}.
    """

    params: PyTree
    stats: Stats
    rules: dict[str, Scheme]
    clips: dict[str, Array]


def quantize_by_search(
    params: PyTree, stats: Stats, scheme: Rules = W8A8
) -> PyTree:
    """The tree as `quantize` makes it, with scales and roundings that were searched for.

    1. Scales are folded in: where activations are quantized, with the alpha of each group that
       errs least (`search_alpha`); where only int4 weights are, by `awq`; of W4A8 by `smooth_awq`,
       which weighs both.
    2. Where all tokens share a scale, channels that are far above all others stay float and
       unsmoothed: see `sqjax.choosing.massive`.
    3. int4 ranges are clipped as AWQ found it, and all codes are rounded by `gptq`.

    Sites with a rotation at run time have no scales: it spreads what these would move.

    Args:
        params: the calibrated tree.
        stats: what ``calibrate(..., gram=True, sample=512)`` returned for it.
        scheme: as for `quantize`. A group whose sites have several is searched for one of them.

    Returns:
        A tree as that of `quantize`; its float function before rounding is that of `params`.

    Raises:
        ValueError: what `quantize` refuses; the statistics hold no samples or no Gram matrices; a
            static range is another than "absmax".

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones((1, 64)), "w": jax.random.normal(jax.random.key(0), (64, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (32, 64)) * jnp.linspace(0.1, 9, 64)[None]
        >>> stats = sq.calibrate(fn, params, [x], gram=True, sample=32)
        >>> def error(make):
        ...     qparams = make(params, stats, sq.W4A16_G64)
        ...     return float(jnp.linalg.norm(sq.quantized(fn)(qparams, x) - fn(params, x)))
        >>> error(sq.quantize_by_search) < error(sq.quantize)
        True
    """
    found = prepare_by_search(params, stats, scheme)
    return gptq(found.params, found.stats, found.rules, clips=found.clips)


def prepare_by_search(
    params: PyTree, stats: Stats, scheme: Rules = W8A8
) -> Prepared:
    """What `quantize_by_search` does before it rounds: the float tree, and how to round it.

    For what has to see that tree: a prefix, whose keys and values stay float
    (`sqjax.models.prefix`), another way to round, or a look at what was found.

    Args:
        params: as for `quantize_by_search`.
        stats: as for `quantize_by_search`.
        scheme: as for `quantize_by_search`.

    Returns:
        `Prepared`.

    Raises:
        ValueError: as `quantize_by_search`.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones((1, 64)), "w": jax.random.normal(jax.random.key(0), (64, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (32, 64)) * jnp.linspace(0.1, 9, 64)[None]
        >>> stats = sq.calibrate(fn, params, [x], gram=True, sample=32)
        >>> found = sq.prepare_by_search(params, stats, sq.W8A8_O3)
        >>> sq.verify(fn, params, found.params, x) < 1e-5
        True
        >>> qparams = sq.quantize(found.params, found.stats, found.rules, clips=found.clips)
    """
    check_stats(stats, "quantize_by_search")
    schemes = site_schemes(stats.graph, scheme)
    _check_ranges(schemes)
    # First, because a search that sees them takes a scale for their sake.
    massive = massive_channels(stats, schemes)
    s = _searched(params, without(stats, massive), schemes)
    for path, (_, threshold) in massive.items():
        schemes[path] = schemes[path].replace(outliers=threshold)
    folded, after = fold(params, stats.graph, s), fold_stats(stats, s)
    # Of the weights as they are now: another s would have had other ranges.
    clips = search_clips(folded, after, _clipped(schemes))
    return Prepared(folded, after, _rules_of(schemes), clips)


def _clipped(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The leaves whose ranges are searched: those that AWQ is for."""
    return {
        path: how
        for path, how in schemes.items()
        if _search_for(how) is not search_alpha
    }


def _check_ranges(schemes: Mapping[str, Scheme]) -> None:
    """Raises ValueError for a scheme whose static range is made of a histogram."""
    for path, how in schemes.items():
        if how.needs_histogram:
            raise ValueError(
                f"quantize_by_search: {path}: expected a static range of 'absmax', got {how!r}; "
                "histograms are of activations before they are smoothed, which is done here"
            )


def _rules_of(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The rules that give these leaves, and no others, their schemes."""
    return {f"^{re.escape(path)}$": how for path, how in schemes.items()}


def _searched(
    params: PyTree, stats: Stats, schemes: Mapping[str, Scheme]
) -> dict[str, Array]:
    """s of every group that is quantized, by the search for its scheme."""
    search_of = {
        path: _search_for(schemes[path])
        for path in paths_of(stats.graph.sites)
        if path in schemes and schemes[path].rotation is None
    }
    s: dict[str, Array] = {}
    for search in dict.fromkeys(search_of.values()):
        own = {p: schemes[p] for p in search_of if search_of[p] is search}
        options = {} if search is search_alpha else {"clip": False}
        found: Any = search(params, stats, _rules_of(own), **options)
        # What an earlier search has found of a group stays: its sites have several schemes.
        s = found.s | s
    return s


def _search_for(scheme: Scheme) -> Callable[..., Any]:
    """The search that suits a scheme."""
    if not scheme.quantizes_activation:
        return awq
    return smooth_awq if isinstance(scheme.weight, Int4) else search_alpha
