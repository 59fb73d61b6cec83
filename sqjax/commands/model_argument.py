"""MODEL: what commands take for a model, and how each kind of it is opened."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from sqjax.commands.options import Talk
from sqjax.commands.recipes import digest_at

#: What a hub id looks like.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: The files of a hub's repository that are read here.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_EXPECTED = (
    "smollm2-135m, a directory with config.json and safetensors, a .gguf file, or a hub id such as "
    "HuggingFaceTB/SmolLM2-135M"
)


class Opened(NamedTuple):
    """A model that was loaded.

    Attributes:
        name: as it was given.
        source: the file or the directory that was read.
        model: a `Model`, or an `Encoder`.
        params: its parameters.
        digest: of its files.
    """

    name: str
    source: Path
    model: Any
    params: Any
    digest: str

    @property
    def directory(self) -> Path | None:
        """The directory of a checkpoint, whose names and files others are written like."""
        return self.source if self.source.is_dir() else None

    @property
    def is_encoder(self) -> bool:
        """Whether it gives vectors of texts, and no next tokens."""
        from sqjax.models import Encoder

        return isinstance(self.model, Encoder)

    @property
    def is_quantized(self) -> bool:
        """Whether some of its leaves are quantized."""
        import jax

        from sqjax.weights.quant_weight import is_quantized

        leaves = jax.tree.leaves(self.params, is_leaf=is_quantized)
        return any(map(is_quantized, leaves))


def open_model(name: str, dtype: str, talk: Talk) -> Opened:
    """Loads what MODEL names.

    Raises:
        ValueError: there is no such model, or it is of a kind that commands do not run.
        ImportError: reading it needs a package that is not installed.
    """
    import jax.numpy as jnp

    from sqjax import models

    source, is_encoder = _found(name, talk)
    talk.note(f"reading {name}")
    load: Any = models.load_encoder if is_encoder else models.load
    model, params = load(source, jnp.dtype(dtype))
    return Opened(name, source, model, params, digest_at(source))


def check_names(*names: str) -> None:
    """Raises ValueError if one of several models is not there, before the first one is loaded."""
    from sqjax.models.checkpoints.encoders import ENCODER_NAMES
    from sqjax.models.checkpoints.loading import NAMES

    for name in names:
        if name not in {*NAMES, *ENCODER_NAMES}:
            _here(name)


def open_decoder(name: str, dtype: str, talk: Talk) -> Opened:
    """`open_model` of what predicts next tokens and has a tokenizer.

    Raises:
        ValueError: as `open_model`; or it is an encoder, or has no tokenizer.
    """
    opened = open_model(name, dtype, talk)
    if opened.is_encoder:
        raise ValueError(
            f"{name}: expected a model that predicts next tokens, got an encoder of texts; for "
            "these there are calibrate, smooth, quantize and inspect"
        )
    if opened.model.tokenizer is None:
        raise ValueError(
            f"{name}: expected a model with a tokenizer, got one without; put tokenizer.json into "
            "its directory"
        )
    return opened


def float_only(opened: Opened, command: str) -> None:
    """Raises ValueError for a model whose weights are quantized already."""
    if opened.is_quantized:
        raise ValueError(
            f"{opened.name}: `sqjax {command}` starts from float weights, got quantized ones; give "
            "the model that these were made of"
        )


def _found(name: str, talk: Talk) -> tuple[Path, bool]:
    """The file or the directory of a model, and whether it is that of an encoder of texts."""
    from sqjax.models.checkpoints.encoders import ENCODER_NAMES
    from sqjax.models.checkpoints.loading import NAMES

    if name in NAMES:
        return NAMES[name](), False
    if name in ENCODER_NAMES:
        return ENCODER_NAMES[name](), True
    here = _here(name)
    if here is not None:
        return here
    directory = _fetched(name, talk)
    return directory, _is_encoder(directory)


def _here(name: str) -> tuple[Path, bool] | None:
    """What `_found` gives, of a path; None for what may be a hub id."""
    if os.path.isdir(name):
        return Path(name), _is_encoder(Path(name))
    if os.path.isfile(name):
        _check_file(name)
        return Path(name), False
    folder = os.path.dirname(name)
    # A folder that is there means a path that is misspelt.
    if not _HUB_ID.fullmatch(name) or os.path.isdir(folder):
        raise ValueError(f"{name}: no such path; expected {_EXPECTED}")
    return None


def _check_file(name: str) -> None:
    if not name.endswith(".gguf"):
        raise ValueError(
            f"{name}: expected {_EXPECTED}; got another kind of file (a tree that sqjax.save wrote "
            "has no model in it: write directories, with sqjax.models.save or `sqjax quantize`)"
        )


def _is_encoder(directory: Path) -> bool:
    """Whether a directory holds an encoder of texts.

    Raises:
        ValueError: it holds a model of images, or none.
    """
    from sqjax.models import EncoderConfig, VisionConfig
    from sqjax.models.checkpoints.families.known import FAMILIES
    from sqjax.models.json_files import read_object

    if (directory / "modules.json").is_file():
        return True
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{directory}: expected {_EXPECTED}; got a directory without config.json"
        )
    family = FAMILIES.get(str(read_object(config).get("model_type")))
    kind = None if family is None else family.config_type
    if kind is VisionConfig:
        raise ValueError(
            f"{directory}: expected a model of texts, got one of images; in Python "
            "sqjax.models.load_vision reads it"
        )
    return kind is EncoderConfig


def _fetched(name: str, talk: Talk) -> Path:
    """The directory of a model from the Hugging Face hub, fetched if need be."""
    nothing = f"{name}: no such path, and as a hub id"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise ImportError(
            f"{nothing} it needs a package: pip install huggingface_hub"
        ) from error
    if talk.quiet:
        disable_progress_bars()
    talk.note(f"looking for {name} on the Hugging Face hub")
    # Whatever is wrong there (no network, no such id, no right to read it) is said by its own
    # kinds of errors, which share no base but these.
    try:
        return Path(snapshot_download(name, allow_patterns=[*_HUB_FILES]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{nothing} it could not be fetched ({type(error).__name__}: {reason}); expected "
            f"{_EXPECTED}"
        ) from error
