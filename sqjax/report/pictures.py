"""The pictures: pure functions of numbers that give a matplotlib Figure.

figure = sqjax.plots.outliers(before, after)
figure.savefig("outliers.svg")
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from sqjax._arguments import expect
from sqjax.report.activations import BLOCKS, pooled
from sqjax.report.drawing import (
    COLOURS,
    FIRST,
    INK,
    MAP,
    MARKS,
    SECOND,
    figure,
    hidden,
    legend,
    name,
    panels,
    plain,
    shared_legend,
    style,
)
from sqjax.report.kinds import Kind, kinds, merged


def surface(
    before: Any,
    after: Any,
    *,
    what: str = "|X|",
    rows: str = "token",
    size: tuple[int, int] | None = None,
) -> Any:
    """The paper's picture of one matmul: magnitudes over rows and channels, before and after.

    Figure 4 of Xiao et al. 2022, arXiv 2211.10438. Of a large matrix every block shows its largest
    value, so that a single channel with outliers is seen. Each panel has its own scale, which its
    title says: what is flat on one scale for both is the point, and can not be read.

    Args:
        before: an activation, (tokens, channels), or a weight, (outputs, channels).
        after: the same after smoothing.
        what: the name of the vertical axis.
        rows: what a row is: "token" or "output".
        size: how many rows and channels there are in truth, where the matrices hold blocks.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: the two are no matrices of one shape.
        ImportError: matplotlib is not installed.

    Examples:
        >>> import numpy as np
        >>> from sqjax import plots
        >>> x = np.ones((8, 16)); x[:, 3] = 100
        >>> len(plots.surface(x, x / x.max(0)).axes)
        2
    """
    matrices = [np.asarray(before, np.float32), np.asarray(after, np.float32)]
    shapes = {x.shape for x in matrices}
    fits = len(shapes) == 1 and matrices[0].ndim == 2
    expect(fits, "surface", "two matrices of one shape", list(shapes))
    # The axes count tokens and channels, also where the matrices hold blocks of them.
    size = matrices[0].shape if size is None else size
    drawn = figure(9.0, 3.2, layout=None)
    titles = ("before smoothing", "after smoothing")
    for number, (x, title) in enumerate(zip(matrices, titles, strict=True)):
        place = (0.5 * number, 0.1, 0.47, 0.95)
        # By hand, because no layout of matplotlib knows how much of a box a surface fills.
        axes = drawn.add_axes(place, projection="3d")
        _draw_surface(axes, np.asarray(pooled(x, *BLOCKS)), size)
        middle = 0.5 * number + 0.25
        text = f"{title}: up to {_short(float(x.max()))}"
        drawn.text(middle, 0.94, text, color=INK, fontsize=9, ha="center")
        axes.set_xlabel("channel", color=INK, fontsize=8)
        axes.set_ylabel(rows, color=INK, fontsize=8)
        axes.set_zlabel(what, color=INK, fontsize=8)
    return drawn


def _short(x: float) -> str:
    """Three digits, and of large numbers all: 0.795, 22.4, 2,450."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _draw_surface(axes: Any, x: np.ndarray, size: tuple[int, int]) -> None:
    """Blocks as a surface over the rows and channels that they stand for."""
    rows = np.linspace(0, size[0] - 1, x.shape[0])
    channels = np.linspace(0, size[1] - 1, x.shape[1])
    grid = np.meshgrid(channels, rows)
    # As pixels, because thousands of polygons would make a page slow.
    axes.plot_surface(
        *grid, x, cmap=MAP, rstride=1, cstride=1, linewidth=0, rasterized=True
    )
    axes.patch.set_alpha(0)
    axes.view_init(elev=28, azim=-62)
    axes.set_box_aspect((1.7, 1.1, 0.75), zoom=1.2)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0, 0, 0, 0))
        axis.line.set_color(INK)
    axes.grid(False)
    axes.tick_params(colors=INK, labelsize=7, pad=0)


def outliers(
    before: Mapping[str, float], after: Mapping[str, float] | None = None
) -> Any:
    """The outlier ratio of every site, layer by layer, before smoothing and after.

    The ratio is the largest channel's max |X| over the median channel's: where it is large, one
    scale for all channels wastes the codes. Sites that share an activation are one line.

    Args:
        before: {site: its ratio}, as `sqjax.report.inspect` finds them.
        after: the same of the smoothed model; None for one panel.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: there are no sites, or other ones after.
        ImportError: matplotlib is not installed.

    Examples:
        >>> from sqjax import plots
        >>> ratios = {f"layers/{i}/up/kernel": 2.0 + i for i in range(4)}
        >>> len(plots.outliers(ratios, {path: 1.5 for path in ratios}).axes)
        2
    """
    series = [before] if after is None else [before, after]
    _check_sites("outliers", *series)
    titles = ("before smoothing", "after smoothing")
    drawn, axes = panels(4.6 * len(series), 3.4, 1, len(series))
    # By the values before, so that both panels have the same lines.
    rows = merged(kinds(before), before)
    highest = max(max(values.values()) for values in series)
    ticks = _one_two_five(float(highest) * 1.5)
    for one, values, title in zip(axes[0], series, titles, strict=False):
        _draw_kinds(one, [kind for kind, _ in rows], values)
        one.set_yscale("log")
        one.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        one.minorticks_off()
        one.set_ylim(0.9, highest * 1.3)
        name(one, title, "layer", "max / median of channels")
    handles = axes[0][0].get_legend_handles_labels()
    shared_legend(drawn, handles, columns=min(len(rows), 5))
    return drawn


