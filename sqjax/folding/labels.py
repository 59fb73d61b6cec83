"""Label arrays: which channel's scale each element of an array would carry.

A label array belongs to a variable and has its rank. Element 0 means "no scale"; +(c + 1) means "multiplied by the
scale of channel c", -(c + 1) "divided by it". An axis along which labels do not vary has size 1, so that label arrays
stay tiny however large the arrays they describe.
"""

from collections.abc import Callable, Sequence

import numpy as np

from sqjax._shapes import runs
from sqjax.program.primitives import IDENTITIES, RUNNING

Labels = np.ndarray
Shape = tuple[int, ...]


def compress(labels: Labels) -> Labels:
    """Gives every axis along which the labels are constant the size 1."""
    for axis, size in enumerate(labels.shape):
        if size > 1:
            first = labels[(slice(None),) * axis + (slice(0, 1),)]
            if (labels == first).all():
                labels = first
    return labels


def varies(labels: Labels, axes: Sequence[int]) -> bool:
    """Whether labels differ along any of `axes` (of a compressed array)."""
    return any(labels.shape[a] > 1 for a in axes)


def take_axes(labels: Labels, axes: Sequence[int]) -> Labels:
    """The labels as an array of just `axes`, in that order; along the others they must not vary."""
    others = [a for a in range(labels.ndim) if a not in axes]
    return labels.transpose(*axes, *others).reshape([labels.shape[a] for a in axes])


def put_axes(labels: Labels, axes: Sequence[int], ndim: int) -> Labels:
    """An array of rank `ndim` with the labels' axis i at `axes[i]`, constant along the others."""
    spread = labels.reshape(labels.shape + (1,) * (ndim - labels.ndim))
    return np.moveaxis(spread, range(labels.ndim), axes) if labels.ndim else spread


def reshape(labels: Labels, old: Shape, new: Shape) -> Labels:
    """Labels of an array of shape `old` after a reshape to `new`; only axes along which labels vary are written out."""
    if 0 in old:
        return np.zeros((1,) * len(new), int)  # nothing to label
    full, target = list(old), list(new)
    for sources, targets in runs(old, new):
        if all(labels.shape[a] == 1 for a in sources):
            for a in sources:
                full[a] = 1
            for a in targets:
                target[a] = 1
    return compress(np.broadcast_to(labels, full).reshape(target))


def _keep(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return labels


def _transpose(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return labels.transpose(params["permutation"])


def _reshape(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    if (order := params.get("dimensions")) is not None:
        labels, old = labels.transpose(order), tuple(old[a] for a in order)
    return reshape(labels, old, new)


def _squeeze(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return labels.squeeze(tuple(params["dimensions"]))


def _broadcast(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return put_axes(labels, params["broadcast_dimensions"], len(new))


def _slice(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    strides = params["strides"] or (1,) * len(old)
    cuts = zip(params["start_indices"], params["limit_indices"], strides, labels.shape, strict=True)
    return compress(
        labels[tuple(slice(a, b, c) if size > 1 else slice(None) for a, b, c, size in cuts)]
    )


def _reverse(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels:
    return np.flip(labels, params["dimensions"])


def _running(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels | None:
    """Running sums and maxima, along an axis on which labels do not vary."""
    return None if varies(labels, [params["axis"]]) else labels


def _dynamic_slice(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels | None:
    """A slice that starts who knows where, along axes on which labels do not vary."""
    return None if varies(labels, changed_axes(old, new)) else labels


def changed_axes(old: Shape, new: Shape) -> list[int]:
    """The axes along which two shapes differ."""
    return [a for a, (m, n) in enumerate(zip(old, new, strict=True)) if m != n]


def gathered_axes(params: dict, old: Shape) -> list[tuple[int, int]]:
    """(axis of the operand, axis of the result) for the axes that a gather takes whole."""
    numbers = params["dimension_numbers"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = zip([a for a in range(len(old)) if a not in gone], numbers.offset_dims, strict=True)
    return [
        (a, b)
        for a, b in windows
        if params["slice_sizes"][a] == old[a] and a not in numbers.start_index_map
    ]


def _gather(labels: Labels, params: dict, old: Shape, new: Shape) -> Labels | None:
    """Rows chosen by indices: labels along the axes that are taken whole. Out of range is 0 or NaN at any scale."""
    whole = gathered_axes(params, old)
    if params["fill_value"] not in (None, 0) and not np.isnan(params["fill_value"]):
        return None
    if varies(labels, [a for a in range(len(old)) if a not in [x for x, _ in whole]]):
        return None
    moved = take_axes(labels, [a for a, _ in whole])
    return put_axes(moved, [b for _, b in whole], len(new))


#: Primitives that move the data of their first operand: what they do to its label array, given (labels, the
#: equation's parameters, the operand's shape, the result's shape). None: not with labels like these.
MOVES: dict[str, Callable[[Labels, dict, Shape, Shape], Labels | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": _reverse,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    **dict.fromkeys(RUNNING, _running),
    **dict.fromkeys((*IDENTITIES, "neg", "abs", "convert_element_type", "reduce_precision"), _keep),
}


def pad(labels: Labels, padding: Sequence[tuple[int, int, int]], old: Shape) -> Labels:
    """The labels after padding by (before, after, between) along every axis: none where there is padding."""
    padded = [a for a, widths in enumerate(padding) if any(widths)]
    full = np.broadcast_to(
        labels, [n if a in padded else labels.shape[a] for a, n in enumerate(old)]
    )
    shape = [_padded(n, padding[a]) if a in padded else n for a, n in enumerate(full.shape)]
    result = np.zeros(shape, int)
    result[_kept(padding, padded, full.shape)] = full
    return result


def unpad(labels: Labels, padding: Sequence[tuple[int, int, int]], old: Shape) -> Labels:
    """The labels of what was padded to give something with these labels."""
    varying = [a for a, n in enumerate(labels.shape) if n > 1]
    return compress(labels[_kept(padding, varying, old)])


def _padded(size: int, widths: tuple[int, int, int]) -> int:
    before, after, between = widths
    return before + size + max(size - 1, 0) * between + after


def _kept(
    padding: Sequence[tuple[int, int, int]], axes: Sequence[int], old: Shape
) -> tuple[slice, ...]:
    def along(axis: int) -> slice:
        before, _, between = padding[axis]
        return slice(before, before + (old[axis] - 1) * (between + 1) + 1, between + 1)

    return tuple(along(a) if a in axes else slice(None) for a in range(len(old)))


def split(labels: Labels, axis: int, sizes: Sequence[int]) -> list[Labels]:
    """The labels of the pieces of a split."""
    if labels.shape[axis] == 1:
        return [labels] * len(sizes)
    return [compress(piece) for piece in np.split(labels, np.cumsum(sizes)[:-1], axis)]


def concatenate(pieces: Sequence[Labels], axis: int, sizes: Sequence[int]) -> Labels:
    """The labels of a concatenation of pieces that have `sizes` along `axis`."""
    shape = list(np.broadcast_shapes(*([*p.shape[:axis], 1, *p.shape[axis + 1 :]] for p in pieces)))
    full = [
        np.broadcast_to(p, [*shape[:axis], n, *shape[axis + 1 :]])
        for p, n in zip(pieces, sizes, strict=True)
    ]
    return compress(np.concatenate(full, axis))
