"""Self-attention as Flax modules: queries, keys and values, their norms, and the cache."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from sqjax.models.attention import Before, Scoring, alibi_slopes, attend
from sqjax.models.cache import write
from sqjax.models.config import DecoderConfig, LatentAttention, config_ropes
from sqjax.models.mlp import projections
from sqjax.models.norms import NormLayer
from sqjax.models.rope import RotaryTable, rotate
from sqjax.models.slots import Slots

LayerCache = tuple[Slots, Slots]
#: The keys and values of a prefix in one layer, (kv_heads, prefix, channels) each.
LayerPrefix = tuple[Array, Array]


class View(NamedTuple):
    """What the layers of one kind may look at, and how their queries and keys turn.

    Attributes:
        rotary: cosines and sines of the tokens' positions; None where no layer turns.
        mask: (rows, tokens, slots), what each token may look at.
        bias: (rows, heads, tokens, slots), what is added to scores; None for nothing.
        before: (rows, tokens, prefix), what each token may look at of a prefix; None for none.
    """

    rotary: RotaryTable | None
    mask: Array
    bias: Array | None = None
    before: Array | None = None


class Context(NamedTuple):
    """What one layer's attention needs beside x: its view, and its part of the cache.

    Attributes:
        view: what its kind may look at.
        start, in_row: as in `Positions`.
        ring: whether its slots are reused once all are full.
        cache: its keys and values; None where the tokens look at each other only.
        prefix: the keys and values of what stands before all tokens; None for nothing.
    """

    view: View
    start: Array
    in_row: Array
    ring: bool
    cache: LayerCache | None
    prefix: LayerPrefix | None = None


class Attention(nn.Module):
    """Self-attention with grouped queries."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"], context: Context
    ) -> tuple[Float[Array, "batch tokens hidden"], LayerCache | None]:
        """Returns the output, and the updated cache if there was one."""
        config = self.config
        batch, tokens, _ = x.shape
        sizes = {
            "q_proj": config.num_heads * config.head_dim,
            "k_proj": config.num_kv_heads * config.head_dim,
            "v_proj": config.num_kv_heads * config.head_dim,
        }
        dense = partial(nn.Dense, use_bias=config.attention_bias)
        flat = projections(self, dense, sizes, x)
        heads = (batch, tokens, -1, config.head_dim)
        queries, keys, values = flat
        queries = _turned(config, self._normed(queries, "q_norm"), context)
        keys = _turned(config, self._normed(keys, "k_norm"), context)
        mixed, cache = _attended(
            config, queries, keys, values.reshape(heads), context
        )
        output = nn.Dense(
            config.hidden_size, use_bias=config.output_bias, name="o_proj"
        )
        return output(mixed.reshape(batch, tokens, -1)), cache

    def _normed(
        self, flat: Float[Array, "batch tokens outputs"], name: str
    ) -> Float[Array, "batch tokens heads head_dim"]:
        """Queries or keys by head, after their norm, if there is one."""
        config = self.config
        by_head = (*flat.shape[:-1], -1, config.head_dim)
        norm = config.qk_norm_kind
        match config.qk_norm:
            case None:
                return flat.reshape(by_head)
            case "all":
                return NormLayer(norm, name=name)(flat).reshape(by_head)
            case "head":
                return NormLayer(norm, name=name)(flat.reshape(by_head))
            case _:
                layer = NormLayer(norm, axes=2, name=name)
                return layer(flat.reshape(by_head))


