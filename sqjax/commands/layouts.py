"""What each table looks like: its columns, and how a record's rows become its cells.

The commands print these tables when they end, and `python -m sqjax.commands.tables` puts the same
ones into Markdown. Each function here takes rows as a record holds them (`sqjax.commands.records`)
and returns a `Table`, which has two forms, `text` and `markdown`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sqjax.commands.records import Row

#: Keys of measured times end so; what stands before is the column's title.
SECONDS = " seconds"
#: So many standard errors to each side of a mean hold 95% of a normal distribution.
NORMAL_95 = 1.96
#: The row of qwix's int8, and the rows that quantize what it quantizes.
QWIX = "qwix int8"
LIKE_QWIX = ("W8A8_O1", "W8A8_O1 fused", "W8A8_O3", "W8A8_O3 fused")


class Table(NamedTuple):
    """The titles of the columns, and the cells of each line, one for each title."""

    titles: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


def text(table: Table) -> str:
    """The table for a terminal: the first column on the left, the others aligned on the right."""
    rows = [table.titles, *table.lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        aligned = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            aligned.append(cell.rjust(width))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """The table as Markdown."""
    rows = [table.titles, ("---",) * len(table.titles), *table.lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# The demo and the schemes ---------------------------------------------------------------------


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


# The benchmark --------------------------------------------------------------------------------


def models(rows: Sequence[Row]) -> Table:
    """Prefill and decode of the first model that was measured, as ratios to float32."""
    of_models = _of_table("model", rows)
    first = of_models[0]["model"]
    return speeds([row for row in of_models if row["model"] == first])


def matvecs(rows: Sequence[Row]) -> Table:
    """One row of activations times a large weight, as ratios to float32."""
    return speeds(_of_table("matvec", rows))


def matmuls(rows: Sequence[Row]) -> Table:
    """A square W8A8 matmul, as ratios to the int8 `dot_general` alone."""
    return speeds(_of_table("matmul", rows))


def _of_table(name: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of one of a record's tables."""
    return [row for row in rows if row["table"] == name]


def speeds(rows: Sequence[Row]) -> Table:
    """Times in milliseconds and how many times as fast as the first line; then ratios to qwix.

    A row that could not be measured holds a "note" that says why. It fills the first cell.
    For example {"name": "float32", "decode seconds": 0.04} and {"name": "W8A8_O1",
    "decode seconds": 0.02} become "1.00x (40.00)" and "2.00x (20.00)" under "decode".
    """
    keys = [key for key in rows[0] if key.endswith(SECONDS)]
    titles = ("", *(key.removesuffix(SECONDS) for key in keys))
    lines = []
    for row in rows:
        lines.append((row["name"], *_speeds_of(row, rows[0], keys)))
    return Table(titles, [*lines, *_ratios_to_qwix(rows, keys)])


def _speeds_of(row: Row, first: Row, keys: Sequence[str]) -> list[str]:
    """The cells of one row: ratios to the first row, and milliseconds."""
    if "note" in row:
        return [row["note"], *[""] * (len(keys) - 1)]
    cells = []
    for key in keys:
        ratio = times(first[key] / row[key])
        cells.append(f"{ratio} ({1e3 * row[key]:.2f})")
    return cells


def _ratios_to_qwix(
    rows: Sequence[Row], keys: Sequence[str]
) -> list[tuple[str, ...]]:
    """A line for each row that quantizes as qwix does; none where qwix was not measured."""
    measured = {row["name"]: row for row in rows if "note" not in row}
    if QWIX not in measured:
        return []
    of_qwix = measured[QWIX]
    lines = []
    for name in filter(measured.__contains__, LIKE_QWIX):
        seconds = measured[name]
        ratios = [times(of_qwix[key] / seconds[key]) for key in keys]
        lines.append((f"{name} to qwix", *ratios))
    return lines


# Decoding -------------------------------------------------------------------------------------


def caches(rows: Sequence[Row]) -> Table:
    """Perplexity through each format of the cache, beside that of the same weights without one.

    The line without a cache shows perplexities, the others by how much they change it.
    """
    titles = ("cache", "bytes a token", "float32 weights", "W8A8 weights")
    perplexities: dict[str, dict[str, float]] = {}
    bytes_per_token: dict[str, float] = {}
    for row in _of_table("caches", rows):
        of_cache = perplexities.setdefault(row["cache"], {})
        of_cache[row["weights"]] = row["perplexity"]
        bytes_per_token[row["cache"]] = row["bytes_per_token"]
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


def steps(rows: Sequence[Row]) -> Table:
    """One decode step of W8A8 with an int8 cache beside one of float32, at each batch and context.

    The floor is what reading the W8A8 weights and the cache takes at the speed of a copy.
    """
    titles = (
        "batch",
        "tokens in the cache",
        "float32",
        "W8A8, int8 cache",
        "ratio",
        "floor",
    )
    cases: dict[tuple[int, int], dict[str, Row]] = {}
    for row in _of_table("steps", rows):
        case = row["batch"], row["context_tokens"]
        cases.setdefault(case, {})[row["weights"]] = row
    lines = []
    for batch, context in sorted(cases):
        by_weights = cases[batch, context]
        float32 = by_weights["float32"]["seconds_per_step"]
        int8 = by_weights["W8A8"]["seconds_per_step"]
        floor = by_weights["W8A8"]["floor_seconds_per_step"]
        figures = (
            milliseconds(float32),
            milliseconds(int8),
            times(float32 / int8),
        )
        lines.append((str(batch), str(context), *figures, milliseconds(floor)))
    return Table(titles, lines)


