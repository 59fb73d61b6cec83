"""What a GGUF file says of a model: the inverse of `sqjax.models.checkpoints.gguf_config`.

Whether a model is one that an architecture's files can describe is not decided by rules here: the
keys are made of its configuration and read again, and must give that configuration.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.gguf_architectures import (
    ARCHITECTURES,
    EVERY,
    LONG,
    SHORT,
)
from sqjax.models.checkpoints.gguf_config import read_config
from sqjax.models.checkpoints.mapping import parameter_shapes
from sqjax.models.checkpoints.names import Row, Shape, find, their_shape
from sqjax.models.config import DecoderConfig, Experts, LayerKind
from sqjax.models.fields import LARGEST_SIZE
from sqjax.models.positions import turning_channels
from sqjax.models.rope import (
    Linear,
    Llama3,
    LongRope,
    Rope,
    Yarn,
    llama3_factors,
)

_ORIGINAL = "rope.scaling.original_context_length"


class Described(NamedTuple):
    """A model as the files of an architecture describe it.

    Attributes:
        architecture: its name.
        family: which tensor holds which leaves.
        keys: the metadata, with the architecture's name in front.
        shapes: {a tensor's name: its shape}, but of those in `factors`.
        factors: tensors that are no leaves: what frequencies are divided by.
    """

    architecture: str
    family: Family
    keys: dict[str, Any]
    shapes: dict[str, Shape]
    factors: dict[str, np.ndarray]


def describe(config: Any, preferred: str | None) -> Described:
    """A model as the first architecture describes it that can.

    Args:
        config: the model.
        preferred: an architecture that is tried before the others.

    Raises:
        ValueError: there is none.
    """
    problem = (
        "expected a model that llama.cpp has as one of "
        f"{sorted(ARCHITECTURES)}, got another"
    )
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"{problem}: {type(config).__name__}")
    # A sort keeps the order of what is alike: the preferred one comes first.
    names = sorted(ARCHITECTURES, key=lambda name: name != preferred)
    tried = (_described(name, config) for name in names)
    found = next(filter(None, tried), None)
    if found is None:
        raise ValueError(
            f"{problem}; write it with sqjax.models.save_huggingface: {config}"
        )
    return found


def _described(name: str, config: DecoderConfig) -> Described | None:
    """The model, if what the architecture's files can say of it is all of it."""
    stated, factors = _stated(name, config)
    keys = {f"{name}.{key}": x for key, x in stated.items() if x is not None}
    rows = ARCHITECTURES[name].rows
    try:
        shapes = _tensor_shapes(config, rows)
        metadata = {"general.architecture": name, **keys}
        family, read = read_config(name, metadata, shapes, factors)
    except ValueError:
        return None
    if _comparable(read) != _comparable(_as_read(config)):
        return None
    return Described(name, family, keys, shapes, factors)


def _comparable(x: Any) -> Any:
    """A configuration with its numbers in float32, which is what files hold."""
    if isinstance(x, DecoderConfig):
        return _comparable(asdict(x))
    if isinstance(x, dict):
        return {key: _comparable(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return list(map(_comparable, x))
    return float(np.float32(x)) if isinstance(x, float) else x


def _as_read(config: DecoderConfig) -> DecoderConfig:
    """The configuration with what a file says in other words: factors for Llama 3's scaling."""
    kinds = []
    for kind in config.kinds:
        if kind.rope is not None and isinstance(kind.rope.scaling, Llama3):
            each = tuple(_factors_of(config, kind.rope).tolist())
            scaling = LongRope(each, each, LARGEST_SIZE)
            kind = replace(kind, rope=replace(kind.rope, scaling=scaling))
        kinds.append(kind)
    return replace(config, kinds=tuple(kinds))


# Keys ---------------------------------------------------------------------------------------------

_Factors = dict[str, np.ndarray]


def _stated(
    name: str, config: DecoderConfig
) -> tuple[dict[str, Any], _Factors]:
    """The keys, without the architecture, and the tensors that say something; None for no key."""
    wide, window = _kinds(config)
    turning, factors = _of_rope(config, wide.rope)
    near = getattr(window, "rope", None) or wide.rope
    base = turning["rope.freq_base"]
    # A file says the base of windows only where it is another.
    own = {getattr(near, "theta", base)} - {base}
    return {
        "block_count": config.num_layers,
        "context_length": config.max_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.value_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm.eps),
        "attention.scale": config.query_scale,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "attention.sliding_window": getattr(window, "sliding_window", None),
        "attention.sliding_window_pattern": _pattern(config),
        "rope.freq_base_swa": next(iter(own), None),
        **turning,
        **_of_experts(name, config.experts),
    }, factors


def _kinds(config: DecoderConfig) -> tuple[LayerKind, LayerKind | None]:
    """The kind of layer whose rotary embedding is the file's; and the kind that has a window.

    They are one and the same where all layers have a window.
    """
    by_window: dict[bool, LayerKind] = {}
    for kind in config.different_kinds:
        by_window.setdefault(kind.sliding_window is not None, kind)
    window = by_window.get(True)
    return by_window.get(False, config.kinds[0]), window


def _pattern(config: DecoderConfig) -> list[bool] | None:
    """For each layer whether it has a window, where they differ."""
    pattern = [kind.sliding_window is not None for kind in config.kinds]
    return pattern if len(pattern) > 1 else None


def _of_experts(name: str, experts: Experts | None) -> dict[str, Any]:
    if experts is None:
        return {}
    counts = {
        "expert_count": experts.count,
        "expert_used_count": experts.per_token,
    }
    # Of Mixtral feed_forward_length says it.
    if name == "llama":
        return counts
    return counts | {
        "expert_feed_forward_length": experts.intermediate_size,
        "expert_shared_feed_forward_length": experts.shared_size,
    }


def _of_rope(
    config: DecoderConfig, rope: Rope | None
) -> tuple[dict[str, Any], _Factors]:
    """The keys of a rotary embedding, and tensors of factors; {} where nothing turns."""
    if rope is None:
        return {"rope.freq_base": None}, {}
    keys: dict[str, Any] = {
        "rope.freq_base": float(rope.theta),
        "rope.dimension_count": turning_channels(config),
    }
    match rope.scaling:
        case Linear(factor):
            linear = {"rope.scaling.factor": float(factor)}
            return keys | {"rope.scaling.type": "linear", **linear}, {}
        case Yarn() as yarn:
            return keys | _of_yarn(yarn), {}
        case Llama3():
            return keys, {EVERY: _factors_of(config, rope)}
        case LongRope() as longrope:
            more, factors = _of_longrope(longrope)
            return keys | more, factors
        case _:
            # Another scaling shows as a difference in what is read.
            return keys, {}


def _of_yarn(yarn: Yarn) -> dict[str, Any]:
    # Where there is no key, it follows from the factor.
    usual = 0.1 * np.log(max(yarn.factor, 1.0)) + 1
    is_usual = np.isclose(yarn.attention_factor, usual, 1e-6)
    own = None if is_usual else float(yarn.attention_factor)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor),
        _ORIGINAL: yarn.original_length,
        "rope.scaling.yarn_beta_fast": float(yarn.fast),
        "rope.scaling.yarn_beta_slow": float(yarn.slow),
        "rope.scaling.yarn_attn_factor": own,
    }


