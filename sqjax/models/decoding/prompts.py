"""Prompts of unequal length as one array, and the tokens that end a text."""

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import jax
import numpy as np

from sqjax.models.model import Model
from sqjax.models.tokenizer import Tokenizer, check_text

#: A text or token ids, several of either, or an array of ids, (tokens,) or (batch, tokens).
Prompts = Any


def prompt_rows(model: Model, prompts: Prompts) -> list[np.ndarray]:
    """The token ids of each prompt; one text, or one flat sequence of ids, is one prompt.

    For example [1, 2, 3] is one prompt of three tokens, [[1, 2, 3], [4]] are two prompts.

    Raises:
        ValueError: no prompt at all, an empty one, ids that are not in the vocabulary, or texts for
            a model without a tokenizer.
    """
    several = [prompts] if _is_single(prompts) else prompts
    if len(several) == 0:
        raise ValueError("prompts: expected at least one, got none")
    rows = []
    for number, prompt in enumerate(several):
        where = f"prompts[{number}]"
        row = _ids(model, prompt, where)
        if row.ndim != 1 or row.size == 0:
            raise ValueError(
                f"{where}: expected at least one token in a flat sequence, "
                f"got ids of shape {row.shape}"
            )
        check_tokens(model, row, where)
        rows.append(row.astype(np.int32))
    return rows


def _is_single(prompts: Prompts) -> bool:
    """Whether this is one text or one flat sequence of ids, rather than several of either."""
    if isinstance(prompts, str):
        return True
    if not _is_sequence(prompts):
        raise ValueError(
            "prompts: expected a text, a sequence of token ids, or several of either, got "
            f"{type(prompts).__name__}"
        )
    return len(prompts) > 0 and _is_number(prompts[0])


def _is_sequence(x: Any) -> bool:
    """Whether x has an order: a set has none, and bytes are no ids."""
    if isinstance(x, np.ndarray | jax.Array):
        return x.ndim > 0
    return isinstance(x, Sequence) and not isinstance(x, bytes)


def _is_number(x: Any) -> bool:
    """Whether x is a number, or an array of one."""
    if isinstance(x, np.ndarray | jax.Array):
        return x.ndim == 0
    return isinstance(x, Number)


def _array(ids: Any, where: str) -> np.ndarray:
    """Ids as an array; nested sequences of unequal lengths are none."""
    try:
        return np.asarray(ids)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: expected token ids, got {ids!r}") from error


def check_tokens(model: Model, ids: Any, where: str) -> None:
    """Raises ValueError, naming `where`, if ids are not integers in the model's vocabulary."""
    ids = _array(ids, where)
    size = model.config.vocab_size
    if ids.size > 0 and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{where}: expected integer token ids, got {ids.dtype}"
        )
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.size > 0:
        raise ValueError(
            f"{where}: expected token ids from 0 to {size - 1}, got {int(outside[0])}; "
            "encode the text with this model's own tokenizer"
        )


def _ids(model: Model, prompt: Any, where: str) -> np.ndarray:
    """The ids of one prompt, which is a text or ids already."""
    if isinstance(prompt, Mapping):
        raise ValueError(
            f"{where}: expected a text or token ids, got a message; encode a conversation by "
            "model.tokenizer.encode_chat(messages)"
        )
    if not isinstance(prompt, str):
        return _array(prompt, where)
    check_text(prompt, where)
    if model.tokenizer is None:
        raise ValueError(
            "prompts: the model has no tokenizer; give token ids in place of texts"
        )
    return np.asarray(model.tokenizer.encode(prompt), np.int32)


def encode_alone(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text alone: without the tokens that a tokenizer puts around every text."""
    before, after = _around(tokenizer)
    ids = tokenizer.encode(text)
    return ids[before : len(ids) - after]


def encode_open(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on: without the tokens that a tokenizer puts after every text."""
    _, after = _around(tokenizer)
    ids = tokenizer.encode(text)
    return ids[: len(ids) - after]


def _around(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many tokens a tokenizer puts before and after every text.

    Those of an empty text are both together; of them as many stand before as fit. With 1 and 2
    for an empty text, a text of the ids 1, 7, 2 has one before and one after.
    """
    around = tokenizer.encode("")
    # Of a letter, because a text could itself begin or end with such tokens.
    ids = tokenizer.encode("a")
    for before in range(len(around), -1, -1):
        after = len(around) - before
        own_end = len(ids) - after
        if ids[:before] == around[:before] and ids[own_end:] == around[before:]:
            return before, after
    return 0, 0


def pad_left(
    rows: Sequence[np.ndarray], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array (batch, tokens), with zeros before the shorter ones, and how many.

    For example rows [7, 8, 9] and [5] with 4 tokens become [[0, 7, 8, 9], [0, 0, 0, 5]] with
    padding [1, 3].
    """
    padding = tokens - np.array(list(map(len, rows)), np.int32)
    padded = np.zeros((len(rows), tokens), np.int32)
    for number, row in enumerate(rows):
        padded[number, padding[number] :] = row
    return padded, padding


def stop_ids(model: Model, stop: Any) -> np.ndarray:
    """The ids of the tokens that end a text; the tokenizer's end of text, if it has one, for None.

    Raises:
        ValueError: an id that is not in the vocabulary, or a text that is not exactly one token.
    """
    if stop is None:
        ends = () if model.tokenizer is None else model.tokenizer.ends
        return np.array(ends, np.int32)
    is_single = np.ndim(stop) == 0  # also of a text
    found = [
        _stop_id(model, token) for token in ([stop] if is_single else stop)
    ]
    check_tokens(model, found, "stop")
    return np.array(found, np.int32)


def _stop_id(model: Model, token: Any) -> Any:
    """The id of one stop token, which is a text or an id already."""
    if not isinstance(token, str):
        if not hasattr(token, "__index__") or np.ndim(token):
            raise ValueError(
                f"stop: expected the ids or texts of tokens, got {token!r}"
            )
        return token
    check_text(token, "stop")
    if model.tokenizer is None:
        raise ValueError(
            f"stop: {token!r} is a text, and the model has no tokenizer; give its id"
        )
    ids = encode_alone(model.tokenizer, token)
    if len(ids) != 1:
        raise ValueError(
            f"stop: expected the text of one token, got {token!r}, which is the tokens {ids}"
        )
    return ids[0]
