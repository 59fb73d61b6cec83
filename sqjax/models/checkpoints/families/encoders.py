"""Encoders of texts: BERT (and MiniLM, BGE, E5), RoBERTa, MPNet, DistilBERT, ModernBERT."""

from collections.abc import Mapping, Sequence

from sqjax.models.checkpoints.families.common import (
    FULL,
    SLIDING,
    activation,
    even_head_dim,
    kinds,
    layer_count,
    layer_norm,
    layer_types,
    rope,
)
from sqjax.models.checkpoints.families.paths import (
    DOWN_PROJ,
    FIRST_NORM,
    GATE_UP,
    O_PROJ,
    OUTPUT_NORM,
    QKV,
    SECOND_NORM,
    UP_PROJ,
    denses,
)
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.names import (
    Row,
    dense,
    norm,
    several,
    tensor,
)
from sqjax.models.checkpoints.settings import Settings, read
from sqjax.models.config import LayerKind, Norm
from sqjax.models.encoder_config import EncoderConfig
from sqjax.models.fields import COUNT, EPSILON, FLAG, POSITIVE, SIZE

EMBEDDING, POSITIONS, TOKEN_TYPES = (
    f"model/embed_{name}/embedding"
    for name in ("tokens", "positions", "token_types")
)
EMBEDDING_NORM = "model/embed_layernorm"

# BERT ---------------------------------------------------------------------------------------------


def old_norm(theirs: str, ours: str) -> tuple[Row, ...]:
    """The rows of a norm, also under the names that it had in TensorFlow."""
    return (
        *norm(theirs, ours),
        *tensor(f"{theirs}.gamma", f"{ours}/weight"),
        *tensor(f"{theirs}.beta", f"{ours}/bias"),
    )


def _bert_norm(settings: Settings) -> Norm:
    eps = settings("layer_norm_eps", EPSILON, 1e-12)
    return Norm("layer", float(eps), bias=True)


def _heads(settings: Settings) -> int:
    """The number of heads, which must divide the hidden size."""
    even_head_dim(settings, "hidden_size")
    return settings("num_attention_heads", SIZE)


#: Where the fields of a BERT stand; families that are like it change some.
BERT_FIELDS = {
    "vocab_size": read("vocab_size", SIZE),
    "hidden_size": read("hidden_size", SIZE),
    "intermediate_size": read("intermediate_size", SIZE),
    "num_layers": read("num_hidden_layers", SIZE),
    "num_heads": _heads,
    "max_length": read("max_position_embeddings", SIZE, 512),
    "norm": _bert_norm,
    "token_types": read("type_vocab_size", SIZE, 2),
    "activation": activation("hidden_act", "gelu"),
    "pad_id": read("pad_token_id", COUNT, 0),
}
_LAYER = "encoder.layer.{layer}"
#: All of a BERT.
BERT_ROWS = (
    *tensor("embeddings.word_embeddings.weight", EMBEDDING),
    *tensor("embeddings.position_embeddings.weight", POSITIONS),
    *tensor("embeddings.token_type_embeddings.weight", TOKEN_TYPES),
    *old_norm("embeddings.LayerNorm", EMBEDDING_NORM),
    *denses(
        _LAYER,
        {
            "attention.self.query": QKV[0],
            "attention.self.key": QKV[1],
            "attention.self.value": QKV[2],
            "attention.output.dense": O_PROJ,
            "intermediate.dense": UP_PROJ,
            "output.dense": DOWN_PROJ,
        },
    ),
    *old_norm(f"{_LAYER}.attention.output.LayerNorm", SECOND_NORM),
    *old_norm(f"{_LAYER}.output.LayerNorm", OUTPUT_NORM),
)
#: The numbers 0, 1, 2 ... of positions, and zeros, which older checkpoints hold.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
#: What is made of a BERT's states: a pooler, and the heads of tasks.
HEADS = (
    "pooler.",
    "cls.",
    "lm_head.",
    "classifier.",
    "qa_outputs.",
)
#: Keys of which other values would change what a BERT computes.
BERT_NEUTRAL: Mapping[str, tuple] = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
}

