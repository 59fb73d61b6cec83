"""`sqjax eval`: how well a model predicts a text, and how it does on tasks."""

from pathlib import Path
from typing import Any, NamedTuple

import click

from sqjax.commands.options import (
    CACHES,
    EVALUATION_TEXT,
    MODEL,
    Talk,
    Whole,
    command,
)

_EXAMPLES = """
sqjax eval smollm2-w8a8
sqjax eval smollm2-w8a8 --against smollm2-135m --text novel.txt
sqjax eval ./Llama-3.2-1B-w8a8 --tasks arc_easy,hellaswag --limit 100
"""


@command(
    "eval",
    _EXAMPLES,
    MODEL,
    click.option(
        "--against",
        metavar="MODEL",
        help="Another model on the same text, usually the float one.",
    ),
    EVALUATION_TEXT,
    click.option(
        "--cache",
        type=click.Choice(CACHES),
        help="Read through a key/value cache in this format.  [default: no cache]",
    ),
    click.option(
        "--tasks",
        metavar="A,B",
        help="Tasks of lm-evaluation-harness, in place of a text (pip install 'sqjax[eval]').",
    ),
    click.option(
        "--limit",
        type=Whole(1),
        help="With --tasks: at most so many questions of each.",
    ),
)
def evaluate(
    talk: Talk,
    model: str,
    dtype: str,
    against: str | None,
    text: Path | None,
    tokens: int | None,
    windows: int | None,
    cache: str | None,
    tasks: str | None,
    limit: int | None,
) -> None:
    """Measure perplexity on a text, or scores on tasks.

    Perplexity is exp of the mean negative log-likelihood of each token of a window after its first;
    lower is better. Sizes are those of the weights in memory: what a .gguf file holds becomes
    float when it is read.
    """
    _check_kind(tasks, limit, (text, against, tokens, windows))
    if tasks is not None:
        # An empty name is a comma too many.
        asked = [name for name in tasks.split(",") if name]
        record = _scores(talk, model, dtype, asked, limit, cache)
        talk.result(record, _table(record["results"]))
        return
    from sqjax.commands.model_argument import check_names
    from sqjax.commands.outputs import check_recipe
    from sqjax.commands.texts import read_texts

    texts = read_texts(text, "evaluation")
    check_recipe({"text": texts.digest})
    names = [model] if against is None else [model, against]
    check_names(*names)
    how = _How(texts, tokens, windows, cache, dtype)
    talk.result(*_beside([_measured(name, how, talk) for name in names]))


def _check_kind(
    tasks: str | None, limit: int | None, of_text: tuple[Any, ...]
) -> None:
    """Raises ValueError for options of a text beside those of tasks."""
    if tasks is not None and any(of_text):
        raise ValueError(
            "--tasks: expected it without --text, --tokens, --windows and --against, which are "
            "about perplexity"
        )
    if tasks is None and limit is not None:
        raise ValueError(
            "--limit: expected it with --tasks, whose questions it limits; for a text there are "
            "--windows and --tokens"
        )


def _beside(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """A record and a text of one model, or of two, the second in the first one's record."""
    record, *others = map(dict, rows)
    lines = list(map(_line, rows))
    for other in others:
        ratio = record["perplexity"] / other["perplexity"]
        record |= {"against": other, "ratio": ratio}
        lines.append(f"perplexity {100 * (ratio - 1):+.2f}%")
    return record, "\n".join(lines)


class _How(NamedTuple):
    """What is read, and how."""

    texts: Any
    tokens: int | None
    windows: int | None
    cache: str | None
    dtype: str


def _measured(name: str, how: _How, talk: Talk) -> dict[str, Any]:
    """The perplexity of one model.

    A function of its own, because so the model leaves memory before the next one is loaded.
    """
    from sqjax import models
    from sqjax.commands import model_argument
    from sqjax.commands.texts import token_windows
    from sqjax.weights.sizes import weight_bytes

    opened = model_argument.open_decoder(name, how.dtype, talk)
    # Both models read the same text, each by its own tokenizer.
    read = token_windows(opened.model, how.texts, how.tokens, how.windows)
    talk.note(f"reading {read}; compiling comes first")
    value = models.perplexity(
        opened.model,
        opened.params,
        read.ids,
        cache=how.cache,
        progress=talk.progress,
        description=name,
    )
    size = weight_bytes(opened.params)
    row = {"model": name, "perplexity": value, "weight_bytes": size}
    return row | {"tokens": read.ids.size, "text": str(read)}


def _line(row: dict[str, Any]) -> str:
    """One model's perplexity and size, for people."""
    size = row["weight_bytes"] / 1e6
    return f"perplexity {row['perplexity']:.3f}  {size:.0f} MB in memory  {row['model']}"


def _scores(
    talk: Talk,
    name: str,
    dtype: str,
    tasks: list[str],
    limit: int | None,
    cache: str | None,
) -> dict[str, Any]:
    """What lm-evaluation-harness says of a model.

    Raises:
        ImportError: it is not installed.
    """
    # Before the model is read, because the answer should not take a minute.
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise ImportError(
            "--tasks: needs lm-evaluation-harness: pip install 'sqjax[eval]'"
        ) from error
    from sqjax.commands.model_argument import open_decoder
    from sqjax.models import harness_model

    opened = open_decoder(name, dtype, talk)
    runner = harness_model(opened.model, opened.params, cache=cache)
    found = simple_evaluate(model=runner, tasks=tasks, limit=limit)
    return {"model": name, "results": _numbers(found["results"])}


def _numbers(results: Any) -> dict[str, dict[str, float]]:
    """{task: {metric: number}}, without what is no number."""
    kept = {}
    for task, metrics in results.items():
        # Beside the numbers there are names, as of the task itself.
        kept[task] = {
            metric: float(value)
            for metric, value in metrics.items()
            if isinstance(value, int | float)
        }
    return kept


def _table(results: dict[str, dict[str, float]]) -> str:
    """A line for each metric of each task."""
    lines = []
    for task, metrics in results.items():
        for metric, value in metrics.items():
            lines.append(f"{task}  {metric}  {value:.4f}")
    return "\n".join(lines)
