"""GPT-2, GPT-J, GPT-NeoX and Phi-2."""

from sqjax.models.checkpoints.families.common import (
    SIZES,
    activation,
    even_head_dim,
    layer_norm,
    max_length,
    rope,
)
from sqjax.models.checkpoints.families.llama import (
    ATTENTION_ROWS,
    LLAMA_FIELDS,
    OUTER_ROWS,
    norm_rows,
    rope_everywhere,
)
from sqjax.models.checkpoints.families.paths import (
    DOWN_PROJ,
    FIRST_NORM,
    NO_ROPE,
    O_PROJ,
    OUR_LAYER,
    QKV,
    SECOND_NORM,
    UP_PROJ,
    denses,
)
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.names import (
    BY_KEY_HEAD,
    COLUMNS_ONE_AFTER_ANOTHER,
    conv1d,
    dense,
    norm,
    several,
    tensor,
)
from sqjax.models.checkpoints.settings import Settings, read
from sqjax.models.config import LayerKind
from sqjax.models.fields import FLAG, POSITIVE, SIZE
from sqjax.models.rope import Rope

#: A layer, in the names of most of these families.
_H = "h.{layer}"

# GPT-2 and GPT-J ----------------------------------------------------------------------------------


def _inner(settings: Settings) -> int:
    return settings("n_inner", SIZE, 4 * settings("n_embd", SIZE))


#: What GPT-2 and GPT-J share.
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
#: GPT-2: learned positions; kernels stored as (in, out).
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
        *norm(f"{_H}.ln_1", FIRST_NORM),
        *norm(f"{_H}.ln_2", SECOND_NORM),
        *several(f"{_H}.attn.c_attn", QKV, COLUMNS_ONE_AFTER_ANOTHER),
        *conv1d(f"{_H}.attn.c_proj", O_PROJ),
        *conv1d(f"{_H}.mlp.c_fc", UP_PROJ),
        *conv1d(f"{_H}.mlp.c_proj", DOWN_PROJ),
    ),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    absent={"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12},
    neutral={
        "scale_attn_weights": (None, True),
        "scale_attn_by_inverse_layer_idx": (None, False),
        "add_cross_attention": (None, False),
    },
    usual_ends=(50256,),
)


def _gptj_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    size = settings("rotary_dim", SIZE, None)
    return (LayerKind(None, Rope(size=size, interleaved=True)),)


#: GPT-J: attention and MLP read one norm, and are added together.
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
        *norm(f"{_H}.ln_1", FIRST_NORM),
        *denses(
            f"{_H}.attn",
            {
                "q_proj": QKV[0],
                "k_proj": QKV[1],
                "v_proj": QKV[2],
                "out_proj": O_PROJ,
            },
        ),
        *denses(f"{_H}.mlp", {"fc_in": UP_PROJ, "fc_out": DOWN_PROJ}),
    ),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    absent={"rotary_dim": 64},
    usual_ends=(50256,),
)

# GPT-NeoX -----------------------------------------------------------------------------------------


def _neox_block(settings: Settings) -> str:
    parallel = settings("use_parallel_residual", FLAG, True)
    return "parallel_two" if parallel else "pre"


def _neox_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    size = even_head_dim(settings, "hidden_size")
    # Newer files say rope_theta, some say both: then the older name holds.
    theta = float(settings("rope_theta", POSITIVE, 10000))
    # Newer files say partial_rotary_factor, some say both.
    part = settings("partial_rotary_factor", POSITIVE, 0.25)
    turning = rope(
        settings,
        size,
        theta=theta,
        theta_key="rotary_emb_base",
        part=part,
        part_key="rotary_pct",
    )
    return (LayerKind(None, turning),)


_NEOX_LAYER = "layers.{layer}"
#: GPT-NeoX and Pythia: as GPT-J, with two norms.
GPT_NEOX = Family(
    "gpt_neox",
    {
        **SIZES,
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
        *norm(f"{_NEOX_LAYER}.input_layernorm", FIRST_NORM),
        *norm(f"{_NEOX_LAYER}.post_attention_layernorm", SECOND_NORM),
        *several(f"{_NEOX_LAYER}.attention.query_key_value", QKV, BY_KEY_HEAD),
        *denses(
            _NEOX_LAYER,
            {
                "attention.dense": O_PROJ,
                "mlp.dense_h_to_4h": UP_PROJ,
                "mlp.dense_4h_to_h": DOWN_PROJ,
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

# Phi-2 --------------------------------------------------------------------------------------------


def _phi_qk_norm(settings: Settings) -> str | None:
    return "head" if settings("qk_layernorm", FLAG, False) else None


_PHI_LAYER = "layers.{layer}"
#: Phi-1, 1.5 and 2: as GPT-J, with biases everywhere.
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
        *denses(
            _PHI_LAYER,
            {
                "self_attn.dense": O_PROJ,
                "mlp.fc1": UP_PROJ,
                "mlp.fc2": DOWN_PROJ,
            },
        ),
    ),
)
