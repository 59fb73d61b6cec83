"""Encoders of images: ViT, the image towers of CLIP and SigLIP, DINOv2."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.models.checkpoints.families.common import ACTIVATIONS
from sqjax.models.checkpoints.families.paths import (
    DOWN_PROJ,
    FIRST_NORM,
    GATE_UP,
    O_PROJ,
    OUR_LAYER,
    QKV,
    SECOND_NORM,
    UP_PROJ,
    denses,
)
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.kinds import Config
from sqjax.models.checkpoints.names import (
    ONE_AFTER_ANOTHER,
    Layout,
    Row,
    Shape,
    dense,
    norm,
    several,
    tensor,
)
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.config import Norm
from sqjax.models.fields import (
    EPSILON,
    FLAG,
    MAPPING,
    POSITIVE,
    SIZE,
    TEXTS,
    What,
    one_of,
)
from sqjax.models.vision_config import VisionConfig

# Layouts ------------------------------------------------------------------------------------------


def _split_patches(
    config: Config, theirs: np.ndarray, shapes: Sequence[Shape]
) -> list:
    """A convolution's kernel, (out, channels, rows, columns), as that of a Dense layer.

    Its inputs are the numbers of a patch of an image with its channels last: (768, 3, 16, 16)
    becomes (16 * 16 * 3, 768).
    """
    by_place = theirs.transpose(2, 3, 1, 0)
    return [by_place.reshape(shapes[0])]


def _join_patches(config: Config, ours: Sequence) -> jax.Array:
    size = config.patch_size
    by_place = ours[0].reshape(size, size, config.num_channels, -1)
    return jnp.transpose(by_place, (3, 2, 0, 1))


#: A convolution whose patches do not overlap.
PATCHES = Layout(_split_patches, _join_patches)
#: The leaf, stored with an axis of 1 in front.
WITH_BATCH_AXIS = Layout(
    lambda config, theirs, shapes: [theirs[0]],
    lambda config, ours: ours[0][None],
)
#: The only row of the leaf.
ONE_ROW = Layout(
    lambda config, theirs, shapes: [theirs[None]],
    lambda config, ours: ours[0][0],
)

PATCH_KERNEL, PATCH_BIAS = (
    f"model/embed_patches/{part}" for part in ("kernel", "bias")
)
CLASS_TOKEN = "model/class_token"
PLACES = "model/embed_positions/embedding"


# Settings -----------------------------------------------------------------------------------------


def _itself(settings: Settings) -> Settings:
    return settings


def part_of(settings: Settings, key: str) -> Settings:
    """The keys about one tower, in a file about two."""
    older = f"{key}_dict"
    # Of a file that says them twice the older object holds, and all of it, as in transformers.
    has_older = settings.values.get(older) is not None
    return settings.within(older if has_older else key)


def _vision_part(settings: Settings) -> Settings:
    return part_of(settings, "vision_config")


def heads_of(own: Settings, usual: Mapping[str, Any]) -> int:
    """The number of heads, which must divide the hidden size."""
    heads = "num_attention_heads"
    size = own("hidden_size", SIZE, usual["hidden_size"])
    count = own(heads, SIZE, usual[heads])
    if size % count:
        name = own.name("hidden_size")
        own.refuse(
            f"{name}: expected a multiple of {heads} = {count}, got {size}"
        )
    return count


Part = Callable[[Settings], Settings]


def _fields(part: Part, usual: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all families share; `usual` is what keys mean that are not there.

    Args:
        part: which settings are about images.
        usual: {key: value}, as transformers has them.
    """

    def key(name: str, what: What = SIZE):
        return lambda settings: part(settings)(name, what, usual[name])

    def activation(settings: Settings) -> str:
        names = one_of(*ACTIVATIONS)
        own = part(settings)
        return ACTIVATIONS[own("hidden_act", names, usual["hidden_act"])]

    def norm(settings: Settings) -> Norm:
        eps = part(settings)("layer_norm_eps", EPSILON, usual["layer_norm_eps"])
        return Norm("layer", float(eps), bias=True)

    return {
        "image_size": key("image_size"),
        "patch_size": key("patch_size"),
        "num_channels": key("num_channels"),
        "hidden_size": key("hidden_size"),
        "intermediate_size": key("intermediate_size"),
        "num_layers": key("num_hidden_layers"),
        "num_heads": lambda settings: heads_of(part(settings), usual),
        "activation": activation,
        "norm": norm,
    }


_USUAL = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def _is_class(settings: Settings, end: str) -> bool:
    """Whether the file is of a class of transformers whose name ends so."""
    names = settings("architectures", TEXTS, [])
    return any(name.endswith(end) for name in names)


