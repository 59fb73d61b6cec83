"""Causal attention with grouped queries, rotary positions and a key/value cache, on plain arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


class KVCache(NamedTuple):
    """What a decoder remembers of the tokens it has read: one array a layer, and how many slots are filled.

    Every array has room for ``capacity`` tokens; slots from ``length`` on hold nothing and are masked out.
    Keys are stored already rotated. Writing past the capacity cannot be seen inside ``jax.jit``
    (`jax.lax.dynamic_update_slice` would overwrite the last slots), so the caller sizes the cache.
    """

    keys: tuple[Float[Array, "batch kv_heads capacity head_dim"], ...]
    values: tuple[Float[Array, "batch kv_heads capacity head_dim"], ...]
    length: Int[Array, ""]


def empty_cache(layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype) -> KVCache:
    """A `KVCache` of zeros, with no token in it."""
    shape = (batch, kv_heads, capacity, head_dim)
    keys = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    values = tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    return KVCache(keys, values, jnp.zeros((), jnp.int32))


def rotary_table(
    positions: Int[Array, " tokens"], head_dim: int, theta: float, dtype: DTypeLike
) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
    """Cosine and sine of position * theta^(-2i / head_dim), the angle by which pair i of a head turns.

    Computed in float32. The barrier keeps the compiler from computing them again for every head of every layer.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[:, None] * (theta**-exponents)[None, :]
    return jax.lax.optimization_barrier((jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)))


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    table: tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turns each pair (x_i, x_{i + head_dim/2}) by its angle: the rotary embedding in halves."""
    cos, sin = (half[None, :, None, :] for half in table)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def causal_mask(positions: Int[Array, " tokens"], slots: int) -> Bool[Array, "tokens slots"]:
    """True where the token at a position may look at a slot: at itself and at everything before it."""
    return positions[:, None] >= jnp.arange(slots, dtype=positions.dtype)[None, :]


def attend(
    queries: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    mask: Bool[Array, "tokens slots"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, where ``heads / kv_heads`` consecutive query heads share a key head.

    The queries get an axis for their group, so keys and values are never repeated in memory. The softmax is
    computed in float32.
    """
    batch, tokens, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = (queries * head_dim**-0.5).reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, keys).astype(jnp.float32)
    scores = jnp.where(mask[None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bksd->btkgd", weights, values)
    return mixed.reshape(batch, tokens, heads, head_dim)
