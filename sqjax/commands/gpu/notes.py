"""The record of a visit, which grows row by row: what is measured stands, whatever comes next."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sqjax.commands.records import (
    Record,
    Row,
    make_record,
    read_record,
    write_record,
)
from sqjax.report.machine import ROOT

#: The row that says where and when a part ran; the others hold figures.
RUN = "run"


class Plan(NamedTuple):
    """What a run was asked for.

    Attributes:
        command: the command line, as the record names it.
        path: the record's file, or None: figures are printed only.
        tiny: whether everything is small.
        started: when the part began, by `time.monotonic`, before it loaded jax.
        seconds: how long it may take.
        commit: of the code, where there is no git to ask.
    """

    command: Sequence[str]
    path: Path | None
    tiny: bool
    started: float
    seconds: float
    commit: str | None = None


class Notes:
    """The rows of one part, added to the record's other rows.

    A part that ran on this card with the same code goes on where it stopped: `has` says what it
    need not measure again. Rows of other code are dropped as the part begins.

    Attributes:
        part: its name.
        tiny: whether everything is small.
    """

    def __init__(self, plan: Plan, part: str):
        """Raises ValueError for a record of another card."""
        self.part = part
        self.tiny = plan.tiny
        self._plan = plan
        self._left_out: list[str] = []
        self._other: list[Row] = []
        self._rows: list[Row] = []
        self._before = 0.0
        if plan.path is not None and plan.path.exists():
            self._go_on(read_record(plan.path))

    def _go_on(self, record: Record) -> None:
        """Takes up the rows of a record."""
        runs = [row for row in record.rows if row["name"] == RUN]
        for run in runs:
            if run["card"] != card():
                raise ValueError(
                    f"--record {self._plan.path}: it is of a {run['card']}, and this is a "
                    f"{card()}; name another file"
                )
        self._other = [row for row in record.rows if row["part"] != self.part]
        own = [row for row in record.rows if row["part"] == self.part]
        same = [run for run in runs if run in own and run["code"] == code()]
        # Of other code all is measured again.
        if same:
            self._before = same[0]["seconds"]
            self._rows = [
                row for row in own if row["name"] != RUN and "error" not in row
            ]

    def has(self, name: str) -> bool:
        """Whether a row of this name is there already, with figures."""
        return any(
            row["name"] == name and "error" not in row for row in self._rows
        )

    def found_wrong(self, part: str, name: str) -> bool:
        """Whether another part, of the same code, has a row of this name that does not hold."""
        of_part = [row for row in self._other if row["part"] == part]
        same = any(
            row["code"] == code() for row in of_part if row["name"] == RUN
        )
        named = [row for row in of_part if row["name"] == name]
        return same and any(map(_is_wrong, named))

    def row(self, name: str) -> Row:
        """The row of this name."""
        [found] = [row for row in self._rows if row["name"] == name]
        return found

    def left(self) -> float:
        """The seconds that this part has left."""
        return self._plan.seconds - self._taken()

    def _taken(self) -> float:
        return time.monotonic() - self._plan.started

    def leave_out(self, names: Sequence[str]) -> None:
        """Notes that there was no time for these."""
        self._left_out += names

    def add(self, name: str, figures: Mapping[str, Any]) -> None:
        """Prints a row and writes it; tables in it (lists) are written only."""
        row = {"part": self.part, "name": name}
        row |= {key: rounded(value) for key, value in figures.items()}
        self._rows = [old for old in self._rows if old["name"] != name]
        self._rows.append(row)
        shown = [
            f"{key} {value}"
            for key, value in row.items()
            if key not in ("part", "name") and not isinstance(value, list)
        ]
        print(
            f"{self._taken():6.1f} s  {self.part:6}  {name:40} {', '.join(shown)}",
            flush=True,
        )
        self.write()

    def failed(self, name: str, error: BaseException) -> None:
        """Notes what went wrong with one row; the others are measured all the same."""
        words = f"{type(error).__name__}: {error}"
        self.add(name, {"error": words[:300]})

    def write(self) -> None:
        """Writes the record as far as it has come."""
        if self._plan.path is None:
            return
        run: dict[str, Any] = {
            "part": self.part,
            "name": RUN,
            "card": card(),
            "code": code(),
            "jax": jax.__version__,
            "seconds": round(self._before + self._taken(), 1),
            "left_out": self._left_out,
        }
        rows = [*self._other, run, *self._rows]
        total = sum(row["seconds"] for row in rows if row["name"] == RUN)
        record = make_record(self._plan.command, rows, total)
        if self._plan.commit is not None:
            record = record._replace(commit=self._plan.commit)
        if on_gpu():
            cpu = f"{record.machine.cpu} with one {card()}"
            record = record._replace(machine=record.machine._replace(cpu=cpu))
        unfinished = self._plan.path.with_suffix(".new")
        write_record(unfinished, record)
        unfinished.replace(self._plan.path)

    @property
    def wrong(self) -> list[str]:
        """The rows that could not be measured, and the checks that do not hold."""
        return [row["name"] for row in self._rows if _is_wrong(row)]


def _is_wrong(row: Row) -> bool:
    return "error" in row or row.get("holds") is False


@cache
def code() -> str:
    """A number that changes with the code of the package: git may not be there, or not know it."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "sqjax").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def card() -> str:
    """The device's name."""
    return jax.devices()[0].device_kind


def on_gpu() -> bool:
    """Whether jax computes on a GPU."""
    return jax.default_backend() == "gpu"


def rounded(value: Any) -> Any:
    """Floats with five digits, in tables too, because a record is read by people."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    return value
