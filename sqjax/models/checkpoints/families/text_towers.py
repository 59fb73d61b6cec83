"""The text towers of CLIP and SigLIP."""

from collections.abc import Mapping
from typing import Any

from sqjax.models.checkpoints.families.common import ACTIVATIONS
from sqjax.models.checkpoints.families.vision import (
    TOWER_ROWS,
    heads_of,
    part_of,
    projection_size,
)
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.names import Layout, dense, norm, tensor
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.config import Norm
from sqjax.models.encoder_config import EncoderConfig
from sqjax.models.fields import EPSILON, ID, SIZE, one_of
from sqjax.models.text_tower import TextTowerConfig

#: A number, stored as (1,).
_ONE_NUMBER = Layout(
    lambda config, theirs, shapes: [theirs.reshape(())],
    lambda config, ours: ours[0][None],
)


def _encoder(
    settings: Settings, usual: Mapping[str, Any], causal: bool
) -> EncoderConfig:
    """The layers of a tower; `usual` is what keys mean that are not there."""
    own = _part(settings)

    def size(key: str) -> int:
        return own(key, SIZE, usual[key])

    act = own("hidden_act", one_of(*ACTIVATIONS), usual["hidden_act"])
    eps = own("layer_norm_eps", EPSILON, usual["layer_norm_eps"])
    return EncoderConfig(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads_of(own, usual),
        max_length=size("max_position_embeddings"),
        norm=Norm("layer", float(eps), bias=True),
        embedding_norm=False,
        final_norm=True,
        block="pre",
        causal=causal,
        activation=ACTIVATIONS[act],
    )


def _part(settings: Settings) -> Settings:
    return part_of(settings, "text_config")


_ROWS = (
    *tensor(
        "embeddings.token_embedding.weight", "model/embed_tokens/embedding"
    ),
    *tensor(
        "embeddings.position_embedding.weight",
        "model/embed_positions/embedding",
    ),
    *norm("final_layer_norm", "model/norm"),
    *TOWER_ROWS,
)
_IGNORED = (".position_ids",)

_CLIP_USUAL = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
#: What the configurations of the first CLIPs say, though their texts end with the largest id.
_OLD_END = 2


def _end(settings: Settings) -> int:
    return _part(settings)("eos_token_id", ID, 49407)


def _pooling(settings: Settings) -> str:
    return "largest" if _end(settings) == _OLD_END else "end"


#: CLIP's: causal, and the state of the token that ends the text.
CLIP_TEXT = Family(
    "clip",
    {
        "encoder": lambda settings: _encoder(settings, _CLIP_USUAL, True),
        "projection_size": projection_size,
        "pooling": _pooling,
        "end_id": _end,
    },
    (
        *_ROWS,
        *dense("text_projection", "projection"),
        *tensor("logit_scale", "logit_scale"),
    ),
    prefix="text_model.",
    ignored=_IGNORED,
    left_out=("vision_model.", "visual_projection."),
    config_type=TextTowerConfig,
)

_SIGLIP_USUAL = {
    **_CLIP_USUAL,
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def _siglip_size(settings: Settings) -> int:
    own = _part(settings)
    usual = own("hidden_size", SIZE, _SIGLIP_USUAL["hidden_size"])
    return own("projection_size", SIZE, usual)


#: SigLIP's: both ways, and the state of the last token.
SIGLIP_TEXT = Family(
    "siglip",
    {
        "encoder": lambda settings: _encoder(settings, _SIGLIP_USUAL, False),
        "projection_size": _siglip_size,
        "projection_bias": True,
        "pooling": "last",
        "similarity_bias": True,
    },
    (
        *_ROWS,
        *dense("head", "projection"),
        *tensor("logit_scale", "logit_scale", _ONE_NUMBER),
        *tensor("logit_bias", "logit_bias", _ONE_NUMBER),
    ),
    prefix="text_model.",
    ignored=_IGNORED,
    left_out=("vision_model.",),
    config_type=TextTowerConfig,
)
TEXT_TOWERS = (CLIP_TEXT, SIGLIP_TEXT)