#: BERT, MiniLM, BGE, E5, GTE: post-norm blocks, learned positions, two types of tokens.
BERT = Family(
    "bert",
    BERT_FIELDS,
    BERT_ROWS,
    prefix="bert.",
    ignored=BUFFERS,
    neutral=BERT_NEUTRAL,
    left_out=HEADS,
    config_type=EncoderConfig,
)

# RoBERTa ------------------------------------------------------------------------------------------


def _offset(settings: Settings) -> int:
    """The row of position 0: that after the padding token's own number."""
    return settings("pad_token_id", COUNT, 1) + 1


def _length(settings: Settings) -> int:
    rows = settings("max_position_embeddings", SIZE, 514)
    offset = _offset(settings)
    if rows <= offset:
        settings.refuse(
            f"max_position_embeddings: expected more rows than pad_token_id + 1 = {offset}, the "
            f"row of the first token, got {rows}"
        )
    return rows - offset


ROBERTA_FIELDS = {
    **BERT_FIELDS,
    "max_length": _length,
    "position_offset": _offset,
    "skips_padding": True,
    "pad_id": read("pad_token_id", COUNT, 1),
}


def _roberta(model_type: str) -> Family:
    """A family like RoBERTa, under its name: positions begin after the padding token's number."""
    return Family(
        model_type,
        ROBERTA_FIELDS,
        BERT_ROWS,
        prefix="roberta.",
        ignored=BUFFERS,
        neutral=BERT_NEUTRAL,
        left_out=HEADS,
        config_type=EncoderConfig,
    )


ROBERTA = _roberta("roberta")
XLM_ROBERTA = _roberta("xlm-roberta")
CAMEMBERT = _roberta("camembert")

# MPNet --------------------------------------------------------------------------------------------

#: In the models' own code these are fixed, whatever a file says.
_MPNET_FIRST_ROW, _MPNET_BUCKETS = 2, 32


def _mpnet_length(settings: Settings) -> int:
    rows = settings("max_position_embeddings", SIZE, 514)
    if rows <= _MPNET_FIRST_ROW:
        settings.refuse(
            f"max_position_embeddings: expected more than {_MPNET_FIRST_ROW} rows, of which these "
            f"are of no token, got {rows}"
        )
    return rows - _MPNET_FIRST_ROW


def _mpnet_buckets(settings: Settings) -> int:
    key = "relative_attention_num_buckets"
    stated = settings(key, SIZE, _MPNET_BUCKETS)
    if stated != _MPNET_BUCKETS:
        settings.refuse(f"{key}: expected {_MPNET_BUCKETS}, got {stated}")
    return _MPNET_BUCKETS


#: MPNet: a BERT whose scores know the distance of two tokens.
MPNET = Family(
    "mpnet",
    {
        **BERT_FIELDS,
        "max_length": _mpnet_length,
        "position_offset": _MPNET_FIRST_ROW,
        "skips_padding": True,
        "token_types": None,
        "distance_buckets": _mpnet_buckets,
        "pad_id": read("pad_token_id", COUNT, 1),
    },
    (
        *BERT_ROWS,
        *tensor(
            "encoder.relative_attention_bias.weight",
            "model/embed_distances/embedding",
        ),
        *denses(
            f"{_LAYER}.attention.attn",
            {"q": QKV[0], "k": QKV[1], "v": QKV[2], "o": O_PROJ},
        ),
        *norm(f"{_LAYER}.attention.LayerNorm", SECOND_NORM),
    ),
    prefix="mpnet.",
    ignored=BUFFERS,
    neutral=BERT_NEUTRAL,
    left_out=HEADS,
    config_type=EncoderConfig,
)

# DistilBERT ---------------------------------------------------------------------------------------


def _distil_heads(settings: Settings) -> int:
    even_head_dim(settings, "dim", "n_heads")
    return settings("n_heads", SIZE)


