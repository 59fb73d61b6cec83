"""Reads a Llama model from a Hugging Face directory: config.json and safetensors; no pickle."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sqjax.files.arrays import STORED, DeclaredArray
from sqjax.files.header import Entry, Header, read_header
from sqjax.files.opening import open_file
from sqjax.models.checkpoints.mapping import (
    assemble,
    raise_problems,
    usual_heads,
)
from sqjax.models.fields import (
    EPSILON,
    FLAG,
    IDS,
    MAPPING,
    POSITIVE,
    SIZE,
    TEXTS,
    Key,
    beyond,
    read_fields,
    wrong,
)
from sqjax.models.json_files import read_object
from sqjax.models.llama import LlamaConfig
from sqjax.models.model import Params

# What is read of config.json. The defaults of a head's size and of the key/value heads follow from
# the other sizes.
KEYS = (
    Key("vocab_size", "vocab_size", SIZE, required=True),
    Key("hidden_size", "hidden_size", SIZE, required=True),
    Key("intermediate_size", "intermediate_size", SIZE, required=True),
    Key("num_hidden_layers", "num_layers", SIZE, required=True),
    Key("num_attention_heads", "num_heads", SIZE, required=True),
    Key("num_key_value_heads", "num_kv_heads", SIZE),
    Key("head_dim", "head_dim", SIZE),
    Key("rms_norm_eps", "rms_norm_eps", EPSILON, 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", FLAG, False),
    Key("attention_bias", "attention_bias", FLAG, False),
    Key("mlp_bias", "mlp_bias", FLAG, False),
    Key("max_position_embeddings", "max_length", SIZE, 2048),
    Key("sliding_window", "sliding_window", SIZE),
)
# What is looked at, and fills no field.
BESIDE = (
    Key("rope_theta", "rope_theta", POSITIVE),
    Key("rope_scaling", "rope_scaling", MAPPING),
    Key("rope_parameters", "rope_parameters", MAPPING),
    Key("layer_types", "layer_types", TEXTS),
    Key("eos_token_id", "eos_token_id", IDS),
)
# What a key that is not there means, where it is not what KEYS says: as transformers has it.
ABSENT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
}
# Keys that would change what the model computes, with the values that do not (None for no value).
HARMLESS_VALUES: dict[str, tuple] = {
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
FLOATS = ("F64", "F32", "F16", "BF16")


def read_huggingface(
    directory: Path, dtype: DTypeLike = jnp.float32
) -> tuple[LlamaConfig, Params]:
    """Reads ``config.json`` and the weights, in one safetensors file or in shards with an index.

    Raises:
        ValueError: if a file is missing or damaged, the configuration asks for something the model
            here does not do, or tensors are missing, unknown, misshapen or not floating-point; all
            are listed.
    """
    config_file = directory / "config.json"
    config = read_config(read_object(config_file), source=str(config_file))
    with contextlib.ExitStack() as opened:
        stored, problems = _stored(directory, opened)
        used = {}
        for name, tensor in stored.items():
            problems += _wrong_dtype(name, tensor)
            if not _is_redundant(name, config):
                used[name] = tensor
        tensors = {
            name: (name, tensor.entry.shape) for name, tensor in used.items()
        }

        def read(name: str) -> np.ndarray:
            return used[name].read()

        params = assemble(
            str(directory), config, tensors, read, dtype, problems
        )
        problems = []
        for name in stored.keys() - used.keys():
            problems += _contradiction(name, stored, config)
        raise_problems(str(directory), problems)
        return config, params


class _Stored(NamedTuple):
    """A tensor of a checkpoint: the opened file that it is in, and what the header says of it."""

    file: BinaryIO
    entry: Entry

    def read(self) -> np.ndarray:
        """The array."""
        array = DeclaredArray(STORED[self.entry.dtype], self.entry.shape)
        return array.read(self.file, self.entry.first)


def _stored(
    directory: Path, opened: contextlib.ExitStack
) -> tuple[dict[str, _Stored], list[str]]:
    """({name: tensor}, problems) of all files, which stay open until `opened` ends.

    Headers alone are read: no array before every shape has been checked.
    """
    found: dict[str, _Stored] = {}
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
            found[name] = _Stored(file, entry)
            place[name] = path.name
    for name in weight_map.keys() | (place.keys() if weight_map else ()):
        expected, got = weight_map.get(name), place.get(name)
        if expected != got:
            problems.append(
                f"{name}: expected it in {expected}, as the index says, got it in {got}"
            )
    return found, sorted(problems)


def _wrong_dtype(name: str, tensor: _Stored) -> list[str]:
    if tensor.entry.dtype in FLOATS:
        return []
    return [f"{name}: expected a dtype of {FLOATS}, got {tensor.entry.dtype}"]


# Tensors that follow from the rest ----------------------------------------------------------------

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ANGLES = ".rotary_emb.inv_freq"


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Whether a tensor follows from the rest, so that it is compared and not used."""
    return name.endswith(_ANGLES) or (config.tie_embeddings and name == _HEAD)


