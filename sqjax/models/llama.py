"""The Llama family of decoder models in Flax linen, with Hugging Face's parameter names."""

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

from sqjax.models.attention import (
    RotaryTable,
    attend,
    rotary_table,
    rotate,
    visible,
)
from sqjax.models.cache import KVCache, write
from sqjax.models.fields import (
    EPSILON,
    FLAG,
    POSITIVE,
    SIZE,
    SIZE_OR_NONE,
    check_fields,
)
from sqjax.models.fusing import fused_name
from sqjax.models.slots import Slots
from sqjax.models.stacking import check_layers, layer_of

LayerCache = tuple[Slots, Slots]


class Positions(NamedTuple):
    """Where the tokens that are read stand, the same for every layer.

    For a row of 5 slots that begins with 2 tokens of padding, of which 3 tokens are in the cache
    and 1 is read now: start = 3, in_row = 1 (padding does not count), and the mask lets the token
    look at the slots 2 and 3.

    Attributes:
        rotary: cosines and sines of their positions.
        mask: (rows, tokens, slots), what each may look at.
        start: how many tokens the cache held before.
        in_row: (rows, tokens), the tokens' positions in their rows; negative for padding.
    """

    rotary: RotaryTable
    mask: Array
    start: Array
    in_row: Array


#: What each field of `LlamaConfig` must be.
_FIELDS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_layers": SIZE,
    "num_heads": SIZE,
    "num_kv_heads": SIZE,
    "head_dim": SIZE,
    "rope_theta": POSITIVE,
    "rms_norm_eps": EPSILON,
    "tie_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "max_length": SIZE,
    "sliding_window": SIZE_OR_NONE,
}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama model. Hashable, so that it may be a static argument of `jax.jit`.

    A token looks at the ``sliding_window`` latest tokens, itself included; at all of them where
    that is None.

    Raises:
        ValueError: if a size is not a positive whole number, a number is not finite, the query
            heads are not a multiple of the key/value heads, or ``head_dim`` is odd (the rotary
            embedding pairs its two halves).
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
        check_fields(self, _FIELDS)
        # Each key head serves as many query heads.
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "LlamaConfig.num_heads: expected a multiple of num_kv_heads = "
                f"{self.num_kv_heads}, got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"LlamaConfig.head_dim: expected an even number, got {self.head_dim}"
            )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Computed in float32, returned in x's dtype.
    """

    eps: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens hidden"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        # In bfloat16 the mean of many squares would keep 8 bits.
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        gain = weight.astype(jnp.float32)[None, None, :]
        return (normed * gain).astype(x.dtype)


def _projections(
    module: nn.Module, x: Array, sizes: Mapping[str, int], use_bias: bool
) -> list[Array]:
    """The outputs of several Dense layers that read the same x, in the order of `sizes`.

    `sizes` is {name: number of outputs}. If `sqjax.models.fuse` has stored the layers as one, one
    matmul computes all outputs, side by side. With sizes 48, 16 and 16 they are split at 48 and
    64.
    """
    fused = fused_name(tuple(sizes))
    dense = partial(nn.Dense, use_bias=use_bias)
    if not module.has_variable("params", fused):
        return [dense(size, name=name)(x) for name, size in sizes.items()]
    ends = np.cumsum(list(sizes.values()))
    outputs = dense(int(ends[-1]), name=fused)(x)
    return jnp.split(outputs, ends[:-1], axis=-1)


class Attention(nn.Module):
    """Self-attention with rotary positions and grouped queries."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        positions: Positions,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "batch tokens hidden"], LayerCache | None]:
        """Returns the output, and the updated cache if there was one."""
        config = self.config
        batch, tokens, _ = x.shape
        sizes = {
            "q_proj": config.num_heads * config.head_dim,
            "k_proj": config.num_kv_heads * config.head_dim,
            "v_proj": config.num_kv_heads * config.head_dim,
        }
        flat = _projections(self, x, sizes, config.attention_bias)
        heads = (batch, tokens, -1, config.head_dim)
        queries, keys, values = (outputs.reshape(heads) for outputs in flat)
        queries = rotate(queries, positions.rotary)
        # From here on keys and values are (batch, kv_heads, tokens, head_dim), as a cache has them.
        keys = rotate(keys, positions.rotary).swapaxes(1, 2)
        values = values.swapaxes(1, 2)

        in_order = cache is None or config.sliding_window is None
        if cache is None:
            # The tokens look at each other: a cache of floats that lasts for this call.
            read = Slots(keys), Slots(values)
        else:
            ring = not in_order
            written = (
                write(cache[0], keys, positions.start, positions.in_row, ring),
                write(
                    cache[1], values, positions.start, positions.in_row, ring
                ),
            )
            # Behind a barrier the cache is read as it is stored. Without one XLA:CPU would write it
            # again for each matmul that reads it.
            read = cache = jax.lax.optimization_barrier(written)
        mixed = attend(queries, *read, positions.mask, in_order).reshape(
            batch, tokens, -1
        )
        output = nn.Dense(
            config.hidden_size, use_bias=config.attention_bias, name="o_proj"
        )
        return output(mixed), cache


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens hidden"]:
        config = self.config
        sizes = {
            "gate_proj": config.intermediate_size,
            "up_proj": config.intermediate_size,
        }
        gate, up = _projections(self, x, sizes, config.mlp_bias)
        down = nn.Dense(
            config.hidden_size, use_bias=config.mlp_bias, name="down_proj"
        )
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and each added to the residual stream."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, positions: Positions, cache: LayerCache | None):
        eps = self.config.rms_norm_eps
        attention = Attention(self.config, name="self_attn")
        normed = RMSNorm(eps, name="input_layernorm")(x)
        mixed, cache = attention(normed, positions, cache)
        x = x + mixed
        normed = RMSNorm(eps, name="post_attention_layernorm")(x)
        x = x + MLP(self.config, name="mlp")(normed)
        return x, cache


