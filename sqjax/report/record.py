"""`Record`: all that a report shows, as plain data that JSON can hold."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Rows of numbers: (tokens, channels), or (outputs, channels).
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Variant:
    """The model in one form.

    Attributes:
        name: "float", "unsmoothed" or "smoothed".
        bytes: of its parameters, where int4 takes half a byte.
        perplexity: on text that calibration has not seen.
        tokens_per_second: of reading text; None where it was not timed.
    """

    name: str
    bytes: int
    perplexity: float
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class State:
    """What is known of a site in one of two forms: before smoothing, or after.

    Attributes:
        snr_db: the error of its output, as `sqjax.site_errors` has it; None where it stays float,
            where no token came by, and where nothing is lost.
        clipped: the share of its activation beyond a static range.
        outlier_ratio: the largest channel's max |X| over the median channel's.
    """

    snr_db: float | None
    clipped: float
    outlier_ratio: float


@dataclass(frozen=True)
class SiteRow:
    """One row of the report's table.

    Attributes:
        path: the site's leaf.
        scheme: how it is quantized: the name of a preset, or the scheme itself; "float".
        unsmoothed, smoothed: what is known of it in both forms.
        bytes, quantized_bytes: of the leaf.
        absorbed_by: the leaves that have absorbed its smoothing scales.
        refused: why none have; "" where some did.
    """

    path: str
    scheme: str
    unsmoothed: State
    smoothed: State
    bytes: int
    quantized_bytes: int
    absorbed_by: tuple[str, ...]
    refused: str


@dataclass(frozen=True)
class Surface:
    """The magnitudes of one site's activation or weight, before smoothing and after.

    Attributes:
        what: "activation" or "weight".
        path: the site's leaf.
        before, after: |X| as (tokens, channels), or |W| as (outputs, channels), each number the
            largest of a block.
        size: how many rows and channels there are in truth.
    """

    what: str
    path: str
    before: Rows
    after: Rows
    size: tuple[int, int]


@dataclass(frozen=True)
class Continuation:
    """How each variant continues a prompt: `texts` is {variant: text}."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """All that a report shows. `as_dict` is for JSON, `from_dict` reads that.

    Attributes:
        title: the model's name.
        summary: what it is, in a few words.
        scheme: how it was quantized.
        alpha: the smoothing strength.
        text: which text the perplexities are of.
        variants: float, unsmoothed and smoothed.
        sites: a row for each site.
        alphas: (alpha, the perplexity with it) of the smoothed variant; empty unless asked for.
        surfaces: of one site, the one with the largest outliers.
        continuations: of the prompts.
        recipe: what the figures were made with: {option: value}.
        versions: {package: version}.
        machine: where that was.
        commit: the git hash of the code, or None.
        date: the day, as 2026-11-28.
        seconds: how long it took.
    """

    title: str
    summary: str
    scheme: str
    alpha: float
    text: str
    variants: tuple[Variant, ...]
    sites: tuple[SiteRow, ...]
    alphas: tuple[tuple[float, float], ...] = ()
    surfaces: tuple[Surface, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    commit: str | None = None
    date: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them, lists in place of tuples."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Record":
        """The record that `as_dict` gave.

        Raises:
            ValueError: a field is missing, or is not known.
        """
        # JSON has lists for tuples, and mappings for what has names.
        try:
            return cls(
                **{
                    **fields,
                    "variants": _each(Variant, fields["variants"]),
                    "sites": tuple(map(_site, fields["sites"])),
                    "alphas": tuple(map(tuple, fields["alphas"])),
                    "surfaces": tuple(map(_surface, fields["surfaces"])),
                    "continuations": _each(
                        Continuation, fields["continuations"]
                    ),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected a report's record, as Record.as_dict gives it, got {error!r}"
            ) from error


def _plain(x: Any) -> Any:
    """Lists in place of tuples, as JSON reads them back."""
    if isinstance(x, Mapping):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return list(map(_plain, x))
    return x


def _each(kind: Any, rows: Any) -> tuple[Any, ...]:
    return tuple(kind(**row) for row in rows)


def _site(row: Mapping[str, Any]) -> SiteRow:
    forms = {name: State(**row[name]) for name in ("unsmoothed", "smoothed")}
    return SiteRow(**{**row, **forms, "absorbed_by": tuple(row["absorbed_by"])})


def _surface(row: Mapping[str, Any]) -> Surface:
    rows = {name: tuple(map(tuple, row[name])) for name in ("before", "after")}
    return Surface(**{**row, **rows, "size": tuple(row["size"])})
