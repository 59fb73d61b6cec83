"""The metadata of a GGUF file, made into the words of config.json, which a family's fields read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sqjax.models.checkpoints.families.common import FULL, SLIDING
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.gguf_architectures import (
    ARCHITECTURES,
    EVERY,
    FACTOR,
    FACTORS,
    HARMLESS,
    IGNORED,
    KEYS,
    LONG,
    MIXTURES,
    SCALINGS,
    TYPE,
    ZERO_IS_NONE,
    Architecture,
)
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.config import DecoderConfig
from sqjax.models.fields import LARGEST_SIZE, POSITIVE, SIZE, What, one_of


def read_config(
    source: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple],
    factors: Mapping[str, np.ndarray],
) -> tuple[Family, DecoderConfig]:
    """How the tensors of a file are read, and the configuration that its metadata describe.

    Args:
        source: the file, for the error message.
        metadata: the file's keys and values.
        shapes: the shape of each tensor of all parts, by GGUF's name.
        factors: those of the tensors `gguf_architectures.FACTORS` that the file has.

    Raises:
        ValueError: listing every key that is missing, that is not what it must be, or that asks for
            something the model here does not do.
    """
    name: Any = metadata.get("general.architecture")
    if str(name) not in ARCHITECTURES:
        raise ValueError(
            f"{source}: expected general.architecture to be one of {sorted(ARCHITECTURES)}, got "
            f"{name!r}"
        )
    stated = _stated(name, metadata)
    mixtures = MIXTURES if "expert_count" in stated else {}
    architecture = {**ARCHITECTURES, **mixtures}[name]
    stated |= {key: array.ravel().tolist() for key, array in factors.items()}
    settings = _translated(name, architecture, stated, shapes)
    _check(settings, architecture)
    family = _family(name, architecture, settings)
    return family, family.translate(settings, source)


def _stated(name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the architecture that say something, without its name in front."""
    stated = {}
    for key, value in metadata.items():
        before, _, suffix = key.partition(".")
        is_none = suffix in ZERO_IS_NONE and value == 0
        if before == name and suffix not in IGNORED and not is_none:
            stated[suffix] = _decimal(value)
    return stated


def _decimal(value: Any) -> Any:
    """A number that was rounded to float32, as it was before: 1e-06 for 9.999999974752427e-07.

    The shortest decimal that rounds to it is what config.json said, of which the file was made.
    """
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):  # of a float64
        rounded = np.float32(value)
    return float(str(rounded)) if float(rounded) == value else value


# Translation --------------------------------------------------------------------------------------


def _translated(
    name: str,
    architecture: Architecture,
    stated: dict[str, Any],
    shapes: Mapping[str, tuple],
) -> Settings:
    """What the file says, in the words of config.json; keys that are not known stay as they are."""
    keys = {**KEYS, **architecture.keys}
    kind = _take_scaling_kind(stated)
    rope_type, scaling_keys = SCALINGS.get(kind, ("default", {}))
    scaling: dict[str, Any] = {"rope_type": rope_type, "stated": kind}
    names = {key: _whole(name, suffix) for suffix, key in keys.items()}
    for suffix, key in scaling_keys.items():
        names[f"rope_scaling: {key}"] = _whole(name, suffix)
        scaling[key] = stated.pop(suffix, None)
    # The factors of "llama3" are the same for short texts and long ones: no text is long.
    scaling.setdefault("long_factor", scaling.get("short_factor"))
    scaling.setdefault("original_max_position_embeddings", LARGEST_SIZE)
    names.setdefault("rope_scaling: long_factor", EVERY)

    values = {**architecture.absent, "rope_scaling": scaling}
    for suffix, value in stated.items():
        values[keys.get(suffix, _whole(name, suffix))] = value
    values |= _of_tensors(values, shapes) | _of_pattern(values)
    of_tensors = {
        "vocab_size": "token_embd.weight",
        "layer_types": names["sliding_window_pattern"],
        "rope_scaling: stated": _whole(name, TYPE),
    }
    return Settings(_with_head(values), names={**names, **of_tensors})


def _whole(name: str, suffix: str) -> str:
    """A key with the architecture in front; tensors, which say something too, have none."""
    return suffix if suffix in FACTORS else f"{name}.{suffix}"


def _take_scaling_kind(stated: dict[str, Any]) -> str:
    """The type of the rotary embedding's scaling; the key is not stated any more.

    Files leave it open where tensors say it, and older ones for "linear".
    """
    signs = {LONG: "longrope", EVERY: "llama3", FACTOR: "linear"}
    usual = next((signs[sign] for sign in signs if sign in stated), "none")
    return str(stated.pop(TYPE, usual))


def _of_tensors(
    values: Mapping[str, Any], shapes: Mapping[str, tuple]
) -> dict[str, Any]:
    """What the tensors say: the vocabulary, whether the head is the embedding, biases."""
    # Where there is no embedding, which is reported as missing later, any size serves.
    usual = (values.get("stated_vocab_size", 1),)
    rows, *_ = shapes.get("token_embd.weight", usual)
    return {
        "vocab_size": rows,
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }


def _of_pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """The kinds of layers, if the pattern of windows has an entry for each."""
    pattern = values.get("sliding_window_pattern")
    if not isinstance(pattern, list):
        return {}
    # What is neither true nor false stays, for the error message.
    types = {"True": SLIDING, "False": FULL}
    listed = [types.get(str(has), str(has)) for has in pattern]
    return {"layer_types": listed, "sliding_window_pattern": None}


def _with_head(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the size of a head, which a file may leave open."""
    hidden: Any = values.get("hidden_size")
    heads: Any = values.get("num_attention_heads")
    if all(map(SIZE.holds, (hidden, heads))) and hidden >= heads:
        return {"head_dim": hidden // heads, **values}
    return values


# Checks -------------------------------------------------------------------------------------------


def _check(settings: Settings, architecture: Architecture) -> None:
    """Notes what is wrong of the keys that no family checks, or that families leave open."""
    for key, what in architecture.required.items():
        settings(key, what)
    for key, (other, words) in architecture.again.items():
        settings(key, _equal(words, settings.values.get(other)), None)
    head = settings.values.get("head_dim")
    channels = settings.values.get("rotary_channels", head)
    scaling = settings.within("rope_scaling")
    scaling("stated", one_of(*SCALINGS))
    scaling("short_factor", _factors(channels), None)
    scaling("long_factor", _factors(channels), None)


def _equal(words: str, value: Any) -> What:
    """What is that value; where there is none, which is reported elsewhere, anything."""
    return What(f"{words} {value}", lambda x: value in (None, x))


def _factors(channels: Any) -> What:
    """What is a list of one factor for each pair of channels."""
    pairs = channels // 2 if SIZE.holds(channels) else 0

    def holds(x: list) -> bool:
        return len(x) == pairs and all(map(POSITIVE.holds, x))

    return What(
        f"{pairs} finite numbers above 0, one for each pair of channels", holds
    )


def _family(
    name: str, architecture: Architecture, settings: Settings
) -> Family:
    """The family whose fields and rows are those of the architecture."""
    # A key that no field reads must not be there, or say what changes nothing. One that nobody has
    # heard of is one of them: to ignore it could make a model that loads and computes something
    # else.
    neutral = {}
    for key in settings.values:
        neutral[key] = None, HARMLESS.get(key.removeprefix(f"{name}."))
    # Where there are biases that no field asks for, their tensors are the problem.
    biases = dict.fromkeys(("attention_bias", "mlp_bias"), (True, False))
    return Family(
        name,
        architecture.fields,
        architecture.rows,
        prefix="",
        neutral={**neutral, **biases},
    )
