"""The quantized `nn.Conv` of Flax linen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sqjax.layers.conv import Geometry, Numbers, conv, quantize_conv_kernel
from sqjax.layers.dense import check_kernel
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.schemes import W8A8, Scheme


class QuantConv(nn.Module):
    """`nn.Conv` on narrow numbers, by default with int8 x int8 -> int32 inside.

    A drop-in for `nn.Conv`: the same fields, the same parameter names and shapes. Its parameters
    come from a float layer's by `quantize_conv`; `init` makes random ones. Everything else is as in
    `QuantDense`; "per token" means a scale for every image. A mask has no field here: multiply it
    into the kernel before that is quantized.

    Attributes:
        features: the number of output channels.
        kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count: as in
            `nn.Conv`.
        use_bias: whether there is a bias; it stays float.
        scheme: how `init` quantizes, with what a static scheme needs to know taken from init's x.
        dtype: of the result; by default that of the input and the parameters, promoted.
        param_dtype: of the bias and of the float kernel that `init` draws.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> from flax import linen as nn
        >>> x = jnp.ones((1, 8, 8, 3))
        >>> params = nn.Conv(4, (3, 3)).init(jax.random.key(0), x)["params"]
        >>> qparams = sq.linen.quantize_conv(params, sq.W8A8)
        >>> sq.linen.QuantConv(4, (3, 3)).apply({"params": qparams}, x).shape
        (1, 8, 8, 4)
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: Numbers = 1
    padding: Any = "SAME"
    input_dilation: Numbers = 1
    kernel_dilation: Numbers = 1
    feature_group_count: int = 1
    use_bias: bool = True
    scheme: Scheme = W8A8
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Raises ValueError if the kernel is no `QuantWeight` of nn.Conv's shape."""
        geometry = Geometry(
            self.features,
            self.kernel_size,
            self.strides,
            self.padding,
            self.input_dilation,
            self.kernel_dilation,
            self.feature_group_count,
        )
        kernel = self._kernel(x, geometry.kernel_shape(x.shape[-1]))
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        return conv(x, kernel, bias, geometry, self.dtype)

    def _kernel(self, x: Array, shape: tuple[int, ...]) -> QuantWeight:
        """The kernel: drawn by `init`, or checked."""
        where = "/".join((*self.path, "kernel"))

        def init_kernel(key: Array) -> QuantWeight:
            kernel = self.kernel_init(key, shape, self.param_dtype)
            others = tuple(range(x.ndim - 1))
            absmax = jnp.max(jnp.abs(x), axis=others, initial=0.0)
            groups = self.feature_group_count
            return quantize_conv_kernel(
                kernel, groups, self.scheme, absmax, None, where
            )

        # `init` has no parameters yet; every other call must find a quantized kernel.
        if not self.has_variable("params", "kernel"):
            return self.param("kernel", init_kernel)
        remedy = "make the parameters with sqjax.linen.quantize_conv(params)"
        given: Any = self.get_variable("params", "kernel")
        return check_kernel(given, shape, where, remedy)


def quantize_conv(
    params: Mapping[str, Array],
    scheme: Scheme = W8A8,
    *,
    feature_group_count: int = 1,
    absmax: Float[Array, " channels"] | None = None,
    smoothing: Float[Array, " channels"] | None = None,
) -> dict[str, Any]:
    """A float `nn.Conv` layer's parameters as those of a `QuantConv`.

    Layers stacked for `nn.scan` or `nn.vmap`: jax.vmap(quantize_conv)(params).

    Args:
        params: {"kernel": (*window, channels of a group, features)} and, if there is one, {"bias":
            (features,)}.
        scheme: how to quantize.
        feature_group_count: the layer's field.
        absmax: max |X_j| of every channel of the input over calibration data: for static schemes
            and for a scheme with smoothing.
        smoothing: s_j of every channel: the layer computes (X / s) (s W), see `quantize_dense`.

    Raises:
        ValueError: no kernel with a window, a misshapen vector, an absmax that the scheme needs
            and does not get, a scheme with outliers or one for embeddings.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> params = {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.zeros(16)}
        >>> sq.linen.quantize_conv(params)["kernel"].tensor.values.shape
        (16, 3, 3, 8)
    """
    if "kernel" not in params:
        shapes = {name: jnp.shape(x) for name, x in params.items()}
        raise ValueError(f"quantize_conv: expected a 'kernel', got {shapes}")
    kernel = quantize_conv_kernel(
        params["kernel"],
        feature_group_count,
        scheme,
        absmax,
        smoothing,
        "quantize_conv: kernel",
    )
    return {**params, "kernel": kernel}
