"""What the options of several commands have in common; here, so that `--help` loads no jax."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from sqjax.commands.defaults import WINDOWS
from sqjax.commands.recipes import RECIPE

Function = TypeVar("Function", bound=Callable[..., Any])

#: The options of a command, by name.
Options = Mapping[str, Any]

EXISTING = click.Path(exists=True, path_type=Path)
PATH = click.Path(path_type=Path)
DTYPES = ("float32", "bfloat16", "float16")
CACHES = ("float", "int8", "e4m3", "int4")


class Whole(click.IntRange):
    """A whole number in a range."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """As help shows it."""
        return "N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: Any
    ) -> int:
        """The number."""
        try:
            int(value)
        except ValueError:
            self.fail(f"expected a whole number, got {value!r}", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number in a range."""

    #: click says it in its help and in its errors.
    name = "number"


@dataclass(frozen=True)
class Talk:
    """Where the words of a command go: its result to stdout, all others to stderr.

    Attributes:
        json: whether the result is one JSON object.
        quiet: whether nothing but the result, and errors, is said.
    """

    json: bool = False
    quiet: bool = False

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown."""
        return not self.quiet

    def note(self, text: str) -> None:
        """What a person who waits may want to know."""
        if not self.quiet:
            click.echo(text, err=True)

    def result(self, record: Options, text: str) -> None:
        """What was asked for: a record for machines, or a text for people."""
        click.echo(json.dumps(record) if self.json else text)


def command(
    name: str, examples: str, *options: Callable[[Any], Any], **settings: Any
) -> Callable[[Callable[..., None]], click.Command]:
    """A decorator: makes a command of a function, which gets a `Talk` first and then its options.

    Args:
        name: of the command.
        examples: command lines, which its help ends with.
        *options: what it takes, in the order in which its help lists them.
        **settings: further ones of click.
    """
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())

    def make(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def run(json: bool, quiet: bool, **given: Any) -> None:
            function(Talk(json, quiet), **given)

        decorated: Any = several(*options, *_TALK)(run)
        # Without the mark click would join the lines of the examples.
        epilog = f"\b\nExamples:\n{lines}"
        return click.command(name, epilog=epilog, **settings)(decorated)

    return make


_TALK = (
    click.option(
        "--json", is_flag=True, help="Results as one JSON object on stdout."
    ),
    click.option(
        "--quiet", is_flag=True, help="No progress bars and no notes."
    ),
)


def several(
    *decorators: Callable[[Any], Any],
) -> Callable[[Function], Function]:
    """One decorator for several, in the order in which `--help` shall list them."""

    def add(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


class _Model(click.Argument):
    """MODEL, which a recipe may say in place of the command line."""

    def get_usage_pieces(self, ctx: click.Context) -> list[str]:
        """As the usage line of the help shows it."""
        return ["[MODEL]"]


#: What is loaded, and how; every command that loads a model takes a recipe too.
MODEL = several(
    click.argument("model", metavar="MODEL", cls=_Model),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="The dtype of everything that is not quantized.",
    ),
    RECIPE,
)


def _text(purpose: str) -> Callable[[Function], Function]:
    """Which text is read, and how much of it."""
    return several(
        click.option(
            "--text",
            type=EXISTING,
            metavar="FILE|DIR",
            help='A text, a .jsonl file of {"text": ...}, or a folder of these.  [default: a '
            "text that comes with sqjax]",
        ),
        click.option(
            "--tokens",
            type=Whole(2),
            help="The tokens of one window of text.  [default: 512, or as many as the model takes]",
        ),
        click.option(
            "--windows",
            type=Whole(1),
            help="How many windows of the text are read.  [default: the first "
            f"{WINDOWS[purpose]}, or as many as there are]",
        ),
    )


TEXT, EVALUATION_TEXT = _text("calibration"), _text("evaluation")

#: Statistics that are there already.
STATS = click.option(
    "--stats",
    type=EXISTING,
    metavar="FILE",
    help="What `sqjax calibrate` wrote for this model, in place of calibrating now; or Stats that "
    "`sqjax.save` wrote, in a file or a directory.",
)


def output(metavar: str, what: str) -> Callable[[Function], Function]:
    """The options of a command that writes: where to, and whether over what is there."""
    return several(
        click.option(
            "-o",
            "--output",
            type=PATH,
            metavar=metavar,
            required=True,
            help=f"{what}, with a recipe to make it again.",
        ),
        click.option(
            "--force", is_flag=True, help="Replace what is there already."
        ),
    )


class AlphaType(click.ParamType):
    """A smoothing strength from 0 to 1, or "none"."""

    name = "alpha"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """As help shows it."""
        return "A"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: Any
    ) -> float | str:
        """The number, or "none"."""
        if str(value).lower() == "none":
            return "none"
        try:
            alpha = float(value)
        except ValueError:
            alpha = -1.0
        # Not "alpha < 0", because no comparison with NaN is true.
        if not 0 <= alpha <= 1:
            self.fail(
                f"expected a smoothing strength from 0 to 1, or none, got {value!r}",
                param,
                ctx,
            )
        return alpha
