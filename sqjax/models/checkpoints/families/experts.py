"""Families with mixtures of experts: Mixtral, Qwen's, OLMoE, DeepSeek-V2."""

import math

from sqjax.models.checkpoints.families.common import layer_count, rms_norm, rope
from sqjax.models.checkpoints.families.llama import (
    EXPERT_ROWS,
    LLAMA_FIELDS,
    LLAMA_ROWS,
    OUR_LAYER,
    QWEN2,
    QWEN3,
    THEIR_LAYER,
    norm_rows,
    rope_everywhere,
    rope_in_a_window,
)
from sqjax.models.checkpoints.families.paths import denses
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.names import TRANSPOSED, dense, tensor
from sqjax.models.checkpoints.settings import Settings, read
from sqjax.models.config import Experts, LatentAttention, LayerKind
from sqjax.models.fields import (
    COUNT,
    EPSILON,
    FLAG,
    POSITIVE,
    SIZE,
    WHOLE_NUMBERS,
    one_of,
)

#: The kernels of an expert, by the names of the paper's code.
_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
#: Mixtral: experts in every layer.
MIXTRAL = Family(
    "mixtral",
    {
        **LLAMA_FIELDS,
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "norm": lambda settings: rms_norm(settings, 1e-5),
        "kinds": rope_in_a_window,
        "experts": lambda settings: Experts(
            settings("num_local_experts", SIZE, 8),
            settings("num_experts_per_tok", SIZE, 2),
            settings("intermediate_size", SIZE),
        ),
    },
    (
        *LLAMA_ROWS,
        *dense(
            f"{THEIR_LAYER}.block_sparse_moe.gate", f"{OUR_LAYER}/mlp/router"
        ),
        *(
            row
            for theirs, ours in _MIXTRAL_PARTS.items()
            for row in tensor(
                f"{THEIR_LAYER}.block_sparse_moe.experts.{{entry}}.{theirs}.weight",
                f"{OUR_LAYER}/mlp/experts/{ours}/kernel",
                TRANSPOSED,
            )
        ),
    ),
    absent={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
    },
)


def rope_without_windows(settings: Settings) -> tuple[LayerKind, ...]:
    """As Llama's layers. Versions of transformers differ in which layers have a window."""
    if settings("use_sliding_window", FLAG, False):
        settings.refuse(
            "use_sliding_window = True: not supported for this family; expected False"
        )
    settings.skip("sliding_window")
    return rope_everywhere(settings)


#: The router of all families here but Mixtral.
_ROUTER_ROWS = dense(f"{THEIR_LAYER}.mlp.gate", f"{OUR_LAYER}/mlp/router")


#: The MLP that sees every token.
_SHARED = {
    part: f"{OUR_LAYER}/mlp/shared_expert/{part}"
    for part in ("gate_proj", "up_proj", "down_proj")
}


def _dense_layers(settings: Settings) -> tuple[int, ...]:
    """The layers without experts: those that the file names, and all but every so many."""
    step = settings("decoder_sparse_step", SIZE, 1)
    named = settings("mlp_only_layers", WHOLE_NUMBERS, [])
    layers = range(layer_count(settings))
    return tuple(i for i in layers if i in named or (i + 1) % step)


def _qwen_experts(settings: Settings, **shared) -> Experts:
    # Newer files say num_local_experts.
    count = settings("num_experts", SIZE)
    return Experts(
        settings("num_local_experts", SIZE, count),
        settings("num_experts_per_tok", SIZE),
        settings("moe_intermediate_size", SIZE),
        normalized=settings("norm_topk_prob", FLAG, False),
        dense_layers=_dense_layers(settings),
        **shared,
    )


