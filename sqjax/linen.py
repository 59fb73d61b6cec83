"""Quantized Flax linen modules, for people who write their own networks."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sqjax.dense import check_kernel, dense, quantize_kernel
from sqjax.matmul import QuantWeight
from sqjax.schemes import W8A8, Scheme


class QuantDense(nn.Module):
    """`nn.Dense` on int8: y = x W + b with int8 x int8 -> int32 inside, jittable, differentiable straight through.

    A drop-in for `nn.Dense`: the same fields, the same parameter names. Its parameters come from a float layer's by
    `quantize_dense`; `init` makes random ones. Under `sqjax.quantized` plain `nn.Dense` layers need no replacement.

    Attributes:
        features: the number of outputs.
        use_bias: whether there is a bias; it stays float.
        scheme: how `init` quantizes; parameters that are given carry their own scheme.
        dtype: of the result; by default that of the input and the parameters, promoted.
        param_dtype: of the bias and of the float kernel that `init` draws.

    Example:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> from flax import linen as nn
        >>> x = jnp.ones((1, 3))
        >>> params = nn.Dense(2).init(jax.random.key(0), x)["params"]
        >>> qparams = sq.linen.quantize_dense(params, sq.W8A8)
        >>> sq.linen.QuantDense(2).apply({"params": qparams}, x).shape
        (1, 2)
    """

    features: int
    use_bias: bool = True
    scheme: Scheme = W8A8
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        """Raises ValueError if the kernel is not a `QuantWeight` of logical shape (inputs, features)."""
        kernel = self._kernel(x.shape[-1])
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return dense(x, kernel, bias, self.dtype, self._where())

    def _where(self) -> str:
        return "/".join((*self.path, "kernel"))

    def _kernel(self, inputs: int) -> QuantWeight:
        def init(key: Array) -> QuantWeight:
            kernel = self.kernel_init(key, (inputs, self.features), self.param_dtype)
            return quantize_kernel(kernel, self.scheme, jnp.ones(inputs), None, self._where())

        if not self.has_variable("params", "kernel"):
            return self.param("kernel", init)
        remedy = "make the parameters with sqjax.linen.quantize_dense(params)"
        return check_kernel(self.get_variable("params", "kernel"), (inputs, self.features), self._where(), remedy)


def quantize_dense(
    params: Mapping[str, Array],
    scheme: Scheme = W8A8,
    *,
    absmax: Float[Array, " inputs"] | None = None,
    smoothing: Float[Array, " inputs"] | None = None,
) -> dict[str, Any]:
    """A float `nn.Dense` layer's parameters as those of a `QuantDense`.

    Args:
        params: {"kernel": (inputs, features)} and, if there is one, {"bias": (features,)}.
        scheme: how to quantize.
        absmax: max |X_j| over calibration data: for static schemes.
        smoothing: s_j, for example `sqjax.smoothing.smoothing_scales(absmax, max|W_j|, alpha)`: the layer computes
            (X / s) (s W), with s W quantized and the division by s part of the activation's quantizer.

    Raises:
        ValueError: no kernel of rank 2, a misshapen smoothing, or a static scheme without absmax.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "bias": jnp.zeros(2)}
        >>> sq.linen.quantize_dense(params)["kernel"].tensor.values.tolist()
        [[127, 64], [-64, 127]]
    """
    kernel = params.get("kernel")
    if kernel is None or kernel.ndim != 2:
        shapes = {name: jnp.shape(x) for name, x in params.items()}
        raise ValueError(f"quantize_dense: expected a 'kernel' of shape (inputs, features), got {shapes}")
    return {**params, "kernel": quantize_kernel(kernel, scheme, absmax, smoothing, "quantize_dense")}