def _classes(settings: Settings) -> int | None:
    """How many classes the head tells apart; None for a class without a head."""
    if not _is_class(settings, "ForImageClassification"):
        return None
    # transformers writes no names where there are two classes that nobody has named.
    names = settings("id2label", MAPPING, {"0": "", "1": ""})
    return len(names)


# ViT and DINOv2 -----------------------------------------------------------------------------------


def _pooler_size(settings: Settings) -> int | None:
    # The head of classes reads the class token itself.
    if _classes(settings) is not None:
        return None
    usual = settings("hidden_size", SIZE, _USUAL["hidden_size"])
    return settings("pooler_output_size", SIZE, usual)


def _pooler_activation(settings: Settings) -> str:
    names = {"tanh": "tanh", **ACTIVATIONS}
    return names[settings("pooler_act", one_of(*names), "tanh")]


def _qkv_bias(settings: Settings) -> bool:
    return settings("qkv_bias", FLAG, True)


_VIT_LAYER = "encoder.layer.{layer}"
#: What ViT and DINOv2 share.
_VIT_ROWS = (
    *tensor("embeddings.cls_token", CLASS_TOKEN, WITH_BATCH_AXIS),
    *tensor("embeddings.position_embeddings", PLACES, WITH_BATCH_AXIS),
    *tensor(
        "embeddings.patch_embeddings.projection.weight", PATCH_KERNEL, PATCHES
    ),
    *tensor("embeddings.patch_embeddings.projection.bias", PATCH_BIAS),
    *norm("layernorm", "model/norm"),
    *dense("classifier", "classifier"),
    *denses(
        _VIT_LAYER,
        {
            "attention.attention.query": QKV[0],
            "attention.attention.key": QKV[1],
            "attention.attention.value": QKV[2],
            "attention.output.dense": O_PROJ,
        },
    ),
)
#: The mask of patches in training, and the numbers 0, 1, 2 ... of positions in older files.
_SPARE = (".mask_token", ".position_ids")

#: ViT: a pooler where the file has one, or a head of classes.
VIT = Family(
    "vit",
    {
        **_fields(_itself, _USUAL),
        "attention_bias": _qkv_bias,
        "pooler_size": _pooler_size,
        "pooler_activation": _pooler_activation,
        "num_classes": _classes,
    },
    (
        *_VIT_ROWS,
        *dense("pooler.dense", "pooler"),
        *norm(f"{_VIT_LAYER}.layernorm_before", FIRST_NORM),
        *norm(f"{_VIT_LAYER}.layernorm_after", SECOND_NORM),
        *denses(
            _VIT_LAYER,
            {"intermediate.dense": UP_PROJ, "output.dense": DOWN_PROJ},
        ),
    ),
    prefix="vit.",
    ignored=_SPARE,
    optional={"pooler.dense.weight": {"pooler_size": None}},
    config_type=VisionConfig,
)

_DINO_USUAL = {**_USUAL, "layer_norm_eps": 1e-6}


def _is_gated(settings: Settings) -> bool:
    return settings("use_swiglu_ffn", FLAG, False)


