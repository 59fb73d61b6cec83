"""What rotations at run time give activations of 4 bits.

    python benchmarks/rotation.py --record benchmarks/records/rotation.json

Activations of 4 bits are judged on weights that were trained in float, because SmolLM2's come from
a file of 4 bits, whose grid a rotation leaves: on all-MiniLM-L6-v2, and on the language model of
`small_lm.py`, which is trained here first. What rotations cost is measured by `rotation_costs.py`.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from small_lm import BATCH, TOKENS, small_model, text_bytes, trained

import sqjax as sq
from sqjax.commands.defaults import ENCODER
from sqjax.commands.embeddings import agreement_of, sentences
from sqjax.commands.records import (
    Row,
    check_writable,
    make_record,
    write_record,
)
from sqjax.models.evaluation.perplexity import perplexity, windows

#: What stays float: the embeddings and the head.
FLOATS = {"embed_tokens|lm_head": None}
#: W4A4_ROTATED with a zero point for each token.
ROTATED_WITH_ZEROS = sq.W4A4_ROTATED.replace(
    activation=sq.PerToken(format="int4", zero_point=True)
)


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
    options = parser.parse_args()
    if options.record is not None:
        check_writable(options.record)
    start = time.perf_counter()
    rows = of_encoder()
    rows += of_language_model(options.minutes)
    if options.record is not None:
        command = ["python", "benchmarks/rotation.py"]
        command += ["--minutes", f"{options.minutes:g}"]
        seconds = time.perf_counter() - start
        write_record(options.record, make_record(command, rows, seconds))


if __name__ == "__main__":
    main()
