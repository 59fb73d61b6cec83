"""The command line: `sqjax demo`, `schemes`, `embeddings`, `decode` and `benchmark`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqjax.commands.defaults import ALPHA, ENCODER, MODEL
from sqjax.commands.records import (
    Row,
    as_dicts,
    check_writable,
    make_record,
    write_record,
)

#: The exit status of a command that Ctrl-C ended, as shells have it.
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status; errors of the user's making are one line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    start = time.perf_counter()
    try:
        if options.record is not None:
            # Before the run: a path that can not be written should not cost minutes of measuring.
            check_writable(options.record)
        rows = options.run(options)
        if options.record is not None:
            seconds = time.perf_counter() - start
            write_record(options.record, make_record(arguments, rows, seconds))
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"sqjax: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sqjax: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    """Each command's options; `run` among what is parsed is the function that runs it."""
    parser = argparse.ArgumentParser(
        prog="sqjax", description="Post-training quantization for JAX"
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="quantize a real language model to int8 and show accuracy and speed",
    )
    demo.set_defaults(run=_run_demo)
    _add_common(demo, quick="an impatient minute: less text, fewer repeats")
    _add_model(demo)
    _add_alpha(demo)
    demo.add_argument(
        "--float-head",
        action="store_true",
        help="keep lm_head in float, as the authors do",
    )

    schemes = commands.add_parser(
        "schemes",
        help="the perplexity of a real language model in every scheme",
    )
    schemes.set_defaults(run=_run_schemes)
    _add_common(schemes, quick="less text")
    _add_model(schemes)
    _add_alpha(schemes)

    _add_embeddings(commands)

    benchmark = commands.add_parser(
        "benchmark", help="time every scheme beside float32, bfloat16 and qwix"
    )
    benchmark.set_defaults(run=_run_benchmark)
    _add_common(
        benchmark, quick="a few minutes: one small model, fewer repeats"
    )

    decode = commands.add_parser(
        "decode",
        help="accuracy and speed of decoding with a quantized key/value cache",
    )
    decode.set_defaults(run=_run_decode)
    _add_common(decode, quick="less text, fewer repeats")
    _add_model(decode)
    decode.add_argument(
        "--only", choices=("accuracy", "speed"), help="one of the two tables"
    )
    return parser


def _add_embeddings(commands: Any) -> None:
    """The command that quantizes an encoder of sentences."""
    embeddings = commands.add_parser(
        "embeddings",
        help="quantize a real encoder of sentences and show how far its vectors turn",
    )
    embeddings.set_defaults(run=_run_embeddings)
    _add_common(embeddings, quick="fewer sentences")
    embeddings.add_argument(
        "--model",
        default=ENCODER,
        help="a name or a directory, as sqjax.models.load_encoder takes it",
    )
    _add_alpha(embeddings)


def _add_common(command: argparse.ArgumentParser, quick: str) -> None:
    """The options that every command has."""
    command.add_argument("--quick", action="store_true", help=quick)
    command.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write the figures, the machine and the versions to this JSON file at the end",
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    names = "a name, a .gguf file or a Hugging Face directory"
    command.add_argument("--model", default=MODEL, help=names)


def _add_alpha(command: argparse.ArgumentParser) -> None:
    strength = f"smoothing strength, 0 to 1 (default {ALPHA})"
    command.add_argument("--alpha", type=float, default=ALPHA, help=strength)


# The imports stand inside these functions so that `sqjax --help` does not load flax.


def _run_demo(options: argparse.Namespace) -> list[Row]:
    from sqjax.commands import demo

    size = demo.QUICK if options.quick else demo.FULL
    rows = demo.demo(size, options.alpha, options.model, options.float_head)
    if options.model == MODEL and not options.quick:
        # A real model of another kind; `sqjax embeddings` has a record of its own.
        from sqjax.commands import embeddings

        print()
        embeddings.embeddings(embeddings.QUICK)
    return as_dicts(rows)


def _run_schemes(options: argparse.Namespace) -> list[Row]:
    from sqjax.commands import demo, schemes

    size = demo.QUICK if options.quick else demo.FULL
    return as_dicts(schemes.compare(size, options.alpha, options.model))


def _run_embeddings(options: argparse.Namespace) -> list[Row]:
    from sqjax.commands import embeddings

    size = embeddings.QUICK if options.quick else embeddings.FULL
    return as_dicts(embeddings.embeddings(size, options.model, options.alpha))


def _run_benchmark(options: argparse.Namespace) -> list[Row]:
    from sqjax.commands import benchmark

    if options.quick:
        return benchmark.benchmark(benchmark.QUICK, ("llama-shaped",))
    return benchmark.benchmark()


def _run_decode(options: argparse.Namespace) -> list[Row]:
    from sqjax.commands import decode

    return decode.run(options.model, options.quick, options.only)


if __name__ == "__main__":
    sys.exit(main())
