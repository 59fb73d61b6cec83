"""What the translations of many families share: sizes, rotary embeddings, kinds of layers."""

import math
from collections.abc import Sequence
from typing import Any

from sqjax.models.checkpoints.settings import REQUIRED, Settings, read
from sqjax.models.config import LayerKind, Norm
from sqjax.models.fields import (
    EPSILON,
    FLAG,
    NUMBERS,
    POSITIVE,
    SIZE,
    TEXT,
    TEXTS,
    What,
    one_of,
)
from sqjax.models.rope import (
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    Rope,
    Scaling,
    Yarn,
)


def _is_layers(x: Any) -> bool:
    return SIZE.holds(x) and x <= 10_000


FULL, SLIDING = "full_attention", "sliding_attention"

#: Hugging Face's names of activations -> those of `sqjax.models.config.ACTIVATIONS`.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}


def activation(key: str, default: Any = REQUIRED):
    """The source of the activation between an MLP's matmuls, read from a key."""

    def source(settings: Settings) -> str | None:
        found = settings(key, one_of(*ACTIVATIONS), default)
        return ACTIVATIONS.get(found)

    return source


def rms_norm(settings: Settings, default: float = 1e-6, **choices) -> Norm:
    """An RMS norm with the file's epsilon."""
    eps = settings("rms_norm_eps", EPSILON, default)
    return Norm("rms", float(eps), **choices)


def layer_norm(
    settings: Settings, key: str = "layer_norm_eps", bias: bool = True
) -> Norm:
    """A LayerNorm with the file's epsilon."""
    return Norm("layer", float(settings(key, EPSILON, 1e-5)), bias)


#: Some families list every layer, which a wrong number of layers would make very long.
_LAYERS = What("a whole number of layers from 1 to 10000", _is_layers)


def layer_count(settings: Settings) -> int:
    """The number of layers, for families that list them."""
    return settings("num_hidden_layers", _LAYERS)


def head_dim(
    settings: Settings,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
) -> int:
    """The channels of a head: as stated, or the hidden size divided by the heads."""
    usual = settings(hidden, SIZE) // settings(heads, SIZE)
    return settings("head_dim", SIZE, usual)


def even_head_dim(
    settings: Settings, hidden: str, heads: str = "num_attention_heads"
) -> int:
    """The hidden size divided by the heads, where the division must come out even."""
    size, count = settings(hidden, SIZE), settings(heads, SIZE)
    if size % count:
        settings.refuse(
            f"{hidden}: expected a multiple of {heads} = {count}, got {size}"
        )
    return size // count


# Rotary embeddings --------------------------------------------------------------------------------


def rope(
    settings: Settings,
    head_dim: int,
    *,
    layers: str | None = None,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    scaled: bool = True,
    part: float | None = None,
    part_key: str = "partial_rotary_factor",
    interleaved: bool = False,
) -> Rope:
    """The rotary embedding of a configuration.

    Older transformers write "rope_theta" beside "rope_scaling", newer ones both inside
    "rope_parameters", and there once for each kind of layers where there are several.

    Args:
        settings: the file's.
        head_dim: channels of a head.
        layers: the kind of layers whose embedding this is, where kinds have their own.
        theta: the base where the file has none.
        theta_key: its key in older files.
        scaled: whether an older file's "rope_scaling" is about these layers.
        part: which part of a head's channels turns, where the file does not say; None for a
            family of which all channels turn, whatever a file says.
        part_key: its key.
        interleaved: as in `Rope`.
    """
    newer = settings.within("rope_parameters")
    older = settings.within("rope_scaling")
    if layers is not None and layers in newer.values:
        newer = newer.within(layers)
    chosen = newer if newer.values else older
    stated = settings(theta_key, POSITIVE, theta)
    base = float(newer("rope_theta", POSITIVE, stated))
    size = head_dim
    if part is not None:
        turning = settings(part_key, POSITIVE, part)
        turning = newer("partial_rotary_factor", POSITIVE, turning)
        size = int(head_dim * turning)
    elif newer("partial_rotary_factor", POSITIVE, 1) != 1:
        settings.refuse("partial_rotary_factor: expected 1 for this family")
    scaling = None
    if scaled or newer.values:
        scaling = _scaling(settings, chosen, base, size)
    return Rope(base, None if size == head_dim else size, interleaved, scaling)


def _scaling(
    settings: Settings, stated: Settings, theta: float, channels: int
) -> Scaling | None:
    """The scaling that an object of the file describes."""
    # Older files say "type", newer ones "rope_type".
    kind = stated("rope_type", TEXT, stated("type", TEXT, None))
    makers = {
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
        "su": _longrope,  # the name before "longrope"
    }
    # What may stand there without a kind: numbers that are no scaling's.
    plain = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    if kind is None and set(stated.values) <= plain:
        return None
    if kind == "default":
        return None
    if kind not in makers:
        settings.refuse(
            f"rope_type = {kind!r}: not supported, positions would be wrong; expected one of "
            f"{['default', *makers]}"
        )
        return None
    known = len(settings.problems)
    made = makers[kind](settings, stated)
    return made if len(settings.problems) == known else None


