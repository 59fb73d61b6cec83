"""Causal attention with grouped queries and rotary positions, over a float or a quantized cache.

Grouped queries: consecutive query heads share one key head and one value head, so that the cache
is small. With 6 query heads and 2 key heads, query heads 0, 1 and 2 read key head 0, and query
heads 3, 4 and 5 read key head 1.

A quantized cache is read as it is stored, because a float copy of it would take four times its
memory traffic on every step. See `_product` for how int8 codes are multiplied.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from sqjax.models.slots import (
    Slots,
    changed_queries,
    integers,
    omitted_scores,
)
from sqjax.numerics.digits import BASE, two_digits

#: How many queries are read at once. See `attend` for why queries are read in blocks.
BLOCK = 128


class Scoring(NamedTuple):
    """How the product of a query and a key becomes a score.

    Attributes:
        scale: what q k^T is multiplied by.
        softcap: scores x become softcap * tanh(x / softcap); None for none.
        slopes: a number for each query head, by which a score grows with each token that the key is
            nearer to the query (ALiBi); None for none.
    """

    scale: float
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None


class Before(NamedTuple):
    """Floats that stand before the slots: the keys and values of a prefix, in one layer.

    Attributes:
        keys: (kv_heads, prefix, head_dim), rotated already; one prefix serves the batch.
        values: (kv_heads, prefix, value_dim).
        mask: (rows, tokens, prefix), what each token may look at.
        places: (rows, prefix), where they would stand if they were slots: -2 and -1 for two tokens
            before slot 0, which padding moves on.
    """

    keys: Array
    values: Array
    mask: Array
    places: Array


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of ALiBi (Press et al. 2022, arXiv 2108.12409), one for each head.

    For 8 heads they are 1/2, 1/4, ... 1/256. For a number that is no power of 2, those of the
    power below come first, and then every other one of twice that power.
    """
    power = 2 ** (heads.bit_length() - 1)
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    rest = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([first, rest])