_DISTIL_LAYER = "transformer.layer.{layer}"
#: DistilBERT: a BERT without types of tokens, under other names.
DISTILBERT = Family(
    "distilbert",
    {
        "vocab_size": read("vocab_size", SIZE),
        "hidden_size": read("dim", SIZE),
        "intermediate_size": read("hidden_dim", SIZE),
        "num_layers": read("n_layers", SIZE),
        "num_heads": _distil_heads,
        "max_length": read("max_position_embeddings", SIZE, 512),
        "activation": activation("activation", "gelu"),
        "pad_id": read("pad_token_id", COUNT, 0),
    },
    (
        *tensor("embeddings.word_embeddings.weight", EMBEDDING),
        *tensor("embeddings.position_embeddings.weight", POSITIONS),
        *norm("embeddings.LayerNorm", EMBEDDING_NORM),
        *denses(
            _DISTIL_LAYER,
            {
                "attention.q_lin": QKV[0],
                "attention.k_lin": QKV[1],
                "attention.v_lin": QKV[2],
                "attention.out_lin": O_PROJ,
                "ffn.lin1": UP_PROJ,
                "ffn.lin2": DOWN_PROJ,
            },
        ),
        *norm(f"{_DISTIL_LAYER}.sa_layer_norm", SECOND_NORM),
        *norm(f"{_DISTIL_LAYER}.output_layer_norm", OUTPUT_NORM),
    ),
    prefix="distilbert.",
    ignored=BUFFERS,
    neutral=BERT_NEUTRAL,
    left_out=(*HEADS, "vocab_", "pre_classifier."),
    config_type=EncoderConfig,
)

# ModernBERT ---------------------------------------------------------------------------------------


def _usual_types(settings: Settings) -> Sequence[str]:
    """Every third layer looks at all tokens, or as many as the file says."""
    every = settings("global_attn_every_n_layers", SIZE, 3)
    layers = layer_count(settings) or 0
    return [SLIDING if i % every else FULL for i in range(layers)]


def _modern_kinds(settings: Settings) -> tuple[LayerKind, ...]:
    """Layers that look at all tokens, and layers with a window, each with a base of its own."""
    size = even_head_dim(settings, "hidden_size")
    theta = settings("global_rope_theta", POSITIVE, 160000.0)
    # Where the base of windows is there as null, it is that of the other layers.
    usual = theta if "local_rope_theta" in settings.values else 10000.0
    full = rope(
        settings, size, layers=FULL, theta=theta, theta_key="rope_theta"
    )
    local = rope(
        settings,
        size,
        layers=SLIDING,
        theta=usual,
        theta_key="local_rope_theta",
    )
    window = settings("local_attention", SIZE, 128)
    types = layer_types(settings, _usual_types(settings))
    return kinds(types, LayerKind(None, full), LayerKind(window, local))


_MODERN_LAYER = "layers.{layer}"
#: ModernBERT: pre-norm blocks with a gated MLP; windows and two bases.
MODERNBERT = Family(
    "modernbert",
    {
        **BERT_FIELDS,
        "attention_bias": read("attention_bias", FLAG, False),
        "mlp_bias": read("mlp_bias", FLAG, False),
        "max_length": read("max_position_embeddings", SIZE, 8192),
        "norm": lambda settings: layer_norm(
            settings, "norm_eps", settings("norm_bias", FLAG, False)
        ),
        "final_norm": True,
        "block": "pre",
        "first_norm": False,
        "kinds": _modern_kinds,
        "learned_positions": False,
        "token_types": None,
        "gated_mlp": True,
        "activation": activation("hidden_activation", "gelu"),
        "pad_id": read("pad_token_id", COUNT, 50283),
    },
    (
        *tensor("embeddings.tok_embeddings.weight", EMBEDDING),
        *norm("embeddings.norm", EMBEDDING_NORM),
        *norm("final_norm", "model/norm"),
        *norm(f"{_MODERN_LAYER}.attn_norm", FIRST_NORM),
        *norm(f"{_MODERN_LAYER}.mlp_norm", SECOND_NORM),
        *several(f"{_MODERN_LAYER}.attn.Wqkv", QKV),
        *dense(f"{_MODERN_LAYER}.attn.Wo", O_PROJ),
        *several(f"{_MODERN_LAYER}.mlp.Wi", GATE_UP),
        *dense(f"{_MODERN_LAYER}.mlp.Wo", DOWN_PROJ),
    ),
    left_out=("head.", "decoder.", *HEADS),
    usual_ends=(50282,),
    config_type=EncoderConfig,
)
