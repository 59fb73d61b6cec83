"""Channels of a weight: which of its axes they lie along, and numbers for each of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Channels(NamedTuple):
    """Where the channels of the activation are in the weight that it meets.

    Attributes:
        axes: the weight's batch axes (one matrix or kernel each), then those of the channels.
        groups: of a convolution's channels, where each group has outputs of its own. The last of
            `axes` then holds the channels of one group.
        outputs: the axis of all groups' outputs; of no meaning without groups.

    Example: 4 channels in 2 groups meet a kernel (3, 3, 2, 6): its outputs 0, 1, 2 read the
    channels 0 and 1, the others 2 and 3. That is `axes` (2,), `groups` 2, `outputs` 3.
    """

    axes: tuple[int, ...]
    groups: int = 1
    outputs: int = -1


def channel_absmax(
    weight: Float[Array, "..."], channels: Channels
) -> Float[Array, "..."]:
    """max |W_j| over all that meets channel j: float32, the channels' shape.

    Example: of a weight (3 layers, 8 inputs, 5 outputs) with the axes (0, 1) the maxima (3, 8); of
    a kernel (3, 3, 2, 6) in 2 groups the 4 maxima over the window and a group's outputs.
    """
    magnitude = jnp.abs(weight).astype(jnp.float32)
    kept, groups = channels.axes, channels.groups
    if groups > 1:
        kept = (*kept, channels.outputs)
    # The axes that are kept come first, so that the maximum goes over all after them.
    first = jnp.moveaxis(magnitude, kept, range(len(kept)))
    others = tuple(range(len(kept), first.ndim))
    largest = jnp.max(first, axis=others, initial=0)
    if groups == 1:
        return largest
    *batch, inputs, outputs = largest.shape
    by_group = largest.reshape(*batch, inputs, groups, outputs // groups)
    return by_group.max(-1).swapaxes(-1, -2).reshape(*batch, groups * inputs)


def spread_channels(
    values: Float[Array, "..."], channels: Channels, weight: Array
) -> Float[Array, "..."]:
    """A number of every channel in a shape that broadcasts against the weight.

    Example: [a, b, c, d] of the example above becomes (1, 1, 2, 6): [[a, a, a, c, c, c], [b, b, b,
    d, d, d]].
    """
    axes, groups = channels.axes, channels.groups
    if groups > 1:
        axes = (*axes, channels.outputs)
        by_group = values.reshape(*values.shape[:-1], groups, -1)
        each = weight.shape[channels.outputs] // groups
        values = jnp.repeat(by_group.swapaxes(-1, -2), each, axis=-1)
    ones = (1,) * (weight.ndim - values.ndim)
    wide = values.reshape(*values.shape, *ones)
    return jnp.moveaxis(wide, range(values.ndim), axes)
