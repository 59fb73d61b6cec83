"""The tables of perplexities, errors and other marks of quality, some with speeds beside them.

Each function takes rows as a record holds them (`sqjax.commands.records`) and returns a `Table`.
"""

import math
from collections.abc import Sequence

import numpy as np

from sqjax.commands.cells import Table, megabytes, rows_of, times
from sqjax.commands.records import Row

#: So many standard errors to each side of a mean hold 95% of a normal distribution.
NORMAL_95 = 1.96


# One model in several schemes -----------------------------------------------------------------


def demo(rows: Sequence[Row]) -> Table:
    """A line for each variant; speeds also as ratios to the first line's, float32."""
    titles = ("", "perplexity", "MB", "prefill tok/s", "decode tok/s")
    prefill, decode = "prefill_tokens_per_second", "decode_tokens_per_second"
    lines = []
    for row in rows:
        prefill_ratio = times(row[prefill] / rows[0][prefill])
        decode_ratio = times(row[decode] / rows[0][decode])
        lines.append(
            (
                row["name"],
                f"{row['perplexity']:.2f}",
                megabytes(row["weight_bytes"]),
                f"{row[prefill]:.0f} ({prefill_ratio})",
                f"{row[decode]:.1f} ({decode_ratio})",
            )
        )
    return Table(titles, lines)


def schemes(rows: Sequence[Row]) -> Table:
    """A line for each scheme: perplexity without smoothing and with all fold groups smoothed."""
    titles = ("every matmul, the tied head too", "unsmoothed", "smoothed", "MB")
    lines = []
    for row in rows:
        lines.append(
            (
                row["name"],
                f"{row['unsmoothed_perplexity']:.2f}",
                f"{row['smoothed_perplexity']:.2f}",
                megabytes(row["weight_bytes"]),
            )
        )
    return Table(titles, lines)


def embeddings(rows: Sequence[Row]) -> Table:
    """A line for each scheme: how far the vectors of sentences turn, and the speed."""
    cosine, nearest = "cosine to float32", "same nearest"
    titles = ("", cosine, "the least", nearest, "MB", "sentences/s")
    speed = "sentences_per_second"
    lines = []
    for row in rows:
        ratio = times(row[speed] / rows[0][speed])
        lines.append(
            (
                row["name"],
                f"{row['mean_cosine']:.4f}",
                f"{row['least_cosine']:.4f}",
                f"{100 * row['same_nearest']:.1f}%",
                megabytes(row["weight_bytes"]),
                f"{row[speed]:.0f} ({ratio})",
            )
        )
    return Table(titles, lines)


def caches(rows: Sequence[Row]) -> Table:
    """Perplexity through each format of the cache, beside that of the same weights without one.

    The line without a cache shows perplexities, the others by how much they change it.
    """
    titles = ("cache", "bytes a token", "float32 weights", "W8A8 weights")
    perplexities: dict[str, dict[str, float]] = {}
    bytes_per_token: dict[str, float] = {}
    for row in rows_of("caches", rows):
        of_cache = perplexities.setdefault(row["cache"], {})
        of_cache[row["weights"]] = row["perplexity"]
        bytes_per_token[row["cache"]] = row["bytes_per_token"]
    # What a model has without a cache: the others are compared with it.
    plain = perplexities.pop("none")
    lines: list[tuple[str, ...]] = []
    lines.append(
        ("none", "", f"{plain['float32']:.2f}", f"{plain['W8A8']:.2f}")
    )
    for cache, through_cache in perplexities.items():
        changes = []
        for weights in ("float32", "W8A8"):
            change = through_cache[weights] / plain[weights] - 1
            changes.append(f"{100 * change:+.2f}%")
        lines.append((cache, f"{bytes_per_token[cache]:.0f}", *changes))
    return Table(titles, lines)


def int4_encoder(rows: Sequence[Row]) -> Table:
    """A line for each recipe: how far an encoder's vectors turn."""
    titles = (
        "W4A16_G64",
        "mean cosine",
        "least cosine",
        "same nearest sentence",
        "core seconds",
    )
    lines = []
    for row in rows:
        cosines = f"{row['mean_cosine']:.4f}", f"{row['least_cosine']:.4f}"
        same = f"{100 * row['same_nearest']:.1f}%"
        seconds = f"{row['core_seconds']:.0f}"
        lines.append((row["recipe"], *cosines, same, seconds))
    return Table(titles, lines)