def visible(
    length: Int[Array, ""],
    tokens: int,
    slots: int,
    padding: Int[Array, " rows"],
    window: int | None,
) -> Bool[Array, "rows tokens slots"]:
    """Whether each of the tokens that were just written may look at each slot.

    A token looks at itself and at the tokens before it, except padding and what lies outside its
    window.

    Without a window, token n is in slot n. With one, the slots are a ring: token n is in slot
    n modulo `slots`, so of all tokens that were ever written to a slot it holds the latest. For
    window 3 and 4 slots, after 4 tokens (0 to 3) and now 2 more (4 and 5), the slots hold tokens
    4, 5, 2, 3. Token 4 looks at 2, 3, 4: slots 2, 3, 0. Token 5 looks at 3, 4, 5: slots 3, 0, 1.

    Args:
        length: how many tokens had been written before these.
        tokens: how many these are.
        slots: the cache's capacity; a ring if there is a window.
        padding: the number of padding tokens that each row begins with.
        window: how many tokens a token may look at, itself included; None for all.
    """
    own = (length + jnp.arange(tokens, dtype=jnp.int32))[:, None]
    held = jnp.arange(slots, dtype=jnp.int32)
    if window is not None:
        last = length + jnp.int32(tokens - 1)
        # The latest token up to `last` whose number is this slot's, modulo the number of slots.
        # It is negative where no token was written yet.
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
    scoring: Scoring,
    bias: Float[Array, "bias_rows heads tokens slots"] | None = None,
    before: Before | None = None,
) -> Float[Array, "batch tokens heads value_dim"]:
    """softmax(scores of q and k) v, where a score is q k^T * scale, changed as `scoring` says.

    ``heads / kv_heads`` consecutive query heads share a key head. The softmax is computed in
    float32. Queries are read in blocks of `BLOCK`, because a causal mask forbids about half of
    all scores: with `in_order` slots a block reads the slots up to its own last token only. For 6
    tokens, 6 slots and blocks of 2, the three blocks read the first 2, 4 and 6 slots.

    Args:
        queries: rotated already.
        keys: rotated already.
        values: as many slots as keys.
        mask: what each token may look at, as `visible` gives it; one row may serve the batch.
        in_order: whether later tokens are in later slots, so that the last token is at most in
            the last slot. False for a ring, of which every block must read all slots.
        scoring: how products become scores. Its slopes need slots in order.
        bias: what is added to scores beside; one row may serve the batch.
        before: what stands before the slots; None for nothing.
    """
    tokens, slots = mask.shape[1:]
    blocks = []
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        end = slots - tokens + last if in_order else slots
        seen = mask[:, first:last, :end]
        block = queries[:, first:last]
        added = None if bias is None else bias[:, :, first:last, :end]
        read = keys.first(end), values.first(end)
        own = before
        if before is not None:
            own = before._replace(mask=before.mask[:, first:last])
        blocks.append(_attend_block(block, *read, seen, scoring, added, own))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _attend_block(
    queries: Array,
    keys: Slots,
    values: Slots,
    mask: Array,
    scoring: Scoring,
    bias: Array | None,
    before: Before | None,
) -> Array:
    """Attention of one block of queries.

    The query heads that share a key head become further rows of one matrix, so that keys and
    values are never repeated in memory. For 5 tokens with 6 query heads of 8 channels, over 2 key
    heads and 21 slots:

        queries (batch, 5, 6, 8)     rows (batch, 2, 3 * 5, 8): 3 query heads share a key head
        scores  (batch, 2, 15, 21)   (batch, 2, 3, 5, 21), to which the mask (rows, 5, 21) applies
        mixed   (batch, 2, 15, 8)    (batch, 5, 6, 8)

    A bias (rows, 6, 5, 21) is added as (rows, 2, 3, 5, 21). One softmax runs over the slots and
    over what stands before them, whose scores and weights come first.
    """
    batch, tokens, heads, head_dim = queries.shape
    kv_heads, slots = keys.codes.shape[1], mask.shape[2]
    sharing = heads // kv_heads
    row_count = sharing * tokens

    scaled = queries * scoring.scale
    by_key_head = scaled.reshape(batch, tokens, kv_heads, sharing, head_dim)
    by_key_head = by_key_head.transpose(0, 2, 3, 1, 4)
    rows = by_key_head.reshape(batch, kv_heads, row_count, head_dim)

    by_token = (batch, kv_heads, sharing, tokens)
    scores = _scores(rows, keys)
    omitted = omitted_scores(keys, rows)
    counts = scoring.softcap is not None or before is not None
    if omitted is not None and counts:
        # Because tanh of a row's scores depends on what all of them have more, and because those of
        # what stands before the slots have it.
        scores = scores + omitted
    # Nearness to the query may be counted from any slot on: here from slot 0.
    places = np.arange(slots, dtype=np.float32)[None]
    scores = _changed(scores.reshape(*by_token, slots), scoring, places)
    if bias is not None:
        added = bias.reshape(bias.shape[0], *by_token[1:], slots)
        scores = scores + added.astype(scores.dtype)
    allowed = mask.reshape(mask.shape[0], 1, 1, tokens, slots)
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    if before is not None:
        first = _scores_before(rows, before).reshape(*by_token, -1)
        first = _changed(first, scoring, before.places)
        seen = before.mask[:, None, None]
        first = jnp.where(seen, first, jnp.finfo(jnp.float32).min)
        scores = jnp.concatenate([first, scores], axis=-1)

    # The largest score is subtracted because exp would overflow without. The softmax does not
    # depend on it, so no gradient goes through it.
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1)[..., None]
    by_row = weights.reshape(batch, kv_heads, row_count, -1)
    if before is None:
        mixed = _mix(by_row, values)
    else:
        mixed = _mix_before(by_row[..., :-slots], before)
        mixed = mixed + _mix(by_row[..., -slots:], values)
    # Divided after the product, which takes head_dim divisions for each query and not one a slot.
    value_dim = values.head_dim
    mixed = mixed.reshape(*by_token, value_dim) / total
    tokens_first = mixed.transpose(0, 3, 1, 2, 4)
    shape = (batch, tokens, heads, value_dim)
    return tokens_first.reshape(shape).astype(queries.dtype)


def _changed(
    scores: Float[Array, "batch kv_heads sharing tokens slots"],
    scoring: Scoring,
    places: Float[Array | np.ndarray, "rows slots"],
) -> Array:
    """Scores with ALiBi's slopes and the soft cap. Slots stand at places."""
    if scoring.slopes is not None:
        kv_heads, sharing = scores.shape[1:3]
        slopes = np.array(scoring.slopes, np.float32)
        slopes = slopes.reshape(1, kv_heads, sharing, 1, 1)
        # A softmax does not see what all scores of a row have more, so a place stands for nearness.
        scores = scores + slopes * places[:, None, None, None, :]
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    return scores


