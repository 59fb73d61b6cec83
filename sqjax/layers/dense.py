"""A Dense layer on narrow numbers, on plain arrays: what `sqjax.linen` and `sqjax.nnx` share."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sqjax._shapes import from_front
from sqjax.weights.dot_general import quantized_dot_general
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.quantize import measured, named, quantize_weight
from sqjax.weights.schemes import Indices, Scheme, Static, scheme_of


def dense(
    x: Float[Array, "..."],
    kernel: QuantWeight,
    bias: Float[Array, "..."] | None,
    dtype: Any,
    where: str,
    axes: Sequence[int] = (-1,),
    batch: int = 0,
) -> Float[Array, "..."]:
    """x W + b, on the operands that the kernel asks for.

    For x (2, 5, 4, 64), axes (2, 3) and a kernel (4, 64, 8) the result is (2, 5, 8). With batch=1
    and a kernel (2, 4, 64, 8), x[0] meets kernel[0] and x[1] meets kernel[1].

    Args:
        x: (*batch, ...).
        kernel: (*batch, *contracted, *features).
        bias: (*batch, *features), or None.
        dtype: of the product and the sum; None: that of x, kernel and bias, promoted.
        where: the kernel's name in errors.
        axes: the axes of x that are contracted, ascending.
        batch: how many leading axes of x and of the kernel run in step: one matrix for each of
            their indices.

    Returns:
        (*batch, the other axes of x, *features).
    """
    # As Flax does: with no dtype of its own a layer promotes its operands.
    if dtype is None:
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        if bias is not None:
            dtype = jnp.promote_types(dtype, bias.dtype)
    # A kernel is (*batch, *contracted, *features), and x has its batch axes first too.
    lead = tuple(range(batch))
    of_x = from_front(axes, x.ndim)
    of_kernel = tuple(range(batch, batch + len(axes)))
    dimensions = (of_x, of_kernel), (lead, lead)
    # Float8 codes and scales are floats to jax, but nothing can train them.
    frozen = lax.stop_gradient(kernel)
    y = quantized_dot_general(
        x.astype(dtype), frozen, dimensions, where
    ).astype(dtype)
    if bias is None:
        return y
    # The bias has no axes for the axes of x that are kept: it broadcasts over them.
    kept = (1,) * (x.ndim - batch - len(axes))
    wide = bias.astype(dtype)
    return y + wide.reshape(*bias.shape[:batch], *kept, *bias.shape[batch:])


def check_kernel(
    kernel: Any, shape: tuple[int, ...], where: str, remedy: str
) -> QuantWeight:
    """The kernel, if it is a `QuantWeight` of this logical shape.

    Raises:
        ValueError: it is not; names `where`, what came and the remedy.
    """
    if not isinstance(kernel, QuantWeight):
        raise ValueError(
            f"{where}: expected a QuantWeight, got {type(kernel).__name__} of shape "
            f"{jnp.shape(kernel)}; {remedy}"
        )
    if kernel.shape != shape:
        raise ValueError(
            f"{where}: expected shape {shape}, got {kernel.shape}; {remedy}"
        )
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

    `absmax` and `smoothing` are of shape (*batch, *contracted). Where the scheme has a
    `smoothing`, s comes from absmax and the kernel; outlier channels are those whose absmax,
    divided by s, exceeds the scheme's threshold.

    Raises:
        ValueError: the kernel has no features, a vector is misshapen, the scheme is one for
            embeddings, or needs an absmax that is missing; names `where`.
    """
    scheme = scheme_of(scheme, where)
    _check_shapes(kernel, absmax, smoothing, where, contracted, batch)
    problem = problem_of_scheme(scheme, absmax, smoothing)
    if problem:
        raise ValueError(f"{where}: {problem}")
    if absmax is not None:
        absmax = absmax.astype(jnp.float32)
    axes = tuple(range(batch + contracted))
    lead, sums = axes[:batch], axes[batch:]
    # The layer is alone: no norm before it can take the division by s, so the quantizer does.
    beside = measured(where, kernel, axes, scheme, absmax, batch, smoothing)
    with named(where):
        return quantize_weight(
            kernel,
            sums,
            scheme,
            absmax,
            beside.smoothing,
            lead,
            beside.outliers,
        )


def _check_shapes(
    kernel: Array,
    absmax: Array | None,
    smoothing: Array | None,
    where: str,
    contracted: int,
    batch: int,
) -> None:
    """Raises ValueError if the kernel has no features, or a vector has not one entry a channel."""
    inputs = kernel.shape[: batch + contracted]
    if kernel.ndim <= len(inputs):
        batch_names = [f"batch{i}" for i in range(batch)]
        input_names = [f"inputs{i}" for i in range(contracted)]
        expected = ", ".join([*batch_names, *input_names, "features"])
        raise ValueError(
            f"{where}: expected a kernel of shape ({expected}), got {kernel.shape}"
        )
    for name, vector in (("absmax", absmax), ("smoothing", smoothing)):
        if vector is not None and vector.shape != inputs:
            raise ValueError(
                f"{where}: expected {name} of shape {inputs}, got {vector.shape}"
            )


def problem_of_scheme(
    scheme: Scheme, absmax: Array | None, smoothing: Array | None
) -> str | None:
    """Why a single layer can not be quantized so, and what to do instead; None if it can."""
    if isinstance(scheme.activation, Indices):
        return (
            "a scheme for embeddings, which meet indices; choose one for matmuls, such as "
            "sqjax.W8A8 or sqjax.W8A16 (embeddings are quantized by sqjax.quantize)"
        )
    if scheme.needs_histogram:
        return (
            f"the range of {scheme.activation!r} comes from histograms, which only sqjax.quantize "
            "has; pass the range that x is clipped to as absmax, with range='absmax'"
        )
    if scheme.rotation is not None and isinstance(scheme.activation, Static):
        return (
            "a static range of rotated activations is not to be told from absmax; choose a scale "
            "that is computed at run time, activation=sqjax.PerToken(), or call sqjax.quantize"
        )
    if scheme.smoothing is not None and smoothing is not None:
        return (
            "two smoothings, the scheme's alpha and the given s; leave one out"
        )
    if scheme.measured and absmax is None:
        kind = "a scheme with outliers or smoothing"
        if isinstance(scheme.activation, Static):
            kind = "a static scheme"
        return (
            f"{kind} needs the activation's absmax from calibration; pass absmax=max |X_j| over "
            "data, or choose a scheme that measures at run time, such as sqjax.W8A8"
        )
    return None
