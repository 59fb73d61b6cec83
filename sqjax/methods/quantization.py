"""`quantize`: parameter trees whose matmul weights become narrow, by rules on their names."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._names import first_matches
from sqjax._trees import PyTree, check_finite, is_concrete, map_named
from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats, weight_absmax
from sqjax.folding.apply import fold, leaves_by_path, unfold
from sqjax.folding.graph import Site
from sqjax.methods.smoothing import Alpha, fold_stats, scales
from sqjax.numerics.smoothing import smoothing_scales
from sqjax.weights.quantize import named, outlier_channels, quantize_weight
from sqjax.weights.schemes import W8A8, Indices, Scheme, Static

Rules = Scheme | Mapping[str, Scheme | None]


def quantize(params: PyTree, stats: Stats, scheme: Rules = W8A8) -> PyTree:
    """The tree with the weight of every site replaced by a `QuantWeight`; run it with `quantized(fn)`.

    A site is a leaf that `fn` multiplies with an activation. Everything else (norms, biases) stays as it is; embeddings
    that are no head are quantized by rules of their own, {"embed": sq.EMBEDDING_INT8}. Pure; works under jit.

    Args:
        params: the calibrated or the smoothed tree.
        stats: their statistics. Static schemes need those of *these* params: after `smooth`, pass
            `fold_stats(stats, scales(...))`, or let `smoothquant` do it all.
        scheme: one `Scheme` for every site, or a mapping from name patterns to a `Scheme` or None (stay float). The
            first pattern found in a site's path wins; a site that none matches stays float. A scheme with `smoothing`
            (an alpha) smooths its sites at run time, with s from these statistics and params. A scheme for embeddings
            (activation=sq.Indices()) is sought among these only, other schemes among the sites only, None among both.

    Raises:
        ValueError: params are not the calibrated tree, or hold NaN or infinity; a pattern matches no site; static
            scales, outliers, or smoothing at run time, asked of statistics that do not describe these params; groups
            that do not fit; a scheme whose parts do not go together, or whose `range` needs histograms of these
            params' activations, which the statistics do not have. (Values can not be checked under jit.)

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
    """{leaf: its scheme} for the sites and the tables that are quantized.

    Schemes for embeddings (`Indices`) look for tables only, the others for sites, None for both.
    """
    rules = rules if isinstance(rules, Mapping) else {"": rules}
    nothing = [pattern for pattern, scheme in rules.items() if scheme is None]
    of_tables = [
        pattern
        for pattern, scheme in rules.items()
        if scheme is not None and isinstance(scheme.activation, Indices)
    ]
    sites, tables = (
        [site.path for site in found] for found in (stats.graph.sites, stats.graph.tables)
    )
    first_matches(nothing, [*sites, *tables], "quantize rule")  # raises, and says what is near
    meant = {p: {x for x in (*sites, *tables) if re.search(p, x)} for p in nothing}
    chosen: dict[str, Scheme | None] = {}
    for paths, own, what in (
        (sites, [p for p in rules if p not in of_tables], "quantize rule"),
        (tables, [*of_tables, *nothing], "quantize rule for embeddings"),
    ):
        patterns = [
            p for p in rules if p in own and (p not in nothing or meant[p].intersection(paths))
        ]
        found = first_matches(patterns, paths, what)
        chosen |= {path: rules[pattern] for path, pattern in found.items() if pattern is not None}
    return {path: scheme for path, scheme in chosen.items() if scheme is not None}


def _quantized(params: PyTree, stats: Stats, schemes: Mapping[str, Scheme]) -> PyTree:
    leaves_by_path(params, stats.graph)
    check_finite(params, "parameter")
    sites = {site.path: site for site in (*stats.graph.sites, *stats.graph.tables)}
    _check_described(
        params, stats, [sites[path] for path, scheme in schemes.items() if scheme.measured]
    )

    def changed(path: str, leaf: Any) -> Any:
        if path not in schemes:
            return leaf
        site, scheme, s, channels = sites[path], schemes[path], None, None
        absmax = stats.absmax[path] if scheme.measured else None
        if absmax is not None and scheme.smoothing is not None:
            s = smoothing_scales(absmax, weight_absmax(site, leaf), scheme.smoothing)
        if absmax is not None and scheme.outliers is not None:
            channels = outlier_channels(
                path, absmax if s is None else absmax / s, scheme.outliers, len(site.batch)
            )
        if isinstance(scheme.activation, Static) and scheme.needs_histogram:
            absmax = stats.input_range(path, scheme.activation.range, scheme.activation.fmt)
        with named(path):
            return quantize_weight(
                jnp.asarray(leaf), site.axes, scheme, absmax, s, site.batch, channels
            )

    return map_named(changed, params)


def _check_described(params: PyTree, stats: Stats, sites: list[Site]) -> None:
    """Raises ValueError if the statistics are of other (say, not yet smoothed) parameters than these."""
    if not sites or not all(is_concrete(x) for x in jax.tree.leaves((params, stats))):
        return
    with (
        jax.ensure_compile_time_eval()
    ):  # also where a jitted function has closed over these values
        original = leaves_by_path(unfold(params, stats.graph, stats.folded), stats.graph)
        absmax = {site: np.asarray(weight_absmax(site, original[site.path])) for site in sites}
    for site in sites:
        now, then = absmax[site], stats.weight_absmax[site.path]
        tolerance = 4 * float(jnp.finfo(original[site.path].dtype).eps) + 1e-5
        if not np.allclose(now, then, rtol=tolerance, atol=0):
            raise ValueError(
                f"{site.path}: the statistics are of other parameters than these (were they smoothed?); static "
                "activation scales, outliers, or smoothing at run time, would be wrong. Pass "
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
    twice = any(isinstance(one, Scheme) and one.needs_histogram for one in wanted)
    batches = list(batches) if twice else batches
    stats = calibrate(fn, params, batches, progress=progress)
    s = scales(params, stats, alpha, groups=groups)
    schemes = _schemes(stats, scheme)
    if runtime is not None:
        smoothed = {
            path for group in stats.graph.groups if group.name in s for path, _ in group.sites
        }
        smoothed |= {table.path for table in stats.graph.tables}
        for path in [path for path in schemes if path not in smoothed]:
            with named(path):
                schemes[path] = schemes[path].replace(smoothing=runtime)
    folded = fold(params, stats.graph, s)
    if twice:
        return _quantized(
            folded, calibrate(fn, folded, batches, histogram=True, progress=progress), schemes
        )
    return _quantized(folded, fold_stats(stats, s), schemes)
