"""The work of `sqjax rotate`: a model whose activations are rotated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sqjax import models
from sqjax.calibration.calibrate import calibrate
from sqjax.commands.model_argument import Opened
from sqjax.commands.options import Talk
from sqjax.methods.rotation import rotate

#: A graph is the same for texts of any length, so the shortest will do.
_TOKENS = 8


class Rotated(NamedTuple):
    """A rotated model.

    Attributes:
        model: the model, whose head is a leaf of its own where `untied`.
        params: its parameters.
        spaces: the names of what was rotated.
        untied: whether the head was its embedding before.
    """

    model: Any
    params: Any
    spaces: tuple[str, ...]
    untied: bool


def rotated(opened: Opened, how: str, seed: int, talk: Talk) -> Rotated:
    """The model of float parameters, rotated in every space that its program has.

    Raises:
        ValueError: it has none, with the reason of each site.
    """
    model, params = opened.model, opened.params
    untied = not opened.is_encoder and model.config.tie_embeddings
    if untied:
        model, params = models.untie(model, params)
    talk.note("looking for what may be rotated; compiling comes first")
    ids = jnp.zeros((1, _TOKENS), jnp.int32)
    if opened.is_encoder:
        inputs: tuple[jax.Array, ...] = (ids, jnp.ones_like(ids, bool))
        stats = calibrate(model.embed, params, [inputs])
    else:
        stats = calibrate(model.apply, params, [ids])
    made = rotate(params, stats, how, seed=seed)
    spaces = tuple(space.name for space in stats.graph.spaces)
    return Rotated(model, made, spaces, untied)
