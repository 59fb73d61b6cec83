"""What int4 weights cost an encoder of sentences, whose weights were trained in float.

    python benchmarks/int4_encoder.py --record benchmarks/records/int4_encoder.json

SmolLM2's weights come from a file of 4 bits, so what moves them off their grid is punished there.
all-MiniLM-L6-v2's lie on no grid. A row says how far the sentences' vectors turn from the float
model's, and for how many sentences the nearest other one stays the same.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import sqjax as sq
from sqjax.commands.defaults import ENCODER
from sqjax.commands.embeddings import BATCH, agreement_of, sentences
from sqjax.commands.records import (
    Row,
    check_writable,
    make_record,
    write_record,
)

CALIBRATION, EVALUATION = 128, 512
SCHEME = sq.W4A16_G64


def awq(params: Any, stats: sq.Stats, rounded: Callable[..., Any]) -> Any:
    """AWQ's scales and clips, then a rounding."""
    found = sq.awq(params, stats, SCHEME)
    folded = sq.fold(params, stats.graph, found.s)
    after = sq.fold_stats(stats, found.s)
    return rounded(folded, after, SCHEME, clips=found.clips)


RECIPES: dict[str, Callable[[Any, sq.Stats], Any]] = {
    "rounding": lambda params, stats: sq.quantize(params, stats, SCHEME),
    "GPTQ": lambda params, stats: sq.gptq(params, stats, SCHEME),
    "AWQ": lambda params, stats: awq(params, stats, sq.quantize),
    "AWQ and GPTQ": lambda params, stats: awq(params, stats, sq.gptq),
}


def measured() -> list[Row]:
    """A row for each recipe, printed as it is measured."""
    encoder, params = sq.models.load_encoder(ENCODER)
    calibration = sentences("calibration", CALIBRATION)
    evaluation = sentences("evaluation", EVALUATION)
    stats = sq.calibrate(
        encoder.embed,
        params,
        encoder.batches(calibration),
        mask=lambda _, mask: mask,
        gram=True,
    )
    exact = encoder.encode(params, evaluation, batch=BATCH)
    rows: list[Row] = []
    for name, make in RECIPES.items():
        start = time.process_time()
        tree = jax.block_until_ready(make(params, stats))
        seconds = time.process_time() - start
        found = encoder.encode(tree, evaluation, batch=BATCH)
        mean, least, same = agreement_of(found, exact)
        row: Row = {
            "recipe": name,
            "mean_cosine": mean,
            "least_cosine": least,
            "same_nearest": same,
            "core_seconds": round(seconds, 1),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Prints the rows, and writes the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.record is not None:
        check_writable(options.record)
    start = time.perf_counter()
    rows = measured()
    if options.record is not None:
        command = ["python", "benchmarks/int4_encoder.py"]
        seconds = time.perf_counter() - start
        write_record(options.record, make_record(command, rows, seconds))


if __name__ == "__main__":
    main()
