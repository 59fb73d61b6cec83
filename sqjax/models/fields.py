"""What the fields of a configuration must be, as data: `LlamaConfig` and both readers check by it.

A configuration comes from a file, where a field may be anything at all. Each is checked once,
before anybody computes with it.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import numpy as np

#: The largest size of an array's axis, and the largest float32.
LARGEST_SIZE = 2**31 - 1
_LARGEST_FLOAT = float(np.finfo(np.float32).max)


class What(NamedTuple):
    """What a field must be: in words, and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def is_whole(x: Any) -> bool:
    """Whether x is a whole number; a bool is none here, nor is 32.0."""
    # JSON's true becomes a bool, which Python counts among the integers.
    return isinstance(x, Integral) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def _is_finite(x: Any) -> bool:
    return _is_number(x) and abs(x) <= _LARGEST_FLOAT  # which NaN is not


def _is_id(x: Any) -> bool:
    return is_whole(x) and 0 <= x <= LARGEST_SIZE


def _is_size(x: Any) -> bool:
    return _is_id(x) and x > 0


def _is_epsilon(x: Any) -> bool:
    return _is_number(x) and 0 <= x <= _LARGEST_FLOAT  # which NaN is not


def _is_positive(x: Any) -> bool:
    return _is_epsilon(x) and x > 0


def _is_flag(x: Any) -> bool:
    return isinstance(x, bool)


def _are_ids(x: Any) -> bool:
    if isinstance(x, list):
        return len(x) > 0 and all(map(_is_id, x))
    return _is_id(x)


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _is_mapping(x: Any) -> bool:
    return isinstance(x, dict)


def _or_none(what: What) -> What:
    """What is None, or what something else must be."""
    return What(
        f"{what.expected}, or none", lambda x: x is None or what.holds(x)
    )


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The test of a list, all of whose entries pass a test."""
    return lambda x: isinstance(x, list) and all(map(holds, x))


SIZE = What(f"a whole number from 1 to {LARGEST_SIZE}", _is_size)
SIZE_OR_NONE = _or_none(SIZE)
COUNT = What(f"a whole number from 0 to {LARGEST_SIZE}", _is_id)
POSITIVE = What("a finite number above 0", _is_positive)
POSITIVE_OR_NONE = _or_none(POSITIVE)
EPSILON = What("a finite number of at least 0", _is_epsilon)
FLAG = What("true or false", _is_flag)
ID = What("a token id", _is_id)
IDS = What("a token id, or a list of some", _are_ids)
TEXT = What("a text", _is_text)
TEXTS = What("a list of texts", _list_of(_is_text))
WHOLE_NUMBERS = What("a list of whole numbers", _list_of(is_whole))
NUMBERS = What("a list of numbers", _list_of(_is_number))
FINITE_NUMBERS = What("a list of finite numbers", _list_of(_is_finite))
MAPPING = What("an object with names", _is_mapping)


def one_of(*names: str | None) -> What:
    """What is one of some names, or None if that is among them."""

    def holds(x: Any) -> bool:
        return isinstance(x, str | None) and x in names

    return What(f"one of {names}", holds)


def instance_of(kind: Any, words: str, none: bool = False) -> What:
    """What is an instance of a class, said in words; `none` allows None too."""
    allowed = kind | None if none else kind
    return What(words, lambda x: isinstance(x, allowed))


def tuple_of(kind: type, words: str) -> What:
    """What is a tuple of instances of a class, said in words.

    A whole number is a float too; NaN and infinity are none.
    """
    # int stands for whole numbers without bools, as in `is_whole`.
    tests = {int: is_whole, float: _is_finite}
    holds = tests.get(kind, lambda x: isinstance(x, kind))
    return What(words, lambda x: isinstance(x, tuple) and all(map(holds, x)))


class Key(NamedTuple):
    """A key of a file's configuration.

    Attributes:
        key: its name there.
        field: the field that it fills.
        what: what its value must be.
        default: the value where the file has none, or has null.
        required: whether there is no default.
    """

    key: str
    field: str
    what: What
    default: Any = None
    required: bool = False


def read_fields(
    values: Mapping[str, Any], keys: Sequence[Key]
) -> tuple[dict[str, Any], list[str]]:
    """({field: value}, problems): the values of some keys, with one problem for each wrong one.

    A wrong value is not among the fields.
    """
    found = {}
    problems = []
    for key in keys:
        # null is the same as no key: Hugging Face writes it for what was never set.
        value = values.get(key.key)
        if value is None and key.required:
            problems.append(f"{key.key}: expected a number, got none")
        elif value is None:
            found[key.field] = key.default
        elif key.what.holds(value):
            found[key.field] = value
        else:
            problems.append(wrong(key.key, value, key.what))
    return found, problems


def wrong(name: str, value: Any, what: What) -> str:
    """The text that says what was expected of a field, and what came."""
    return f"{name}: expected {what.expected}, got {shown(value)}"


def shown(value: Any) -> str:
    """A value in an error message, of which a long one is cut off."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check(name: str, value: Any, what: What) -> None:
    """Raises ValueError unless a value is what a field must be."""
    if not what.holds(value):
        raise ValueError(wrong(name, value, what))


def check_fields(config: Any, fields: Mapping[str, What]) -> None:
    """Raises ValueError for the first field of a configuration that is not what it must be."""
    for name, what in fields.items():
        check(f"{type(config).__name__}.{name}", getattr(config, name), what)


def beyond(name: str, ids: Any, vocab_size: int) -> list[str]:
    """One problem if a token id, or one of a list, is not in the vocabulary; None is fine."""
    # Llama 3 has a list of tokens that end a text, and earlier models have one.
    outside = [i for i in jax.tree.leaves(ids) if i >= vocab_size]
    if not outside:
        return []
    return [
        f"{name}: expected token ids below the vocabulary's size {vocab_size}, got {outside[0]}"
    ]
