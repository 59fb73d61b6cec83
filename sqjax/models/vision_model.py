"""`VisionModel`: an image encoder's configuration together with the pure functions that run it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sqjax.models.fields import (
    POSITIVE,
    What,
    check_fields,
    tuple_of,
)
from sqjax.models.model import Params, check_floats, initialized
from sqjax.models.vision import ImageEncoder
from sqjax.models.vision_config import VisionConfig

#: (batch, rows, columns, channels), floats. What else comes is refused with the sizes that fit.
Pixels = Any


@dataclass(frozen=True)
class Preprocessing:
    """How the integers of an image become pixels: (x * scale - mean) / std, channel by channel.

    Attributes:
        scale: what 0 to 255 are multiplied by.
        mean: subtracted then, a number for each channel.
        std: divided by then, a number for each channel.

    Raises:
        ValueError: a field is not what it must be.

    Examples:
        >>> from sqjax.models import Preprocessing
        >>> Preprocessing(scale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).mean
        (0.5, 0.5, 0.5)
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        check_fields(self, _PREPROCESSING_FIELDS)
        smallest = min(self.std, default=0)
        if len(self.mean) != len(self.std) or smallest <= 0:
            raise ValueError(
                "Preprocessing.std: expected a number above 0 for each mean, got "
                f"{self.std} for {self.mean}"
            )


_PREPROCESSING_FIELDS: Mapping[str, What] = {
    "scale": POSITIVE,
    "mean": tuple_of(float, "a tuple of numbers"),
    "std": tuple_of(float, "a tuple of numbers"),
}


@dataclass(frozen=True)
class VisionModel:
    """An image encoder without its parameters.

    Every method is a pure function that may be jitted, and takes the bare parameter tree (no
    "params" level) and pixels with their channels last, (batch, rows, columns, channels):

        model, params = sqjax.models.load_vision("path/to/clip-vit-base-patch32")
        pixels = model.preprocess(images)  # integers 0 to 255, (batch, 224, 224, 3)
        vectors = jax.jit(model.embed)(params, pixels)

    `apply`, `embed` and `classify` compute different things of one tree: calibrate and smooth with
    the one that will run.

    Attributes:
        config: what it computes.
        preprocessing: how integers become pixels; None where the checkpoint does not say.
        remat: as for `Model`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sqjax.models import VisionConfig, VisionModel
        >>> config = VisionConfig(
        ...     image_size=4, patch_size=2, hidden_size=8, intermediate_size=16, num_layers=1,
        ...     num_heads=2,
        ... )
        >>> model = VisionModel(config)
        >>> params = model.init(jax.random.key(0))
        >>> model.apply(params, jnp.zeros((3, 4, 4, 3))).shape
        (3, 5, 8)
        >>> model.embed(params, jnp.zeros((3, 4, 4, 3))).shape
        (3, 8)
    """

    config: VisionConfig
    preprocessing: Preprocessing | None = None
    remat: bool = False

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters of a dtype; ``jax.eval_shape(model.init, key)`` gives their shapes."""
        config = self.config
        sides = (config.image_size, config.image_size)
        # One image is enough, because no parameter depends on how many there are.
        pixels = jnp.zeros((1, *sides, config.num_channels))
        module: Any = ImageEncoder(config)
        return initialized(module, key, dtype, pixels, method="everything")

    def apply(
        self, params: Params, pixels: Pixels
    ) -> Float[Array, "batch tokens hidden"]:
        """The last hidden state of every token, the class token first if there is one.

        They are normed if ``config.final_norm`` is "tokens", as in transformers.

        Raises:
            ValueError: pixels are not floats, or not of the configuration's size.
        """
        return self._run(params, pixels, "__call__")

    def embed(
        self, params: Params, pixels: Pixels
    ) -> Float[Array, "batch size"]:
        """One vector of each image, not divided by its length.

        As the family makes it: of CLIP the projection (transformers' ``image_embeds`` before they
        are normalized), or without one the normed class token; of SigLIP what the attention pooler
        gives; of ViT what its pooler gives, or without one the normed class token.

        Raises:
            ValueError: as `apply`; or the model pools nothing.
        """
        if self.config.pooling is None:
            raise ValueError(
                "embed: expected a model with a pooling, got one without (vision_use_head is false "
                "in its config.json): pool what model.apply gives"
            )
        return self._run(params, pixels, "embed")

    def classify(
        self, params: Params, pixels: Pixels
    ) -> Float[Array, "batch classes"]:
        """The logits of the classes.

        Raises:
            ValueError: as `apply`; or the model has no head of classes.
        """
        if self.config.num_classes is None:
            raise ValueError(
                "classify: expected a model with a head of classes, such as a "
                "ViTForImageClassification, got one without: use model.embed or model.apply"
            )
        return self._run(params, pixels, "classify")

    def preprocess(
        self, images: Any
    ) -> Float[Array, "batch rows columns channels"]:
        """Pixels of images, (batch, rows, columns, channels), as the checkpoint's files say.

        Nothing is resized or cropped: the images have the model's size already.

        Raises:
            ValueError: images are not 8-bit integers, or of another size; or the checkpoint has no
                preprocessor_config.json.
        """
        how = self.preprocessing
        if how is None:
            raise ValueError(
                "preprocess: expected a preprocessor_config.json beside config.json, got none; "
                "make VisionModel(model.config, Preprocessing(scale, mean, std))"
            )
        self._check(images, "images", np.dtype(np.uint8), "8-bit integers")
        mean, std = jnp.asarray(how.mean), jnp.asarray(how.std)
        # 8-bit integers would wrap around.
        scaled = jnp.asarray(images).astype(jnp.float32) * how.scale
        return (scaled - mean[None, None, None]) / std[None, None, None]

    def _run(self, params: Params, pixels: Pixels, method: str) -> Any:
        self._check(pixels, "pixels", np.floating, "floats")
        check_floats(params)
        variables = {"params": params}
        # Made anew in each call, so that the model itself stays a plain value.
        module: Any = ImageEncoder(self.config, self.remat)
        return module.apply(variables, jnp.asarray(pixels), method=method)

    def _check(self, images: Any, name: str, kind: Any, words: str) -> None:
        """Raises ValueError unless these are images of the model's size, and of a kind of dtype."""
        config = self.config
        sides = (config.image_size, config.image_size, config.num_channels)
        shape = tuple(getattr(images, "shape", ()))
        if shape[1:] != sides or shape[0] == 0:
            # Often images come as torch has them, with their channels in front.
            got = shape or type(images).__name__
            raise ValueError(
                f"{name}: expected an array (batch, rows, columns, channels) = "
                f"{('batch', *sides)}, got {got}; resize the images before, because positions are "
                "not interpolated, and put the channels last"
            )
        if not jnp.issubdtype(images.dtype, kind):
            raise ValueError(f"{name}: expected {words}, got {images.dtype}")
