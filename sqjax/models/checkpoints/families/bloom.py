"""OPT, BLOOM and Falcon: no rotary embedding, or a choice."""

from sqjax.models.checkpoints.families.common import (
    SIZES,
    activation,
    even_head_dim,
    layer_norm,
    max_length,
    rope,
)
from sqjax.models.checkpoints.families.paths import (
    DOWN_PROJ,
    FIRST_NORM,
    NO_ROPE,
    O_PROJ,
    OUTPUT_NORM,
    QKV,
    SECOND_NORM,
    UP_PROJ,
    denses,
)
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.names import (
    BY_KEY_HEAD,
    dense,
    norm,
    several,
    tensor,
)
from sqjax.models.checkpoints.settings import Settings, read
from sqjax.models.config import LayerKind
from sqjax.models.fields import FLAG, SIZE

#: A layer, in the names of most of these families.
_H = "h.{layer}"

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
    **SIZES,
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
    *denses(
        _OPT_LAYER,
        {
            "self_attn.q_proj": QKV[0],
            "self_attn.k_proj": QKV[1],
            "self_attn.v_proj": QKV[2],
            "self_attn.out_proj": O_PROJ,
            "fc1": UP_PROJ,
            "fc2": DOWN_PROJ,
        },
    ),
)
#: OPT: learned positions, ReLU; 350m puts norms after the sums and has a smaller embedding.
OPT = Family(
    "opt",
    _OPT_FIELDS,
    (
        *_OPT_ROWS,
        # In OPT-350m norms follow the sums: the second row of each holds there, or the first.
        *norm(f"{_OPT_LAYER}.self_attn_layer_norm", FIRST_NORM),
        *norm(f"{_OPT_LAYER}.self_attn_layer_norm", SECOND_NORM),
        *norm(f"{_OPT_LAYER}.final_layer_norm", OUTPUT_NORM),
        *norm(f"{_OPT_LAYER}.final_layer_norm", SECOND_NORM),
    ),
    neutral={"layer_norm_elementwise_affine": (None, True)},
)

# BLOOM --------------------------------------------------------------------------------------------


def _bloom_size(settings: Settings) -> int:
    # Older files say n_embed, which holds where both are there.
    return settings("n_embed", SIZE, settings("hidden_size", SIZE, 64))


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


#: BLOOM: ALiBi; a norm follows the embedding.
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
        *norm(f"{_H}.input_layernorm", FIRST_NORM),
        *norm(f"{_H}.post_attention_layernorm", SECOND_NORM),
        *several(f"{_H}.self_attention.query_key_value", QKV, BY_KEY_HEAD),
        *denses(
            _H,
            {
                "self_attention.dense": O_PROJ,
                "mlp.dense_h_to_4h": UP_PROJ,
                "mlp.dense_4h_to_h": DOWN_PROJ,
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


#: Falcon 7B, 40B, 11B and RW: three generations of blocks under one name.
FALCON = Family(
    "falcon",
    {
        **SIZES,
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
        *norm(f"{_H}.input_layernorm", FIRST_NORM),
        *norm(f"{_H}.ln_attn", FIRST_NORM),
        *norm(f"{_H}.ln_mlp", SECOND_NORM),
        *norm(f"{_H}.post_attention_layernorm", SECOND_NORM),
        *several(f"{_H}.self_attention.query_key_value", QKV, BY_KEY_HEAD),
        *denses(
            _H,
            {
                "self_attention.dense": O_PROJ,
                "mlp.dense_h_to_4h": UP_PROJ,
                "mlp.dense_4h_to_h": DOWN_PROJ,
            },
        ),
    ),
    prefix="transformer.",
    usual_ends=(11,),
)