def _contradiction(
    name: str, stored: Mapping[str, _Stored], config: LlamaConfig
) -> list[str]:
    """One problem if a tensor that follows from the rest says something else."""
    if name == _HEAD:
        expected = stored[_EMBEDDING].read()
        what = (
            f"{_EMBEDDING}, because tie_word_embeddings is true; say false there if the head is "
            "one of its own"
        )
        tolerance = 0.0
    else:
        pairs = np.arange(0, config.head_dim, 2) / config.head_dim
        expected = np.power(float(config.rope_theta), -pairs)
        what = f"the angles of rope_theta = {config.rope_theta:g}"
        tolerance = 0.01  # in bfloat16 they have 8 bits
    got = stored[name].read()
    if got.shape == expected.shape and np.allclose(
        got.astype(np.float64), expected.astype(np.float64), tolerance, 0.0
    ):
        return []
    return [f"{name}: expected {what}; got other numbers"]


# The configuration --------------------------------------------------------------------------------


def read_config(
    config: Mapping[str, Any], source: str = "config.json"
) -> LlamaConfig:
    """Translates ``config.json``.

    Raises:
        ValueError: listing every key that is missing, that is not what it must be, or that asks for
            something the model here does not do.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ABSENT:
        raise ValueError(
            f"{source}: expected model_type 'llama' or 'mistral', got {model_type!r}; sqjax "
            "quantizes any JAX function, so use another model through its own JAX code"
        )
    config = {**ABSENT[model_type], **config}
    fields, problems = read_fields(config, KEYS)
    beside, other_problems = read_fields(config, BESIDE)
    problems += other_problems + _unsupported_keys(config)
    raise_problems(source, problems)
    window = fields["sliding_window"]
    if window is not None and model_type != "mistral":
        problems.append(
            f"sliding_window = {window!r}: not supported for {model_type!r}, only for 'mistral'"
        )
    theta, rope_problems = _rope_theta(beside)
    problems += rope_problems + _other_layers(beside, fields["num_layers"])
    problems += beyond(
        "eos_token_id", beside["eos_token_id"], fields["vocab_size"]
    )
    raise_problems(source, problems)
    fields |= usual_heads(fields)
    # A file may write a whole number.
    fields["rms_norm_eps"] = float(fields["rms_norm_eps"])
    try:
        return LlamaConfig(**fields, rope_theta=theta)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


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
        raise ValueError(
            f"{directory}: expected model.safetensors or model.safetensors.index.json, got neither "
            "(pickled weights are not read: save the model with safetensors)"
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


def _rope_theta(beside: Mapping[str, Any]) -> tuple[float, list[str]]:
    """rope_theta from where older or newer transformers write it, and problems with positions.

    Older ones write "rope_theta" beside "rope_scaling", newer ones both inside "rope_parameters".
    """
    theta = beside["rope_theta"]
    problems = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = beside[key] or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(
                f"{key} = {rope!r}: not supported, positions would be wrong; expected 'default'"
            )
        stated = rope.get("rope_theta")
        if stated is not None and not POSITIVE.holds(stated):
            problems.append(wrong(f"{key}: rope_theta", stated, POSITIVE))
        elif stated is not None:
            theta = stated
    return 10000.0 if theta is None else float(theta), problems


def _other_layers(beside: Mapping[str, Any], layers: int) -> list[str]:
    """One problem unless every layer has the usual attention, which says nothing new."""
    kinds = beside["layer_types"]
    if kinds is None or kinds == ["full_attention"] * layers:
        return []
    return [
        f"layer_types = {kinds!r}: not supported; expected {layers} times 'full_attention'"
    ]


def _unsupported_keys(config: Mapping[str, Any]) -> list[str]:
    """One problem for each key that the model here would ignore though it changes the result."""
    problems = []
    for key, harmless in HARMLESS_VALUES.items():
        value = config.get(key)
        if value not in harmless:
            stated = [repr(x) for x in harmless if x is not None]
            expected = " or ".join(stated) or "no such key"
            problems.append(
                f"{key} = {value!r}: expected {expected}; the model here computes nothing else"
            )
    return problems


def _header(path: Path, file: BinaryIO) -> Header:
    """The header of a safetensors file."""
    try:
        return read_header(file)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got {error}; fetch it again"
        ) from error
