"""The architectures of GGUF files, as data: what llama.cpp's converter says, and what it changes.

A GGUF file holds a model of one of `families`, with other words for keys and tensors. Each table
here translates them: keys into those of config.json, which the family's fields then read, and
tensors into leaves.

What the converter changes in the tensors, and the layouts of the rows undo:

- of Llama and its like, the rows of queries and keys: `PAIRS`;
- of Gemma, the gains of norms: it adds the 1 that the model adds: `ONE_ADDED`;
- the experts of a layer become one tensor: `STACKED`.

What it does not write: a head that is the embedding, which is then known by the missing tensor; and
what llama.cpp computes for all models of an architecture, which stands under `absent`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.models.checkpoints.families import experts, gemma, llama
from sqjax.models.checkpoints.families.common import (
    FULL,
    SLIDING,
    layer_count,
)
from sqjax.models.checkpoints.names import (
    TRANSPOSED,
    Layout,
    Row,
    Shape,
    dense,
    norm,
    several,
    tensor,
)
from sqjax.models.checkpoints.settings import Settings, read
from sqjax.models.config import DecoderConfig, LayerKind
from sqjax.models.fields import EPSILON, POSITIVE, SIZE, What

# Keys ---------------------------------------------------------------------------------------------

#: The keys of a file, without the architecture that they begin with -> those of config.json. A
#: family that does not read one refuses a file with it.
KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.scale": "attention_scale",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    # Which layers have a window: all but each n-th, or for each of them whether.
    "attention.sliding_window_pattern": "sliding_window_pattern",
    # What says again what others say; config.json has no such keys.
    "attention.value_length": "value_length",
    "rope.dimension_count": "rotary_channels",
    "vocab_size": "stated_vocab_size",
}
#: Keys that every file has, though families have defaults for them.
REQUIRED = {"max_position_embeddings": SIZE, "rms_norm_eps": EPSILON}
#: Keys that say again what another says, and must agree with it; and in words what that is.
AGAIN = {
    "value_length": ("head_dim", "the head size"),
    "stated_vocab_size": ("vocab_size", "the embedding's rows"),
}
_ALL_TURN = {**AGAIN, "rotary_channels": ("head_dim", "the head size")}
#: Keys of which 0 is the same as no key.
ZERO_IS_NONE = (
    "attention.scale",
    "attention.sliding_window",
    "expert_count",
    "expert_used_count",
)
#: Keys that change no logits, whatever they say.
IGNORED = ("pooling_type", "rope.scaling.finetuned", "tensor_data_layout")
#: Keys that nobody reads, with the value that changes nothing.
HARMLESS = {
    "attention.causal": True,
    "expert_gating_func": 1,  # softmax
    "expert_weights_scale": 1,
    "leading_dense_block_count": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}

TYPE, FACTOR = "rope.scaling.type", "rope.scaling.factor"
#: Tensors of factors by which frequencies are divided, one for each pair of channels: those of
#: "longrope"; and those of "llama3", of which the file says no more than what comes of them.
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
EVERY = "rope_freqs.weight"
FACTORS = (LONG, SHORT, EVERY)
_LENGTH = "rope.scaling.original_context_length"
_SCALING = {FACTOR: "factor", _LENGTH: "original_max_position_embeddings"}
#: The types of scaling: what config.json calls them; and their keys and tensors -> keys in the
#: rope_scaling of config.json. Under yarn_attn_factor the converter writes attention_factor: all
#: that cosines and sines are multiplied by.
SCALINGS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "none": ("default", _SCALING),
    "linear": ("linear", _SCALING),
    "yarn": (
        "yarn",
        {
            **_SCALING,
            "rope.scaling.yarn_attn_factor": "attention_factor",
            "rope.scaling.yarn_beta_fast": "beta_fast",
            "rope.scaling.yarn_beta_slow": "beta_slow",
        },
    ),
    "longrope": (
        "longrope",
        {
            _LENGTH: "original_max_position_embeddings",
            "rope.scaling.attn_factor": "attention_factor",
            LONG: "long_factor",
            SHORT: "short_factor",
        },
    ),
    "llama3": ("longrope", {EVERY: "short_factor"}),
}


# Layouts ------------------------------------------------------------------------------------------


def _halves(
    config: DecoderConfig, theirs: np.ndarray, shapes: Sequence[Shape]
) -> list:
    """The rows of queries or keys in the order of Hugging Face.

    Rotary embedding turns the rows of a head in pairs. llama.cpp stores a pair side by side,
    Hugging Face one of each pair in the first half of the head and the other in the second. For a
    head of 6 rows, [0, 3, 1, 4, 2, 5] becomes [0, 1, 2, 3, 4, 5].
    """
    rest = theirs.shape[1:]  # the input channels of a weight, nothing of a bias
    pairs = theirs.reshape(-1, config.head_dim // 2, 2, *rest)
    return [pairs.swapaxes(1, 2).reshape(theirs.shape).T]


def _pairs(config: DecoderConfig, ours: Sequence) -> jax.Array:
    rows = jnp.asarray(ours[0]).T
    halves = rows.reshape(-1, 2, config.head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


#: Queries or keys, whose rows that turn together stand side by side.
PAIRS = Layout(_halves, _pairs)
#: A gain to which the converter added 1.
ONE_ADDED = Layout(
    lambda config, theirs, shapes: [theirs - 1],
    lambda config, ours: ours[0] + 1,
)
#: The kernels of all experts, each as (out, in).
STACKED = Layout(
    lambda config, theirs, shapes: [theirs.swapaxes(1, 2)],
    lambda config, ours: jnp.asarray(ours[0]).swapaxes(1, 2),
)


# Tensors ------------------------------------------------------------------------------------------

_BLOCK, _LAYER = "blk.{layer}", "model/layers/{layer}"
_DENSE = {
    "attn_q": "self_attn/q_proj",
    "attn_k": "self_attn/k_proj",
    "attn_v": "self_attn/v_proj",
    "attn_output": "self_attn/o_proj",
    "ffn_gate": "mlp/gate_proj",
    "ffn_up": "mlp/up_proj",
    "ffn_down": "mlp/down_proj",
    "ffn_gate_inp": "mlp/router",
    "ffn_gate_shexp": "mlp/shared_expert/gate_proj",
    "ffn_up_shexp": "mlp/shared_expert/up_proj",
    "ffn_down_shexp": "mlp/shared_expert/down_proj",
    "ffn_gate_inp_shexp": "mlp/shared_expert_gate",
}
#: The end of the name of a matrix with one row, which the older converter writes as a vector.
ONE_ROW = "ffn_gate_inp_shexp.weight"
# The second row of a name serves models that have no leaf of the first.
_NORMS = (
    ("attn_norm", "input_layernorm"),
    ("attn_q_norm", "self_attn/q_norm"),
    ("attn_k_norm", "self_attn/k_norm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)


def _expert_rows() -> tuple[Row, ...]:
    """The experts of a layer: one tensor for all, or, in older files, one for each."""
    rows: list[Row] = []
    for part in ("gate", "up", "down"):
        ours = f"{_LAYER}/mlp/experts/{part}_proj/kernel"
        rows += tensor(f"{_BLOCK}.ffn_{part}_exps.weight", ours, STACKED)
        one = f"{_BLOCK}.ffn_{part}.{{entry}}.weight"
        rows += tensor(one, ours, TRANSPOSED)
    return tuple(rows)


#: The tensors of all architectures.
ROWS = (
    *tensor("token_embd.weight", "model/embed_tokens/embedding"),
    *norm("output_norm", "model/norm"),
    *dense("output", "lm_head"),
    *(
        row
        for theirs, ours in _DENSE.items()
        for row in dense(f"{_BLOCK}.{theirs}", f"{_LAYER}/{ours}")
    ),
    *(
        row
        for theirs, ours in _NORMS
        for row in norm(f"{_BLOCK}.{theirs}", f"{_LAYER}/{ours}")
    ),
    *_expert_rows(),
)


def _changed(layout: Layout, is_changed: Callable[[str], bool]) -> tuple:
    """All rows, some of them in another layout."""
    rows: list[Row] = []
    for row in ROWS:
        own = layout if is_changed(row.theirs) else row.layout
        rows.append(row._replace(layout=own))
    return tuple(rows)


def _turns(name: str) -> bool:
    return name.startswith((f"{_BLOCK}.attn_q.", f"{_BLOCK}.attn_k."))


_PAIRED_ROWS = _changed(PAIRS, _turns)
_GEMMA_ROWS = _changed(ONE_ADDED, lambda name: name.endswith("norm.weight"))
# Phi's matrices stay fused; the one that holds gate and up is called ffn_up.
_PHI_ROWS = (
    *several(
        f"{_BLOCK}.attn_qkv",
        [f"{_LAYER}/self_attn/{part}_proj" for part in "qkv"],
    ),
    *several(
        f"{_BLOCK}.ffn_up",
        [f"{_LAYER}/mlp/{part}_proj" for part in ("gate", "up")],
    ),
    *ROWS,
)


# Architectures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """How the files of one architecture are read.

    Attributes:
        fields: as `Family.fields`: they read what `keys` make of the file's keys.
        rows: which tensor fills which leaves.
        keys: the keys of this architecture, where they are not as in `KEYS`.
        absent: what a key of config.json means here, of which the files say nothing.
        required: keys of config.json that every file has.
        again: as `AGAIN`.
    """

    fields: Mapping[str, Any]
    rows: tuple[Row, ...] = ROWS
    keys: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, What] = field(default_factory=lambda: REQUIRED)
    again: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: _ALL_TURN
    )


def _gemma_scale(layers_of_27b: int):
    """The source of what q k^T is multiplied by, which files of Gemma do not say.

    It is the head's size to the power -1/2, but of the model with 27 billion parameters, which is
    known by its layers: there it is the hidden size divided by the heads.
    """

    def source(settings: Settings) -> float:
        usual = settings("head_dim", SIZE)
        if settings("num_hidden_layers", SIZE) == layers_of_27b:
            hidden = settings("hidden_size", SIZE)
            usual = hidden // settings("num_attention_heads", SIZE)
        return float(settings("attention_scale", POSITIVE, usual**-0.5))

    return source


def _every_second(settings: Settings) -> tuple[LayerKind, ...]:
    """Every second layer looks at all tokens, unless the file has another pattern."""
    every = settings("sliding_window_pattern", SIZE, 2)
    layers = range(layer_count(settings))
    usual = [FULL if (i + 1) % every == 0 else SLIDING for i in layers]
    window = settings("sliding_window", SIZE, 4096)
    return llama.rope_in_some_windows(settings, usual, window)


def _windows_if_any(settings: Settings) -> tuple[LayerKind, ...]:
    """As Gemma 3's, but a file without a window is one of a model without windows."""
    if settings("sliding_window", SIZE, None) is None:
        settings.skip("rope_local_base_freq")
        return llama.rope_everywhere(settings)
    return gemma.GEMMA3_TEXT.fields["kinds"](settings)


