"""Whether smoothing and rotation leave float models of many families what they are.

    python benchmarks/exactness.py --record benchmarks/records/exactness.json

The models are the tiny random checkpoints of the tests, whose norms have random gains. Nothing is
quantized. A figure is the relative change of the logits, max|after - before| / max|before|, in
float32; it should be 0, but for rounding.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sqjax as sq
from sqjax import models
from sqjax.commands.layouts import exactness, text
from sqjax.commands.records import Row, make_record, write_record

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import exactness_decoders
import tiny_checkpoint

#: What llm-compressor 0.14 does, measured once in its own code on tiny random float models without
#: quantization, and frozen here: {family: relative change of the logits, which should be 0}. Its
#: SmoothQuant takes a wrong norm or forgets a router; it was exact for 14 other families.
THEIR_SMOOTHQUANT = {
    "Gemma 2": 0.60,
    "Gemma 3": 0.58,
    "Qwen3.5-MoE": 0.87,
    "OLMoE": 0.24,
    "GLM4-MoE": 0.17,
    "AFMoE": 0.16,
}
#: Its SpinQuant centres the rows of the embedding, which only a LayerNorm allows.
THEIR_SPINQUANT = {"Llama": 0.315}

#: {family: the checkpoint in tests/models/vectors/decoders}.
CHECKPOINTS = {
    "Llama": "llama",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3_text",
    "OLMoE": "olmoe",
    "Mixtral": "mixtral",
    "Qwen2-MoE": "qwen2_moe",
    "Qwen3-MoE": "qwen3_moe",
    "DeepSeek-V2": "deepseek_v2",
    "Qwen3": "qwen3",
    "Phi-3": "phi3",
    "GLM4": "glm4",
    "Gemma": "gemma",
    "OLMo 2": "olmo2",
    "Cohere": "cohere",
    "OPT": "opt",
    "BLOOM": "bloom",
}
NOT_READ = ("Qwen3.5-MoE",)


class Case(NamedTuple):
    """A float model: its function, its parameters, and the same with a head of its own."""

    fn: Callable[..., Any]
    params: Any
    untied: tuple[Callable[..., Any], Any] | None
    vocabulary: int


def checkpoint(name: str) -> Case:
    """One of the tests' checkpoints, read as any other is."""
    case = tiny_checkpoint.load(name)
    with tempfile.TemporaryDirectory() as folder:
        version = min(case["configs"])
        written = tiny_checkpoint.write(case, Path(folder) / "model", version)
        model, params = models.load(written)
    untied = None
    if model.config.tie_embeddings:
        own, tree = models.untie(model, params)
        untied = own.apply, tree
    return Case(model.apply, params, untied, model.config.vocab_size)


def measured(case: Case) -> Row:
    """The figures of one model."""
    rng = np.random.default_rng(0)
    seen, ids = jnp.asarray(rng.integers(0, case.vocabulary, (2, 4, 12)))
    fn, params = case.fn, case.params
    stats = sq.calibrate(fn, params, [seen])
    smoothed = sq.smooth(params, stats, 0.5)
    smooth_error = change(fn, params, smoothed, ids)

    groups = sq.prove(fn, params, stats, ids[:1, :6])
    if case.untied is not None:
        fn, params = case.untied
        stats = sq.calibrate(fn, params, [seen])
    spaces = stats.graph.spaces
    proof = sq.prove(fn, params, stats, ids[:1, :6], spaces=spaces)
    refused = {
        space.name: dict(proof.refused)[f"rotation of {space.name}"]
        for space in spaces
        if f"rotation of {space.name}" not in proof.held
    }
    if refused:
        check_refusal(params, stats)
    matrices = sq.rotations(stats)
    allowed = {k: q for k, q in matrices.items() if k not in refused}
    rotated = sq.rotate(params, stats, allowed)
    return {
        "smooth_error": smooth_error,
        "groups": len(groups.held),
        "all_groups": len(groups.held) + len(groups.refused),
        "rotate_error": change(fn, params, rotated, ids),
        "spaces": len(allowed),
        "all_spaces": len(spaces),
        "untied": case.untied is not None,
        "refused": next(iter(refused.values()), ""),
    }


def change(fn: Any, params: Any, after: Any, ids: Any) -> float:
    """The relative change of the logits."""
    run = jax.jit(fn)
    before = run(params, ids)
    difference = jnp.abs(run(after, ids) - before).max()
    return float(difference / jnp.abs(before).max())


def check_refusal(params: Any, stats: Any) -> None:
    """What the proof refuses, `rotate` must refuse too."""
    try:
        sq.rotate(params, stats)
    except ValueError:
        return
    raise RuntimeError("rotate: expected a refusal, as of prove, got none")


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--only", nargs="*", help="families, by name")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    cases = {name: lambda f=f: checkpoint(f) for name, f in CHECKPOINTS.items()}
    for name, make in exactness_decoders.DECODERS.items():
        cases[name] = lambda make=make: Case(*make())
    names = sorted(
        [*cases, *NOT_READ],
        key=lambda name: name not in THEIR_SMOOTHQUANT | THEIR_SPINQUANT,
    )
    rows = []
    for name in options.only or names:
        theirs = {
            "their_smoothquant": THEIR_SMOOTHQUANT.get(name),
            "their_spinquant": THEIR_SPINQUANT.get(name),
        }
        ours = measured(cases[name]()) if name in cases else {}
        rows.append({"family": name, **theirs, **ours})
        print(rows[-1], flush=True)
    print(text(exactness(rows)))
    if options.record:
        run = ["python", "benchmarks/exactness.py"]
        seconds = time.perf_counter() - begin
        write_record(options.record, make_record(run, rows, seconds))
    return rows


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "calibrate: ")  # few tokens for experts
    main(sys.argv[1:])
