"""Primitives that move data: what they do to the label array of their operand, and how that is
undone.

Such a primitive makes every element of its result from elements of its first operand that all carry
one label, and the element of the result carries that label too. So the labels of the operand give
those of the result (`MOVES`, forwards), and the labels of the result give those of the operand
(`UNDO`, backwards). Backwards may have to *tie* channels: where one element of the operand is read
at several places of the result, the labels there must be one.

Example: y = broadcast_in_dim(x) from shape (2, 1) to (2, 3), along axis 1.

    forwards   x [[1], [2]]                  gives y [[1], [2]], of size 1 along axis 1
    backwards  y [[1, 2, 3]]                 gives x [[1]], with channels 0, 1 and 2 tied: they
    share one scale
"""

from collections.abc import Callable, Sequence

import numpy as np

from sqjax._shapes import Shape, sizes_along
from sqjax.folding.labels import (
    Labels,
    changed_axes,
    compress,
    other_axes,
    put_axes,
    reshape,
    take_axes,
    varies,
    varying_axes,
)
from sqjax.program.primitives import IDENTITIES, RUNNING

#: Ties all labels along some axes of a label array, which get size 1.
Tie = Callable[[Labels, Sequence[int]], Labels]

# Forwards: the operand's labels to the result's
# ---------------------------------------------------------------------


