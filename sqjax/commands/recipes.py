"""Recipes: the options of a run in a file, so that it can be made again.

A recipe is a YAML file with the options' names as keys:

    command: quantize
    model: smollm2-135m
    scheme: w8a8
    rule: [lm_head=none]
    alpha: 0.85

`--recipe FILE` takes these; options on the command line win. A command that writes something puts a
recipe beside it. Under `made_with` that one has the versions, and under `made_of` a digest of each
thing that was read: another text than that one is refused.
"""

import difflib
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

#: The name of a recipe inside a directory that was written.
FILE = "recipe.yaml"
#: The parameters of commands that say nothing of what is made.
_NOT_IN_RECIPES = {"output", "force", "json", "quiet", "recipe", "help"}
#: Keys of a recipe that are no parameters.
_MADE_WITH, _MADE_OF = "made_with", "made_of"
#: Of a large file only so much is read for its digest, at each end.
_END = 1 << 16
#: The argument that may be a path or a name.
_MODEL = "model"
#: Where click keeps which recipe a command was given.
_PATH = "sqjax.recipe"


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe.

    Raises:
        ValueError: it is no YAML, or no mapping with texts as keys.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except yaml.MarkedYAMLError as error:
        # Its own text names "<unicode string>" for the file, because it was given a text.
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{path}:{mark.line + 1}"
        raise ValueError(
            f"{where}: expected a recipe in YAML: {error.problem}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a recipe in YAML, got {error}"
        ) from error
    is_mapping = isinstance(found, Mapping)
    if not is_mapping or not all(isinstance(key, str) for key in found):
        raise ValueError(
            f"{path}: expected a recipe such as `scheme: w8a8`, a line for each option, got "
            f"{type(found).__name__}"
        )
    return dict(found)


def _take(
    context: click.Context, parameter: click.Parameter, path: Path | None
) -> Path | None:
    """Makes the values of a recipe the defaults of the command, before other options are read."""
    if path is None:
        return None
    recipe = read_recipe(path)
    _check_command(path, recipe.pop("command", None), context)
    recipe.pop(_MADE_WITH, None)
    recipe.pop(_MADE_OF, None)
    known = _parameters(context)
    for key in recipe:
        if key not in known:
            raise ValueError(_unknown(path, key, [*known, "command"]))
    values = {}
    for key, value in recipe.items():
        if value is not None:
            values[key] = _as_given(value, f"{path}: {key}", known[key])
    context.default_map = values
    context.meta[_PATH] = path
    return path


RECIPE = click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    # Eager, because the other options take their defaults from it.
    is_eager=True,
    expose_value=False,
    callback=_take,
    help="A recipe.yaml that says what the options say, and MODEL; the command line wins.",
)


def recipe_with(error: click.ClickException) -> Path | None:
    """The recipe that a wrong value of an option stands in, if it is from one."""
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    if context is None or parameter is None:
        return None
    source = context.get_parameter_source(parameter.name)
    # The defaults of the command are those of the recipe.
    is_from_recipe = source == click.core.ParameterSource.DEFAULT_MAP
    return context.meta.get(_PATH) if is_from_recipe else None


def _check_command(path: Path, named: Any, context: click.Context) -> None:
    """Raises ValueError if a recipe is of another command."""
    own = context.command.name
    if named is not None and named != own:
        raise ValueError(
            f"{path}: expected a recipe of `sqjax {own}`, got one of `sqjax {named}`"
        )


def _parameters(context: click.Context) -> dict[str, click.Parameter]:
    """{name: parameter} of what a recipe may say of a command."""
    return {
        parameter.name: parameter
        for parameter in context.command.params
        if parameter.name and parameter.name not in _NOT_IN_RECIPES
    }


