"""`sqjax eval`: how well a model predicts a text, and how it does on tasks."""

from collections.abc import Sequence
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
sqjax eval smollm2-w8a8 --against smollm2-135m --prefix auto
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
        "--prefix",
        metavar="TOKENS",
        help="Read the text once more behind a few tokens that are kept in float: their ids, such "
        "as 28,1, or `auto` to choose them by the calibration text that comes with sqjax.",
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
    prefix: str | None,
    tasks: str | None,
    limit: int | None,
) -> None:
    """Measure perplexity on a text, or scores on tasks.

    Perplexity is exp of the mean negative log-likelihood of each token of a window after its first;
    lower is better. Sizes are those of the weights in memory: what a .gguf file holds becomes
    float when it is read.

    A prefix is computed from each model's own weights, of a quantized one from what these stand
    for. It helps static scales, and most where the model was calibrated behind it.
    """
    _check_kind(tasks, limit, (text, against, tokens, windows, prefix))
    before = None if prefix is None else _prefix_ids(prefix)
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
    how = _How(texts, tokens, windows, cache, dtype, before)
    talk.result(*_beside([_measured(name, how, talk) for name in names]))


def _check_kind(
    tasks: str | None, limit: int | None, of_text: tuple[Any, ...]
) -> None:
    """Raises ValueError for options of a text beside those of tasks."""
    if tasks is not None and any(of_text):
        raise ValueError(
            "--tasks: expected it without --text, --tokens, --windows, --prefix and --against, "
            "which are about perplexity"
        )
    if tasks is None and limit is not None:
        raise ValueError(
            "--limit: expected it with --tasks, whose questions it limits; for a text there are "
            "--windows and --tokens"
        )


def _prefix_ids(text: str) -> Sequence[int]:
    """The ids that --prefix names; none where it says that they are to be chosen.

    Example: "28,1" is [28, 1].
    """
    if text == "auto":
        return ()
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(
            f"--prefix: expected auto, or token ids such as 28,1, got {text!r}"
        )
    return list(map(int, parts))


def _beside(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """A record and a text of one model, or of two, the second in the first one's record."""
    record, *others = map(dict, rows)
    lines = [line for row in rows for line in _lines(row)]
    for other in others:
        ratio = record["perplexity"] / other["perplexity"]
        record |= {"against": other, "ratio": ratio}
        lines.append(f"perplexity {_percent(ratio)}")
        if "prefix" not in record:
            continue
        # A prefix changes the float model too, so there are two to compare with.
        own, theirs = record["prefix"], other["prefix"]
        both = own["perplexity"] / theirs["perplexity"]
        alone = own["perplexity"] / other["perplexity"]
        record |= {"prefixed_ratio": both, "prefixed_ratio_to_plain": alone}
        lines.append(
            f"perplexity {_percent(both)} with a prefix before both, {_percent(alone)} with one "
            f"before {record['model']} alone"
        )
    return record, "\n".join(lines)


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f}%"


class _How(NamedTuple):
    """What is read, and how; `prefix` are the ids before it, none to choose them, None for none."""

    texts: Any
    tokens: int | None
    windows: int | None
    cache: str | None
    dtype: str
    prefix: Sequence[int] | None


def _measured(name: str, how: _How, talk: Talk) -> dict[str, Any]:
    """The perplexity of one model, and what it is behind a prefix.

    A function of its own, because so the model leaves memory before the next one is loaded.
    """
    from sqjax import models
    from sqjax.commands import model_argument
    from sqjax.commands.texts import token_windows
    from sqjax.weights.sizes import weight_bytes

    opened = model_argument.open_decoder(name, how.dtype, talk)
    # Both models read the same text, each by its own tokenizer.
    read = token_windows(opened.model, how.texts, how.tokens, how.windows)

    def perplexity(prefix: Any = None) -> float:
        return models.perplexity(
            opened.model,
            opened.params,
            read.ids,
            cache=how.cache,
            prefix=prefix,
            progress=talk.progress,
            description=name,
        )

    # Before anything is read, because the text may be too long behind it.
    before = None if how.prefix is None else _prefix(opened, how.prefix, read)
    talk.note(f"reading {read}; compiling comes first")
    row = {"model": name, "perplexity": perplexity()}
    row |= {"weight_bytes": weight_bytes(opened.params)}
    row |= {"tokens": read.ids.size, "text": str(read)}
    if before is not None:
        behind = {"ids": list(before.ids), "perplexity": perplexity(before)}
        row["prefix"] = behind
    return row


def _prefix(opened: Any, ids: Sequence[int], read: Any) -> Any:
    """A prefix of these tokens, or of those that the calibration text says, in float.

    Raises:
        ValueError: no token of that text stands out; or there is no room for it before a window.
    """
    import jax

    from sqjax import models
    from sqjax.commands.texts import read_texts, token_windows
    from sqjax.weights.quant_weight import is_quantized

    # What the codes stand for, because what was folded into this model is in no other one.
    params = jax.tree.map(
        lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf,
        opened.params,
        is_leaf=is_quantized,
    )
    if ids:
        made = models.prefix(opened.model, params, ids=ids)
    else:
        texts = read_texts(None, "calibration")
        chosen = token_windows(opened.model, texts, None, None).ids
        try:
            made = models.prefix(opened.model, params, [chosen])
        except ValueError as error:
            raise ValueError(
                f"--prefix auto: {opened.name}: {error}"
            ) from error
    most, length = opened.model.config.max_length, read.ids.shape[1]
    if len(made.ids) + length > most:
        raise ValueError(
            f"--prefix: {len(made.ids)} tokens before windows of {length} are more than the "
            f"{most} that the model takes; give a smaller --tokens"
        )
    return made


def _lines(row: dict[str, Any]) -> list[str]:
    """One model's perplexity and size, for people; and its perplexity behind a prefix."""
    size = row["weight_bytes"] / 1e6
    name = row["model"]
    lines = [
        f"perplexity {row['perplexity']:.3f}  {size:.0f} MB in memory  {name}"
    ]
    if "prefix" in row:
        ids = ",".join(map(str, row["prefix"]["ids"]))
        behind = row["prefix"]["perplexity"]
        lines.append(
            f"perplexity {behind:.3f}  behind the prefix {ids}  {name}"
        )
    return lines


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
