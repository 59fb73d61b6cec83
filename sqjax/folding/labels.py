"""Label arrays: which channel's scale each element of an array would carry.

The search asks whether an activation x could be x / s, with one scale s[c] for each channel c. It
writes the answer as one integer for each element of every variable that is concerned, the element's
*label*:

    0         the element stays as it is,
    +(c + 1)  the element is multiplied by s[c],
    -(c + 1)  the element is divided by s[c].

(c + 1 because 0 is taken, and because 0 has no sign.) Where y = r**2 is divided by s, r is divided
by the square root of s. So a label may mean a root: with c + 1 + (d - 1) * DEGREE in place of
c + 1 the element is scaled by the d-th root of s[c]. A *label array* holds the labels of one
variable and has the variable's rank. Along an axis on which the labels do not vary it has size 1,
because then its size does not depend on the number of tokens or layers.

Example: `y = (x * norm) @ w` with two channels. What the matmul reads, h = x * norm, of shape
(tokens, 2), shall be divided by s. The labels that make this lawful are

    h     [[-1, -2]]      divided by s[0], s[1] in every row: size 1 along the tokens
    norm  [-1, -2]        so the norm absorbs the scale
    w     [[+1], [+2]]    row c is multiplied by s[c]: size 1 along the output features
    x, y                  no labels: the function's input and output are what they were

This file holds the arithmetic of such arrays. Which primitive does what with them is said in
`moves` and `rules`.
"""

from collections.abc import Sequence

import numpy as np

from sqjax._shapes import Shape, runs, sizes_along

Labels = np.ndarray

#: What is added to a label for each degree of a root above 1: more than any group has channels.
DEGREE = 1 << 27
#: The highest degree whose labels an int32 holds.
HIGHEST_DEGREE = 15


def compress(labels: Labels) -> Labels:
    """Gives every axis along which the labels are constant the size 1: [[1, 2], [1, 2]] becomes
    [[1, 2]].
    """
    for axis in range(labels.ndim):
        first = labels[(slice(None),) * axis + (slice(0, 1),)]
        if (labels == first).all():
            labels = first
    return labels


