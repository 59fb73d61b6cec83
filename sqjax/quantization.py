"""`quantize`: parameter trees whose matmul weights become int8, by rules on their names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.calibration import calibrate
from sqjax.formats import scale_from_absmax
from sqjax.graph import Site
from sqjax.matmul import QuantWeight
from sqjax.qtensor import QTensor
from sqjax.ranges import checked
from sqjax.schemes import W8A8, Scheme
from sqjax.smoothing import Alpha, fold, fold_stats, scales, smoothing_scales, unfold
from sqjax.statistics import Stats, leaves_by_path, weight_absmax
from sqjax.trees import PyTree, check_finite, first_matches, is_concrete, map_named

Rules = Scheme | Mapping[str, Scheme | None]


def quantize(params: PyTree, stats: Stats, scheme: Rules = W8A8) -> PyTree:
    """The tree with the weight of every site replaced by a `QuantWeight`; run it with `quantized(fn)`.

    A site is a leaf that `fn` multiplies with an activation. Everything else (norms, biases, embeddings that are no
    head) stays as it is. Pure; works under jit.

    Args:
        params: the calibrated or the smoothed tree.
        stats: their statistics. Static schemes need those of *these* params: after `smooth`, pass
            `fold_stats(stats, scales(...))`, or let `smoothquant` do it all.
        scheme: one `Scheme` for every site, or a mapping from name patterns to a `Scheme` or None (stay float). The
            first pattern found in a site's path wins; a site that none matches stays float. A scheme with `smoothing`
            (an alpha) smooths its sites at run time, with s from these statistics and params.

    Raises:
        ValueError: params are not the calibrated tree, or hold NaN or infinity; a pattern matches no site; static
            scales, or smoothing at run time, asked of statistics that do not describe these params; a `range` asked of
            statistics without histograms of these params' activations. (Values can not be checked under jit.)

    Example:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> x = jnp.array([[1.0, 16.0]])
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), sq.W8A8)
        >>> jax.jit(sq.quantized(fn))(qparams, x).round(1).tolist()
        [[17.0, 17.0, 17.0]]
    """
    return _quantized(params, stats, _schemes(stats, scheme))


def _schemes(stats: Stats, rules: Rules) -> dict[str, Scheme]:
    """{site: its scheme} for the sites that are quantized."""
    rules = rules if isinstance(rules, Mapping) else {"": rules}
    found = first_matches(rules, [site.path for site in stats.graph.sites], "quantize rule")
    chosen = {path: rules[pattern] for path, pattern in found.items() if pattern is not None}
    schemes = {path: scheme for path, scheme in chosen.items() if scheme is not None}
    for path, scheme in schemes.items():
        _check_range(path, scheme)
    return schemes


def _check_range(path: str, scheme: Scheme) -> None:
    """Raises ValueError if a scheme's range is none, or would not be used."""
    if checked(scheme.range, path) == "absmax":
        return
    if scheme.activations != "static":
        raise ValueError(
            f"{path}: the range {scheme.range!r} is for static activations, and these are {scheme.activations!r}, "
            "whose scales are computed at run time from the absmax; use activations='static', or range='absmax'"
        )
    if scheme.smoothing is not None:
        raise ValueError(
            f"{path}: the range {scheme.range!r} can not be found for smoothing at run time: the histogram is of X, "
            "not of X / s; use range='absmax' there, or smooth the parameters"
        )


def _quantized(params: PyTree, stats: Stats, schemes: Mapping[str, Scheme]) -> PyTree:
    leaves_by_path(params, stats.graph)
    check_finite(params, "parameter")
    sites = {site.path: site for site in stats.graph.sites}
    described = [sites[path] for path, s in schemes.items() if s.activations == "static" or s.smoothing is not None]
    _check_described(params, stats, described)

    def changed(path: str, leaf: Any) -> Any:
        if path not in schemes:
            return leaf
        site, scheme, absmax, s = sites[path], schemes[path], stats.absmax[path], None
        if scheme.range != "absmax":
            absmax = stats.input_range(path, checked(scheme.range, path))
        if scheme.smoothing is not None:
            s = smoothing_scales(absmax, weight_absmax(site, leaf), scheme.smoothing)
        return quantize_weight(jnp.asarray(leaf), site.axes, scheme, absmax, s, site.batch)

    return map_named(changed, params)