# A GPU ----------------------------------------------------------------------------------------

#: Kernels of a product that starts from int8 activations: patterns of their rows' part and name, in
#: which SHAPE stands for the shape. Where one was tried with several block sizes, the fastest is
#: shown.
GPU_KERNELS = {
    "bfloat16, PyTorch": r"torch SHAPE torch bf16$",
    "int8 without scales, PyTorch `_int_mm`": r"torch SHAPE torch _int_mm$",
    "W8A8, XLA": r"mosaic W8A8 SHAPE XLA$",
    "W8A8, `sqjax.triton.matmul`": r"pallas SHAPE W8A8 \(",
    "W8A8, Triton by hand": r"torch SHAPE triton W8A8 \(",
    "W8A8, Mosaic prototype": r"mosaic (W8A8 SHAPE (?!XLA)|swapped SHAPE W8A8 )",
    "W4A16 in groups, `sqjax.triton.matmul`": r"pallas SHAPE W4A16 \(",
    "W4A16 in groups, Mosaic prototype": r"mosaic swapped SHAPE W4A16 groups ",
}


def gpu_matmuls(rows: Sequence[Row]) -> Table:
    """The kernels' time of one product, 4,096 to 14,336 channels, for some numbers of rows."""
    times_of: dict[str, dict[int, float]] = {}
    compared = [row for row in rows if "to_bf16" in row]
    for row in compared:
        shape, _, name = row["name"].partition(" ")
        count, _, channels = shape.partition("x")
        if channels == "4096x14336":
            times_of.setdefault(name, {})[int(count)] = row["us"]
    counts = sorted(times_of["bf16"])
    titles = (
        "",
        *(f"{count} rows".replace("1 rows", "1 row") for count in counts),
    )
    lines = []
    for name, by_count in times_of.items():
        cells = []
        for count in counts:
            ratio = times(times_of["bf16"][count] / by_count[count])
            cells.append(f"{ratio} ({by_count[count]:.0f} us)")
        lines.append((name, *cells))
    return Table(titles, lines)


def gpu_model(rows: Sequence[Row]) -> Table:
    """The kernels' time of a prefill and of a decode step, as ratios to bfloat16."""
    cases = ("prefill 2048", "decode 1")
    measured: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["part"] == "model" and "kernel_ms" in row:
            case, _, name = row["name"].rpartition(" ")
            measured.setdefault(name, {})[case] = row["kernel_ms"]
    lines = []
    for name, by_case in measured.items():
        cells = []
        for case in cases:
            if case in by_case:
                ratio = times(measured["bf16"][case] / by_case[case])
                cells.append(f"{ratio} ({by_case[case]:.2f} ms)")
            else:
                cells.append("not measured")
        lines.append((name, *cells))
    return Table(("", "prefill of 2,048 tokens", "one decode step"), lines)


def gpu_kernels(rows: Sequence[Row]) -> Table:
    """Kernels of one product beside each other, at 2,048 and at 16 rows."""
    counts = (2048, 16)
    lines = []
    for label, pattern in GPU_KERNELS.items():
        cells = []
        for count in counts:
            named = pattern.replace("SHAPE", f"{count}x4096x14336")
            cells.append(_fastest(rows, named))
        lines.append((label, *cells))
    return Table(("", "2048 rows", "16 rows"), lines)


def _fastest(rows: Sequence[Row], pattern: str) -> str:
    """The least time of the rows whose part and name match; nothing where none does."""
    found = []
    for row in rows:
        if "us" in row and re.match(pattern, f"{row['part']} {row['name']}"):
            found.append(row["us"])
    return f"{min(found):.0f} us" if found else ""


# Convolutions ---------------------------------------------------------------------------------


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


def convolution_speeds(rows: Sequence[Row]) -> Table:
    """A line for each convolution: float32, XLA's int8, ours; the last with its ratio to float."""
    titles = ("convolution", "float32", "int8 by XLA", "W8A8", "to float32")
    lines = []
    for row in rows:
        if "convolution" not in row:
            continue  # a row of the models
        seconds = [
            row[f"{name}_seconds"] for name in ("float", "xla_int8", "ours")
        ]
        cells = map(milliseconds, seconds)
        ratio = times(seconds[0] / seconds[2])
        lines.append((row["convolution"], *cells, ratio))
    return Table(titles, lines)


# Peers ----------------------------------------------------------------------------------------


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
    for row in _of_table("pairs", rows):
        difference = row["loss_difference"]
        half = NORMAL_95 * row["standard_error"]
        cells = [row["scheme"]]
        for side, whose in (("theirs", "their"), ("ours", "our")):
            perplexity = f"{row[f'{whose}_perplexity']:.3f}"
            cells += [row[side], perplexity, f"{row[f'{whose}_seconds']:.0f}"]
        interval = f"{difference:+.4f} ± {half:.4f}"
        lines.append((*cells, interval, _standing(difference, half)))
    return Table(titles, lines)


