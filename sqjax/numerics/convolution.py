"""Convolutions of narrow numbers, on plain arrays: images (batch, *positions, channels) and kernels
(outputs, *window, inputs).

XLA has an int8 convolution, but on CPUs a fast one in rare cases only (see
`docs/pages/convolutions.md`). So a convolution of int8 numbers runs in one of these forms, all of
which give the same int32 sums, bit for bit:

- as one int8 matmul, where every pixel is read once: 1x1 convolutions, patch embeddings;
- as a sum of products, tap by tap, where every output reads one channel: depthwise convolutions;
- on CPUs in float32, while no sum of its products can reach 2^24: up to there float32 is exact;
- otherwise as int8 matmuls of rows of pixels, one for each row of the window.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from sqjax.numerics.dots import narrow_dot
from sqjax.numerics.formats import FORMATS
from sqjax.numerics.straight_through import tangent_of
from sqjax.numerics.weight_products import Recipe, quantized_rows

#: The most products of two int8 in [-127, 127] whose every sum float32 holds exactly.
EXACT_IN_FLOAT32 = 2**24 // 127**2
#: Up to so many taps a depthwise convolution is written out tap by tap.
MOST_TAPS = 128


class Window(NamedTuple):
    """How a window moves over an image: what `lax.conv_general_dilated` calls by these names.

    Attributes:
        strides, padding, lhs_dilation, rhs_dilation: one entry for each axis of positions.
        groups: the channels and outputs are in so many groups, which do not mix.

    Example: 4 channels and 6 outputs in 2 groups: outputs 0, 1, 2 read the channels 0 and 1, and
    outputs 3, 4, 5 the channels 2 and 3. The kernel is (6, *window, 2).
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int = 1


class Kernel(NamedTuple):
    """A quantized kernel: the float one is codes * scale.

    Attributes:
        codes: (outputs, *window, inputs), int8 or float8.
        scale: float32, of that rank: (outputs, 1, ..., 1), or of size 1, or (where groups of
            channels have scales of their own) of the codes' shape.
        input_scale: () float32 of static activations, or None.
    """

    codes: Shaped[Array, "outputs *window inputs"]
    scale: Float[Array, "..."]
    input_scale: Float[Array, ""] | None

    @property
    def has_one_scale_an_output(self) -> bool:
        """Whether the scale can be multiplied after the sum."""
        return math.prod(self.scale.shape[1:]) == 1

    def dequantized(self) -> Float[Array, "outputs *window inputs"]:
        """The float32 kernel."""
        return self.codes.astype(jnp.float32) * self.scale


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def convolution(
    recipe: Recipe,
    window: Window,
    x: Float[Array, "batch *positions channels"],
    kernel: Kernel,
) -> Float[Array, "batch *places outputs"]:
    """The convolution of x with a quantized kernel, in float32.

    Quantized activations: (q_x * q_w) * scale_x * scale_w, the sum in int32. "per_token" means a
    scale (and zero point) for every image, because one sum mixes the positions of an image.
    Weight-only: (x * q_w) * scale_w in float. The derivative with respect to x is that of the float
    convolution with the dequantized kernel (straight-through).
    """
    if recipe.activations is None:
        if not kernel.has_one_scale_an_output:
            return convolve(x, kernel.dequantized().astype(x.dtype), window)
        sums = convolve(x, kernel.codes.astype(x.dtype), window)
        return sums * _of_outputs(kernel.scale, x.ndim)

    fmt = FORMATS[recipe.fmt]
    images = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    of_images, scale = quantized_rows(
        images, recipe.activations, kernel.input_scale, fmt
    )
    # Pixels beyond an image's edge are 0, which is 0 here too, with or without a zero point.
    q = of_images.reshape(x.shape)
    x_scale = scale.reshape(-1, *[1] * (x.ndim - 1))
    if not kernel.has_one_scale_an_output:
        in_float = convolve(q.astype(jnp.float32), kernel.dequantized(), window)
        return in_float * x_scale
    sums = convolve(q, kernel.codes, window).astype(jnp.float32)
    return sums * x_scale * _of_outputs(kernel.scale, x.ndim)


@partial(convolution.defjvp, symbolic_zeros=True)
def _straight_through(recipe, window, primals, tangents):
    """The derivative of the float convolution, also where the kernel's scale varies."""

    def in_float(x, scale):
        weight = kernel._replace(scale=scale).dequantized()
        return _by_xla(x.astype(jnp.float32), weight, window)

    (x, kernel), (dx, change) = primals, tangents
    tangent = tangent_of(in_float, (x, kernel.scale), (dx, change.scale))
    return convolution(recipe, window, x, kernel), tangent


def _of_outputs(scale: Array, ndim: int) -> Array:
    """Scales (outputs, 1, ..., 1) in a shape that broadcasts against (batch, *positions,
    outputs).
    """
    return scale.reshape(*[1] * (ndim - 1), -1)