#: Qwen1.5-MoE, Qwen2-57B-A14B: one expert, behind a gate, sees every token.
QWEN2_MOE = Family(
    "qwen2_moe",
    {
        **QWEN2.fields,
        "kinds": rope_without_windows,
        "attention_bias": read("qkv_bias", FLAG, True),
        "experts": lambda settings: _qwen_experts(
            settings,
            shared_size=settings("shared_expert_intermediate_size", SIZE),
            shared_gate=True,
        ),
    },
    (
        *LLAMA_ROWS,
        *_ROUTER_ROWS,
        *EXPERT_ROWS,
        *denses(f"{THEIR_LAYER}.mlp.shared_expert", _SHARED),
        *dense(
            f"{THEIR_LAYER}.mlp.shared_expert_gate",
            f"{OUR_LAYER}/mlp/shared_expert_gate",
        ),
    ),
    absent={
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
)
#: Qwen3-30B-A3B and its like.
QWEN3_MOE = Family(
    "qwen3_moe",
    {
        **QWEN3.fields,
        "kinds": rope_without_windows,
        "experts": _qwen_experts,
    },
    (*LLAMA_ROWS, *_ROUTER_ROWS, *EXPERT_ROWS),
    absent={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
)
#: OLMoE: norms over all queries and all keys.
OLMOE = Family(
    "olmoe",
    {
        **LLAMA_FIELDS,
        "mlp_bias": False,
        "norm": lambda settings: rms_norm(settings, 1e-5),
        "qk_norm": "all",
        "qk_norm_kind": lambda settings: rms_norm(settings, 1e-5),
        "experts": lambda settings: Experts(
            settings("num_experts", SIZE, 64),
            settings("num_experts_per_tok", SIZE, 8),
            settings("intermediate_size", SIZE),
            normalized=settings("norm_topk_prob", FLAG, False),
        ),
    },
    (*LLAMA_ROWS, *_ROUTER_ROWS, *EXPERT_ROWS),
    absent={"max_position_embeddings": 4096},
    usual_ends=(50279,),
)


def _deepseek_experts(settings: Settings) -> Experts | None:
    """All layers but the first have experts, and the shared ones are one larger MLP."""
    count = settings("n_routed_experts", SIZE, None)
    if count is None:
        return None
    method = settings(
        "topk_method", one_of("greedy", "group_limited_greedy"), "greedy"
    )
    limited = method == "group_limited_greedy"
    inner = settings("moe_intermediate_size", SIZE, 1407)
    groups, kept = settings("n_group", SIZE, 1), settings("topk_group", SIZE, 1)
    shared = settings("n_shared_experts", SIZE, None)
    first = settings("first_k_dense_replace", COUNT, 0)
    first = min(first, layer_count(settings))
    return Experts(
        count,
        settings("num_experts_per_tok", SIZE),
        inner,
        normalized=False,
        scale=float(settings("routed_scaling_factor", POSITIVE, 1.0)),
        groups=groups if limited else 1,
        groups_kept=kept if limited else 1,
        shared_size=None if shared is None else shared * inner,
        dense_layers=tuple(range(first)),
    )


def _latent(settings: Settings) -> LatentAttention:
    return LatentAttention(
        settings("kv_lora_rank", SIZE, 512),
        settings("qk_nope_head_dim", SIZE, 128),
        settings("qk_rope_head_dim", SIZE, 64),
        settings("v_head_dim", SIZE, 128),
        settings("q_lora_rank", SIZE, None),
    )


def _scale(settings: Settings) -> float:
    """1 / sqrt(head_dim), with YaRN's growth of attention where the file states it."""
    scale = _latent_size(settings) ** -0.5
    for key in ("rope_scaling", "rope_parameters"):
        stated = settings.within(key)
        grown = stated("mscale_all_dim", EPSILON, 0)
        factor = stated("factor", POSITIVE, 1)
        if grown and factor > 1:
            growth = 0.1 * grown * math.log(factor) + 1
            return scale * growth**2
    return scale


def _latent_size(settings: Settings) -> int:
    latent = _latent(settings)
    return latent.plain_size + latent.rotary_size


def _deepseek_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    turning = rope(settings, _latent(settings).rotary_size, interleaved=True)
    return (LayerKind(None, turning),)


#: What makes queries, keys and values of short vectors, and these.
_LATENT_DENSE = {
    "q_a_proj": f"{OUR_LAYER}/self_attn/q_a_proj",
    "q_b_proj": f"{OUR_LAYER}/self_attn/q_b_proj",
    "kv_a_proj_with_mqa": f"{OUR_LAYER}/self_attn/kv_a_proj",
    "kv_b_proj": f"{OUR_LAYER}/self_attn/kv_b_proj",
}
#: DeepSeek-V2 and V2-Lite: keys and values from a short vector; the first layers without experts.
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    {
        **LLAMA_FIELDS,
        "num_kv_heads": read("num_attention_heads", SIZE),
        "head_dim": _latent_size,
        "kinds": _deepseek_kinds,
        "latent": _latent,
        "query_scale": _scale,
        "mlp_bias": False,
        "experts": _deepseek_experts,
    },
    (
        *LLAMA_ROWS,
        *_ROUTER_ROWS,
        *EXPERT_ROWS,
        *denses(f"{THEIR_LAYER}.mlp.shared_experts", _SHARED),
        *denses(f"{THEIR_LAYER}.self_attn", _LATENT_DENSE),
        *norm_rows("self_attn/q_a_layernorm", "self_attn/kv_a_layernorm"),
    ),
    absent={
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "q_lora_rank": 1536,
    },
)
