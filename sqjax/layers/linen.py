"""Quantized Flax linen modules, for people who write their own networks."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sqjax._arguments import check_mapping
from sqjax._serialized import tell_flax
from sqjax._shapes import other_axes, sizes_along
from sqjax.layers.dense import check_kernel, dense, quantize_kernel
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.schemes import W8A8, Scheme

tell_flax()

Initializer = Callable[..., Any]

# The two modules repeat their common fields, because the order of a module's fields is that of
# its positional arguments: a shared base class would put `axis` and `batch_dims` last.


class QuantDense(nn.Module):
    """`nn.Dense` on narrow numbers: y = x W + b, by default with int8 x int8 -> int32 inside.

    A drop-in for `nn.Dense`: the same fields, the same parameter names. Its parameters come from
    a float layer's by `quantize_dense`; `init` makes random ones. Under `sqjax.quantized` plain
    `nn.Dense` layers need no replacement. Jittable; differentiable straight through with respect
    to x and the bias. The kernel is no float array: to train what is around it, take gradients
    with respect to the float leaves of the tree alone.

    Attributes:
        features: the number of outputs.
        use_bias: whether there is a bias; it stays float.
        scheme: how `init` quantizes, with what a static scheme or outliers need to know taken
            from init's x; parameters that are given carry their own scheme.
        dtype: of the result; by default that of the input and the parameters, promoted.
        param_dtype: of the bias and of the float kernel that `init` draws.

    Examples:
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
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch inputs"]
    ) -> Float[Array, "*batch features"]:
        """Raises ValueError if the kernel is not a `QuantWeight` of shape (inputs, features)."""
        last = (x.ndim - 1,)  # the contracted axis
        kernel = _kernel(self, x, last, 0, (self.features,), "quantize_dense")
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        return dense(x, kernel, bias, self.dtype, _name(self))


class QuantDenseGeneral(nn.Module):
    """`nn.DenseGeneral` on narrow numbers: a product over any axes of x, as in attention.

    A drop-in for `nn.DenseGeneral`: the same fields, the same parameter names and shapes. Its
    parameters come from a float layer's by `quantize_dense_general`; `init` makes random ones.
    Everything else is as in `QuantDense`.

    Attributes:
        features: the number of outputs, or one for each of the axes that come out.
        axis: the axis of x that is contracted, or several of them.
        batch_dims: leading axes of x that have a matrix (with scales of its own) for each of
            their indices.
        use_bias: whether there is a bias; it stays float.
        scheme: how `init` quantizes; see `QuantDense`.
        dtype: of the result; by default that of the input and the parameters, promoted.
        param_dtype: of the bias and of the float kernel that `init` draws.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> from flax import linen as nn
        >>> heads = jnp.ones((1, 5, 4, 8))
        >>> params = nn.DenseGeneral(16, axis=(-2, -1)).init(jax.random.key(0), heads)["params"]
        >>> qparams = sq.linen.quantize_dense_general(params, sq.W8A8, axis=(-2, -1))
        >>> sq.linen.QuantDenseGeneral(16, axis=(-2, -1)).apply({"params": qparams}, heads).shape
        (1, 5, 16)
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    batch_dims: int | Sequence[int] = ()
    use_bias: bool = True
    scheme: Scheme = W8A8
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Raises ValueError if the axes do not fit x, or the kernel is not one for this layer."""
        features, batch = (
            _several(self.features),
            len(_several(self.batch_dims)),
        )
        # From here on axes count from the front and ascend, whatever order the fields have.
        axes = _axes(self.axis, self.batch_dims, x.shape, _name(self))
        kernel = _kernel(
            self, x, axes, batch, features, "quantize_dense_general"
        )
        shape = (*x.shape[:batch], *features)

        def init_bias(key: Array) -> Array:
            # nn.DenseGeneral draws a flat bias and reshapes it; the same draw needs the same shape.
            flat = self.bias_init(key, (math.prod(shape),), self.param_dtype)
            return flat.reshape(shape)

        bias = self.param("bias", init_bias) if self.use_bias else None
        return dense(x, kernel, bias, self.dtype, _name(self), axes, batch)


def _name(module: nn.Module) -> str:
    """The path of a module's kernel, for errors: "layers/0/query/kernel"."""
    return "/".join((*module.path, "kernel"))


def _several(numbers: int | Sequence[int]) -> tuple[int, ...]:
    """A field that may be one number or several, as a tuple: 8 is (8,)."""
    return tuple(numbers) if isinstance(numbers, Iterable) else (numbers,)


def _axes(
    axis: int | Sequence[int],
    batch_dims: int | Sequence[int],
    shape: tuple[int, ...],
    where: str,
) -> tuple[int, ...]:
    """The contracted axes, ascending.

    A kernel has them in this order, whatever order they are given in: for x of (3, 4, 5, 64) and
    axis = (-1, 1) they are (1, 3), and the kernel is (4, 64, *features).
    """
    asked, batch = _several(axis), sorted(_several(batch_dims))
    if batch != list(range(len(batch))):
        raise ValueError(
            f"{where}: expected batch_dims that are the leading axes, 0, 1, ..., got {batch_dims}"
        )
    rank = len(shape)
    in_range = [a % rank for a in asked if -rank <= a < rank]
    axes = sorted(set(in_range))
    # An axis that is out of range or named twice is missing here.
    if len(axes) < len(asked) or not axes or axes[0] < len(batch):
        raise ValueError(
            f"{where}: expected axis to name axes of x {shape}, each once, no batch axis, "
            f"got {axis}"
        )
    return tuple(axes)


