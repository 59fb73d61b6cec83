"""Llama and the families that differ from it in a few fields: Mistral, Qwen, Granite and others."""

from collections.abc import Sequence

from sqjax.models.checkpoints.families.common import (
    FULL,
    SLIDING,
    activation,
    even_head_dim,
    head_dim,
    kinds,
    layer_count,
    layer_norm,
    layer_types,
    max_length,
    rms_norm,
    rope,
)
from sqjax.models.checkpoints.families.paths import GATE_UP, OUR_LAYER, QKV
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.names import (
    TRANSPOSED,
    Row,
    dense,
    norm,
    several,
    tensor,
)
from sqjax.models.checkpoints.settings import Settings, read
from sqjax.models.config import LayerKind
from sqjax.models.fields import (
    COUNT,
    FLAG,
    POSITIVE,
    SIZE,
    TEXTS,
    WHOLE_NUMBERS,
)

#: A layer, in the names of these families.
THEIR_LAYER = "layers.{layer}"


def rope_everywhere(settings: Settings, **choices) -> tuple[LayerKind, ...]:
    """One kind for all layers: every token looks at all before it, and queries and keys turn."""
    _check_full(settings)
    return (LayerKind(None, rope(settings, head_dim(settings), **choices)),)


def _check_full(settings: Settings) -> None:
    """Refuses a list of the layers' attention, unless it says nothing new."""
    types = settings("layer_types", TEXTS, None)
    layers = settings("num_hidden_layers", SIZE)
    if types is not None and not (
        set(types) == {FULL} and len(types) == layers
    ):
        key = settings.name("layer_types")
        settings.refuse(
            f"{key} = {types!r}: not supported for this family; expected {layers} times {FULL!r}"
        )


def rope_in_a_window(settings: Settings, **choices) -> tuple[LayerKind, ...]:
    """As `rope_everywhere`, where the file may state a window for all layers."""
    _check_full(settings)
    window = settings("sliding_window", SIZE, None)
    turning = rope(settings, head_dim(settings), **choices)
    return (LayerKind(window, turning),)


def rope_in_some_windows(
    settings: Settings, usual: Sequence[str], window: int | None
) -> tuple[LayerKind, ...]:
    """Layers with and without a window, as `layer_types` says; all turn alike."""
    turning = rope(settings, head_dim(settings))
    types = layer_types(settings, usual)
    full, sliding = LayerKind(None, turning), LayerKind(window, turning)
    return kinds(types, full, sliding)


#: Where the fields of a Llama stand; families that are like it change some.
LLAMA_FIELDS = {
    "vocab_size": read("vocab_size", SIZE),
    "hidden_size": read("hidden_size", SIZE),
    "intermediate_size": read("intermediate_size", SIZE),
    "num_layers": read("num_hidden_layers", SIZE),
    "num_heads": read("num_attention_heads", SIZE),
    "num_kv_heads": lambda settings: settings(
        "num_key_value_heads", SIZE, settings("num_attention_heads", SIZE)
    ),
    "head_dim": head_dim,
    "tie_embeddings": read("tie_word_embeddings", FLAG, False),
    "attention_bias": read("attention_bias", FLAG, False),
    "output_bias": read("attention_bias", FLAG, False),
    "mlp_bias": read("mlp_bias", FLAG, False),
    "max_length": max_length,
    "norm": rms_norm,
    "kinds": rope_everywhere,
    "activation": activation("hidden_act", "silu"),
}
#: What Llama's checkpoints hold in every layer's attention.
ATTENTION_ROWS = (
    *dense(f"{THEIR_LAYER}.self_attn.q_proj", f"{OUR_LAYER}/self_attn/q_proj"),
    *dense(f"{THEIR_LAYER}.self_attn.k_proj", f"{OUR_LAYER}/self_attn/k_proj"),
    *dense(f"{THEIR_LAYER}.self_attn.v_proj", f"{OUR_LAYER}/self_attn/v_proj"),
    *dense(f"{THEIR_LAYER}.self_attn.o_proj", f"{OUR_LAYER}/self_attn/o_proj"),
    *norm(f"{THEIR_LAYER}.self_attn.q_norm", f"{OUR_LAYER}/self_attn/q_norm"),
    *norm(f"{THEIR_LAYER}.self_attn.k_norm", f"{OUR_LAYER}/self_attn/k_norm"),
)
#: A gated MLP.
MLP_ROWS = (
    *dense(f"{THEIR_LAYER}.mlp.gate_proj", f"{OUR_LAYER}/mlp/gate_proj"),
    *dense(f"{THEIR_LAYER}.mlp.up_proj", f"{OUR_LAYER}/mlp/up_proj"),
    *dense(f"{THEIR_LAYER}.mlp.down_proj", f"{OUR_LAYER}/mlp/down_proj"),
)


