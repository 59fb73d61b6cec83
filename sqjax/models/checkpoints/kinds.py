"""The kinds of models whose checkpoints are read: what reading must know of each.

A `Family` names its kind by the type of its configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sqjax.models.config import DecoderConfig
from sqjax.models.decoder import CausalLM
from sqjax.models.encoder import TextEncoder
from sqjax.models.encoder_config import EncoderConfig
from sqjax.models.image_text import TextTowerModel
from sqjax.models.text_tower import TextTowerConfig
from sqjax.models.vision_config import VisionConfig
from sqjax.models.vision_model import VisionModel

#: A configuration of any kind. It is frozen and hashable, and has `num_layers`.
Config = Any


class Kind(NamedTuple):
    """What reading must know of one kind of model.

    Attributes:
        what: what such a model is called in errors: "a decoder".
        load: the function of `sqjax.models` that loads it.
        layer: layer(config, i) is the configuration of a model whose only layer is like layer i.
        init: the random parameters of such a model, a tree whose layers are "layers/0", "layers/1"
            and so on. It is never run: only shapes are asked for.
    """

    what: str
    load: str
    layer: Callable[[Config, int], Config]
    init: Callable[[Config], Any]


def _layer_of_decoder(config: DecoderConfig, i: int) -> DecoderConfig:
    experts = config.experts
    if experts is not None:
        dense_layers = () if config.has_experts(i) else (0,)
        experts = replace(experts, dense_layers=dense_layers)
    # Kinds of attention have the same parameters, so any one will do.
    kinds = config.kinds[:1]
    return replace(
        config,
        num_layers=1,
        kinds=kinds,
        experts=experts,
        first_norm=config.has_first_norm(i),
    )


def _init_decoder(config: DecoderConfig) -> Any:
    ids = jnp.zeros((1, 1), jnp.int32)
    return CausalLM(config).init(jax.random.key(0), ids)["params"]


def _layer_of_encoder(config: EncoderConfig, i: int) -> EncoderConfig:
    first_norm = config.layers.has_first_norm(i)
    kinds = config.kinds[:1]
    return replace(config, num_layers=1, kinds=kinds, first_norm=first_norm)


def _init_encoder(config: EncoderConfig) -> Any:
    ids = jnp.zeros((1, 1), jnp.int32)
    params = TextEncoder(config).init(jax.random.key(0), ids)["params"]
    return {"model": params}


def _layer_of_vision(config: VisionConfig, i: int) -> VisionConfig:
    return replace(config, num_layers=1)


def _init_vision(config: VisionConfig) -> Any:
    return VisionModel(config).init(jax.random.key(0))


def _layer_of_tower(config: TextTowerConfig, i: int) -> TextTowerConfig:
    return config.of_one_layer()


def _init_tower(config: TextTowerConfig) -> Any:
    return TextTowerModel(config).init(jax.random.key(0))


#: {the type of a model's configuration: its kind}.
KINDS: Mapping[type, Kind] = {
    DecoderConfig: Kind("a decoder", "load", _layer_of_decoder, _init_decoder),
    EncoderConfig: Kind(
        "an encoder of texts",
        "load_encoder",
        _layer_of_encoder,
        _init_encoder,
    ),
    VisionConfig: Kind(
        "an encoder of images",
        "load_vision",
        _layer_of_vision,
        _init_vision,
    ),
    TextTowerConfig: Kind(
        "the text tower of two",
        "load_image_text",
        _layer_of_tower,
        _init_tower,
    ),
}


def kind_of(config: Config) -> Kind:
    """The kind of a model, by its configuration."""
    return KINDS[type(config)]
