"""`Model`: a decoder's configuration and tokenizer together with the pure functions that run it."""

from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sqjax.models.attention import KVCache, empty_cache
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
        """The logits of the token after each position.

        Raises:
            ValueError: if there are more tokens than ``config.max_length``.
        """
        self._check_length(ids.shape[1])
        logits, _ = Llama(self.config).apply({"params": params}, jnp.asarray(ids))
        return logits

    def init_cache(self, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> KVCache:
        """An empty cache with room for ``length`` tokens in each row; its dtype is that of the parameters.

        Raises:
            ValueError: if ``length`` is more than ``config.max_length``.
        """
        self._check_length(length)
        config = self.config
        return empty_cache(config.num_layers, batch, config.num_kv_heads, length, config.head_dim, dtype)

    def decode(self, params: Params, ids: TokenIds, cache: KVCache) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """Reads more tokens: the logits after the last of them, and the cache that remembers them all.

        Several tokens at once are a prefill, one token is a step. Inside `jax.jit` nothing can see a cache
        overflow over several calls: make the cache as long as everything that will be read.

        Raises:
            ValueError: if these tokens alone are more than the cache has room for.
        """
        capacity = cache.keys[0].shape[2]
        if ids.shape[1] > capacity:
            raise ValueError(
                f"cache: expected room for {ids.shape[1]} tokens, got {capacity}; "
                "make a longer one with model.init_cache(batch, length)"
            )
        logits, grown = Llama(self.config).apply({"params": params}, jnp.asarray(ids), cache)
        return logits[:, -1], cast(KVCache, grown)

    def _check_length(self, tokens: int) -> None:
        if tokens > self.config.max_length:
            raise ValueError(
                f"tokens: expected at most {self.config.max_length} (config.max_length), got {tokens}; "
                "the model was not trained for longer sequences: cut the input into windows"
            )
