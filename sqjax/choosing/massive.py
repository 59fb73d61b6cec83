"""Massive channels: a few that are far above all others, and that no smoothing scale serves.

In many language models one or two channels reach thousands at the first token of every text, on
which attention rests, where all others stay below ten (Sun et al. 2024, arXiv 2402.17762). A scale
that all tokens share is then too coarse for the rest. To divide such a channel by its range moves
it into one row of the weight, and there every output's scale becomes as coarse. So these channels
are neither smoothed nor rounded: they are multiplied in float (a scheme's `outliers`, LLM.int8()),
beside the integer product of all others.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sqjax.calibration.stats import Stats
from sqjax.folding.graph import Site
from sqjax.weights.schemes import PerTensor, Scheme, Static

#: Channels above so many times the ninth largest are massive: at most eight of a matrix. In
#: matrices of less than 128 channels at most one of 16, above the largest of the others.
FACTOR, MOST, LEAST_OTHERS = 8.0, 8, 16


class Massive(NamedTuple):
    """The massive channels of a site.

    Attributes:
        channels: booleans, the shape of the site's statistics.
        threshold: what they exceed, and no other channel does.
    """

    channels: np.ndarray
    threshold: float


def massive_channels(
    stats: Stats, schemes: Mapping[str, Scheme]
) -> dict[str, Massive]:
    """{site: its massive channels} of the sites that have some, and one scale for all tokens.

    Example: of 576 channels with the absmaxes 3000, 40, and others up to 20, the ninth largest of
    all being 12, the first is massive: 3000 > 8 x 12 = 96.
    """
    found = {}
    for site in stats.graph.sites:
        scheme = schemes.get(site.path)
        if scheme is None or not _is_served(site, scheme):
            continue
        absmax = np.asarray(stats.absmax[site.path])
        ordered = np.sort(absmax.reshape(-1))  # ascending
        # A few of all channels: where many are large, they are no exception.
        most = min(MOST, ordered.size // LEAST_OTHERS)
        if not most:
            continue
        threshold = FACTOR * float(ordered[-1 - most])
        channels = absmax > threshold
        # A threshold of 0 says that nearly all channels are dead, and not that one is massive.
        if threshold > 0 and channels.any():
            found[site.path] = Massive(channels, threshold)
    return found


def _is_served(site: Site, scheme: Scheme) -> bool:
    """Whether a scheme has one scale for all tokens, and could have outliers beside it.

    Of a stack every matrix has as many outliers as the one that has most, so stacks are left out.
    """
    shared = isinstance(scheme.activation, Static | PerTensor)
    beside = (scheme.outliers, scheme.smoothing, scheme.rotation)
    plain = site.kernel is None and not site.batch
    return (
        shared
        and plain
        and beside == (None,) * 3
        and not scheme.needs_histogram
    )


def without(stats: Stats, massive: Mapping[str, Massive]) -> Stats:
    """The statistics as though these channels were never seen: a search then gives them s = 1."""
    absmax, abs_sum = dict(stats.absmax), dict(stats.abs_sum)
    gram, sample = dict(stats.gram), dict(stats.sample)
    for path, (channels, _) in massive.items():
        # Zeros are what a dead channel leaves, and a dead channel gets s = 1.
        kept = jnp.asarray(~channels, jnp.float32)
        absmax[path] = absmax[path] * kept
        abs_sum[path] = abs_sum[path] * kept
        flat = kept.reshape(-1)
        if path in gram:
            gram[path] = gram[path] * (flat[:, None] * flat[None])
        if path in sample:
            rows = sample[path].rows * flat[None]
            sample[path] = replace(sample[path], rows=rows)
    return replace(
        stats, absmax=absmax, abs_sum=abs_sum, gram=gram, sample=sample
    )