def _kernel(
    module: QuantDense | QuantDenseGeneral,
    x: Array,
    axes: tuple[int, ...],
    batch: int,
    features: tuple[int, ...],
    maker: str,
) -> QuantWeight:
    """The kernel of a module, (*batch, *contracted, *features): drawn by `init`, or checked.

    For heads (3, 5, 4, 64), axes (2, 3) and features (8,) it is (4, 64, 8). `batch` is the number
    of batch axes, `maker` the function that makes such parameters, for errors.
    """
    lead, inputs = x.shape[:batch], sizes_along(x.shape, axes)
    shape = (*lead, *inputs, *features)

    def init_kernel(key: Array) -> QuantWeight:
        # Flax draws the kernel as one matrix (inputs, outputs); the same draw needs the same shape.
        matrix = math.prod((*lead, *inputs)), math.prod(features)
        kernel = module.kernel_init(key, matrix, module.param_dtype).reshape(
            shape
        )
        tokens = tuple(other_axes(x.ndim, range(batch), axes))
        absmax = jnp.max(jnp.abs(x), axis=tokens, initial=0.0)
        return quantize_kernel(
            kernel, module.scheme, absmax, None, _name(module), len(axes), batch
        )

    # `init` has no parameters yet; every other call must find a quantized kernel.
    if not module.has_variable("params", "kernel"):
        return module.param("kernel", init_kernel)
    remedy = f"make the parameters with sqjax.linen.{maker}(params)"
    return check_kernel(
        module.get_variable("params", "kernel"), shape, _name(module), remedy
    )


def quantize_dense(
    params: Mapping[str, Array],
    scheme: Scheme = W8A8,
    *,
    absmax: Float[Array, " inputs"] | None = None,
    smoothing: Float[Array, " inputs"] | None = None,
) -> dict[str, Any]:
    """A float `nn.Dense` layer's parameters as those of a `QuantDense`.

    Layers stacked for `nn.scan` or `nn.vmap`: jax.vmap(quantize_dense)(params).

    Args:
        params: {"kernel": (inputs, features)} and, if there is one, {"bias": (features,)}.
        scheme: how to quantize.
        absmax: max |X_j| over calibration data: for static schemes, for outliers and for a scheme
            with smoothing.
        smoothing: s_j, for example `sqjax.numerics.smoothing.smoothing_scales(absmax, max|W_j|,
            alpha)`: the layer computes (X / s) (s W), with s W quantized and the division by s
            part of the activation's quantizer. A scheme with a smoothing of its own, an alpha,
            needs none.

    Raises:
        ValueError: no kernel of rank 2, a misshapen vector, an absmax that the scheme needs and
            does not get, or a scheme for embeddings.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "bias": jnp.zeros(2)}
        >>> sq.linen.quantize_dense(params)["kernel"].tensor.values.tolist()
        [[127, 64], [-64, 127]]
    """
    check_mapping(params, "quantize_dense", "a layer's {'kernel': ...}")
    kernel = params.get("kernel")
    if kernel is None or kernel.ndim != 2:
        raise ValueError(
            "quantize_dense: expected a 'kernel' of shape (inputs, features), got "
            f"{_shapes(params)}; for a kernel of nn.DenseGeneral call quantize_dense_general, "
            "for stacked layers jax.vmap(quantize_dense)"
        )
    quantized = quantize_kernel(
        kernel, scheme, absmax, smoothing, "quantize_dense: kernel"
    )
    return {**params, "kernel": quantized}


def quantize_dense_general(
    params: Mapping[str, Array],
    scheme: Scheme = W8A8,
    *,
    axis: int | Sequence[int] = -1,
    batch_dims: int | Sequence[int] = (),
    absmax: Float[Array, "..."] | None = None,
    smoothing: Float[Array, "..."] | None = None,
) -> dict[str, Any]:
    """A float `nn.DenseGeneral` layer's parameters as those of a `QuantDenseGeneral`.

    Layers stacked for `nn.scan` or `nn.vmap`: jax.vmap(quantize_dense_general)(params).

    Args:
        params: {"kernel": (*batch, *contracted, *features)} and, if there is one, {"bias":
            (*batch, *features)}.
        scheme: how to quantize. Groups are of consecutive channels of the last contracted axis.
        axis: the layer's field; only how many axes it names counts here: these share the scales.
        batch_dims: the layer's field; each index along these axes has scales of its own.
        absmax: max |X_j| over calibration data, (*batch, *contracted): for schemes that need it.
        smoothing: s_j, (*batch, *contracted); see `quantize_dense`.

    Raises:
        ValueError: as `quantize_dense`; or groups that do not divide the last of several
            contracted axes.

    Examples:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> params = {"kernel": jnp.ones((4, 8, 16)), "bias": jnp.zeros(16)}
        >>> qparams = sq.linen.quantize_dense_general(params, sq.W8A8, axis=(-2, -1))
        >>> qparams["kernel"].tensor.values.shape
        (16, 4, 8)
    """
    if "kernel" not in params:
        raise ValueError(
            f"quantize_dense_general: expected a 'kernel', got {_shapes(params)}"
        )
    kernel = quantize_kernel(
        params["kernel"],
        scheme,
        absmax,
        smoothing,
        "quantize_dense_general: kernel",
        contracted=len(_several(axis)),
        batch=len(_several(batch_dims)),
    )
    return {**params, "kernel": kernel}


def _shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: jnp.shape(x) for name, x in params.items()}