def _same(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return labels


def _transpose(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return labels.transpose(params["permutation"])


def _reshape(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    # Old programs may say in which order the axes are read.
    order = params.get("dimensions")
    if order is None:
        return reshape(labels, old, new)
    return reshape(labels.transpose(order), sizes_along(old, order), new)


def _squeeze(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return labels.squeeze(tuple(params["dimensions"]))


def _broadcast(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return put_axes(labels, params["broadcast_dimensions"], len(new))


def _slice(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    index, kept = [slice(None)] * len(old), _slices(params)
    for a in varying_axes(labels):  # the others have size 1 before and after
        index[a] = kept[a]
    return compress(labels[tuple(index)])


def _reverse(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return np.flip(labels, params["dimensions"])


def _running(
    labels: Labels, params: dict, old: Shape, new: Shape
) -> Labels | None:
    """Running sums and maxima: they combine elements along one axis, which must carry one label."""
    return None if varies(labels, [params["axis"]]) else labels


def _transform(
    labels: Labels, params: dict, old: Shape, new: Shape
) -> Labels | None:
    """A Fourier transform is linear, and mixes the elements along its axes."""
    return None if varies(labels, _transformed_axes(params, old)) else labels


def _tile(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    times = np.where(np.greater(labels.shape, 1), params["reps"], 1)
    return np.tile(labels, times)


def _dynamic_slice(
    labels: Labels, params: dict, old: Shape, new: Shape
) -> Labels | None:
    """A slice that starts who knows where: lawful where the labels are the same wherever it
    starts.
    """
    return None if varies(labels, changed_axes(old, new)) else labels


def _gather(
    labels: Labels, params: dict, old: Shape, new: Shape
) -> Labels | None:
    """Rows chosen by indices: labels along the axes that are taken whole.

    An index out of range gives `fill_value`, which no scale reaches. So only 0 and NaN will do,
    because they are the same at any scale.
    """
    fill = params["fill_value"]
    if fill not in (None, 0) and not np.isnan(fill):
        return None
    whole = _whole_axes(params, old)
    if varies(labels, other_axes(len(old), list(whole))):
        return None
    moved = take_axes(labels, list(whole))
    return put_axes(moved, list(whole.values()), len(new))


#: Every movement by its primitive's name: (the operand's labels, the equation's parameters, the
#: operand's shape, the result's shape) -> the result's labels. None: not with labels like these.
MOVES: dict[str, Callable[[Labels, dict, Shape, Shape], Labels | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": _reverse,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "tile": _tile,
    "fft": _transform,
    **dict.fromkeys(RUNNING, _running),
    **dict.fromkeys(IDENTITIES, _same),
    # A result in another dtype, or of another sign, is divided by s > 0 where the operand is. So is
    # the real part of a complex number.
    **dict.fromkeys(
        ("convert_element_type", "reduce_precision", "neg", "abs"), _same
    ),
    **dict.fromkeys(("real", "imag"), _same),
}


# Backwards: the result's labels to the operand's
# --------------------------------------------------------------------


def _undo_same(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    return labels


def _undo_transpose(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    return labels.transpose(np.argsort(params["permutation"]))


def _undo_reshape(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    order = params.get("dimensions")
    if order is None:
        return reshape(labels, new, old)
    transposed = reshape(labels, new, sizes_along(old, order))
    return transposed.transpose(np.argsort(order))


def _undo_squeeze(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    return np.expand_dims(labels, tuple(params["dimensions"]))


def _undo_broadcast(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    axes = params["broadcast_dimensions"]
    copied = [b for a, b in enumerate(axes) if old[a] == new[b]]
    return take_axes(tie(labels, other_axes(len(new), copied)), axes)


def _undo_slice(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    """What was sliced off carries no labels."""
    shape, index = list(labels.shape), [slice(None)] * len(old)
    for a, kept in enumerate(_slices(params)):
        if len(range(old[a])[kept]) != old[a]:
            shape[a], index[a] = old[a], kept
    full = np.zeros(shape, int)
    full[tuple(index)] = labels
    return full


def _undo_reverse(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    return np.flip(labels, params["dimensions"])


def _undo_running(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    return tie(labels, [params["axis"]])


def _undo_transform(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    return tie(labels, _transformed_axes(params, old))


def _undo_tile(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    """All copies of an element carry one label.

    As (copies, size) for each axis, the copies lie along the even axes.
    """
    copies = np.stack([params["reps"], old], axis=1).ravel().tolist()
    even = tuple(range(0, len(copies), 2))
    return tie(reshape(labels, new, tuple(copies)), even).squeeze(even)


def _undo_dynamic_slice(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    return tie(labels, changed_axes(old, new))


def _undo_gather(
    labels: Labels, params: dict, old: Shape, new: Shape, tie: Tie
) -> Labels:
    whole = _whole_axes(params, old)
    # A row may be read by several indices, or by none, so all rows share their labels.
    result_axes = list(whole.values())
    tied = tie(labels, other_axes(len(new), result_axes))
    return put_axes(take_axes(tied, result_axes), list(whole), len(old))


#: The inverse of every entry of `MOVES`: (the result's labels, the equation's parameters, the
#: operand's shape, the result's shape, what ties labels along axes) -> the operand's labels.
UNDO: dict[str, Callable[[Labels, dict, Shape, Shape, Tie], Labels]] = {
    **dict.fromkeys(MOVES, _undo_same),
    "transpose": _undo_transpose,
    "reshape": _undo_reshape,
    "squeeze": _undo_squeeze,
    "broadcast_in_dim": _undo_broadcast,
    "slice": _undo_slice,
    "rev": _undo_reverse,
    "dynamic_slice": _undo_dynamic_slice,
    "gather": _undo_gather,
    "tile": _undo_tile,
    "fft": _undo_transform,
    **dict.fromkeys(RUNNING, _undo_running),
}


# What the parameters of an equation say
# -----------------------------------------------------------------------------


def _slices(params: dict) -> list[slice]:
    """What a `slice` keeps of every axis."""
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)
    return list(map(slice, starts, limits, strides))


def _transformed_axes(params: dict, old: Shape) -> list[int]:
    """The axes of a Fourier transform: the last ones."""
    return list(range(len(old) - len(params["fft_lengths"]), len(old)))


def scattered_axes(
    params: dict, operand: Shape, updates: Shape
) -> dict[int, int]:
    """{axis of the operand: axis of the updates} of the axes that a scatter writes whole.

    Example: zeros((5, 4)).at[ids].set(x) with x of shape (3, 4) writes the axis 1 of the operand
    whole, which is the axis 1 of x, and the axis 0 at the indices.
    """
    numbers = params["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = other_axes(len(operand), gone)
    chosen = numbers.scatter_dims_to_operand_dims
    whole = {}
    for a, b in zip(windows, numbers.update_window_dims, strict=True):
        if operand[a] == updates[b] and a not in chosen:
            whole[a] = b
    return whole


def _whole_axes(params: dict, old: Shape) -> dict[int, int]:
    """{axis of the operand: axis of the result} for the axes that a gather takes whole.

    Example: x[:, ids] of x with shape (2, 3, 4) and one index takes axes 0 and 2 whole, and reads
    axis 1 at the index.
    """
    numbers = params["dimension_numbers"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = other_axes(len(old), gone)
    sizes = params["slice_sizes"]
    whole = {}
    for a, b in zip(windows, numbers.offset_dims, strict=True):
        if sizes[a] == old[a] and a not in numbers.start_index_map:
            whole[a] = b
    return whole
