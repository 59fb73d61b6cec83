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
from typing import Any, NamedTuple

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
    to_differences,
    to_format,
    zero_point_range,
)
from sqjax.program.subprograms import emit
from sqjax.program.trace import Traced
from sqjax.program.walk import run
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
    # Rounded by `quantize` itself, because what is learned shall be true of its codes.
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
    sharing = _Sharing.of(site, scheme, leaf.shape)
    x = sharing.view(leaf.astype(jnp.float32))
    lowest, highest = sharing.ranges(x, scheme)
    inside = None
    if clip is not None:
        # The logical axis of stored axis i is axes[i], so the inverse permutation leads back.
        factor = sharing.view_of_ranges(clip.transpose(weight.tensor.axes))
        lowest, highest = lowest * factor, highest * factor
        inside = (x >= lowest) & (x <= highest)
    scale, values = _scale_and_values(x, lowest, highest, scheme)
    # The gradient is that of plain scales, because the others differ little from these.
    if _has_other_scales(scheme):
        values = sharing.view(weight.dequantize().astype(jnp.float32))
    rounded = straight_through(x, scale, lax.stop_gradient(values), inside)
    return sharing.back(rounded).astype(leaf.dtype)


class _Sharing(NamedTuple):
    """Which elements of a leaf share a scale, without transposing it: that would take most time.

    Example: a kernel (256, 300) in groups of 64 inputs is seen as (4, 64, 300), whose ranges are
    (4, 1, 300).

    Attributes:
        shape: of the leaf.
        axes: of the view, those along which one scale is shared.
        axis: of the leaf, the one that is in groups; 0 without groups.
        group: the group size; 0 without groups.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    axis: int = 0
    group: int = 0

    @classmethod
    def of(
        cls, site: Site, scheme: Scheme, shape: tuple[int, ...]
    ) -> "_Sharing":
        """What a scheme's granularity means for the leaf of a site."""
        granularity = scheme.weight.granularity
        if granularity == "per_channel":
            return cls(shape, site.axes)
        if granularity == "per_tensor":
            axes = range(len(shape))
            return cls(shape, tuple(a for a in axes if a not in site.batch))
        axis = max(site.axes)
        # A shorter axis is one group.
        group = min(int(granularity), shape[axis])
        return cls(shape, (axis + 1,), axis, group)

    def view(self, x: Array) -> Array:
        """The leaf with its groups apart; the last one is filled up with its last element."""
        if not self.group:
            return x
        padding = [(0, 0)] * x.ndim
        padding[self.axis] = (0, -x.shape[self.axis] % self.group)
        x = jnp.pad(x, padding, mode="edge")
        before, after = x.shape[: self.axis], x.shape[self.axis + 1 :]
        return x.reshape(*before, -1, self.group, *after)

    def back(self, view: Array) -> Array:
        """The leaf that a view is of."""
        if not self.group:
            return view
        before, after = self.shape[: self.axis], self.shape[self.axis + 1 :]
        x = view.reshape(*before, -1, *after)
        return lax.slice_in_dim(x, 0, self.shape[self.axis], axis=self.axis)

    def view_of_ranges(self, x: Array) -> Array:
        """Ranges, whose axes are in the leaf's order, in a shape that broadcasts against a view."""
        return jnp.expand_dims(x, self.axis + 1) if self.group else x

    def ranges(self, view: Array, scheme: Scheme) -> tuple[Array, Array]:
        """The lowest and the highest number of what shares a scale, of size 1 along `axes`."""
        if _has_zero_point(scheme):
            lowest = jnp.min(view, self.axes, keepdims=True)
            return lowest, jnp.max(view, self.axes, keepdims=True)
        highest = jnp.max(jnp.abs(view), self.axes, keepdims=True)
        return -highest, highest


def _has_zero_point(scheme: Scheme) -> bool:
    return isinstance(scheme.weight, Int4) and scheme.weight.zero_point


def _has_other_scales(scheme: Scheme) -> bool:
    """Whether scales are made in another way, of which `_scale_and_values` knows only the size."""
    how = scheme.weight
    if isinstance(how, Int4):
        return how.two_level
    return isinstance(how, Float8) and how.block_size is not None


