"""The Llama family of decoder language models in Flax linen, with Hugging Face's parameter names."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sqjax.models.attention import Table, attend, rotary_table, rotate, visible
from sqjax.models.cache import KVCache, Slots, write
from sqjax.models.fusing import fused_name
from sqjax.models.stacking import check_layers, layer_of

LayerCache = tuple[Slots, Slots]


class Place(NamedTuple):
    """Where the tokens that are read stand, the same for every layer.

    Attributes:
        table: cosines and sines of their positions.
        mask: (rows, tokens, slots), what each may look at.
        start: how many tokens the cache held before.
        positions: (rows, tokens), of the tokens in their rows; negative for padding.
    """

    table: Table
    mask: Array
    start: Array
    positions: Array


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama model. Hashable, so that it may be a static argument of `jax.jit`.

    A token looks at the ``sliding_window`` latest tokens, itself included; at all of them where that is None.

    Raises:
        ValueError: if a size is not positive, the query heads are not a multiple of the key/value heads, or
            ``head_dim`` is odd (the rotary embedding pairs its two halves).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_length: int = 2048
    sliding_window: int | None = None

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
        )
        for name in (*sizes, "head_dim", "max_length", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"LlamaConfig.{name}: expected a positive number, got {getattr(self, name)}"
                )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"LlamaConfig.sliding_window: expected at least 1 or None, got {self.sliding_window}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"LlamaConfig.num_heads: expected a multiple of num_kv_heads = {self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig.head_dim: expected an even number, got {self.head_dim}")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, returned in x's dtype."""

    eps: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens hidden"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * weight.astype(jnp.float32)[None, None, :]).astype(x.dtype)


def _projections(
    module: nn.Module, x: Array, sizes: Mapping[str, int], use_bias: bool
) -> list[Array]:
    """The outputs of several Dense layers of x, by name: in one matmul, if the parameters hold them as one (`fuse`)."""
    together = fused_name(tuple(sizes))
    if not module.has_variable("params", together):
        return [nn.Dense(size, use_bias=use_bias, name=name)(x) for name, size in sizes.items()]
    ends = np.cumsum(list(sizes.values()))
    return jnp.split(
        nn.Dense(int(ends[-1]), use_bias=use_bias, name=together)(x), ends[:-1], axis=-1
    )


class Attention(nn.Module):
    """Self-attention with rotary positions and grouped queries."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"], place: Place, cache: LayerCache | None
    ) -> tuple[Float[Array, "batch tokens hidden"], LayerCache | None]:
        """Returns the output, and the updated cache if there was one."""
        config = self.config

        counts = {
            "q_proj": config.num_heads,
            "k_proj": config.num_kv_heads,
            "v_proj": config.num_kv_heads,
        }
        sizes = {name: count * config.head_dim for name, count in counts.items()}
        flat = _projections(self, x, sizes, config.attention_bias)
        queries, keys, values = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in flat)
        queries, keys = rotate(queries, place.table), rotate(keys, place.table).swapaxes(1, 2)
        values = values.swapaxes(1, 2)
        in_order = cache is None or config.sliding_window is None
        looked_at = Slots(keys), Slots(values)
        if cache is not None:
            # Behind the barrier it is read as it is stored: XLA:CPU would write it again for each matmul that reads it.
            looked_at = cache = jax.lax.optimization_barrier(
                (
                    write(cache[0], keys, place.start, place.positions, not in_order),
                    write(cache[1], values, place.start, place.positions, not in_order),
                )
            )
        mixed = attend(queries, *looked_at, place.mask, in_order).reshape(*x.shape[:2], -1)
        return nn.Dense(config.hidden_size, use_bias=config.attention_bias, name="o_proj")(
            mixed
        ), cache


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens hidden"]:
        config = self.config
        sizes = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
        gate, up = _projections(self, x, sizes, config.mlp_bias)
        return nn.Dense(config.hidden_size, use_bias=config.mlp_bias, name="down_proj")(
            nn.silu(gate) * up
        )


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and each added to the residual stream."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, place: Place, cache: LayerCache | None):
        eps = self.config.rms_norm_eps
        attention = Attention(self.config, name="self_attn")
        mixed, cache = attention(RMSNorm(eps, name="input_layernorm")(x), place, cache)
        x = x + mixed
        x = x + MLP(self.config, name="mlp")(RMSNorm(eps, name="post_attention_layernorm")(x))
        return x, cache


class Layers(nn.Module):
    """All blocks, unrolled, under the names "0", "1", ...

    They also run from one stack (`sqjax.models.stack_layers`): in a scan, or with a cache one after the other.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, place: Place, cache: KVCache | None):
        config, held = self.config, self.variables.get("params", {})
        stacked = not self.is_initializing() and check_layers(held, config.num_layers)
        of_stack = Block(config, parent=None).apply
        if stacked and cache is None:
            return jax.lax.scan(
                lambda x, layer: of_stack({"params": layer}, x, place, None), x, held
            )
        grown = []
        for i in range(config.num_layers):
            block = (
                partial(of_stack, {"params": layer_of(held, i)})
                if stacked
                else Block(config, name=str(i))
            )
            x, layer_cache = block(
                x, place, None if cache is None else (cache.keys[i], cache.values[i])
            )
            grown.append(layer_cache)
        if cache is None:
            return x, None
        keys, values = zip(*grown, strict=True)
        return x, KVCache(keys, values, cache.length + x.shape[1], cache.padding)