def _of_longrope(scaling: LongRope) -> tuple[dict[str, Any], _Factors]:
    short, long = (
        np.asarray(factors, np.float32)
        for factors in (scaling.short, scaling.long)
    )
    # What was read of a file with one tensor of factors.
    if scaling.original_length == LARGEST_SIZE:
        return {}, {EVERY: short}
    keys = {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": float(scaling.attention_factor),
        _ORIGINAL: scaling.original_length,
    }
    return keys, {LONG: long, SHORT: short}


def _factors_of(config: DecoderConfig, rope: Rope) -> np.ndarray:
    """By what each pair's frequency is divided."""
    channels = turning_channels(config) or 0
    return llama3_factors(rope, channels).astype(np.float32)


# Tensors ------------------------------------------------------------------------------------------


def _tensor_shapes(
    config: DecoderConfig, rows: Sequence[Row]
) -> dict[str, Shape]:
    """{name: shape} of the tensors that hold a model's leaves, by the rows of an architecture."""
    leaves = parameter_shapes(config, config.num_layers)
    name_of: dict[str, str] = {}
    layers = list(map(str, range(config.num_layers)))
    # Older files have a tensor for each expert.
    whole = [row for row in rows if "{entry}" not in row.theirs]
    # Rows of several leaves come last, and go before those of one leaf. Of two rows of one leaf the
    # second one is that of all models but those with both leaves.
    for row, layer in itertools.product(sorted(whole, key=_leaf_count), layers):
        paths = tuple(path.format(layer=layer) for path in row.ours)
        name = row.theirs.format(layer=layer)
        found = find(whole, name, leaves)
        if found is not None and found.paths == paths:
            name_of |= dict.fromkeys(paths, name)
    shapes: dict[str, Shape] = {}
    for name in dict.fromkeys(name_of.values()):
        shapes[name] = _shape(config, whole, name, leaves)
    return shapes


def _leaf_count(row: Row) -> int:
    return len(row.ours)


def _shape(
    config: DecoderConfig,
    rows: Sequence[Row],
    name: str,
    leaves: Mapping[str, Shape],
) -> Shape:
    found = find(rows, name, leaves)
    assert found is not None  # the name was found by these rows
    own = tuple(leaves[path] for path in found.paths)
    return their_shape(config, found.layout, own)
