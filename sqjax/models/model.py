"""`Model`: a decoder's configuration and tokenizer together with the pure functions that run it."""

from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sqjax._arguments import expect
from sqjax._trees import named_leaves
from sqjax.models.cache import KVCache, PrefixCache, empty_cache
from sqjax.models.config import DecoderConfig
from sqjax.models.decoder import CausalLM
from sqjax.models.fields import SIZE, check
from sqjax.models.slots import CacheFormat, cache_format
from sqjax.models.tokenizer import Tokenizer
from sqjax.weights.quant_weight import is_quantized

Params = Any  # a nested dict of arrays, or of whatever `sqjax.quantize` put in their place
TokenIds = Int[Array | np.ndarray, "batch tokens"]


@dataclass(frozen=True)
class Model:
    """A decoder language model without its parameters.

    Two models are equal when they are but for their tokenizers. Every method is a pure function
    that may be jitted, and takes the bare parameter tree (no "params" level):

        model, params = sqjax.models.load("smollm2-135m")
        ids = jnp.asarray([model.tokenizer.encode("The capital of France is")])
        logits = jax.jit(model.apply)(params, ids)

    Attributes:
        config: what it computes.
        tokenizer: texts to token ids and back; None where the checkpoint has none.
        remat: whether the gradient of `apply` computes each block's activations again, in place of
            keeping them (`jax.checkpoint`).
    """

    config: DecoderConfig
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)
    remat: bool = False

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters of a dtype; ``jax.eval_shape(model.init, key)`` gives their shapes."""
        one_token = jnp.zeros((1, 1), jnp.int32)
        return initialized(CausalLM(self.config), key, dtype, one_token)

    def apply(
        self,
        params: Params,
        ids: TokenIds,
        prefix: PrefixCache | None = None,
    ) -> Float[Array, "batch tokens vocab"]:
        """The logits of the token after each position.

        Layers in one stack (`stack_layers`) are scanned.

        Args:
            params: the bare parameter tree.
            ids: the tokens.
            prefix: the keys and values of tokens that stand before every row: the `cache` of what
                `sqjax.models.prefix` returns. The logits are those of the ids alone.

        Raises:
            ValueError: if there are more tokens than ``config.max_length``, the prefix is another
                model's, or the parameters' layers are not as many as the configuration says, apart
                or in one stack.
        """
        check_ids(ids)
        check_floats(params)
        self._check_length(ids.shape[1], prefix)
        variables = {"params": params}
        module = CausalLM(self.config, self.remat)
        logits, _ = module.apply(variables, jnp.asarray(ids), prefix=prefix)
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
            chunk: how many tokens at most will be read at once. It matters only to a model with a
                sliding window, whose layers hold a ring of window + chunk - 1 slots if that is
                less than ``length`` (the default).

        Raises:
            ValueError: if ``length`` is more than ``config.max_length``, or there is no such kind.
        """
        check("batch", batch, SIZE)
        check("length", length, SIZE)
        self._check_length(length)
        return cache_for(self.config, batch, length, dtype, kind, chunk)

    def decode(
        self,
        params: Params,
        ids: TokenIds,
        cache: KVCache,
        prefix: PrefixCache | None = None,
    ) -> tuple[Float[Array, "batch vocab"], KVCache]:
        """Reads more tokens: the logits after the last one, and the cache that remembers them all.

        Several tokens at once are a prefill, one token is a step. Inside `jax.jit` nothing can
        see a cache overflow over several calls, so make the cache as long as everything that will
        be read. Parameters whose layers are one stack are read too. Then each layer is copied out
        of the stack on every call, so for a loop take them apart once, by `unstack_layers`. A
        prefix is as in `apply`, the same one on every call; it takes no slots of the cache.

        Raises:
            ValueError: if these tokens are more than the cache has room for, or than
                ``config.max_length`` after the prefix, or cache or prefix are another model's.
        """
        check_floats(params)
        self._check_cache(ids, cache)
        self._check_prefix(ids, cache, prefix)
        variables = {"params": params}
        logits, grown = CausalLM(self.config).apply(
            variables, jnp.asarray(ids), cache, last=True, prefix=prefix
        )
        return logits[:, -1], cast(KVCache, grown)

    def read(
        self,
        params: Params,
        ids: TokenIds,
        cache: KVCache,
        prefix: PrefixCache | None = None,
    ) -> tuple[Float[Array, "batch tokens vocab"], KVCache]:
        """As `decode`, with the logits after every token."""
        check_floats(params)
        self._check_cache(ids, cache)
        self._check_prefix(ids, cache, prefix)
        variables = {"params": params}
        logits, grown = CausalLM(self.config).apply(
            variables, jnp.asarray(ids), cache, prefix=prefix
        )
        return logits, cast(KVCache, grown)

    def _check_cache(self, ids: TokenIds, cache: KVCache) -> None:
        """Raises ValueError if the cache is another model's, or has no room for these tokens."""
        config = self.config
        check_ids(ids)
        rows, tokens = ids.shape
        expected = (
            config.num_layers,
            rows,
            config.num_kv_heads,
            config.head_dim,
        )
        first = cache.keys[0]
        held_rows, kv_heads = first.codes.shape[:2]
        got = (len(cache.keys), held_rows, kv_heads, first.head_dim)
        if got != expected:
            raise ValueError(
                f"cache: expected (layers, batch, kv_heads, head_dim) = {expected}, "
                f"got {got}; a cache belongs to one model and one number of rows: make it with "
                "model.init_cache(batch, length)"
            )
        # Inside jit the length is not known, so a cache that is too full is not seen there.
        is_traced = isinstance(cache.length, jax.core.Tracer)
        held = 0 if is_traced else int(cache.length)
        room = min(
            _room(config, layer, slots.capacity, held)
            for layer, slots in enumerate(cache.keys)
        )
        if tokens > room:
            raise ValueError(
                f"cache: expected room for {tokens} tokens, got {room}; "
                "make a longer one with model.init_cache(batch, length)"
            )

    def _check_prefix(
        self, ids: TokenIds, cache: KVCache, prefix: PrefixCache | None
    ) -> None:
        """Raises ValueError if a prefix is another model's, or leaves no room for these tokens."""
        if prefix is None:
            return
        check_prefix(self.config, prefix)
        # Inside jit nobody knows how many tokens the cache holds.
        traced = jax.core.Tracer
        if not isinstance(cache.length + cache.padding, traced):
            held = int(jnp.max(cache.length - cache.padding))
            self._check_length(held + ids.shape[1], prefix)

    def _check_length(
        self, tokens: int, prefix: PrefixCache | None = None
    ) -> None:
        if prefix is not None:
            check_prefix(self.config, prefix)
            tokens += prefix.tokens
        if tokens > self.config.max_length:
            raise ValueError(
                f"tokens: expected at most {self.config.max_length} (config.max_length), got "
                f"{tokens}; the model was not trained for longer sequences: split the input into "
                "windows"
            )


