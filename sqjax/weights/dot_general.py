"""Quantized matmuls with a stored weight: any axes, batches, what is done at run time, outliers.

These functions bring the operands into the one form that `sqjax.numerics.weight_products` takes,
rows and a matrix with the contracted axis last, and the result back into the caller's axes.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sqjax._shapes import entries_at, other_axes, sizes_along
from sqjax.numerics.dots import LAST_AXES, LONGEST_CONTRACTION, DimensionNumbers
from sqjax.numerics.hadamard import rotated
from sqjax.numerics.matrix import Matrix
from sqjax.numerics.weight_products import (
    Activations,
    Recipe,
    count_beyond,
    product,
    ragged_product,
    transposed_product,
)
from sqjax.weights.kernels import check_call
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight


def quantized_dot_general(
    x: Float[Array, "..."],
    weight: QuantWeight,
    dimensions: DimensionNumbers,
    where: str,
) -> Float[Array, "..."]:
    """`lax.dot_general(x, weight, dimensions)` on narrow operands; the result is float32.

    out = (q_x . q_w) * scale_x * scale_w, the sum in int32; see
    `sqjax.numerics.weight_products.product` for the other schemes. The derivative with respect to x
    is straight-through; the scales are constants to it. With batch axes every matrix of the batch
    has scales of its own.

    For x (tokens, experts, in) and a weight (experts, in, out), which is stored as (experts, out,
    in), the rows are (experts, tokens, in), the products (experts, tokens, out).

    A weight may also be contracted along its outputs, as in h @ w.T where it was quantized for x @
    w: see `sqjax.numerics.weight_products.transposed_product`.

    Args:
        x: the activation.
        weight: the quantized weight.
        dimensions: as `lax.dot_general` takes them.
        where: names the weight in errors.

    Raises:
        ValueError: the contracted axes are neither all channels nor all outputs of the weight, or
            there are too many channels for an exact int32 sum.
    """
    (_, w_axes), (_, w_batch) = dimensions
    weight.tensor.check(where)
    axes = _axes_of(x.ndim, weight.tensor.axes, dimensions)
    if _sums_over_outputs(weight.tensor, w_axes, w_batch):
        multiply, channels = _multiply_transposed, axes.outer
    else:
        check_contraction(weight, w_axes, w_batch, where)
        check_call(x, weight, dimensions, where)
        multiply, channels = _multiply, list(w_axes)
    multiply = partial(multiply, weight.recipe, weight.rotation)

    rows, sizes = _as_rows(x, axes)
    operands = rows, *matrices(weight, len(channels), len(w_batch))
    if w_batch:
        out = jax.vmap(multiply)(*operands)
    else:
        out = multiply(*jax.tree.map(lambda stack: stack[0], operands))

    outer_sizes = sizes_along(weight.tensor.values.shape, axes.outer)
    return out.reshape(*sizes, *outer_sizes).transpose(axes.of_result)


def clipped_values(
    x: Float[Array, "..."], weight: QuantWeight, dimensions: DimensionNumbers
) -> Float[Array, ""]:
    """How many values of x, as `quantized_dot_general` quantizes them, lie beyond a static scale.

    0 where the scale is computed at run time, or x stays float. With smoothing at run time these
    are values of X / s, with a rotation of X Q; outlier channels, which stay float, are not
    counted.
    """
    (_, w_axes), (_, w_batch) = dimensions
    is_other = _sums_over_outputs(weight.tensor, w_axes, w_batch)
    if weight.activations != "static" or is_other:
        return jnp.zeros((), jnp.float32)
    rows, _ = _as_rows(x, _axes_of(x.ndim, weight.tensor.axes, dimensions))

    def of_matrix(
        rows: Array, matrix: Matrix, smoothing: Any, outliers: Any
    ) -> Array:
        rows = _as_quantized(
            rows, smoothing, weight.rotation, weight.activations
        )
        if outliers is not None:
            rows = rows.at[:, outliers.channels].set(jnp.zeros((), rows.dtype))
        scale: Any = matrix.input_scale
        return count_beyond(rows, scale, weight.activation_format)

    # Each matrix of a batch has a scale of its own.
    operands = rows, *matrices(weight, len(w_axes), len(w_batch))
    if w_batch:
        return jnp.sum(jax.vmap(of_matrix)(*operands))
    return of_matrix(*jax.tree.map(lambda stack: stack[0], operands))


def _as_rows(
    x: Array, axes: "_Axes"
) -> tuple[Float[Array, "batch rows inner"], tuple[Any, ...]]:
    """An activation as stacks of rows, and the sizes of its batch axes and free axes.

    These are no integers where `jax.export` leaves them open.
    Example: x of (tokens, experts, in) with a batch axis of experts is (experts, tokens, in).
    """
    moved = x.transpose(*axes.batch, *axes.free, *axes.contracted)
    after_batch = len(axes.batch)
    after_free = after_batch + len(axes.free)
    rows = moved.reshape(
        math.prod(moved.shape[:after_batch]),
        math.prod(moved.shape[after_batch:after_free]),
        math.prod(moved.shape[after_free:]),
    )
    return rows, moved.shape[:after_free]


class _Axes(NamedTuple):
    """How the axes of x, and those of the product's result, are brought in order.

    Attributes:
        batch, free, contracted: the axes of x. The batch and contracted ones follow the order in
            which the weight stores their partners, because the weight is not moved.
        outer: the axes of the stored values that stay in the result, ascending.
        of_result: the transposition of (*batch, *free, *outer) to what `lax.dot_general` gives: the
            batch axes in the caller's order, then the free ones, then the outer ones in logical
            order.
    """

    batch: list[int]
    free: list[int]
    contracted: list[int]
    outer: list[int]
    of_result: list[int]


def _axes_of(
    x_ndim: int, stored: tuple[int, ...], dimensions: DimensionNumbers
) -> _Axes:
    """`_Axes` for an x of some rank and a weight whose logical axis i is stored as `stored[i]`."""
    (x_axes, w_axes), (x_batch, w_batch) = dimensions
    batch = _as_partners(x_batch, w_batch, stored)
    free = other_axes(x_ndim, x_axes, x_batch)
    logical = entries_at(stored, other_axes(len(stored), w_axes, w_batch))
    outer = sorted(logical)
    after_batch = len(batch)
    after_free = after_batch + len(free)
    of_result = [
        *map(batch.index, x_batch),
        *range(after_batch, after_free),
        *[after_free + outer.index(place) for place in logical],
    ]
    contracted = _as_partners(x_axes, w_axes, stored)
    return _Axes(batch, free, contracted, outer, of_result)


def _as_partners(
    x_axes: Sequence[int], w_axes: Sequence[int], stored: Sequence[int]
) -> list[int]:
    """Axes of x in the order in which the weight stores their partners."""
    partner = dict(zip(x_axes, w_axes, strict=True))
    return sorted(x_axes, key=lambda axis: stored[partner[axis]])


def _multiply(
    recipe: Recipe,
    rotation: int | None,
    rows: Array,
    matrix: Matrix,
    smoothing: Array | None,
    outliers: Outliers | None,
) -> Float[Array, "rows outputs"]:
    """rows @ W.T: rows are divided by `smoothing` and rotated, outliers then multiplied in float.

    The other channels are multiplied in the recipe's formats, with zeros where the outliers were.
    """
    rows = _as_quantized(rows, smoothing, rotation, recipe.activations)
    if outliers is None:
        return product(recipe, rows, matrix)
    # In float32, because XLA:CPU can not run a product of bfloat16 that is merged with a gather.
    large = rows[:, outliers.channels].astype(jnp.float32)
    rest = rows.at[:, outliers.channels].set(jnp.zeros((), rows.dtype))
    weight = outliers.weight.astype(jnp.float32)
    in_float = lax.dot_general(large, weight, LAST_AXES)
    return product(recipe, rest, matrix) + in_float


def _multiply_transposed(
    recipe: Recipe,
    rotation: int | None,
    rows: Array,
    matrix: Matrix,
    smoothing: Array | None,
    outliers: Outliers | None,
) -> Float[Array, "rows inner"]:
    """rows @ W, where `_multiply` is rows @ W.T: W's channels are outputs here.

    So outlier channels are outputs that are multiplied in float, and where the matrix holds Q W
    times `smoothing`, the outputs are rotated back, and divided by it.
    """
    out = transposed_product(recipe, rows, matrix)
    if outliers is not None:
        weight = outliers.weight.astype(jnp.float32)
        in_float = jnp.matmul(rows.astype(jnp.float32), weight)
        out = out.at[:, outliers.channels].set(in_float)
    if rotation is not None:
        out = rotated(out, rotation)
    return _smoothed(out, smoothing)


def _as_quantized(
    rows: Array,
    smoothing: Array | None,
    rotation: int | None,
    activations: Activations | None,
) -> Array:
    """What a product takes of rows: (X / s) Q, or without what there is not."""
    rows = _smoothed(rows, smoothing)
    if rotation is None:
        return rows
    # What is then rounded to int8 needs no more than bfloat16.
    return rotated(rows, rotation, exact=activations is None)


def _smoothed(rows: Array, smoothing: Array | None) -> Array:
    """X / s, or X where there is no smoothing at run time."""
    if smoothing is None:
        return rows
    return rows.astype(jnp.float32) / smoothing[None, :]


def check_contraction(
    weight: QuantWeight,
    w_axes: Sequence[int],
    w_batch: Sequence[int],
    where: str,
) -> None:
    """Checks that a weight was quantized for a matmul along these axes, and that int32 holds it.

    Args:
        weight: the quantized weight.
        w_axes: its logical axes that are contracted.
        w_batch: its logical batch axes.
        where: names the weight in errors.

    Raises:
        ValueError: the contracted axes are not stored last, or the batch axes not first; the
            contracted channels do not share a scale; an int32 sum could overflow.
    """
    tensor = weight.tensor
    if not _is_stored_for(tensor, w_axes, w_batch):
        asked = f"along its axes {tuple(w_axes)}"
        if w_batch:
            asked += f" in a batch along {tuple(w_batch)}"
        raise ValueError(
            f"{where}: contracted {asked}, but it was quantized for a contraction along "
            f"{_contracted(tensor)}; give this site a rule of None to keep it in float"
        )
    longest = math.prod(tensor.values.shape[tensor.ndim - len(w_axes) :])
    if tensor.group is not None and tensor.scale.shape[-1] > 1:
        # Each group has a sum of its own.
        longest = min(longest, tensor.group)
    if longest > LONGEST_CONTRACTION and not tensor.fmt.floating:
        raise ValueError(
            f"{where}: contracts {longest} channels; int32 sums are exact up to "
            f"{LONGEST_CONTRACTION}: split the contraction, or give this site weights in groups, "
            "as sqjax.Int8(group_size=128)"
        )


def _is_stored_for(
    tensor: QTensor, w_axes: Sequence[int], w_batch: Sequence[int]
) -> bool:
    """Whether the contracted axes are stored last and share their scales, the batch axes first."""
    contracted = sorted(entries_at(tensor.axes, w_axes))
    batch = sorted(entries_at(tensor.axes, w_batch))
    first = tensor.ndim - len(contracted)
    places = [*batch, *contracted]
    wanted = [*range(len(batch)), *range(first, tensor.ndim)]
    one_scale = math.prod(tensor.scale.shape[first:]) == 1
    return places == wanted and (one_scale or tensor.group is not None)


def _sums_over_outputs(
    tensor: QTensor, w_axes: Sequence[int], w_batch: Sequence[int]
) -> bool:
    """Whether the contracted axes are all outputs of a weight, and what stays are its channels.

    Example: w of (in, out), quantized for x @ w, in h @ w.T.
    """
    outer = other_axes(tensor.ndim, w_axes, w_batch)
    is_own = _is_stored_for(tensor, w_axes, w_batch)
    return bool(outer) and not is_own and _is_stored_for(tensor, outer, w_batch)


def _contracted(tensor: QTensor) -> tuple[int, ...]:
    """The logical axes along which elements share a scale, or have groups."""
    sizes = zip(tensor.scale.shape, tensor.values.shape, strict=True)
    shared = [scales < values for scales, values in sizes]
    return tuple(i for i, stored in enumerate(tensor.axes) if shared[stored])


def matrices(
    weight: QuantWeight, contracted: int, batch: int
) -> tuple[Matrix, Float[Array, "stack inner"] | None, Outliers | None]:
    """A weight as one stack of matrices: (`Matrix`, smoothing, outliers), all with the stack first.

    A weight that is stored as (2, 3, out, in) with two batch axes is a stack of 6 matrices (out,
    in); with no batch axes it is a stack of one, (2 * 3 * out, in). What all matrices share (one
    smoothing for a whole stack of layers) is repeated, because `vmap` then runs over everything.

    Args:
        weight: its contracted axes are stored last, its batch axes first.
        contracted: how many contracted axes.
        batch: how many batch axes.
    """
    tensor, values = weight.tensor, weight.tensor.values
    first = values.ndim - contracted
    batch_sizes, outer_sizes = values.shape[:batch], values.shape[batch:first]
    stack, outputs = math.prod(batch_sizes), math.prod(outer_sizes)
    inner = math.prod(values.shape[first:])

    def of_every_matrix(x: Any, *own: int) -> Any:
        """(stack, *own) of an array that each matrix has, or one for all."""
        return jnp.broadcast_to(x, (*batch_sizes, *own)).reshape(stack, *own)

    def stacked(scales: Any) -> Any:
        """Scales, or zero points, as (stack, outputs, groups)."""
        groups = scales.shape[first:]
        every = jnp.broadcast_to(scales, (*batch_sizes, *outer_sizes, *groups))
        return every.reshape(stack, outputs, math.prod(groups))

    def smoothing_of_every_matrix(s: Any) -> Any:
        shared = s.size == inner
        lead = () if shared else batch_sizes
        return of_every_matrix(s.reshape(*lead, inner), inner)

    changed = weight.with_tensor(
        tensor.map_scales(stacked),
        input_scale=of_every_matrix,
        smoothing=smoothing_of_every_matrix,
        channels=lambda x: of_every_matrix(x, x.shape[-1]),
        outlier_weight=lambda x: x.reshape(stack, outputs, x.shape[-1]),
    )
    matrix = Matrix(
        codes=values.reshape(stack, outputs, inner),
        zero=changed.tensor.zero,
        group_scale=changed.tensor.group_scale,
        scale=changed.tensor.scale,
        input_scale=changed.input_scale,
    )
    return matrix, changed.smoothing, changed.outliers


def quantized_ragged_dot(
    x: Float[Array, "rows inner"],
    weight: QuantWeight,
    group_sizes: Int[Array, " stack"],
    where: str,
) -> Float[Array, "rows outputs"]:
    """`lax.ragged_dot(x, weight, group_sizes)`: rows meet one matrix of a stack each.

    out = (q_x . q_w) * scale_x * scale_w in float32, the sum in int32. With group_sizes (2, 3) the
    first two rows meet the first matrix, the next three the second.

    Args:
        x: the rows, in the order of the matrices that they meet.
        weight: a stack of matrices, logically (stack, inner, outputs).
        group_sizes: how many rows meet each matrix.
        where: names the weight in errors.

    Raises:
        ValueError: as `quantized_dot_general`; or the weight is no such stack, has outlier
            channels, or has groups where activations are quantized.
    """
    weight.tensor.check(where)
    check_contraction(weight, (1,), (), where)
    has_groups = weight.tensor.scale.shape[-1] > 1
    problems = {
        "a ragged dot needs a stack of matrices; give this site a rule of None": (
            weight.tensor.axes != (0, 2, 1)
        ),
        "a ragged dot has no outlier channels; give this site a scheme without outliers": (
            weight.outliers is not None
        ),
        "a ragged dot of quantized activations takes weights per channel; give this site such a "
        "scheme": weight.activations is not None and has_groups,
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"{where}: {problem}")
    x = _as_quantized(x, weight.smoothing, weight.rotation, weight.activations)
    # Without its smoothing, by which x has been divided already.
    stack, _, _ = matrices(dataclasses.replace(weight, smoothing=None), 1, 1)
    return ragged_product(weight.recipe, x, stack, group_sizes)


def clipped_rows(
    x: Float[Array, "rows inner"],
    weight: QuantWeight,
    group_sizes: Int[Array, " stack"],
) -> Float[Array, ""]:
    """`clipped_values`, of the rows of `quantized_ragged_dot`."""
    if weight.activations != "static":
        return jnp.zeros((), jnp.float32)
    rows = x.shape[0]
    # A row has the scale of its matrix; rows beyond all groups have the last one's.
    scale = jnp.broadcast_to(weight.input_scale, group_sizes.shape)
    of_row = jnp.repeat(scale, group_sizes, total_repeat_length=rows)
    seen = _as_quantized(
        x, weight.smoothing, weight.rotation, weight.activations
    )
    return count_beyond(seen, of_row[:, None], weight.activation_format)
