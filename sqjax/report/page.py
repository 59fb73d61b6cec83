"""`html`: a record as one page, which needs nothing else: no network, no other file."""

import base64
import hashlib
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from sqjax.report import pictures
from sqjax.report.drawing import svg
from sqjax.report.measuring import FLOAT, SMOOTHED, UNSMOOTHED
from sqjax.report.record import Continuation, Record, SiteRow, Surface, Variant
from sqjax.weights.sizes import shown_bytes

#: What a cell of a table holds: what it is sorted by, what is shown, and its class.
Cell = tuple[Any, str, str]


def html(record: Record) -> str:
    """A report as one HTML file: headline figures, pictures, every site, texts, recipe.

    It reads in light and dark and on narrow screens, and loads nothing: pictures are inside, and
    its Content-Security-Policy forbids everything else. All that comes from the record is escaped.

    Args:
        record: what `measure` returned.

    Raises:
        ImportError: matplotlib is not installed: pip install 'sqjax[plots]'.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> from sqjax.report import html, measure
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 8, 1, 2, 1, 4))
        >>> params, ids = jax.jit(model.init)(jax.random.key(0)), jnp.arange(24)[None] % 32
        >>> page = html(measure(model, params, [ids], ids, repeats=0, title="<tiny>"))
        >>> page.startswith("<!DOCTYPE html>"), "<tiny>" in page, "&lt;tiny&gt;" in page
        (True, False, True)
    """
    # One pass over the template, so that a "$" in what is filled in stays what it is.
    css, script = _file("page.css"), _file("page.js")
    return Template(_file("page.html")).substitute(
        policy=_policy(script),
        css=css,
        script=script,
        title=escape(record.title),
        summary=escape(record.summary),
        what=_what(record),
        cards="\n".join(_cards(record)),
        pictures="\n".join(_pictures(record)),
        count=len(record.sites),
        heads="\n".join(_heads()),
        rows="\n".join(map(_row, record.sites)),
        texts=_texts(record.continuations),
        made="\n".join(_made(record)),
    )


