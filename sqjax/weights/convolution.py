"""Quantized convolutions with a stored kernel: any layout of images and kernels.

The functions bring the operands into the one form that `sqjax.numerics.convolution` takes, and the
result back into the caller's layout.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sqjax._shapes import entries_at
from sqjax.numerics.channels import Channels, spread_channels
from sqjax.numerics.convolution import Kernel, Window, convolution
from sqjax.numerics.dots import LONGEST_CONTRACTION
from sqjax.numerics.weight_products import count_beyond
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.quantize import quantize_weight
from sqjax.weights.schemes import Scheme

# Quantizing ---------------------------------------------------------------------------------------


def quantize_kernel(
    kernel: Float[Array, "..."],
    summed: tuple[int, ...],
    channels: Channels,
    scheme: Scheme,
    absmax: Float[Array, "..."] | None = None,
    smoothing: Float[Array, "..."] | None = None,
) -> QuantWeight:
    """A convolution's kernel, quantized: a scale for every output channel.

    Args:
        kernel: float, for example Flax's (*window, inputs, outputs).
        summed: the axes that the convolution sums over, all but that of the outputs: they share a
            scale.
        channels: where the image's channels are in it; the axes before those of the channels hold
            one kernel each (layers that a scan runs over).
        scheme: how.
        absmax: max |X_j| of every channel of the image, (*batch, channels), for static schemes.
        smoothing: s of every channel, (*batch, channels), for smoothing at run time: the kernel is
            multiplied by s here, and the image divided by it.

    Raises:
        ValueError: a scheme with outliers or a rotation: a convolution has none.
    """
    if scheme.rotation is not None:
        raise ValueError(
            "rotations are for matmuls, and this is a convolution's kernel; give it a scheme "
            f"without one: {scheme.replace(rotation=None)!r}"
        )
    if scheme.outliers is not None:
        raise ValueError(
            "outlier channels are for matmuls, and this is a convolution's kernel; give it a "
            f"scheme without outliers: {scheme.replace(outliers=None)!r}"
        )
    batch = channels.axes[:-1]
    if smoothing is None:
        return quantize_weight(kernel, summed, scheme, absmax, batch=batch)
    s = smoothing.astype(jnp.float32)
    smoothed = kernel.astype(jnp.float32) * spread_channels(s, channels, kernel)
    # What is quantized at run time is the image divided by s, so its largest values are too.
    seen = None if absmax is None else absmax / s
    weight = quantize_weight(smoothed, summed, scheme, seen, batch=batch)
    tensor = replace(weight.tensor, dtype=kernel.dtype)
    # As many axes as are stored for the sum, because what slices a stack counts them from the end.
    ones = (1,) * (len(summed) - 1)
    own = s.reshape(*s.shape[:-1], *ones, s.shape[-1])
    return replace(weight, tensor=tensor, smoothing=own)


# Running ------------------------------------------------------------------------------------------


def quantized_convolution(
    x: Float[Array, "..."],
    weight: QuantWeight,
    params: Mapping[str, Any],
    where: str,
) -> Float[Array, "..."]:
    """`lax.conv_general_dilated(x, weight, **params)` on narrow operands; the result is float32.

    out = (q_x * q_w) * scale_x * scale_w, the sum in int32.

    Args:
        x: the image.
        weight: the quantized kernel.
        params: those of the equation: strides, padding, dilations, dimension numbers, groups.
        where: names the kernel in errors.

    Raises:
        ValueError: groups of the batch axis; the kernel has scales that differ along the axes that
            are summed over, or outliers; the sum is too long for int32.
    """
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise ValueError(
            f"{where}: a convolution with batch_group_count={params['batch_group_count']} has no "
            "quantized form; give this site a rule of None to keep it in float"
        )
    # jax's spec has the axes of (batch, channels, *window). For NHWC it is (0, 3, 1, 2), which
    # gives (0, 1, 2, 3) here: nothing moves.
    of_image = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    of_result = (
        numbers.out_spec[0],
        *numbers.out_spec[2:],
        numbers.out_spec[1],
    )
    # Of a kernel in Flax's order, (height, width, inputs, outputs), the spec is (3, 2, 0, 1).
    outputs, inputs, *positions = numbers.rhs_spec
    _check(weight, outputs, where)

    image = x.transpose(of_image)
    if weight.smoothing is not None:
        s = weight.smoothing.reshape(*[1] * (x.ndim - 1), -1)
        image = image.astype(jnp.float32) / s
    window = Window(
        tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        params["feature_group_count"],
    )
    kernel = _kernel(weight, (outputs, *positions, inputs))
    out = convolution(weight.recipe, window, image, kernel)
    # Axis i of the result is axis of_result[i] of the caller's.
    return jnp.moveaxis(out, range(out.ndim), of_result)


def clipped_pixels(
    x: Float[Array, "..."], weight: QuantWeight, params: Mapping[str, Any]
) -> Float[Array, ""]:
    """How many values of an image lie beyond the kernel's static scale; 0 where it has none.

    With smoothing at run time these are values of X / s.
    """
    if weight.activations != "static":
        return jnp.zeros((), jnp.float32)
    if weight.smoothing is not None:
        sizes = [1] * x.ndim
        sizes[params["dimension_numbers"].lhs_spec[1]] = -1
        x = x.astype(jnp.float32) / weight.smoothing.reshape(sizes)
    return count_beyond(x, weight.input_scale, weight.activation_format)


def _kernel(weight: QuantWeight, logical: tuple[int, ...]) -> Kernel:
    """The kernel with its logical axes in this order: (outputs, *window, inputs)."""
    tensor = weight.tensor
    stored = entries_at(tensor.axes, logical)
    scale = tensor.spread(tensor.scale).transpose(stored)
    codes = tensor.codes()
    if not tensor.fmt.floating:
        codes = codes.astype(jnp.int8)
    return Kernel(codes.transpose(stored), scale, weight.input_scale)


def _check(weight: QuantWeight, outputs: int, where: str) -> None:
    """Raises ValueError if a weight was not quantized for a convolution with this output axis."""
    tensor = weight.tensor
    tensor.check(where)
    problem = _problem(weight, outputs)
    if problem is not None:
        raise ValueError(
            f"{where}: {problem}; give this site a rule of None to keep it in float"
        )
    # An output sums over all axes but its own: 3 * 3 * 64 = 576 for a kernel (3, 3, 64, 128).
    products = math.prod(tensor.shape) // max(tensor.shape[outputs], 1)
    one_sum = tensor.group is None or tensor.scale.shape[-1] == 1
    if products > LONGEST_CONTRACTION and one_sum and not tensor.fmt.floating:
        raise ValueError(
            f"{where}: sums {products} products; int32 sums are exact up to {LONGEST_CONTRACTION}: "
            "give this site a rule of None to keep it in float"
        )


def _problem(weight: QuantWeight, outputs: int) -> str | None:
    tensor = weight.tensor
    if weight.outliers is not None:
        return "a convolution has no outlier channels"
    if weight.rotation is not None:
        return "a convolution has no rotation"
    if _has_scales_apart(tensor, outputs):
        return (
            f"a convolution with the output axis {outputs}, but its scales (stored as "
            f"{tensor.scale.shape}) differ along other axes: it was quantized for another product"
        )
    return None


def _has_scales_apart(tensor: QTensor, outputs: int) -> bool:
    """Whether scales differ along the summed axes, though these are in no groups."""
    sizes = list(tensor.scale.shape)
    del sizes[tensor.axes[outputs]]
    return tensor.group is None and math.prod(sizes) > 1
