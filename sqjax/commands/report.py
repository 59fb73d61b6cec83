"""`sqjax report`: one HTML page on what quantizing a model does."""

import dataclasses
import importlib.util
import json as json_text
import time
from pathlib import Path
from typing import Any

import click

from sqjax.commands.asked import Asked
from sqjax.commands.defaults import SCHEMES
from sqjax.commands.options import (
    MODEL,
    STATS,
    TEXT,
    AlphaType,
    Talk,
    Whole,
    command,
    output,
)
from sqjax.commands.outputs import check_output, check_recipe, new_file
from sqjax.commands.recipes import settle, stated

_EXAMPLES = """
sqjax report smollm2-135m -o report.html
sqjax report smollm2-135m --scheme w8a8_o3 --alpha 0.85 --alphas 0.5 --alphas 0.7 -o report.html
"""
_PROMPTS = ("The capital of France is", "Once upon a time")


@command(
    "report",
    _EXAMPLES,
    MODEL,
    click.option(
        "--scheme",
        type=click.Choice([*SCHEMES], case_sensitive=False),
        metavar="SCHEME",
        default="w8a8",
        show_default=True,
        help="How every matmul is quantized, as for quantize.",
    ),
    click.option(
        "--alpha",
        type=AlphaType(),
        default=0.5,
        show_default=True,
        help="Smoothing strength.",
    ),
    click.option(
        "--alphas",
        type=AlphaType(),
        multiple=True,
        help="Another strength whose perplexity is measured; may be given several times.",
    ),
    click.option(
        "--prompt",
        multiple=True,
        help="A text that the models continue; may be given several times.  [default: two]",
    ),
    click.option(
        "--eval-text",
        type=click.Path(exists=True, path_type=Path),
        metavar="FILE|DIR",
        help="What perplexity is measured on.  [default: a text that comes with sqjax]",
    ),
    click.option(
        "--eval-windows",
        type=Whole(1),
        default=8,
        show_default=True,
        help="How many windows of it.",
    ),
    TEXT,
    STATS,
    output("FILE", "The page"),
)
def report(
    talk: Talk,
    model: str,
    dtype: str,
    scheme: str,
    alpha: float,
    alphas: tuple[float, ...],
    prompt: tuple[str, ...],
    eval_text: Path | None,
    eval_windows: int,
    text: Path | None,
    tokens: int | None,
    windows: int | None,
    stats: Path | None,
    output: Path,
    force: bool,
) -> None:
    """Show on one HTML page what quantizing MODEL does.

    MODEL is quantized with and without smoothing. The page holds its pictures itself, so it can be
    sent as it is.
    """
    start = time.perf_counter()
    # A page takes minutes, so what is wrong with its place is said first.
    _check(alpha, alphas)
    reads = model, text, eval_text, stats
    check_output(output, force, directory=False, reads=reads)
    from sqjax import report as reports
    from sqjax.commands.calibrating import calibrated, check_asked
    from sqjax.commands.model_argument import open_decoder
    from sqjax.commands.quantizing import needs_sample
    from sqjax.commands.texts import read_texts, token_windows

    sample = needs_sample([scheme])
    asked = Asked(text, tokens, windows, stats, sample=sample)
    check_asked(asked)
    texts = read_texts(eval_text, "evaluation")
    opened = open_decoder(model, dtype, talk)
    found = calibrated(opened, asked, talk, "report")
    # A page depends on a second text, by which perplexity is measured.
    made_of = found.made_of | {"eval_text": texts.digest}
    check_recipe(made_of)
    read = token_windows(opened.model, texts, tokens, eval_windows)
    settle(tokens=read.ids.shape[1], prompt=list(prompt or _PROMPTS))
    recipe = stated(click.get_current_context())
    talk.note(f"smoothing and quantizing; then measuring on {read}")
    measured: Any = reports.measure(
        opened.model,
        opened.params,
        [],
        read.ids,
        scheme=scheme.upper(),
        alpha=alpha,
        alphas=alphas,
        prompts=prompt or _PROMPTS,
        title=model,
        recipe={key: str(x) for key, x in recipe.items()},
        stats=found.stats,
        progress=talk.progress,
    )
    # What a person waited for, so reading and calibrating the model count too.
    seconds = round(time.perf_counter() - start, 1)
    measured = dataclasses.replace(measured, seconds=seconds)
    with new_file(output, made_of) as new:
        new.write_text(reports.html(measured), "utf-8")
    record = json_text.loads(json_text.dumps(measured.as_dict()))
    talk.result(record | {"output": str(output)}, _summary(record, output))


def _check(alpha: float | str, alphas: tuple[float | str, ...]) -> None:
    """Raises ValueError for a page without smoothing, ImportError if nothing can be drawn."""
    if "none" in (alpha, *alphas):
        option = "--alpha" if alpha == "none" else "--alphas"
        raise ValueError(f"{option}: expected a number from 0 to 1, got none")
    # Now, because the pictures come at the end.
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "report: needs matplotlib for its pictures: pip install 'sqjax[plots]'"
        )


def _summary(record: dict[str, Any], output: Path) -> str:
    """The headline figures."""
    lines = [f"{output}: {record['scheme']}, on {record['text']}"]
    for variant in record["variants"]:
        size = variant["bytes"] / 1e6
        lines.append(
            f"perplexity {variant['perplexity']:.3f}  {size:.0f} MB  {variant['name']}"
        )
    return "\n".join(lines)