def _file(name: str) -> str:
    """A file that comes with the package."""
    found = resources.files("sqjax.report") / name
    return found.read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What the page may load: its own style, its own script, and pictures that are inside."""
    # By its digest, so that no other script can run, whatever a name or a text holds.
    digest = hashlib.sha256(script.encode()).digest()
    own = base64.b64encode(digest).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{own}'; base-uri 'none'; form-action 'none'"
    )


def _what(record: Record) -> str:
    scheme, text = escape(record.scheme), escape(record.text)
    return (
        f"Quantized as <code>{scheme}</code>, smoothed with alpha {record.alpha:g}. Perplexity on "
        f"{text} that calibration has not seen."
    )


# Headline figures ---------------------------------------------------------------------------------


def _cards(record: Record) -> list[str]:
    """Size, perplexity of each form, error, speed."""
    by_name = {variant.name: variant for variant in record.variants}
    exact, plain, smooth = map(
        by_name.__getitem__, (FLOAT, UNSMOOTHED, SMOOTHED)
    )
    cards = [
        _card(
            "Size",
            shown_bytes(smooth.bytes),
            f"{exact.bytes / max(smooth.bytes, 1):.2f} times smaller than "
            f"{shown_bytes(exact.bytes)}",
        ),
        _card("Perplexity, float", f"{exact.perplexity:.2f}", "as it came"),
        _card(
            "Perplexity, unsmoothed",
            f"{plain.perplexity:.2f}",
            f"{_more(plain.perplexity, exact.perplexity)} than float",
            "first",
        ),
        _card(
            "Perplexity, smoothed",
            f"{smooth.perplexity:.2f}",
            f"{_more(smooth.perplexity, exact.perplexity)} than float",
            "second",
        ),
    ]
    return [*cards, *_error_card(record.sites), *_speed_card(exact, smooth)]


def _error_card(sites: Sequence[SiteRow]) -> list[str]:
    """The error of the middle site and of the worst."""
    before = [s.unsmoothed.snr_db for s in sites]
    after = [s.smoothed.snr_db for s in sites]
    # Sites that stay float, and those that lose nothing, have no error.
    known = [x for x in after if x is not None]
    was = [x for x in before if x is not None]
    if not known or not was:
        return []
    middle = statistics.median(known)
    return [
        _card(
            "Error of the median site",
            f"{middle:.1f} dB",
            f"{statistics.median(was):.1f} dB unsmoothed; the worst {min(known):.1f} dB, "
            f"{min(was):.1f} dB unsmoothed",
        )
    ]


def _speed_card(exact: Variant, smooth: Variant) -> list[str]:
    before, after = exact.tokens_per_second, smooth.tokens_per_second
    if not before or not after:
        return []
    text = f"{after:.0f} tokens a second, {before:.0f} in float"
    return [_card("Speed of reading", f"{after / before:.2f}x", text)]


def _card(title: str, number: str, text: str, colour: str = "") -> str:
    return (
        f'<div class="card"><h3>{escape(title)}</h3><strong class="{colour}">{escape(number)}'
        f"</strong><span>{escape(text)}</span></div>"
    )


def _more(value: float, other: float) -> str:
    """Example: 41.1 beside 37.8 is "8.7% more"; 37.0 is "2.1% less"."""
    change = 100 * (value / other - 1)
    return f"{abs(change):.1f}% {'more' if change >= 0 else 'less'}"


# Pictures -----------------------------------------------------------------------------------------


def _pictures(record: Record) -> list[str]:
    """A section for each picture that the record has the numbers of."""
    sections = [_surfaces(record.surfaces), _errors(record.sites)]
    size_and_alpha = [_tradeoff(record.variants), *_alphas(record)]
    sections.append(_section("Size, accuracy, speed", "".join(size_and_alpha)))
    return [section for section in sections if section]


def _section(title: str, inside: str) -> str:
    return (
        f'<section><h2>{title}</h2><div class="pair">{inside}</div></section>'
    )


def _figure(drawn: Any, title: str, caption: str) -> str:
    """A picture with what it shows; the title is for screen readers."""
    # One picture to a screen reader, not a hundred texts.
    picture = svg(drawn, title).replace(
        "<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1
    )
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<div class="wide" tabindex="0">{picture}</div></figure>'
    )


def _surfaces(surfaces: Sequence[Surface]) -> str:
    if not surfaces:
        return ""
    figures = []
    for one in surfaces:
        what, rows = _NAMES[one.what]
        drawn = pictures.surface(
            one.before, one.after, what=what, rows=rows, size=one.size
        )
        caption = (
            f"The {one.what} of <code>{escape(one.path)}</code>, {one.size[0]} {rows}s by "
            f"{one.size[1]} channels; every block shows its largest value."
        )
        figures.append(_figure(drawn, f"{one.what} surface", caption))
    inside = "".join(figures)
    return f"<section><h2>The largest outliers</h2>{inside}</section>"


_NAMES = {"activation": ("|X|", "token"), "weight": ("|W|", "output")}


def _errors(sites: Sequence[SiteRow]) -> str:
    if not sites:
        return ""
    ratios = pictures.outliers(
        {s.path: s.unsmoothed.outlier_ratio for s in sites},
        {s.path: s.smoothed.outlier_ratio for s in sites},
    )
    errors = pictures.errors(
        {s.path: s.unsmoothed.snr_db for s in sites},
        {s.path: s.smoothed.snr_db for s in sites},
    )
    inside = _figure(
        ratios,
        "Outlier ratio by layer",
        "Outliers by layer: the largest channel's |X| over the median channel's, as calibration "
        "saw them. Sites that share an activation are one line.",
    ) + _figure(
        errors,
        "Error by site",
        "The error of each site alone, in decibels: higher is better.",
    )
    return f"<section><h2>Layer by layer</h2>{inside}</section>"


def _tradeoff(variants: Iterable[Variant]) -> str:
    rows = [
        (v.name, float(v.bytes), v.perplexity, v.tokens_per_second)
        for v in variants
    ]
    return _figure(
        pictures.tradeoff(rows),
        "Size against accuracy against speed",
        "Each form of the model: its size, its perplexity and how fast it reads.",
    )


def _alphas(record: Record) -> list[str]:
    if not record.alphas:
        return []
    # With lines for the float model and for no smoothing at all.
    values = {v.name: v.perplexity for v in record.variants}
    drawn = pictures.alphas(
        dict(record.alphas), exact=values[FLOAT], unsmoothed=values[UNSMOOTHED]
    )
    caption = "Perplexity against the smoothing strength."
    return [_figure(drawn, "Perplexity against alpha", caption)]


# The table ----------------------------------------------------------------------------------------

_TITLES = (
    ("site", ""),
    ("scheme", ""),
    ("dB before", "n"),
    ("dB after", "n"),
    ("gain, dB", "n"),
    ("clipped", "n"),
    ("outliers before", "n"),
    ("outliers after", "n"),
    ("MB", "n"),
    ("scale absorbed by, or why not", ""),
)


def _heads() -> list[str]:
    return [
        f'<th scope="col" class="{kind}"><button type="button">{title}</button></th>'
        for title, kind in _TITLES
    ]


def _row(site: SiteRow) -> str:
    before, after = site.unsmoothed, site.smoothed
    # What smoothing has gained.
    gain = None
    if before.snr_db is not None and after.snr_db is not None:
        gain = after.snr_db - before.snr_db
    why = ", ".join(site.absorbed_by)
    if not why:
        why = f"refused: {site.refused}" if site.refused else "not smoothed"
    cells: list[Cell] = [
        (site.path, f"<code>{_breakable(site.path)}</code>", "path"),
        (site.scheme, escape(site.scheme), ""),
        _number(before.snr_db, ".1f"),
        _number(after.snr_db, ".1f"),
        _number(gain, "+.1f"),
        _number(after.clipped, ".3%"),
        _number(before.outlier_ratio, ".1f"),
        _number(after.outlier_ratio, ".1f"),
        _number(site.quantized_bytes / 1e6, ".2f"),
        (why, _breakable(why), "why"),
    ]
    inside = "".join(
        f'<td class="{kind}" data-value="{escape(str(value))}">{shown}</td>'
        for value, shown, kind in cells
    )
    return f"<tr>{inside}</tr>"


def _breakable(text: str) -> str:
    """A text, escaped, whose lines may end after a slash."""
    return escape(text).replace("/", "/<wbr>")


def _number(value: float | None, form: str) -> Cell:
    if value is None:
        return "", "", "n"
    return value, format(value, form), "n"


# Texts, recipe ------------------------------------------------------------------------------------


def _texts(continuations: Sequence[Continuation]) -> str:
    if not continuations:
        return ""
    parts = ["<section><h2>Texts side by side</h2>"]
    for one in continuations:
        parts.append(f'<p class="prompt">{escape(one.prompt)}</p>')
        parts.append('<div class="texts">')
        for name, text in one.texts.items():
            parts.append(
                f'<div><span class="soft">{escape(name)}</span>'
                f'<p class="text">{escape(text)}</p></div>'
            )
        parts.append("</div>")
    return "\n".join([*parts, "</section>"])


def _made(record: Record) -> list[str]:
    """The recipe, the versions and the machine, as terms and what they are."""
    versions = ", ".join(f"{k} {v}" for k, v in record.versions.items())
    # What is not in the recipe cannot be chosen, but may change the figures.
    rows = [
        *record.recipe.items(),
        ("versions", versions),
        ("machine", record.machine),
        ("commit", record.commit or "not known"),
        ("date", record.date),
        ("took", f"{record.seconds:g} s"),
    ]
    return [
        f"<dt>{escape(str(term))}</dt><dd>{escape(str(value))}</dd>"
        for term, value in rows
    ]
