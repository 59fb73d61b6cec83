"""`sqjax bench`: our own tables, which the records beside the documentation come from.

`sqjax demo` is one of them. Committed records name the commands as they were called before there
was `bench`, so those names work still, hidden.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from sqjax.commands.defaults import ALPHA, ENCODER, MODEL
from sqjax.commands.options import Talk, command, several

_RECORD = click.option(
    "--record",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the figures, the machine and the versions to this JSON file at the end.",
)
_MODEL = click.option(
    "--model",
    default=MODEL,
    show_default=True,
    help="A name, a .gguf file or a Hugging Face directory.",
)
_ALPHA = click.option(
    "--alpha",
    type=float,
    default=ALPHA,
    show_default=True,
    help="Smoothing strength, 0 to 1.",
)


def _quick(what: str) -> Callable[[Any], Any]:
    return click.option("--quick", is_flag=True, help=f"{what}.")


def _measure(
    talk: Talk, record: Path | None, run: Callable[[], Iterable[Any]]
) -> None:
    """Runs a command that prints its tables itself, and writes its record.

    `run` gives the rows: NamedTuples, or mappings.
    """
    from sqjax.commands.records import (
        check_writable,
        make_record,
        write_record,
    )

    if record is not None:
        # Before the run: a path that can not be written should not cost minutes of measuring.
        check_writable(record)
    start = time.perf_counter()
    # What is printed are tables for people, and for --json stdout holds one object alone.
    target = sys.stderr if talk.json else sys.stdout
    with contextlib.redirect_stdout(target):
        rows = list(map(_as_dict, run()))
    if record is not None:
        seconds = time.perf_counter() - start
        arguments = click.get_current_context().obj
        write_record(record, make_record(arguments, rows, seconds))
    if talk.json:
        talk.result({"rows": rows}, "")


def _as_dict(row: Any) -> dict[str, Any]:
    return dict(row) if isinstance(row, Mapping) else row._asdict()


# The imports stand inside these functions so that `sqjax --help` does not load flax.


@command(
    "demo",
    "sqjax demo\nsqjax demo --quick",
    _quick("An impatient minute: less text, fewer repeats"),
    _MODEL,
    _ALPHA,
    click.option(
        "--float-head",
        is_flag=True,
        help="Keep lm_head in float, as the authors do.",
    ),
    _RECORD,
)
def demo(
    talk: Talk,
    quick: bool,
    model: str,
    alpha: float,
    float_head: bool,
    record: Path | None,
) -> None:
    """Quantize a real model; show its accuracy and speed."""
    from sqjax.commands import demo as demos

    size = demos.QUICK if quick else demos.FULL

    def run() -> Iterable[Any]:
        rows = demos.demo(size, alpha, model, float_head)
        if model == MODEL and not quick:
            # A real model of another kind; `bench embeddings` has a record of its own.
            from sqjax.commands import embeddings

            print()
            embeddings.embeddings(embeddings.QUICK)
        return rows

    _measure(talk, record, run)


@command(
    "schemes",
    "sqjax bench schemes --quick\nsqjax bench schemes --model ./opt-125m",
    _quick("Less text"),
    _MODEL,
    _ALPHA,
    _RECORD,
)
def schemes(
    talk: Talk, quick: bool, model: str, alpha: float, record: Path | None
) -> None:
    """The perplexity of a real language model in every scheme."""
    from sqjax.commands import demo as demos
    from sqjax.commands import schemes as tables

    size = demos.QUICK if quick else demos.FULL
    _measure(talk, record, lambda: tables.compare(size, alpha, model))


@command(
    "embeddings",
    "sqjax bench embeddings --quick",
    _quick("Fewer sentences"),
    click.option(
        "--model",
        default=ENCODER,
        show_default=True,
        help="A name or a directory, as sqjax.models.load_encoder takes it.",
    ),
    _ALPHA,
    _RECORD,
)
def embeddings(
    talk: Talk, quick: bool, model: str, alpha: float, record: Path | None
) -> None:
    """Quantize a real encoder of sentences and show how far its vectors turn."""
    from sqjax.commands import embeddings as encoders

    size = encoders.QUICK if quick else encoders.FULL
    _measure(
        talk,
        record,
        lambda: encoders.embeddings(size, model, alpha),
    )


_SPEED = several(
    _quick("A few minutes: one small model, fewer repeats"), _RECORD
)


@command("speed", "sqjax bench speed --quick", _SPEED)
def speed(talk: Talk, quick: bool, record: Path | None) -> None:
    """Time every scheme beside float32, bfloat16 and qwix."""
    from sqjax.commands import benchmark

    def run() -> Iterable[Any]:
        if quick:
            return benchmark.benchmark(benchmark.QUICK, ("llama-shaped",))
        return benchmark.benchmark()

    _measure(talk, record, run)


@command(
    "decode",
    "sqjax bench decode --only accuracy\nsqjax bench decode --quick",
    _quick("Less text, fewer repeats"),
    _MODEL,
    click.option(
        "--only",
        type=click.Choice(("accuracy", "speed")),
        help="One of the two tables.",
    ),
    _RECORD,
)
def decode(
    talk: Talk,
    quick: bool,
    model: str,
    only: str | None,
    record: Path | None,
) -> None:
    """Accuracy and speed of decoding with a quantized key/value cache."""
    from sqjax.commands import decode as decoding

    _measure(talk, record, lambda: decoding.run(model, quick, only))


@command(
    "gpu",
    "sqjax bench gpu --record h100.json\nsqjax bench gpu --part matmul --tiny",
    click.option(
        "--part",
        "parts",
        multiple=True,
        type=click.Choice(("check", "matmul", "layer", "model", "decode")),
        help="Only this part; may be given several times.",
    ),
    click.option(
        "--tiny",
        is_flag=True,
        help="A small run of everything, on any machine.",
    ),
    _RECORD,
)
def gpu(
    talk: Talk, parts: tuple[str, ...], tiny: bool, record: Path | None
) -> None:
    """Check and time everything on a GPU, each part within its time.

    A record that exists is completed: rows of other parts stay.
    """
    from sqjax.commands.gpu.script import main
    from sqjax.commands.records import check_writable, read_record

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json" if record is None else record
        check_writable(path)
        arguments = ["--record", str(path), *(["--tiny"] if tiny else [])]
        for part in parts:
            arguments += ["--part", part]
        with contextlib.redirect_stdout(
            sys.stderr if talk.json else sys.stdout
        ):
            status = main(arguments)
        if talk.json:
            talk.result({"rows": read_record(path).rows}, "")
    if status:
        raise RuntimeError("not all of it is right: see the rows above")


bench = click.Group(
    "bench",
    help="The tables of the documentation, measured on this machine.",
    commands=[demo, schemes, decode, speed, embeddings, gpu],
)
#: {the name that a command had before: the command}.
FORMER = {
    "schemes": schemes,
    "decode": decode,
    "benchmark": speed,
    "embeddings": embeddings,
}
