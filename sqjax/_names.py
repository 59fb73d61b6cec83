"""Names of leaves: regular expressions that choose among them, and near misses for errors."""

import difflib
import re
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

from sqjax._arguments import expect


def first_matches(
    patterns: Iterable[str],
    names: Iterable[str],
    what: str,
    also: Sequence[str] = (),
) -> dict[str, str | None]:
    """For every name the first pattern that `re.search` finds in it, or None.

    Example: the patterns ["head", "k"] on "head/kernel" and "norm" are {"head/kernel": "head",
    "norm": None}.

    Args:
        patterns: regular expressions, the first of which wins.
        names: paths of leaves, or other names.
        what: what a pattern is called in errors.
        also: words that may be said in place of patterns, for the near misses.

    Raises:
        ValueError: a pattern that is not a regular expression, or that matches no name (near misses
            are listed). A pattern whose every match is taken by an earlier one passes.
    """
    names = list(names)
    found: dict[str, str | None] = dict.fromkeys(names)
    for pattern in patterns:
        matches = _matches(pattern, names, what)
        if not matches:
            raise ValueError(
                f"{what} {pattern!r} matches nothing. Near misses: "
                f"{near_misses(pattern, [*also, *names])}"
            )
        for name in matches:
            if found[name] is None:
                found[name] = pattern
    return found


def _matches(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """The names in which a pattern is found."""
    is_pattern = isinstance(pattern, str | re.Pattern)
    expect(is_pattern, what, "a regular expression, as in 'key|value'", pattern)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        hint = ""
        if "*" in pattern:
            hint = (
                f"; for a part of a name give the part: {pattern.strip('*')!r}"
            )
        raise ValueError(
            f"{what} {pattern!r} is not a regular expression: {error}{hint}"
        ) from error
    return list(filter(expression.search, names))


def near_misses(pattern: str, names: list[str]) -> str:
    """The names that are most like a pattern, as a text for errors."""
    if not names:
        return "there are no names at all"

    def likeness(name: str) -> float:
        # A pattern may name a whole path, or one key of it.
        texts = [name, *name.split("/")]
        return max(_ratio(pattern, text) for text in texts)

    near = sorted(names, key=likeness, reverse=True)[:5]
    return ", ".join(map(repr, near))


def _ratio(pattern: str, text: str) -> float:
    """How alike two texts are, from 0 to 1, whatever their case."""
    return difflib.SequenceMatcher(None, pattern.lower(), text.lower()).ratio()


def braced(paths: Sequence[str]) -> str:
    """Paths in one text, what they share said once.

    Example: layers/0/q_proj/kernel and layers/0/k_proj/kernel are layers/0/{q_proj, k_proj}/kernel.
    """
    plain = ", ".join(paths)
    parts = [path.split("/") for path in paths]
    shortest = min(map(len, parts), default=0)
    if len(paths) < 2 or shortest < 2:
        return plain
    head = _shared(parts, shortest)
    backwards = [keys[::-1] for keys in parts]
    tail = _shared(backwards, shortest - head)  # a key is not shared twice
    middles = ["/".join(keys[head : len(keys) - tail]) for keys in parts]
    if head + tail == 0 or not all(middles):
        return plain
    first = parts[0]
    before, after = first[:head], first[len(first) - tail :]
    return "/".join([*before, "{" + ", ".join(middles) + "}", *after])


def _shared(parts: Sequence[Sequence[str]], most: int) -> int:
    """How many of their first keys all paths share, at most `most`."""
    columns = zip(*parts, strict=False)
    shared = takewhile(lambda keys: len(set(keys)) == 1, columns)
    return len(list(islice(shared, most)))
