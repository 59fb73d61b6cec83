"""Ranges of weights that are smaller than the weights': few are clipped, all others round finer."""

import jax.numpy as jnp
from jaxtyping import Array

from sqjax.weights.layout import Layout, lay_out
from sqjax.weights.schemes import Int4, Scheme


def ranges_of(
    weight: Array,
    contracting: tuple[int, ...],
    scheme: Scheme,
    batch: tuple[int, ...],
) -> tuple[Layout, Array, Array]:
    """A weight as it is stored, and the lowest and highest number of what shares a scale.

    Where there is no zero point, the range is [-absmax, absmax].

    Example: a kernel (256, 300) in groups of 128 is stored (300, 256), and has ranges of shape
    (300, 2).
    """
    layout = lay_out(
        weight.astype(jnp.float32),
        contracting,
        batch,
        scheme.weight.granularity,
    )
    stored, sharing = layout.stored, layout.sharing
    # With a zero point both ends move, because the codes cover [min, max].
    if isinstance(scheme.weight, Int4) and scheme.weight.zero_point:
        lowest = sharing.reduced(stored, jnp.min)
        return layout, lowest, sharing.reduced(stored, jnp.max)
    largest = sharing.reduced(jnp.abs(stored), jnp.max)
    return layout, -largest, largest


def clip_of_ranges(clip: Array, shape: tuple[int, ...]) -> Array:
    """The factors of ranges of this shape.

    Args:
        clip: of that shape, but an axis may be 1.
        shape: of the ranges.

    Raises:
        ValueError: it is of another shape.
    """
    fits = [
        own in (1, size) for own, size in zip(clip.shape, shape, strict=False)
    ]
    if clip.ndim != len(shape) or not all(fits):
        raise ValueError(
            f"clips: expected factors of the ranges, of shape {shape}, got {clip.shape}"
        )
    return jnp.broadcast_to(clip.astype(jnp.float32), shape)


def clip_weight(
    weight: Array,
    contracting: tuple[int, ...],
    scheme: Scheme,
    batch: tuple[int, ...],
    clip: Array,
) -> Array:
    """The weight with every number inside its range times `clip`.

    So the scales that are then made of the weight are those of the smaller range.

    Args:
        weight: float.
        contracting: the axes that a matmul sums over.
        scheme: says what shares a scale.
        batch: axes that hold one matrix each.
        clip: numbers in (0, 1], in the shape of the ranges; an axis may be 1.

    Raises:
        ValueError: it is of another shape.
    """
    layout, lowest, highest = ranges_of(weight, contracting, scheme, batch)
    spread = layout.sharing.spread
    factor = clip_of_ranges(clip, lowest.shape)
    lowest, highest = spread(lowest * factor), spread(highest * factor)
    inside = jnp.clip(layout.stored, lowest, highest)
    # The logical axis of stored axis i is axes[i], so the inverse permutation leads back.
    count = len(layout.order)
    lead = weight.ndim - count
    axes = (*range(lead), *(a + weight.ndim for a in layout.order))
    return inside.transpose(axes).astype(weight.dtype)
