"""The numbers that `learn` moves: which there are, where they start, and what bounds them.

All are factors above 0, and are kept as logs: a step up and a step down of equal size undo each
other then, and no step leads to a factor of 0 or below.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._trees import PyTree
from sqjax.calibration.stats import Stats
from sqjax.folding.apply import check_scales, leaves_by_path
from sqjax.folding.graph import Site, paths_of
from sqjax.methods.quantization import (
    Clips,
    Rules,
    check_clips,
    site_schemes,
)
from sqjax.methods.smoothing import fold_stats
from sqjax.weights.clipping import clip_of_ranges, ranges_of
from sqjax.weights.quantize import named
from sqjax.weights.schemes import Scheme, Static

#: "s", "clips" and "ranges", each {name: the logs of its numbers}.
Logs = dict[str, dict[str, Array]]

#: No clip makes a range smaller than this part of itself.
_LEAST = 0.05


def learned_schemes(stats: Stats, rules: Rules) -> dict[str, Scheme]:
    """{leaf: its scheme}, of which all can be simulated."""
    schemes = site_schemes(stats.graph, rules)
    sites = set(paths_of(stats.graph.sites))
    if sites.isdisjoint(schemes):
        raise ValueError(
            "learn: expected rules that quantize a matmul's weight, got none"
        )
    for path, scheme in schemes.items():
        beside = (scheme.smoothing, scheme.outliers, scheme.rotation)
        if beside != (None, None, None) or scheme.needs_histogram:
            raise ValueError(
                f"learn: {path}: expected a scheme without smoothing or rotation at run time, "
                f"outliers and ranges from histograms, got {scheme!r}; s is learned here, and so "
                "are ranges"
            )
    return schemes


def start_of(
    params: PyTree,
    stats: Stats,
    schemes: Mapping[str, Scheme],
    s: Mapping[str, Array] | None,
    clips: Clips | bool,
) -> Logs:
    """The logs of a given s (else of 1), of given clips (else of 1), and of each absmax."""
    leaves = leaves_by_path(params, stats.graph)
    sites = [site for site in stats.graph.sites if site.path in schemes]
    if s is None:
        groups = stats.graph.select("all")
        s = {group.name: jnp.ones(group.size, jnp.float32) for group in groups}
    check_scales(stats.graph, s)
    if isinstance(clips, bool):
        factors = _ones(sites, leaves, schemes) if clips else {}
    else:
        factors = _given(clips, sites, leaves, schemes)
    ranges = _ranges(stats, sites, schemes, s)
    parts = {"s": s, "clips": factors, "ranges": ranges}
    return {
        part: {
            name: jnp.log(jnp.asarray(x, jnp.float32)) for name, x in of.items()
        }
        for part, of in parts.items()
    }


def _ones(
    sites: Iterable[Site],
    leaves: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
) -> dict[str, Array]:
    """Clips of 1 for every matmul's weight."""
    clips = {}
    for site in sites:
        if site.kernel is None:
            shape = _ranges_shape(site, leaves[site.path], schemes[site.path])
            clips[site.path] = jnp.ones(shape, jnp.float32)
    return clips


def _given(
    clips: Clips,
    sites: Iterable[Site],
    leaves: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
) -> dict[str, Array]:
    """Clips to start from, checked, in the shape of the ranges."""
    by_path = {site.path: site for site in sites}
    check_clips(clips, {path: schemes[path] for path in by_path}, by_path)
    given = {}
    for path, clip in clips.items():
        shape = _ranges_shape(by_path[path], leaves[path], schemes[path])
        with named(path):
            given[path] = clip_of_ranges(jnp.asarray(clip), shape)
    return given


def _ranges(
    stats: Stats,
    sites: Iterable[Site],
    schemes: Mapping[str, Scheme],
    s: Mapping[str, Array],
) -> dict[str, Array]:
    """max |X / s| of every static site, one for each matrix of a stack."""
    absmax = fold_stats(stats, s).absmax
    ranges = {}
    for site in sites:
        if isinstance(schemes[site.path].activation, Static):
            largest = jnp.max(absmax[site.path], axis=site.feature_axes)
            # What no token has reached has no range; any number will do.
            ranges[site.path] = jnp.where(largest > 0, largest, 1.0)
    return ranges


def _ranges_shape(site: Site, leaf: Any, scheme: Scheme) -> tuple[int, ...]:
    """The shape of a weight's ranges: that of its scales, such as (outputs, groups).

    Nothing is computed, because only the shape is asked for.
    """

    def highest(leaf):
        return ranges_of(leaf, site.axes, scheme, site.batch)[2]

    return jax.eval_shape(highest, leaf).shape


def identity_of(
    stats: Stats, schemes: Mapping[str, Scheme], start: Logs
) -> Logs:
    """s = 1, and nothing clipped."""
    zeros = jax.tree.map(jnp.zeros_like, start)  # log 1
    sites = [site for site in stats.graph.sites if site.path in schemes]
    # Static ranges start from the absmax of X itself, because X / s with s = 1 is X.
    ranges = _ranges(stats, sites, schemes, {})
    return {**zeros, "ranges": jax.tree.map(jnp.log, ranges)}


def numbers_of(logs: Logs) -> dict[str, dict[str, Array]]:
    """What the logs are of."""
    return jax.tree.map(jnp.exp, logs)


def projected(logs: Logs) -> Logs:
    """Clips stay in (0, 1]."""
    inside = partial(jnp.clip, min=float(np.log(_LEAST)), max=0.0)
    return {**logs, "clips": jax.tree.map(inside, logs["clips"])}
