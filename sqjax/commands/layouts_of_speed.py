"""The tables of seconds and bytes: their columns, and how a record's rows become their cells.

Each function takes rows as a record holds them (`sqjax.commands.records`) and returns a `Table`.
"""

import re
from collections.abc import Sequence

from sqjax.commands.cells import (
    Table,
    megabytes,
    milliseconds,
    rows_of,
    times,
)
from sqjax.commands.records import Row

#: Keys of measured times end so; what stands before is the column's title.
SECONDS = " seconds"
#: The row of qwix's int8, and the rows that quantize what it quantizes.
QWIX = "qwix int8"
LIKE_QWIX = ("W8A8_O1", "W8A8_O1 fused", "W8A8_O3", "W8A8_O3 fused")


# The benchmark --------------------------------------------------------------------------------


def models(rows: Sequence[Row]) -> Table:
    """Prefill and decode of the first model that was measured, as ratios to float32."""
    of_models = rows_of("model", rows)
    first = of_models[0]["model"]
    return speeds([row for row in of_models if row["model"] == first])


def matvecs(rows: Sequence[Row]) -> Table:
    """One row of activations times a large weight, as ratios to float32."""
    return speeds(rows_of("matvec", rows))


def matmuls(rows: Sequence[Row]) -> Table:
    """A square W8A8 matmul, as ratios to the int8 `dot_general` alone."""
    return speeds(rows_of("matmul", rows))


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
        # As many cells as any other row has, all but the first empty.
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
    for row in rows_of("steps", rows):
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

NOT_MEASURED = "not measured"

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
            first, own = times_of["bf16"][count], by_count.get(count)
            cells.append(_beside(first, own, "{:.0f} us"))
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
            first, own = measured["bf16"].get(case), by_case.get(case)
            cells.append(_beside(first, own, "{:.2f} ms"))
        lines.append((name, *cells))
    return Table(("", "prefill of 2,048 tokens", "one decode step"), lines)


def gpu_visit(rows: Sequence[Row]) -> Table:
    """A line for each scheme: the kernels' time of each case of a model, as ratios to bfloat16.

    Then the memory of its prefill: all that the program holds, weights and cache included. For rows
    that `sqjax bench gpu` wrote.
    """
    measured: dict[str, dict[str, float]] = {}
    memory: dict[str, float] = {}
    for row in rows:
        if "ms" in row:
            case, _, name = row["name"].rpartition(" ")
            title = f"one layer, {case}" if row["part"] == "layer" else case
            measured.setdefault(title, {})[name] = row["ms"]
            if row["part"] == "model":
                memory[name] = row["program_bytes"]
    names = dict.fromkeys(name for case in measured.values() for name in case)
    lines = []
    for name in names:
        cells = []
        for by_name in measured.values():
            first, own = by_name.get("bf16"), by_name.get(name)
            cells.append(_beside(first, own, "{:.2f} ms"))
        held = megabytes(memory[name]) if name in memory else NOT_MEASURED
        lines.append((name, *cells, held))
    return Table(("", *measured, "MB of a prefill"), lines)


def _beside(first: float | None, own: float | None, shown: str) -> str:
    """A time with its ratio to the first line's: "1.97x (153 us)", if both were measured."""
    if first is None or own is None:
        return NOT_MEASURED
    return f"{times(first / own)} ({shown.format(own)})"


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


def rotation_costs(rows: Sequence[Row]) -> Table:
    """A line for each rotation at run time: what a prefill takes, and how much more that is."""
    of_prefill = rows_of("prefill", rows)
    titles = ("rotated before down_proj", "by the clock", "of the cores")
    lines = []
    for row in of_prefill:
        cells = []
        for of_what in ("seconds", "core_seconds"):
            seconds, first = row[of_what], of_prefill[0][of_what]
            more = 100 * (seconds / first - 1)
            cells.append(f"{seconds:.3f} s, {more:+.1f}%")
        lines.append((row["rotation"], *cells))
    return Table(titles, lines)


def rotation_finding(rows: Sequence[Row]) -> Table:
    """A line for each number of layers: what it takes to trace, to find what folds, to fold it."""
    titles = ("layers", "to trace", "to find", "to fold", "groups", "spaces")
    lines = []
    for row in rows_of("finding", rows):
        of_step = [row[f"{step}_seconds"] for step in ("trace", "find", "fold")]
        seconds = [f"{x:.1f} s" for x in of_step]
        counts = [str(row[name]) for name in ("groups", "spaces")]
        lines.append((str(row["layers"]), *seconds, *counts))
    return Table(titles, lines)


# Convolutions and memory ----------------------------------------------------------------------


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
