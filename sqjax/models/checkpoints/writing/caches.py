"""The scales of a quantized cache in a checkpoint of compressed-tensors."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from sqjax._arguments import expect
from sqjax.files.tensors import NewTensor
from sqjax.models.checkpoints.huggingface import Checkpoint
from sqjax.models.checkpoints.writing.leaves import Leaf
from sqjax.models.decoding.cache_scales import CacheScales

#: The leaf by which a layer's attention is found, in whatever tensor it is.
_KEYS = re.compile(r"model/layers/(\d+)/self_attn/k_proj/kernel")


def cache_scheme(scales: CacheScales) -> dict[str, Any]:
    """The ``kv_cache_scheme`` of config.json: one static scale for each layer's keys or values."""
    return {
        "num_bits": 8,
        "type": "int" if scales.fmt == "int8" else "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    }


def scale_tensors(
    checkpoint: Checkpoint, leaves: Mapping[str, Leaf], scales: CacheScales
) -> dict[str, NewTensor]:
    """The tensors with the scales, beside the projections of each layer's attention.

    Beside ``model.layers.0.self_attn.k_proj.weight`` it is ``model.layers.0.self_attn.k_scale``.

    Raises:
        ValueError: the scales are another model's, or its attention has no keys of heads.
    """
    kind = "scales that sqjax.models.cache_scales gave"
    expect(isinstance(scales, CacheScales), "cache_scales", kind, scales)
    modules = _attention_modules(checkpoint, leaves)
    layers = checkpoint.config.num_layers
    got = len(modules), len(scales.keys), len(scales.values)
    if set(got) != {layers}:
        raise ValueError(
            f"cache_scales: expected scales of {layers} layers with a k_proj each, got "
            f"{got[1]} and {got[2]} scales for {got[0]} such layers"
        )
    made = {}
    for layer, module in modules.items():
        of_layer = {"k": scales.keys[layer], "v": scales.values[layer]}
        for name, scale in of_layer.items():
            # A row of one, as the format has scales of whole tensors.
            array = np.asarray(scale, np.float32).reshape(1)
            read = partial(np.asarray, array)
            made[f"{module}.{name}_scale"] = NewTensor(array.dtype, (1,), read)
    return made


def _attention_modules(
    checkpoint: Checkpoint, leaves: Mapping[str, Leaf]
) -> dict[int, str]:
    """{layer: the name of its attention}."""
    modules = {}
    for name in checkpoint.source.shapes:
        found = checkpoint.family.find(name, leaves)
        for path in found.paths if found else ():
            match = _KEYS.fullmatch(path)
            if match:
                # Without the projection's own name, and "weight".
                modules[int(match[1])] = name.rsplit(".", 2)[0]
    return modules
