"""What all pictures share: figures without global state, one look, SVG for pages.

Everything is drawn on nothing, with letters and lines of a grey that reads on white and on black.
Colours can be told apart by the colour-blind (they differ in lightness, and lines in their marks),
and no meaning hangs on colour alone.
"""

import io
import re
from collections.abc import Iterable
from typing import Any

#: Letters and axes.
INK = "#757b82"
#: Before and after, or the first scheme and the second; then others.
FIRST, SECOND = "#d8801f", "#3b87c8"
COLOURS = (SECOND, FIRST, "#2a9d73", "#a86cc1", "#7f8894", "#c2577a")
MARKS = ("o", "s", "^", "D", "v", "P")
#: Of surfaces and scales: from dark to light in even steps.
MAP = "viridis"


def matplotlib() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'sqjax[plots]'"
        ) from error
    return matplotlib


def figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """An empty matplotlib Figure on nothing, in inches; pyplot does not know of it."""
    matplotlib()
    # Not pyplot, because that keeps every figure, and chooses a backend for the process.
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout=layout)
    made.patch.set_alpha(0)
    return made


def panels(
    width: float, height: float, rows: int, columns: int, shared: bool = False
) -> Any:
    """(figure, its axes as an array), all with one vertical axis, or each with its own."""
    made = figure(width, height)
    axes = made.subplots(rows, columns, squeeze=False, sharey=shared)
    for one in axes.flat:
        style(one)
    return made, axes


def style(axes: Any) -> None:
    """The look of all axes: grey ink, no box, a faint grid."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)


def name(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Gives axes their title and labels."""
    axes.set_title(plain(title), color=INK, fontsize=9)
    axes.set_xlabel(x, color=INK, fontsize=8)
    axes.set_ylabel(y, color=INK, fontsize=8)


def legend(axes: Any, **settings: Any) -> None:
    """A legend without a box."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, **settings)


def shared_legend(drawn: Any, entries: Any, columns: int) -> None:
    """One legend above all panels, of (handles, labels)."""
    drawn.legend(
        *entries,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )


def plain(text: str) -> str:
    """A text as matplotlib draws it letter by letter: no formula, no hidden line of a legend."""
    return text.replace("$", r"\$").replace("_", " _", text.startswith("_"))


def hidden(axes: Iterable[Any]) -> None:
    """Takes away panels that nothing is drawn in."""
    for one in axes:
        one.set_visible(False)


def svg(drawn: Any, title: str) -> str:
    """A figure as an <svg> element for a page, whose grey is the page's own text colour.

    Args:
        drawn: the figure.
        title: what it shows, for those who can not see it. It must be the page's only one of this
            name, because the names of the picture's parts are made of it.
    """
    # Letters stay letters, so that the page's font draws them; and names inside the picture come
    # from its title, so that the same figure is the same text.
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
    }
    file = io.StringIO()
    with matplotlib().rc_context(settings):
        drawn.savefig(file, format="svg", metadata={"Date": None}, dpi=150)
    text = file.getvalue()
    # Without the declarations, which have no place inside a page, and without what names a DTD.
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Last, because the picture itself knows nothing of the page that it stands in.
    return text.replace(INK, "currentColor").strip()
