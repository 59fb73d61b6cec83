"""Which cases of a table every run takes, and which only the whole one."""

import pytest


def slow_but(quick, cases):
    """The parameters of a table: all but the cases that `quick` names are marked slow.

    A case is a name, or a tuple that begins with one.
    """
    cases = list(cases)
    names = [case if isinstance(case, str) else case[0] for case in cases]
    assert set(quick) & set(names), f"none of {sorted(names)} is quick"
    marked = []
    for name, case in zip(names, cases, strict=True):
        values = (case,) if isinstance(case, str) else case
        marks = () if name in quick else pytest.mark.slow
        marked.append(pytest.param(*values, marks=marks))
    return marked
