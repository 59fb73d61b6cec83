"""Reads a model from a Hugging Face directory: config.json and safetensors; no pickle."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sqjax.files.header import Header, read_header
from sqjax.files.opening import open_file
from sqjax.files.shards import is_saved
from sqjax.models.checkpoints.families.known import FAMILIES
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.kinds import KINDS, Config
from sqjax.models.checkpoints.mapping import (
    Placement,
    Source,
    assemble,
    layers_in,
    on_the_default_device,
    parameter_shapes,
)
from sqjax.models.checkpoints.names import EVERY_LEAF
from sqjax.models.checkpoints.problems import raise_problems
from sqjax.models.checkpoints.quantized.known import read_quantization
from sqjax.models.checkpoints.quantized.modules import (
    FLOATS,
    Module,
    Tensor,
    sort_out,
)
from sqjax.models.checkpoints.quantized.stored_weight import (
    Stored,
    shape_in_the_table,
)
from sqjax.models.config import DecoderConfig, config_ropes, rotated_channels
from sqjax.models.fields import MAPPING, TEXTS
from sqjax.models.json_files import read_object
from sqjax.models.model import Params


def read_huggingface(
    directory: Path,
    dtype: DTypeLike = jnp.float32,
    families: Sequence[Family] = (),
    placement: Placement = on_the_default_device,
    config_type: type = DecoderConfig,
) -> tuple[Config, Params]:
    """Reads ``config.json`` and the weights, in one safetensors file or in shards with an index.

    Kernels that are stored quantized become `QuantWeight` leaves, as they are.

    Args:
        directory: of the checkpoint.
        dtype: of every parameter.
        families: families to look among before those that are known here.
        placement: where each leaf is placed.
        config_type: of which kind the model must be, by the type of its configuration.

    Raises:
        ValueError: if a file is missing or damaged, the configuration asks for something the model
            here does not do, or tensors are missing, unknown, misshapen or not floating-point; all
            are listed.
    """
    with open_checkpoint(directory, families, config_type) as found:
        source, family, config, problems = found[:4]
        params = assemble(source, family, config, dtype, problems, placement)
        found.check_redundant()
        return config, params


class Checkpoint(NamedTuple):
    """An opened checkpoint.

    Attributes:
        source: its tensors, without those that follow from the rest.
        family: their names.
        config: the model.
        problems: what is wrong with its files; `read_leaves` and `leaf_shapes` raise them.
        check_redundant: compares the tensors that follow from the rest with it, and raises
            ValueError if they say something else.
        others: the tensors that are not in `source`, because they follow from the rest or say
            nothing that the model needs.
        is_quantized: whether some of its modules are quantized.
    """

    source: Source
    family: Family
    config: Config
    problems: Sequence[str]
    check_redundant: Callable[[], None]
    others: Mapping[str, Tensor]
    is_quantized: bool


@contextlib.contextmanager
def open_checkpoint(
    directory: Path,
    families: Sequence[Family] = (),
    config_type: type = DecoderConfig,
) -> Iterator[Checkpoint]:
    """Reads ``config.json`` and the headers of all files, which stay open; no array is read yet.

    Raises:
        ValueError: as `read_huggingface`, for what the configuration and the headers say.
    """
    config_file = directory / "config.json"
    values = read_object(config_file)
    quantization = read_quantization(values, str(config_file))
    # What it says has been read, so for the family it changes nothing any more.
    values = {**values, "quantization_config": None}
    family, config = read_config(
        values, str(config_file), families, config_type
    )
    with contextlib.ExitStack() as opened:
        stored, problems = _stored(directory, opened)
        modules, floats, wrong = sort_out(stored, quantization)
        problems += wrong
        config = family.fitted(config, [*floats, *modules])
        used, redundant = {}, []
        for name, tensor in floats.items():
            if _is_redundant(name, family, config):
                redundant.append(name)
            elif family.ignores(name):
                # Any dtype will do for what says nothing, such as a list of positions.
                continue
            else:
                used[name] = tensor
            problems += _wrong_dtype(name, tensor)
        for name in modules:
            problems += _no_leaf_for_codes(name, family, config)
        if quantization.zero_biases:
            for name in _spare_biases(modules, used, family, config):
                problems += _not_zero(name, used.pop(name))
        source = _source(str(directory), used, modules, family)

        def check_redundant() -> None:
            contradictions = []
            for name in redundant:
                contradictions += _contradiction(name, stored, family, config)
            raise_problems(str(directory), contradictions)

        others = {name: x for name, x in floats.items() if name not in used}
        yield Checkpoint(
            source,
            family,
            config,
            problems,
            check_redundant,
            others,
            bool(modules),
        )


def _source(
    place: str,
    floats: Mapping[str, Tensor],
    modules: Mapping[str, Module],
    family: Family,
) -> Source:
    """The tensors of a checkpoint, of which a quantized module's are one."""
    shapes = {name: tensor.entry.shape for name, tensor in floats.items()}
    for name, module in modules.items():
        found = family.find(name, EVERY_LEAF)
        layout = None if found is None else found.layout
        shapes[name] = shape_in_the_table(layout, module.shape)

    tensors: dict[str, Any] = {**floats, **modules}

    def read(name: str) -> Stored:
        try:
            return tensors[name].read()
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    return Source(place, shapes, read)


