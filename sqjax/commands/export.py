"""`sqjax export`: a model's programs, compiled for a platform, with its weights beside them."""

import importlib.util
import shlex
from pathlib import Path

import click

from sqjax.commands.options import MODEL, Talk, Whole, command, output
from sqjax.commands.outputs import check_output, check_recipe, new_directory
from sqjax.commands.recipes import settle

_EXAMPLES = """
sqjax export smollm2-w8a8 -o exported
sqjax export smollm2-w8a8 --platform cuda --prompt 512 --length 2048 -o exported
sqjax export smollm2-w8a8 --platform cpu --platform tpu --batch 4 -o exported
"""
_PLATFORMS = ("cpu", "cuda", "tpu")


@command(
    "export",
    _EXAMPLES,
    MODEL,
    click.option(
        "--platform",
        type=click.Choice(_PLATFORMS),
        multiple=True,
        help="What the programs are for; may be given several times.  [default: all of them]",
    ),
    click.option(
        "--batch",
        type=Whole(1),
        default=1,
        show_default=True,
        help="How many prompts are read at once.",
    ),
    click.option(
        "--prompt",
        type=Whole(1),
        default=128,
        show_default=True,
        help="The tokens of the longest prompt.",
    ),
    click.option(
        "--length",
        type=Whole(2),
        default=256,
        show_default=True,
        help="The tokens that the cache has room for.",
    ),
    output(
        "DIR", "The programs, the weights, and run.py, which imports jax alone"
    ),
)
def export(
    talk: Talk,
    model: str,
    dtype: str,
    platform: tuple[str, ...],
    batch: int,
    prompt: int,
    length: int,
    output: Path,
    force: bool,
) -> None:
    """Write the programs of MODEL, to run with jax alone.

    One reads a prompt, the other one more token (jax.export). They run where jax is, without sqjax:

    \b
    python DIR/run.py 16 1,2,3

    prints up to 16 new tokens after the token ids 1, 2, 3. The script knows ids, and no text: the
    tokenizer's files, which lie beside it, are for a program of yours.

    Writing and running need the package flatbuffers too: pip install flatbuffers.
    """
    # Before jax is imported, because what is wrong here should be said at once.
    check_output(output, force, directory=True, reads=(model,))
    if length <= prompt:
        raise ValueError(
            f"--length: expected more than --prompt, which is {prompt}, got {length}"
        )
    # Before the model is read, because the answer should not take a minute.
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "export: needs flatbuffers, with which jax.export writes: pip install 'sqjax[export]'"
        )
    from sqjax import models
    from sqjax.commands.model_argument import open_decoder

    opened = open_decoder(model, dtype, talk)
    most = opened.model.config.max_length
    if length > most:
        raise ValueError(
            f"--length: expected at most {most}, which is what the model takes, got {length}; give "
            "a smaller --length, and --prompt if need be"
        )
    made_of = {"model": opened.digest}
    check_recipe(made_of)
    # One program serves them all, so there is no need to ask for which.
    platforms = platform or _PLATFORMS
    settle(platform=list(platforms))
    with new_directory(output, made_of) as new:
        talk.note(f"exporting for {', '.join(platforms)}")
        models.export(
            new,
            opened.model,
            opened.params,
            batch=batch,
            prompt=prompt,
            length=length,
            platforms=platforms,
        )
        # Listed while the folder is still aside: at its end the recipe comes too.
        files = sorted(path.name for path in new.iterdir())
    record = {
        "output": str(output),
        "platforms": list(platforms),
        "files": files,
    }
    ids = ["1,2,3"] * batch
    how = shlex.join(["python", str(output / "run.py"), "16", *ids])
    summary = f"{output}: {', '.join(files)}\nto run it on token ids, for up to 16 new ones: {how}"
    talk.result(record, summary)
