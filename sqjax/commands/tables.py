"""Fills tables in Markdown from records.

    python -m sqjax.commands.tables [--check|--write] FILE.md ...

Run it in the root of the repository. It looks for marks, each on a line of its own:

    <!-- table: records/demo.json demo -->
    <!-- end -->

What stands between the two is made from `benchmarks/records/demo.json` by the layout "demo"
(`sqjax.commands.layouts.LAYOUTS` has the names), followed by one line that says which machine,
version of jax, commit and date the figures come from. `--write` fills it in. `--check`, which is
what happens without either, changes nothing: it names each table that disagrees with its record.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sqjax.commands.cells import markdown
from sqjax.commands.layouts import LAYOUTS
from sqjax.commands.records import read_record

#: The folder, relative to the repository's root, in which the marks' `records/...` lie.
BENCHMARKS = "benchmarks"
START = re.compile(r"^<!-- table: (?P<record>\S+\.json) (?P<layout>.+?) -->$")
END = "<!-- end -->"


class Filled(NamedTuple):
    """A text with its tables filled in, and what the mark says of each table that was otherwise."""

    text: str
    changed: list[str]


def fill(text: str, root: Path) -> Filled:
    """Fills every marked table of a Markdown text from the records under `root`.

    Raises:
        ValueError: a mark without an end, a layout that does not exist, or no such record.
    """
    filled: list[str] = []
    changed: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        filled.append(line)
        mark = START.match(line)
        if mark is None:
            continue
        found = _lines_before_end(lines, mark=line)
        expected = _table(mark["record"], mark["layout"], root)
        if found != expected:
            changed.append(f"{mark['record']} {mark['layout']}")
        filled += [*expected, END]
    ending = "\n" if text.endswith("\n") else ""
    return Filled("\n".join(filled) + ending, changed)


def _lines_before_end(lines: Iterator[str], mark: str) -> list[str]:
    """Reads the lines of a table up to and with its end mark, and returns those before it."""
    found: list[str] = []
    for line in lines:
        if line == END:
            return found
        if START.match(line):
            break
        found.append(line)
    raise ValueError(
        f"{mark!r} has no end: write {END!r} on a line of its own after its table"
    )


def _table(record_name: str, layout_name: str, root: Path) -> list[str]:
    """The lines of a table and of its pedigree."""
    if layout_name not in LAYOUTS:
        raise ValueError(
            f"table: expected one of {list(LAYOUTS)}, got {layout_name!r}"
        )
    record = read_record(root / BENCHMARKS / record_name)
    try:
        table = LAYOUTS[layout_name](record.rows)
        has_lines = len(table.lines) > 0
    except (KeyError, IndexError):
        # A row of another command's record lacks the keys that this layout reads.
        has_lines = False
    if not has_lines:
        raise ValueError(
            f"{record_name}: expected rows of the table {layout_name!r}, got none; "
            f"this record was made by `sqjax {' '.join(record.command)}`"
        )
    return ["", *markdown(table).splitlines(), "", f"*{record.pedigree}.*", ""]


def main(
    arguments: Sequence[str] | None = None, root: Path | None = None
) -> int:
    """Checks or writes the tables of files; returns the exit status, 1 if a table disagrees."""
    parser = argparse.ArgumentParser(
        prog="python -m sqjax.commands.tables",
        description="Fills tables in Markdown from records",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--check", action="store_true", help="change nothing (the default)"
    )
    mode.add_argument("--write", action="store_true", help="fill the tables in")
    parser.add_argument(
        "files", nargs="+", metavar="FILE.md", help="relative to the root"
    )
    options = parser.parse_args(arguments)
    root = Path.cwd() if root is None else root
    status = 0
    for name in options.files:
        path = root / name
        try:
            filled = fill(path.read_text(encoding="utf-8"), root)
        except (OSError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
            continue
        if options.write:
            path.write_text(filled.text, encoding="utf-8")
        elif filled.changed:
            _report(name, filled.changed)
            status = 1
    return status


def _report(name: str, changed: Sequence[str]) -> None:
    """Says which tables of a file disagree, and what to do."""
    fix = f"`python -m sqjax.commands.tables --write {name}`"
    for table in changed:
        message = f"{name}: the table {table!r} disagrees with its record; fill it in with {fix}"
        print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