def _stored(
    directory: Path, opened: contextlib.ExitStack
) -> tuple[dict[str, Tensor], list[str]]:
    """({name: tensor}, problems) of all files, which stay open until `opened` ends.

    Headers alone are read: no array before every shape has been checked.
    """
    found: dict[str, Tensor] = {}
    place: dict[str, str] = {}
    problems = []
    paths, weight_map = weight_files(directory)
    for path in paths:
        file = opened.enter_context(open_file(path))
        for name, entry in _header(path, file).tensors.items():
            if name in found:
                problems.append(
                    f"{name}: expected it in one file, got it in {place[name]} and {path.name}"
                )
            found[name] = Tensor(file, entry)
            place[name] = path.name
    for name in weight_map.keys() | (place.keys() if weight_map else ()):
        expected, got = weight_map.get(name), place.get(name)
        if expected != got:
            problems.append(
                f"{name}: expected it in {expected}, as the index says, got it in {got}"
            )
    return found, sorted(problems)


def _wrong_dtype(name: str, tensor: Tensor) -> list[str]:
    if tensor.entry.dtype in FLOATS:
        return []
    return [f"{name}: expected a dtype of {FLOATS}, got {tensor.entry.dtype}"]


# Quantized modules --------------------------------------------------------------------------------


def _no_leaf_for_codes(name: str, family: Family, config: Config) -> list[str]:
    """One problem if a quantized module is none that the model has as a matmul of its own."""
    if family.find(name, {EMBEDDING}) is not None:
        return [
            f"{name}: expected a float embedding, because its rows are looked up, got a quantized "
            "one"
        ]
    if _is_redundant(name, family, config):
        return [
            f"{name}: expected no quantized head, because tie_word_embeddings is true; say false "
            "there if the head is one of its own"
        ]
    return []


def _spare_biases(
    modules: Mapping[str, Module],
    floats: Mapping[str, Tensor],
    family: Family,
    config: Config,
) -> list[str]:
    """The biases of quantized modules for which the model has no leaf."""
    leaves = parameter_shapes(config, layers_in([*modules, *floats], config))
    names = []
    for weight in modules:
        name = f"{weight.removesuffix('weight')}bias"
        if name in floats and family.find(name, leaves) is None:
            names.append(name)
    return names


def _not_zero(name: str, tensor: Tensor) -> list[str]:
    if not tensor.read().any():
        return []
    return [
        f"{name}: expected no bias, or one that is 0, because the model has none; got other numbers"
    ]


# Tensors that follow from the rest ----------------------------------------------------------------

EMBEDDING, _HEAD = "model/embed_tokens/embedding", "lm_head/kernel"
_ANGLES = "rotary_emb.inv_freq"


def _is_redundant(name: str, family: Family, config: Config) -> bool:
    """Whether a tensor follows from the rest, so that it is compared and not used."""
    is_decoder = isinstance(config, DecoderConfig)
    is_angles = is_decoder and name.endswith(_ANGLES)
    return is_angles or is_tied_head(name, family, config)


def is_tied_head(name: str, family: Family, config: Config) -> bool:
    """Whether a tensor is the embedding once more, as the head."""
    # Models of other kinds have neither a tied head nor stored angles.
    if not isinstance(config, DecoderConfig):
        return False
    return config.tie_embeddings and family.find(name, {_HEAD}) is not None


