"""Texts to batches of token ids, in few shapes: `jax.jit` compiles a program for each shape."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sqjax.models.fields import FLAG, SIZE_OR_NONE, TEXT, check_fields
from sqjax.models.text.tokenizer import check_text

#: The shortest width that a text is filled to.
_SHORTEST = 16


@dataclass(frozen=True)
class Reading:
    """How a checkpoint wants its texts read.

    Attributes:
        max_tokens: longer texts are cut to so many tokens, the special ones among them; None for
            what the model was made for.
        lowercase: whether texts are made lower case first.
        prompt: what is put before every text.
    """

    max_tokens: int | None = None
    lowercase: bool = False
    prompt: str = ""

    def __post_init__(self):
        fields = {"max_tokens": SIZE_OR_NONE, "lowercase": FLAG, "prompt": TEXT}
        check_fields(self, fields)


class TextBatch(NamedTuple):
    """Some texts in one shape.

    Attributes:
        numbers: which of all texts they are. There may be more rows, which are copies.
        ids, mask: (rows, tokens); the mask is False for padding, which follows the text.
    """

    numbers: list[int]
    ids: np.ndarray
    mask: np.ndarray


def token_ids(
    backend: Any, texts: Sequence[str], limit: int
) -> list[list[int]]:
    """The token ids of each text, with its special tokens, cut to so many in all.

    What the tokenizer's own file says of cutting and filling has no effect, because it is about
    other texts: MiniLM's fills every text to 128 tokens.
    """
    room = limit - backend.num_special_tokens_to_add(False)
    if room < 0:
        raise ValueError(
            f"max_tokens: expected room for the special tokens, {limit - room}, got {limit}"
        )
    found = []
    for encoding in backend.encode_batch(list(texts), add_special_tokens=False):
        encoding.truncate(room)
        found.append(backend.post_process(encoding).ids)
    return found


def text_batches(
    ids: Sequence[Sequence[int]], rows: int, limit: int, pad_id: int
) -> Iterator[TextBatch]:
    """Texts of like lengths together, so that little is padding.

    Widths and numbers of rows are powers of two, or the limits. With a limit of 256 tokens, texts
    of 7, 40 and 300 tokens are filled to 16, filled to 64, and cut to 256.

    Args:
        ids: of each text.
        rows: how many texts a batch has at most.
        limit: how many tokens a text has at most.
        pad_id: what fills a text.
    """
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for first in range(0, len(order), rows):
        numbers = order[first : first + rows]
        width = _rounded(max(len(ids[numbers[0]]), _SHORTEST), limit)
        height = _rounded(len(numbers), rows)
        filled = np.full((height, width), pad_id, np.int32)
        mask = np.zeros((height, width), bool)
        for row in range(height):
            # Rows beyond the last text repeat it: of padding alone a scale for the whole batch
            # could be another.
            text = ids[numbers[min(row, len(numbers) - 1)]]
            filled[row, : len(text)] = text
            mask[row, : len(text)] = True
        yield TextBatch(numbers, filled, mask)


def _rounded(size: int, largest: int) -> int:
    """The next power of two, or the largest size if that is less."""
    return min(1 << (size - 1).bit_length(), largest)


def prepared(texts: Any, reading: Reading) -> list[str]:
    """Texts as the checkpoint wants them.

    Raises:
        ValueError: something is no text; names its place.
    """
    if isinstance(texts, str):
        raise ValueError(
            "texts: expected a list of texts, got one text; write [text]"
        )
    found = []
    for number, text in enumerate(texts):
        check_text(text, f"texts[{number}]")
        whole = (reading.prompt + text).strip()
        found.append(whole.lower() if reading.lowercase else whole)
    return found
