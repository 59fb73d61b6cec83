"""Whole models, tiny ones, through every step of the library."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.calibration.calibrate import calibrate
from sqjax.methods.quantization import quantize
from sqjax.methods.smoothing import fold_stats, scales, smooth
from sqjax.methods.verification import verify
from sqjax.models import (
    DecoderConfig,
    Model,
    generate,
    llama_config,
    stack_layers,
)
from sqjax.models.config import Experts, LayerKind, Norm
from sqjax.proving.proof import prove
from sqjax.runtime.quantized import quantized
from sqjax.weights.schemes import W8A8

_LLAMA = llama_config(256, 64, 160, 2, 4, 2, 16)
_OPT = DecoderConfig(
    *(256, 64, 160, 2, 4, 4, 16),
    tie_embeddings=True,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm=Norm("layer", bias=True),
    kinds=(LayerKind(rope=None),),
    learned_positions=True,
    gated_mlp=False,
    activation="relu",
)
MODELS = {
    "Llama": _LLAMA,
    "OPT": _OPT,
    "MoE": replace(_LLAMA, experts=Experts(4, 2, 64)),
}
#: (rows, tokens) that the models read.
SHAPES = (4, 32), (1, 7)
#: How far a random model's W8A8 logits may be from its float ones, and from those of its layers in
#: a scan: 0.03 is usual, and 0.1 where a router sends a token to another expert.
ALLOWED = 0.2
#: How many of the tokens must be the same where the two best may be as good as each other.
AGREE = 0.75


def relative(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|, of all elements together."""
    difference = np.asarray(found, np.float64) - np.asarray(
        expected, np.float64
    )
    return float(
        np.linalg.norm(difference)
        / np.linalg.norm(np.asarray(expected, np.float64))
    )


def of_model(name: str, shapes: Sequence[tuple[int, int]]) -> Mapping[str, Any]:
    """A model calibrated, proved, smoothed and quantized, run layer by layer and as a scan."""
    model = Model(MODELS[name])
    params = jax.jit(model.init)(jax.random.key(0))
    ids = _ids(SHAPES[0])
    figures: dict[str, Any] = {"holds": False}
    # XLA takes float32 for TF32 on NVIDIA cards unless it is asked for more.
    with jax.default_matmul_precision("highest"):
        stats = calibrate(model.apply, params, [ids])
        proof = prove(model.apply, params, stats.graph, ids[:1, :4], trials=1)
        figures["proved"] = len(proof.held)
        smoothed = smooth(params, stats, 0.5)
        figures["smoothed"] = verify(model.apply, params, smoothed, ids)
        moved = fold_stats(stats, scales(params, stats, 0.5))
        qparams = quantize(smoothed, moved, W8A8)
        run = jax.jit(quantized(model.apply))
        errors, apart = [], []
        for shape in shapes:
            ids = _ids(shape)
            found = run(qparams, ids)
            errors.append(relative(found, run(params, ids)))
            scanned = run(stack_layers(qparams), ids)
            apart.append(relative(scanned, found))
    figures |= {"quantized": max(errors), "scanned": max(apart)}
    within = max(errors + apart) < ALLOWED
    figures["holds"] = proof.holds and bool(proof.held) and within
    return figures


def generation(kinds: Sequence[str]) -> Mapping[str, Any]:
    """Greedy tokens of two prompts through caches of these kinds, as many as were asked for.

    Those through a cache of floats are the ones that the model without a cache finds.
    """
    model = Model(MODELS["Llama"])
    params = jax.jit(model.init)(jax.random.key(0))
    stats = calibrate(model.apply, params, [_ids(SHAPES[0])])
    qparams = quantize(params, stats, W8A8)
    prompts, steps = [[1, 2, 3], [4]], 8
    found = {
        kind: generate(model, qparams, prompts, steps, cache=kind, stop=())
        for kind in kinds
    }
    counts = {len(row) for of in found.values() for row in of.tokens}
    whole = prompts[0] + found["float"].tokens[0]
    logits = jax.jit(quantized(model.apply))(qparams, jnp.asarray([whole]))
    greedy = np.argmax(logits[0, len(prompts[0]) - 1 : -1], -1)
    agree = float(np.mean(greedy == np.asarray(whole[len(prompts[0]) :])))
    return {
        "holds": counts == {steps} and agree >= AGREE,
        "caches": len(found),
        "agree": agree,
    }


def _ids(shape: tuple[int, int]) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, 256)
