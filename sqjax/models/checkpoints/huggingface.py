"""Reads a Llama model from a Hugging Face directory: config.json and safetensors; no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from sqjax.models.checkpoints.mapping import assemble, raise_problems
from sqjax.models.llama import LlamaConfig
from sqjax.models.model import Params

# config.json's key -> the field of LlamaConfig.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
# Keys that would change what the model computes, with the values that do not (None for no value).
WITHOUT_EFFECT: dict[str, tuple] = {
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "layer_types": (None,),
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
    config = read_config(_read_json(config_file), source=str(config_file))
    files: dict[str, Any] = {}
    for path in weight_files(directory):
        reader = _open(path)
        names: list[str] = reader.keys()
        for name in names:
            files[name] = reader
    tensors = {}
    problems = []
    for name, reader in files.items():
        if _is_redundant(name, config):
            continue
        # The header alone: no array is read before every shape has been checked.
        header = reader.get_slice(name)
        tensors[name] = (name, tuple(header.get_shape()))
        if header.get_dtype() not in FLOATS:
            problems.append(
                f"{name}: expected a dtype of {FLOATS}, got {header.get_dtype()}"
            )

    def read(name: str) -> np.ndarray:
        return files[name].get_tensor(name)

    return config, assemble(
        str(directory), config, tensors, read, dtype, problems
    )


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Whether a tensor follows from the rest, so that the file's copy of it is not read."""
    if name.endswith("rotary_emb.inv_freq"):
        return True  # the model computes it from rope_theta
    # A tied head is the embedding, whatever the file stores under its name.
    return config.tie_embeddings and name == "lm_head.weight"


def read_config(
    config: Mapping[str, Any], source: str = "config.json"
) -> LlamaConfig:
    """Translates ``config.json``.

    Raises:
        ValueError: listing every key that is missing, or that asks for something the model here
            does not do.
    """
    model_type = config.get("model_type")
    if model_type not in ("llama", "mistral"):
        raise ValueError(
            f"{source}: expected model_type 'llama' or 'mistral', got {model_type!r}; sqjax "
            "quantizes any JAX function, so use another model through its own JAX code"
        )
    missing = [key for key in SIZES if config.get(key) is None]
    problems = [f"{key}: expected a number, got none" for key in missing]
    problems += _unsupported_keys(config)
    window = config.get("sliding_window")
    if window is not None and model_type != "mistral":
        problems.append(
            f"sliding_window = {window!r}: not supported for {model_type!r}, only for 'mistral'"
        )
    theta, rope_problems = _rope_theta(config)
    raise_problems(source, problems + rope_problems)
    heads = config["num_attention_heads"]
    return LlamaConfig(
        **{field: config[key] for key, field in SIZES.items()},
        num_kv_heads=_value(config, "num_key_value_heads", heads),
        head_dim=_value(config, "head_dim", config["hidden_size"] // heads),
        rope_theta=float(theta),
        rms_norm_eps=_value(config, "rms_norm_eps", 1e-6),
        tie_embeddings=_value(config, "tie_word_embeddings", False),
        attention_bias=_value(config, "attention_bias", False),
        mlp_bias=_value(config, "mlp_bias", False),
        max_length=_value(config, "max_position_embeddings", 2048),
        sliding_window=window,
    )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: the shards its index names, or the single one.

    Raises:
        ValueError: if there is none, or the index names files that are not in the directory.
    """
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{directory}: expected model.safetensors or model.safetensors.index.json, got neither "
            "(pickled weights are not read: save the model with safetensors)"
        )
    names = sorted(set(_read_json(index)["weight_map"].values()))
    problems = []
    for name in names:
        # A name with folders in it could lead out of the directory.
        is_beside = Path(name).name == name and (directory / name).is_file()
        if not is_beside:
            problems.append(
                f"{name}: expected this file beside the index, got none"
            )
    raise_problems(str(index), problems)
    return [directory / name for name in names]


def _rope_theta(config: Mapping[str, Any]) -> tuple[float, list[str]]:
    """rope_theta from where older or newer transformers write it, and problems with positions.

    Older ones write "rope_theta" beside "rope_scaling", newer ones both inside "rope_parameters".
    """
    theta = _value(config, "rope_theta", None)
    problems = []
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(
                f"{key} = {rope!r}: not supported, positions would be wrong; expected 'default'"
            )
        theta = rope.get("rope_theta", theta)
    return 10000.0 if theta is None else theta, problems


def _unsupported_keys(config: Mapping[str, Any]) -> list[str]:
    """One problem for each key that the model here would ignore though it changes the result."""
    problems = []
    for key, harmless in WITHOUT_EFFECT.items():
        value = config.get(key)
        # Layer types say nothing new where every layer has the usual attention.
        is_usual = (
            key == "layer_types" and value and set(value) == {"full_attention"}
        )
        if value not in harmless and not is_usual:
            problems.append(
                f"{key} = {value!r}: not supported (would be ignored)"
            )
    return problems


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key's value; config.json writes null for "the default"."""
    return default if config.get(key) is None else config[key]


def _open(path: Path):
    """A safetensors file, of which nothing but the header has been read."""
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got {error}; fetch it again"
        ) from error


def _read_json(path: Path) -> Any:
    """What a JSON file of the checkpoint holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: expected this file, got none; it belongs to the checkpoint"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got {error}; fetch it again"
        ) from error
