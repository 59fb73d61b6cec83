"""A Dense layer on narrow numbers, on plain arrays: what `sqjax.linen` and `sqjax.nnx` share."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sqjax.numerics.smoothing import smoothing_scales
from sqjax.weights.dot_general import quantized_dot_general
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.quantize import named, outlier_channels, quantize_weight
from sqjax.weights.schemes import Scheme


def dense(
    x: Float[Array, "..."],
    kernel: QuantWeight,
    bias: Float[Array, "..."] | None,
    dtype: Any,
    where: str,
    axes: Sequence[int] = (-1,),
    batch: int = 0,
) -> Float[Array, "..."]:
    """x W + b, on the operands that the kernel asks for. `dtype` None: that of x, kernel and bias, promoted.

    Args:
        x: (*batch, ...).
        kernel: (*batch, *contracted, *features).
        bias: (*batch, *features), or None.
        dtype: of the product and the sum.
        where: the kernel's name in errors.
        axes: the axes of x that are contracted, ascending.
        batch: how many leading axes of x and of the kernel run in step: one matrix for each of their indices.

    Returns:
        (*batch, the other axes of x, *features).
    """
    if dtype is None:
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        dtype = dtype if bias is None else jnp.promote_types(dtype, bias.dtype)
    lead, contracted = tuple(range(batch)), tuple(range(batch, batch + len(axes)))
    dimensions = (tuple(a % x.ndim for a in axes), contracted), (lead, lead)
    y = quantized_dot_general(x.astype(dtype), kernel, dimensions, where).astype(dtype)
    if bias is None:
        return y
    free = (1,) * (x.ndim - batch - len(axes))
    return y + bias.astype(dtype).reshape(*bias.shape[:batch], *free, *bias.shape[batch:])


def check_kernel(kernel: Any, shape: tuple[int, ...], where: str, remedy: str) -> QuantWeight:
    """The kernel, if it is a `QuantWeight` of this logical shape.

    Raises:
        ValueError: it is not; names `where`, what came and the remedy.
    """
    if not isinstance(kernel, QuantWeight):
        raise ValueError(
            f"{where}: expected a QuantWeight, got {type(kernel).__name__} of shape {jnp.shape(kernel)}; {remedy}"
        )
    if kernel.shape != shape:
        raise ValueError(f"{where}: expected shape {shape}, got {kernel.shape}; {remedy}")
    return kernel


def quantize_kernel(
    kernel: Float[Array, "..."],
    scheme: Scheme,
    absmax: Float[Array, "..."] | None,
    smoothing: Float[Array, "..."] | None,
    where: str,
    contracted: int = 1,
    batch: int = 0,
) -> QuantWeight:
    """A kernel (*batch, *contracted, *features), quantized for `dense`; see `quantize_weight`.

    `absmax` and `smoothing` are of shape (*batch, *contracted). Where the scheme has a `smoothing`, s comes from absmax
    and the kernel; outlier channels are those whose absmax, divided by s, exceeds the scheme's threshold.

    Raises:
        ValueError: the kernel has no features, a vector is misshapen, the scheme is one for embeddings, or needs an
            absmax that is missing; names `where`.
    """
    inputs = kernel.shape[: batch + contracted]
    if kernel.ndim <= len(inputs):
        expected = [
            *(f"batch{i}" for i in range(batch)),
            *(f"inputs{i}" for i in range(contracted)),
            "features",
        ]
        raise ValueError(
            f"{where}: expected a kernel of shape ({', '.join(expected)}), got {kernel.shape}"
        )
    for name, vector in (("absmax", absmax), ("smoothing", smoothing)):
        if vector is not None and vector.shape != inputs:
            raise ValueError(f"{where}: expected {name} of shape {inputs}, got {vector.shape}")
    scheme.check(where)
    if problem := _problem(scheme, absmax, smoothing):
        raise ValueError(f"{where}: {problem}")
    absmax = None if absmax is None else absmax.astype(jnp.float32)
    if scheme.smoothing is not None and absmax is not None:
        largest = jnp.max(
            jnp.abs(kernel.astype(jnp.float32)), axis=tuple(range(len(inputs), kernel.ndim))
        )
        smoothing = smoothing_scales(absmax, largest, scheme.smoothing)
    channels = None
    if scheme.outliers is not None and absmax is not None:
        seen = absmax if smoothing is None else absmax / smoothing
        channels = outlier_channels(where, seen, scheme.outliers, batch)
    lead, sums = tuple(range(batch)), tuple(range(batch, len(inputs)))
    with named(where):
        return quantize_weight(kernel, sums, scheme, absmax, smoothing, lead, channels)


def _problem(scheme: Scheme, absmax: Array | None, smoothing: Array | None) -> str | None:
    if scheme.activations == "indices":
        return (
            "a scheme for embeddings, which meet indices; choose one for matmuls, such as sqjax.W8A8 or sqjax.W8A16 "
            "(embeddings are quantized by sqjax.quantize)"
        )
    if scheme.range != "absmax":
        return (
            f"a range of {scheme.range!r} comes from histograms, which only sqjax.quantize has; pass the range that x "
            "is clipped to as absmax, with range='absmax'"
        )
    if scheme.smoothing is not None and smoothing is not None:
        return "two smoothings, the scheme's alpha and the given s; leave one out"
    if scheme.measured and absmax is None:
        kind = (
            "a static scheme"
            if scheme.activations == "static"
            else "a scheme with outliers or smoothing"
        )
        return (
            f"{kind} needs the activation's absmax from calibration; pass absmax=max |X_j| over data, or choose a "
            "scheme that measures at run time, such as sqjax.W8A8"
        )
    return None
