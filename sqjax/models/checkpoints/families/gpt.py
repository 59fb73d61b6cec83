"""The families before Llama: GPT-2, GPT-J, GPT-NeoX, OPT, BLOOM, Falcon, Phi-2."""

from collections.abc import Mapping

from sqjax.models.checkpoints.families.common import (
    activation,
    even_head_dim,
    layer_norm,
    max_length,
    rope,
)
from sqjax.models.checkpoints.families.llama import (
    ATTENTION_ROWS,
    LLAMA_FIELDS,
    OUR_LAYER,
    OUTER_ROWS,
    norm_rows,
    rope_everywhere,
)
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.names import (
    BY_KEY_HEAD,
    COLUMNS_ONE_AFTER_ANOTHER,
    Row,
    conv1d,
    dense,
    norm,
    several,
    tensor,
)
from sqjax.models.checkpoints.settings import Settings, read
from sqjax.models.config import LayerKind
from sqjax.models.fields import FLAG, POSITIVE, SIZE

_H = "h.{layer}"
_QKV = [f"{OUR_LAYER}/self_attn/{part}_proj" for part in "qkv"]
_O = f"{OUR_LAYER}/self_attn/o_proj"
_UP, _DOWN = f"{OUR_LAYER}/mlp/up_proj", f"{OUR_LAYER}/mlp/down_proj"
_FIRST_NORM = f"{OUR_LAYER}/input_layernorm"
_SECOND_NORM = f"{OUR_LAYER}/post_attention_layernorm"
_OUTPUT_NORM = f"{OUR_LAYER}/post_feedforward_layernorm"

NO_ROPE = (LayerKind(None, None),)


