"""Quantization simulated in float, with gradients: what smoothing scales and ranges are learned by.

What is rounded is w = scale * round(w / scale). Its gradient takes round for the identity
(straight-through, Bengio et al. 2013, arXiv 1308.3432), but not the scale for a constant (LSQ,
Esser et al. 2020, arXiv 1902.08153). So of a number inside the range

    dw' = dw + (round(w / scale) - w / scale) dscale

and of one beyond it, which is clipped, dw' = round(w / scale) dscale. A scale is made of a range,
and the range of max |w|: through it the gradient reaches smoothing scales and clips, of which the
float model knows nothing.

The weights are rounded apart from the program, and their float values multiplied in it; activations
are rounded where they meet a weight, by the same walk by which `site_errors` finds them
(`sqjax.methods.beside`). Values are those of `quantized`, up to the rounding of float sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from sqjax._trees import PyTree, named_leaves
from sqjax.calibration.stats import Stats
from sqjax.folding.apply import fold
from sqjax.folding.graph import Site, paths_of
from sqjax.methods.beside import Beside, Meeting, leaves_beside
from sqjax.methods.quantization import quantize_sites
from sqjax.methods.smoothing import fold_stats
from sqjax.numerics.formats import (
    FORMATS,
    Format,
    scale_from_absmax,
    to_codes,
    to_format,
    zero_point_range,
)
from sqjax.program.subprograms import emit
from sqjax.program.trace import Traced
from sqjax.program.walk import run
from sqjax.weights.clipping import ranges_of
from sqjax.weights.layout import Layout
from sqjax.weights.quant_weight import QuantWeight, is_quantized
from sqjax.weights.schemes import Float8, Int4, Scheme


def simulated(
    traced: Traced,
    params: PyTree,
    stats: Stats,
    schemes: Mapping[str, Scheme],
    learned: Mapping[str, Mapping[str, Array]],
    inputs: Sequence[Any],
) -> PyTree:
    """What the traced function gives, folded, clipped and quantized; in float, with gradients.

    Args:
        traced: the function.
        params: the float tree.
        stats: its statistics.
        schemes: {leaf: its scheme}.
        learned: what has gradients: "s" {group: s}, "clips" {site: factors of the weights' ranges}
            and "ranges" {site: the static input range}.
        inputs: the arrays of the batch.
    """
    folded, measured = applied(params, stats, learned["s"], learned["ranges"])
    clips = learned["clips"]
    qparams = quantize_sites(
        jax.tree.map(lax.stop_gradient, folded), measured, schemes, clips=clips
    )
    paths, floats, _ = named_leaves(folded)
    coded = named_leaves(qparams, is_leaf=is_quantized)[1]
    sites = dict(
        zip(paths_of(stats.graph.sites), stats.graph.sites, strict=True)
    )
    rounded = []
    for path, leaf, weight in zip(paths, floats, coded, strict=True):
        if path in sites and is_quantized(weight):
            clip = clips.get(path)
            leaf = round_weight(leaf, weight, sites[path], schemes[path], clip)
        elif is_quantized(weight):
            leaf = weight.dequantize()
        rounded.append(leaf)
    leaves = leaves_beside(paths, rounded, [coded])
    outputs = run(traced.jaxpr, [*leaves, *inputs], _Rounding())
    return jax.tree.unflatten(traced.treedef, outputs)


def applied(
    params: PyTree,
    stats: Stats,
    s: Mapping[str, Array],
    ranges: Mapping[str, Array],
) -> tuple[PyTree, Stats]:
    """(params with s folded in, their statistics with these input ranges).

    A range is put in as the largest absmax of the channels; the other channels keep their ratios to
    it. s has no gradient through it, because of a maximum it would concern one channel only.
    """
    measured = fold_stats(stats, s)
    absmax = dict(measured.absmax)
    for path, limit in ranges.items():
        seen = lax.stop_gradient(absmax[path])
        channels = tuple(range(limit.ndim, seen.ndim))
        largest = jnp.max(seen, axis=channels, keepdims=True)
        # What no token has reached has no range, and is left to `quantize`.
        ratios = seen / jnp.where(largest > 0, largest, 1.0)
        absmax[path] = ratios * jnp.expand_dims(limit, channels)
    return fold(params, stats.graph, s), replace(measured, absmax=absmax)


def round_weight(
    leaf: Array,
    weight: QuantWeight,
    site: Site,
    scheme: Scheme,
    clip: Array | None,
) -> Array:
    """The values of a quantized weight, with the gradients of the float leaf and of the clip.

    Args:
        leaf: the float leaf.
        weight: it, quantized by the scheme with this clip.
        site: its site.
        scheme: says what shares a scale.
        clip: factors of the ranges, or None.
    """
    if site.kernel is not None:
        return leaf + lax.stop_gradient(weight.dequantize() - leaf)
    layout, lowest, highest = ranges_of(leaf, site.axes, scheme, site.batch)
    if clip is not None:
        lowest, highest = lowest * clip, highest * clip
    stored, spread = layout.stored, layout.sharing.spread
    scale, values = _scale_and_values(layout, lowest, highest, weight, scheme)
    inside = (stored >= spread(lowest)) & (stored <= spread(highest))
    rounded = _straight_through(stored, scale, values, inside)
    # The logical axis of stored axis i is axes[i], so the inverse permutation leads back.
    return rounded.transpose(weight.tensor.axes).astype(leaf.dtype)


def _scale_and_values(
    layout: Layout,
    lowest: Array,
    highest: Array,
    weight: QuantWeight,
    scheme: Scheme,
) -> tuple[Array, Array]:
    """The scale of every stored element, with gradients, and what it is rounded to, without."""
    how, spread = scheme.weight, layout.sharing.spread
    stored = lax.stop_gradient(layout.stored)
    if isinstance(how, Int4) and how.zero_point:
        scale, zero = map(spread, zero_point_range(lowest, highest))
        codes = to_codes(stored, lax.stop_gradient(scale), zero)
        codes = codes.astype(jnp.float32) - zero.astype(jnp.float32)
    else:
        scale = spread(scale_from_absmax(highest, how.fmt))
        codes = to_format(stored, lax.stop_gradient(scale), how.fmt)
        codes = codes.astype(jnp.float32)
    twice = isinstance(how, Int4) and how.two_level
    in_blocks = isinstance(how, Float8) and how.block_size is not None
    if twice or in_blocks:
        # Their scales are made in other ways, of which only the size of this one is known here.
        tensor = weight.tensor
        values = tensor.stored(weight.dequantize().astype(jnp.float32))
        return scale, lax.stop_gradient(values)
    return scale, codes * lax.stop_gradient(scale)


def round_activation(x: Array, scale: Array, fmt: Format) -> Array:
    """x rounded to a format, with the gradients of x and of the scale."""
    exact = x.astype(jnp.float32)
    q = exact / scale
    codes = to_format(lax.stop_gradient(exact), lax.stop_gradient(scale), fmt)
    values = codes.astype(jnp.float32) * lax.stop_gradient(scale)
    inside = jnp.abs(q) <= fmt.bound
    rounded = _straight_through(exact, scale, values, inside)
    return rounded.astype(x.dtype)


def _straight_through(
    x: Array, scale: Array, values: Array, inside: Array
) -> Array:
    """`values`, with the gradient of x where it is inside the range, and that of its scale."""
    frozen = lax.stop_gradient(scale)
    lost = lax.stop_gradient(values - x)
    rounded = x + scale * (lost / frozen)
    clipped = scale * (lax.stop_gradient(values) / frozen)
    return jnp.where(inside, rounded, clipped)


class _Rounding(Beside):
    """The walk that rounds an activation where it meets a quantized weight.

    The float leaves have the values of the quantized ones.
    """

    multiplies = False

    def meeting(self, met: Meeting) -> Array:
        """The product of the rounded activation with the rounded weight."""
        weight = next(met.leaves).value
        if (
            weight.activations is None
            or met.equation.primitive.name == "gather"
        ):
            return met.exact
        if met.equation.primitive.name != "dot_general":
            raise ValueError(
                f"learn: {met.paths[0]} is read by {met.equation.primitive.name}; only matmuls "
                "with quantized activations are simulated. Give it a scheme for the weight alone, "
                "or None"
            )
        left = 0 if met.floats[0] is met.operands[0][0] else 1
        operands = list(met.floats)
        operands[left] = _rounded_input(met, left, weight)
        [result] = emit(met.equation, *operands)
        return result


def _rounded_input(met: Meeting, place: int, weight: QuantWeight) -> Array:
    """The activation of a product, rounded as its weight says."""
    x = met.floats[place]
    contracted, batch = met.equation.params["dimension_numbers"]
    fmt = FORMATS[weight.activation_format]
    if weight.activations == "static":
        shape = [1] * x.ndim
        scale = weight.input_scale
        for axis, size in zip(batch[place], scale.shape, strict=False):
            shape[axis] = size
        return round_activation(x, scale.reshape(shape), fmt)
    per_token = weight.activations == "per_token"
    axes = contracted[place] if per_token else range(x.ndim)
    largest = jnp.max(
        jnp.abs(x.astype(jnp.float32)), tuple(axes), keepdims=True
    )
    return round_activation(x, scale_from_absmax(largest, fmt), fmt)
