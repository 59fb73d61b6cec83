"""Where the tokens that a decoder reads stand: their positions, and what each may look at."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from sqjax.models.attention import visible
from sqjax.models.cache import KVCache
from sqjax.models.config import (
    DecoderConfig,
    LayerKind,
    config_ropes,
    rotated_channels,
)
from sqjax.models.rope import rotary_table
from sqjax.models.self_attention import View


class Positions(NamedTuple):
    """Where the tokens that are read stand, the same for every layer.

    For a row of 5 slots that begins with 2 tokens of padding, of which 3 tokens are in the cache
    and 1 is read now: start = 3, in_row = 1 (padding does not count), and the mask lets the token
    look at the slots 2 and 3.

    Attributes:
        views: one for each of ``config.different_kinds``.
        start: how many tokens the cache held before.
        in_row: (rows, tokens), the tokens' positions in their rows; negative for padding. A
            prefix counts for what turns and what is looked up, not here.
    """

    views: tuple[View, ...]
    start: Array
    in_row: Array


def next_positions(
    config: DecoderConfig,
    tokens: int,
    cache: KVCache | None,
    dtype: DTypeLike,
    before: int = 0,
) -> Positions:
    """Where the next tokens of a cache stand; without a cache, those from position 0 on.

    Both after a prefix of `before` tokens.
    """
    if config.both_ways:
        raise ValueError(
            "LayerKind.both_ways: expected false in a decoder, whose tokens are read one after "
            "the other; an encoder is a sqjax.models.Encoder"
        )
    capacities: dict[LayerKind, int] = {}
    if cache is None:
        start = jnp.int32(0)
        # one row, which serves the whole batch
        padding = jnp.zeros((1,), jnp.int32)
    else:
        start, padding = cache.length, cache.padding
        for i, held in enumerate(cache.keys):
            capacities[config.kind(i)] = held.capacity
    written_at = start + jnp.arange(tokens, dtype=jnp.int32)
    in_row = written_at[None, :] - padding[:, None]
    # Padding has no position. It takes that of the first token; the mask hides it from all others.
    places = jnp.maximum(in_row, 0)
    if before:
        places = places + before
    longest = jnp.max(places) + 1
    channels = turning_channels(config)
    views = []
    for kind in config.different_kinds:
        rotary = None
        if channels is not None:
            rotary = rotary_table(places, kind.rope, channels, longest, dtype)
        slots = capacities.get(kind, tokens)
        mask = visible(start, tokens, slots, padding, kind.sliding_window)
        near = _near(places, before, kind.sliding_window)
        views.append(View(rotary, mask, before=near))
    return Positions(tuple(views), start, in_row)


def _near(places: Array, count: int, window: int | None) -> Array | None:
    """Which of the `count` first positions tokens at these places may look at: all, or the near.

    With a window of 3 the token at position 3 looks at 1, 2 and itself: at the second of 2.
    """
    if count == 0:
        return None
    distance = (
        places[:, :, None] - jnp.arange(count, dtype=jnp.int32)[None, None]
    )
    return distance < (jnp.iinfo(jnp.int32).max if window is None else window)


def turning_channels(config: DecoderConfig) -> int | None:
    """How many channels of a head turn in the layers that have a rope; None if no layer has."""
    for rope in config_ropes(config):
        return rope.channels(rotated_channels(config))
    return None
