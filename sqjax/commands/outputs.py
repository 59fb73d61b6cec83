"""What commands write: checked before the work, put in place as a whole, with its recipe."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from sqjax.commands.recipes import FILE, check_same, recipe_text


def recipe_of(file: Path) -> Path:
    """Where the recipe of a file is: beside it, because a folder may hold several."""
    # Past links, as for the file itself.
    file = file.resolve()
    return file.with_name(f"{file.name}.{FILE}")


def check_output(
    output: Path,
    force: bool,
    *,
    directory: bool,
    reads: tuple[str | Path | None, ...],
) -> None:
    """Raises ValueError, before anything is loaded, if a result could not be put in its place.

    Args:
        output: where it will be.
        force: whether what is there may be replaced.
        directory: whether it is a directory, or a file.
        reads: what the command reads; paths among these must not be replaced.
    """
    parent = output.resolve().parent
    _require(
        parent.is_dir(),
        f"{output}: expected a path in a folder that exists; make {parent} first",
    )
    _require(
        os.access(parent, os.W_OK),
        f"{output}: expected a folder that may be written to, {parent} may not",
    )
    here, working = output.resolve(), Path.cwd()
    # Nobody could go on in a directory that was replaced.
    _require(
        here not in (working, *working.parents),
        f"{output}: expected a path that does not hold the working directory; name another path",
    )
    for read in reads:
        if read is None or not os.path.exists(read):
            continue
        origin = Path(read).resolve()
        _require(
            here not in (origin, *origin.parents),
            f"{output}: expected a path that does not hold {read}, which is read; name another",
        )
    # Last, because to pass --force would not help against what comes before.
    _check_free(output, force, directory)


def _check_free(output: Path, force: bool, directory: bool) -> None:
    """Raises ValueError if something is there that must not be replaced."""
    # Many make an empty directory first.
    if directory and output.is_dir() and not os.listdir(output):
        return
    # The recipe of a directory is in it.
    taken = (output,) if directory else (output, recipe_of(output))
    for path in taken:
        _require(
            force or not os.path.lexists(path),
            f"{path}: it is there already; pass --force to replace it, or name another path",
        )
    if output.exists():
        _check_kind(output, directory)


def _check_kind(output: Path, directory: bool) -> None:
    """Raises ValueError if what is replaced is something else than what comes in its place."""
    what = "a directory" if directory else "a file"
    _require(
        output.is_dir() == directory,
        f"{output}: expected {what} to replace, got something else; name another path",
    )
    # A directory goes with all that it holds. Ours have a recipe; a config.json is in others too.
    is_ours = (output / FILE).is_file()
    _require(
        is_ours or not directory,
        f"{output}: expected to replace what sqjax wrote, got a directory without {FILE}; name "
        "another path",
    )
    if directory:
        _check_folders(output)


def _check_folders(output: Path) -> None:
    """Raises ValueError if a directory holds folders that no command writes.

    A project's own directory has a config.json too.
    """
    # Here, because it needs numpy.
    from sqjax.models.checkpoints.writing.directory import strange_folders

    strange = strange_folders(output)
    _require(
        not strange,
        f"{output}: expected to replace what sqjax wrote, got a directory that holds "
        f"{strange[:3]}; name another path",
    )


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


@contextlib.contextmanager
def new_directory(output: Path, made_of: Mapping[str, str]) -> Iterator[Path]:
    """An empty directory to fill, which is `output` at the end, with the recipe of this command.

    Nothing is left of it if anything fails, Ctrl-C included.
    """
    from sqjax.files.aside import directory_written_aside

    context = click.get_current_context()
    with directory_written_aside(output.resolve()) as new:
        yield new
        text = recipe_text(context, made_of)
        (new / FILE).write_text(text, "utf-8")


@contextlib.contextmanager
def new_file(output: Path, made_of: Mapping[str, str]) -> Iterator[Path]:
    """A path to write a file to, which is `output` at the end, with the recipe of this command."""
    from sqjax.files.aside import directory_beside

    context = click.get_current_context()
    with directory_beside(output.resolve().parent) as scratch:
        target = output.resolve()
        new = scratch / target.name
        yield new
        recipe = recipe_of(new)
        recipe.write_text(recipe_text(context, made_of), "utf-8")
        # The recipe first, because a file without one could not be made again.
        os.replace(recipe, recipe_of(target))
        os.replace(new, target)


def check_recipe(made_of: Mapping[str, str]) -> None:
    """Raises ValueError if the recipe of this command was made of other things than these."""
    check_same(click.get_current_context(), made_of)
