"""Ranges of weights that are smaller than the weights', chosen by the error of the output.

A few large weights of a group stretch the step of all the others. A smaller range clips these few
and rounds the rest more finely: AWQ's second search (Lin et al. 2023, arXiv 2306.00978). There the
error is measured on some tokens; here it comes from the Gram matrix of all of them, exactly.
"""

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from sqjax._shapes import other_axes, sizes_along
from sqjax._trees import PyTree
from sqjax.calibration.stats import Stats
from sqjax.choosing.matrices import in_matrix, stacked
from sqjax.folding.apply import leaves_by_path
from sqjax.folding.graph import Site
from sqjax.numerics.hadamard import rotated_gram
from sqjax.numerics.output_error import best_changes, gram_error
from sqjax.weights.clipping import ranges_of
from sqjax.weights.qtensor import dequantize
from sqjax.weights.quantize import (
    block_of,
    named,
    quantize_weight,
    rotated_weight,
)
from sqjax.weights.schemes import Float8, Scheme

#: 1, 0.975, ... 0.6: the shares of a range that are tried.
SHRINKING = tuple((1 - np.arange(17) / 40).tolist())


def search_clips(
    params: PyTree,
    stats: Stats,
    schemes: Mapping[str, Scheme],
    ratios: tuple[float, ...] = SHRINKING,
) -> dict[str, Array]:
    """{site: the share of each range that is kept}, in the shape of what shares a scale.

    One group of channels of each output after the other takes the share with which the output's
    error is least, given the shares that the other groups have
    (`sqjax.numerics.output_error.best_changes`). So no output is worse than unclipped. Float8 is
    left out, because its steps grow with the weights: there is nothing to be gained. It takes the
    memory of one copy of a weight for each ratio.

    Args:
        params: the folded parameters.
        stats: theirs, with Gram matrices.
        schemes: {site: its scheme}.
        ratios: the shares to try; the first is 1.
    """
    leaves = leaves_by_path(params, stats.graph)
    clips = {}
    for site in stats.graph.sites:
        scheme = schemes.get(site.path)
        if scheme is None or isinstance(scheme.weight, Float8):
            continue
        if site.path not in stats.gram:
            continue
        with named(site.path):
            clips[site.path] = _clips(
                leaves[site.path],
                stats.gram[site.path],
                stats.absmax[site.path],
                jnp.asarray(ratios, jnp.float32),
                site=site._replace(path=""),
                scheme=scheme,
            )
    return clips


@partial(jax.jit, static_argnames=("site", "scheme"))
def _clips(
    leaf: Array,
    gram: Array,
    absmax: Array,
    ratios: Array,
    *,
    site: Site,
    scheme: Scheme,
) -> Array:
    """`search_clips` of one site, which has no path here: it is a key of compiled programs."""
    of_one = partial(_of_matrix, in_matrix(site), scheme, ratios)
    stack = sizes_along(leaf.shape, site.batch)

    def flat(x: Array) -> Array:
        """Statistics, whose batch axes come first, with these as one."""
        return x.reshape(math.prod(stack), *x.shape[len(stack) :])

    # One matrix after the other, because a copy of each for every ratio is large enough.
    matrices = stacked(leaf, site), flat(gram), flat(absmax)
    found = lax.map(lambda one: of_one(*one), matrices)
    return found.reshape(*stack, *found.shape[1:])


def _of_matrix(
    axes: tuple[int, ...],
    scheme: Scheme,
    ratios: Array,
    weight: Array,
    gram: Array,
    absmax: Array,
) -> Array:
    """The best shares of the ranges of one matrix."""
    weight = weight.astype(jnp.float32)
    # As the weight is stored: its contracted axes ascending, and the last of them in groups.
    ascending = tuple(sorted(axes))
    gram = _reordered(gram, axes, sizes_along(weight.shape, axes))
    features = gram.shape[0]
    if scheme.rotation is not None:
        # What is rounded is the rotated weight, of which these ranges are.
        block = block_of(scheme.rotation, features)
        weight = rotated_weight(weight, ascending, block)
        gram = rotated_gram(gram, block)
        scheme = scheme.replace(rotation=None)
    layout, lowest, _ = ranges_of(weight, axes, scheme, ())
    outer = other_axes(weight.ndim, axes)

    def changed(clip: Array) -> Array:
        """What quantizing changes of the weight, (features, outputs)."""
        made = quantize_weight(weight, axes, scheme, absmax, clip=clip)
        change = dequantize(made.tensor) - weight
        return change.transpose(*ascending, *outer).reshape(features, -1)

    def error(clip: Array) -> Array:
        """One for each output; of a single range for all outputs their sum."""
        found = gram_error(changed(clip), gram)
        return jnp.full_like(found, found.sum()) if is_single else found

    is_single = lowest.size == 1
    one = jnp.ones(lowest.shape, jnp.float32)
    if is_single:
        tried = lax.map(lambda ratio: error(one * ratio), ratios)
        # All outputs have the same error here, because they share the range.
        chosen = jnp.argmin(tried[:, :1], axis=0)
    else:
        changes = lax.map(lambda ratio: changed(one * ratio), ratios)
        group = layout.sharing.group or features
        chosen = best_changes(changes, gram, group)
    clip = ratios[chosen].reshape(lowest.shape)
    # Where groups share a scale below their own (two levels), ratios together are not each alone.
    # So what was found is compared once more with no clipping, output by output.
    better = error(clip) <= error(one)
    by_output = (*lowest.shape[: len(outer)], *[1] * len(axes))
    better = better[:1] if is_single else better
    return jnp.where(better.reshape(by_output), clip, 1)


def _reordered(gram: Array, axes: tuple[int, ...], sizes: tuple) -> Array:
    """The Gram matrix with the features of ascending axes.

    Example: axes (1, 0) of sizes (2, 3) have the features (0, 0), (0, 1), (0, 2), (1, 0), ...; with
    ascending axes, which are of sizes (3, 2), they come in the order 0, 3, 1, 4, 2, 5.
    """
    if axes == tuple(sorted(axes)):
        return gram
    count = math.prod(sizes)
    order = np.arange(count).reshape(sizes).transpose(np.argsort(axes))
    order = order.reshape(-1)
    return gram[order][:, order]