class MultiHeadLatentAttention(nn.Module):
    """Self-attention whose keys and values all heads make from one short vector a token.

    A head's key has `plain_size` channels of its own and `rotary_size` that all heads share:
    only these turn with the position.
    """

    config: DecoderConfig
    latent: LatentAttention

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"], context: Context
    ) -> tuple[Float[Array, "batch tokens hidden"], LayerCache | None]:
        """Returns the output, and the updated cache if there was one."""
        config, latent = self.config, self.latent
        batch, tokens, _ = x.shape
        by_head = (batch, tokens, config.num_heads, -1)
        plain = latent.plain_size

        queries = self._queries(x).reshape(by_head)
        turned = _turned(config, queries[..., plain:], context)
        queries = jnp.concatenate([queries[..., :plain], turned], axis=-1)

        both = self._dense(latent.rank + latent.rotary_size, "kv_a_proj", x)
        short, shared = both[..., : latent.rank], both[..., latent.rank :]
        short = NormLayer(latent.norm, name="kv_a_layernorm")(short)
        size = config.num_heads * (plain + latent.value_size)
        wide = nn.Dense(size, use_bias=False, name="kv_b_proj")(short)
        wide = wide.reshape(by_head)
        shared = _turned(config, shared[:, :, None, :], context)
        shared = jnp.broadcast_to(
            shared, (*wide.shape[:-1], latent.rotary_size)
        )
        keys = jnp.concatenate([wide[..., :plain], shared], axis=-1)

        mixed, cache = _attended(
            config, queries, keys, wide[..., plain:], context
        )
        flat = mixed.reshape(batch, tokens, -1)
        output = nn.Dense(
            config.hidden_size, use_bias=config.output_bias, name="o_proj"
        )
        return output(flat), cache

    def _queries(self, x: Array) -> Float[Array, "batch tokens outputs"]:
        """The queries of all heads, made of x or of a short vector."""
        config, latent = self.config, self.latent
        size = config.num_heads * config.head_dim
        if latent.query_rank is None:
            return nn.Dense(size, use_bias=False, name="q_proj")(x)
        short = self._dense(latent.query_rank, "q_a_proj", x)
        short = NormLayer(latent.norm, name="q_a_layernorm")(short)
        return nn.Dense(size, use_bias=False, name="q_b_proj")(short)

    def _dense(self, size: int, name: str, x: Array) -> Array:
        use_bias = self.config.attention_bias
        return nn.Dense(size, use_bias=use_bias, name=name)(x)


def _turned(
    config: DecoderConfig,
    vectors: Float[Array, "batch tokens heads channels"],
    context: Context,
) -> Float[Array, "batch tokens heads channels"]:
    """Queries or keys, turned by their positions if the layers of this kind turn."""
    table = context.view.rotary
    if table is None:
        return vectors
    return rotate(vectors, table, config_ropes(config)[0].interleaved)


def _attended(
    config: DecoderConfig,
    queries: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    values: Float[Array, "batch tokens kv_heads value_dim"],
    context: Context,
) -> tuple[Float[Array, "batch tokens heads value_dim"], LayerCache | None]:
    """Attention over the cache with these keys and values in it; and that cache."""
    # A cache has them as (batch, kv_heads, tokens, head_dim).
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    cache = context.cache
    if cache is None:
        # The tokens look at each other: a cache of floats that lasts for this call.
        read = Slots(keys), Slots(values)
    else:
        where = context.start, context.in_row, context.ring
        written = write(cache[0], keys, *where), write(cache[1], values, *where)
        # Behind a barrier the cache is read as it is stored. Without one XLA:CPU would write it
        # again for each matmul that reads it.
        read = cache = jax.lax.optimization_barrier(written)
    # In order a token may skip the slots after its own, which it does not look at.
    in_order = not config.both_ways and (cache is None or not context.ring)
    view = context.view
    mixed = attend(
        queries,
        *read,
        view.mask,
        in_order,
        _scoring(config),
        view.bias,
        _before(context),
    )
    return mixed, cache


def _before(context: Context) -> Before | None:
    """What stands before the slots in this layer."""
    mask = context.view.before
    if context.prefix is None or mask is None:
        return None
    keys, values = context.prefix
    count = keys.shape[1]
    # A row has its first token in the slot after its padding.
    first = (context.start - context.in_row[:, 0]).astype(jnp.float32)
    places = first[:, None] + np.arange(-count, 0, dtype=np.float32)[None]
    return Before(keys, values, mask, places)


def _scoring(config: DecoderConfig) -> Scoring:
    """How products of queries and keys become scores."""
    usual = config.head_dim**-0.5
    scale = usual if config.query_scale is None else config.query_scale
    slopes = None
    if config.alibi is not None:
        slopes = tuple(config.alibi * alibi_slopes(config.num_heads))
    return Scoring(scale, config.attention_softcap, slopes)
