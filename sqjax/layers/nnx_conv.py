"""The quantized `nnx.Conv` of Flax NNX."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sqjax.layers.conv import Geometry, Numbers, conv, quantize_conv_kernel
from sqjax.layers.dense import check_kernel
from sqjax.layers.nnx_functional import QuantParam, check_plain
from sqjax.weights.schemes import W8A8, Scheme

# Those of nnx.Conv, so that the same key draws the same layer.
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class QuantConv(nnx.Module):
    """`nnx.Conv` on narrow numbers, by default with int8 x int8 -> int32 inside.

    A drop-in for `nnx.Conv`. `from_conv` quantizes a float layer; the constructor draws one, for
    which it has no data: a static scheme then clips at 1. Everything else is as in `QuantLinear`;
    "per token" means a scale for every image. `rebuild` needs no such layer.

    Attributes:
        in_features: the number of channels of the input.
        geometry: the fields of `nnx.Conv` that say how the window moves.
        use_bias: whether there is a bias; it stays float.
        scheme: how the kernel was quantized.
        dtype: of the result; by default that of the input and the parameters, promoted.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> from flax import nnx
        >>> layer = sq.nnx.QuantConv.from_conv(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), sq.W8A8)
        >>> layer(jnp.ones((1, 8, 8, 3))).shape
        (1, 8, 8, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: Numbers = 1,
        *,
        padding: Any = "SAME",
        input_dilation: Numbers = 1,
        kernel_dilation: Numbers = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        scheme: Scheme = W8A8,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        bias_init: nnx.Initializer = _BIAS_INIT,
        rngs: nnx.Rngs,
    ):
        geometry = Geometry(
            out_features,
            kernel_size,
            strides,
            padding,
            input_dilation,
            kernel_dilation,
            feature_group_count,
        )
        shape = geometry.kernel_shape(in_features)
        kernel = kernel_init(rngs.params(), shape, param_dtype)
        # There are no data: a static scale covers [-1, 1].
        known = jnp.ones(in_features), None
        self.kernel = QuantParam(
            quantize_conv_kernel(
                kernel, feature_group_count, scheme, *known, "QuantConv: kernel"
            )
        )
        bias = None
        if use_bias:
            bias = nnx.Param(
                bias_init(rngs.params(), (out_features,), param_dtype)
            )
        self.bias: nnx.Variable | None = nnx.data(bias)
        self.in_features = in_features
        self.geometry = nnx.static(geometry)
        self.use_bias = use_bias
        self.scheme = scheme
        self.dtype = dtype

    @classmethod
    def from_conv(
        cls,
        layer: nnx.Conv,
        scheme: Scheme = W8A8,
        absmax: Float[Array, " channels"] | None = None,
        smoothing: Float[Array, " channels"] | None = None,
    ) -> "QuantConv":
        """A float layer, quantized; a mask is multiplied into its kernel.

        Args:
            layer: the float layer; it is not touched.
            scheme: how to quantize.
            absmax: max |X_j| of every channel of the input over calibration data: for static
                schemes and for a scheme with smoothing.
            smoothing: s_j of every channel: the layer computes (X / s) (s W), see
                `QuantLinear.from_linear`.

        Raises:
            ValueError: a misshapen vector, an absmax that the scheme needs and does not get, a
                scheme with outliers or one for embeddings, or a layer with a
                `conv_general_dilated`, a `promote_dtype` or a `preferred_element_type` of its own.
        """
        convolution = {"conv_general_dilated": jax.lax.conv_general_dilated}
        check_plain(layer, convolution, "from_conv")
        given = layer.kernel.get_value()
        if layer.mask is not None:
            given = given * jnp.asarray(layer.mask, given.dtype)
        groups = layer.feature_group_count
        kernel = quantize_conv_kernel(
            given, groups, scheme, absmax, smoothing, "from_conv: kernel"
        )

        def random_layer() -> QuantConv:
            # Outliers are refused above; a static scale is drawn for no data.
            return cls(
                layer.in_features,
                layer.out_features,
                layer.kernel_size,
                layer.strides,
                padding=layer.padding,
                input_dilation=layer.input_dilation,
                kernel_dilation=layer.kernel_dilation,
                feature_group_count=groups,
                use_bias=layer.use_bias,
                scheme=scheme,
                dtype=layer.dtype,
                rngs=nnx.Rngs(0),
            )

        # eval_shape draws nothing: the random values would be thrown away.
        made = nnx.eval_shape(random_layer)
        made.kernel = QuantParam(kernel)
        made.bias = nnx.data(None if layer.bias is None else layer.bias.copy())
        return made

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Raises ValueError if the kernel is no `QuantWeight` of nnx.Conv's shape."""
        remedy = "make the layer with sqjax.nnx.QuantConv.from_conv(layer)"
        shape = self.geometry.kernel_shape(x.shape[-1])
        kernel = check_kernel(self.kernel.get_value(), shape, "kernel", remedy)
        bias = None if self.bias is None else self.bias.get_value()
        return conv(x, kernel, bias, self.geometry, self.dtype)
