"""Label arrays: which channel's scale each element of an array would carry.

A label array belongs to a variable and has its rank. Element 0 means "no scale"; +(c + 1) means "multiplied by the
scale of channel c", -(c + 1) "divided by it". An axis along which labels do not vary has size 1, so that label arrays
stay tiny however large the arrays they describe.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

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
    """Labels of an array of shape `old` after a reshape to `new`.

    The shapes are cut into the shortest runs of axes with equal products; only runs in which labels vary are
    written out in full.
    """
    if 0 in old:
        return np.zeros((1,) * len(new), int)  # nothing to label
    full: list[int] = []
    target: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[i0:i])) != (b := math.prod(new[j0:j])):
            if a < b:
                i += 1
            else:
                j += 1
        varying = any(labels.shape[k] > 1 for k in range(i0, i))
        full += old[i0:i] if varying else (1,) * (i - i0)
        target += new[j0:j] if varying else (1,) * (j - j0)
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
    return compress(labels[tuple(slice(a, b, c) if size > 1 else slice(None) for a, b, c, size in cuts)])


#: Primitives with one operand that only move data: what they do to a label array, given (labels, the equation's
#: parameters, the operand's shape, the result's shape).
MOVES: dict[str, Callable[[Labels, dict, Shape, Shape], Labels]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "convert_element_type": _keep,
    "copy": _keep,
    "copy_p": _keep,
    "neg": _keep,
    "sharding_constraint": _keep,
    "name": _keep,
    "stop_gradient": _keep,
}


def split(labels: Labels, axis: int, sizes: Sequence[int]) -> list[Labels]:
    """The labels of the pieces of a split."""
    if labels.shape[axis] == 1:
        return [labels] * len(sizes)
    return [compress(piece) for piece in np.split(labels, np.cumsum(sizes)[:-1], axis)]


def concatenate(pieces: Sequence[Labels], axis: int, sizes: Sequence[int]) -> Labels:
    """The labels of a concatenation of pieces that have `sizes` along `axis`."""
    shape = list(np.broadcast_shapes(*([*p.shape[:axis], 1, *p.shape[axis + 1 :]] for p in pieces)))
    full = [np.broadcast_to(p, [*shape[:axis], n, *shape[axis + 1 :]]) for p, n in zip(pieces, sizes, strict=True)]
    return compress(np.concatenate(full, axis))