def channels_and_degrees(labels: Labels) -> tuple[Labels, Labels]:
    """(c + 1, d) of labels that mean the d-th root of s[c]; (0, 1) where there is no label."""
    beyond_one = np.asarray(np.maximum(np.abs(labels) - 1, 0) // DEGREE)
    channels = np.asarray(np.abs(labels) - beyond_one * DEGREE)
    return channels, np.asarray(beyond_one + 1)


def root(labels: Labels, degree: int) -> Labels | None:
    """The labels of x, where x**degree has these; None where the root is of too high a degree."""
    _, degrees = channels_and_degrees(labels)
    if degrees.max(initial=1) * degree > HIGHEST_DEGREE:
        return None
    more = degrees * (degree - 1)
    return np.asarray(labels + np.sign(labels) * more * DEGREE)


def power(labels: Labels, exponent: int) -> Labels | None:
    """The labels of x**exponent; None where that would be a power of s, for which there is none.

    Example: the square of the square root of s[0] is s[0]; of s[0] itself there is no square.
    """
    channels, degrees = channels_and_degrees(labels)
    left, rest = np.divmod(degrees, exponent)
    if rest[labels != 0].any():
        return None
    return np.asarray(np.sign(labels) * (channels + (left - 1) * DEGREE))


def other_axes(ndim: int, axes: Sequence[int]) -> list[int]:
    """The axes of an array of this rank that are not among `axes`: of rank 3 and [1] these are [0,
    2].
    """
    return sorted(set(range(ndim)).difference(axes))


def varying_axes(labels: Labels) -> list[int]:
    """The axes along which labels differ (of a compressed array): of [[1, 2]] these are [1]."""
    return np.flatnonzero(np.greater(labels.shape, 1)).tolist()


def varies(labels: Labels, axes: Sequence[int]) -> bool:
    """Whether labels differ along any of `axes` (of a compressed array)."""
    return not set(varying_axes(labels)).isdisjoint(axes)


def take_axes(labels: Labels, axes: Sequence[int]) -> Labels:
    """The labels as an array of just `axes`, in that order; along the others they must not vary.

    Example: [[1], [2]] (shape (2, 1)) has the axis 0 only, so `take_axes(labels, [0])` is [1, 2].
    """
    others = other_axes(labels.ndim, axes)  # all of size 1
    first = labels.transpose(*axes, *others)
    return first.reshape(sizes_along(labels.shape, axes))


def put_axes(labels: Labels, axes: Sequence[int], ndim: int) -> Labels:
    """An array of rank `ndim` with the labels' axis i at `axes[i]`, constant along the others.

    Example: `put_axes([1, 2], [0], 2)` is [[1], [2]], and `put_axes([1, 2], [1], 2)` is [[1, 2]].
    """
    new_axes = (1,) * (ndim - labels.ndim)
    spread = labels.reshape(labels.shape + new_axes)
    if not labels.ndim:
        return spread
    return np.moveaxis(spread, range(labels.ndim), axes)


def reshape(labels: Labels, old: Shape, new: Shape) -> Labels:
    """Labels of an array of shape `old` after a reshape to `new`.

    The two shapes are taken apart into runs of axes with equal products. A run along which the
    labels are constant keeps the size 1; only the others are written out, because a reshape mixes
    their elements.

    Example: (5 tokens, 2 heads, 2) to (5, 4) has the runs 5 -> 5 and (2, 2) -> 4. Labels [[[1],
    [2]]], one a head, are constant along the tokens but not along the heads, and become [[1, 1, 2,
    2]].
    """
    if 0 in old:
        return np.zeros((1,) * len(new), int)  # there is no element to label
    written_out, target = np.array(old, int), np.array(new, int)
    for sources, targets in runs(old, new):
        if not varies(labels, sources):
            written_out[sources] = 1
            target[targets] = 1
    return compress(np.broadcast_to(labels, written_out).reshape(target))


def changed_axes(old: Shape, new: Shape) -> list[int]:
    """The axes along which two shapes of one rank differ."""
    return np.flatnonzero(np.not_equal(old, new)).tolist()


def pad(
    labels: Labels, padding: Sequence[tuple[int, int, int]], old: Shape
) -> Labels:
    """The labels after padding by (before, after, between) along every axis: none where there is
    padding.

    Example: [1, 2] padded by (1, 0, 1) gives [0, 1, 0, 2].
    """
    before, after, between = np.array(padding, int).reshape(-1, 3).T
    padded = (before + after + between) > 0
    # Along the other axes the labels keep the size that they have.
    full_shape = np.where(padded, np.array(old, int), labels.shape)
    gaps = np.maximum(full_shape - 1, 0)
    result = np.zeros(before + full_shape + gaps * between + after, int)
    inside = _inside(padding, np.flatnonzero(padded).tolist(), old)
    result[inside] = np.broadcast_to(labels, full_shape)
    return result


def unpad(
    labels: Labels, padding: Sequence[tuple[int, int, int]], old: Shape
) -> Labels:
    """The labels of what was padded, of shape `old`, to give something with these labels."""
    return compress(labels[_inside(padding, varying_axes(labels), old)])


def _inside(
    padding: Sequence[tuple[int, int, int]], axes: Sequence[int], old: Shape
) -> tuple[slice, ...]:
    """The index, along `axes`, of the original elements in a padded array.

    For example 2 elements, padded by (1, 0, 1): one before, none after, one between each two, are
    at positions 1 and 3 of 4, which is slice(1, 4, 2).
    """
    index = [slice(None)] * len(old)
    for a in axes:
        before, _, between = padding[a]
        step = between + 1
        last = before + (old[a] - 1) * step
        index[a] = slice(before, last + 1, step)
    return tuple(index)


def split(labels: Labels, axis: int, sizes: Sequence[int]) -> list[Labels]:
    """The labels of the pieces of a split: [1, 2, 3] split into sizes 1 and 2 gives [1] and [2,
    3].
    """
    if labels.shape[axis] == 1:
        return [labels] * len(sizes)
    ends = np.cumsum(sizes)[:-1]
    return list(map(compress, np.split(labels, ends, axis)))


def concatenate(
    pieces: Sequence[Labels], axis: int, sizes: Sequence[int]
) -> Labels:
    """The labels of a concatenation of pieces that have `sizes` along `axis`: [1] and [0] of sizes
    1, 2: [1, 0, 0].
    """
    # Along the other axes a piece may have size 1 where another one has not.
    firsts = [piece.take([0], axis).shape for piece in pieces]
    shape = np.broadcast_shapes(*firsts)
    full = []
    for piece, size in zip(pieces, sizes, strict=True):
        piece_shape = (*shape[:axis], size, *shape[axis + 1 :])
        full.append(np.broadcast_to(piece, piece_shape))
    return compress(np.concatenate(full, axis))
