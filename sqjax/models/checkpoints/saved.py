"""The directory of a model: as Hugging Face writes it, or as `sqjax.models.save` does.

The second has ``config.json`` and the tokenizer's files as the first, and beside them the index and
the shards of `sqjax.save`. What was saved as `config` says which files belong to it:

    {"model": {"kind": "DecoderConfig", "absent": [], "files": {"config.json": SUM, ...}}}
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from sqjax._trees import named_leaves
from sqjax.files.checksums import sum_of
from sqjax.files.loading import load, saved_config
from sqjax.files.shards import is_saved
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.huggingface import (
    read_config,
    read_huggingface,
)
from sqjax.models.checkpoints.kinds import KINDS, Config
from sqjax.models.checkpoints.mapping import Placement
from sqjax.models.config import DecoderConfig
from sqjax.models.json_files import read_object
from sqjax.models.model import Params
from sqjax.weights.quant_weight import is_quantized
from sqjax.weights.sharding import explicit_shardings

_CONFIG = "config.json"


def read_directory(
    directory: Path,
    dtype: DTypeLike,
    families: Sequence[Family],
    placement: Placement,
    config_type: type = DecoderConfig,
) -> tuple[Config, Params]:
    """The configuration and the parameters of a directory; arguments as of `read_huggingface`.

    Raises:
        ValueError: as `read_huggingface`; or what `save` wrote was changed, or is no model.
    """
    if not is_saved(directory):
        return read_huggingface(
            directory, dtype, families, placement, config_type
        )
    # Before the arrays, because reading these takes long.
    model = _model_in(directory, config_type)
    family, config = config_of(directory, families, config_type)
    shardings = partial(_shardings, directory, dtype, placement)
    params = load(directory, shardings=shardings)
    return fitted(family, config, model["absent"]), params


def config_of(
    directory: Path, families: Sequence[Family], config_type: type
) -> tuple[Family, Config]:
    """What ``config.json`` says, but for how another checkpoint's weights were quantized."""
    # The parameters say themselves how they are quantized.
    file = directory / _CONFIG
    values = {**read_object(file), "quantization_config": None}
    return read_config(values, str(file), families, config_type)


def fitted(family: Family, config: Config, absent: Sequence[str]) -> Config:
    """The configuration without optional parts, by the names of their tensors."""
    return family.fitted(config, family.optional.keys() - set(absent))


def _model_in(directory: Path, config_type: type) -> Mapping[str, Any]:
    """What was saved of the model, whose files are those that were saved with it."""
    model = saved_config(directory).get("model")
    if not isinstance(model, Mapping):
        raise ValueError(
            f"{directory}: expected a model that sqjax.models.save wrote, got a tree alone: "
            "sqjax.load reads it, and sqjax.models.load_model the model that it belongs to"
        )
    kinds = {one.__name__: kind for one, kind in KINDS.items()}
    if model["kind"] != config_type.__name__:
        other = kinds[model["kind"]]
        raise ValueError(
            f"{directory}: expected {KINDS[config_type].what}, got {other.what}: "
            f"sqjax.models.{other.load} loads it"
        )
    for name, expected in model["files"].items():
        _check_file(directory, name, expected)
    return model


def _check_file(directory: Path, name: str, expected: str) -> None:
    """Raises ValueError unless a file of a directory is the one that was saved there."""
    # Sealed or not, a name must not lead out of the directory.
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{directory}: expected files inside of it, got {name!r}; save it again"
        )
    file = directory / path
    if not file.is_file():
        raise ValueError(
            f"{file}: expected this file, which was saved with the parameters, got none; copy the "
            "whole directory or save it again"
        )
    if sum_of(file.read_bytes()) != expected:
        raise ValueError(
            f"{file}: expected the file with the checksum that it was saved with, got another one: "
            "it was changed or damaged; copy it or save the model again, with like= of changed "
            "files"
        )


def _shardings(
    directory: Path, dtype: DTypeLike, placement: Placement, shapes: Any
) -> Any:
    """Where every array of a tree of these shapes is placed, given where its float leaves are."""
    _check_dtype(directory, dtype, shapes)

    def of_leaf(path: str, leaf: Any) -> Any:
        # The shape of the float leaf, because that is what a caller knows.
        sharding = placement(path, leaf.shape)
        if is_quantized(leaf) and isinstance(sharding, NamedSharding):
            return explicit_shardings(leaf, sharding)
        return jax.tree.map(lambda _: sharding, leaf)

    paths, leaves, treedef = named_leaves(shapes, is_leaf=is_quantized)
    return jax.tree.unflatten(treedef, map(of_leaf, paths, leaves))


def _check_dtype(directory: Path, dtype: DTypeLike, shapes: Any) -> None:
    """Raises ValueError if another dtype is asked for than the parameters were saved in.

    float32 is what a caller who says nothing asks for.
    """
    # A quantized leaf has the dtype of the float leaf that it stands for.
    leaves = jax.tree.leaves(shapes, is_leaf=is_quantized)
    held = sorted({jnp.dtype(leaf.dtype).name for leaf in leaves})
    asked = jnp.dtype(dtype).name
    if asked not in ("float32", *held):
        raise ValueError(
            f"{directory}: dtype: expected none, or one of {held}, in which it was saved, because "
            f"what is saved is loaded bit for bit, got {asked}"
        )
