"""`load_vision` and `load_image_text`: one tower, or both, from a directory."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from sqjax.models.checkpoints.families.text_towers import TEXT_TOWERS
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.loading import check_arguments, check_options
from sqjax.models.checkpoints.mapping import Placement, on_the_default_device
from sqjax.models.checkpoints.problems import raise_problems
from sqjax.models.checkpoints.saved import read_directory
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.fields import FINITE_NUMBERS, FLAG, POSITIVE, What
from sqjax.models.image_text import ImageText, TextTowerModel
from sqjax.models.json_files import read_object
from sqjax.models.model import Params
from sqjax.models.text_tower import TextTowerConfig
from sqjax.models.tokenizer import from_directory
from sqjax.models.vision_config import VisionConfig
from sqjax.models.vision_model import Preprocessing, VisionModel


def load_vision(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    *,
    families: Sequence[Family] = (),
    placement: Placement = on_the_default_device,
) -> tuple[VisionModel, Params]:
    """Loads an image encoder: ViT, DINOv2, or the image tower of a CLIP or a SigLIP.

        model, params = sqjax.models.load_vision("path/to/clip-vit-base-patch32")
        pixels = model.preprocess(images)  # integers 0 to 255, (batch, 224, 224, 3)
        vectors = model.embed(params, pixels)  # (batch, 512)

    Args:
        path: a directory with ``config.json`` and safetensors, as Hugging Face writes it, or as
            `save` does. Of a checkpoint with two towers that of texts is not read.
        dtype: the dtype of every parameter, and so of the computation.
        families: descriptions of families that are not known here, with ``config_type =
            VisionConfig``; see `Family`.
        placement: as for `sqjax.models.load`.

    Returns:
        The model, and its parameters as a nested dict. ``model.preprocessing`` is None where the
        directory has no ``preprocessor_config.json``.

    Raises:
        ValueError: if there is no such directory, or the checkpoint is not complete or not
            supported.

    Examples:
        >>> import sqjax as sq
        >>> sq.models.load_vision("no/such/directory")
        Traceback (most recent call last):
        ...
        ValueError: no/such/directory: expected a directory with config.json and model.safetensors
    """
    directory = _directory("load_vision", path, dtype, families, placement)
    config, params = read_directory(
        directory, dtype, families, placement, VisionConfig
    )
    how = _preprocessing(
        directory / "preprocessor_config.json", config.num_channels
    )
    return VisionModel(config, how), params


def load_image_text(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    *,
    placement: Placement = on_the_default_device,
) -> tuple[ImageText, Params]:
    """Loads both towers of a CLIP or a SigLIP.

        model, params = sqjax.models.load_image_text("path/to/clip-vit-base-patch32")
        logits = model.similarity(params, pixels, ids)  # (images, texts)

    Args:
        path: a directory with ``config.json`` and safetensors, as Hugging Face writes it.
        dtype: the dtype of every parameter, and so of the computation.
        placement: as for `sqjax.models.load`. Both towers have leaves of the same names.

    Returns:
        The model, and its parameters as ``{"images": ..., "texts": ...}``.

    Raises:
        ValueError: as `load_vision`.
        ImportError: if the checkpoint has a tokenizer, and reading it needs a package that is not
            installed.

    Examples:
        >>> import sqjax as sq
        >>> sq.models.load_image_text("no/such/directory")
        Traceback (most recent call last):
        ...
        ValueError: no/such/directory: expected a directory with config.json and model.safetensors
    """
    directory = _directory("load_image_text", path, dtype, (), placement)
    # Each tower leaves out the tensors of the other: the file is opened twice.
    texts, of_texts = read_directory(
        directory, dtype, TEXT_TOWERS, placement, TextTowerConfig
    )
    images, of_images = load_vision(directory, dtype, placement=placement)
    found = from_directory(directory, texts.encoder.vocab_size)
    model = ImageText(images, TextTowerModel(texts), found)
    return model, {"images": of_images, "texts": of_texts}


def _directory(
    what: str,
    path: str | Path,
    dtype: DTypeLike,
    families: Sequence[Family],
    placement: Placement,
) -> Path:
    """The directory of a checkpoint; `what` is the function that was called, for errors."""
    check_arguments(what, (), path, dtype)
    check_options(what, families, placement)
    directory = Path(path)
    # os.path's function, because Path's raises where a path is too long to be one.
    if not os.path.isdir(directory):
        raise ValueError(
            f"{path}: expected a directory with config.json and model.safetensors"
        )
    return directory


def _preprocessing(file: Path, channels: int) -> Preprocessing | None:
    """What a file says of how integers become pixels; None where there is none.

    Raises:
        ValueError: a key is not what it must be.
    """
    if not file.exists():
        # A model can be used without: its pixels may come from elsewhere.
        return None
    numbers = What(
        f"a list of {channels} finite numbers, one for each channel",
        lambda x: FINITE_NUMBERS.holds(x) and len(x) == channels,
    )
    settings = Settings(read_object(file))
    # What is left out changes nothing: x * 1 - 0, divided by 1.
    scale, mean, std = 1.0, [0.0] * channels, [1.0] * channels
    if settings("do_rescale", FLAG, True):
        scale = settings("rescale_factor", POSITIVE, 1 / 255)
    if settings("do_normalize", FLAG, True):
        mean = settings("image_mean", numbers)
        std = settings("image_std", numbers)
        if std is not None and min(std) <= 0:
            settings.refuse(f"image_std = {std}: expected numbers above 0")
    raise_problems(str(file), settings.problems)
    return Preprocessing(float(scale), tuple(mean), tuple(std))
