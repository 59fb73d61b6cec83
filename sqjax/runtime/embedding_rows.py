"""Rows of a quantized embedding: narrow rows are gathered, and only these are dequantized."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax.program.gathers import rows_last
from sqjax.weights.quant_weight import Outliers, QuantWeight


def gathers_rows(
    equation: JaxprEqn, weight: QuantWeight, indices: Array
) -> bool:
    """Whether a gather reads whole rows of a table that is stored by rows, as `gathered` can."""
    tensor, numbers = weight.tensor, equation.params["dimension_numbers"]
    row = tensor.shape[1:]
    whole_rows = tuple(equation.params["slice_sizes"]) == (1, *row)
    # Stored otherwise, the elements of a row would lie apart and under other scales.
    stored_by_rows = tensor.axes == tuple(range(tensor.ndim))
    by_first_axis = tuple(numbers.start_index_map) == (0,)
    return (
        whole_rows
        and stored_by_rows
        and by_first_axis
        and rows_last(numbers, indices.ndim)
        and _fill_stays(equation, weight)
    )


def _fill_stays(equation: JaxprEqn, weight: QuantWeight) -> bool:
    """Whether dividing by the smoothing scales, or rotating, leaves the fill value as it is.

    Rows out of range are filled, and then divided as the others are: 0, NaN and infinity stay. Of
    these a rotation makes 0 and NaN.
    """
    if weight.smoothing is None and weight.rotation is None:
        return True
    fill = equation.params["fill_value"]
    if weight.rotation is not None and fill is not None and np.isinf(fill):
        return False
    # None: the gather's mode clips or wraps, so nothing is filled.
    return fill is None or fill == 0 or not np.isfinite(fill)


def gathered(equation: JaxprEqn, weight: QuantWeight, indices: Array) -> Array:
    """The rows that a gather reads, dequantized. A row out of range is 1 times the fill value.

    So the codes and integer scales of such a row are 1, its zero points 0, and its float scales the
    fill value, because integers have no NaN, the usual fill value of `jnp.take`.
    """
    tensor = weight.tensor
    scale = _rows(equation, weight, tensor.scale, indices)
    zero = _rows(equation, weight, tensor.zero, indices, fill=0)
    group_scale = _rows(equation, weight, tensor.group_scale, indices, fill=1)
    values = _rows(equation, weight, tensor.values, indices, fill=1)
    found = replace(
        tensor,
        values=values,
        scale=scale,
        zero=zero,
        group_scale=group_scale,
        order=(),
    )
    x = found.codes().astype(jnp.float32) * found.spread(found.scale)
    # The quantized weights of outlier channels are 0; their float weights are rows too.
    if weight.outliers is not None:
        kept = _rows(equation, weight, weight.outliers.weight, indices)
        x = _with_outliers(
            x,
            Outliers(weight.outliers.channels, kept),
            row_rank=tensor.ndim - 1,
        )
    # The tensor holds Q s W.
    x = weight.rotated_channels(x)
    if weight.smoothing is not None:
        lead = (1,) * (x.ndim - weight.smoothing.ndim)
        x = x / weight.smoothing.reshape(lead + weight.smoothing.shape)
    return x.astype(tensor.dtype)


def _rows(
    equation: JaxprEqn,
    weight: QuantWeight,
    x: Any,
    indices: Array,
    fill: int | None = None,
) -> Any:
    """The same gather from an array that has a row, or one row for all, of every row of the table.

    For example a table (1000, 64) in groups of 32 has scales of shape (1000, 2), of which rows of 2
    are gathered. `fill`: what rows out of range hold, in place of the equation's own value.
    """
    if x is None:
        return None
    table_rows, row = weight.shape[0], x.shape[1:]
    x = jnp.broadcast_to(x, (table_rows, *row))
    params = {**equation.params, "slice_sizes": (1, *row)}
    if fill is not None:
        params["fill_value"] = fill
    return equation.primitive.bind(x, indices, **params)


def _with_outliers(x: Array, outliers: Outliers, row_rank: int) -> Array:
    """Rows with their outlier channels, whose quantized weights are 0, set to the float weights."""
    # Outliers are counted along the flattened row.
    lead = x.shape[: x.ndim - row_rank]
    flat = x.reshape(*lead, -1)
    flat = flat.at[..., outliers.channels].set(
        outliers.weight.astype(jnp.float32)
    )
    return flat.reshape(x.shape)
