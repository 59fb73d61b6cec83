"""A head of its own for a model whose head is its embedding."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from sqjax._arguments import check_mapping
from sqjax.models.model import Model
from sqjax.weights.quant_weight import check_float


def untie(
    model: Model, params: Mapping[str, Any]
) -> tuple[Model, dict[str, Any]]:
    """The same function with a head that is a leaf of its own, a copy of the embedding.

    A final norm's gain can be folded into such a head, which `sqjax.rotate` needs. It costs vocab x
    hidden floats more: of SmolLM2-135M, 28 million of 135. Weights are as many bytes per token as
    before, because a token reads one row of the embedding and all of the head.

    Args:
        model: whose configuration has `tie_embeddings`; another is returned as it is.
        params: its float parameters.

    Returns:
        (the model, its parameters), as other functions take them.

    Raises:
        ValueError: the parameters are quantized, or have no embedding.

    Examples:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, untie
        >>> model = Model(LlamaConfig(32, 8, 16, 2, 2, 1, 4, tie_embeddings=True))
        >>> model, params = untie(model, model.init(jax.random.key(0)))
        >>> params["lm_head"]["kernel"].shape
        (8, 32)
    """
    if not model.config.tie_embeddings:
        return model, dict(params)
    check_mapping(params, "params", "the parameters of this model")
    check_float(params, "untie")
    try:
        embedding = params["model"]["embed_tokens"]["embedding"]
    except (KeyError, TypeError):
        raise ValueError(
            "untie: model/embed_tokens/embedding: expected the embedding of a Model, missing"
        ) from None
    head = {"kernel": jnp.transpose(embedding)}
    if model.config.head_bias:
        head["bias"] = jnp.zeros(model.config.vocab_size, embedding.dtype)
    config = replace(model.config, tie_embeddings=False)
    return replace(model, config=config), {**params, "lm_head": head}