def norm_rows(*names: str) -> tuple:
    """The rows of a layer's norms that have one name in both."""
    rows: list[Row] = []
    for name in names:
        theirs = name.replace("/", ".")
        rows += norm(f"{THEIR_LAYER}.{theirs}", f"{OUR_LAYER}/{name}")
    return tuple(rows)


#: What stands around the layers.
OUTER_ROWS = (
    *tensor("embed_tokens.weight", "model/embed_tokens/embedding"),
    *norm("norm", "model/norm"),
    *dense("lm_head", "lm_head"),
)
#: All of a Llama.
LLAMA_ROWS = (
    *OUTER_ROWS,
    *ATTENTION_ROWS,
    *MLP_ROWS,
    *norm_rows("input_layernorm", "post_attention_layernorm"),
)
#: The angles that older checkpoints of these families hold.
ANGLES = (".rotary_emb.inv_freq",)

#: Llama 1 to 3.3, SmolLM2, and whatever else calls itself "llama".
LLAMA = Family("llama", LLAMA_FIELDS, LLAMA_ROWS)


def _smollm3_turns(settings: Settings, layers: int) -> list[int]:
    """For each layer a number: 0 where it does not turn."""
    interval = settings("no_rope_layer_interval", SIZE, 4)
    usual = [int((i + 1) % interval != 0) for i in range(layers)]
    turns = settings("no_rope_layers", WHOLE_NUMBERS, usual)
    if len(turns) != layers:
        settings.refuse(
            f"no_rope_layers: expected one number for each of {layers} layers, got {len(turns)}"
        )
    return turns


def _smollm3_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    """Every fourth layer does not turn its queries and keys, unless the file says which do."""
    layers = layer_count(settings)
    turns = _smollm3_turns(settings, layers)
    window = settings("sliding_window", SIZE, None)
    in_use = settings("use_sliding_window", FLAG, False) and window is not None
    usual_types = [SLIDING if in_use and not turn else FULL for turn in turns]
    types = layer_types(settings, usual_types)
    if SLIDING in types and window is None:
        settings.refuse(
            f"sliding_window: expected a size for the layers of {SLIDING!r}, got none"
        )
    turning = rope(settings, head_dim(settings), theta=2000000.0)
    of_layers = []
    for turn, name in zip(turns, types, strict=False):
        own = window if name == SLIDING else None
        of_layers.append(LayerKind(own, turning if turn else None))
    return tuple(of_layers)


