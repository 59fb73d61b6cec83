"""Names of leaves: regular expressions that choose among them, and near misses for errors."""

import difflib
import re
from collections.abc import Iterable, Sequence


def first_matches(
    patterns: Iterable[str], names: Iterable[str], what: str
) -> dict[str, str | None]:
    """For every name the first pattern that `re.search` finds in it, or None.

    Raises:
        ValueError: a pattern that is not a regular expression, or that matches no name (near misses are listed).
            A pattern whose every match is taken by an earlier one passes.
    """
    patterns, names = list(patterns), list(names)
    found: dict[str, str | None] = dict.fromkeys(names)
    for pattern in patterns:
        try:
            matches = [n for n in names if re.search(pattern, n)]
        except re.error as error:
            raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}") from error
        if not matches:
            raise ValueError(
                f"{what} {pattern!r} matches nothing. Near misses: {near_misses(pattern, names)}"
            )
        for name in matches:
            found[name] = pattern if found[name] is None else found[name]
    return found


def near_misses(pattern: str, names: list[str]) -> str:
    """The names that are most like a pattern, as a text for errors."""

    def likeness(name: str) -> float:
        parts = [name, *name.split("/")]
        return max(difflib.SequenceMatcher(None, pattern.lower(), p.lower()).ratio() for p in parts)

    near = sorted(names, key=likeness, reverse=True)[:5]
    return ", ".join(repr(n) for n in near) if near else "there are no names at all"


def braced(paths: Sequence[str]) -> str:
    """Paths in one text, what they share said once: layers/0/{q_proj, k_proj}/kernel."""
    parts = [path.split("/") for path in paths]
    shortest = min(map(len, parts), default=0)
    if len(paths) < 2 or shortest < 2:
        return ", ".join(paths)
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    tail = next(
        (i for i in range(shortest - head) if len({p[-1 - i] for p in parts}) > 1), shortest - head
    )
    middles = ["/".join(p[head : len(p) - tail]) for p in parts]
    if not head + tail or not all(middles):
        return ", ".join(paths)
    return "/".join(
        [*parts[0][:head], "{" + ", ".join(middles) + "}", *parts[0][len(parts[0]) - tail :]]
    )
