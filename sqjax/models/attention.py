"""Causal attention with grouped queries and rotary positions, over float vectors or over a quantized cache."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped

from sqjax.models.cache import Slots, changed_queries, integers
from sqjax.numerics.formats import scale_from_absmax, to_format

#: Queries that are read at once: each block of them looks at no slot beyond its own last token.
BLOCK = 128

Table = tuple[Float[Array, "rows tokens half"], Float[Array, "rows tokens half"]]


def rotary_table(
    positions: Int[Array, "rows tokens"], head_dim: int, theta: float, dtype: DTypeLike
) -> Table:
    """Cosine and sine of position * theta^(-2i / head_dim), the angle by which pair i of a head turns.

    Computed in float32. The barrier keeps the compiler from computing them again for every head of every layer.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[:, :, None] * (theta**-exponents)[None, None, :]
    return jax.lax.optimization_barrier(
        (jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))
    )


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], table: Table
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turns each pair (x_i, x_{i + head_dim/2}) by its angle: the rotary embedding in halves."""
    cos, sin = (half[:, :, None, :] for half in table)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def visible(
    length: Int[Array, ""],
    tokens: int,
    slots: int,
    padding: Int[Array, " rows"],
    window: int | None,
) -> Bool[Array, "rows tokens slots"]:
    """Whether each of the tokens that were just written may look at each slot.

    A token looks at itself and at what came before it, but for padding, and for what lies outside its window.

    Args:
        length: how many tokens had been written before these.
        tokens: how many these are.
        slots: the cache's capacity; a ring if there is a window.
        padding: the number of padding tokens that each row begins with.
        window: how many tokens a token may look at, itself included; None for all.
    """
    own = (length + jnp.arange(tokens, dtype=jnp.int32))[:, None]
    held = jnp.arange(slots, dtype=jnp.int32)
    if window is not None:  # of all tokens that ever went into a slot it holds the latest
        last = length + jnp.int32(tokens - 1)
        held = last - (last - held) % jnp.int32(slots)
    held = held[None, :]
    seen = (held >= 0) & (held <= own)
    if window is not None:
        seen &= held > own - window
    return seen[None] & (held[None] >= padding[:, None, None])


def attend(
    queries: Float[Array, "batch tokens heads head_dim"],
    keys: Slots,
    values: Slots,
    mask: Bool[Array, "rows tokens slots"],
    in_order: bool,
) -> Float[Array, "batch tokens heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, where ``heads / kv_heads`` consecutive query heads share a key head.

    The query heads of a group are further rows of one matrix, so keys and values are never repeated in memory. The
    softmax is computed in float32. Queries are taken in blocks: if slots lie `in_order`, the last token being at most
    in the last slot, no block computes what all of its queries are forbidden to see at the end.
    """
    tokens, slots = mask.shape[1:]
    mixed = []
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        end = slots - tokens + last if in_order else slots
        seen = mask[:, first:last, :end]
        mixed.append(
            _attend_block(queries[:, first:last], keys.first(end), values.first(end), seen)
        )
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=1)


def _attend_block(queries: Array, keys: Slots, values: Slots, mask: Array) -> Array:
    batch, tokens, heads, head_dim = queries.shape
    kv_heads, (rows, _, slots) = keys.codes.shape[1], mask.shape
    grouped = (queries * head_dim**-0.5).reshape(
        batch, tokens, kv_heads, heads // kv_heads, head_dim
    )
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    by_token = (batch, kv_heads, heads // kv_heads, tokens)
    scores = _scores(grouped, keys).reshape(*by_token, slots)
    scores = jnp.where(mask.reshape(rows, 1, 1, tokens, slots), scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1)[..., None]
    mixed = (
        _mix(weights.reshape(batch, kv_heads, -1, slots), values).reshape(*by_token, head_dim)
        / total
    )
    return mixed.transpose(0, 3, 1, 2, 4).reshape(queries.shape).astype(queries.dtype)


def _scores(
    rows: Float[Array, "batch kv_heads rows head_dim"], keys: Slots
) -> Float[Array, "batch kv_heads rows slots"]:
    """rows k^T in float32, but for a constant of each row. The scales of slots go to the products."""
    rows = changed_queries(keys, rows)
    if keys.scale is None:
        rows = rows.astype(keys.codes.dtype)
        return jnp.einsum("bkrd,bksd->bkrs", rows, keys.codes, preferred_element_type=jnp.float32)
    codes = integers(keys)
    rows = rows.astype(jnp.float32).reshape(*rows.shape[:3], *codes.shape[3:])
    products = _product("bkrd,bksd->bkrs", rows.transpose(0, 1, 3, 2, 4), codes)
    return jnp.sum(products * _by_group(keys.scale), axis=2)


def _mix(
    weights: Float[Array, "batch kv_heads rows slots"], values: Slots
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """weights v in float32. The scales of slots go to the weights."""
    if values.scale is None:
        weights = weights.astype(values.codes.dtype)
        return jnp.einsum(
            "bkrs,bksd->bkrd", weights, values.codes, preferred_element_type=jnp.float32
        )
    weights = weights[:, :, None] * _by_group(values.scale)
    products = _product("bkrs,bksd->bkrd", weights, integers(values))
    return products.transpose(0, 1, 3, 2, 4).reshape(*products.shape[:2], products.shape[3], -1)


def _by_group(
    scale: Float[Array, "batch kv_heads slots groups"],
) -> Float[Array, "batch kv_heads groups 1 slots"]:
    """The scales of slots as factors of products, or of rows, group by group."""
    return scale.astype(jnp.float32).transpose(0, 1, 3, 2)[:, :, :, None, :]


def _product(
    equation: str,
    rows: Float[Array, "batch kv_heads groups rows n"],
    codes: Shaped[Array, "batch kv_heads slots groups group"],
) -> Float[Array, "batch kv_heads groups rows m"]:
    """rows times codes in float32, group by group: int8 x int8 -> int32 where codes are integers.

    Each row is then two digits of int8, so that nearly all of the error is the cache's: rows that are probabilities
    often have one large entry (the first token's) and many small ones, which one digit would round to zero.
    """
    batch, kv_heads, slots, groups, group = codes.shape
    if groups == 1:  # no axis of size 1, for which the compiler would transpose the codes
        codes = codes.reshape(batch, kv_heads, slots, group)
    else:
        codes = codes.transpose(0, 1, 3, 2, 4).reshape(batch, kv_heads * groups, slots, group)
    flat = rows.reshape(batch, kv_heads * groups, *rows.shape[3:])
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        out = jnp.einsum(equation, flat, codes.astype(jnp.float32))
    else:
        digits, scale = two_digits(flat)
        sums = jnp.einsum(equation, digits, codes, preferred_element_type=jnp.int32).astype(
            jnp.float32
        )
        high, low = jnp.split(sums, 2, axis=2)
        out = (high + low / LOW) * scale
    return out.reshape(batch, kv_heads, groups, *out.shape[2:])


#: A low digit counts so many times less than a high one: the rest of a rounding is at most 127 of them.
LOW = 254.0


def two_digits(
    rows: Float[Array, "*lead rows n"],
) -> tuple[Int8[Array, "*lead rows2 n"], Float[Array, "*lead rows 1"]]:
    """Rows as scale * (high + low / 254), off by at most scale / 508: all high digits, then all low ones."""
    scale = scale_from_absmax(jnp.max(jnp.abs(rows), axis=-1, keepdims=True))
    high = to_format(rows, scale)
    low = to_format(rows / scale - high.astype(jnp.float32), jnp.float32(1 / LOW))
    return jnp.concatenate([high, low], axis=-2), scale
