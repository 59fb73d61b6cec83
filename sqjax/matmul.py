"""Quantized matmuls on arrays: int8 x int8 -> int32, scaled in float32, cast once at the end."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from sqjax.formats import scale_from_absmax, to_format
from sqjax.qtensor import QTensor

Activations = Literal["per_token", "per_tensor", "static"]
#: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)), as `lax.dot_general` takes them.
DimensionNumbers = tuple[tuple[Any, Any], tuple[Any, Any]]

#: The longest contraction whose int32 sum of products of two int8 in [-127, 127] cannot overflow.
LONGEST_CONTRACTION = (2**31 - 1) // 127**2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantWeight:
    """A matmul weight as it is stored, and how the activations that meet it are quantized.

    Attributes:
        tensor: the int8 weight.
        input_scale: float32 scalar, the activation's scale, when `activations` is "static"; otherwise None.
        smoothing: float32 s of the activation's contracted shape, or None. Where it is given the weight holds
            s * W and the activation quantizer divides by s: smoothing at run time, (X/s)(sW) = XW.
        activations: "per_token" (one scale a row, computed at run time), "per_tensor" (one for the whole
            activation, at run time) or "static" (`input_scale`).

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: x @ p["w"]
        >>> params = {"w": jnp.ones((2, 3))}
        >>> w = sq.quantize(params, sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]])]))["w"]
        >>> w.shape, w.tensor.values.shape, w.activations
        ((2, 3), (3, 2), 'per_token')
    """

    tensor: QTensor
    input_scale: Any
    smoothing: Any
    activations: Activations = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape of the float weight."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """The logical dtype of the float weight."""
        return self.tensor.dtype

    @property
    def ndim(self) -> int:
        """The logical rank of the float weight."""
        return self.tensor.ndim


def quantized_dot_general(
    x: Float[Array, "..."], weight: QuantWeight, dimensions: DimensionNumbers, where: str
) -> Float[Array, "..."]:
    """`lax.dot_general(x, weight, dimensions)` on int8 operands; the result is float32.

    out = (q_x . q_w) * scale_x * scale_w, the sum in int32. The derivative with respect to x is that of the
    float matmul with the dequantized weight (straight-through, Bengio et al. 2013); the scales are constants to
    it. `where` names the weight in errors.

    Raises:
        ValueError: the weight is not stored along the contracted axes, has batch axes here, or the contraction
            is too long for an exact int32 sum.
    """
    (x_axes, w_axes), (x_batch, w_batch) = dimensions
    tensor = weight.tensor
    tensor.check(where)
    if x_batch or w_batch:
        raise ValueError(f"{where}: a quantized weight with batch axes is not supported; keep this site in float")
    stored = [tensor.axes[a] for a in w_axes]
    first = tensor.ndim - len(stored)
    one_scale = math.prod(tensor.scale.shape[first:]) == 1
    if sorted(stored) != list(range(first, tensor.ndim)) or not one_scale:
        raise ValueError(
            f"{where}: contracted along its axes {tuple(w_axes)}, but it was quantized for a contraction along "
            f"{_contracted(tensor)}; give this site a rule of None to keep it in float"
        )
    x_axes = [a for _, a in sorted(zip(stored, x_axes, strict=True))]
    free = [a for a in range(x.ndim) if a not in x_axes]
    rows, inner = math.prod(x.shape[a] for a in free), math.prod(x.shape[a] for a in x_axes)
    if inner > LONGEST_CONTRACTION:
        raise ValueError(
            f"{where}: contracts {inner} channels; int32 sums are exact up to {LONGEST_CONTRACTION}: "
            "split the contraction"
        )
    x2d = x.transpose(*free, *x_axes).reshape(rows, inner)
    if weight.smoothing is not None:
        x2d = x2d.astype(jnp.float32) / weight.smoothing.reshape(1, inner)
    outer = tensor.values.shape[:first]
    values = tensor.values.reshape(math.prod(outer), inner)
    scale = jnp.broadcast_to(tensor.scale.reshape(tensor.scale.shape[:first]), outer).reshape(-1)
    out = int8_matmul(weight.activations, x2d, values, scale, weight.input_scale)
    kept = [a for a in range(tensor.ndim) if a not in w_axes]  # logical free axes, in the order the caller expects
    out = out.reshape(*(x.shape[a] for a in free), *outer)
    return out.transpose(*range(len(free)), *(len(free) + tensor.axes[a] for a in kept))


def _contracted(tensor: QTensor) -> tuple[int, ...]:
    """The logical axes that share one scale."""
    return tuple(i for i, a in enumerate(tensor.axes) if tensor.scale.shape[a] == 1 != tensor.values.shape[a])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def int8_matmul(
    activations: Activations,
    x: Float[Array, "rows channels"],
    values: Int8[Array, "outputs channels"],
    scale: Float[Array, " outputs"],
    input_scale: Float[Array, ""] | None,
) -> Float[Array, "rows outputs"]:
    """(q_x @ values.T) * scale_x * scale in float32, where q_x = round(x / scale_x) and the sum is in int32."""
    x_scale = activation_scale(x, activations, input_scale)
    sums = _int8_dot(to_format(x, x_scale), values)
    return sums.astype(jnp.float32) * x_scale * scale[None, :]


@int8_matmul.defjvp
def _straight_through(activations, primals, tangents):
    _, values, scale, _ = primals
    out = int8_matmul(activations, *primals)
    dx = tangents[0].astype(jnp.float32)
    return out, lax.dot_general(dx, values.astype(jnp.float32), _LAST_AXES) * scale[None, :]


def activation_scale(
    x: Float[Array, "rows channels"], activations: Activations, input_scale: Float[Array, ""] | None
) -> Float[Array, "..."]:
    """absmax / 127 of each row (rows, 1), of the whole array (1, 1), or the given static scale (1, 1)."""
    if activations == "static":
        if input_scale is None:
            raise ValueError("static activations need an input_scale: quantize with the statistics of calibrate")
        return input_scale.reshape(1, 1)
    axis = 1 if activations == "per_token" else None
    return scale_from_absmax(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0))


_LAST_AXES = (((1,), (1,)), ((), ()))


def _int8_dot(q: Int8[Array, "rows channels"], values: Int8[Array, "outputs channels"]) -> Int[Array, "rows outputs"]:
    def dot(q, values):
        return lax.dot_general(q, values, _LAST_AXES, preferred_element_type=jnp.int32)

    def dot_of_two_rows(q, values):
        return dot(jnp.pad(q, ((0, 1), (0, 0))), values)[:1]

    if q.shape[0] != 1:
        return dot(q, values)
    # XLA:CPU runs an int8 matrix-vector product without its vector units: two rows take less time than one.
    return lax.platform_dependent(q, values, cpu=dot_of_two_rows, default=dot)