#: {row of `benchmarks/peers/ours.py`: what it is called}, in the order of the table.
_CHOICES = {
    "float": "float32",
    "w8a8-rounding": "W8A8, rounding",
    "w8a8-smooth": "W8A8, alpha 0.8",
    "w8a8-search": "W8A8, `search_alpha`",
    "w8a8-by-search": "W8A8, `quantize_by_search`",
    "w8a8-rotated-by-search": "W8A8, `rotate` and `quantize_by_search`",
    "w8a8-o2-rounding": "W8A8_O2, rounding",
    "w8a8-o2-smooth": "W8A8_O2, alpha 0.8",
    "w8a8-o2-by-search": "W8A8_O2, `quantize_by_search`",
    "w8a8-o2-rotated-by-search": "W8A8_O2, `rotate` and `quantize_by_search`",
    "w8a8-o3-rounding": "W8A8_O3, rounding",
    "w8a8-o3-smooth": "W8A8_O3, alpha 0.8",
    "w8a8-o3-by-search": "W8A8_O3, `quantize_by_search`",
    "w8a8-o3-rotated-by-search": "W8A8_O3, `rotate` and `quantize_by_search`",
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
}


def choices(rows: Sequence[Row]) -> Table:
    """A line for each of our own rows: what choosing from data gives, and what it costs."""
    of_name = {row["name"]: row for row in _of_table("ours", rows)}
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
        changes = np.asarray(row["losses"]) - exact
        error = changes.std(ddof=1) / math.sqrt(len(changes))
        more = 100 * math.expm1(changes.mean())
        spread = f"{more:.2f}% ± {100 * NORMAL_95 * error:.2f}%"
        lines.append((label, perplexity, spread, seconds))
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


def rotation_costs(rows: Sequence[Row]) -> Table:
    """A line for each rotation at run time: what a prefill takes, and how much more that is."""
    of_prefill = _of_table("prefill", rows)
    titles = ("rotated before down_proj", "core seconds", "more than none")
    first = of_prefill[0]["core_seconds"]
    lines = []
    for row in of_prefill:
        seconds = row["core_seconds"]
        more = f"{100 * (seconds / first - 1):+.1f}%"
        lines.append((row["rotation"], f"{seconds:.3f}", more))
    return Table(titles, lines)


def rotation_gains(rows: Sequence[Row]) -> Table:
    """A line for each recipe of W4A4, a column for each model: the loss beside float."""
    losses: dict[str, dict[str, float]] = {}
    for row in _of_table("W4A4", rows):
        losses.setdefault(row["recipe"], {})[row["model"]] = row["loss"]
    models = list(
        dict.fromkeys(row["model"] for row in _of_table("W4A4", rows))
    )
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


# Cells ----------------------------------------------------------------------------------------


#: What each job of the memory benchmark does.
_JOBS = {
    "nothing": "import sqjax, run a tiny program",
    "calibration": "calibrate_layers, bfloat16, 256 tokens",
    "prefill": "load_quantized to W8A8, prefill of 64 tokens",
}


def memory(rows: Sequence[Row]) -> Table:
    """A line for each job: the most that was resident, beside the model's size in other forms."""
    titles = (
        "",
        "peak MB",
        "model in float32, MB",
        "in int8",
        "one layer in float32",
    )
    lines = []
    for row in rows:
        parameters, layer = row["parameters"], row["parameters_of_a_layer"]
        lines.append(
            (
                _JOBS[row["job"]],
                megabytes(row["peak_bytes"]),
                megabytes(4 * parameters),
                megabytes(parameters),
                megabytes(4 * layer),
            )
        )
    return Table(titles, lines)


def times(ratio: float) -> str:
    """A ratio of speeds: "1.25x"."""
    return f"{ratio:.2f}x"


def megabytes(count: int) -> str:
    """A number of bytes, in millions."""
    return f"{count / 1e6:.0f}"


def milliseconds(seconds: float) -> str:
    """A time: "12.3 ms"."""
    return f"{1e3 * seconds:.1f} ms"


#: The tables by the names that marks in Markdown give them.
LAYOUTS: dict[str, Callable[[Sequence[Row]], Table]] = {
    "memory": memory,
    "demo": demo,
    "schemes": schemes,
    "embeddings": embeddings,
    "benchmark": models,
    "benchmark rows": matvecs,
    "benchmark matmul": matmuls,
    "decode caches": caches,
    "decode steps": steps,
    "gpu matmuls": gpu_matmuls,
    "gpu model": gpu_model,
    "gpu kernels": gpu_kernels,
    "convolutional models": convolutional_models,
    "convolution speeds": convolution_speeds,
    "peers": peers,
    "choices": choices,
    "int4 encoder": int4_encoder,
    "exactness": exactness,
    "rotation costs": rotation_costs,
    "rotation gains": rotation_gains,
}