def _denses(layer: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of a layer's Dense layers, {their name in the layer: our path}."""
    rows: list[Row] = []
    for theirs, ours in names.items():
        rows += dense(f"{layer}.{theirs}", ours)
    return tuple(rows)


# GPT-2 and GPT-J ----------------------------------------------------------------------------------


def _inner(settings: Settings) -> int:
    return settings("n_inner", SIZE, 4 * settings("n_embd", SIZE))


_GPT_FIELDS = {
    "vocab_size": read("vocab_size", SIZE),
    "hidden_size": read("n_embd", SIZE),
    "intermediate_size": _inner,
    "num_layers": read("n_layer", SIZE),
    "num_heads": read("n_head", SIZE),
    "num_kv_heads": read("n_head", SIZE),
    "head_dim": lambda settings: even_head_dim(settings, "n_embd", "n_head"),
    "tie_embeddings": read("tie_word_embeddings", FLAG, True),
    "mlp_bias": True,
    "norm": lambda settings: layer_norm(settings, "layer_norm_epsilon"),
    "gated_mlp": False,
    "activation": activation("activation_function", "gelu_new"),
}
GPT2 = Family(
    "gpt2",
    {
        **_GPT_FIELDS,
        "attention_bias": True,
        "output_bias": True,
        "max_length": read("n_positions", SIZE, 1024),
        "kinds": NO_ROPE,
        "learned_positions": True,
    },
    (
        *tensor("wte.weight", "model/embed_tokens/embedding"),
        *tensor("wpe.weight", "model/embed_positions/embedding"),
        *norm("ln_f", "model/norm"),
        *dense("lm_head", "lm_head"),
        *norm(f"{_H}.ln_1", _FIRST_NORM),
        *norm(f"{_H}.ln_2", _SECOND_NORM),
        *several(f"{_H}.attn.c_attn", _QKV, COLUMNS_ONE_AFTER_ANOTHER),
        *conv1d(f"{_H}.attn.c_proj", _O),
        *conv1d(f"{_H}.mlp.c_fc", _UP),
        *conv1d(f"{_H}.mlp.c_proj", _DOWN),
    ),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    absent={"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12},
    neutral={
        "scale_attn_weights": (None, True),
        "scale_attn_by_inverse_layer_idx": (None, False),
        "add_cross_attention": (None, False),
    },
)


def _gptj_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    size = even_head_dim(settings, "n_embd", "n_head")
    turning = settings("rotary_dim", SIZE, 64)
    return (
        LayerKind(
            None, rope(settings, size, part=turning / size, interleaved=True)
        ),
    )


GPTJ = Family(
    "gptj",
    {
        **_GPT_FIELDS,
        "tie_embeddings": read("tie_word_embeddings", FLAG, False),
        "head_bias": True,
        "max_length": read("n_positions", SIZE, 2048),
        "block": "parallel",
        "kinds": _gptj_kinds,
    },
    (
        *tensor("wte.weight", "model/embed_tokens/embedding"),
        *norm("ln_f", "model/norm"),
        *dense("lm_head", "lm_head"),
        *norm(f"{_H}.ln_1", _FIRST_NORM),
        *_denses(
            f"{_H}.attn",
            {
                "q_proj": _QKV[0],
                "k_proj": _QKV[1],
                "v_proj": _QKV[2],
                "out_proj": _O,
            },
        ),
        *_denses(f"{_H}.mlp", {"fc_in": _UP, "fc_out": _DOWN}),
    ),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)

# GPT-NeoX -----------------------------------------------------------------------------------------


def _neox_block(settings: Settings) -> str:
    parallel = settings("use_parallel_residual", FLAG, True)
    return "parallel_two" if parallel else "pre"


def _neox_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    size = even_head_dim(settings, "hidden_size")
    theta = settings("rotary_emb_base", POSITIVE, 10000)
    # Newer files say partial_rotary_factor, some say both.
    part = settings("partial_rotary_factor", POSITIVE, 0.25)
    turning = rope(
        settings, size, theta=theta, part=part, part_key="rotary_pct"
    )
    return (LayerKind(None, turning),)


_SIZES = {
    "vocab_size": read("vocab_size", SIZE),
    "hidden_size": read("hidden_size", SIZE),
    "num_layers": read("num_hidden_layers", SIZE),
    "num_heads": read("num_attention_heads", SIZE),
    "num_kv_heads": read("num_attention_heads", SIZE),
    "head_dim": lambda settings: even_head_dim(settings, "hidden_size"),
}
_NEOX_LAYER = "layers.{layer}"
GPT_NEOX = Family(
    "gpt_neox",
    {
        **_SIZES,
        "intermediate_size": read("intermediate_size", SIZE),
        "tie_embeddings": read("tie_word_embeddings", FLAG, False),
        "attention_bias": read("attention_bias", FLAG, True),
        "output_bias": read("attention_bias", FLAG, True),
        "mlp_bias": True,
        "max_length": max_length,
        "norm": layer_norm,
        "block": _neox_block,
        "kinds": _neox_kinds,
        "gated_mlp": False,
        "activation": activation("hidden_act", "gelu"),
    },
    (
        *tensor("embed_in.weight", "model/embed_tokens/embedding"),
        *norm("final_layer_norm", "model/norm"),
        *dense("embed_out", "lm_head"),
        *norm(f"{_NEOX_LAYER}.input_layernorm", _FIRST_NORM),
        *norm(f"{_NEOX_LAYER}.post_attention_layernorm", _SECOND_NORM),
        *several(f"{_NEOX_LAYER}.attention.query_key_value", _QKV, BY_KEY_HEAD),
        *_denses(
            _NEOX_LAYER,
            {
                "attention.dense": _O,
                "mlp.dense_h_to_4h": _UP,
                "mlp.dense_4h_to_h": _DOWN,
            },
        ),
    ),
    prefix="gpt_neox.",
    ignored=(
        ".attention.bias",
        ".attention.masked_bias",
        ".attention.rotary_emb.inv_freq",
    ),
)

# OPT ----------------------------------------------------------------------------------------------


def _opt_is_pre(settings: Settings) -> bool:
    return settings("do_layer_norm_before", FLAG, True)


def _opt_has_final_norm(settings: Settings) -> bool:
    removed = settings("_remove_final_layer_norm", FLAG, False)
    return _opt_is_pre(settings) and not removed


def _opt_embedding(settings: Settings) -> int | None:
    hidden = settings("hidden_size", SIZE)
    width = settings("word_embed_proj_dim", SIZE, hidden)
    return None if width == hidden else width


_OPT_LAYER = "decoder.layers.{layer}"


_OPT_FIELDS = {
    **_SIZES,
    "intermediate_size": read("ffn_dim", SIZE),
    "tie_embeddings": read("tie_word_embeddings", FLAG, True),
    "attention_bias": read("enable_bias", FLAG, True),
    "output_bias": read("enable_bias", FLAG, True),
    "mlp_bias": read("enable_bias", FLAG, True),
    "max_length": read("max_position_embeddings", SIZE, 2048),
    "norm": lambda settings: layer_norm(settings, "layer_norm_eps"),
    "final_norm": _opt_has_final_norm,
    "block": lambda settings: "pre" if _opt_is_pre(settings) else "sum",
    "kinds": NO_ROPE,
    "learned_positions": True,
    "position_offset": 2,
    "gated_mlp": False,
    "activation": activation("activation_function", "relu"),
    "embedding_size": _opt_embedding,
}
_OPT_ROWS = (
    *tensor("decoder.embed_tokens.weight", "model/embed_tokens/embedding"),
    *tensor(
        "decoder.embed_positions.weight", "model/embed_positions/embedding"
    ),
    *dense("decoder.project_in", "model/project_in"),
    *dense("decoder.project_out", "model/project_out"),
    *norm("decoder.final_layer_norm", "model/norm"),
    *dense("lm_head", "lm_head"),
    *_denses(
        _OPT_LAYER,
        {
            "self_attn.q_proj": _QKV[0],
            "self_attn.k_proj": _QKV[1],
            "self_attn.v_proj": _QKV[2],
            "self_attn.out_proj": _O,
            "fc1": _UP,
            "fc2": _DOWN,
        },
    ),
)
OPT = Family(
    "opt",
    _OPT_FIELDS,
    (
        *_OPT_ROWS,
        # In OPT-350m norms follow the sums: the second row of each holds there, or the first.
        *norm(f"{_OPT_LAYER}.self_attn_layer_norm", _FIRST_NORM),
        *norm(f"{_OPT_LAYER}.self_attn_layer_norm", _SECOND_NORM),
        *norm(f"{_OPT_LAYER}.final_layer_norm", _OUTPUT_NORM),
        *norm(f"{_OPT_LAYER}.final_layer_norm", _SECOND_NORM),
    ),
    neutral={"layer_norm_elementwise_affine": (None, True)},
)

# BLOOM --------------------------------------------------------------------------------------------


def _bloom_size(settings: Settings) -> int:
    # Older files say n_embed.
    return settings("hidden_size", SIZE, settings("n_embed", SIZE, 64))


def _bloom_heads(settings: Settings) -> int:
    other = settings("num_attention_heads", SIZE, 8)
    return settings("n_head", SIZE, other)


def _bloom_head_dim(settings: Settings) -> int:
    size, heads = _bloom_size(settings), _bloom_heads(settings)
    if size % heads:
        settings.refuse(
            f"n_head: expected a divisor of the hidden size {size}, got {heads}"
        )
    return size // heads


BLOOM = Family(
    "bloom",
    {
        "vocab_size": read("vocab_size", SIZE),
        "hidden_size": _bloom_size,
        "intermediate_size": lambda settings: 4 * _bloom_size(settings),
        "num_layers": lambda settings: settings(
            "n_layer", SIZE, settings("num_hidden_layers", SIZE, 2)
        ),
        "num_heads": _bloom_heads,
        "num_kv_heads": _bloom_heads,
        "head_dim": _bloom_head_dim,
        "tie_embeddings": read("tie_word_embeddings", FLAG, True),
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        # ALiBi has no table to run out of; it was trained on so many tokens.
        "max_length": read("seq_length", SIZE, 2048),
        "norm": lambda settings: layer_norm(settings, "layer_norm_epsilon"),
        "kinds": NO_ROPE,
        "alibi": 1.0,
        "gated_mlp": False,
        "activation": "gelu_tanh",
        "embedding_norm": True,
    },
    (
        *tensor("word_embeddings.weight", "model/embed_tokens/embedding"),
        *norm("word_embeddings_layernorm", "model/embed_layernorm"),
        *norm("ln_f", "model/norm"),
        *dense("lm_head", "lm_head"),
        *norm(f"{_H}.input_layernorm", _FIRST_NORM),
        *norm(f"{_H}.post_attention_layernorm", _SECOND_NORM),
        *several(f"{_H}.self_attention.query_key_value", _QKV, BY_KEY_HEAD),
        *_denses(
            _H,
            {
                "self_attention.dense": _O,
                "mlp.dense_h_to_4h": _UP,
                "mlp.dense_4h_to_h": _DOWN,
            },
        ),
    ),
    prefix="transformer.",
    neutral={"apply_residual_connection_post_layernorm": (None, False)},
)

# Falcon -------------------------------------------------------------------------------------------


def _falcon_is_new(settings: Settings) -> bool:
    return settings("new_decoder_architecture", FLAG, False)


def _falcon_kv_heads(settings: Settings) -> int:
    heads = settings("num_attention_heads", SIZE)
    stated = settings("num_kv_heads", SIZE, heads)
    if _falcon_is_new(settings):
        return stated
    return 1 if settings("multi_query", FLAG, True) else heads


def _falcon_block(settings: Settings) -> str:
    is_new = _falcon_is_new(settings)
    parallel = settings("parallel_attn", FLAG, True)
    norms = settings("num_ln_in_parallel_attn", SIZE, 2 if is_new else 1)
    if not is_new and not parallel:
        return "pre"
    return "parallel_two" if is_new and norms == 2 else "parallel"


def _falcon_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    if settings("alibi", FLAG, False):
        return NO_ROPE
    size = even_head_dim(settings, "hidden_size")
    return (LayerKind(None, rope(settings, size)),)


def _falcon_alibi(settings: Settings) -> float | None:
    """Falcon divides its slopes by sqrt(head_dim), as it does the scores."""
    size = even_head_dim(settings, "hidden_size")
    return size**-0.5 if settings("alibi", FLAG, False) else None


def _falcon_inner(settings: Settings) -> int:
    usual = 4 * settings("hidden_size", SIZE)
    return settings("ffn_hidden_size", SIZE, usual)


FALCON = Family(
    "falcon",
    {
        **_SIZES,
        "num_kv_heads": _falcon_kv_heads,
        "intermediate_size": _falcon_inner,
        "tie_embeddings": read("tie_word_embeddings", FLAG, True),
        "attention_bias": read("bias", FLAG, False),
        "output_bias": read("bias", FLAG, False),
        "mlp_bias": read("bias", FLAG, False),
        "max_length": max_length,
        "norm": lambda settings: layer_norm(settings, "layer_norm_epsilon"),
        "block": _falcon_block,
        "kinds": _falcon_kinds,
        "alibi": _falcon_alibi,
        "gated_mlp": False,
        "activation": activation("activation", "gelu"),
    },
    (
        *tensor("word_embeddings.weight", "model/embed_tokens/embedding"),
        *norm("ln_f", "model/norm"),
        *dense("lm_head", "lm_head"),
        *norm(f"{_H}.input_layernorm", _FIRST_NORM),
        *norm(f"{_H}.ln_attn", _FIRST_NORM),
        *norm(f"{_H}.ln_mlp", _SECOND_NORM),
        *norm(f"{_H}.post_attention_layernorm", _SECOND_NORM),
        *several(f"{_H}.self_attention.query_key_value", _QKV, BY_KEY_HEAD),
        *_denses(
            _H,
            {
                "self_attention.dense": _O,
                "mlp.dense_h_to_4h": _UP,
                "mlp.dense_4h_to_h": _DOWN,
            },
        ),
    ),
    prefix="transformer.",
)

# Phi-2 --------------------------------------------------------------------------------------------


def _phi_qk_norm(settings: Settings) -> str | None:
    return "head" if settings("qk_layernorm", FLAG, False) else None


_PHI_LAYER = "layers.{layer}"
PHI = Family(
    "phi",
    {
        **LLAMA_FIELDS,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "norm": layer_norm,
        "block": "parallel",
        "kinds": lambda settings: rope_everywhere(settings, part=0.5),
        "qk_norm": _phi_qk_norm,
        "qk_norm_kind": layer_norm,
        "gated_mlp": False,
        "activation": activation("hidden_act", "gelu_new"),
    },
    (
        *OUTER_ROWS,
        *norm("final_layernorm", "model/norm"),
        *ATTENTION_ROWS,
        *norm_rows("input_layernorm"),
        *norm(
            f"{_PHI_LAYER}.self_attn.q_layernorm",
            f"{OUR_LAYER}/self_attn/q_norm",
        ),
        *norm(
            f"{_PHI_LAYER}.self_attn.k_layernorm",
            f"{OUR_LAYER}/self_attn/k_norm",
        ),
        *_denses(
            _PHI_LAYER,
            {"self_attn.dense": _O, "mlp.fc1": _UP, "mlp.fc2": _DOWN},
        ),
    ),
)
