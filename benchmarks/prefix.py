"""What a float prefix is worth to SmolLM2 where activations are static, or share one scale.

    python benchmarks/prefix.py --record benchmarks/records/prefix.json

A prefix changes the float model too, so every loss is told twice: against the float model with the
same prefix, and against the one without. The head stays in float.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import sqjax as sq
from sqjax.commands.defaults import MODEL
from sqjax.commands.records import (
    Row,
    check_writable,
    make_record,
    write_record,
)
from sqjax.commands.shared import text_windows

LENGTH = 512
CALIBRATION = 8
SCHEMES = {"W8A8_O3": sq.W8A8_O3, "W8A8_O2": sq.W8A8_O2}
ALPHAS = (0.5, 0.8, "search")
#: Where the first token stands out most.
SITE = "model/layers/11/mlp/down_proj/kernel"


class Case(NamedTuple):
    """The float model with a prefix, or without: its statistics and its perplexity."""

    prefix: Any
    stats: sq.Stats
    perplexity: float


def cases(model: Any, params: Any, windows: np.ndarray) -> dict[str, Case]:
    """Both cases, each printed."""
    texts = jnp.asarray(text_windows(model, "calibration", LENGTH, CALIBRATION))
    batches = [row[None] for row in texts]
    prefix = sq.models.prefix(model, params, batches[:2])
    print("the prefix:", prefix.ids, flush=True)
    before = [prefix.before(ids) for ids in batches]
    stats = {
        "without": sq.calibrate(model.apply, params, batches, sample=512),
        "with": sq.calibrate(
            model.apply, params, before, mask=prefix.mask, sample=512
        ),
    }
    found = {}
    for name, held in (("without", None), ("with", prefix)):
        value = sq.models.perplexity(model, params, windows, prefix=held)
        absmax = np.asarray(stats[name].absmax[SITE])
        ratio = absmax.max() / np.median(absmax)
        print(f"{name}: float {value:.4f}, {SITE}: max / median {ratio:.0f}")
        found[name] = Case(held, stats[name], value)
    return found


def quantized(
    params: Any, case: Case, scheme: sq.Scheme, alpha: Any
) -> tuple[Any, Any]:
    """The quantized tree, and the prefix of the smoothed one."""
    if alpha == "search":
        s = sq.search_alpha(params, case.stats, scheme).s
    else:
        s = sq.scales(params, case.stats, alpha)
    smoothed = sq.fold(params, case.stats.graph, s)
    stats = sq.fold_stats(case.stats, s)
    rules = {"embed_tokens": None, ".*": scheme}
    qparams = sq.quantize(smoothed, stats, rules)
    held = None if case.prefix is None else case.prefix.of(smoothed)
    return qparams, held


def measured(count: int) -> list[Row]:
    """A row for each scheme, alpha and case, printed as it is measured."""
    model, params = sq.models.load(MODEL)
    windows = text_windows(model, "evaluation", LENGTH, count)
    found = cases(model, params, windows)
    rows: list[Row] = []
    for name, scheme in SCHEMES.items():
        for alpha in ALPHAS:
            for which, case in found.items():
                qparams, held = quantized(params, case, scheme, alpha)
                value = sq.models.perplexity(
                    model, qparams, windows, prefix=held
                )
                row: Row = {
                    "scheme": name,
                    "alpha": str(alpha),
                    "prefix": which,
                    "perplexity": value,
                    "loss": value / case.perplexity - 1,
                    "loss_to_plain_float": value / found["without"].perplexity
                    - 1,
                }
                print(row, flush=True)
                rows.append(row)
    return rows


def main() -> None:
    """Prints the rows, and writes the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE.json")
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    if options.record is not None:
        check_writable(options.record)
    start = time.perf_counter()
    rows = measured(options.windows)
    if options.record is not None:
        command = ["python", "benchmarks/prefix.py"]
        seconds = time.perf_counter() - start
        write_record(options.record, make_record(command, rows, seconds))


if __name__ == "__main__":
    main()
