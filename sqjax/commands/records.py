"""Records: what a run of a command measured, with where, when and from which commit.

`sqjax demo --record benchmarks/records/demo.json` writes one. `python -m sqjax.commands.tables`
fills tables in Markdown from them, so that no figure in a text is ever typed by hand.

A record is a JSON object with the fields of `Record`:

    {
      "command": ["demo", "--quick", "--record", "benchmarks/records/demo.json"],
      "machine": {"cpu": "AMD EPYC", "features": ["avx512_vnni"], "cores": 2},
      "commit": "3119ada...",
      "jax": "0.10.2",
      "python": "3.11.9",
      "date": "2026-11-27",
      "seconds": 61.5,
      "rows": [{"name": "float32", "perplexity": 36.48, "weight_bytes": 538090752}, ...]
    }
"""

import datetime
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sqjax.report.machine import Machine, current_commit, this_machine

#: One row of a table: plain numbers and texts, with the unit in the key, as in "weight_bytes".
Row = Mapping[str, Any]


def as_dicts(rows: Iterable[Any]) -> list[Row]:
    """The rows of a command, which are NamedTuples, as records hold them."""
    return [row._asdict() for row in rows]


class Record(NamedTuple):
    """One run of a command.

    Attributes:
        command: the command line's arguments, without "sqjax".
        machine: where it ran.
        commit: the git hash of the code, followed by "-dirty" if files of the package differ from
            that commit; None where the code is not a git checkout.
        jax: the version of jax.
        python: the version of Python.
        date: the day, as 2026-11-27.
        seconds: how long the whole run took.
        rows: what was measured, one mapping for each row of the tables.
    """

    command: list[str]
    machine: Machine
    commit: str | None
    jax: str
    python: str
    date: str
    seconds: float
    rows: list[Row]

    @property
    def pedigree(self) -> str:
        """One line on where the figures come from, for a reader of the table."""
        commit = f"commit {_short(self.commit)}" if self.commit else "no commit"
        versions = f"jax {self.jax}, Python {self.python}"
        run = _without_record(self.command)
        # A script beside the records is no command of ours: its line is complete.
        if self.command[0] != "python":
            run = f"sqjax {run}"
        return f"`{run}` on {self.machine}, {versions}, {commit}, {self.date}"


def _short(commit: str) -> str:
    """The first ten digits of a hash, and whether files had been changed."""
    digits, *dirty = commit.split("-")
    return "-".join([digits[:10], *dirty])


def _without_record(command: Sequence[str]) -> str:
    """The arguments as a command line; where the record went says nothing about the figures."""
    shown = []
    # Both spellings: "--record FILE", of which two arguments go, and "--record=FILE".
    skip_next = False
    for argument in command:
        if skip_next:
            skip_next = False
        elif argument == "--record":
            skip_next = True
        elif not argument.startswith("--record="):
            shown.append(argument)
    return " ".join(shown)


def make_record(
    command: Sequence[str], rows: Sequence[Row], seconds: float
) -> Record:
    """A record of a run on this machine that ends now."""
    return Record(
        command=list(command),
        machine=this_machine(),
        commit=current_commit(),
        jax=jax.__version__,
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
        seconds=round(seconds, 1),
        rows=list(map(dict, rows)),
    )


def check_writable(path: Path) -> None:
    """Makes the directory of a record that is to be written.

    Raises:
        OSError: the directory can not be made, or the file not be written.
        ValueError: the path is a directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(
            f"--record {path}: expected a file's path, got a directory"
        )
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise PermissionError(
            f"--record {path}: {target} is not writable; name another file"
        )


def write_record(path: Path, record: Record) -> None:
    """Writes a record as JSON, indented so that two of them can be compared line by line."""
    fields = record._asdict() | {"machine": record.machine._asdict()}
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """Reads what `write_record` wrote.

    Raises:
        ValueError: there is no such file, or it is not a record.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a record, got no such file; "
            f"write it with `sqjax COMMAND --record {path}`"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        machine = Machine(**fields.pop("machine"))
        return Record(machine=machine, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a JSON object with the fields {Record._fields}, got {error!r}; "
            f"write it anew with `sqjax COMMAND --record {path}`"
        ) from error
