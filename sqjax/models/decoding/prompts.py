"""Prompts of unequal length as one array, and the tokens that end a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sqjax.models.model import Model
from sqjax.models.tokenizer import Tokenizer

#: A text or token ids, several of either, or an array of ids, (tokens,) or (batch, tokens).
Prompts = Any


def prompt_rows(model: Model, prompts: Prompts) -> list[np.ndarray]:
    """The token ids of each prompt; one text, or one flat sequence of ids, is one prompt.

    Raises:
        ValueError: no prompt at all, an empty one, ids that are not in the vocabulary, texts without a tokenizer.
    """
    single = isinstance(prompts, str) or (
        len(prompts) > 0 and np.ndim(prompts[0]) == 0 and not _is_text(prompts[0])
    )
    rows = [_ids(model, prompt) for prompt in ([prompts] if single else prompts)]
    if not rows:
        raise ValueError("prompts: expected at least one, got none")
    for number, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise ValueError(
                f"prompts[{number}]: expected at least one token in a flat sequence, got {row.shape}"
            )
        check_tokens(model, row, f"prompts[{number}]")
    return [row.astype(np.int32) for row in rows]


def check_tokens(model: Model, ids: Any, where: str) -> None:
    """Raises ValueError, naming `where`, if ids are not integers in the model's vocabulary."""
    ids, size = np.asarray(ids), model.config.vocab_size
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{where}: expected integer token ids, got {ids.dtype}")
    if wrong := [int(i) for i in ids.ravel() if not 0 <= i < size]:
        raise ValueError(
            f"{where}: expected token ids from 0 to {size - 1}, got {wrong[0]}; another tokenizer's?"
        )


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str)


def _ids(model: Model, prompt: Any) -> np.ndarray:
    if not _is_text(prompt):
        return np.asarray(prompt)
    if model.tokenizer is None:
        raise ValueError("prompts: the model has no tokenizer; give token ids in place of texts")
    return np.asarray(model.tokenizer.encode(prompt), np.int32)


def encode_alone(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that begins nothing: without the tokens that a tokenizer puts before every text."""
    begin, ids = tokenizer.encode(""), tokenizer.encode(text)
    return ids[len(begin) :] if ids[: len(begin)] == begin else ids


def pad_left(rows: Sequence[np.ndarray], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array (batch, tokens), zeros before the shorter ones, and how many; tokens divide by `multiple`."""
    longest = max(len(row) for row in rows)
    tokens = -(-longest // multiple) * multiple
    padding = np.array([tokens - len(row) for row in rows], np.int32)
    return np.stack(
        [np.pad(row, (pad, 0)) for row, pad in zip(rows, padding, strict=True)]
    ), padding


def stop_ids(model: Model, stop: Any) -> np.ndarray:
    """The ids of the tokens that end a text. None stands for the tokenizer's end of text, if it has one.

    Raises:
        ValueError: an id that is not in the vocabulary, or a text that is not exactly one token.
    """
    if stop is None:
        end = None if model.tokenizer is None else model.tokenizer.eos_id
        return np.array([] if end is None else [end], np.int32)
    found = [
        _stop_id(model, token)
        for token in ([stop] if isinstance(stop, str) or np.ndim(stop) == 0 else stop)
    ]
    check_tokens(model, found, "stop")
    return np.array(found, np.int32)


def _stop_id(model: Model, token: Any) -> Any:
    if not isinstance(token, str):
        return token
    if model.tokenizer is None:
        raise ValueError(f"stop: {token!r} is a text, and the model has no tokenizer; give its id")
    ids = encode_alone(model.tokenizer, token)
    if len(ids) != 1:
        raise ValueError(
            f"stop: expected the text of one token, got {token!r}, which is the tokens {ids}"
        )
    return ids[0]
