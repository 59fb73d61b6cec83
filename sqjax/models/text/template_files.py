"""The files of a directory that hold chat templates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqjax.files.opening import open_file
from sqjax.models.fields import TEXT, What, check
from sqjax.models.json_files import read_object_if_there
from sqjax.models.text.chat import DEFAULT, Template
from sqjax.models.text.special import Settings

_KEY = "chat_template"


def read_templates(settings: Settings) -> dict[str, Template]:
    """{name: template} of a directory; the usual one is "default".

    They are those of ``chat_template.jinja`` and ``additional_chat_templates/NAME.jinja``, or else
    of ``tokenizer_config.json``, or else of ``chat_template.json``.

    Raises:
        ValueError: a file holds no template in the place of one.
    """
    directory = settings.directory
    older = directory / "chat_template.json"
    path = directory / "tokenizer_config.json"
    return (
        _of_files(directory)
        or _named(path, settings.tokenizer.get(_KEY))
        or _named(older, read_object_if_there(older).get(_KEY))
    )


def _named(path: Path, value: Any) -> dict[str, Template]:
    """The templates under the key of one file: a text, a list of named ones, or none."""
    if value is None:
        return {}
    alone = [{"name": DEFAULT, "template": value}]
    listed = value if isinstance(value, list) else alone
    check(f"{path}: {_KEY}", listed, _NAMED)
    return {
        entry["name"]: Template(
            entry["template"], f"{path}: {_KEY} {entry['name']!r}"
        )
        for entry in listed
    }


def _is_named(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and TEXT.holds(entry.get("name"))
        and TEXT.holds(entry.get("template"))
    )


_NAMED = What(
    "a text, or a list of {name, template}, both texts",
    lambda x: all(map(_is_named, x)),
)


def _of_files(directory: Path) -> dict[str, Template]:
    """The templates that have files of their own."""
    usual = directory / "chat_template.jinja"
    paths = {DEFAULT: usual} if usual.exists() else {}
    further = directory / "additional_chat_templates"
    paths |= {path.stem: path for path in sorted(further.glob("*.jinja"))}
    return {
        name: Template(_read(path), str(path)) for name, path in paths.items()
    }


def _read(path: Path) -> str:
    with open_file(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected a template in UTF-8, got {error}; fetch it again"
        ) from error
    # As Python reads a text file.
    return text.replace("\r\n", "\n").replace("\r", "\n")
