"""`sqjax bench embeddings`: a real encoder of sentences in int8, by what its vectors say."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats
from sqjax.commands import layouts_of_quality as layouts
from sqjax.commands.cells import text
from sqjax.commands.defaults import ALPHA, ENCODER
from sqjax.commands.records import as_dicts
from sqjax.commands.shared import check_alpha, shipped, where
from sqjax.folding.apply import fold
from sqjax.methods.quantization import quantize
from sqjax.methods.smoothing import fold_stats, scales
from sqjax.models import load_encoder
from sqjax.models.encoder import Encoder
from sqjax.report.timing import interleaved
from sqjax.weights.schemes import W8A8_O1, W8A8_O3, W8A16, Scheme
from sqjax.weights.sizes import weight_bytes

#: Sentences in a batch: many, because each shape of a batch is a program to compile.
BATCH = 64
#: Schemes of int8 activations, each measured in three ways.
INT8: dict[str, Scheme] = {"W8A8 O1": W8A8_O1, "W8A8 O3": W8A8_O3}


class Size(NamedTuple):
    """How much is done.

    Attributes:
        calibration: sentences of the calibration text.
        evaluation: sentences of the evaluation text.
        repeats: timings of each variant, of which the median is taken.
    """

    calibration: int
    evaluation: int
    repeats: int


FULL = Size(128, 512, 5)
QUICK = Size(64, 64, 3)


class Row(NamedTuple):
    """One line of the table, and one row of the record.

    Attributes:
        name: of the scheme.
        mean_cosine, least_cosine: of the angles between the vectors of float32 and these.
        same_nearest: the share of sentences whose nearest other sentence is the same.
        weight_bytes: of the parameters.
        sentences_per_second: in one batch, from texts to vectors.
    """

    name: str
    mean_cosine: float
    least_cosine: float
    same_nearest: float
    weight_bytes: int
    sentences_per_second: float


def embeddings(
    size: Size = FULL, model_name: str = ENCODER, alpha: float = ALPHA
) -> list[Row]:
    """Quantizes an encoder in every scheme, and prints how far its vectors turn.

    Args:
        size: how much is done.
        model_name: what `sqjax.models.load_encoder` takes.
        alpha: the smoothing strength, from 0 to 1.

    Returns:
        The table's rows, float32 first.

    Raises:
        ValueError: alpha is out of range, there is no such encoder, or it has no tokenizer.
    """
    check_alpha(alpha)
    encoder, params = load_encoder(model_name)
    calibration = sentences("calibration", size.calibration)
    batches = encoder.batches(calibration, batch=BATCH)
    texts = sentences("evaluation", size.evaluation)
    print(where(model_name), flush=True)
    stats = calibrate(
        encoder.embed, params, batches, mask=lambda _, mask: mask, progress=True
    )
    print(_what_folds(stats))

    trees = {"float32": params, **_variants(params, stats, alpha)}
    speeds = _speeds(encoder, trees, texts[:BATCH], size.repeats)

    exact = encoder.encode(params, texts, batch=BATCH)
    rows = []
    for name, tree in tqdm(trees.items(), desc="encoding", unit="scheme"):
        vectors = encoder.encode(tree, texts, batch=BATCH)
        agreement = agreement_of(vectors, exact)
        rows.append(Row(name, *agreement, weight_bytes(tree), speeds[name]))
    print(_table(rows, size, alpha))
    return rows


def _variants(params: Any, stats: Stats, alpha: float) -> dict[str, Any]:
    """{name: parameters} of each scheme: unsmoothed, with what folds, and smoothed at run time.

    In BERT few scales fold, because a norm's output is the residual stream too. At run time every
    matmul's activations can be divided.
    """
    folded = scales(params, stats, alpha)
    smoothed = fold(params, stats.graph, folded)
    smoothed_stats = fold_stats(stats, folded)
    found = {}
    for name, scheme in INT8.items():
        at_run_time = scheme.replace(smoothing=alpha)
        found[f"{name}, unsmoothed"] = quantize(params, stats, scheme)
        found[f"{name}, what folds"] = quantize(
            smoothed, smoothed_stats, scheme
        )
        found[f"{name}, at run time"] = quantize(params, stats, at_run_time)
    found["W8A16"] = quantize(params, stats, W8A16)
    return found


def sentences(name: str, count: int) -> list[str]:
    """The first sentences of a shipped text that have 6 to 60 words.

    Raises:
        ValueError: the text has fewer of them.
    """
    # A sentence may run over several lines.
    prose = " ".join(shipped(name).split())
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", prose):
        if 6 <= len(sentence.split()) <= 60:
            found.append(sentence)
    if len(found) < count:
        raise ValueError(
            f"expected {count} sentences of the {name} text, got {len(found)}"
        )
    return found[:count]


def agreement_of(
    vectors: np.ndarray, exact: np.ndarray
) -> tuple[float, float, float]:
    """How well vectors agree with the exact ones, both (texts, channels).

    Returns:
        The mean and the least cosine between a text's two vectors, and the share of texts whose
        nearest other text is the same.
    """
    ours, theirs = _unit(vectors), _unit(exact)
    cosines = np.sum(ours * theirs, axis=1)
    same = _nearest(ours) == _nearest(theirs)
    return float(cosines.mean()), float(cosines.min()), float(same.mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors divided by their lengths, float64."""
    # In float32 a cosine of 1 would show as 0.9999999.
    wide = vectors.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _nearest(vectors: np.ndarray) -> np.ndarray:
    """The number of the nearest other vector, of each."""
    likeness = vectors @ vectors.T
    # Each is nearest to itself, which says nothing.
    np.fill_diagonal(likeness, -np.inf)
    return np.argmax(likeness, axis=1)


def _what_folds(stats: Stats) -> str:
    """How many matmuls there are, and how many fold groups."""
    graph = stats.graph
    return f"{len(graph.sites)} matmuls; {len(graph.groups)} groups fold, bit for bit"


def _speeds(
    encoder: Encoder,
    trees: dict[str, Any],
    texts: Sequence[str],
    repeats: int,
) -> dict[str, float]:
    """{variant: sentences a second}, medians of runs that take turns."""
    runs = {
        name: lambda tree=tree: encoder.encode(tree, texts, batch=BATCH)
        for name, tree in trees.items()
    }
    seconds = interleaved(runs, repeats, "speed")
    return {name: len(texts) / one for name, one in seconds.items()}


def _table(rows: list[Row], size: Size, alpha: float) -> str:
    """The table and a line that says what was done to get it."""
    done = f"{size.evaluation} sentences; smoothing with alpha {alpha}"
    table = layouts.embeddings(as_dicts(rows))
    return f"\n{done}\n{text(table)}"