def _one_two_five(highest: float) -> list[float]:
    """Marks of an axis in powers: 1, 2, 5, 10, 20 ... up to some number; 1, 10, 100 if that is
    large.
    """
    steps = (1, 2, 5) if highest < 200 else (1,)
    powers = range(int(np.log10(max(highest, 1))) + 1)
    marks = [float(step * 10**power) for power in powers for step in steps]
    return [mark for mark in marks if mark <= highest] or [1.0]


def _draw_kinds(
    axes: Any, rows: Sequence[Kind], values: Mapping[str, float]
) -> None:
    """A line for each kind over its layers; a mark at the right for a site that has none."""
    layers = [number for kind in rows for number in kind.numbers]
    # A site that is in no layer stands behind the last.
    last = max(layers, default=0)
    looks = zip(cycle(COLOURS), cycle(MARKS), strict=False)
    for kind, (colour, mark) in zip(rows, looks, strict=False):
        own = list(map(values.__getitem__, kind.paths))
        axes.plot(
            kind.numbers or (last + 1,),
            own,
            marker=mark,
            markersize=3.5,
            linewidth=1,
            color=colour,
            label=plain(kind.label),
        )
    _whole_numbers(axes.xaxis)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def errors(
    first: Mapping[str, float | None],
    second: Mapping[str, float | None],
    names: tuple[str, str] = ("unsmoothed", "smoothed"),
) -> Any:
    """The error of every site's output in decibels, in two schemes side by side.

    A panel for each kind of site, with its layers. Higher is better: 20 dB more are an error 10
    times smaller.

    Args:
        first: {site: snr_db}, as `sqjax.site_errors` gives it. None and infinity are left out.
        second: the same of another scheme, or of the smoothed model.
        names: of the two.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: there are no sites, or other ones in the second.
        ImportError: matplotlib is not installed.

    Examples:
        >>> from sqjax import plots
        >>> snr = {f"layers/{i}/up/kernel": 30.0 - i for i in range(4)} | {"head/kernel": 33.0}
        >>> len(plots.errors(snr, {path: db + 6 for path, db in snr.items()}).axes)
        2
    """
    _check_sites("errors", first, second)
    # One axis of decibels for all panels, because kinds are to be compared, too.
    layered, alone = _layered(first)
    count = len(layered) + bool(alone)
    columns = min(count, 4)
    rows = -(-count // columns)
    size = max(2.35 * columns, 4.2), 0.8 + 1.9 * rows
    drawn, axes = panels(*size, rows, columns, shared=True)
    both = list(zip((first, second), names, (FIRST, SECOND), "os", strict=True))
    for one, kind in zip(axes.flat, layered, strict=False):
        for series in both:
            _dots(one, kind.numbers, kind.paths, "-", *series)
        _whole_numbers(one.xaxis)
        name(one, kind.label, "layer")
    if alone:
        _draw_alone(axes.flat[len(layered)], alone, both)
    for one in axes[:, 0]:
        one.set_ylabel("dB", color=INK, fontsize=8)
    hidden(axes.flat[count:])
    shared_legend(drawn, axes.flat[0].get_legend_handles_labels(), columns=2)
    return drawn


def _draw_alone(axes: Any, alone: Sequence[Kind], both: Sequence[Any]) -> None:
    """The sites that are in no layer, side by side."""
    paths = [kind.paths[0] for kind in alone]
    where = range(len(paths))
    for series in both:
        _dots(axes, where, paths, "", *series)
    axes.set_xticks(where, [plain(kind.label) for kind in alone])
    axes.set_xlim(-0.6, len(paths) - 0.4)
    name(axes, "not in layers")


def _layered(sites: Mapping[str, Any]) -> tuple[list[Kind], list[Kind]]:
    """The kinds with a line of layers, and those that are one site alone."""
    every = kinds(sites)
    layered = [kind for kind in every if len(kind.paths) > 1]
    return layered, [kind for kind in every if len(kind.paths) == 1]


def _dots(
    axes: Any,
    where: Sequence[int],
    paths: Sequence[str],
    line: str,
    values: Mapping[str, float | None],
    label: str,
    colour: str,
    mark: str,
) -> None:
    """The values of some sites, without those that are None or infinite."""
    points = np.array([values[path] for path in paths], np.float64)
    axes.plot(
        list(where),
        np.where(np.isfinite(points), points, np.nan),
        marker=mark,
        linestyle=line,
        markersize=3,
        linewidth=1,
        color=colour,
        label=plain(label),
    )


def alphas(
    points: Mapping[float, float],
    *,
    exact: float | None = None,
    unsmoothed: float | None = None,
) -> Any:
    """Perplexity against the smoothing strength.

    Args:
        points: {alpha: perplexity of the smoothed, quantized model}.
        exact: that of the float model, a line.
        unsmoothed: that of the quantized model without smoothing, a line.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: there are no points.
        ImportError: matplotlib is not installed.

    Examples:
        >>> from sqjax import plots
        >>> len(plots.alphas({0.5: 42.0, 0.85: 40.0}, exact=38.0).axes)
        1
    """
    expect(bool(points), "alphas", "at least one point", dict(points))
    drawn, axes = panels(5.4, 3.4, 1, 1)
    one = axes[0][0]
    ordered = sorted(points.items())
    x, y = zip(*ordered, strict=True)
    one.plot(x, y, "o-", color=SECOND, label="smoothed", markersize=4.5)
    # The best one says its number; the others are read from the axis.
    best = min(ordered, key=lambda point: point[1])
    one.annotate(
        f"{best[1]:.2f}",
        best,
        (0, 7),
        textcoords="offset points",
        ha="center",
        color=INK,
        fontsize=8,
    )
    lines = (
        ("unsmoothed", unsmoothed, FIRST, "--"),
        ("float", exact, INK, ":"),
    )
    for label, value, colour, dashes in lines:
        if value is not None:
            one.axhline(value, color=colour, linestyle=dashes, label=label)
    one.margins(x=0.1, y=0.2)
    name(one, "", "alpha", "perplexity (lower is better)")
    legend(one)
    return drawn


def tradeoff(
    rows: Sequence[tuple[str, float, float, float | None]],
) -> Any:
    """Size against accuracy against speed: a point for each form of a model.

    Args:
        rows: (name, bytes, perplexity, tokens a second or None) of each. The area of a point is
            its speed, which is written beside it too.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: there are no rows.
        ImportError: matplotlib is not installed.

    Examples:
        >>> from sqjax import plots
        >>> rows = [("float", 5.4e8, 37.8, 218.0), ("W8A8", 1.4e8, 38.3, 432.0)]
        >>> len(plots.tradeoff(rows).axes)
        1
    """
    expect(bool(rows), "tradeoff", "at least one row", list(rows))
    drawn, axes = panels(5.4, 3.4, 1, 1)
    one = axes[0][0]
    fastest = max([1e-9, *(speed for *_, speed in rows if speed)])
    # Texts stand towards the middle, so that none leaves the picture.
    middle = float(np.mean([size for _, size, _, _ in rows]))
    colours = (INK, FIRST, SECOND) if len(rows) <= 3 else COLOURS
    looks = zip(cycle(colours), cycle(MARKS), strict=False)
    for (label, size, value, speed), (colour, mark) in zip(
        rows, looks, strict=False
    ):
        area = 60 + 240 * (speed or 0.0) / fastest
        one.scatter(
            size / 1e6, value, area, color=colour, marker=mark, alpha=0.85
        )
        said = "" if speed is None else f"\n{speed:.0f} tokens/s"
        _beside(one, size / 1e6, value, plain(label) + said, size > middle)
    # From 0, because a ratio of sizes is what is looked for.
    one.set_xlim(left=0)
    one.margins(x=0.12, y=0.3)
    name(one, "", "parameters, MB", "perplexity (lower is better)")
    return drawn


def _beside(axes: Any, x: float, y: float, text: str, left: bool) -> None:
    """A text beside a point, on its left or on its right."""
    axes.annotate(
        text,
        (x, y),
        (-13 if left else 13, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color=INK,
        fontsize=8,
    )


def channels(panels_of: Mapping[str, tuple[Any, Any]]) -> Any:
    """The largest value of every channel of one matmul, before smoothing and after.

    Args:
        panels_of: {title: (before, after)}, each a vector with an entry for each channel: max |X|,
            and max |W|.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: there are no panels.
        ImportError: matplotlib is not installed.

    Examples:
        >>> from sqjax import plots
        >>> len(plots.channels({"max |X|": ([1.0, 30.0], [1.0, 2.0])}).axes)
        1
    """
    expect(bool(panels_of), "channels", "at least one panel", {})
    drawn, axes = panels(5.0 * len(panels_of), 3.6, 1, len(panels_of))
    for one, (title, pair) in zip(axes[0], panels_of.items(), strict=True):
        both = zip(pair, ("before", "after"), (FIRST, SECOND), strict=True)
        for values, label, colour in both:
            one.semilogy(
                np.asarray(values), ".", ms=2.5, color=colour, label=label
            )
        style(one)
        name(one, title, "channel")
        legend(one, markerscale=4)
    return drawn


def _check_sites(what: str, *series: Mapping[str, Any]) -> None:
    """Raises ValueError unless there are sites, the same in each."""
    first, *others = series
    expect(bool(first), what, "at least one site", dict(first))
    for other in others:
        if other.keys() != first.keys():
            path = sorted({*first} ^ {*other})[0]
            raise ValueError(
                f"{what}: {path} is in one of the two only; both need the same sites"
            )
