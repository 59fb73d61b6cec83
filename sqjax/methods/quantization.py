"""`quantize`: parameter trees whose matmul weights become narrow, by rules on their names.

The scales made here are the quantizer's: what one step of an int8 or float8 number is worth.
Smoothing scales, always called `s`, are folded into the parameters before, or (a scheme's
`smoothing`) stored beside the weight.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from sqjax._arguments import check_mapping, expect
from sqjax._names import first_matches
from sqjax._trees import PyTree, check_finite, is_concrete, map_named
from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats, leaf_channels, weight_absmax
from sqjax.folding.apply import expand, fold, leaves_by_path
from sqjax.folding.graph import Graph, Site, paths_of
from sqjax.methods.described import check_leaves, check_stats
from sqjax.methods.smoothing import Alpha, check_alpha, fold_stats, scales
from sqjax.numerics.hadamard import rotated
from sqjax.numerics.smoothing import smoothing_scales
from sqjax.weights.convolution import quantize_kernel
from sqjax.weights.quant_weight import check_float
from sqjax.weights.quantize import (
    block_of,
    measured,
    named,
    quantize_weight,
)
from sqjax.weights.schemes import (
    W8A8,
    Indices,
    Rotation,
    Scheme,
    Static,
    scheme_of,
)

#: So many tokens of a site tell the range of rotated activations, and serve a search.
SAMPLE = 512
#: What `quantize` is told: one scheme for all sites, or {pattern of names: its scheme, or None to
#: stay float}. A preset may be given by its name, "W8A8".
Rules = Scheme | str | Mapping[str, Scheme | str | None]
#: {site: factors in (0, 1] of the ranges of its weights}.
Clips = Mapping[str, ArrayLike]

STATIC_ADVICE = (
    "static activation scales, outliers, or smoothing at run time, would be wrong. Pass "
    "fold_stats(stats, scales(params, stats, alpha)), with the params before smoothing, or "
    "calibrate again"
)


def quantize(
    params: PyTree,
    stats: Stats,
    scheme: Rules = W8A8,
    *,
    clips: Clips | None = None,
) -> PyTree:
    """The tree with a `QuantWeight` at every site; run it with `quantized(fn)`.

    A site is a leaf that `fn` multiplies with an activation. Everything else (norms, biases) stays
    as it is; embeddings that are no head are quantized by rules of their own, {"embed":
    sq.EMBEDDING_INT8}. Pure; works under jit.

    Args:
        params: the calibrated or the smoothed tree.
        stats: their statistics. Static schemes need those of *these* params: after `smooth`, pass
            `fold_stats(stats, scales(...))`, or let `smoothquant` do it all.
        scheme: one `Scheme` for every site, or a mapping from name patterns to a `Scheme` or None
            (stay float); a preset also by its name, "W8A8". The first pattern found in a site's
            path wins; a site that none matches stays float. A scheme with `smoothing` (an alpha)
            smooths its sites at run time, with s from these statistics and params. A pattern with
            an embedding scheme (activation=Indices()) is looked for in embedding paths only; with
            any other scheme, in matmul paths only; with None, in both.
        clips: {site: factors in (0, 1]} of the ranges of weights, as `awq` finds them: what lies
            beyond a range is clipped, and the rest is rounded more finely. In the shape of what
            shares a scale: (outputs, groups), or (outputs, 1).

    Returns:
        A tree with the same paths.

    Raises:
        ValueError: what went wrong, and what to do:

            - params are not the calibrated tree (a leaf is missing, is new, has another shape):
              pass those, or calibrate these.
            - params hold NaN or infinity, or are quantized already.
            - a rule is no `Scheme`, and no preset's name.
            - a pattern is no regular expression, or is found in no site's path: near misses are
              listed.
            - static scales, outliers, or smoothing at run time are asked for, and the statistics
              were taken from other params than these, for example before smoothing:
              pass `fold_stats(stats, scales(...))`.
            - a static range of rotated activations, but the statistics have no samples:
              calibrate with sample=512.
            - a static range other than "absmax", but the statistics have no histograms of these
              params' activations:
              calibrate these params with histogram=True.
            - a group size, or a rotation's block, that does not fit a weight.
            - clips of a leaf that is not quantized, of another shape, or not in (0, 1].

            Values can not be checked under jit.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> x = jnp.array([[1.0, 16.0]])
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), sq.W8A8)
        >>> jax.jit(sq.quantized(fn))(qparams, x).round(1).tolist()
        [[17.0, 17.0, 17.0]]
    """
    check_stats(stats, "quantize", ranges=False)
    schemes = site_schemes(stats.graph, scheme)
    return quantize_sites(params, stats, schemes, clips=clips)


def site_schemes(graph: Graph, rules: Any) -> dict[str, Scheme]:
    """{leaf: its scheme} for the sites and the embedding tables that are quantized.

    Example: of a graph with the sites "q" and "head", and the table "embed", the rules {"head":
    None, "embed": EMBEDDING_INT8, ".*": W8A8} give {"q": W8A8, "embed": EMBEDDING_INT8}. The ".*"
    does not reach the table, because W8A8 is no scheme for one.
    """
    by_pattern = _by_pattern(rules)
    sites, tables = paths_of(graph.sites), paths_of(graph.tables)

    # None is said of sites and tables alike, so such a pattern may be found in either of them.
    floats = [pattern for pattern, rule in by_pattern.items() if rule is None]
    first_matches(
        floats, [*sites, *tables], "quantize rule"
    )  # raises, and says what is near

    of_sites = _rules_for(sites, by_pattern, are_tables=False)
    of_tables = _rules_for(tables, by_pattern, are_tables=True)
    schemes = _first_schemes(of_sites, sites, "quantize rule", _NO_SITES)
    return schemes | _first_schemes(
        of_tables, tables, "quantize rule for embeddings", _NO_TABLES
    )


_NO_SITES = "no matmul of this model reads a leaf; for embeddings take sqjax.EMBEDDING_INT8"
_NO_TABLES = (
    "this model has no embeddings (leaves of which rows are looked up, and that no matmul reads); "
    "for matmuls take sqjax.W8A8, say"
)


def _by_pattern(rules: Any) -> dict[str, Scheme | None]:
    """Rules as a mapping: one scheme for all is one whose pattern is found everywhere."""
    if not isinstance(rules, Mapping):
        return {"": scheme_of(rules, "quantize")}
    schemes: dict[str, Scheme | None] = {}
    for pattern, rule in rules.items():
        where = f"quantize rule {pattern!r}"
        schemes[pattern] = None if rule is None else scheme_of(rule, where)
    return schemes


def _rules_for(
    paths: Sequence[str], rules: Mapping[str, Scheme | None], are_tables: bool
) -> dict[str, Scheme | None]:
    """The rules that are meant for these leaves: all of them embedding tables, or none."""
    meant = {}
    for pattern, scheme in rules.items():
        if scheme is None:
            fits = any(re.search(pattern, path) for path in paths)
        else:
            fits = isinstance(scheme.activation, Indices) == are_tables
        if fits:
            meant[pattern] = scheme
    return meant


def _first_schemes(
    rules: Mapping[str, Scheme | None],
    paths: Sequence[str],
    what: str,
    none: str,
) -> dict[str, Scheme]:
    """{path: the scheme of the first pattern found in it}, without what stays float.

    `none` says what there is to do where the model has no such leaves at all.
    """
    if rules and not paths:
        first = next(iter(rules)) or ".*"
        raise ValueError(f"{what} {first!r} matches nothing, because {none}")
    chosen = {}
    for path, pattern in first_matches(rules, paths, what).items():
        scheme = None if pattern is None else rules[pattern]
        if scheme is not None:
            chosen[path] = scheme
    return chosen


def quantize_sites(
    params: PyTree,
    stats: Stats,
    schemes: Mapping[str, Scheme],
    folded: Mapping[str, Array] | None = None,
    clips: Clips | None = None,
) -> PyTree:
    """The tree with these leaves quantized, each by its scheme.

    `folded` holds the smoothing scales of the params: `stats.folded`, if it is None.
    """
    clips = clips or {}
    check_float(params, "quantize")
    leaves = leaves_by_path(params, stats.graph)
    check_finite(params, "parameter")
    # Of no elements there is nothing to quantize.
    schemes = {path: how for path, how in schemes.items() if leaves[path].size}
    quantizable = *stats.graph.sites, *stats.graph.tables
    sites = dict(zip(paths_of(quantizable), quantizable, strict=True))
    # Other schemes take nothing from the statistics, so these may be of any parameters.
    check_clips(clips, schemes, sites)
    described = [sites[path] for path in schemes if schemes[path].measured]
    stats.check_ranges("quantize", paths_of(described))
    check_leaves(params, stats, described, STATIC_ADVICE)
    _check_reached(stats, schemes)
    s_of_site = expand(stats.folded if folded is None else folded, stats.graph)

    def changed(path: str, leaf: Any) -> Any:
        if path not in schemes:
            return leaf
        s = s_of_site.get(path)
        return _quantized_leaf(
            leaf, sites[path], schemes[path], stats, s, clips.get(path)
        )

    return map_named(changed, params)


def check_clips(
    clips: Clips, schemes: Mapping[str, Scheme], sites: Mapping[str, Site]
) -> None:
    """Raises ValueError for clips of leaves that have none, or that are no factors in (0, 1]."""
    check_mapping(clips, "clips", "{site: factors in (0, 1]}")
    for path, clip in clips.items():
        is_matrix = path in schemes and sites[path].kernel is None
        if not is_matrix:
            raise ValueError(
                f"clips: {path!r} is no matmul's weight that is quantized; leave it out, or give "
                "it a scheme"
            )
        if is_concrete(clip):
            values = np.asarray(clip)
            expect(
                bool(((values > 0) & (values <= 1)).all()),
                f"clips of {path!r}",
                "factors in (0, 1]",
                clip,
            )


def _check_reached(stats: Stats, schemes: Mapping[str, Scheme]) -> None:
    """Raises ValueError where a static range is asked for of a site that saw nothing but zeros."""
    static = [
        path
        for path, scheme in schemes.items()
        if isinstance(scheme.activation, Static)
    ]
    for path in static:
        seen = stats.absmax[path]
        if is_concrete(seen) and not np.asarray(seen).any():
            tokens = int(stats.count[path])
            saw = f"{tokens} tokens, all zeros" if tokens else "no token"
            not_taken = dict(stats.graph.branches).get(path)
            why = f" ({not_taken})" if not_taken and not tokens else ""
            raise ValueError(
                f"{path}: calibration saw {saw} here{why}, so there is no range for a static "
                "scale; calibrate on batches that reach it, or give it a dynamic scheme or None: "
                f"{{{path!r}: sq.W8A8, '.*': ...}}"
            )


def _lent(absmax: Array, site: Site, stats: Stats, s: Array | None) -> Array:
    """The channels' ranges, where few tokens or none reached a matrix drawn to those of the others.

    The others' ranges are lent as they were before smoothing, and divided by the matrix' own s.
    Example: expert 0 saw X up to 8 and has s = 4; expert 1 saw nothing and has s = 1. Expert 1 may
    see X / 1 = 8, though expert 0 sees X / 4 = 2 only.
    """
    if not site.batch:
        return absmax
    trust = stats.trust(site)
    before = absmax if s is None else absmax * s
    last = len(site.batch) - 1
    others = jnp.max(before, axis=last, keepdims=True)
    anywhere = jnp.max(before, axis=range(last + 1), keepdims=True)
    others = jnp.where(others > 0, others, anywhere)
    lent = trust * before + (1 - trust) * others
    lent = lent if s is None else lent / s
    return jnp.where(trust < 1, lent, absmax)


def _quantized_leaf(
    leaf: Any,
    site: Site,
    scheme: Scheme,
    stats: Stats,
    folded: Array | None,
    clip: ArrayLike | None,
) -> Any:
    """One weight, with what its scheme takes from the statistics.

    `folded` is the smoothing scale of each of its channels, None if it has none; `clip` are factors
    of its ranges, or None.
    """
    leaf = jnp.asarray(leaf)
    absmax: Any = stats.absmax[site.path] if scheme.measured else None
    if site.kernel is not None:
        return _quantized_kernel(leaf, site, scheme, stats, absmax, folded)
    beside = measured(
        site.path, leaf, site.channel_axes, scheme, absmax, len(site.batch)
    )
    absmax = _covered(absmax, site, scheme, stats, folded)
    if scheme.needs_sample:
        absmax = _rotated_range(absmax, site, scheme, stats, beside.smoothing)
    # `quantize_weight` knows arrays only: the path is added to what it refuses.
    with named(site.path):
        return quantize_weight(
            leaf,
            site.axes,
            scheme,
            absmax,
            beside.smoothing,
            site.batch,
            beside.outliers,
            None if clip is None else jnp.asarray(clip),
        )


def _covered(
    absmax: Any, site: Site, scheme: Scheme, stats: Stats, folded: Array | None
) -> Any:
    """What a static range shall cover: the absmax, or the range that the scheme takes from the
    histogram; other schemes take the absmax as it is.
    """
    if not isinstance(scheme.activation, Static):
        return absmax
    absmax = _lent(absmax, site, stats, folded)
    if scheme.needs_histogram:
        return _range_or(absmax, site, scheme.activation, stats)
    return absmax


def _range_or(absmax: Array, site: Site, how: Static, stats: Stats) -> Array:
    """The range of each matrix from its histogram; from the absmax where few tokens are in it."""
    found = stats.input_range(site.path, how.range, how.fmt)
    largest = jnp.max(absmax, axis=site.feature_axes)
    enough = stats.trust(site).min(axis=site.feature_axes) == 1
    # Not "found > 0": under jit a range of NaN says that the histogram is not of X / s.
    return jnp.where(enough & ~(found <= 0), found, largest)


def _rotated_range(
    absmax: Array,
    site: Site,
    scheme: Scheme,
    stats: Stats,
    smoothing: Array | None,
) -> Array:
    """The largest |(X / s) Q| of each matrix over the sampled tokens, (*batch,); never less than an
    outlier of a token that is not among them makes of itself.

    A channel of 700 in a block of 49 becomes 49 numbers whose squares sum to 700^2 at least, so the
    largest is 700 / sqrt(49) = 100 or more.

    Raises:
        ValueError: there is no sample. What a rotation makes of channels is not to be told from
            their ranges alone.
    """
    if site.path not in stats.sample:
        raise ValueError(
            f"{site.path}: a static range of rotated activations comes from a sample of tokens, "
            "and these statistics have none; call calibrate(..., sample=512), or take a scale that "
            "is computed at run time, activation=sq.PerToken()"
        )
    rows = stats.sample[site.path].rows
    *batch, _, features = rows.shape
    if smoothing is not None:
        rows = rows / smoothing.reshape(*batch, 1, features)
        absmax = absmax / smoothing
    with named(site.path):
        block = block_of(cast(Rotation, scheme.rotation), features)
    # As a product with the weight rotates it.
    turned = rotated(rows, block, exact=False)
    sampled = jnp.max(jnp.abs(turned), axis=(-2, -1))
    if site.batch:
        # An expert that few tokens reached takes the range of the one that needs most.
        enough = stats.trust(site).min(axis=site.feature_axes) == 1
        most = jnp.max(sampled, axis=-1, keepdims=True)
        sampled = jnp.where(enough, sampled, most)
    return jnp.maximum(
        sampled, jnp.max(absmax, axis=site.feature_axes) / math.sqrt(block)
    )


def _quantized_kernel(
    leaf: Array,
    site: Site,
    scheme: Scheme,
    stats: Stats,
    absmax: Any,
    folded: Array | None,
) -> Any:
    """The kernel of a convolution, with what its scheme takes from the statistics."""
    s = None
    if scheme.smoothing is not None:
        largest = weight_absmax(site, leaf)
        s = smoothing_scales(absmax, largest, scheme.smoothing)
    absmax = _covered(absmax, site, scheme, stats, folded)
    with named(site.path):
        return quantize_kernel(
            leaf, site.summed, leaf_channels(site), scheme, absmax, s
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
    mask: Callable[..., Any] | None = None,
    progress: bool = False,
) -> PyTree:
    """Calibrates, smooths and quantizes in the right order; run the result with `quantized(fn)`.

    Xiao et al. 2022, arXiv 2211.10438. The statistics of the smoothed parameters are derived, not
    measured again, so static schemes are right too. Only static ranges other than "absmax" need
    histograms of the smoothed model: for these the batches are kept in a list, and read twice.

    Args:
        fn: as for `calibrate`.
        params: as for `calibrate`.
        batches: as for `calibrate`.
        alpha: as for `scales`, which says what alpha to take.
        scheme: as for `quantize`.
        groups: as for `scales`.
        progress: as for `calibrate`.
        runtime: an alpha for the sites that are in no smoothed group (a tied head, what follows a
            GELU): these are smoothed at run time. None: not at all.
        mask: as for `calibrate`: which tokens count.

    Returns:
        The quantized tree.

    Raises:
        ValueError: what `calibrate`, `scales` and `quantize` refuse; a scheme that `runtime` does
            not go with.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params, x = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}, jnp.array([[1.0, 16.0]])
        >>> qparams = sq.smoothquant(fn, params, [x], alpha=0.5, scheme=sq.W8A8_O3)
        >>> jax.jit(sq.quantized(fn))(qparams, x).round(1).tolist()
        [[17.0, 17.0, 17.0]]
    """
    twice = any(how.needs_histogram for how in _schemes_in(scheme))
    # All that can be known is checked before the long part.
    check_alpha("smoothquant: alpha", alpha)
    if runtime is not None:
        check_alpha("smoothquant: runtime", runtime)
    if twice:
        batches = list(batches)
    stats = calibrate(
        fn,
        params,
        batches,
        mask=mask,
        sample=sample_for(scheme),
        progress=progress,
    )
    s = scales(params, stats, alpha, groups=groups)
    schemes = site_schemes(stats.graph, scheme)
    if runtime is not None:
        schemes = _smoothed_at_run_time(schemes, stats.graph, s, runtime)

    folded = fold(params, stats.graph, s)
    # A histogram of X says nothing about X / s, so it is taken of the smoothed model.
    if twice:
        stats = calibrate(
            fn,
            folded,
            batches,
            mask=mask,
            histogram=True,
            sample=sample_for(scheme),
            progress=progress,
        )
    else:
        stats = fold_stats(stats, s)
    return quantize_sites(folded, stats, schemes, s)


def sample_for(rules: Rules) -> int:
    """How many tokens of each site `calibrate` shall keep for these rules: 512, or 0 for none."""
    return SAMPLE if any(how.needs_sample for how in _schemes_in(rules)) else 0


def _schemes_in(rules: Rules) -> list[Scheme]:
    return [how for how in _by_pattern(rules).values() if how is not None]


def _smoothed_at_run_time(
    schemes: Mapping[str, Scheme],
    graph: Graph,
    s: Mapping[str, Array],
    alpha: float,
) -> dict[str, Scheme]:
    """The schemes, with this alpha for the sites that no s in `s` smooths already."""
    # A table meets indices: there is no activation to smooth.
    spared = set(paths_of(graph.tables))
    for group in graph.groups:
        if group.name in s:
            spared.update(group.paths)
    changed = dict(schemes)
    for path in sorted(changed.keys() - spared):
        with named(path):
            changed[path] = schemes[path].replace(smoothing=alpha)
    return changed
