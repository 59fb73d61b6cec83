"""Quantized matmuls on arrays: int8 x int8 -> int32, scaled in float32, cast once at the end."""

import math
from collections.abc import Sequence
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
        input_scale: float32, the activation's scale, when `activations` is "static"; otherwise None. A scalar, or
            one for each matrix of a stack.
        smoothing: float32 s of the activation's contracted shape (after the axes of a stack), or None. Where it is
            given the weight holds s * W and the activation quantizer divides by s: smoothing at run time,
            (X/s)(sW) = XW.
        activations: "per_token" (one scale a row, computed at run time), "per_tensor" (one for the whole
            activation, at run time) or "static" (`input_scale`).
        contracted: the number of contracted axes, which are stored last.

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
    contracted: int = field(default=1, metadata={"static": True})

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
    it. With batch axes every matrix of the batch has scales of its own. `where` names the weight in errors.

    Raises:
        ValueError: the weight is not stored along the contracted axes, or the contraction is too long for an exact
            int32 sum.
    """
    (x_axes, w_axes), (x_batch, w_batch) = dimensions
    check_contraction(weight, w_axes, w_batch, where)
    stored = weight.tensor.axes
    in_order = sorted(range(len(w_batch)), key=lambda i: stored[w_batch[i]])
    lead = [x_batch[i] for i in in_order]
    contracted = [a for _, a in sorted((stored[w], a) for w, a in zip(w_axes, x_axes, strict=True))]
    free = [a for a in range(x.ndim) if a not in (*x_axes, *x_batch)]
    sizes = [[x.shape[a] for a in axes] for axes in (lead, free, contracted)]
    rows = x.transpose(*lead, *free, *contracted).reshape(*map(math.prod, sizes))
    operands = rows, *matrices(weight, len(w_axes), len(w_batch))
    if w_batch:
        out = jax.vmap(partial(_multiply, weight.activations))(*operands)
    else:
        out = _multiply(weight.activations, *(None if m is None else m[0] for m in operands))
    outer = weight.tensor.values.shape[len(lead) : weight.ndim - len(w_axes)]
    out = out.reshape(*sizes[0], *sizes[1], *outer)
    kept = [len(free) + stored[a] for a in range(weight.ndim) if a not in (*w_axes, *w_batch)]
    return out.transpose(*map(in_order.index, range(len(lead))), *range(len(lead), len(lead) + len(free)), *kept)


def _multiply(activations, rows, values, scale, input_scale, smoothing):
    if smoothing is not None:
        rows = rows.astype(jnp.float32) / smoothing[None, :]
    return int8_matmul(activations, rows, values, scale, input_scale)


def check_contraction(weight: QuantWeight, w_axes: Sequence[int], w_batch: Sequence[int], where: str) -> None:
    """Raises ValueError, naming `where`, if a weight was not quantized for a matmul along these axes."""
    tensor = weight.tensor
    tensor.check(where)
    axes, batch = (sorted(tensor.axes[a] for a in logical) for logical in (w_axes, w_batch))
    first = tensor.ndim - len(axes)
    one_scale = math.prod(tensor.scale.shape[first:]) == 1
    if axes != list(range(first, tensor.ndim)) or batch != list(range(len(batch))) or not one_scale:
        asked = f"along its axes {tuple(w_axes)}" + (f" in a batch along {tuple(w_batch)}" if batch else "")
        raise ValueError(
            f"{where}: contracted {asked}, but it was quantized for a contraction along {_contracted(tensor)}; "
            "give this site a rule of None to keep it in float"
        )
    inner = math.prod(tensor.values.shape[first:])
    if inner > LONGEST_CONTRACTION:
        raise ValueError(
            f"{where}: contracts {inner} channels; int32 sums are exact up to {LONGEST_CONTRACTION}: "
            "split the contraction"
        )


def matrices(weight: QuantWeight, contracted: int, batch: int) -> tuple[Array, Array, Array | None, Array | None]:
    """A weight as one stack of matrices.

    Returns:
        values (stack, outputs, inner), scale (stack, outputs), input_scale (stack,) and smoothing (stack, inner); the
        last two may be None.
    """
    values, scale = weight.tensor.values, weight.tensor.scale
    lead, outer = values.shape[:batch], values.shape[batch : values.ndim - contracted]
    inner, stack = math.prod(values.shape[values.ndim - contracted :]), math.prod(lead)
    scale = jnp.broadcast_to(scale.reshape(scale.shape[: values.ndim - contracted]), (*lead, *outer))
    input_scale, smoothing = weight.input_scale, weight.smoothing
    if input_scale is not None:
        input_scale = jnp.broadcast_to(input_scale, lead).reshape(stack)
    if smoothing is not None:
        own = (1,) * batch if smoothing.size == inner else lead
        smoothing = jnp.broadcast_to(smoothing.reshape(*own, inner), (*lead, inner)).reshape(stack, inner)
    outputs = math.prod(outer)
    return values.reshape(stack, outputs, inner), scale.reshape(stack, outputs), input_scale, smoothing


def quantized_ragged_dot(
    x: Float[Array, "rows inner"], weight: QuantWeight, group_sizes: Int[Array, " stack"], where: str
) -> Float[Array, "rows outputs"]:
    """`lax.ragged_dot(x, weight, group_sizes)` on int8 operands: rows meet one matrix of a stack each.

    out = (q_x . q_w) * scale_x * scale_w in float32, the sum in int32. `where` names the weight in errors.

    Raises:
        ValueError: as `quantized_dot_general`.
    """
    check_contraction(weight, (1,), (), where)
    if weight.tensor.axes != (0, 2, 1):
        raise ValueError(f"{where}: a ragged dot needs a stack of matrices; give this site a rule of None")
    if weight.smoothing is not None:
        x = x.astype(jnp.float32) / weight.smoothing[None, :]
    scale = jnp.broadcast_to(weight.tensor.scale, (*weight.tensor.values.shape[:2], 1)).squeeze(2)
    return int8_ragged_dot(weight.activations, x, weight.tensor.values, scale, weight.input_scale, group_sizes)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def int8_ragged_dot(activations, x, values, scale, input_scale, group_sizes):
    """As `int8_matmul`, with the matrix of a stack (stack, outputs, inner) that each row's group has."""
    x_scale = activation_scale(x, activations, input_scale)
    sums = _ragged(to_format(x, x_scale), values, group_sizes, jnp.int32)
    return sums.astype(jnp.float32) * x_scale * scale[_group_of_row(group_sizes, x.shape[0])]


@int8_ragged_dot.defjvp
def _ragged_straight_through(activations, primals, tangents):
    _, values, scale, _, group_sizes = primals
    weight = values.astype(jnp.float32) * scale[:, :, None]
    return int8_ragged_dot(activations, *primals), _ragged(tangents[0].astype(jnp.float32), weight, group_sizes, None)


def _ragged(x: Array, values: Array, group_sizes: Array, dtype: Any) -> Array:
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    return lax.ragged_dot_general(x, values, group_sizes, numbers, preferred_element_type=dtype)


def _group_of_row(group_sizes: Array, rows: int) -> Array:
    """Which group each row belongs to: the first whose end lies beyond it."""
    ends = jnp.cumsum(group_sizes)
    last = jnp.int32(group_sizes.shape[0] - 1)
    return jnp.minimum(jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right").astype(jnp.int32), last)


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
