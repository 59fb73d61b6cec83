"""One decoder in Flax linen for every family: a `DecoderConfig` says what it computes.

The parameter tree has the names of Hugging Face's Llama, whatever the family's own are, so that
rules and alphas for one family serve the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sqjax.models.cache import KVCache, PrefixCache
from sqjax.models.config import DecoderConfig
from sqjax.models.mlp import MLP, Mixture
from sqjax.models.norms import Gain, NormLayer
from sqjax.models.positions import Positions, next_positions
from sqjax.models.self_attention import (
    Attention,
    Context,
    LayerCache,
    MultiHeadLatentAttention,
)
from sqjax.models.stacking import check_layers, layer_of


class _Norms(NamedTuple):
    """The names of a block's norms, each None where there is none, and where they stand.

    Attributes:
        before_attention, before_mlp: of their inputs.
        after_attention, after_mlp: of their outputs, or of the sums with x.
    """

    before_attention: str | None = None
    before_mlp: str | None = None
    after_attention: str | None = None
    after_mlp: str | None = None


#: The norms of each of `config.BLOCKS`.
_NORMS = {
    "pre": _Norms("input_layernorm", "post_attention_layernorm"),
    "output": _Norms(
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    "sandwich": _Norms(
        "input_layernorm",
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "sum": _Norms(
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    "scaled": _Norms(
        "input_layernorm",
        "post_attention_layernorm",
        "attention_scale",
        "mlp_scale",
    ),
    "parallel": _Norms("input_layernorm", None),
    "parallel_two": _Norms("input_layernorm", "post_attention_layernorm"),
}


#: Which of these are a gain alone: nothing is divided by its size.
_GAINS = ("attention_scale", "mlp_scale")


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream as `config.block` says."""

    config: DecoderConfig
    has_experts: bool = False
    first_norm: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens hidden"], context: Context
    ) -> tuple[Float[Array, "batch tokens hidden"], LayerCache | None]:
        """Returns x with both added, and the updated cache if there was one."""
        config = self.config
        names = _NORMS[config.block]
        if not self.first_norm:
            names = names._replace(before_attention=None)
        attention = (
            MultiHeadLatentAttention(config, config.latent, name="self_attn")
            if config.latent
            else Attention(config, name="self_attn")
        )
        normed = self._norm(names.before_attention, x)
        mixed, cache = attention(normed, context)
        if config.block == "parallel":
            return self._add(x, mixed + self._mlp(normed)), cache
        if config.block == "parallel_two":
            other = self._mlp(self._norm(names.before_mlp, x))
            return self._add(x, mixed + other), cache
        x = self._added(x, mixed, names.after_attention)
        change = self._mlp(self._norm(names.before_mlp, x))
        return self._added(x, change, names.after_mlp), cache

    def _norm(self, name: str | None, x: Array) -> Array:
        """The norm of x that has a name; x itself where there is none."""
        if name is None:
            return x
        if name in _GAINS:
            return Gain(name=name)(x)
        return NormLayer(self.config.norm, name=name)(x)

    def _mlp(self, x: Array) -> Array:
        experts = self.config.experts
        if self.has_experts and experts is not None:
            return Mixture(self.config, experts, name="mlp")(x)
        size = self.config.intermediate_size
        return MLP(self.config, size, name="mlp")(x)

    def _added(self, x: Array, change: Array, norm: str | None) -> Array:
        """x with a change added, where a norm is taken of the sum or of the change."""
        if self.config.block == "sum":
            return self._norm(norm, self._add(x, change))
        return self._add(x, self._norm(norm, change))

    def _add(self, x: Array, change: Array) -> Array:
        scale = self.config.residual_scale
        return x + change if scale == 1 else x + change * scale


class Layers(nn.Module):
    """All blocks, unrolled, under the names "0", "1", ...

    They also run from one stack (`sqjax.models.stack_layers`). Without a cache the stack is
    scanned. With one its layers run one after the other, because a cache has arrays of its own for
    each layer, which a scan can not read.
    """

    config: DecoderConfig
    remat: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens hidden"],
        positions: Positions,
        cache: KVCache | None,
        prefix: PrefixCache | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], KVCache | None]:
        """What the last block gives; and the cache grown, if there was one."""
        config = self.config
        held = self.variables.get("params", {})
        stacked = not self.is_initializing() and check_layers(
            held, config.num_layers
        )
        if stacked and cache is None:
            run_layer = _run_layer(config, 0)
            if self.remat:
                run_layer = jax.checkpoint(run_layer)
            return _scanned(config, run_layer, held, x, positions, prefix), None

        block_class = nn.remat(Block) if self.remat else Block
        grown = []
        for i in range(config.num_layers):
            context = _context(config, positions, i, cache, prefix)
            if stacked:
                layer = {"params": layer_of(held, i)}
                x, new = _run_layer(config, i)(layer, x, context)
            else:
                block = block_class(*_block(config, i), name=str(i))
                x, new = block(x, context)
            grown.append(new)
        if cache is None:
            return x, None
        keys, values = zip(*grown, strict=True)
        return x, KVCache(
            keys, values, cache.length + x.shape[1], cache.padding
        )


