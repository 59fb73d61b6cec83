"""`sqjax eval`: how well a model predicts a text, and how it does on tasks."""

from pathlib import Path
from typing import Any

import click

from sqjax.commands.options import CACHES, MODEL, TEXT, Talk, command

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
    TEXT,
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
        type=click.IntRange(1),
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
    if tasks is not None:
        wrong = text or against or tokens or windows
        if wrong:
            raise ValueError(
                "--tasks: expected it without --text, --tokens, --windows and --against, which are "
                "about perplexity"
            )
        # An empty name is a comma too many.
        names = [name for name in tasks.split(",") if name]
        record = _scores(talk, model, dtype, names, limit, cache)
        talk.result(record, _table(record["results"]))
        return
    from sqjax.commands.model_argument import open_decoder
    from sqjax.commands.outputs import check_recipe
    from sqjax.commands.texts import read_texts, token_windows
    from sqjax.models import perplexity
    from sqjax.weights.sizes import weight_bytes

    texts = read_texts(text, "evaluation")
    check_recipe({"text": texts.digest})
    rows: list[dict[str, Any]] = []
    # Both read the same text, each by its own tokenizer.
    for name in filter(None, (model, against)):
        opened = open_decoder(name, dtype, talk)
        read = token_windows(opened.model, texts, tokens, windows)
        talk.note(f"reading {read}")
        value = perplexity(
            opened.model,
            opened.params,
            read.ids,
            cache=cache,
            progress=talk.progress,
            description=name,
        )
        size = weight_bytes(opened.params)
        row = {"model": name, "perplexity": value, "weight_bytes": size}
        rows.append(row | {"tokens": read.ids.size, "text": str(read)})
    record = dict(rows[0])
    lines = list(map(_line, rows))
    if against is not None:
        record["against"] = rows[1]
        record["ratio"] = rows[0]["perplexity"] / rows[1]["perplexity"]
        lines.append(f"perplexity {100 * (record['ratio'] - 1):+.2f}%")
    talk.result(record, "\n".join(lines))


def _line(row: dict[str, Any]) -> str:
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
    lines = []
    for task, metrics in results.items():
        for metric, value in metrics.items():
            lines.append(f"{task}  {metric}  {value:.4f}")
    return "\n".join(lines)