def _dino_inner(settings: Settings) -> int:
    size = settings("hidden_size", SIZE, _USUAL["hidden_size"])
    inner = int(size * settings("mlp_ratio", POSITIVE, 4))
    if not _is_gated(settings):
        return inner
    # A gate is a third matmul, so that each is two thirds as large, in eights.
    return -(-int(inner * 2 / 3) // 8) * 8


def _dino_activation(settings: Settings) -> str:
    usual = settings("hidden_act", one_of(*ACTIVATIONS), "gelu")
    # A gated MLP has this one, whatever the file says.
    return "silu" if _is_gated(settings) else ACTIVATIONS[usual]


#: DINOv2: what a block adds has a gain for each channel.
DINOV2 = Family(
    "dinov2",
    {
        **_fields(_itself, _DINO_USUAL),
        "intermediate_size": _dino_inner,
        "attention_bias": _qkv_bias,
        "activation": _dino_activation,
        "gated_mlp": _is_gated,
        "layer_scale": True,
        "num_classes": _classes,
        "class_and_mean": True,
    },
    (
        *_VIT_ROWS,
        *norm(f"{_VIT_LAYER}.norm1", FIRST_NORM),
        *norm(f"{_VIT_LAYER}.norm2", SECOND_NORM),
        *denses(_VIT_LAYER, {"mlp.fc1": UP_PROJ, "mlp.fc2": DOWN_PROJ}),
        *several(f"{_VIT_LAYER}.mlp.weights_in", GATE_UP),
        *dense(f"{_VIT_LAYER}.mlp.weights_out", DOWN_PROJ),
        *tensor(
            f"{_VIT_LAYER}.layer_scale1.lambda1",
            f"{OUR_LAYER}/attention_scale/weight",
        ),
        *tensor(
            f"{_VIT_LAYER}.layer_scale2.lambda1",
            f"{OUR_LAYER}/mlp_scale/weight",
        ),
    ),
    prefix="dinov2.",
    ignored=_SPARE,
    config_type=VisionConfig,
)

# CLIP and SigLIP ----------------------------------------------------------------------------------

_LAYER = "encoder.layers.{layer}"
#: The layers of both towers of CLIP and SigLIP.
TOWER_ROWS = (
    *norm(f"{_LAYER}.layer_norm1", FIRST_NORM),
    *norm(f"{_LAYER}.layer_norm2", SECOND_NORM),
    *denses(
        _LAYER,
        {
            "self_attn.q_proj": QKV[0],
            "self_attn.k_proj": QKV[1],
            "self_attn.v_proj": QKV[2],
            "self_attn.out_proj": O_PROJ,
            "mlp.fc1": UP_PROJ,
            "mlp.fc2": DOWN_PROJ,
        },
    ),
)
_IMAGE_ROWS = (
    *tensor("embeddings.patch_embedding.weight", PATCH_KERNEL, PATCHES),
    *tensor("embeddings.patch_embedding.bias", PATCH_BIAS),
    *tensor("embeddings.position_embedding.weight", PLACES),
    *norm("post_layernorm", "model/norm"),
    *TOWER_ROWS,
)
_CLIP_USUAL = {
    **_USUAL,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_CLIP_ROWS = (
    *_IMAGE_ROWS,
    *tensor("embeddings.class_embedding", CLASS_TOKEN, ONE_ROW),
    *norm("pre_layrnorm", "model/embed_layernorm"),
    *dense("visual_projection", "projection"),
)


def projection_size(settings: Settings) -> int:
    """The channels of the vectors that both towers give."""
    return settings("projection_dim", SIZE, 512)


def _projection_if_any(settings: Settings) -> int | None:
    has_one = _is_class(settings, "WithProjection")
    return projection_size(settings) if has_one else None


def _clip(model_type: str, part: Part, projection: Any) -> Family:
    """CLIP's image tower: a norm before the layers, and one of the class token behind them."""
    return Family(
        model_type,
        {
            **_fields(part, _CLIP_USUAL),
            "patch_bias": False,
            "embedding_norm": True,
            "final_norm": "pooled",
            "projection_size": projection,
        },
        _CLIP_ROWS,
        prefix="vision_model.",
        ignored=_SPARE,
        left_out=("text_model.", "text_projection.", "logit_scale"),
        config_type=VisionConfig,
    )


CLIP = _clip("clip", _vision_part, projection_size)
CLIP_VISION = _clip("clip_vision_model", _itself, _projection_if_any)

_SIGLIP_USUAL = {
    **_USUAL,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_POOLER = "attention_pooler"
_POOLER_QKV = [f"{_POOLER}/{part}_proj" for part in ("probe", "k", "v")]
_SIGLIP_ROWS = (
    *_IMAGE_ROWS,
    *tensor("head.probe", f"{_POOLER}/probe", WITH_BATCH_AXIS),
    Row(
        "head.attention.in_proj_weight",
        tuple(f"{path}/kernel" for path in _POOLER_QKV),
        ONE_AFTER_ANOTHER,
    ),
    Row(
        "head.attention.in_proj_bias",
        tuple(f"{path}/bias" for path in _POOLER_QKV),
        ONE_AFTER_ANOTHER,
    ),
    *norm("head.layernorm", f"{_POOLER}/norm"),
    *denses(
        "head",
        {
            "attention.out_proj": f"{_POOLER}/o_proj",
            "mlp.fc1": f"{_POOLER}/mlp/up_proj",
            "mlp.fc2": f"{_POOLER}/mlp/down_proj",
        },
    ),
)


def _siglip(model_type: str, part: Part) -> Family:
    """SigLIP's image tower: no class token, and a learned query that looks at all patches."""

    def pooling(settings: Settings) -> str | None:
        has_one = part(settings)("vision_use_head", FLAG, True)
        return "attention" if has_one else None

    return Family(
        model_type,
        {
            **_fields(part, _SIGLIP_USUAL),
            "class_token": False,
            "pooling": pooling,
        },
        _SIGLIP_ROWS,
        prefix="vision_model.",
        ignored=_SPARE,
        left_out=("text_model.", "logit_scale", "logit_bias"),
        config_type=VisionConfig,
    )


SIGLIP = _siglip("siglip", _vision_part)
SIGLIP_VISION = _siglip("siglip_vision_model", _itself)