def _contradiction(
    name: str,
    stored: Mapping[str, Tensor],
    family: Family,
    config: Config,
) -> list[str]:
    """One problem if a tensor that follows from the rest says something else."""
    if name.endswith(_ANGLES):
        expected, what = _angles(config)
        tolerance = 0.01  # in bfloat16 they have 8 bits
    else:
        embedding = next(
            other for other in stored if family.find(other, {EMBEDDING})
        )
        expected = stored[embedding].read()
        what = (
            f"{embedding}, because tie_word_embeddings is true; say false there if the head is "
            "one of its own"
        )
        tolerance = 0.0
    got = stored[name].read()
    if got.shape == expected.shape and _agree(got, expected, tolerance):
        return []
    return [f"{name}: expected {what}; got other numbers"]


def _agree(got: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Whether two arrays of one shape hold the same numbers, up to a relative tolerance."""
    # Some rows at a time: in float64 a head is four times as large as in its file.
    for first in range(0, len(got), 1024):
        rows = slice(first, first + 1024)
        ours = expected[rows].astype(np.float64)
        if not np.allclose(got[rows].astype(np.float64), ours, tolerance, 0.0):
            return False
    return True


def _angles(config: DecoderConfig) -> tuple[np.ndarray, str]:
    """What older checkpoints store of a rotary embedding, and what it is called."""
    rope = config_ropes(config)[0]
    channels = rope.channels(rotated_channels(config))
    pairs = np.arange(0, channels, 2) / channels
    expected = np.power(float(rope.theta), -pairs)
    return expected, f"the angles of rope_theta = {rope.theta:g}"


# The configuration --------------------------------------------------------------------------------


def read_config(
    values: Mapping[str, Any],
    source: str = "config.json",
    families: Sequence[Family] = (),
    config_type: type = DecoderConfig,
) -> tuple[Family, Config]:
    """The family of a ``config.json``, and the configuration that it describes.

    Families of other kinds than `config_type` are known, but not read.

    Raises:
        ValueError: listing every key that is missing, that is not what it must be, or that asks for
            something the model here does not do.
    """
    known = {**FAMILIES, **{one.model_type: one for one in families}}
    model_type = values.get("model_type")
    family = known.get(model_type) if isinstance(model_type, str) else None
    if family is not None and family.config_type is config_type:
        return family, family.config(values, source)
    alike = [
        name for name, one in known.items() if one.config_type is config_type
    ]
    fix = (
        "in Python, describe another family by a sqjax.models.Family and pass families=[it], or "
        "quantize the model in its own JAX code"
    )
    if family is not None:
        other = KINDS[family.config_type]
        fix = f"this is {other.what}: sqjax.models.{other.load} loads it"
    raise ValueError(
        f"{source}: expected model_type to be one of {sorted(alike)}, got {model_type!r}; {fix}"
    )


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """(the safetensors files, the index's file of each tensor); {} where there is no index.

    Raises:
        ValueError: if there is none, or the index names files that are not in the directory.
    """
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single], {}
    if not index.is_file():
        why = "pickled weights are not read: save the model with safetensors"
        if is_saved(directory):
            why = (
                "sqjax.models.save wrote it, and sqjax.models.load reads it: give the checkpoint "
                "that it was made of"
            )
        raise ValueError(
            f"{directory}: expected model.safetensors or model.safetensors.index.json, got neither "
            f"({why})"
        )
    weight_map: Any = read_object(index).get("weight_map")
    if not MAPPING.holds(weight_map) or not TEXTS.holds(
        list(weight_map.values())
    ):
        raise ValueError(
            f"{index}: expected a weight_map of names and files, got {weight_map!r}; fetch it again"
        )
    names = sorted(set(weight_map.values()))
    problems = []
    for name in names:
        # A name with folders in it could lead out of the directory.
        is_beside = Path(name).name == name and (directory / name).is_file()
        if not is_beside:
            problems.append(
                f"{name}: expected this file beside the index, got none"
            )
    raise_problems(str(index), problems)
    return list(map(directory.joinpath, names)), weight_map


def _header(path: Path, file: BinaryIO) -> Header:
    """The header of a safetensors file."""
    try:
        return read_header(file)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got {error}; fetch it again"
        ) from error
