"""Slices and reshapes of a `QuantWeight`: the tensor, and the arrays that belong to its matrices.

A weight may be a stack of matrices (layers, experts). Its values are stored with the batch axes
(those of the stack) first, then the outputs, then the contracted channels. Beside the tensor it may
have arrays for each matrix:

    values           (*batch, *outputs, *channels)
    input_scale      (*batch,), or () for all matrices
    smoothing        (*batch, *channels), or (*channels,) for all
    outliers.channels (*batch, n), or (n,) for all
    outliers.weight  (*batch, *outputs, n)
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight


def sliced(weight: QuantWeight, slices: Sequence[slice]) -> QuantWeight | None:
    """Part of the outputs, or of a stack of matrices; None for part of the contracted channels.

    For example, three layers of (16, 8) with static scales are of logical shape (3, 16, 8) and have
    an `input_scale` of shape (3,). The slices [1:2, :, :4] leave one layer with 4 outputs, and
    `input_scale[1:2]`.

    Args:
        weight: the weight.
        slices: one for each logical axis.
    """
    tensor = weight.tensor.slice(slices)
    # In the order of the stored axes, which the other arrays' axes follow.
    stored = weight.tensor.as_stored(slices)
    if tensor is None or not _whole_channels(weight, stored):
        return None

    def of_lead(x: Any, own: int) -> Any:
        """Slices the first axes of an array, as those of the values; its last `own` axes stay."""
        return x[tuple(stored[: x.ndim - own])]

    return weight.with_tensor(
        tensor,
        input_scale=lambda x: of_lead(x, 0),
        smoothing=lambda x: of_lead(x, weight.contracted),
        channels=lambda x: of_lead(x, 1),
        outlier_weight=lambda x: of_lead(x, 1),
    )


def _whole_channels(weight: QuantWeight, stored: Sequence[slice]) -> bool:
    """Whether slices of the stored axes take all of the contracted channels."""
    first = weight.ndim - weight.contracted
    sizes = weight.tensor.values.shape[first:]
    pairs = zip(sizes, stored[first:], strict=True)
    return all(len(range(size)[taken]) == size for size, taken in pairs)


def reshaped(weight: QuantWeight, shape: tuple[int, ...]) -> QuantWeight | None:
    """The logical reshape, or None if it would mix the channels with other axes.

    For example an attention projection (16, 2, 8) of 16 channels to 2 heads of 8, stored as (2, 8,
    16), becomes (16, 16), stored as (16, 16): heads and their channels are outputs both. It can not
    become (32, 8), because a row of that has channels of two rows.
    """
    tensor = weight.tensor.reshape(shape)
    batch = _batch_axes(weight, shape)
    if tensor is None or batch is None:
        return None
    channels = math.prod(
        weight.tensor.values.shape[weight.ndim - weight.contracted :]
    )
    # The channels are stored last, so they must be whole axes at the end of the new shape.
    contracted = _axes_holding(channels, tensor.values.shape)
    if contracted is None:
        return None
    return _with_batch_axes(weight, tensor, batch, contracted)


def _batch_axes(
    weight: QuantWeight, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The batch axes of the per-matrix arrays (scales, smoothing, outliers) after a reshape.

    () for a single matrix. None if the reshape does more to a stack of several matrices than to add
    and remove axes of size 1. `QTensor.reshape` stores those first, so there they are put here.

    For example three layers of (16, 8) have smoothing of shape (3, 16). As (1, 3, 16, 8), or as (3,
    16, 1, 8), they are stored as (1, 3, 8, 16), so the batch axes are (1, 3) and the smoothing is
    reshaped to (1, 3, 16). As (3, 128) they have no such axes.
    """
    stack = weight.tensor.values.shape[: _batch_rank(weight)]
    several = _without_ones(stack)
    if not several:
        return ()
    # Merging the axes of two layers, or splitting one, would leave no axis that counts matrices.
    if _without_ones(weight.shape) != _without_ones(shape):
        return None
    ones = (1,) * shape.count(1)
    return (*ones, *several)


def _batch_rank(weight: QuantWeight) -> int:
    """How many batch axes the per-matrix arrays have; one that is shared by all matrices has 0."""
    ranks = [0]
    if weight.input_scale is not None:
        ranks.append(weight.input_scale.ndim)
    if weight.smoothing is not None:
        ranks.append(weight.smoothing.ndim - weight.contracted)
    if weight.outliers is not None:
        ranks.append(weight.outliers.channels.ndim - 1)
    return max(ranks)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _axes_holding(channels: int, shape: tuple[int, ...]) -> int | None:
    """How many of the last axes hold so many channels: the fewest; None if no number of axes does.

    For example the last 2 axes of (8, 4, 4) hold 16 channels, and no last axes of it hold 8.
    """
    count = 1
    while math.prod(shape[len(shape) - count :]) < channels:
        count += 1
    return count if math.prod(shape[len(shape) - count :]) == channels else None


def _with_batch_axes(
    weight: QuantWeight,
    tensor: QTensor,
    batch: tuple[int, ...],
    contracted: int,
) -> QuantWeight:
    """The weight with a reshaped tensor, and its other arrays reshaped to fit."""
    first = tensor.ndim - contracted
    outer, channels = tensor.values.shape[:first], tensor.values.shape[first:]

    def of_matrices(scale: Any) -> Any:
        # One scale for all matrices stays a scalar, however many batch axes there are.
        return scale.reshape(batch) if scale.ndim else scale

    def of_channels(smoothing: Any) -> Any:
        # A convolution's s has an entry for every channel, but none for the taps of its window.
        own = smoothing.shape[smoothing.ndim - weight.contracted :]
        if math.prod(own) == math.prod(channels):
            return smoothing.reshape(*batch, *channels)
        ones = (1,) * (contracted - 1)
        return smoothing.reshape(*batch, *ones, own[-1])

    changed = weight.with_tensor(
        tensor,
        input_scale=of_matrices,
        smoothing=of_channels,
        channels=lambda x: x.reshape(*batch, x.shape[-1]),
        outlier_weight=lambda x: x.reshape(*outer, x.shape[-1]),
    )
    return replace(changed, contracted=contracted)
