"""`sqjax calibrate`: what each matmul of a model sees, in a file."""

from pathlib import Path

import click

from sqjax.commands.asked import Asked
from sqjax.commands.options import MODEL, TEXT, Talk, command, output
from sqjax.commands.outputs import check_output, new_file

_EXAMPLES = """
sqjax calibrate smollm2-135m -o stats.safetensors
sqjax calibrate ./Llama-3.2-1B --text chats.jsonl --windows 64 -o stats.safetensors
sqjax quantize ./Llama-3.2-1B --stats stats.safetensors -o ./Llama-3.2-1B-w8a8
"""


@command(
    "calibrate",
    _EXAMPLES,
    MODEL,
    TEXT,
    click.option(
        "--search",
        is_flag=True,
        help="Keep what `quantize --search` reads too: Gram matrices and samples of tokens, about "
        "as large as the model.",
    ),
    output("FILE", "The statistics"),
)
def calibrate(
    talk: Talk,
    model: str,
    dtype: str,
    text: Path | None,
    tokens: int | None,
    windows: int | None,
    search: bool,
    output: Path,
    force: bool,
) -> None:
    """Run MODEL on text, and write what each of its matmuls sees.

    MODEL is a directory with config.json and safetensors, a .gguf file, a hub id such as
    HuggingFaceTB/SmolLM2-135M, or smollm2-135m.

    The file serves `smooth`, `quantize`, `inspect` and `report` (--stats), so that one machine may
    calibrate and another quantize, and `sqjax.load` in Python.
    """
    check_output(output, force, directory=False, reads=(model, text))
    from sqjax import save
    from sqjax.commands.calibrating import calibrated, check_asked, what_folds
    from sqjax.commands.model_argument import open_model

    asked = Asked(text, tokens, windows, search=search)
    check_asked(asked)
    opened = open_model(model, dtype, talk)
    found = calibrated(opened, asked, talk, "calibrate")
    with new_file(output, found.made_of) as new:
        # `save` writes a file where the name ends so.
        written = new.with_name("statistics.safetensors")
        save(written, found.stats)
        written.rename(new)
    graph = found.stats.graph
    record = {
        "output": str(output),
        "text": found.name,
        "matmuls": len(graph.sites),
        "groups": len(graph.select("all")),
    }
    summary = f"{output}: {what_folds(found.stats)}; calibrated on {found.name}"
    talk.result(record, summary)