def _unknown(path: Path, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    guess = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return f"{path}: expected options of this command, got the key {key!r}; {guess}"


def _as_given(value: Any, where: str, parameter: click.Parameter) -> Any:
    """A value of YAML as the command line would have it: texts, and booleans for flags.

    Raises:
        ValueError: it is a mapping, a list of those, or a boolean where none is meant.
    """
    takes_list = (
        parameter.multiple if isinstance(parameter, click.Option) else False
    )
    if takes_list or parameter.nargs != 1:
        values = value if isinstance(value, list) else [value]
        return [_as_text(item, where) for item in values]
    is_flag = isinstance(parameter, click.Option) and parameter.is_flag
    if is_flag and isinstance(value, bool):
        return value
    return _as_text(value, where)


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: expected a text or a number, got {value!r}")
    return str(value)


# Writing ----------------------------------------------------------------------------------------


def recipe_text(context: click.Context, made_of: Mapping[str, str]) -> str:
    """The recipe of the command that runs, with the digests of what it reads.

    It names neither the day nor where the result went, so the same run has the same recipe.
    """
    import yaml

    # Here, because it loads jax.
    from sqjax.report.machine import versions

    name = context.command.name
    recipe = stated(context)
    recipe[_MADE_WITH] = versions()
    recipe[_MADE_OF] = dict(made_of)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return (
        f"# To make it again: sqjax {name} --recipe THIS_FILE -o PATH\n{text}"
    )


def stated(context: click.Context) -> dict[str, Any]:
    """The command that runs, and its options: what a recipe says, without versions and digests."""
    recipe: dict[str, Any] = {"command": context.command.name}
    for key in _parameters(context):
        value = context.params.get(key)
        if value is not None:
            recipe[key] = _plain(key, value)
    return recipe


def settle(**options: Any) -> None:
    """Says what options that were not given came to mean, so that the recipe has it too."""
    click.get_current_context().params.update(options)


def _plain(key: str, value: Any) -> Any:
    """An option's value as YAML has it; paths are written out in full."""
    if isinstance(value, tuple | list):
        return [_plain(key, item) for item in value]
    if key == _MODEL:
        return os.path.abspath(value) if _is_path(value) else value
    return os.path.abspath(value) if isinstance(value, Path) else value


def _is_path(name: str) -> bool:
    """Whether this MODEL is a path here, and no name of a model that is fetched."""
    from sqjax.models.checkpoints.encoders import ENCODER_NAMES
    from sqjax.models.checkpoints.loading import NAMES

    # A folder may have the name of a model that is fetched.
    is_name = name in NAMES or name in ENCODER_NAMES
    return not is_name and os.path.exists(name)


def check_same(context: click.Context, made_of: Mapping[str, str]) -> None:
    """Raises ValueError, naming it, if something that a recipe was made of is another one now.

    What was named on the command line may be another one.
    """
    path = context.meta.get(_PATH)
    if path is None:
        return
    digests = read_recipe(path).get(_MADE_OF) or {}
    if not isinstance(digests, Mapping):
        raise ValueError(
            f"{path}: {_MADE_OF}: expected digests by name, got {digests!r}"
        )
    for key, digest in made_of.items():
        own = context.get_parameter_source(key)
        is_named = own == click.core.ParameterSource.COMMANDLINE
        before = digests.get(key, digest)
        if before != digest and not is_named:
            raise ValueError(
                f"{path}: expected the {key} that the recipe was made of, {before}, got "
                f"another one, {digest}; give it, or another one with its option"
            )


def digest_of(paths: Iterable[Path]) -> str:
    """A digest of files: of their names, sizes, and of what is at both of their ends."""
    sum_of_all = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        sum_of_all.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            sum_of_all.update(file.read(_END))
            file.seek(max(_END, size - _END))
            sum_of_all.update(file.read(_END))
    return f"sha256:{sum_of_all.hexdigest()}"


def digest_at(path: Path) -> str:
    """The digest of a file, or of the files of a directory; hidden ones are none of them."""
    if path.is_file():
        return digest_of([path])
    files = filter(Path.is_file, path.iterdir())
    return digest_of(file for file in files if not file.name.startswith("."))
