"""Parameters of tests, in three lots: quick, slow, and those that only `--every-case` runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases for `parametrize`, marked slow but for the quick ones.

    Of a mapping {id: case} the quick ones are named by their ids; else by the cases themselves.
    Of a test that is marked slow itself only the last case runs, whichever are quick (tests/conftest.py).
    """
    named = list(cases.items()) if isinstance(cases, Mapping) else [(case, case) for case in cases]
    names = [name for name, _ in named]
    assert not quick or set(quick) & set(names), f"quick: {quick}, cases: {names}"
    return [
        pytest.param(
            *(case if type(case) is tuple and isinstance(cases, Mapping) else (case,)),
            marks=marks,
            id=getattr(name, "__name__", str(name)),
        )
        for (name, case), marks in zip(named, lots(names, quick), strict=True)
    ]


def slow_rows_but(rows: Iterable[tuple], *quick: str) -> list[Any]:
    """The same for the rows of a table, each with several parameters: a row is named by the first of them."""
    rows = list(rows)
    names = [row[0] for row in rows]
    assert set(names) & set(quick), f"quick: {quick}, rows: {rows}"
    return [
        pytest.param(*row, marks=marks) for row, marks in zip(rows, lots(names, quick), strict=True)
    ]


def lots(names: Sequence[Any], quick: Sequence[Any]) -> list[Any]:
    """The marks of each case: of those that are not quick the last runs with all tests."""
    slow = [i for i, name in enumerate(names) if name not in quick]
    every = [pytest.mark.slow, pytest.mark.every_case]
    return [
        () if i not in slow else pytest.mark.slow if i == slow[-1] else every
        for i in range(len(names))
    ]
