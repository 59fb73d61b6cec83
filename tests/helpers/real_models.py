"""A real model, read once; and real models cut to their first layers, which run the same code in a fraction of the
time."""

from dataclasses import replace
from functools import cache

import sqjax as sq


@cache
def smollm2():
    """(model, params) of SmolLM2-135M-Instruct, downloaded if it is not in the cache."""
    return sq.models.load("smollm2-135m")


def first_layers(model, params, count):
    """A decoder of the first layers, whose last one the head reads, and its parameters."""
    names = [str(number) for number in range(count)]
    layers = {name: params["model"]["layers"][name] for name in names}
    cut = {**params, "model": {**params["model"], "layers": layers}}
    return replace(model, config=replace(model.config, num_layers=count)), cut
