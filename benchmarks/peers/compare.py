"""Puts what `theirs.py` and `ours.py` measured beside each other, window by window.

    python benchmarks/peers/compare.py FOLDER --record benchmarks/records/peers.json

A hard window is hard for both sides, so only the differences of the windows' losses vary: their
mean and its standard error say who predicts the text better, and how sure that is. Of each side the
mean loss, the perplexity and the losses themselves are kept, so that others can compare anew.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sqjax.commands.cells import text
from sqjax.commands.layouts import LAYOUTS
from sqjax.commands.records import (
    Row,
    check_writable,
    make_record,
    write_record,
)

FLOAT = "float"


class Side(NamedTuple):
    """A row of `theirs.py` or `ours.py`, and what it is called in the table."""

    name: str
    label: str


class Pair(NamedTuple):
    """A row of theirs, and a row of ours that answers it; one may have several answers."""

    scheme: str
    theirs: Side
    ours: Side


SMOOTHED = Side("w8a8-compressor-smooth", "llm-compressor, SmoothQuant 0.8")
SMOOTHED_GPTQ = Side(
    "w8a8-compressor-smooth-gptq", "llm-compressor, SmoothQuant 0.8 + GPTQ"
)
SEARCH = Side("w8a8-search", "best alpha of each group")
BY_SEARCH = Side("w8a8-by-search", "best alpha of each group + GPTQ")
OURS_AWQ = Side("w4a16-awq", "AWQ")
W8A8, W4A16 = "W8A8", "W4A16, groups of 64"
PAIRS = (
    Pair(
        "float",
        Side(FLOAT, "transformers"),
        Side(FLOAT, "sqjax"),
    ),
    Pair(
        W8A8,
        Side("w8a8-compressor-rounding", "llm-compressor, rounding"),
        Side("w8a8-rounding", "rounding"),
    ),
    Pair(
        W8A8,
        SMOOTHED,
        Side("w8a8-smooth", "SmoothQuant 0.8"),
    ),
    Pair(W8A8, SMOOTHED, SEARCH),
    Pair(W8A8, SMOOTHED_GPTQ, SEARCH),
    Pair(
        W8A8,
        SMOOTHED_GPTQ,
        BY_SEARCH,
    ),
    Pair(W8A8, Side("w8a8-torchao", "torchao, SmoothQuant 0.5"), SEARCH),
    Pair(
        W8A8,
        Side("w8a8-torchao", "torchao, SmoothQuant 0.5"),
        BY_SEARCH,
    ),
    Pair(
        W4A16,
        Side("w4a16-compressor-rounding", "llm-compressor, rounding"),
        Side("w4a16-rounding", "rounding"),
    ),
    Pair(
        W4A16,
        Side("w4a16-compressor-gptq", "llm-compressor, GPTQ"),
        Side("w4a16-gptq", "GPTQ"),
    ),
    Pair(
        f"{W4A16}, no zero points",
        Side("w4a16-compressor-gptq-symmetric", "llm-compressor, GPTQ"),
        Side("w4a16-gptq-symmetric", "GPTQ"),
    ),
    Pair(
        W4A16,
        Side("w4a16-compressor-awq", "llm-compressor, AWQ"),
        OURS_AWQ,
    ),
    Pair(W4A16, Side("w4a16-autoawq", "AutoAWQ"), OURS_AWQ),
    Pair(
        W4A16,
        Side("w4a16-compressor-awq-gptq", "llm-compressor, AWQ + GPTQ"),
        Side("w4a16-awq-gptq", "AWQ + GPTQ"),
    ),
)


def measured(folder: Path) -> dict[str, Any]:
    """{name: what one side measured of it}."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["name"]] = result
    return found


def difference(ours: Any, theirs: Any) -> tuple[float, float]:
    """The mean of ours - theirs over the windows, and its standard error, in nats a token."""
    changes = np.subtract(ours["losses"], theirs["losses"])
    return float(changes.mean()), float(
        changes.std(ddof=1) / math.sqrt(len(changes))
    )


def pair_rows(ours: dict[str, Any], theirs: dict[str, Any]) -> list[Row]:
    """A row for each pair of which both sides were measured; says what is missing of the others."""
    rows = []
    for pair in PAIRS:
        if pair.ours.name not in ours or pair.theirs.name not in theirs:
            print(f"not measured: {pair.ours.name} | {pair.theirs.name}")
            continue
        sides = ours[pair.ours.name], theirs[pair.theirs.name]
        mean, error = difference(*sides)
        rows.append(
            {
                "table": "pairs",
                "scheme": pair.scheme,
                "theirs": pair.theirs.label,
                "ours": pair.ours.label,
                "their_perplexity": perplexity(sides[1]),
                "our_perplexity": perplexity(sides[0]),
                "their_seconds": sides[1]["seconds"],
                "our_seconds": sides[0]["seconds"],
                "loss_difference": mean,
                "standard_error": error,
            }
        )
    return rows


def side_rows(results: dict[str, Any], side: str) -> list[Row]:
    """What was measured of one side, with the losses of all windows."""
    rows = []
    for result in results.values():
        losses = [round(loss, 6) for loss in result["losses"]]
        kept = {"table": side, "perplexity": perplexity(result)}
        rows.append({**kept, **result, "losses": losses})
    return rows


def perplexity(result: Any) -> float:
    """exp of the mean loss."""
    return float(np.exp(np.mean(result["losses"])))


def main() -> None:
    """Prints the table, and writes the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    ours, theirs = (measured(options.folder / x) for x in ("ours", "theirs"))
    rows = pair_rows(ours, theirs)
    print(text(LAYOUTS["peers"](rows)))
    if options.record is None:
        return
    check_writable(options.record)
    seconds = sum(
        result["seconds"] for side in (ours, theirs) for result in side.values()
    )
    command = ["python", "benchmarks/peers/compare.py", "FOLDER"]
    rows += side_rows(theirs, "theirs") + side_rows(ours, "ours")
    write_record(options.record, make_record(command, rows, seconds))


if __name__ == "__main__":
    main()