class Decoder(nn.Module):
    """Embedding, blocks and final norm; also gives the embedding matrix's logits for a tied output."""

    config: LlamaConfig

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
        self.layers = Layers(config)
        self.norm = RMSNorm(config.rms_norm_eps)

    def __call__(self, ids: Int[Array, "batch tokens"], cache: KVCache | None):
        x = self.embed_tokens(ids)
        x, cache = self.layers(x, _place(self.config, ids.shape[1], cache, x.dtype), cache)
        return self.norm(x), cache

    def attend(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens vocab"]:
        return self.embed_tokens.attend(x)


def _place(config: LlamaConfig, tokens: int, cache: KVCache | None, dtype: DTypeLike) -> Place:
    """Where the next tokens of a cache stand; without a cache, those from position 0 on."""
    start, padding = (
        (jnp.int32(0), jnp.zeros((1,), jnp.int32))
        if cache is None
        else (cache.length, cache.padding)
    )
    positions = (start + jnp.arange(tokens, dtype=jnp.int32))[None, :] - padding[:, None]
    table = rotary_table(jnp.maximum(positions, 0), config.head_dim, config.rope_theta, dtype)
    slots = tokens if cache is None else cache.capacity
    mask = visible(start, tokens, slots, padding, config.sliding_window)
    return Place(table, mask, start, positions)


class Llama(nn.Module):
    """A Llama decoder: token ids to the logits of the next token.

    The parameter tree has Hugging Face's names: ``model/layers/0/self_attn/q_proj/kernel`` and so on, kernels
    in (in, out); ``lm_head/kernel`` only when the embeddings are not tied. Layers may also be one stack, as
    `sqjax.models.stack_layers` makes it: ``model/layers/self_attn/q_proj/kernel``, (layers, in, out). Everything is
    computed in the parameters' dtype but norms and softmax, which are computed in float32.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch tokens"], cache: KVCache | None = None, last: bool = False
    ) -> tuple[Float[Array, "batch positions vocab"], KVCache | None]:
        """The logits of every position, or of the last only; and the cache grown, if there was one."""
        decoder = Decoder(self.config, name="model")
        x, cache = decoder(ids, cache)
        if last:
            x = x[:, -1:]
        if self.config.tie_embeddings:
            return decoder.attend(x), cache
        return nn.Dense(self.config.vocab_size, use_bias=False, name="lm_head")(x), cache