def _phi_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    """Some of a head's channels turn, in a window if the file has one."""
    size = settings("head_dim", SIZE)
    turning = settings("rotary_channels", SIZE, size)
    part = 1.0
    if turning != size:
        # Half a channel more, because the part times the size is rounded down.
        part = (turning + 0.5) / size
    return llama.rope_in_a_window(settings, part=part)


_SCALE = {"query_scale": read("attention_scale", POSITIVE, None)}
# Of Qwen's windows the converter says nothing, and llama.cpp has none.
_NO_WINDOW = {"kinds": llama.rope_everywhere}

#: {general.architecture: how its files are read}.
ARCHITECTURES: Mapping[str, Architecture] = {
    # Mistral's fields are Llama's, and a window.
    "llama": Architecture(
        {**llama.MISTRAL.fields, **_SCALE},
        _PAIRED_ROWS,
    ),
    "qwen2": Architecture({**llama.QWEN2.fields, **_NO_WINDOW}),
    "qwen3": Architecture({**llama.QWEN3.fields, **_NO_WINDOW}),
    "qwen2moe": Architecture({**experts.QWEN2_MOE.fields, **_NO_WINDOW}),
    "qwen3moe": Architecture(
        {**experts.QWEN3_MOE.fields, **_NO_WINDOW},
        absent={"norm_topk_prob": True},
    ),
    "gemma": Architecture(gemma.GEMMA.fields, _GEMMA_ROWS),
    "gemma2": Architecture(
        {
            **gemma.GEMMA2.fields,
            "query_scale": _gemma_scale(46),
            "kinds": _every_second,
        },
        _GEMMA_ROWS,
    ),
    "gemma3": Architecture(
        {
            **gemma.GEMMA3_TEXT.fields,
            "query_scale": _gemma_scale(62),
            "kinds": _windows_if_any,
        },
        _GEMMA_ROWS,
    ),
    "phi3": Architecture(
        {**llama.PHI3.fields, "kinds": _phi_kinds},
        _PHI_ROWS,
        again=AGAIN,
    ),
}
#: The same for files with experts, where those are of another family than the files without.
MIXTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        {**experts.MIXTRAL.fields, **_SCALE},
        _PAIRED_ROWS,
        {"expert_count": "num_local_experts"},
        required={**REQUIRED, "num_experts_per_tok": SIZE},
    ),
}