def _scores(
    rows: Float[Array, "batch kv_heads rows head_dim"], keys: Slots
) -> Float[Array, "batch kv_heads rows slots"]:
    """rows k^T in float32, up to a constant of each row, which changes no softmax.

    A slot's key is codes * scale. The product is taken with the codes and multiplied by the
    scale, because a scale belongs to a column of the product.
    """
    rows = changed_queries(keys, rows)
    if keys.scale is None:
        rows = rows.astype(keys.codes.dtype)
        return jnp.einsum(
            "bkrd,bksd->bkrs",
            rows,
            keys.codes,
            preferred_element_type=jnp.float32,
        )
    codes = integers(keys)
    groups = codes.shape[3:]
    rows = rows.astype(jnp.float32).reshape(*rows.shape[:3], *groups)
    products = _product("bkrd,bksd->bkrs", rows.transpose(0, 1, 3, 2, 4), codes)
    return jnp.sum(products * _by_group(keys.scale), axis=2)


def _mix(
    weights: Float[Array, "batch kv_heads rows slots"], values: Slots
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """weights v in float32.

    A slot's value is codes * scale. Here the sum runs over slots, so the scales can not wait for
    the product: they multiply the weights.
    """
    if values.scale is None:
        weights = weights.astype(values.codes.dtype)
        return jnp.einsum(
            "bkrs,bksd->bkrd",
            weights,
            values.codes,
            preferred_element_type=jnp.float32,
        )
    weights = weights[:, :, None] * _by_group(values.scale)
    products = _product("bkrs,bksd->bkrd", weights, integers(values))
    batch, kv_heads, _, rows, _ = products.shape
    groups_last = products.transpose(0, 1, 3, 2, 4)
    return groups_last.reshape(batch, kv_heads, rows, -1)


def _scores_before(
    rows: Float[Array, "batch kv_heads rows head_dim"], before: Before
) -> Float[Array, "batch kv_heads rows prefix"]:
    """As `_scores`, of the keys before the slots, which are floats as they are."""
    keys = before.keys.astype(jnp.float32)[None]
    return jnp.matmul(
        rows.astype(jnp.float32), keys.swapaxes(2, 3), precision="highest"
    )


def _mix_before(
    weights: Float[Array, "batch kv_heads rows prefix"], before: Before
) -> Float[Array, "batch kv_heads rows value_dim"]:
    """As `_mix`, of the values before the slots."""
    values = before.values.astype(jnp.float32)[None]
    return jnp.matmul(weights, values, precision="highest")


def _by_group(
    scale: Float[Array, "batch kv_heads slots groups"],
) -> Float[Array, "batch kv_heads groups 1 slots"]:
    """The scales of slots, in the layout of products: an axis of groups, one row for all rows."""
    groups_first = scale.astype(jnp.float32).transpose(0, 1, 3, 2)
    return groups_first[:, :, :, None, :]


def _product(
    equation: str,
    rows: Float[Array, "batch kv_heads groups rows n"],
    codes: Shaped[Array, "batch kv_heads slots groups group"],
) -> Float[Array, "batch kv_heads groups rows m"]:
    """rows times codes in float32, group by group: int8 x int8 -> int32 where codes are integers.

    Float rows can not meet int8 codes in an integer product, so each row is written in two int8
    digits (`two_digits`). One digit would not do: attention's weights often have one large entry
    (the first token's) and many small ones, all of which one digit would round to zero. With two
    digits nearly all of the error is the cache's own. The high digits and the low digits are
    rows of one product, because the codes, which are large, are then read once.
    """
    batch, kv_heads, slots, groups, group = codes.shape
    if groups == 1:
        # For an axis of size 1 the compiler would transpose the codes, so it is dropped.
        codes = codes.reshape(batch, kv_heads, slots, group)
    else:
        # Groups become a batch axis of the product, because each has scales of its own.
        codes = codes.transpose(0, 1, 3, 2, 4)
        codes = codes.reshape(batch, kv_heads * groups, slots, group)
    flat = rows.reshape(batch, kv_heads * groups, *rows.shape[3:])
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        # float8 has no integer product: the codes are widened to float32, which is exact.
        out = jnp.einsum(equation, flat, codes.astype(jnp.float32))
    else:
        digits, scale = two_digits(flat)
        sums = jnp.einsum(
            equation, digits, codes, preferred_element_type=jnp.int32
        )
        high, low = jnp.split(sums.astype(jnp.float32), 2, axis=2)
        out = (high + low / BASE) * scale
    return out.reshape(batch, kv_heads, groups, *out.shape[2:])
