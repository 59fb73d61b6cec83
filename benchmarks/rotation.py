"""Rotations at run time: what they cost a prefill, and what they give activations of 4 bits.

    python benchmarks/rotation.py --record benchmarks/records/rotation.json

The prefill is SmolLM2's. Activations of 4 bits are judged on weights that were trained in float,
because SmolLM2's come from a file of 4 bits, whose grid a rotation leaves: on all-MiniLM-L6-v2, and
on the language model of `small_lm.py`, which is trained here first.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_lm import BATCH, TOKENS, small_model, text_bytes, trained

import sqjax as sq
from sqjax.commands.defaults import ENCODER, MODEL
from sqjax.commands.embeddings import agreement_of, sentences
from sqjax.commands.records import (
    Row,
    check_writable,
    make_record,
    write_record,
)
from sqjax.models.evaluation.perplexity import perplexity, windows

PROMPT = 512
#: The rotations of what a down projection reads: 1536 channels of SmolLM2.
ROTATIONS: dict[str, sq.weights.schemes.Rotation | None] = {
    "none": None,
    "all channels": "hadamard",
    "blocks of 256": 256,
    "blocks of 64": 64,
}
#: What stays float: the embeddings and the head.
FLOATS = {"embed_tokens|lm_head": None}
#: W4A4_ROTATED with a zero point for each token.
ROTATED_WITH_ZEROS = sq.W4A4_ROTATED.replace(
    activation=sq.PerToken(format="int4", zero_point=True)
)

# What it costs ------------------------------------------------------------------------------------


def prefills(repeats: int) -> list[Row]:
    """A row for each rotation: what an int8 prefill takes, by the median of runs in turns.

    The seconds of the cores are beside those of the clock, because others may use the machine.
    """
    model, params = sq.models.load(MODEL)
    ids = jnp.asarray(np.arange(PROMPT)[None] % 1000, jnp.int32)
    stats = sq.calibrate(model.apply, params, [ids[:, :64]])
    cache = model.init_cache(1, PROMPT)
    runs: dict[str, Callable[[], Any]] = {}
    for name, rotation in ROTATIONS.items():
        rules = {"down_proj": sq.W8A8.replace(rotation=rotation), ".*": sq.W8A8}
        qparams = sq.quantize(params, stats, rules)
        decode = jax.jit(sq.quantized(model.decode))
        runs[name] = partial(decode, qparams, ids, cache)
    rows: list[Row] = []
    for name, found in in_turns(runs, repeats).items():
        clock, cores = map(float, np.median(found, axis=0))
        row: Row = {"table": "prefill", "rotation": name}
        row |= {"seconds": clock, "core_seconds": cores}
        print(row, flush=True)
        rows.append(row)
    return rows


def in_turns(
    runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, np.ndarray]:
    """{name: (repeats, 2): the seconds of each run by the clock and of all cores}."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            clock, cores = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            taken = time.perf_counter() - clock, time.process_time() - cores
            found[name].append(taken)
    # Without the first run, which compiles.
    return {name: np.array(times[1:]) for name, times in found.items()}


# What it gives ------------------------------------------------------------------------------------


def recipes(
    params: Any, stats: sq.Stats, floats: Mapping[str, None]
) -> dict[str, Callable[[], Any]]:
    """{recipe: a function that makes its quantized parameters}, all of W4A4 in groups of 128."""
    plain = {**floats, ".*": sq.W4A4}
    turned = {**floats, ".*": sq.W4A4_ROTATED}
    with_zeros = {**floats, ".*": ROTATED_WITH_ZEROS}

    def smoothed() -> Any:
        s = sq.scales(params, stats, 0.5)
        folded = sq.fold(params, stats.graph, s)
        return sq.gptq(folded, sq.fold_stats(stats, s), plain)

    return {
        "rounding": lambda: sq.quantize(params, stats, plain),
        "gptq": lambda: sq.gptq(params, stats, plain),
        "alpha 0.5, gptq": smoothed,
        "search": lambda: sq.quantize_by_search(params, stats, plain),
        "rotated, rounding": lambda: sq.quantize(params, stats, turned),
        "rotated, gptq": lambda: sq.gptq(params, stats, turned),
        "rotated, zero points, gptq": lambda: sq.gptq(
            params, stats, with_zeros
        ),
        "rotated, search": lambda: sq.quantize_by_search(params, stats, turned),
    }


def of_encoder() -> list[Row]:
    """A row for each recipe: 1 - the mean cosine between its vectors and the float model's."""
    encoder, params = sq.models.load_encoder(ENCODER)
    stats = sq.calibrate(
        encoder.embed,
        params,
        encoder.batches(sentences("calibration", 128)),
        mask=lambda _, mask: mask,
        gram=True,
        sample=512,
    )
    evaluation = sentences("evaluation", 512)
    exact = encoder.encode(params, evaluation)
    rows = []
    for name, make in recipes(params, stats, {}).items():
        mean, *_ = agreement_of(encoder.encode(make(), evaluation), exact)
        rows.append(_row("all-MiniLM-L6-v2", name, 1 - mean))
    return rows


def of_language_model(minutes: float) -> list[Row]:
    """A row for each recipe: by how many nats a token the loss grows."""
    model = small_model()
    params, _ = trained(model, minutes)
    text = windows(text_bytes("calibration"), TOKENS, 64)
    batches = list(text.reshape(-1, BATCH, TOKENS))
    judged = windows(text_bytes("evaluation"), TOKENS, 60)
    exact = perplexity(model, params, judged)
    calibrate = partial(sq.calibrate, model.apply, gram=True, sample=512)
    stats = calibrate(params, batches)
    made = recipes(params, stats, FLOATS)
    made |= at_run_time_where_needed(params, stats, calibrate, batches)
    rows = []
    for name, make in made.items():
        loss = math.log(perplexity(model, make(), judged) / exact)
        rows.append(_row("small language model", name, loss))
    return rows


def at_run_time_where_needed(
    params: Any, stats: sq.Stats, calibrate: Callable[..., Any], batches: Any
) -> dict[str, Callable[[], Any]]:
    """The recipe that turns the leaves where it can, and rotates at run time where it must."""
    rules = {**FLOATS, "down_proj": sq.W4A4_ROTATED, ".*": sq.W4A4}

    def make() -> Any:
        rotated = sq.rotate(params, stats)
        return sq.gptq(rotated, calibrate(rotated, batches), rules)

    return {"`rotate`, down_proj at run time, gptq": make}


def _row(model: str, recipe: str, loss: float) -> Row:
    print(f"{model}, {recipe}: {loss:.4f}", flush=True)
    return {"table": "W4A4", "model": model, "recipe": recipe, "loss": loss}


def main() -> None:
    """Prints the rows, and writes the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if options.record is not None:
        check_writable(options.record)
    start = time.perf_counter()
    rows = prefills(options.repeats)
    rows += of_encoder()
    rows += of_language_model(options.minutes)
    if options.record is not None:
        command = ["python", "benchmarks/rotation.py"]
        seconds = time.perf_counter() - start
        write_record(options.record, make_record(command, rows, seconds))


if __name__ == "__main__":
    main()
