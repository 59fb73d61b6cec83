"""`sqjax rotate`: a rotated float checkpoint, in Hugging Face's layout."""

from pathlib import Path

import click

from sqjax.commands.options import MODEL, Talk, command, output
from sqjax.commands.outputs import check_output, new_directory

_EXAMPLES = """
sqjax rotate smollm2-135m -o smollm2-rotated
sqjax quantize smollm2-rotated --scheme w8a8_o3 --search --rule lm_head=none -o smollm2-w8a8
sqjax rotate ./Llama-3.2-1B --dtype bfloat16 --seed 1 -o ./Llama-3.2-1B-rotated
"""


@command(
    "rotate",
    _EXAMPLES,
    MODEL,
    click.option(
        "--how",
        type=click.Choice(("hadamard", "random")),
        default="hadamard",
        show_default=True,
        help="A Hadamard matrix with signs drawn at random, or any rotation.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Of the drawing.",
    ),
    output("DIR", "The rotated checkpoint"),
)
def rotate(
    talk: Talk,
    model: str,
    dtype: str,
    how: str,
    seed: int,
    output: Path,
    force: bool,
) -> None:
    """Write MODEL rotated, as a float checkpoint.

    It is in Hugging Face's layout, and computes what MODEL computes, but an outlier of its
    activations is spread over all channels. Whatever reads such checkpoints reads it. Quantize what
    comes out, with --search: static scales gain most.

    No text is read, because nothing is calibrated. A head that is its model's embedding is copied
    first, as a norm's weight is folded into it: that costs a second embedding.
    """
    # Before jax is imported, because what is wrong here should be said at once.
    check_output(output, force, directory=True, reads=(model,))
    from sqjax.commands import rotating
    from sqjax.commands.calibrating import uncalibrated
    from sqjax.commands.model_argument import open_model
    from sqjax.models import save_huggingface
    from sqjax.weights.sizes import weight_bytes

    opened = open_model(model, dtype, talk)
    found = uncalibrated(opened, "rotate")
    made = rotating.rotated(opened, how, seed, talk)
    with new_directory(output, found.made_of) as new:
        talk.note(f"writing {output}")
        save_huggingface(new, made.model, made.params, like=opened.directory)
    size = weight_bytes(made.params)
    record = {
        "output": str(output),
        "how": how,
        "seed": seed,
        "spaces": len(made.spaces),
        "untied": made.untied,
        "weight_bytes": size,
    }
    head = ", its head a copy of the embedding" if made.untied else ""
    summary = (
        f"{output}: {len(made.spaces)} spaces rotated{head}, {size / 1e6:.0f} MB in {dtype}; it "
        f"computes what {model} computes"
    )
    talk.result(record, summary)
