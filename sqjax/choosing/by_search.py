"""`quantize_by_search`: the search that suits each scheme, then the codes, in one call."""

from typing import Any

from sqjax._trees import PyTree
from sqjax.calibration.stats import Stats
from sqjax.choosing.alphas import search_alpha
from sqjax.choosing.awq import awq, smooth_awq
from sqjax.choosing.gptq import gptq
from sqjax.folding.apply import fold
from sqjax.methods.quantization import Rules, quantize, site_schemes
from sqjax.methods.smoothing import fold_stats
from sqjax.weights.schemes import W8A8, Int4


def quantize_by_search(
    params: PyTree, stats: Stats, scheme: Rules = W8A8
) -> PyTree:
    """The tree as `quantize` makes it, with scales and roundings that were searched for.

    1. Scales are folded in: where activations are quantized, with the alpha of each group that
       errs least (`search_alpha`); where only int4 weights are, by `awq`; of W4A8 by `smooth_awq`,
       which weighs both.
    2. int4 ranges are clipped as AWQ found it, and int4 codes are rounded by `gptq`. int8 codes are
       rounded to nearest: their errors are small already.

    Args:
        params: the calibrated tree.
        stats: what ``calibrate(..., gram=True, sample=512)`` returned for it.
        scheme: as for `quantize`.

    Returns:
        A tree as that of `quantize`; its float function before rounding is that of `params`.

    Raises:
        ValueError: what `quantize` refuses; the statistics hold no samples or no Gram matrices; the
            rules mix int4 weights with and without quantized activations.

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
    schemes = site_schemes(stats.graph, scheme).values()
    int4 = [s for s in schemes if isinstance(s.weight, Int4)]
    both = [s for s in schemes if s.quantizes_activation]
    clips: Any = None
    if both and int4:
        found: Any = smooth_awq(params, stats, scheme)
        clips = found.clips
    elif both:
        found = search_alpha(params, stats, scheme)
    else:
        found = awq(params, stats, scheme)
        clips = found.clips
    folded = fold(params, stats.graph, found.s)
    folded_stats = fold_stats(stats, found.s)
    if not int4:
        return quantize(folded, folded_stats, scheme, clips=clips)
    return gptq(folded, folded_stats, scheme, clips=clips)
