"""A convolution layer on narrow numbers: what `sqjax.linen` and `sqjax.nnx` share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sqjax.layers.dense import problem_of_scheme
from sqjax.numerics.channels import Channels, channel_absmax
from sqjax.numerics.smoothing import smoothing_scales
from sqjax.runtime.quantized import quantized
from sqjax.weights.convolution import quantize_kernel
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.quantize import named
from sqjax.weights.schemes import Scheme, scheme_of

#: One number for all axes of positions, or one for each; None: 1.
Numbers = int | Sequence[int] | None


class Geometry(NamedTuple):
    """How a layer's window moves: the fields of `nn.Conv` and `nnx.Conv` by these names."""

    features: int
    kernel_size: int | Sequence[int]
    strides: Numbers = 1
    padding: Any = "SAME"
    input_dilation: Numbers = 1
    kernel_dilation: Numbers = 1
    feature_group_count: int = 1

    def kernel_shape(self, channels: int) -> tuple[int, ...]:
        """(*window, channels of a group, features)."""
        size = self.kernel_size
        window = (size,) if isinstance(size, int) else tuple(size)
        return (*window, channels // self.feature_group_count, self.features)


def conv(
    x: Float[Array, "..."],
    kernel: QuantWeight,
    bias: Float[Array, " features"] | None,
    geometry: Geometry,
    dtype: Any,
) -> Float[Array, "..."]:
    """The convolution of x (*batch, *positions, channels), and the bias, as Flax computes it.

    Flax's own layer is run with the quantized kernel, so that padding, dilations and several batch
    axes mean what they mean there.
    """
    layer = nn.Conv(
        **geometry._asdict(),
        use_bias=bias is not None,
        dtype=dtype,
        parent=None,
    )
    params: dict[str, Any] = {"kernel": kernel}
    if bias is not None:
        params["bias"] = bias
    return quantized(layer.apply)({"params": params}, x)


def quantize_conv_kernel(
    kernel: Float[Array, "..."],
    groups: int,
    scheme: Scheme,
    absmax: Float[Array, " channels"] | None,
    smoothing: Float[Array, " channels"] | None,
    where: str,
) -> QuantWeight:
    """A kernel (*window, channels of a group, features), quantized for `conv`.

    `absmax` and `smoothing` have an entry for every channel of x, those of all groups.

    Raises:
        ValueError: the kernel has no window, a vector is misshapen, the scheme has outliers, is one
            for embeddings, or needs an absmax that is missing; names `where`.
    """
    scheme = scheme_of(scheme, where)
    problem = _misshapen(kernel, groups, absmax, smoothing)
    problem = problem or problem_of_scheme(scheme, absmax, smoothing)
    if problem:
        raise ValueError(f"{where}: {problem}")
    *window, inputs, features = range(kernel.ndim)
    channels = Channels((inputs,), groups, features)
    if groups == kernel.shape[features] and kernel.shape[inputs] == 1:
        channels = Channels((features,))
    if absmax is not None:
        absmax = absmax.astype(jnp.float32)
    # The layer is alone: no norm before it can take the division by s, so the quantizer does.
    if scheme.smoothing is not None and absmax is not None:
        largest = channel_absmax(kernel, channels)
        smoothing = smoothing_scales(absmax, largest, scheme.smoothing)
    summed = (*window, inputs)
    with named(where):
        return quantize_kernel(
            kernel, summed, channels, scheme, absmax, smoothing
        )


def _misshapen(
    kernel: Array, groups: int, absmax: Array | None, smoothing: Array | None
) -> str | None:
    """What is wrong with the shapes of a kernel and of what belongs to its channels."""
    if kernel.ndim < 3 or kernel.shape[-1] % groups:
        return (
            "expected a kernel of shape (*window, inputs, features), the features in "
            f"{groups} groups, got {kernel.shape}"
        )
    expected = (kernel.shape[-2] * groups,)
    for name, vector in (("absmax", absmax), ("smoothing", smoothing)):
        if vector is not None and vector.shape != expected:
            return f"expected {name} of shape {expected}, got {vector.shape}"
    return None
