"""A table of figures: its two forms, and how a figure is written in a cell."""

from collections.abc import Sequence
from typing import NamedTuple

from sqjax._tables import aligned
from sqjax.commands.records import Row


class Table(NamedTuple):
    """The titles of the columns, and the cells of each line, one for each title."""

    titles: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


def text(table: Table) -> str:
    """The table for a terminal: the first column on the left, the others aligned on the right."""
    rows = [table.titles, *table.lines]
    return "\n".join(aligned(rows, left={0}))


def markdown(table: Table) -> str:
    """The table as Markdown."""
    rows = [table.titles, ("---",) * len(table.titles), *table.lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def rows_of(name: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of one of a record's tables."""
    return [row for row in rows if row["table"] == name]


def times(ratio: float) -> str:
    """A ratio of speeds: "1.25x"."""
    return f"{ratio:.2f}x"


def megabytes(count: float) -> str:
    """A number of bytes, in millions."""
    return f"{count / 1e6:.0f}"


def milliseconds(seconds: float) -> str:
    """A time: "12.3 ms"."""
    return f"{1e3 * seconds:.1f} ms"