class Layers(nn.Module):
    """All blocks, unrolled, under the names "0", "1", ...

    They also run from one stack (`sqjax.models.stack_layers`). Without a cache the stack is
    scanned. With one its layers run one after the other, because a cache has arrays of its own for
    each layer, which a scan can not read.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, positions: Positions, cache: KVCache | None):
        config = self.config
        held = self.variables.get("params", {})
        stacked = not self.is_initializing() and check_layers(
            held, config.num_layers
        )
        # A block that is no submodule of this one: it runs on the parameters that it is given.
        run_layer = Block(config, parent=None).apply
        if stacked and cache is None:
            return jax.lax.scan(
                lambda x, layer: run_layer(
                    {"params": layer}, x, positions, None
                ),
                x,
                held,
            )

        grown = []
        for i in range(config.num_layers):
            of_layer = (
                None if cache is None else (cache.keys[i], cache.values[i])
            )
            if stacked:
                layer = {"params": layer_of(held, i)}
                x, new = run_layer(layer, x, positions, of_layer)
            else:
                x, new = Block(config, name=str(i))(x, positions, of_layer)
            grown.append(new)
        if cache is None:
            return x, None
        keys, values = zip(*grown, strict=True)
        return x, KVCache(
            keys, values, cache.length + x.shape[1], cache.padding
        )


class Decoder(nn.Module):
    """Embedding, blocks and final norm; and the embedding matrix's logits, for a tied output."""

    config: LlamaConfig

    def setup(self):
        """Names the parts as Hugging Face does."""
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
        self.layers = Layers(config)
        self.norm = RMSNorm(config.rms_norm_eps)

    def __call__(self, ids: Int[Array, "batch tokens"], cache: KVCache | None):
        """Each token's hidden state after the final norm; and the cache grown, if there was one."""
        x = self.embed_tokens(ids)
        positions = _next_positions(self.config, ids.shape[1], cache, x.dtype)
        x, cache = self.layers(x, positions, cache)
        return self.norm(x), cache

    def attend(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens vocab"]:
        """Logits by the embedding matrix: x E^T."""
        return self.embed_tokens.attend(x)


def _next_positions(
    config: LlamaConfig, tokens: int, cache: KVCache | None, dtype: DTypeLike
) -> Positions:
    """Where the next tokens of a cache stand; without a cache, those from position 0 on."""
    if cache is None:
        start, slots = jnp.int32(0), tokens
        padding = jnp.zeros(
            (1,), jnp.int32
        )  # one row, which serves the whole batch
    else:
        start, slots = cache.length, cache.capacity
        padding = cache.padding
    written_at = start + jnp.arange(tokens, dtype=jnp.int32)
    in_row = written_at[None, :] - padding[:, None]
    # Padding has no position. It takes that of the first token; the mask hides it from all others.
    rotary = rotary_table(
        jnp.maximum(in_row, 0), config.head_dim, config.rope_theta, dtype
    )
    mask = visible(start, tokens, slots, padding, config.sliding_window)
    return Positions(rotary, mask, start, in_row)


class Llama(nn.Module):
    """A Llama decoder: token ids to the logits of the next token.

    The parameter tree has Hugging Face's names: ``model/layers/0/self_attn/q_proj/kernel`` and so
    on, kernels in (in, out); ``lm_head/kernel`` only when the embeddings are not tied. Layers may
    also be one stack, as `sqjax.models.stack_layers` makes it:
    ``model/layers/self_attn/q_proj/kernel``, (layers, in, out). Everything is computed in the
    parameters' dtype but norms and softmax, which are computed in float32.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch tokens"],
        cache: KVCache | None = None,
        last: bool = False,
    ) -> tuple[Float[Array, "batch positions vocab"], KVCache | None]:
        """Logits of every position, or of the last only; and the cache grown, if there was one."""
        decoder = Decoder(self.config, name="model")
        x, cache = decoder(ids, cache)
        # A prefill needs one position's logits, and the head is the largest matmul.
        if last:
            x = x[:, -1:]
        # A tied model has no lm_head: the embedding matrix, transposed, is its head.
        if self.config.tie_embeddings:
            return decoder.attend(x), cache
        head = nn.Dense(self.config.vocab_size, use_bias=False, name="lm_head")
        return head(x), cache
