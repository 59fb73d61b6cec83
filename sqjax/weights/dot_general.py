"""Quantized matmuls with a stored weight: any axes, batches, smoothing at run time, outlier channels."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sqjax.numerics.dots import LONGEST_CONTRACTION, DimensionNumbers
from sqjax.numerics.weight_products import Matrix, Recipe, product, ragged_product
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight


def quantized_dot_general(
    x: Float[Array, "..."], weight: QuantWeight, dimensions: DimensionNumbers, where: str
) -> Float[Array, "..."]:
    """`lax.dot_general(x, weight, dimensions)` on narrow operands; the result is float32.

    out = (q_x . q_w) * scale_x * scale_w, the sum in int32; see `sqjax.numerics.weight_products.product` for the other schemes. The
    derivative with respect to x is straight-through; the scales are constants to it. With batch axes every matrix of
    the batch has scales of its own. `where` names the weight in errors.

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
    multiply = partial(_multiply, weight.recipe)
    operands = rows, *matrices(weight, len(w_axes), len(w_batch))
    out = (
        jax.vmap(multiply)(*operands)
        if w_batch
        else multiply(*jax.tree.map(lambda m: m[0], operands))
    )
    outer = weight.tensor.values.shape[len(lead) : weight.ndim - len(w_axes)]
    out = out.reshape(*sizes[0], *sizes[1], *outer)
    kept = [len(free) + stored[a] for a in range(weight.ndim) if a not in (*w_axes, *w_batch)]
    return out.transpose(
        *map(in_order.index, range(len(lead))), *range(len(lead), len(lead) + len(free)), *kept
    )


def _multiply(
    recipe: Recipe, rows: Array, matrix: Matrix, smoothing: Array | None, outliers: Outliers | None
) -> Float[Array, "rows outputs"]:
    """rows @ W.T: divided by `smoothing`, then outlier channels in float and the others in the recipe's formats."""
    if smoothing is not None:
        rows = rows.astype(jnp.float32) / smoothing[None, :]
    if outliers is None:
        return product(recipe, rows, matrix)
    large = rows[:, outliers.channels]
    rest = rows.at[:, outliers.channels].set(jnp.zeros((), rows.dtype))
    weight = outliers.weight.astype(rows.dtype)
    apart = lax.dot_general(
        large, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product(recipe, rest, matrix) + apart


def check_contraction(
    weight: QuantWeight, w_axes: Sequence[int], w_batch: Sequence[int], where: str
) -> None:
    """Raises ValueError, naming `where`, if a weight was not quantized for a matmul along these axes."""
    tensor = weight.tensor
    tensor.check(where)
    axes, batch = (sorted(tensor.axes[a] for a in logical) for logical in (w_axes, w_batch))
    first = tensor.ndim - len(axes)
    one_scale = tensor.group is not None or math.prod(tensor.scale.shape[first:]) == 1
    if axes != list(range(first, tensor.ndim)) or batch != list(range(len(batch))) or not one_scale:
        asked = f"along its axes {tuple(w_axes)}" + (
            f" in a batch along {tuple(w_batch)}" if batch else ""
        )
        raise ValueError(
            f"{where}: contracted {asked}, but it was quantized for a contraction along {_contracted(tensor)}; "
            "give this site a rule of None to keep it in float"
        )
    inner = math.prod(tensor.values.shape[first:])
    if tensor.group is not None and tensor.scale.shape[-1] > 1:
        inner = min(inner, tensor.group)  # a sum for each group
    if inner > LONGEST_CONTRACTION and not tensor.fmt.floating:
        raise ValueError(
            f"{where}: contracts {inner} channels; int32 sums are exact up to {LONGEST_CONTRACTION}: "
            "split the contraction, or give this site weights in groups, as sqjax.Int8(group_size=128)"
        )


def matrices(
    weight: QuantWeight, contracted: int, batch: int
) -> tuple[Matrix, Float[Array, "stack inner"] | None, Outliers | None]:
    """A weight as one stack of matrices: (every array of `Matrix`, smoothing, outliers), the stack's axis first."""
    tensor, values = weight.tensor, weight.tensor.values
    lead, outer = values.shape[:batch], values.shape[batch : values.ndim - contracted]
    inner, stack, outputs = map(math.prod, (values.shape[values.ndim - contracted :], lead, outer))

    def scales(x: Any) -> Any:
        if x is None:
            return None
        own = x.shape[values.ndim - contracted :]
        return jnp.broadcast_to(x, (*lead, *outer, *own)).reshape(stack, outputs, math.prod(own))

    input_scale, smoothing, outliers = weight.input_scale, weight.smoothing, weight.outliers
    if input_scale is not None:
        input_scale = jnp.broadcast_to(input_scale, lead).reshape(stack)
    if smoothing is not None:
        own = (1,) * batch if smoothing.size == inner else lead
        smoothing = jnp.broadcast_to(smoothing.reshape(*own, inner), (*lead, inner)).reshape(
            stack, inner
        )
    if outliers is not None:
        count = outliers.channels.shape[-1]
        channels = jnp.broadcast_to(outliers.channels, (*lead, count)).reshape(stack, count)
        outliers = Outliers(channels, outliers.weight.reshape(stack, outputs, count))
    codes = values.reshape(stack, outputs, inner)
    matrix = Matrix(
        codes, scales(tensor.zero), scales(tensor.group_scale), scales(tensor.scale), input_scale
    )
    return matrix, smoothing, outliers


def quantized_ragged_dot(
    x: Float[Array, "rows inner"],
    weight: QuantWeight,
    group_sizes: Int[Array, " stack"],
    where: str,
) -> Float[Array, "rows outputs"]:
    """`lax.ragged_dot(x, weight, group_sizes)` on narrow operands: rows meet one matrix of a stack each.

    out = (q_x . q_w) * scale_x * scale_w in float32, the sum in int32. `where` names the weight in errors.

    Raises:
        ValueError: as `quantized_dot_general`; or the weight has outlier channels, or groups and quantized activations.
    """
    check_contraction(weight, (1,), (), where)
    problem = None
    if weight.tensor.axes != (0, 2, 1):
        problem = "a ragged dot needs a stack of matrices; give this site a rule of None"
    elif weight.outliers is not None:
        problem = "a ragged dot has no outlier channels; give this site a scheme without outliers"
    elif weight.activations is not None and weight.tensor.scale.shape[-1] > 1:
        problem = "a ragged dot of quantized activations takes weights per channel; give this site such a scheme"
    if problem:
        raise ValueError(f"{where}: {problem}")
    if weight.smoothing is not None:
        x = x.astype(jnp.float32) / weight.smoothing[None, :]
    stack, _, _ = matrices(dataclasses.replace(weight, smoothing=None), 1, 1)
    return ragged_product(weight.recipe, x, stack, group_sizes)


def _contracted(tensor: QTensor) -> tuple[int, ...]:
    """The logical axes that share one scale, or have groups."""
    return tuple(
        i for i, a in enumerate(tensor.axes) if tensor.scale.shape[a] < tensor.values.shape[a]
    )
