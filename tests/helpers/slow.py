"""Parameters of tests, most of them slow: `-m "not slow"` runs those that are named."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases for `parametrize`, marked slow but for the quick ones.

    Of a mapping {id: case} the quick ones are named by their ids; else by the cases themselves.
    """
    named = cases.items() if isinstance(cases, Mapping) else [(case, case) for case in cases]
    names = [name for name, _ in named]
    assert set(quick) <= set(names), f"quick: {quick}, cases: {names}"
    marks = {name: () if name in quick else pytest.mark.slow for name in names}
    return [
        pytest.param(
            *(case if type(case) is tuple and isinstance(cases, Mapping) else (case,)),
            marks=marks[name],
            id=getattr(name, "__name__", str(name)),
        )
        for name, case in named
    ]
