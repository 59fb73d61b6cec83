"""Whether statistics describe these parameters: `smooth` and `quantize` ask before they use any."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._trees import PyTree, is_concrete, is_float, map_named
from sqjax.calibration.stats import Stats, leaf_sizes, weight_absmaxes
from sqjax.folding.apply import leaves_by_path, unfold
from sqjax.folding.graph import Site, paths_of


def check_stats(stats: Any, what: str, *, ranges: bool = True) -> None:
    """Raises ValueError if these are no statistics; or, with `ranges`, if a site has no range,
    because `rotate_stats` has rotated it.
    """
    if not isinstance(stats, Stats):
        raise ValueError(
            f"{what}: expected the Stats that sqjax.calibrate(fn, params, batches) returns, got "
            f"{type(stats).__name__}"
        )
    if ranges:
        stats.check_ranges(what, paths_of(stats.graph.sites))


def check_known(params: PyTree, stats: Stats, what: str) -> None:
    """Raises ValueError for tracers: what is chosen decides which programs are compiled."""
    if not _known(params, stats):
        raise ValueError(
            f"{what}: expected arrays whose numbers are known, got tracers: call it outside of "
            "jax.jit, grad and vmap"
        )


def check_weights(
    params: PyTree, stats: Stats, sites: Iterable[Site], advice: str
) -> None:
    """Raises ValueError if the statistics were taken from other weights, for example from the
    weights before smoothing; the message ends with the advice.

    Compared: max |w| of each channel, with the smoothing scales that `fold_stats` put in undone.
    Values can not be checked under jit.
    """
    sites = list(sites)
    if not sites or not _known(params, stats):
        return
    # Values that a jitted function has closed over are known, though tracing is under way.
    with jax.ensure_compile_time_eval():
        original = _original(params, stats)
        slacks = _slack(params, stats, sites)
        maxima = weight_absmaxes(sites, original)
        of_now, of_then = jax.device_get((maxima, stats.weight_absmax))
    for site in sites:
        path = site.path
        now, then = of_now[path], of_then[path]
        tolerance = _tolerance(original[path])
        near = np.abs(now - then) <= tolerance * np.abs(then) + slacks[path]
        if not np.all(near):
            raise ValueError(
                f"{path}: the statistics are of other parameters than these "
                f"(were they smoothed, rotated or trained?); {advice}"
            )


def check_leaves(
    params: PyTree, stats: Stats, sites: Iterable[Site], advice: str
) -> None:
    """`check_weights`, and the same of the other leaves that these sites' activations depend on.

    These are the leaves of the sites' own groups, a norm's gain for example, and the leaves in no
    group. Leaves of other groups may have been scaled since, which changes nothing here. Of each
    leaf max |w| and the mean |w| are compared.
    """
    sites = list(sites)
    check_weights(params, stats, sites, advice)
    if not sites or not stats.leaf_sizes or not _known(params, stats):
        return
    paths = set(paths_of(sites))
    elsewhere: set[str] = set()
    for group in stats.graph.groups:
        if paths.isdisjoint(group.paths):
            elsewhere |= dict(group.leaves).keys()
    others = {path for path, _ in stats.graph.leaves} - paths - elsewhere
    check_sizes(params, stats, others, advice)


def check_sizes(
    params: PyTree, stats: Stats, paths: Iterable[str], advice: str
) -> None:
    """Raises ValueError if one of these leaves is another than the statistics were taken of.

    Compared: max |w| and the mean |w|.
    """
    with jax.ensure_compile_time_eval():
        original = _original(params, stats)
        compared = jax.device_get((leaf_sizes(original), stats.leaf_sizes))
    sizes, of_then = compared
    offsets = dict(stats.graph.offsets)
    for path in sorted(sizes.keys() & of_then.keys() & set(paths)):
        tolerance = 10 * _tolerance(original[path])
        # c + w was folded, so w itself has lost the digits that c + w has not.
        slack = tolerance * abs(offsets.get(path, 0.0))
        then = of_then[path]
        if not np.allclose(sizes[path], then, rtol=tolerance, atol=slack):
            (largest, mean), (was_largest, was_mean) = sizes[path], then
            raise ValueError(
                f"{path}: the statistics are of other parameters than these (max |w| is "
                f"{largest:.3g} and the mean |w| {mean:.3g}; when calibrated they were "
                f"{was_largest:.3g} and {was_mean:.3g}); {advice}"
            )


def _known(params: PyTree, stats: Stats) -> bool:
    """Whether there are values to compare: there are none under jit."""
    return all(map(is_concrete, jax.tree.leaves((params, stats))))


def _original(params: PyTree, stats: Stats) -> dict[str, Any]:
    """{path: leaf} before `stats.folded` was folded in, up to rounding."""
    # Most statistics are those of the calibrated model: then nothing is to be copied.
    s = {
        name: scale
        for name, scale in stats.folded.items()
        if np.any(np.asarray(scale) != 1)
    }
    before = unfold(params, stats.graph, s) if s else params
    return leaves_by_path(before, stats.graph)


def _tolerance(leaf: Any) -> float:
    """Folding and unfolding round each weight twice, in its own precision."""
    return 4 * float(jnp.finfo(leaf.dtype).eps) + 1e-5


def _slack(
    params: PyTree, stats: Stats, sites: list[Site]
) -> dict[str, np.ndarray]:
    """{site: by how much rounding to the smallest numbers can have moved max |W_j|}.

    Example: float16 holds multiples of 2^-24 near 0. A weight of 0.05 with an s of 1e-5 is stored
    as 5e-7, which is rounded by up to 3e-8; undoing s makes that an error of 0.003. Other formats
    hold numbers that are far smaller than any weight.
    """
    leaves = leaves_by_path(params, stats.graph)
    if all(leaves[site.path].dtype != jnp.float16 for site in sites):
        return {
            site.path: np.zeros(site.channels, np.float32) for site in sites
        }

    def smallest(path: str, leaf: Any) -> Any:
        if not is_float(leaf):
            return leaf
        step = float(jnp.finfo(leaf.dtype).smallest_subnormal)
        return jnp.full(leaf.shape, step, jnp.float32)

    steps = map_named(smallest, params)
    graph = stats.graph._replace(offsets=())
    unfolded = leaves_by_path(unfold(steps, graph, stats.folded), stats.graph)
    return jax.device_get(weight_absmaxes(sites, unfolded))
