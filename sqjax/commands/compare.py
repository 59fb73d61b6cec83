"""`sqjax compare`: two models on one text."""

from pathlib import Path
from typing import Any

import click

from sqjax.commands.options import EVALUATION_TEXT, MODEL, Talk, command

_EXAMPLES = """
sqjax compare smollm2-135m smollm2-w8a8
sqjax compare ./opt-125m ./opt-125m-w8a8 --text novel.txt --windows 64
sqjax compare smollm2-135m smollm2-w4a16 --json
"""


@command(
    "compare",
    _EXAMPLES,
    MODEL,
    click.argument("other", metavar="OTHER"),
    EVALUATION_TEXT,
)
def compare(
    talk: Talk,
    model: str,
    dtype: str,
    other: str,
    text: Path | None,
    tokens: int | None,
    windows: int | None,
) -> None:
    """Compare two models on one text.

    Shown are perplexities, sizes, how often both find the same token likeliest, the KL divergence
    of OTHER from MODEL, and the difference of the losses with its standard error over windows.
    """
    from sqjax.commands import comparing
    from sqjax.commands.model_argument import check_names, open_decoder
    from sqjax.commands.outputs import check_recipe
    from sqjax.commands.texts import read_texts, token_windows

    texts = read_texts(text, "evaluation")
    check_recipe({"text": texts.digest})
    check_names(model, other)
    first = open_decoder(model, dtype, talk)
    second = open_decoder(other, dtype, talk)
    length = comparing.shared_length(first, second, tokens)
    read = token_windows(first.model, texts, length, windows)
    same = token_windows(second.model, texts, length, windows)
    comparing.check_comparable(first, second, read, same)
    talk.note(f"reading {read}; compiling comes first")
    found = comparing.compared(first, second, read.ids, talk)
    record: dict[str, Any] = found._asdict() | {"text": str(read)}
    talk.result(record, comparing.text_of(found, model, other))