@partial(jax.jit, static_argnames=("contracting", "scheme", "batch"))
def quantize_weight(
    weight: Array,
    contracting: tuple[int, ...],
    scheme: Scheme,
    absmax: Array | None = None,
    smoothing: Array | None = None,
    batch: tuple[int, ...] = (),
) -> QuantWeight:
    """One weight, quantized along its axes `contracting`.

    Args:
        weight: float, for example a Dense kernel (in, out) with contracting=(0,).
        contracting: the axes that the matmul sums over.
        scheme: how.
        absmax: max |X_j| of the activation it meets, of the shape of the batch axes and then any other (there its
            largest value counts): for static schemes.
        smoothing: s of the shape of the batch axes, then of the contracted axes, for smoothing at run time; `weight`
            is then multiplied by s here, and `absmax`, of the same shape, is that of X before the division by s.
        batch: axes that hold one matrix each (stacked layers, experts): each is quantized on its own.
    """
    dtype, input_scale = weight.dtype, None
    if smoothing is not None:
        s = smoothing.astype(jnp.float32)
        weight = weight.astype(jnp.float32) * _spread(
            s, (*batch, *sorted(a % weight.ndim for a in contracting)), weight.ndim
        )
    if scheme.activations == "static":
        if absmax is None:
            raise ValueError("a static scheme needs the activation's absmax from calibration; dynamic ones do not")
        absmax = absmax if smoothing is None else absmax / smoothing
        largest = jnp.max(absmax, axis=tuple(range(len(batch), absmax.ndim)))
        # An expert that calibration never reached takes the largest range of the others.
        input_scale = scale_from_absmax(jnp.where(largest > 0, largest, jnp.max(largest)))
    tensor = replace(QTensor.quantize(weight, contracting, scheme.weights, batch=batch), dtype=dtype)
    return QuantWeight(tensor, input_scale, smoothing, scheme.activations, len(contracting))


def _spread(x: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """x with its axis i at `axes[i]` of an array of rank `ndim`."""
    return jnp.moveaxis(x.reshape(x.shape + (1,) * (ndim - x.ndim)), range(x.ndim), axes)


def _check_described(params: PyTree, stats: Stats, sites: list[Site]) -> None:
    """Raises ValueError if the statistics are of other (say, not yet smoothed) parameters than these."""
    if not sites or not all(is_concrete(x) for x in jax.tree.leaves((params, stats))):
        return
    with jax.ensure_compile_time_eval():  # also where a jitted function has closed over these values
        original = leaves_by_path(unfold(params, stats.graph, stats.folded), stats.graph)
        absmax = {site: np.asarray(weight_absmax(site, original[site.path])) for site in sites}
    for site in sites:
        now, then = absmax[site], stats.weight_absmax[site.path]
        tolerance = 4 * float(jnp.finfo(original[site.path].dtype).eps) + 1e-5
        if not np.allclose(now, then, rtol=tolerance, atol=0):
            raise ValueError(
                f"{site.path}: the statistics are of other parameters than these (were they smoothed?); static "
                "activation scales, or smoothing at run time, would be wrong. Pass "
                "fold_stats(stats, scales(params, stats, alpha)), with the params before smoothing, or calibrate again"
            )


def smoothquant(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    alpha: Alpha = 0.5,
    scheme: Rules = W8A8,
    *,
    groups: str | Iterable[str] = "all",
    runtime: float | None = None,
    progress: bool = False,
) -> PyTree:
    """Calibrates, smooths and quantizes in the right order; run the result with `quantized(fn)`.

    The statistics of the smoothed parameters are derived, not measured again, so static schemes are right too. Only
    schemes with a `range` need histograms of the smoothed model: then the batches are kept in a list, and read twice.
    `runtime` is an alpha for sites that are in no smoothed group: these are smoothed at run time (None: not at all).
    Arguments and errors are those of `calibrate`, `scales` and `quantize`. Xiao et al. 2022, arXiv 2211.10438.

    Example:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params, x = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}, jnp.array([[1.0, 16.0]])
        >>> qparams = sq.smoothquant(fn, params, [x], alpha=0.5, scheme=sq.W8A8_O3)
        >>> jax.jit(sq.quantized(fn))(qparams, x).round(1).tolist()
        [[17.0, 17.0, 17.0]]
    """
    wanted = scheme.values() if isinstance(scheme, Mapping) else [scheme]
    twice = any(one is not None and one.range != "absmax" for one in wanted)
    batches = list(batches) if twice else batches
    stats = calibrate(fn, params, batches, progress=progress)
    s = scales(params, stats, alpha, groups=groups)
    schemes = _schemes(stats, scheme)
    if runtime is not None:
        smoothed = {path for group in stats.graph.groups if group.name in s for path, _ in group.sites}
        schemes = {p: x if p in smoothed else x._replace(smoothing=runtime) for p, x in schemes.items()}
        for path, one in schemes.items():
            _check_range(path, one)
    folded = fold(params, stats.graph, s)
    if twice:
        return _quantized(folded, calibrate(fn, folded, batches, histogram=True, progress=progress), schemes)
    return _quantized(folded, fold_stats(stats, s), schemes)