def convolutional_models(rows: Sequence[Row]) -> Table:
    """A line for each model and scheme: images told right, the logits' relative error, the size."""
    titles = ("model", "", "scheme", "right", "logits off by", "MB", "smaller")
    lines = []
    whole: dict[str, int] = {}  # {model: the bytes of its float32 parameters}
    for row in rows:
        if "accuracy" not in row:
            continue  # a row of the speeds
        size = row["weight_bytes"]
        ratio = whole.setdefault(row["model"], size) / size
        lines.append(
            (
                row["model"],
                row["framework"],
                row["scheme"],
                f"{100 * row['accuracy']:.1f}%",
                f"{100 * row['logit_error']:.2f}%",
                f"{size / 1e6:.2f}",
                times(ratio),
            )
        )
    return Table(titles, lines)


# Beside other libraries -----------------------------------------------------------------------


def peers(rows: Sequence[Row]) -> Table:
    """A line for each pair of theirs and ours: perplexities, seconds, and who is ahead.

    The difference of the losses is that of ours to theirs, window by window, with what is added and
    taken away to make an interval of 95%. Ours is ahead where the whole interval is below 0.
    """
    titles = (
        "",
        "theirs",
        "perplexity",
        "core seconds",
        "ours",
        "perplexity",
        "core seconds",
        "ours - theirs, nats a token",
        "",
    )
    lines = []
    for row in rows_of("pairs", rows):
        difference = row["loss_difference"]
        half = NORMAL_95 * row["standard_error"]
        cells = [row["scheme"]]
        for side, whose in (("theirs", "their"), ("ours", "our")):
            perplexity = f"{row[f'{whose}_perplexity']:.3f}"
            cells += [row[side], perplexity, f"{row[f'{whose}_seconds']:.0f}"]
        interval = f"{difference:+.4f} ± {half:.4f}"
        lines.append((*cells, interval, _standing(difference, half)))
    return Table(titles, lines)


def rotation_gains(rows: Sequence[Row]) -> Table:
    """A line for each recipe of W4A4, a column for each model: the loss beside float."""
    losses: dict[str, dict[str, float]] = {}
    for row in rows_of("W4A4", rows):
        losses.setdefault(row["recipe"], {})[row["model"]] = row["loss"]
    models = list(dict.fromkeys(row["model"] for row in rows_of("W4A4", rows)))
    lines = []
    for recipe, found in losses.items():
        cells = [f"{found[m]:.3f}" if m in found else "" for m in models]
        lines.append((recipe, *cells))
    return Table(("W4A4 in groups of 128", *models), lines)


def _standing(difference: float, half: float) -> str:
    """Where ours stands by the interval of difference - half to difference + half."""
    if abs(difference) <= half:
        return "equal within the interval"
    return "ahead" if difference < 0 else "behind"