def _linear(settings: Settings, stated: Settings) -> Linear | None:
    factor = stated("factor", POSITIVE)
    return factor and Linear(float(factor))


def max_length(settings: Settings) -> int:
    """The longest sequence that a model with a rotary embedding was made for.

    A "dynamic" scaling makes the stated one longer; with the others it is so already.
    """
    longest = _longest(settings)
    for key in ("rope_scaling", "rope_parameters"):
        stated = settings.within(key)
        kind = stated("rope_type", TEXT, stated("type", TEXT, None))
        if kind == "dynamic":
            longest = int(longest * stated("factor", POSITIVE, 1))
    return longest


def _longest(settings: Settings) -> int:
    return settings("max_position_embeddings", SIZE, 2048)


def _original(settings: Settings, stated: Settings) -> int:
    """How many tokens the model was trained on before its positions were scaled."""
    key = "original_max_position_embeddings"
    # Phi-3 says it outside of the rope's own keys, which then holds.
    return settings(key, SIZE, stated(key, SIZE, _longest(settings)))


def _dynamic(settings: Settings, stated: Settings) -> Dynamic | None:
    factor = stated("factor", POSITIVE)
    return factor and Dynamic(float(factor), _longest(settings))


def _llama3(settings: Settings, stated: Settings) -> Llama3 | None:
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (stated(key, POSITIVE) for key in keys)
    if None in (factor, low, high):
        return None
    original = _original(settings, stated)
    return Llama3(float(factor), float(low), float(high), original)


def _yarn(settings: Settings, stated: Settings) -> Yarn | None:
    factor = stated("factor", POSITIVE)
    if factor is None:
        return None
    return Yarn(
        float(factor),
        _original(settings, stated),
        fast=float(stated("beta_fast", POSITIVE, 32)),
        slow=float(stated("beta_slow", POSITIVE, 1)),
        attention_factor=_yarn_attention(stated, float(factor)),
        truncate=stated("truncate", FLAG, True),
    )


def _yarn_attention(stated: Settings, factor: float) -> float:
    """What YaRN multiplies cosines and sines by: 0.1 ln(factor) + 1, if the file says nothing."""

    def grown(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1

    scale = float(stated("mscale", EPSILON, 0))
    scale_all = float(stated("mscale_all_dim", EPSILON, 0))
    usual = grown(1.0)
    if scale and scale_all:
        usual = grown(scale) / grown(scale_all)
    return float(stated("attention_factor", POSITIVE, usual))


def _longrope(settings: Settings, stated: Settings) -> LongRope | None:
    short = stated("short_factor", NUMBERS)
    long = stated("long_factor", NUMBERS)
    if short is None or long is None:
        return None
    longest, original = _longest(settings), _original(settings, stated)
    factor = longest / original
    if longest == original:
        factor = float(stated("factor", POSITIVE, 1.0))
    usual = 1.0
    if factor > 1:
        usual = math.sqrt(1 + math.log(factor) / math.log(original))
    attention = float(stated("attention_factor", POSITIVE, usual))
    factors = tuple(map(float, short)), tuple(map(float, long))
    return LongRope(*factors, original, attention)


# Kinds of layers ----------------------------------------------------------------------------------


def layer_types(settings: Settings, usual: Sequence[str]) -> list[str]:
    """The kind of attention of each layer: as the file says, or the family's usual ones."""
    types = settings("layer_types", TEXTS, list(usual))
    key = settings.name("layer_types")
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        settings.refuse(
            f"{key}: expected {FULL!r} and {SLIDING!r}, got {unknown[0]!r}"
        )
    if len(types) != len(usual):
        settings.refuse(
            f"{key}: expected one for each of {len(usual)} layers, got {len(types)}"
        )
    return types


def kinds(
    types: Sequence[str], full: LayerKind, sliding: LayerKind
) -> tuple[LayerKind, ...]:
    """The kind of each layer, from their types; one for all where they are alike."""
    of_layers = tuple(full if name == FULL else sliding for name in types)
    return of_layers[:1] if len(set(of_layers)) == 1 else of_layers


#: The sizes of families that name them as Llama does, without key/value heads of their own.
SIZES = {
    "vocab_size": read("vocab_size", SIZE),
    "hidden_size": read("hidden_size", SIZE),
    "num_layers": read("num_hidden_layers", SIZE),
    "num_heads": read("num_attention_heads", SIZE),
    "num_kv_heads": read("num_attention_heads", SIZE),
    "head_dim": lambda settings: even_head_dim(settings, "hidden_size"),
}
