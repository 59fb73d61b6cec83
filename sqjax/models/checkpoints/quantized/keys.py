"""Keys that the configurations of several layouts have."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sqjax.models.checkpoints.settings import Settings
from sqjax.models.fields import SIZE, TEXTS, What


def only(*values: Any, why: str = "") -> What:
    """What is one of some values, of the same type too; `why` says why no other will do."""
    stated = " or ".join(map(repr, values)) or "no such key"
    words = f"{stated} ({why})".removesuffix(" ()")
    allowed = set(map(repr, values))
    return What(words, lambda x: repr(x) in allowed)


def _is_group(x: Any) -> bool:
    return repr(x) == "-1" or SIZE.holds(x)


_GROUP = What("a number of channels, or -1 for all of an output", _is_group)


def first_stated(
    settings: Settings, keys: Sequence[str], what: What, default: Any
) -> Any:
    """The value of the first of several keys that the file has: tools name things differently."""
    for key in keys:
        value = settings(key, what, None)
        if value is not None:
            return value
    return default


def group_size(
    settings: Settings, *keys: str, default: int = 128
) -> int | None:
    """How many channels share a scale; None for all of an output."""
    size = first_stated(settings, keys, _GROUP, default)
    return None if size == -1 else size


def refuse_others(
    settings: Settings, harmless: Mapping[str, Sequence[Any]]
) -> None:
    """Refuses keys that would change what the weights mean, unless they have such a value."""
    for key, values in harmless.items():
        settings(key, only(*values, why="nothing else is read here"), None)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error:
        return False
    return True


def _are_patterns(x: Any) -> bool:
    return TEXTS.holds(x) and all(map(_compiles, x))


PATTERNS = What(
    "a list of names, or of regular expressions after 're:'", _are_patterns
)


def names(pattern: str, module: str) -> bool:
    """Whether an entry of `PATTERNS` names a module."""
    if not pattern.startswith("re:"):
        return pattern == module
    # Anchored at the beginning alone, as where these files are written.
    return re.match(pattern.removeprefix("re:"), module) is not None
