"""Parameters of tests, most of them slow: `-m "not slow"` runs those that are named."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases for `parametrize`, marked slow but for the quick ones.

    Of a mapping {id: case} the quick ones are named by their ids; else by the cases themselves.
    """
    named = list(cases.items()) if isinstance(cases, Mapping) else [(case, case) for case in cases]
    names = [name for name, _ in named]
    assert not quick or set(quick) & set(names), f"quick: {quick}, cases: {names}"
    return [
        pytest.param(
            *(case if type(case) is tuple and isinstance(cases, Mapping) else (case,)),
            marks=() if name in quick else pytest.mark.slow,
            id=getattr(name, "__name__", str(name)),
        )
        for name, case in named
    ]


def slow_rows_but(rows: Iterable[tuple], *quick: str) -> list[Any]:
    """The same for the rows of a table, each with several parameters: a row is named by the first of them."""
    rows = list(rows)
    assert {row[0] for row in rows} & set(quick), f"quick: {quick}, rows: {rows}"
    return [pytest.param(*row, marks=() if row[0] in quick else pytest.mark.slow) for row in rows]
