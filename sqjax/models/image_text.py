"""`ImageText`: the two towers of a CLIP or a SigLIP, whose vectors are compared."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sqjax.models.model import (
    Params,
    TokenIds,
    check_floats,
    check_ids,
    initialized,
)
from sqjax.models.text_tower import TextTower, TextTowerConfig
from sqjax.models.tokenizer import Tokenizer
from sqjax.models.vision_model import Pixels, VisionModel


@dataclass(frozen=True)
class TextTowerModel:
    """A text tower without its parameters.

    Attributes:
        config: what it computes.
    """

    config: TextTowerConfig

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters of a dtype."""
        one_token = jnp.zeros((1, 1), jnp.int32)
        return initialized(TextTower(self.config), key, dtype, one_token)

    def embed(
        self, params: Params, ids: TokenIds
    ) -> Float[Array, "batch size"]:
        """The vector of each row of ids, not divided by its length (``text_embeds``).

        Raises:
            ValueError: ids are not as they must be, or more than the tower was made for.
        """
        check_ids(ids)
        check_floats(params)
        longest = self.config.encoder.max_length
        if ids.shape[1] > longest:
            # The table of positions has no more rows, and jax would read its last one instead.
            raise ValueError(
                f"tokens: expected at most {longest} (config.encoder.max_length), got "
                f"{ids.shape[1]}; the tower has no positions for more: cut the texts"
            )
        module: Any = TextTower(self.config)
        return module.apply({"params": params}, jnp.asarray(ids))


@dataclass(frozen=True)
class ImageText:
    """An image tower and a text tower, without their parameters.

    The methods are pure functions of one tree, ``{"images": ..., "texts": ...}``:

        model, params = sqjax.models.load_image_text("path/to/clip-vit-base-patch32")
        logits = model.similarity(params, pixels, ids)  # (images, texts)

    Attributes:
        images: the image tower; see `VisionModel.preprocess` for its pixels.
        texts: the text tower.
        tokenizer: texts to token ids; None where the checkpoint has none.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sqjax import models
        >>> layers = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
        >>> images = models.VisionConfig(image_size=4, patch_size=2, projection_size=6, **layers)
        >>> encoder = models.EncoderConfig(32, **layers, causal=True)
        >>> texts = models.TextTowerConfig(encoder=encoder, projection_size=6)
        >>> model = models.ImageText(models.VisionModel(images), models.TextTowerModel(texts))
        >>> params = model.init(jax.random.key(0))
        >>> ids = jnp.zeros((2, 5), jnp.int32)
        >>> model.similarity(params, jnp.zeros((3, 4, 4, 3)), ids).shape
        (3, 2)
    """

    images: VisionModel
    texts: TextTowerModel
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters of a dtype."""
        # Two keys, because equal ones would make equal numbers in both towers.
        first, second = jax.random.split(key)
        return {
            "images": self.images.init(first, dtype),
            "texts": self.texts.init(second, dtype),
        }

    def embed_images(
        self, params: Params, pixels: Pixels
    ) -> Float[Array, "images size"]:
        """The vector of each image; as `VisionModel.embed`."""
        return self.images.embed(params["images"], pixels)

    def embed_texts(
        self, params: Params, ids: TokenIds
    ) -> Float[Array, "texts size"]:
        """The vector of each text, not divided by its length.

        Args:
            params: of both towers.
            ids: (texts, tokens), each with its end; filled up behind it where texts differ: for a
                SigLIP to the length that it was trained with, because its last token is read.
        """
        return self.texts.embed(params["texts"], ids)

    def similarity(
        self, params: Params, pixels: Pixels, ids: TokenIds
    ) -> Float[Array, "images texts"]:
        """How well each image fits each text (``logits_per_image``), in float32.

        Of a CLIP the softmax over the texts gives their probabilities, of a SigLIP the sigmoid of
        each.
        """
        images = self.embed_images(params, pixels)
        texts = self.embed_texts(params, ids)
        # What scales the products stands among the parameters of the texts.
        tower: Any = TextTower(self.texts.config)
        variables = {"params": params["texts"]}
        return tower.apply(variables, images, texts, method="similarity")