def _scale_and_values(
    x: Array, lowest: Array, highest: Array, scheme: Scheme
) -> tuple[Array, Array]:
    """Scales, with gradients, and what x is rounded to."""
    exact = lax.stop_gradient(x)
    if _has_zero_point(scheme):
        scale, zero = zero_point_range(lowest, highest)
        codes = to_codes(exact, lax.stop_gradient(scale), zero)
        codes = codes.astype(jnp.float32) - zero.astype(jnp.float32)
    else:
        scale = scale_from_absmax(highest, scheme.weight.fmt)
        codes = to_format(exact, lax.stop_gradient(scale), scheme.weight.fmt)
    return scale, codes.astype(jnp.float32) * lax.stop_gradient(scale)


def round_activation(x: Array, scale: Array, fmt: Format) -> Array:
    """x rounded to a format, with the gradients of x and of the scale."""
    exact = x.astype(jnp.float32)
    q = exact / scale
    codes = to_format(lax.stop_gradient(exact), lax.stop_gradient(scale), fmt)
    values = codes.astype(jnp.float32) * lax.stop_gradient(scale)
    inside = jnp.abs(q) <= fmt.bound
    return straight_through(exact, scale, values, inside).astype(x.dtype)


def round_with_zero_point(x: Array, axes: tuple[int, ...]) -> Array:
    """x rounded to int4 with a zero point for what shares these axes, with gradients.

    Nothing is beyond the range, whose ends are two numbers of x (or 0); so the scale's gradient
    reaches these two.
    """
    exact = x.astype(jnp.float32)
    lowest = jnp.min(exact, axes, keepdims=True)
    highest = jnp.max(exact, axes, keepdims=True)
    scale, zero = zero_point_range(lowest, highest)
    fixed = lax.stop_gradient(scale)
    codes = to_differences(lax.stop_gradient(exact), fixed, zero)
    values = codes.astype(jnp.float32) * fixed
    return straight_through(exact, scale, values, None).astype(x.dtype)


@jax.custom_vjp
def straight_through(
    x: Array, scale: Array, values: Array, inside: Array | None
) -> Array:
    """`values`, with the gradient of x where it is inside the range, and that of its scale.

    Args:
        x: what was rounded.
        scale: of the rank of x, of size 1 along the axes that share one.
        values: scale times the codes of x.
        inside: where x is inside the range; None: everywhere.
    """
    return values


def _forward(
    x: Array, scale: Array, values: Array, inside: Array | None
) -> tuple[Array, Any]:
    """The values, and what the way back needs."""
    return values, (x, scale, values, inside)


def _back(kept: Any, g: Array) -> tuple[Array, Array, Array, None]:
    """The gradients of x and of its scale; `values` and `inside` have none."""
    x, scale, values, inside = kept
    # d (scale q) / d scale = q - x / scale where x is inside, because q moves with x there (LSQ,
    # Esser et al. 2020, arXiv 1902.08153); and q alone where x is clipped.
    of_x, of_values = g, values - x
    if inside is not None:
        of_x = jnp.where(inside, g, 0.0)
        of_values = jnp.where(inside, of_values, values)
    # A scale that many elements share gets the sum of their gradients.
    shared = [
        axis
        for axis, size in enumerate(scale.shape)
        if size == 1 and x.shape[axis] != 1
    ]
    of_scale = jnp.sum(g * of_values, tuple(shared), keepdims=True) / scale
    return of_x, of_scale, jnp.zeros_like(values), None


straight_through.defvjp(_forward, _back)


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
        # The weight is rounded already, because the float leaves hold the quantized values.
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
    # A token's scale is that of the axes that the product sums over.
    of_token = tuple(contracted[place])
    if weight.activations == "per_token_zero_point":
        return round_with_zero_point(x, of_token)
    per_token = weight.activations == "per_token"
    axes = of_token if per_token else tuple(range(x.ndim))
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axes, keepdims=True)
    return round_activation(x, scale_from_absmax(largest, fmt), fmt)
