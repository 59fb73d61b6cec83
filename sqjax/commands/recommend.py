"""`sqjax recommend`: the smallest recipe that loses less than is accepted."""

from pathlib import Path
from typing import Any

import click

from sqjax.commands.options import (
    MODEL,
    PATH,
    TEXT,
    Number,
    Talk,
    command,
)
from sqjax.commands.outputs import check_output, new_directory

_EXAMPLES = """
sqjax recommend smollm2-135m
sqjax recommend smollm2-135m --budget 3 -o smollm2-small
sqjax recommend ./Llama-3.2-1B --text chats.jsonl --windows 64 --json
"""


@command(
    "recommend",
    _EXAMPLES,
    MODEL,
    TEXT,
    click.option(
        "--budget",
        type=Number(0),
        default=1.0,
        show_default=True,
        metavar="PERCENT",
        help="How much more perplexity is accepted, in percent of the float model's.",
    ),
    click.option(
        "-o",
        "--output",
        type=PATH,
        metavar="DIR",
        help="Where the recommended model is written, with a recipe to make it again.",
    ),
    click.option(
        "--force", is_flag=True, help="Replace what is there already."
    ),
)
def recommend(
    talk: Talk,
    model: str,
    dtype: str,
    text: Path | None,
    tokens: int | None,
    windows: int | None,
    budget: float,
    output: Path | None,
    force: bool,
) -> None:
    """Try recipes on MODEL, and name the smallest within a budget.

    Each is calibrated on the first three quarters of the windows of text, and judged on the last
    one, two windows at least. A recipe is within the budget if the upper end of its 95% interval
    is, which few windows make wide.

    \b
    w8a8 static  int8, scales of activations from calibration: the fastest
    w8a8 static rotated
                 the same, with outliers spread over all channels
    w8a8         int8, a scale for each token
    w8a16        int8 weights alone
    mixed        int8 and int4 weights, 6 bits a weight together
    w4a8         int4 weights in groups of 128, int8 activations by token
    w4a16        int4 weights alone, in groups of 64

    The head of a model whose head is its embedding stays float.
    """
    if output is not None:
        check_output(output, force, directory=True, reads=(model, text))
    elif force:
        raise ValueError("--force: expected it with --output")
    from sqjax.commands import recommending
    from sqjax.commands.model_argument import float_only, open_decoder
    from sqjax.commands.outputs import check_recipe
    from sqjax.commands.texts import read_texts, token_windows

    texts = read_texts(text, "calibration")
    opened = open_decoder(model, dtype, talk)
    float_only(opened, "recommend")
    made_of = {"model": opened.digest, "text": texts.digest}
    check_recipe(made_of)
    read = token_windows(opened.model, texts, tokens, windows)
    talk.note(f"reading {read}; compiling comes first")
    found = recommending.recommended(opened, read.ids, budget, talk)
    if output is not None and found.name is not None:
        with new_directory(output, made_of) as new:
            recommending.write(new, opened, found)
    record: dict[str, Any] = recommending.record(found, str(read), output)
    talk.result(record, recommending.text_of(found, budget, output))