def _room(config: DecoderConfig, layer: int, capacity: int, held: int) -> int:
    """How many tokens a layer's slots have room for, beside those that are needed still.

    A ring may write over old tokens, except those that the first new token looks at. It looks at
    sliding_window tokens, of which one is the token itself.
    """
    window = config.kind(layer).sliding_window
    needed = held if window is None else min(held, window - 1)
    return capacity - needed


def check_prefix(config: DecoderConfig, prefix: Any) -> None:
    """Raises ValueError unless these are keys and values of a model of this configuration."""
    expect(
        isinstance(prefix, PrefixCache),
        "prefix",
        "the `cache` of what sqjax.models.prefix returns",
        prefix,
    )
    shapes = [part.shape for part in (*prefix.keys, *prefix.values)]
    lead = (config.num_kv_heads, prefix.tokens)
    of_layers = config.num_layers
    expected = [(*lead, config.head_dim)] * of_layers
    expected += [(*lead, config.value_dim)] * of_layers
    if shapes != expected:
        raise ValueError(
            f"prefix: expected keys and values of {of_layers} layers, {expected[0]} and "
            f"{expected[-1]} each, got {len(prefix.keys)} layers of {shapes[0]}; a prefix belongs "
            "to one model: make it with sqjax.models.prefix(model, params, ...)"
        )


def initialized(
    module: Any, key: Array, dtype: DTypeLike, *inputs: Array, **options: Any
) -> Params:
    """Random parameters of a module, in a dtype; what it is called with makes all of them."""
    variables = module.init(key, *inputs, **options)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), variables["params"])


def check_model(model: Any, what: str) -> None:
    """Raises ValueError for what is no `Model`: its function, or one of the user's own."""
    expect(
        isinstance(model, Model),
        what,
        "a sqjax.models.Model, such as sqjax.models.load gives (a plain function has neither a "
        "cache nor a vocabulary)",
        model,
    )


def check_floats(params: Any) -> None:
    """Raises ValueError, naming the leaf, for parameters that only `sqjax.quantized` can run.

    flax would say that a kernel has another shape, because a quantized one is stored the other way.
    """
    names, leaves, _ = named_leaves(params, is_leaf=is_quantized)
    for name, leaf in zip(names, leaves, strict=True):
        if is_quantized(leaf):
            raise ValueError(
                f"{name}: expected an array, got a quantized weight; run "
                "sqjax.quantized(fn)(qparams, ...), where fn is what was called"
            )


def compute_dtype(params: Params) -> DTypeLike:
    """The dtype in which a model computes: that of a norm's weight, which is never quantized."""
    paths, leaves, _ = named_leaves(params, is_leaf=is_quantized)
    for path, leaf in zip(paths, leaves, strict=True):
        if path.endswith("norm/weight"):
            return leaf.dtype
    raise ValueError(
        f"params: expected a norm's weight among the parameters of a Model, got {paths[:5]}"
    )


def check_ids(ids: Any) -> None:
    """Raises ValueError unless these are token ids, (batch, tokens), of at least one token."""
    shape = getattr(ids, "shape", None)
    if shape is None or len(shape) != 2:
        raise ValueError(
            f"ids: expected an array (batch, tokens), got {shape or type(ids).__name__}; make one "
            "with jnp.asarray([ids]) of one text's ids; texts are encoded by a tokenizer first"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: expected integers, got {ids.dtype}")
    if 0 in shape:
        raise ValueError(
            f"tokens: expected at least one, got none: ids of shape {shape}"
        )


def cache_for(
    config: DecoderConfig,
    batch: int,
    length: int,
    dtype: DTypeLike,
    kind: str | CacheFormat,
    chunk: int | None,
) -> KVCache:
    """As `Model.init_cache`, of any length: the slots of padding are no positions.

    A ring has window + chunk - 1 slots because the first token of a chunk still looks at the
    window - 1 tokens before it, while the whole chunk is written. With a window of 4 and chunks
    of 3 these are 3 old tokens and 3 new ones: 6 slots.
    """
    capacities = []
    for layer in range(config.num_layers):
        window = config.kind(layer).sliding_window
        slots = length
        # Never more slots than tokens: a text shorter than the window fills no ring.
        if window is not None and chunk is not None:
            slots = min(length, window + chunk - 1)
        capacities.append(slots)
    return empty_cache(
        batch=batch,
        kv_heads=config.num_kv_heads,
        capacities=capacities,
        head_dims=(config.head_dim, config.value_dim),
        dtype=dtype,
        kind=cache_format(kind),
    )
