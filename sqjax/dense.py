"""A Dense layer on int8, on plain arrays: what `sqjax.linen.QuantDense` and `sqjax.nnx.QuantLinear` share."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sqjax.matmul import QuantWeight, quantized_dot_general
from sqjax.quantization import quantize_weight
from sqjax.schemes import Scheme


def dense(
    x: Float[Array, "*batch inputs"],
    kernel: QuantWeight,
    bias: Float[Array, " features"] | None,
    dtype: Any,
    where: str,
) -> Float[Array, "*batch features"]:
    """x W + b with int8 x int8 -> int32 inside. `dtype` None: that of x, kernel and bias, promoted."""
    if dtype is None:
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        dtype = dtype if bias is None else jnp.promote_types(dtype, bias.dtype)
    y = quantized_dot_general(x.astype(dtype), kernel, (((x.ndim - 1,), (0,)), ((), ())), where).astype(dtype)
    return y if bias is None else y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def check_kernel(kernel: Any, shape: tuple[int, int], where: str, remedy: str) -> QuantWeight:
    """The kernel, if it is a `QuantWeight` of this logical shape.

    Raises:
        ValueError: it is not; names `where`, what came and the remedy.
    """
    if not isinstance(kernel, QuantWeight):
        raise ValueError(
            f"{where}: expected a QuantWeight, got {type(kernel).__name__} of shape {jnp.shape(kernel)}; {remedy}"
        )
    if kernel.shape != shape:
        raise ValueError(f"{where}: expected shape {shape}, got {kernel.shape}")
    return kernel


def quantize_kernel(
    kernel: Float[Array, "..."],
    scheme: Scheme,
    absmax: Float[Array, "..."] | None,
    smoothing: Float[Array, "..."] | None,
    where: str,
) -> QuantWeight:
    """A Dense kernel (inputs, features), quantized along its inputs; see `quantize_weight`.

    Raises:
        ValueError: the kernel is not of rank 2, a vector is not of shape (inputs,), or a static scheme has no absmax.
    """
    if kernel.ndim != 2:
        raise ValueError(f"{where}: expected a kernel of shape (inputs, features), got {kernel.shape}")
    for name, vector in (("absmax", absmax), ("smoothing", smoothing)):
        if vector is not None and vector.shape != kernel.shape[:1]:
            raise ValueError(f"{where}: expected {name} of shape {kernel.shape[:1]}, got {vector.shape}")
    return quantize_weight(kernel, (0,), scheme, absmax, smoothing)