def _run_layer(config: DecoderConfig, i: int):
    """Layer i as a function of its parameters: a block that is no submodule of another."""
    return Block(*_block(config, i), parent=None).apply


def _block(config: DecoderConfig, i: int) -> tuple[DecoderConfig, bool, bool]:
    """The attributes of layer i's block."""
    return config, config.has_experts(i), config.has_first_norm(i)


def _context(
    config: DecoderConfig,
    positions: Positions,
    i: int,
    cache: KVCache | None,
    prefix: PrefixCache | None = None,
) -> Context:
    """What layer i needs beside x."""
    kind = config.kind(i)
    of_layer = None if cache is None else (cache.keys[i], cache.values[i])
    return Context(
        view=positions.views[config.different_kinds.index(kind)],
        start=positions.start,
        in_row=positions.in_row,
        ring=kind.sliding_window is not None,
        cache=of_layer,
        prefix=None if prefix is None else prefix.layer(i),
    )


def _scanned(
    config: DecoderConfig,
    run_layer: Callable,
    stack,
    x: Array,
    positions: Positions,
    prefix: PrefixCache | None,
) -> Array:
    """x after all layers of a stack, without a cache. One program serves layers of every kind."""
    context = _context(config, positions, 0, None)
    different = config.different_kinds
    # The keys and values of a prefix are scanned with the layers.
    held = None if prefix is None else prefix.stacked()
    if len(different) == 1:

        def step_of_one(x, scanned):
            layer, own = scanned
            return run_layer({"params": layer}, x, context._replace(prefix=own))

        x, _ = jax.lax.scan(step_of_one, x, (stack, held))
        return x

    # Each layer picks its kind's mask and angles out of those of all kinds.
    views = jax.tree.map(lambda *parts: jnp.stack(parts), *positions.views)
    numbers = np.array(list(map(different.index, config.kinds)), np.int32)

    def step(x, scanned):
        layer, number, own = scanned
        view = jax.tree.map(lambda part: part[number], views)
        changed = context._replace(view=view, prefix=own)
        return run_layer({"params": layer}, x, changed)

    x, _ = jax.lax.scan(step, x, (stack, jnp.asarray(numbers), held))
    return x