# Sums ---------------------------------------------------------------------------------------------


def convolve(
    x: Shaped[Array, "batch *positions channels"],
    kernel: Shaped[Array, "outputs *window inputs"],
    window: Window,
) -> Shaped[Array, "batch *places outputs"]:
    """The sums of a convolution: int32 of int8, float32 of floats.

    Example: an image of 5 pixels, 2 channels, and a kernel (3, 2, 2) with a window of 2 pixels give
    (1, 4, 3) without padding: y[0, p, o] is the sum of x[0, p + k, c] * kernel[o, k, c] over the
    taps k and the channels c.
    """
    shape = _result_shape(x.shape, kernel.shape, window)
    if 0 in (*shape, kernel.size):
        return jnp.zeros(shape, _kind(x))
    if _is_depthwise(kernel.shape, window):
        return _by_taps(x, kernel, window)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return _by_xla(x, kernel, window)
    if window.groups > 1:
        return _in_groups(x, kernel, window)
    if _reads_pixels_once(kernel.shape[1:-1], window):
        return _as_matmul(x, kernel, window)
    return _in_float32_or_by_rows(x, kernel, window)


def _is_depthwise(kernel: Sequence[int], window: Window) -> bool:
    """Whether every output reads one channel, by so few taps that they can be written out."""
    taps = math.prod(kernel[1:-1])
    return window.groups > 1 and kernel[-1] == 1 and taps <= MOST_TAPS


def _in_float32_or_by_rows(x: Array, kernel: Array, window: Window) -> Array:
    """On CPUs in float32 where that is exact and fast; else as matmuls of rows."""
    by_rows = partial(_by_rows, window=window)
    # XLA:CPU has a fast float convolution for images, but not for 1 or 3 axes of positions, nor
    # for dilated images.
    is_fast = len(window.strides) == 2 and set(window.lhs_dilation) == {1}
    if not is_fast or math.prod(kernel.shape[1:]) > EXACT_IN_FLOAT32:
        return by_rows(x, kernel)
    on_cpu = partial(_in_float32, window=window)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=by_rows)


