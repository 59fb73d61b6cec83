"""Flax NNX: quantized modules, of a whole network and of one Linear layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sqjax._serialized import tell_flax
from sqjax._trees import PyTree
from sqjax.layers.dense import check_kernel, dense, quantize_kernel
from sqjax.layers.nnx_functional import Functional as Functional
from sqjax.layers.nnx_functional import QuantParam as QuantParam
from sqjax.layers.nnx_functional import check_plain
from sqjax.layers.nnx_functional import functional as functional
from sqjax.runtime.quantized import quantized
from sqjax.weights.quant_weight import is_quantized
from sqjax.weights.schemes import W8A8, Scheme

tell_flax()


class QuantModule(nnx.Module):
    """An NNX module that runs another one on quantized parameters; `rebuild` makes it.

    `nnx.state` and `nnx.split` see its parameters below "params": float ones as `nnx.Param`,
    quantized ones as `QuantParam`. It works under `nnx.jit` and `jax.jit`; its other state is
    constant.
    """

    def __init__(self, fn: Functional, params: PyTree):
        # A static attribute must be hashable: nnx.jit compiles once for equal functions.
        self.fn = nnx.static(fn)
        self.params = nnx.data(
            jax.tree.map(_variable, params, is_leaf=is_quantized)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """quantized(fn)(params, *args, **kwargs)."""
        values = jax.tree.map(
            nnx.Variable.get_value, self.params, is_leaf=_is_variable
        )
        return quantized(self.fn)(values, *args, **kwargs)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _variable(leaf: Any) -> nnx.Variable:
    """The variable that holds a leaf, of the type by which NNX tells what may be trained."""
    return QuantParam(leaf) if is_quantized(leaf) else nnx.Param(leaf)


def rebuild(fn: Callable[..., Any], params: PyTree) -> Any:
    """The inverse of `functional`: a module that holds `params`.

    Args:
        fn: what `functional` returned.
        params: its parameters, smoothed or quantized or as they were.

    Returns:
        With float parameters a module of the original class; a Param that was held twice is
        again. With quantized ones a `QuantModule`, whose call runs `quantized(fn)` on them.

    Raises:
        ValueError: fn is no `functional`, or params are not its module's.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> from flax import nnx
        >>> fn, params = sq.nnx.functional(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> type(sq.nnx.rebuild(fn, params)).__name__
        'Linear'
        >>> x = jnp.ones((1, 3))
        >>> model = sq.nnx.rebuild(fn, sq.quantize(params, sq.calibrate(fn, params, [x])))
        >>> type(model).__name__, nnx.jit(lambda model, x: model(x))(model, x).shape
        ('QuantModule', (1, 2))
    """
    if not isinstance(fn, Functional):
        raise ValueError(
            f"rebuild: expected the fn that sqjax.nnx.functional returned, got {type(fn).__name__}"
        )
    module = fn.module(params)
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        # The original class can not compute with a quantized weight where it expects an array. (A
        # layer of its own that can, such as QuantLinear, holds it in a QuantParam.)
        if is_quantized(variable.get_value()):
            return QuantModule(fn, params)
    return module


# Those of nnx.Linear, so that the same key draws the same layer.
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class QuantLinear(nnx.Module):
    """`nnx.Linear` on narrow numbers: y = x W + b, by default with int8 x int8 -> int32 inside.

    A drop-in for `nnx.Linear`. `from_linear` quantizes a float layer; the constructor draws one,
    for which it has no data: a static scheme then clips at 1, and nothing is an outlier.
    Jittable; differentiable straight through. The kernel is a `QuantParam`, which is no
    `nnx.Param`, the bias an `nnx.Param`: nnx.grad and nnx.Optimizer(..., wrt=nnx.Param) train the
    bias, and what is around the layer, and leave the kernel. `rebuild` needs no such layer.

    Attributes:
        in_features: the number of inputs.
        out_features: the number of outputs.
        use_bias: whether there is a bias; it stays float.
        scheme: how the kernel was quantized.
        dtype: of the result; by default that of the input and the parameters, promoted.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> from flax import nnx
        >>> layer = sq.nnx.QuantLinear.from_linear(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), sq.W8A8)
        >>> layer(jnp.ones((1, 3))).shape
        (1, 2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        scheme: Scheme = W8A8,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        bias_init: nnx.Initializer = _BIAS_INIT,
        rngs: nnx.Rngs,
    ):
        kernel = kernel_init(
            rngs.params(), (in_features, out_features), param_dtype
        )
        # There are no data: no channel is an outlier, and a static scale covers [-1, 1].
        known = scheme.replace(outliers=None), jnp.ones(in_features), None
        self.kernel = QuantParam(
            quantize_kernel(kernel, *known, "QuantLinear: kernel")
        )
        bias = None
        if use_bias:
            bias = nnx.Param(
                bias_init(rngs.params(), (out_features,), param_dtype)
            )
        self.bias: nnx.Variable | None = nnx.data(bias)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.scheme = scheme
        self.dtype = dtype

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        scheme: Scheme = W8A8,
        absmax: Float[Array, " inputs"] | None = None,
        smoothing: Float[Array, " inputs"] | None = None,
    ) -> "QuantLinear":
        """A float layer, quantized.

        Args:
            linear: the float layer; it is not touched.
            scheme: how to quantize.
            absmax: max |X_j| over calibration data: for static schemes, for outliers and for a
                scheme with smoothing.
            smoothing: s_j, for example `sqjax.numerics.smoothing.smoothing_scales(absmax,
                max|W_j|, alpha)`: the layer computes (X / s) (s W), with s W quantized and the
                division by s part of the activation's quantizer. A scheme with a smoothing of its
                own, an alpha, needs none.

        Raises:
            ValueError: a kernel of another rank than 2 (map over stacked layers: nnx.vmap(lambda
                layer: ...)), a misshapen vector, an absmax that the scheme needs and does not
                get, a scheme for embeddings, or a layer with a `dot_general`, a `promote_dtype`
                or a `preferred_element_type` of its own.
        """
        product = {"dot_general": jax.lax.dot_general}
        check_plain(linear, product, "from_linear")
        given = linear.kernel.get_value()
        if given.ndim != 2:
            raise ValueError(
                "from_linear: expected a kernel of shape (inputs, features), got "
                f"{given.shape}; map over stacked layers with "
                "nnx.vmap(lambda layer: QuantLinear.from_linear(layer))"
            )
        kernel = quantize_kernel(
            given, scheme, absmax, smoothing, "from_linear: kernel"
        )

        def random_layer() -> QuantLinear:
            return cls(
                linear.in_features,
                linear.out_features,
                use_bias=linear.use_bias,
                scheme=scheme,
                dtype=linear.dtype,
                rngs=nnx.Rngs(0),
            )

        # eval_shape draws nothing: the random values would be thrown away.
        layer = nnx.eval_shape(random_layer)
        layer.kernel = QuantParam(kernel)
        layer.bias = nnx.data(
            None if linear.bias is None else linear.bias.copy()
        )
        return layer

    def __call__(
        self, x: Float[Array, "*batch inputs"]
    ) -> Float[Array, "*batch features"]:
        """Raises ValueError if the kernel is no `QuantWeight` of (in_features, out_features)."""
        remedy = "make the layer with sqjax.nnx.QuantLinear.from_linear(linear)"
        expected = (x.shape[-1], self.out_features)
        kernel = check_kernel(
            self.kernel.get_value(), expected, "kernel", remedy
        )
        bias = None if self.bias is None else self.bias.get_value()
        return dense(x, kernel, bias, self.dtype, "kernel")
