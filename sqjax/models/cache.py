"""The key/value cache of a decoder: a pytree of `Slots`, and the writing of tokens into it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sqjax.models.slots import (
    CacheFormat,
    Slots,
    changed_keys,
    empty_slots,
    encode,
    first_channels,
)
from sqjax.numerics.dots import LONGEST_CONTRACTION


class KVCache(NamedTuple):
    """What a decoder remembers of the tokens it has read.

    Keys are stored already rotated. Slots from ``length`` on hold nothing and are masked out, and
    so are the first ``padding`` slots of a row: rows of unequal length are padded on the left, so
    that they all write to one slot. The cache of a model with a sliding window is a ring: token n
    is in slot n modulo the capacity. Writing past the capacity cannot be seen inside ``jax.jit``,
    so the caller sizes the cache.

    Attributes:
        keys, values: one `Slots` for each layer.
        length: how many tokens were written to each row, padding included.
        padding: (batch,), how many of those are padding.
    """

    keys: tuple[Slots, ...]
    values: tuple[Slots, ...]
    length: Int[Array, ""]
    padding: Int[Array, " batch"]

    @property
    def capacity(self) -> int:
        """The number of slots of each row, in the layers that have most."""
        return max(slots.capacity for slots in self.keys)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one row takes in all layers: codes, scales and zero points."""
        rows = self.padding.shape[0]
        total = 0.0
        for slots in (*self.keys, *self.values):
            of_all = sum(array.nbytes for array in slots.token_arrays())
            total += of_all / (slots.capacity * rows)
        return total


class PrefixCache(NamedTuple):
    """The keys and values of a few tokens that stand before every row, as floats.

    They are apart from a `KVCache`, whose slots begin after them, because they stay floats whatever
    the cache stores, and because all rows share them.

    Attributes:
        keys: of each layer, (kv_heads, tokens, head_dim), rotated already by the positions 0, 1 ...
        values: of each layer, (kv_heads, tokens, value_dim).
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]

    @property
    def tokens(self) -> int:
        """How many tokens they are."""
        return self.keys[0].shape[1]

    def layer(self, i: int) -> tuple[Array, Array]:
        """The keys and values of layer i."""
        return self.keys[i], self.values[i]

    def stacked(self) -> tuple[Array, Array]:
        """The keys and values of all layers, with an axis of layers before the others."""
        return jnp.stack(self.keys), jnp.stack(self.values)


export.register_namedtuple_serialization(
    KVCache, serialized_name="sqjax.KVCache"
)
export.register_namedtuple_serialization(
    PrefixCache, serialized_name="sqjax.PrefixCache"
)


def empty_cache(
    batch: int,
    kv_heads: int,
    capacities: Sequence[int],
    head_dims: tuple[int, int],
    dtype: DTypeLike,
    kind: CacheFormat,
) -> KVCache:
    """A `KVCache` of zeros, with no token in it.

    Args:
        batch: the number of rows.
        kv_heads: the number of key/value heads.
        capacities: the slots of each layer.
        head_dims: the channels of a key's head and of a value's.
        dtype: that of slots that hold floats.
        kind: how keys and values are stored.

    Raises:
        ValueError: the format's group does not divide a head, or integer sums over so many slots
            could overflow.
    """
    # Attention's second product sums over slots, in int32 where codes are integers.
    longest = max(capacities)
    if kind.codes in ("int8", "int4") and longest > LONGEST_CONTRACTION:
        raise ValueError(
            f"cache: sums over integer codes are exact up to {LONGEST_CONTRACTION} tokens, "
            f"got {longest}; use 'e4m3'"
        )
    for head_dim in head_dims:
        group = kind.group or head_dim
        if head_dim % group:
            raise ValueError(
                f"cache: expected a group that divides head_dim = {head_dim}, got {group}; "
                f"say CacheFormat({kind.codes!r}, group=...)"
            )
    changes_keys = kind.keys != "plain"
    key_dim, value_dim = head_dims

    # Every layer has arrays of its own, because a donated cache is updated in place.
    def empty(capacity: int, head_dim: int, changed: bool) -> Slots:
        sizes = (batch, kv_heads, capacity, head_dim)
        return empty_slots(*sizes, dtype, kind, changed)

    keys = tuple(empty(n, key_dim, changes_keys) for n in capacities)
    values = tuple(empty(n, value_dim, False) for n in capacities)
    length, padding = jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32)
    return KVCache(keys, values, length, padding)


def write(
    slots: Slots,
    new: Float[Array, "batch kv_heads tokens head_dim"],
    start: Int[Array, ""],
    positions: Int[Array, "batch tokens"],
    ring: bool,
) -> Slots:
    """The slots with new vectors in them, from slot `start` on (modulo the capacity, in a ring).

    In a ring of 4 slots, 2 tokens from start 7 on go to the slots 3 and 0.

    Args:
        slots: what was stored so far.
        new: keys, already rotated, or values.
        start: how many tokens were written before.
        positions: of the tokens in their rows; negative for padding, which says nothing about
            channels.
        ring: whether slots are reused once all are full.
    """
    # Only keys of a format that changes them have `channel`.
    if slots.channel is not None:
        new = new.astype(jnp.float32)
        slots = replace(slots, channel=first_channels(slots, new, positions))
        new = changed_keys(slots, new)
    put = _put_in_ring if ring else _put

    def put_new(array: Array, part: Array) -> Array:
        return put(array, part.astype(array.dtype), start)

    return slots.map_tokens(put_new, encode(new, slots.format))


def _put(array: Array, new: Array, start: Array) -> Array:
    """`array` with `new` written over its slots (axis 2) from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(array, new, start, axis=2)


def _put_in_ring(array: Array, new: Array, start: Array) -> Array:
    """As `_put`, going on at slot 0 after the last one."""
    tokens, capacity = new.shape[2], array.shape[2]
    if tokens == 1:
        # One token never goes round the end, so the cheaper update of a slice serves.
        return _put(array, new, start % capacity)
    where = (start + jnp.arange(tokens, dtype=start.dtype)) % capacity
    # No slot is written twice, because a ring has at least as many slots as tokens are read.
    return array.at[:, :, where].set(
        new, unique_indices=True, mode="promise_in_bounds"
    )
