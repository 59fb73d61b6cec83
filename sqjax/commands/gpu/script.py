"""The command line of a visit, and the time that each part may take."""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

#: {part: seconds}. Together they are less than six minutes. A part begins nothing that would take
#: longer than it has left, as far as what went before can tell. "layer" tunes the products that
#: "model" reads from the cache: on an H200 two prefills and four decode steps took 37 s.
LIMITS = {"check": 95, "matmul": 90, "layer": 70, "model": 50, "decode": 50}
#: {part: the module and function that runs it}.
PARTS = {
    "check": ("check", "check"),
    "matmul": ("matmul", "matmul"),
    "layer": ("llama", "layer"),
    "model": ("llama", "model"),
    "decode": ("llama", "decode"),
}
#: So many seconds beyond its limit a part is ended, because a compilation can not be.
GRACE = 30
#: A tiny run has no limit worth the name.
TINY_LIMIT = 1200
#: Where compiled programs are kept, and what XLA found by trying kernels, so that the same part can
#: run again without compiling again.
KEPT = Path.home() / ".cache" / "sqjax" / "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts that are asked for; returns the exit status, 1 if something does not hold."""
    started = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    parts = options.part or list(PARTS)
    if len(parts) == 1:
        return _run(parts[0], options, started)
    # A process each: one that fails, or that never ends, costs the others nothing.
    failed = [part for part in parts if not _in_a_process(part, options)]
    if failed:
        print(f"not all right: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sqjax.commands.gpu",
        description="Check and measure sqjax on a GPU, each part within its time.",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="Write every row to this JSON file as it is measured. A file that exists is "
        "completed: rows of other parts stay, and a part of the same code goes on.",
    )
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        help="Only this part; may be given several times.",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="A small run of everything, on any machine.",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"The time of a part in place of {LIMITS}.",
    )
    parser.add_argument(
        "--commit", help="What the record says where there is no git to ask."
    )
    return parser


def _in_a_process(part: str, options: argparse.Namespace) -> bool:
    """Runs one part; whether all of it holds."""
    command = [sys.executable, "-m", "sqjax.commands.gpu", "--part", part]
    command += _shared(options)
    # Rows go to stderr where this process sends its own there, as `sqjax bench gpu --json` does.
    target = sys.stderr if sys.stdout is sys.stderr else None
    longest = _limit(part, options) + GRACE
    try:
        done = subprocess.run(command, stdout=target, timeout=longest)
    except subprocess.TimeoutExpired:
        print(f"{part}: ended after its time", file=sys.stderr, flush=True)
        return False
    return done.returncode == 0


def _shared(options: argparse.Namespace) -> list[str]:
    """The options of all parts, as arguments."""
    arguments = ["--tiny"] if options.tiny else []
    if options.record is not None:
        arguments += ["--record", str(options.record)]
    if options.seconds is not None:
        arguments += ["--seconds", str(options.seconds)]
    if options.commit is not None:
        arguments += ["--commit", options.commit]
    return arguments


def _limit(part: str, options: argparse.Namespace) -> float:
    if options.seconds is not None:
        return options.seconds
    return TINY_LIMIT if options.tiny else LIMITS[part]


def _run(part: str, options: argparse.Namespace, started: float) -> int:
    """Runs one part in this process."""
    if part == "check":
        # Whether a result is right does not depend on which kernel is the fastest; trying them all
        # would take most of this part's time. Part "matmul" compares what was tried out.
        _add_flag("--xla_gpu_autotune_level=0")
    if not options.tiny:
        _keep_programs()
    # Here, because XLA reads its flags when jax is first used.
    notes = import_module("sqjax.commands.gpu.notes")
    # How the record is made, not which part was made last.
    command = ["python", "-m", "sqjax.commands.gpu", *_shared(options)]
    plan = notes.Plan(
        command,
        options.record,
        options.tiny,
        started,
        _limit(part, options),
        options.commit,
    )
    module, name = PARTS[part]
    found = notes.Notes(plan, part)
    run: Callable[..., None] = getattr(
        import_module(f"sqjax.commands.gpu.{module}"), name
    )
    run(found)
    found.write()
    for wrong in found.wrong:
        print(f"{part}: {wrong} is not right", file=sys.stderr)
    return 1 if found.wrong else 0


def _add_flag(flag: str) -> None:
    flags = shlex.split(os.environ.get("XLA_FLAGS", ""))
    if flag not in flags:
        os.environ["XLA_FLAGS"] = " ".join([*flags, flag])


def _keep_programs() -> None:
    """For this process, unless the user keeps them elsewhere."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(KEPT))
