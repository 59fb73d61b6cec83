"""JSON files of a checkpoint, each of which holds one object, or one list."""

import json
from pathlib import Path
from typing import Any

from sqjax.files.opening import open_file


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: there is no such file, it is no ordinary file, or it holds something else;
            names it.
    """
    found = _read(path)
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: expected JSON of an object with names, got a {type(found).__name__}; "
            "fetch it again"
        )
    return found


def read_list(path: Path) -> list[Any]:
    """As `read_object`, of a file that holds a list."""
    found = _read(path)
    if not isinstance(found, list):
        raise ValueError(
            f"{path}: expected JSON of a list, got a {type(found).__name__}; fetch it again"
        )
    return found


def _read(path: Path) -> Any:
    """What a JSON file holds."""
    try:
        with open_file(path) as file:
            return json.loads(file.read().decode("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: expected this file, got none; it belongs to the checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected JSON, got {error}; fetch it again"
        ) from error


def read_object_if_there(path: Path) -> dict[str, Any]:
    """As `read_object`; of a file that is not there, an empty object."""
    return read_object(path) if path.exists() else {}
