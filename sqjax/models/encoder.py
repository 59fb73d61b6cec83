"""`Encoder`: texts to vectors, by BERT and its relatives.

One Flax module serves every family: an `EncoderConfig` says what it computes. Its blocks are the
decoder's, so that the parameter tree has the same names, and rules and alphas serve both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sqjax.models.decoder import Layers
from sqjax.models.encoder_config import EncoderConfig
from sqjax.models.fields import SIZE, check
from sqjax.models.model import (
    Params,
    TokenIds,
    check_floats,
    check_ids,
    initialized,
)
from sqjax.models.norms import NormLayer
from sqjax.models.pooling import Pooling, pool
from sqjax.models.positions import Positions, turning_channels
from sqjax.models.rope import rotary_table
from sqjax.models.self_attention import View
from sqjax.models.text.batches import (
    Reading,
    TextBatch,
    prepared,
    text_batches,
    token_ids,
)
from sqjax.models.tokenizer import Tokenizer
from sqjax.runtime.quantized import quantized

Mask = Bool[Array, "batch tokens"]


class TextEncoder(nn.Module):
    """Token ids to hidden states: embedding, blocks, and a final norm where there is one."""

    config: EncoderConfig
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch tokens"],
        mask: Mask | None = None,
        token_types: Int[Array, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens hidden"]:
        config = self.config
        x = self._table(config.vocab_size, "embed_tokens", ids)
        numbers = places(config, ids)
        if config.token_types is not None:
            types = jnp.zeros_like(ids) if token_types is None else token_types
            x = x + self._table(config.token_types, "embed_token_types", types)
        if config.learned_positions:
            rows = config.max_length + config.position_offset
            x = x + self._table(
                rows, "embed_positions", numbers + config.position_offset
            )
        if config.embedding_norm:
            x = NormLayer(config.norm, name="embed_layernorm")(x)

        positions = _positions(
            config,
            numbers,
            ids.shape[1],
            mask,
            self._bias(ids.shape[1]),
            x.dtype,
        )
        x, _ = Layers(config.layers, self.remat, name="layers")(
            x, positions, None
        )
        return (
            NormLayer(config.norm, name="norm")(x) if config.final_norm else x
        )

    def _bias(
        self, tokens: int
    ) -> Float[Array, "1 heads tokens tokens"] | None:
        """What the distances of tokens add to scores."""
        config = self.config
        if config.distance_buckets is None:
            return None
        buckets = distance_buckets(tokens, config.distance_buckets)
        table = nn.Embed(
            config.distance_buckets, config.num_heads, name="embed_distances"
        )
        return table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]

    def _table(self, rows: int, name: str, numbers: Array) -> Array:
        """The rows of a table by their numbers."""
        return nn.Embed(rows, self.config.hidden_size, name=name)(numbers)


def places(
    config: EncoderConfig, ids: Int[Array, "batch tokens"]
) -> Int[Array, "rows tokens"]:
    """The position of each token; one row may serve the whole batch."""
    if not config.skips_padding:
        return jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    # By the ids and not by the mask, because so it was trained. 5 slots of which the first 2 hold
    # the id of padding: -1, -1, 0, 1, 2. Before the row of position 0 is that of padding.
    real = ids != config.pad_id
    counted = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    return jnp.where(real, counted, -1)


def _positions(
    config: EncoderConfig,
    places: Int[Array, "rows tokens"],
    tokens: int,
    mask: Mask | None,
    bias: Array | None,
    dtype: DTypeLike,
) -> Positions:
    """How the layers of each kind look around.

    A token looks at all tokens but padding, on either side; with a window of 5, at the 2 before
    it, at itself and at the 2 after it. Where the configuration is causal, not at those after it.
    """
    slots = jnp.arange(tokens, dtype=jnp.int32)
    distance = jnp.abs(slots[:, None] - slots[None, :])[None]
    channels = turning_channels(config.layers)
    views = []
    for kind in config.layers.different_kinds:
        window = kind.sliding_window
        reach = tokens if window is None else window // 2
        seen = distance <= reach
        if config.causal:
            seen = seen & (slots[:, None] >= slots[None, :])[None]
        if mask is not None:
            seen = seen & mask[:, None, :]
        rotary = None
        if channels is not None:
            longest = jnp.int32(tokens)
            rotary = rotary_table(places, kind.rope, channels, longest, dtype)
        views.append(View(rotary, seen, bias))
    return Positions(tuple(views), jnp.int32(0), places)


#: From so many tokens on, all distances are one.
_FARTHEST = 128


def distance_buckets(tokens: int, count: int) -> np.ndarray:
    """The bucket of the distance from each query to each key, int32 (tokens, tokens).

    Half of the buckets are for keys before the query, the others for those after it. Of each half,
    one half again is for one distance each, and the rest grow by one factor (Raffel et al. 2020,
    arXiv 1910.10683). With 32 buckets, keys 0 to 7 tokens before the query have the buckets 0 to 7,
    those 8 to 11 before it share 8, those 91 and more before it share 15; keys 1, 2, 3 after it
    have 17, 18, 19.
    """
    places = np.arange(tokens, dtype=np.int32)
    before = places[:, None] - places[None, :]
    half, single = count // 2, count // 4
    distance = np.abs(before)
    # In float32 like the models' makers, because a bucket ends where a number is whole.
    ratio = np.maximum(distance, single).astype(np.float32) / np.float32(single)
    steps = np.log(ratio) / np.float32(np.log(_FARTHEST / single))
    far = single + (steps * np.float32(half - single)).astype(np.int32)
    bucket = np.where(distance < single, distance, np.minimum(far, half - 1))
    return (bucket + np.where(before < 0, half, 0)).astype(np.int32)


@dataclass(frozen=True)
class Encoder:
    """An encoder of texts without its parameters.

    Two encoders are equal when they are but for their tokenizers. `apply` and `embed` are pure
    functions of the bare parameter tree, which `sqjax.calibrate` and what follows take as they are:

        encoder, params = sqjax.models.load_encoder("all-minilm-l6-v2")
        vectors = encoder.encode(params, ["A cat.", "A dog."])  # (2, 384)

    Attributes:
        config: what it computes.
        tokenizer: texts to token ids; None where the checkpoint has none.
        pooling: how `embed` makes one vector of a text's tokens.
        reading: how `encode` reads texts.
        remat: as for `Model`.
    """

    config: EncoderConfig
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)
    pooling: Pooling = field(default_factory=Pooling)
    reading: Reading = field(default_factory=Reading)
    remat: bool = False

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters of a dtype, as `Model.init` gives them."""
        one_token = jnp.zeros((1, 1), jnp.int32)
        module = TextEncoder(self.config)
        return {"model": initialized(module, key, dtype, one_token)}

    def apply(
        self,
        params: Params,
        ids: TokenIds,
        mask: Any = None,
        token_types: Any = None,
    ) -> Float[Array, "batch tokens hidden"]:
        """The hidden state of each token after the last layer.

        Args:
            params: the parameters, with layers apart or in one stack (`stack_layers`).
            ids: (batch, tokens).
            mask: (batch, tokens), 1 or True for tokens and 0 or False for padding, which no token
                looks at and whose own states mean nothing; None where nothing is padding.
            token_types: (batch, tokens), which of two texts a token is of; None for 0.

        Raises:
            ValueError: the arrays are not as they must be, or there are more tokens than
                ``config.max_length``.
        """
        config = self.config
        check_ids(ids)
        check_floats(params)
        if ids.shape[1] > config.max_length:
            raise ValueError(
                f"tokens: expected at most {config.max_length} (config.max_length), got "
                f"{ids.shape[1]}; the model was not made for longer texts: cut them"
            )
        if token_types is not None:
            _check_token_types(config, ids, token_types)
            token_types = jnp.asarray(token_types)
        module: Any = TextEncoder(config, self.remat)
        return module.apply(
            {"params": params["model"]},
            jnp.asarray(ids),
            _real(ids, mask),
            token_types,
        )

    def embed(
        self, params: Params, ids: TokenIds, mask: Any = None
    ) -> Float[Array, "batch channels"]:
        """One vector for each row of ids, by `pooling`; arguments as for `apply`."""
        states = self.apply(params, ids, mask)
        return pool(self.pooling, states, _real(ids, mask))

    def encode(
        self,
        params: Params,
        texts: Sequence[str],
        *,
        batch: int = 32,
        prompt: str | None = None,
    ) -> np.ndarray:
        """One vector for each text, float32 (texts, channels).

        Texts are read as the checkpoint's files say. They are run in batches of few shapes, each
        of which compiles one program: a first call takes long.

        Args:
            params: the parameters, float or quantized.
            texts: any number of them.
            batch: how many are run at once.
            prompt: what is put before every text, for models that want one, such as "query: ";
                None for the checkpoint's usual one.

        Raises:
            ValueError: the encoder has no tokenizer, or something is no text.
        """
        parts = self._text_batches(texts, batch, prompt)
        channels = self.config.hidden_size * len(self.pooling.modes)
        count = sum(len(part.numbers) for part in parts)
        vectors = np.zeros((count, channels), np.float32)
        for part in parts:
            found = _embed(self, params, part.ids, part.mask)
            vectors[part.numbers] = np.asarray(found)[: len(part.numbers)]
        return vectors

    def batches(
        self,
        texts: Sequence[str],
        *,
        batch: int = 32,
        prompt: str | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, mask) of texts in batches, as `encode` reads them: what `sqjax.calibrate` takes.

            batches = encoder.batches(texts)
            stats = sqjax.calibrate(
                encoder.embed, params, batches, mask=lambda ids, mask: mask
            )

        Texts of like lengths are together. Arguments and errors are those of `encode`.
        """
        parts = self._text_batches(texts, batch, prompt)
        return [(part.ids, part.mask) for part in parts]

    def _text_batches(
        self, texts: Sequence[str], batch: int, prompt: str | None
    ) -> list[TextBatch]:
        if self.tokenizer is None:
            raise ValueError(
                "encode: expected an encoder with a tokenizer, got one without; give "
                "encoder.embed token ids"
            )
        check("batch", batch, SIZE)
        reading = self.reading
        if prompt is not None:
            reading = replace(reading, prompt=prompt)
        longest = self.config.max_length
        limit = min(reading.max_tokens or longest, longest)
        ids = token_ids(self.tokenizer.backend, prepared(texts, reading), limit)
        return list(text_batches(ids, batch, limit, self.config.pad_id))


# A function of the module, so that all calls with one encoder share its programs.
@partial(jax.jit, static_argnames="encoder")
def _embed(encoder: Encoder, params: Params, ids: Any, mask: Any) -> Array:
    return quantized(encoder.embed)(params, ids, mask)


def _real(ids: Any, mask: Any) -> Mask | None:
    """The mask as booleans.

    Raises:
        ValueError: it has another shape than the ids, or holds floats.
    """
    if mask is None:
        return None
    given = jnp.asarray(mask)
    is_float = jnp.issubdtype(given.dtype, jnp.floating)
    if given.shape != ids.shape or is_float:
        raise ValueError(
            f"mask: expected 1 for each token and 0 for padding, whole numbers or booleans of the "
            f"ids' shape {ids.shape}, got {given.dtype} of shape {given.shape}"
        )
    return given.astype(bool)


def _check_token_types(config: EncoderConfig, ids: Any, types: Any) -> None:
    """Raises ValueError if the model has no types, or they are not of the ids' shape."""
    if config.token_types is None:
        raise ValueError(
            "token_types: expected none, because this model has no types of tokens; leave them out"
        )
    shape = getattr(types, "shape", None)
    if shape != ids.shape:
        raise ValueError(
            f"token_types: expected the ids' shape {ids.shape}, got {shape}"
        )