def _kind(x: Array) -> jnp.dtype:
    """The dtype of sums."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.dtype(jnp.float32 if floating else jnp.int32)


def _result_shape(
    x: Sequence[int], kernel: Sequence[int], window: Window
) -> tuple[int, ...]:
    """(batch, *positions, outputs) of the result.

    Example: 7 pixels, padded by 1 on either side, under a window of 3 with stride 2, have
    (9 - 3) // 2 + 1 = 4 positions.
    """
    positions = []
    for i, size in enumerate(x[1:-1]):
        dilated = max(size - 1, 0) * window.lhs_dilation[i] + min(size, 1)
        padded = dilated + sum(window.padding[i])
        reach = (kernel[1 + i] - 1) * window.rhs_dilation[i] + 1
        places = (padded - reach) // window.strides[i] + 1
        positions.append(max(places, 0))
    return (x[0], *positions, kernel[0])


def _by_xla(x: Array, kernel: Array, window: Window) -> Array:
    """XLA's own convolution, summed in the kind of the operands.

    float32 is multiplied as such: some accelerators would round its digits away first.
    """
    ndim = len(window.strides)
    last = 1 + ndim
    # (batch, channels, *positions) and (outputs, inputs, *window), by the axes that hold them.
    layout = (0, last, *range(1, last))
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window.strides,
        window.padding,
        window.lhs_dilation,
        window.rhs_dilation,
        lax.ConvDimensionNumbers(layout, layout, layout),
        window.groups,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=_kind(x),
    )


def _in_float32(x: Array, kernel: Array, window: Window) -> Array:
    """The sums of int8 products in float32, which is exact while they stay below 2^24."""
    floats = x.astype(jnp.float32), kernel.astype(jnp.float32)
    return _by_xla(*floats, window).astype(jnp.int32)


def _in_groups(x: Array, kernel: Array, window: Window) -> Array:
    """Groups of int8: in float32 where that is exact, else one after the other."""
    if math.prod(kernel.shape[1:]) <= EXACT_IN_FLOAT32:
        return _in_float32(x, kernel, window)
    alone = window._replace(groups=1)
    images = jnp.split(x, window.groups, axis=-1)
    kernels = jnp.split(kernel, window.groups)
    sums = [
        convolve(own, mine, alone)
        for own, mine in zip(images, kernels, strict=True)
    ]
    return jnp.concatenate(sums, axis=-1)


# Windows, tap by tap ------------------------------------------------------------------------------


def _padded(x: Array, window: Window) -> Array:
    """The image with zeros around it and between its pixels; a negative padding cuts pixels off."""
    widths = [
        (before, after, dilation - 1)
        for (before, after), dilation in zip(
            window.padding, window.lhs_dilation, strict=True
        )
    ]
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, [(0, 0, 0), *widths, (0, 0, 0)])


def _under_tap(
    x: Array, axis: int, tap: int, places: int, window: Window
) -> Array:
    """The pixels of a padded image that one tap of the window meets, along one axis.

    Example: of 9 pixels, tap 1 of a window with stride 2 that has 4 places meets 1, 3, 5, 7.
    """
    stride = window.strides[axis - 1]
    first = tap * window.rhs_dilation[axis - 1]
    last = first + (places - 1) * stride
    return lax.slice_in_dim(x, first, last + 1, stride, axis)


def _taps(
    x: Array, sizes: Sequence[int], places: Sequence[int], window: Window
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """(offset, the pixels of a padded image that it meets) for every tap of the first axes."""
    for offset in itertools.product(*map(range, sizes)):
        met = x
        for i, tap in enumerate(offset):
            met = _under_tap(met, 1 + i, tap, places[i], window)
        yield offset, met


def _by_taps(x: Array, kernel: Array, window: Window) -> Array:
    """A depthwise convolution as a sum of products, because XLA's own are slow on CPUs.

    Example: 2 channels with 3 outputs each have a kernel (6, *window, 1). Outputs 0, 1, 2 read the
    channel 0: each tap is (2, 3), times a pixel (2, 1).
    """
    kind = _kind(x)
    shape = _result_shape(x.shape, kernel.shape, window)
    sizes = kernel.shape[1:-1]
    each = kernel.shape[0] // window.groups
    factors = kernel.astype(kind).reshape(window.groups, each, *sizes)
    total = jnp.zeros((*shape[:-1], window.groups, each), kind)
    for offset, met in _taps(_padded(x, window), sizes, shape[1:-1], window):
        factor = factors[(slice(None), slice(None), *offset)]
        factor = factor.reshape(*[1] * (met.ndim - 1), *factor.shape)
        total = total + jnp.expand_dims(met.astype(kind), -1) * factor
    return total.reshape(shape)


def _by_rows(x: Array, kernel: Array, window: Window) -> Array:
    """int8 matmuls of the pixels under a row of the window, one for each row; their sum.

    Less is copied than if all of the window were laid out, and it is as fast.

    Example: a window of (3, 5) over 64 channels, 128 outputs: 3 matmuls with (128, 5 * 64).
    """
    shape = _result_shape(x.shape, kernel.shape, window)
    *rows, columns = kernel.shape[1:-1]
    last = len(rows) + 1
    # What reads the image many times should read int8, not compute it each time from floats.
    padded = lax.optimization_barrier(_padded(x, window))
    along_row = [
        _under_tap(padded, last, tap, shape[last], window)
        for tap in range(columns)
    ]
    laid_out = jnp.concatenate(along_row, axis=-1)
    matrices = kernel.reshape(kernel.shape[0], *rows, -1)
    total = jnp.zeros((math.prod(shape[:-1]), shape[-1]), jnp.int32)
    for offset, met in _taps(laid_out, rows, shape[1:last], window):
        matrix = matrices[(slice(None), *offset)]
        total = total + narrow_dot(met.reshape(-1, met.shape[-1]), matrix)
    return total.reshape(shape)


def _reads_pixels_once(sizes: Sequence[int], window: Window) -> bool:
    """Whether windows do not overlap: one pixel each, or side by side (patches)."""
    for i, size in enumerate(sizes):
        side_by_side = window.strides[i] == size and window.rhs_dilation[i] == 1
        if size > 1 and not side_by_side:
            return False
    return True


def _as_matmul(x: Array, kernel: Array, window: Window) -> Array:
    """Windows that do not overlap, as the rows of one int8 matmul.

    Example: 224 x 224 pixels of 3 channels in patches of 16 x 16 are 14 * 14 rows of 16 * 16 * 3.
    """
    shape = _result_shape(x.shape, kernel.shape, window)
    sizes = kernel.shape[1:-1]
    x = _padded(x, window)
    # From the last axis to the first, so that those before stay where they are.
    for axis in reversed(range(1, len(shape) - 1)):
        places, size = shape[axis], sizes[axis - 1]
        if size == 1:
            x = _under_tap(x, axis, 0, places, window)
        else:
            x = lax.slice_in_dim(x, 0, places * size, axis=axis)
        lengths = (*x.shape[:axis], places, size, *x.shape[axis + 1 :])
        x = x.reshape(lengths)
    # Now (batch, places, size, places, size, ..., channels).
    ndim = len(sizes)
    of_places = range(1, 2 * ndim, 2)
    of_sizes = range(2, 2 * ndim + 1, 2)
    x = x.transpose(0, *of_places, *of_sizes, 2 * ndim + 1)
    rows = x.reshape(math.prod(shape[:-1]), -1)
    matrix = kernel.reshape(kernel.shape[0], -1)
    return narrow_dot(rows, matrix).reshape(shape)
