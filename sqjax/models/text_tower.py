"""The text tower of two: texts to vectors in the space that images have too."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sqjax.models.encoder import TextEncoder
from sqjax.models.encoder_config import EncoderConfig
from sqjax.models.fields import (
    FLAG,
    ID,
    SIZE,
    What,
    check_fields,
    instance_of,
    one_of,
)


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """What a text tower computes. Hashable, so that it may be a static argument of `jax.jit`.

    Attributes:
        encoder: the tower before the vector is made.
        projection_size: the channels of the vector.
        projection_bias: whether the projection has a bias (SigLIP).
        pooling: which token's state is projected: "end", the first that ends the text (CLIP; the
            first token of a text without one, as in transformers); "largest", that with the largest
            id, which ends a text in the first CLIPs; "last", the last one, whatever it is (SigLIP,
            whose texts are filled up to one length).
        end_id: the token that ends a text.
        similarity_bias: whether every similarity has a learned number added (SigLIP).

    Raises:
        ValueError: a field is not what it must be.
    """

    encoder: EncoderConfig
    projection_size: int
    projection_bias: bool = False
    pooling: str = "end"
    end_id: int = 0
    similarity_bias: bool = False

    def __post_init__(self):
        check_fields(self, _FIELDS)

    @property
    def num_layers(self) -> int:
        """The number of blocks."""
        return self.encoder.num_layers

    def of_one_layer(self) -> "TextTowerConfig":
        """The same with one block."""
        return replace(self, encoder=replace(self.encoder, num_layers=1))


_FIELDS: Mapping[str, What] = {
    "encoder": instance_of(EncoderConfig, "an EncoderConfig"),
    "projection_size": SIZE,
    "projection_bias": FLAG,
    "pooling": one_of("end", "largest", "last"),
    "end_id": ID,
    "similarity_bias": FLAG,
}


class TextTower(nn.Module):
    """Token ids to one vector a text; and what is learned of how similar vectors are."""

    config: TextTowerConfig

    def setup(self):
        """Makes the parts, all of which every tower has but one."""
        config = self.config
        self.model = TextEncoder(config.encoder)
        self.projection = nn.Dense(
            config.projection_size, use_bias=config.projection_bias
        )
        self.logit_scale = self.param("logit_scale", nn.initializers.zeros, ())
        if config.similarity_bias:
            self.logit_bias = self.param(
                "logit_bias", nn.initializers.zeros, ()
            )

    def __call__(
        self, ids: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch size"]:
        """The vector of each text."""
        states = self.model(ids)
        # One token of each text, with all its channels.
        place = _place(self.config, ids)[:, None, None]
        pooled = jnp.take_along_axis(states, place, axis=1)[:, 0]
        return self.projection(pooled)

    def similarity(
        self,
        images: Float[Array, "images size"],
        texts: Float[Array, "texts size"],
    ) -> Float[Array, "images texts"]:
        """The logits of each image and each text, of their vectors."""
        # The logarithm is learned, so that the scale is above 0.
        scale = jnp.exp(self.logit_scale.astype(jnp.float32))
        logits = scale * (_of_length_one(images) @ _of_length_one(texts).T)
        if not self.config.similarity_bias:
            return logits
        return logits + self.logit_bias.astype(jnp.float32)


def _place(
    config: TextTowerConfig, ids: Int[Array, "batch tokens"]
) -> Int[Array, " batch"]:
    """Which token of each text is its vector."""
    if config.pooling == "last":
        return jnp.full(ids.shape[:1], ids.shape[1] - 1)
    if config.pooling == "largest":
        return jnp.argmax(ids, axis=1)
    # argmax gives the first of those that are True.
    return jnp.argmax(ids == config.end_id, axis=1)


def _of_length_one(
    vectors: Float[Array, "batch size"],
) -> Float[Array, "batch size"]:
    """Vectors divided by their lengths, in float32."""
    # In bfloat16 the sum of many squares would keep 8 bits.
    wide = vectors.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
