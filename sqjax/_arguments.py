"""Checks of what a caller passed: what was expected, what came in its place, and what to do."""

from collections.abc import Mapping
from typing import Any


def expect(fits: bool, what: str, expected: str, got: Any) -> None:
    """Raises ValueError unless an argument fits.

    Example: expect(False, "fold", "a Graph", {}) says "fold: expected a Graph, got dict".
    """
    if not fits:
        raise ValueError(f"{what}: expected {expected}, got {came(got)}")


def came(x: Any) -> str:
    """What came, in few words: the type, and of a short value also the value."""
    if x is None or isinstance(x, int | float | str):
        return f"{x!r:.80}"
    return type(x).__name__


def check_function(fn: Any, what: str, order: str) -> None:
    """Raises ValueError for what is no function: a model, or another argument in its place.

    Args:
        fn: what should be fn(params, *inputs).
        what: the name of the function that was called.
        order: the order of its arguments, such as "(fn, params, batches)".
    """
    call = _call_of_model(fn)
    if call is not None:
        raise ValueError(
            f"{what}: expected a function fn(params, *inputs), got a model "
            f"({type(fn).__name__}); pass {call}"
        )
    first = f"a function fn(params, *inputs) first, as in {what}{order}"
    expect(callable(fn), what, first, fn)


def _call_of_model(fn: Any) -> str | None:
    """How to make a function of a model; None for what is none."""
    of_methods = "lambda p, *batch: model.apply(p, *batch)"
    has_methods = hasattr(fn, "apply") and hasattr(fn, "init")
    if has_methods and not isinstance(fn, type):
        return of_methods
    modules = {base.__module__.partition(".")[0] for base in type(fn).__mro__}
    if "transformers" in modules:
        return "lambda p, ids: model(ids, params=p).logits"
    if "flax" in modules:
        return f"sqjax.nnx.functional(model)'s function, or {of_methods}"
    return None


def check_mapping(x: Any, what: str, expected: str) -> None:
    """Raises ValueError for what is no mapping, such as a number in place of {name: number}."""
    expect(isinstance(x, Mapping), what, expected, x)