#: {row of `benchmarks/peers/ours.py`: what it is called}, in the order of the table.
_CHOICES = {
    "float": "float32",
    "float-prefixed": "float32, a prefix",
    "w8a8-rounding": "W8A8, rounding",
    "w8a8-smooth": "W8A8, alpha 0.8",
    "w8a8-search": "W8A8, `search_alpha`",
    "w8a8-by-search": "W8A8, `quantize_by_search`",
    "w8a8-rotated-by-search": "W8A8, `rotate` and `quantize_by_search`",
    "w8a8-prefixed-by-search": "W8A8, a prefix, `rotate` and `prepare_by_search`",
    "w8a8-o2-rounding": "W8A8_O2, rounding",
    "w8a8-o2-smooth": "W8A8_O2, alpha 0.8",
    "w8a8-o2-by-search": "W8A8_O2, `quantize_by_search`",
    "w8a8-o2-rotated-by-search": "W8A8_O2, `rotate` and `quantize_by_search`",
    "w8a8-o2-prefixed-by-search": "W8A8_O2, a prefix, `rotate` and `prepare_by_search`",
    "w8a8-o3-rounding": "W8A8_O3, rounding",
    "w8a8-o3-smooth": "W8A8_O3, alpha 0.8",
    "w8a8-o3-by-search": "W8A8_O3, `quantize_by_search`",
    "w8a8-o3-rotated-by-search": "W8A8_O3, `rotate` and `quantize_by_search`",
    "w8a8-o3-prefixed-by-search": "W8A8_O3, a prefix, `rotate` and `prepare_by_search`",
    "w8a8-o3-rotated-at-run-time": "W8A8_O3_ROTATED, `gptq`",
    "w8a8-o3-prefixed-at-run-time": "W8A8_O3_ROTATED, a prefix and `gptq`",
    "w8a8-o3-learned": "W8A8_O3, `learn`",
    "w4a16-rounding": "W4A16_G64, rounding",
    "w4a16-awq": "W4A16_G64, `awq`",
    "w4a16-gptq": "W4A16_G64, `gptq`",
    "w4a16-awq-gptq": "W4A16_G64, `awq` and `gptq`",
    "w4a16-by-layers": "W4A16_G64, `gptq_blocks`",
    "w4a16-awq-by-layers": "W4A16_G64, `awq` and `gptq_blocks`",
    "w4a16-g128-awq-gptq": "W4A16 (groups of 128), `awq` and `gptq`",
    "w4a8-rounding": "W4A8, rounding",
    "w4a8-by-search": "W4A8, `quantize_by_search`",
    "w4a8-by-search-int8-cache": "W4A8, `quantize_by_search`, int8 cache",
    "w4a8-learned-gptq-int8-cache": "W4A8, `learn` and `gptq`, int8 cache",
}


def choices(rows: Sequence[Row]) -> Table:
    """A line for each of our own rows: what choosing from data gives, and what it costs."""
    of_name = {row["name"]: row for row in rows_of("ours", rows)}
    exact = np.asarray(of_name["float"]["losses"])
    titles = ("", "perplexity", "more than float", "core seconds")
    lines = []
    for name, label in _CHOICES.items():
        if name not in of_name:
            continue
        row = of_name[name]
        perplexity, seconds = (
            f"{row['perplexity']:.3f}",
            f"{row['seconds']:.0f}",
        )
        if name == "float":
            lines.append((label, perplexity, "", ""))
            continue
        # Window by window, because what makes a window hard is the same for both.
        changes = np.asarray(row["losses"]) - exact
        error = changes.std(ddof=1) / math.sqrt(len(changes))
        more = 100 * math.expm1(changes.mean())
        spread = f"{more:.2f}% ± {100 * NORMAL_95 * error:.2f}%"
        lines.append((label, perplexity, spread, seconds))
    return Table(titles, lines)


# Exactness ------------------------------------------------------------------------------------


def exactness(rows: Sequence[Row]) -> Table:
    """A line for each family: how far logits move that should stay, and what is proved.

    `rotate` is of the spaces that are proved; the last column says what stands in the others' way.
    """
    titles = (
        "logits off by",
        "their SmoothQuant",
        "`smooth`",
        "groups proved",
        "their SpinQuant",
        "`rotate`",
        "spaces proved",
        "refused",
    )
    return Table(titles, list(map(_exactness_of, rows)))


def _exactness_of(row: Row) -> tuple[str, ...]:
    """The cells of one family; one that is not read has theirs alone."""
    smooth, spin = row["their_smoothquant"], row["their_spinquant"]
    their_smooth = "" if smooth is None else f"{smooth:.2f}"
    their_spin = "" if spin is None else f"{spin:.3f}"
    if "smooth_error" not in row:
        unread = "not read here"
        return row["family"], their_smooth, unread, "", their_spin, "", "", ""
    rotated = f"{row['rotate_error']:.1e}" if row["spaces"] else "refused"
    untied = ", untied" if row["untied"] and row["spaces"] else ""
    return (
        row["family"],
        their_smooth,
        f"{row['smooth_error']:.1e}",
        f"{row['groups']} of {row['all_groups']}",
        their_spin,
        rotated + untied,
        f"{row['spaces']} of {row['all_spaces']}",
        row["refused"].split(",")[0],
    )