class Decoder(nn.Module):
    """Embedding, blocks and final norm; and the embedding matrix's logits, for a tied output."""

    config: DecoderConfig
    remat: bool

    def setup(self):
        """Names the parts as Hugging Face's Llama does."""
        config = self.config
        width = config.embedding_size or config.hidden_size
        self.embed_tokens = nn.Embed(config.vocab_size, width)
        if config.embedding_size is not None:
            self.project_in = nn.Dense(config.hidden_size, use_bias=False)
            self.project_out = nn.Dense(width, use_bias=False)
        if config.learned_positions:
            rows = config.max_length + config.position_offset
            self.embed_positions = nn.Embed(rows, config.hidden_size)
        if config.embedding_norm:
            self.embed_layernorm = NormLayer(config.norm)
        self.layers = Layers(config, self.remat)
        if config.final_norm:
            self.norm = NormLayer(config.norm)

    def __call__(
        self,
        ids: Int[Array, "batch tokens"],
        cache: KVCache | None,
        prefix: PrefixCache | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], KVCache | None]:
        """Each token's hidden state before the head; and the cache grown, if there was one."""
        x, positions = self.embed(ids, cache, prefix)
        x, cache = self.layers(x, positions, cache, prefix)
        return self.finish(x), cache

    def embed(
        self,
        ids: Int[Array, "batch tokens"],
        cache: KVCache | None,
        prefix: PrefixCache | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], Positions]:
        """What the first block reads, and where the tokens stand."""
        x = self.embed_tokens(ids)
        count = 0 if prefix is None else prefix.tokens
        positions = next_positions(
            self.config, ids.shape[1], cache, x.dtype, count
        )
        return self._embedded(x, positions, count), positions

    def finish(
        self, x: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch tokens width"]:
        """What the head reads, of what the last block gives."""
        if self.config.final_norm:
            x = self.norm(x)
        if self.config.embedding_size is not None:
            x = self.project_out(x)
        return x

    def _embedded(
        self,
        x: Float[Array, "batch tokens width"],
        positions: Positions,
        before: int,
    ) -> Float[Array, "batch tokens hidden"]:
        """What the first block reads, from the rows of the embedding, after `before` tokens."""
        config = self.config
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.embedding_size is not None:
            x = self.project_in(x)
        if config.learned_positions:
            # Padding has no position. It takes that of the first token.
            in_row = jnp.maximum(positions.in_row, 0)
            offset = before + config.position_offset
            x = x + self.embed_positions(in_row + offset)
        return self.embed_layernorm(x) if config.embedding_norm else x

    def attend(
        self, x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens vocab"]:
        """Logits by the embedding matrix: x E^T."""
        return self.embed_tokens.attend(x)


class CausalLM(nn.Module):
    """A decoder with its head: token ids to the logits of the next token.

    The parameter tree has Hugging Face's names for Llama:
    ``model/layers/0/self_attn/q_proj/kernel`` and so on, kernels in (in, out); ``lm_head/kernel``
    only when the embeddings are not tied. Layers may also be one stack, as
    `sqjax.models.stack_layers` makes it: ``model/layers/self_attn/q_proj/kernel``, (layers, in,
    out). Everything is computed in the parameters' dtype but norms, routers and softmax, which are
    computed in float32.
    """

    config: DecoderConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch tokens"],
        cache: KVCache | None = None,
        last: bool = False,
        prefix: PrefixCache | None = None,
    ) -> tuple[Float[Array, "batch positions vocab"], KVCache | None]:
        """Logits of every position, or of the last only; and the cache grown, if there was one."""
        config = self.config
        decoder = Decoder(config, self.remat, name="model")
        x, cache = decoder(ids, cache, prefix)
        # A prefill needs one position's logits, and the head is the largest matmul.
        if last:
            x = x[:, -1:]
        # A tied model has no lm_head: the embedding matrix, transposed, is its head.
        tied = config.tie_embeddings
        head = decoder.attend if tied else _head(config, name="lm_head")
        return _capped(config, head(x)), cache


def _head(config: DecoderConfig, name: str | None = None) -> nn.Dense:
    """The head of a model whose embeddings are not tied."""
    return nn.Dense(config.vocab_size, use_bias=config.head_bias, name=name)


def _capped(config: DecoderConfig, logits: Array) -> Array:
    """Logits with the configuration's scale and soft cap."""
    if config.logit_scale != 1:
        logits = logits * config.logit_scale
    if config.logit_softcap is None:
        return logits
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap)


# Part by part: embed, every layer in turn, read_out -----------------------------------------------

#: What the paths of those parameters begin with that `read_out` reads beside a tied embedding, and
#: `embed` does not.
HEAD = ("lm_head/", "model/norm/", "model/project_out/")


def embed(
    config: DecoderConfig, params: Any, ids: Int[Array, "batch tokens"]
) -> Float[Array, "batch tokens hidden"]:
    """What the first layer reads. Of params, none of `HEAD` and of the layers is read."""
    decoder: Any = Decoder(config, remat=False)
    of_decoder = {"params": params["model"]}
    # Without a cache: the positions begin at 0.
    x, _ = decoder.apply(of_decoder, ids, None, method="embed")
    return x


def run_layer(
    config: DecoderConfig,
    layer: int,
    params: Any,
    x: Float[Array, "batch tokens hidden"],
) -> Float[Array, "batch tokens hidden"]:
    """What one layer gives, of what it reads; `params` are its own."""
    # Positions cost little, and are found again for each layer.
    positions = next_positions(config, x.shape[1], None, x.dtype)
    context = _context(config, positions, layer, None)
    x, _ = _run_layer(config, layer)({"params": params}, x, context)
    return x


def read_out(
    config: DecoderConfig, params: Any, x: Float[Array, "batch tokens hidden"]
) -> Float[Array, "batch tokens vocab"]:
    """The logits, of what the last layer gives. Of params, those of `HEAD` and a tied embedding are
    read.
    """
    decoder: Any = Decoder(config, remat=False)
    of_decoder = {"params": params["model"]}
    x = decoder.apply(of_decoder, x, method="finish")
    if config.tie_embeddings:
        return _capped(config, decoder.apply(of_decoder, x, method="attend"))
    head: Any = _head(config)
    return _capped(config, head.apply({"params": params["lm_head"]}, x))
