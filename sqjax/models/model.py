"""`Model`: a decoder's configuration and tokenizer together with the pure functions that run it."""

from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sqjax.models.cache import CacheFormat, KVCache, cache_format, empty_cache
from sqjax.models.llama import Llama, LlamaConfig
from sqjax.models.tokenizer import Tokenizer

Params = Any  # a nested dict of arrays, or of whatever `sqjax.quantize` put in their place
TokenIds = Int[Array | np.ndarray, "batch tokens"]


@dataclass(frozen=True)
class Model:
    """A decoder language model without its parameters. Two models are equal when their configurations are.

    Every method is a pure function that may be jitted, and takes the bare parameter tree (no "params" level):

        model, params = sqjax.models.load("smollm2-135m")
        ids = jnp.asarray([model.tokenizer.encode("The capital of France is")])
        logits = jax.jit(model.apply)(params, ids)
    """

    config: LlamaConfig
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters of a dtype. ``jax.eval_shape(model.init, key)`` gives their shapes only."""
        params = Llama(self.config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def apply(self, params: Params, ids: TokenIds) -> Float[Array, "batch tokens vocab"]:
        """The logits of the token after each position. Layers in one stack (`stack_layers`) are scanned.

        Raises:
            ValueError: if there are more tokens than ``config.max_length``, or the parameters' layers are not as many
                as the configuration says, apart or in one stack.
        """
        self._check_length(ids.shape[1])
        logits, _ = Llama(self.config).apply({"params": params}, jnp.asarray(ids))
        return logits

    def init_cache(
        self,
        batch: int,
        length: int,
        dtype: DTypeLike = jnp.float32,
        kind: str | CacheFormat = "float",
        chunk: int | None = None,
    ) -> KVCache:
        """An empty cache with room for ``length`` tokens in each row.

        Args:
            batch: the number of rows.
            length: the number of tokens.
            dtype: that of the parameters; keys and values have it if they are stored as floats.
            kind: "float", "int8", "e4m3", "int4" or a `CacheFormat`.
            chunk: how many tokens at most will be read at once. It matters only to a model with a sliding window,
                whose cache is a ring of window + chunk - 1 slots if that is less than ``length`` (the default).

        Raises:
            ValueError: if ``length`` is more than ``config.max_length``, or there is no such kind.
        """
        self._check_length(length)
        return cache_for(self.config, batch, length, dtype, kind, chunk)

    def decode(
        self, params: Params, ids: TokenIds, cache: KVCache
    ) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """Reads more tokens: the logits after the last of them, and the cache that remembers them all.

        Several tokens at once are a prefill, one token is a step. Inside `jax.jit` nothing can see a cache
        overflow over several calls: make the cache as long as everything that will be read. Parameters whose layers are
        one stack are read too, each layer copied out of it: for a loop take them apart once, by `unstack_layers`.

        Raises:
            ValueError: if these tokens are more than the cache has room for, or it is another model's.
        """
        self._check_cache(ids, cache)
        logits, grown = Llama(self.config).apply({"params": params}, jnp.asarray(ids), cache, True)
        return logits[:, -1], cast(KVCache, grown)

    def read(
        self, params: Params, ids: TokenIds, cache: KVCache
    ) -> tuple[Float[Array, "batch tokens vocab"], KVCache]:
        """As `decode`, with the logits after every token."""
        self._check_cache(ids, cache)
        logits, grown = Llama(self.config).apply({"params": params}, jnp.asarray(ids), cache)
        return logits, cast(KVCache, grown)

    def _check_cache(self, ids: TokenIds, cache: KVCache) -> None:
        config, tokens = self.config, ids.shape[1]
        _check_some(tokens)
        expected = (config.num_layers, ids.shape[0], config.num_kv_heads, config.head_dim)
        got = (len(cache.keys), *cache.keys[0].codes.shape[:2], cache.keys[0].head_dim)
        if got != expected:
            raise ValueError(
                f"cache: expected (layers, batch, kv_heads, head_dim) = {expected}, got {got}; a cache belongs to one "
                "model and one number of rows: make it with model.init_cache(batch, length)"
            )
        held = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
        # What the first of these tokens looks at must not be written over.
        room = cache.capacity - (
            held if config.sliding_window is None else min(held, config.sliding_window - 1)
        )
        if tokens > room:
            raise ValueError(
                f"cache: expected room for {tokens} tokens, got {room}; "
                "make a longer one with model.init_cache(batch, length)"
            )

    def _check_length(self, tokens: int) -> None:
        _check_some(tokens)
        if tokens > self.config.max_length:
            raise ValueError(
                f"tokens: expected at most {self.config.max_length} (config.max_length), got {tokens}; "
                "the model was not trained for longer sequences: cut the input into windows"
            )


def _check_some(tokens: int) -> None:
    if tokens < 1:
        raise ValueError("tokens: expected at least one, got none")


def cache_for(
    config: LlamaConfig,
    batch: int,
    length: int,
    dtype: DTypeLike,
    kind: str | CacheFormat,
    chunk: int | None,
) -> KVCache:
    """As `Model.init_cache`, of any length: the slots of padding are no positions."""
    if config.sliding_window is not None and chunk is not None:
        length = min(length, config.sliding_window + chunk - 1)
    shape = config.num_layers, batch, config.num_kv_heads, length, config.head_dim
    return empty_cache(*shape, dtype, cache_format(kind))
