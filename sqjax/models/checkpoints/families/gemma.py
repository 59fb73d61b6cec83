"""Gemma 1, 2 and 3: gains that are added to 1, scaled embeddings, norms around each part."""

import math

from sqjax.models.checkpoints.families.common import (
    FULL,
    SLIDING,
    activation,
    kinds,
    layer_count,
    layer_types,
    rms_norm,
    rope,
)
from sqjax.models.checkpoints.families.llama import (
    ATTENTION_ROWS,
    LLAMA_FIELDS,
    LLAMA_ROWS,
    MLP_ROWS,
    OUTER_ROWS,
    norm_rows,
    rope_in_some_windows,
)
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.settings import Settings, Source
from sqjax.models.config import LayerKind, Norm
from sqjax.models.fields import POSITIVE, SIZE


def _norm(settings: Settings) -> Norm:
    return rms_norm(settings, one_plus=True)


#: What all three share.
_FIELDS = {
    **LLAMA_FIELDS,
    "mlp_bias": False,
    "norm": _norm,
    "embedding_scale": lambda settings: math.sqrt(
        settings("hidden_size", SIZE)
    ),
}
_ABSENT = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}


def _first_activation(settings: Settings) -> str | None:
    """Gemma 1: the first files say "gelu" and mean its approximation."""
    found = activation("hidden_act", "gelu_pytorch_tanh")(settings)
    return "gelu_tanh" if found == "gelu" else found


#: Gemma 1.
GEMMA = Family(
    "gemma",
    {**_FIELDS, "activation": _first_activation},
    LLAMA_ROWS,
    absent={**_ABSENT, "num_key_value_heads": 16},
)


def _query_scale(settings: Settings) -> float:
    return settings("query_pre_attn_scalar", POSITIVE, 256) ** -0.5


def _softcap(key: str) -> Source:
    """The source of a soft cap; a file may write a whole number."""

    def source(settings: Settings) -> float | None:
        cap = settings(key, POSITIVE, None)
        return None if cap is None else float(cap)

    return source


def _second_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    """Every second layer looks at all tokens, beginning with layer 1."""
    layers = range(layer_count(settings))
    usual = [SLIDING if i % 2 == 0 else FULL for i in layers]
    window = settings("sliding_window", SIZE, 4096)
    return rope_in_some_windows(settings, usual, window)


#: Norms before and after each part.
_SANDWICH_ROWS = (
    *OUTER_ROWS,
    *ATTENTION_ROWS,
    *MLP_ROWS,
    *norm_rows(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
)
#: What Gemma 2 and 3 share.
_SECOND_FIELDS = {
    **_FIELDS,
    "block": "sandwich",
    "activation": activation("hidden_activation", "gelu_pytorch_tanh"),
    "kinds": _second_kinds,
    "query_scale": _query_scale,
    "attention_softcap": _softcap("attn_logit_softcapping"),
    "logit_softcap": _softcap("final_logit_softcapping"),
}
#: Gemma 2: norms around attention and MLP, soft caps, a window in every second layer.
GEMMA2 = Family(
    "gemma2",
    _SECOND_FIELDS,
    _SANDWICH_ROWS,
    absent={
        **_ABSENT,
        "num_key_value_heads": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)


def _third_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    """Every sixth layer looks at all tokens; the others have a window and a base of their own."""
    every = settings("sliding_window_pattern", SIZE, 6)
    layers = range(layer_count(settings))
    usual = [FULL if (i + 1) % every == 0 else SLIDING for i in layers]
    types = layer_types(settings, usual)
    size = settings("head_dim", SIZE)
    everywhere = rope(settings, size, layers=FULL, theta=1000000.0)
    near = rope(
        settings,
        size,
        layers=SLIDING,
        theta_key="rope_local_base_freq",
        scaled=False,
    )
    window = settings("sliding_window", SIZE, 4096)
    return kinds(types, LayerKind(None, everywhere), LayerKind(window, near))


#: Gemma 3, text only: norms of queries and keys, a base of their own for layers with a window.
GEMMA3_TEXT = Family(
    "gemma3_text",
    {
        **_SECOND_FIELDS,
        "kinds": _third_kinds,
        "qk_norm": "head",
        "qk_norm_kind": _norm,
    },
    _SANDWICH_ROWS,
    absent={
        **_ABSENT,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    },
)
