"""`sqjax smooth`: a smoothed float checkpoint, in Hugging Face's layout."""

from pathlib import Path

import click

from sqjax.commands.asked import Asked
from sqjax.commands.options import (
    MODEL,
    STATS,
    TEXT,
    AlphaType,
    Talk,
    command,
    output,
)
from sqjax.commands.outputs import check_output, new_directory

_EXAMPLES = """
sqjax smooth smollm2-135m -o smollm2-smooth
sqjax smooth ./Llama-3.2-1B --alpha 0.8 --dtype bfloat16 -o ./Llama-3.2-1B-smooth
sqjax smooth ./opt-125m --text calibration.txt --groups norm -o ./opt-125m-smooth
"""


@command(
    "smooth",
    _EXAMPLES,
    MODEL,
    click.option(
        "--alpha",
        type=AlphaType(),
        default=0.5,
        show_default=True,
        help="Smoothing strength: how much of the outliers moves into the weights.",
    ),
    click.option(
        "--groups",
        type=click.Choice(("all", "norm")),
        default="all",
        show_default=True,
        help="Whether all that folds is smoothed, or what norms absorb only.",
    ),
    TEXT,
    STATS,
    output("DIR", "The smoothed checkpoint"),
)
def smooth(
    talk: Talk,
    model: str,
    dtype: str,
    alpha: float | str,
    groups: str,
    text: Path | None,
    tokens: int | None,
    windows: int | None,
    stats: Path | None,
    output: Path,
    force: bool,
) -> None:
    """Write MODEL smoothed, as a float checkpoint.

    It is in Hugging Face's layout. It computes what MODEL computes, but its activations are easier
    to quantize. Whatever reads such checkpoints reads it, with any tool's quantizer after it.
    """
    if alpha == "none":
        raise ValueError("--alpha: expected a number from 0 to 1, got none")
    # Before jax is imported, because what is wrong here should be said at once.
    check_output(output, force, directory=True, reads=(model, text, stats))
    from sqjax.commands.calibrating import calibrated, check_asked, smoothed
    from sqjax.commands.model_argument import open_model
    from sqjax.models import save_huggingface
    from sqjax.weights.sizes import weight_bytes

    asked = Asked(text, tokens, windows, stats)
    check_asked(asked)
    opened = open_model(model, dtype, talk)
    found = calibrated(opened, asked, talk, "smooth")
    talk.note(f"smoothing with alpha {alpha}")
    # Statistics of the smoothed parameters are of no use here: nothing is quantized.
    params, _ = smoothed(opened.params, found.stats, alpha, groups)
    with new_directory(output, found.made_of) as new:
        talk.note(f"writing {output}")
        save_huggingface(new, opened.model, params, like=opened.directory)
    # Counted again, because "norms" folds fewer groups than the model has.
    chosen = found.stats.graph.select(groups)
    size = weight_bytes(params)
    record = {
        "output": str(output),
        "alpha": alpha,
        "groups": len(chosen),
        "weight_bytes": size,
        "text": found.name,
    }
    summary = (
        f"{output}: {len(chosen)} groups smoothed with alpha {alpha}, {size / 1e6:.0f} MB in "
        f"{dtype}; it computes what {model} computes"
    )
    talk.result(record, summary)
