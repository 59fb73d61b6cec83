"""Products that are summed up, in a prime field: matmuls, convolutions, windows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from numpy.lib.stride_tricks import sliding_window_view

from sqjax._shapes import other_axes, sizes_along
from sqjax.numerics.prime_field import (
    Residues,
    character,
    matmul,
    neg,
    sub,
    total,
)
from sqjax.proving.values import (
    Field,
    Rule,
    Value,
    factor_of,
    residues_of,
    unknown,
)


def _dot(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    x, y = (factor_of(equation, operand) for operand in operands)
    return [Field(_contracted(equation.params["dimension_numbers"], x, y))]


def _contracted(numbers: Any, x: Residues, y: Residues) -> Residues:
    """A dot_general with these dimension numbers: (batch, free of x, free of y)."""
    (of_x, of_y), (batch_x, batch_y) = numbers
    free_x = other_axes(x.ndim, of_x, batch_x)
    free_y = other_axes(y.ndim, of_y, batch_y)
    batch = sizes_along(x.shape, batch_x)
    rows, columns = sizes_along(x.shape, free_x), sizes_along(y.shape, free_y)
    terms = _size(sizes_along(x.shape, of_x))
    count = (_size(batch),) if batch else ()
    left = x.transpose(*batch_x, *free_x, *of_x)
    right = y.transpose(*batch_y, *of_y, *free_y)
    product = matmul(
        left.reshape(*count, _size(rows), terms),
        right.reshape(*count, terms, _size(columns)),
    )
    return product.reshape((*batch, *rows, *columns))


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=int))


def _ragged_dot(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    """Runs of rows, each of which meets a matrix of its own; rows after the last run are 0."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (of_x, of_y), (batch_x, _) = numbers.dot_dimension_numbers
    [ragged] = numbers.lhs_ragged_dimensions
    x, y, sizes = operands
    rows, stack = factor_of(equation, x), factor_of(equation, y)
    groups = tuple(numbers.rhs_group_dimensions)
    if batch_x or ragged in of_x or len(groups) != 1:
        raise unknown(equation, "one along other axes than rows")
    kept = other_axes(stack.ndim, groups)
    inner = (tuple(of_x), tuple(map(kept.index, of_y))), ((), ())
    place = other_axes(rows.ndim, of_x).index(ragged)
    parts, first = [], 0
    # One run more, of the rows that are left, whose products are 0.
    lengths = [*np.asarray(sizes).tolist(), rows.shape[ragged]]
    for number, length in enumerate(lengths):
        last = min(first + length, rows.shape[ragged])
        run = rows.take(range(first, last), ragged)
        matrix = stack.take(number % stack.shape[groups[0]], groups[0])
        made = _contracted(inner, run, matrix)
        parts.append(made if number < len(lengths) - 1 else made * np.uint32(0))
        first = last
    return [Field(np.concatenate(parts, place))]


# Windows ------------------------------------------------------------------------------------------


def _spread(
    x: np.ndarray, padding: Sequence[tuple[int, int, int]]
) -> np.ndarray:
    """Zeros before, after and between the elements of every axis; jax also takes some away."""
    zero = np.zeros((), x.dtype)
    return np.asarray(lax.pad(x, zero, padding))


def _windows(
    x: np.ndarray,
    sizes: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> np.ndarray:
    """All windows over all axes: (*where the window is, *within the window)."""
    wide = [(n - 1) * d + 1 for n, d in zip(sizes, dilation, strict=True)]
    views = sliding_window_view(x, wide)
    where = tuple(slice(None, None, step) for step in strides)
    within = tuple(slice(None, None, step) for step in dilation)
    return views[where + within]


def _convolve(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    """Every window of the image as a row, times the kernel as a matrix."""
    params = equation.params
    if params["batch_group_count"] != 1:
        raise unknown(equation, "one with groups along the batch")
    of_x, of_kernel, of_y = params["dimension_numbers"]
    x, kernel = (factor_of(equation, operand) for operand in operands)
    x, kernel = x.transpose(of_x), kernel.transpose(of_kernel)
    groups = params["feature_group_count"]
    between = [(0, 0, 0), (0, 0, 0)]
    for (before, after), step in zip(
        params["padding"], params["lhs_dilation"], strict=True
    ):
        between.append((before, after, step - 1))
    window = kernel.shape[2:]
    views = _windows(
        _spread(x, between),
        (1, 1, *window),
        (1, 1, *params["window_strides"]),
        (1, 1, *params["rhs_dilation"]),
    )
    batch, channels, *where = views.shape[: 2 + len(window)]
    views = views.reshape(batch, channels, _size(where), _size(window))
    parts = []
    per, made = channels // groups, kernel.shape[0] // groups
    for g in range(groups):
        own = views[:, g * per : (g + 1) * per].swapaxes(1, 2)
        rows = own.reshape(batch * _size(where), per * _size(window))
        matrix = kernel[g * made : (g + 1) * made].reshape(made, -1)
        parts.append(matmul(rows, matrix.T))
    result = np.concatenate(parts, -1).reshape(batch, *where, -1)
    return [Field(np.moveaxis(result, -1, 1).transpose(np.argsort(of_y)))]


def _pooled_windows(
    params: dict[str, Any], x: np.ndarray
) -> tuple[np.ndarray, int]:
    """(windows, how many of their last axes are within)."""
    between = [
        (before, after, step - 1)
        for (before, after), step in zip(
            params["padding"], params["base_dilation"], strict=True
        )
    ]
    sizes = params["window_dimensions"]
    strides, dilation = params["window_strides"], params["window_dilation"]
    return _windows(_spread(x, between), sizes, strides, dilation), x.ndim


def _sum_pool(
    equation: JaxprEqn, operands: Sequence[Value], seed: int
) -> list[Value]:
    views, count = _pooled_windows(equation.params, residues_of(operands[0]))
    return [Field(total(views, range(count, 2 * count)))]


def _max_pool(
    sign: Callable[[Residues], Residues],
    equation: JaxprEqn,
    operands: Sequence[Value],
    seed: int,
) -> list[Value]:
    """The largest of each window: each element is compared with the largest one before it.

    Padding is no element.
    """
    x = sign(residues_of(operands[0]))
    views, count = _pooled_windows(equation.params, x)
    of_array, _ = _pooled_windows(equation.params, np.ones(x.shape, np.uint32))
    elements = views.reshape(*views.shape[:count], -1)
    present = of_array.reshape(elements.shape) > 0
    best, any_yet = elements[..., 0], present[..., 0]
    for k in range(1, elements.shape[-1]):
        element, here = elements[..., k], present[..., k]
        larger = character(sub(element, best)) > 0
        best = np.where(here & (larger | ~any_yet), element, best)
        any_yet = any_yet | here
    return [Field(sign(best))]


PRODUCTS: dict[str, Rule] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolve,
    "reduce_window_sum": _sum_pool,
    "reduce_window_max": partial(_max_pool, lambda x: x),
    "reduce_window_min": partial(_max_pool, neg),
}