#: SmolLM3: some layers do not turn.
SMOLLM3 = Family(
    "smollm3",
    {**LLAMA_FIELDS, "kinds": _smollm3_kinds},
    LLAMA_ROWS,
    absent={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    usual_ends=(128001,),
)

#: Mistral 7B, NeMo: a window in every layer, or in none.
MISTRAL = Family(
    "mistral",
    {**LLAMA_FIELDS, "kinds": rope_in_a_window},
    LLAMA_ROWS,
    absent={
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
)


def _ministral_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    window = settings("sliding_window", SIZE, None)
    usual = FULL if window is None else SLIDING
    layers = layer_count(settings)
    return rope_in_some_windows(settings, [usual] * layers, window)


#: Ministral: a window in some layers.
MINISTRAL = Family(
    "ministral",
    {**LLAMA_FIELDS, "kinds": _ministral_kinds},
    LLAMA_ROWS,
    absent=MISTRAL.absent,
)


def _qwen_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    """Layers from `max_window_layers` on have the window, if windows are in use at all."""
    layers = layer_count(settings)
    window = None
    if settings("use_sliding_window", FLAG, False):
        window = settings("sliding_window", SIZE, 4096)
    settings.skip("sliding_window")
    first = settings("max_window_layers", COUNT, 28)
    usual = []
    for i in range(layers):
        usual.append(SLIDING if window and i >= first else FULL)
    return rope_in_some_windows(settings, usual, window)


#: Qwen2 and 2.5: queries, keys and values have a bias.
QWEN2 = Family(
    "qwen2",
    {
        **LLAMA_FIELDS,
        "attention_bias": True,
        "output_bias": False,
        "mlp_bias": False,
        "kinds": _qwen_kinds,
    },
    LLAMA_ROWS,
    absent={"num_key_value_heads": 32, "max_position_embeddings": 32768},
)
#: Qwen3: queries and keys have a norm.
QWEN3 = Family(
    "qwen3",
    {
        **LLAMA_FIELDS,
        "mlp_bias": False,
        "kinds": _qwen_kinds,
        "qk_norm": "head",
        "qk_norm_kind": rms_norm,
    },
    LLAMA_ROWS,
    absent={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
)


def _scale(key: str):
    """The source of a multiplier."""
    return lambda settings: float(settings(key, POSITIVE, 1.0))


#: Granite: multipliers of the embedding, the residual stream, the scores and the logits.
GRANITE = Family(
    "granite",
    {
        **LLAMA_FIELDS,
        "embedding_scale": _scale("embedding_multiplier"),
        "residual_scale": _scale("residual_multiplier"),
        "query_scale": _scale("attention_multiplier"),
        "logit_scale": lambda settings: 1 / _scale("logits_scaling")(settings),
    },
    LLAMA_ROWS,
)

#: OLMo-2: norms follow attention and MLP.
OLMO2 = Family(
    "olmo2",
    {
        **LLAMA_FIELDS,
        "mlp_bias": False,
        "norm": lambda settings: rms_norm(settings, 1e-5),
        "block": "output",
        "qk_norm": "all",
        "qk_norm_kind": lambda settings: rms_norm(settings, 1e-5),
    },
    (
        *OUTER_ROWS,
        *ATTENTION_ROWS,
        *MLP_ROWS,
        *norm_rows("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    usual_ends=(50279,),
)

#: Phi-3, Phi-4, Phi-4-mini: q/k/v are one tensor, and so are gate and up.
PHI3 = Family(
    "phi3",
    {
        **LLAMA_FIELDS,
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "norm": lambda settings: rms_norm(settings, 1e-5),
        "kinds": lambda settings: rope_in_a_window(settings, part=1.0),
    },
    (
        *OUTER_ROWS,
        *several(
            f"{THEIR_LAYER}.self_attn.qkv_proj",
            QKV,
        ),
        *several(
            f"{THEIR_LAYER}.mlp.gate_up_proj",
            GATE_UP,
        ),
        *ATTENTION_ROWS,
        *MLP_ROWS,
        *norm_rows("input_layernorm", "post_attention_layernorm"),
    ),
    absent={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    usual_ends=(32000,),
)

#: What both generations of GLM-4 share.
_GLM_FIELDS = {
    **LLAMA_FIELDS,
    "output_bias": False,
    "mlp_bias": False,
    "norm": lambda settings: rms_norm(settings, 1.5625e-07),
    "kinds": lambda settings: rope_everywhere(
        settings, part=0.5, interleaved=True
    ),
}
_GLM_ROWS = (
    *OUTER_ROWS,
    *ATTENTION_ROWS,
    *several(
        f"{THEIR_LAYER}.mlp.gate_up_proj",
        GATE_UP,
    ),
    *MLP_ROWS,
)
_GLM_ENDS = (151329, 151336, 151338)
_GLM_ABSENT = {
    "attention_bias": True,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
#: GLM-4 9B: half of a head turns, in neighbouring pairs.
GLM = Family(
    "glm",
    _GLM_FIELDS,
    (*_GLM_ROWS, *norm_rows("input_layernorm", "post_attention_layernorm")),
    absent=_GLM_ABSENT,
    usual_ends=_GLM_ENDS,
)
#: GLM-4 0414: as `GLM`, with norms around attention and MLP.
GLM4 = Family(
    "glm4",
    {**_GLM_FIELDS, "block": "sandwich"},
    (
        *_GLM_ROWS,
        *norm_rows("input_layernorm"),
        *norm(
            f"{THEIR_LAYER}.post_self_attn_layernorm",
            f"{OUR_LAYER}/post_attention_layernorm",
        ),
        *norm(
            f"{THEIR_LAYER}.post_attention_layernorm",
            f"{OUR_LAYER}/pre_feedforward_layernorm",
        ),
        *norm(
            f"{THEIR_LAYER}.post_mlp_layernorm",
            f"{OUR_LAYER}/post_feedforward_layernorm",
        ),
    ),
    absent=_GLM_ABSENT,
    usual_ends=_GLM_ENDS,
)


def _stablelm_block(settings: Settings) -> str:
    parallel = settings("use_parallel_residual", FLAG, False)
    return "parallel" if parallel else "pre"


def _stablelm_qk_norm(settings: Settings) -> str | None:
    return "heads" if settings("qk_layernorm", FLAG, False) else None


def _norms_of_heads(name: str) -> tuple:
    """The gains of the norms of one of queries and keys, each head's a tensor of its own."""
    return tensor(
        f"{THEIR_LAYER}.self_attn.{name}_layernorm.norms.{{entry}}.weight",
        f"{OUR_LAYER}/self_attn/{name}_norm/weight",
    )


#: StableLM: LayerNorms; a quarter of a head turns.
STABLELM = Family(
    "stablelm",
    {
        **LLAMA_FIELDS,
        "attention_bias": read("use_qkv_bias", FLAG, False),
        "output_bias": False,
        "mlp_bias": False,
        "norm": layer_norm,
        "block": _stablelm_block,
        "kinds": lambda settings: rope_everywhere(settings, part=0.25),
        "qk_norm": _stablelm_qk_norm,
        "qk_norm_kind": lambda settings: layer_norm(settings, bias=False),
    },
    (*LLAMA_ROWS, *_norms_of_heads("q"), *_norms_of_heads("k")),
    absent={"num_key_value_heads": 32, "max_position_embeddings": 4096},
)

#: Command R: one LayerNorm without bias for attention and MLP, which are added together.
COHERE = Family(
    "cohere",
    {
        **LLAMA_FIELDS,
        "mlp_bias": False,
        "norm": lambda settings: layer_norm(settings, bias=False),
        "block": "parallel",
        "kinds": lambda settings: rope_everywhere(settings, interleaved=True),
        "qk_norm": lambda settings: (
            "heads" if settings("use_qk_norm", FLAG, False) else None
        ),
        "qk_norm_kind": lambda settings: layer_norm(settings, bias=False),
        "logit_scale": read("logit_scale", POSITIVE, 0.0625),
    },
    (*OUTER_ROWS, *ATTENTION_ROWS, *MLP_ROWS, *norm_rows("input_layernorm")),
    absent={"tie_word_embeddings": True, "max_position_embeddings": 8192},
    usual_ends=(255001,),
)


def _cohere2_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    """Three layers with a window and a rotary embedding, then one with neither."""
    layers = layer_count(settings)
    window = settings("sliding_window", SIZE, 4096)
    every = settings("sliding_window_pattern", SIZE, 4)
    usual = [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    types = layer_types(settings, usual)
    turning = rope(settings, head_dim(settings), interleaved=True)
    return kinds(types, LayerKind(None, None), LayerKind(window, turning))


#: Command R7B: as `COHERE`, with windows.
COHERE2 = Family(
    "cohere2",
    {
        **COHERE.fields,
        "head_dim": lambda settings: even_head_dim(settings, "hidden_size"),
        "kinds": _cohere2_kinds,
        "qk_norm": None,
    },
    COHERE.rows,
    absent=COHERE.absent,
    usual_ends=(255001,),
)

#: The experts of a layer, each kernel a tensor of its own.
EXPERT_ROWS = tuple(
    row
    for part in ("gate", "up", "down")
    for row in tensor(
        f"{THEIR_LAYER}.mlp.experts.{{entry}}.{part}_proj.weight",
        f"{OUR_LAYER}/mlp/experts/{part}_proj/kernel",
        TRANSPOSED,
    )
)
