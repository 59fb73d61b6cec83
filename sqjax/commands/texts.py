"""Texts that commands read: a file, a folder, or what comes with sqjax; and their windows."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqjax.commands.defaults import WINDOWS
from sqjax.commands.options import Talk

#: What is read where nothing is said.
TOKENS = 512
#: Files of a folder that are read.
_ENDINGS = (".txt", ".md", ".jsonl")
#: An encoder reads lines, so many for one window of a decoder.
_LINES = 8


class Texts(NamedTuple):
    """Texts, where they came from, and their digest.

    Attributes:
        texts: each read on its own by the tokenizer.
        name: for people.
        digest: of all of them.
        purpose: "calibration" or "evaluation".
    """

    texts: list[str]
    name: str
    digest: str
    purpose: str


class Windows(NamedTuple):
    """What is read of texts.

    Attributes:
        ids: (windows, tokens).
        available: how many windows the texts have.
        name: of the texts.
    """

    ids: Any
    available: int
    name: str

    def __str__(self) -> str:
        count, tokens = self.ids.shape
        of = "" if count == self.available else f" of {self.available}"
        return f"{count}{of} windows of {tokens} tokens of {self.name}"


def read_texts(path: Path | None, purpose: str) -> Texts:
    """The texts of a file or a folder; without one, the shipped text for this purpose.

    Raises:
        ValueError: there is nothing to read, or a line of .jsonl is none.
    """
    if path is None:
        from sqjax.commands.shared import shipped

        texts = [shipped(purpose)]
        name = f"the {purpose} text that comes with sqjax"
    else:
        texts = [text for text in _texts_at(path) if text.strip()]
        name = str(path)
    if not texts:
        raise ValueError(f"{path}: expected a text, got nothing but spaces")
    return Texts(texts, name, _digest(texts), purpose)


def _texts_at(path: Path) -> Iterator[str]:
    if path.is_dir():
        inside = filter(Path.is_file, sorted(path.iterdir()))
        files = [file for file in inside if file.suffix in _ENDINGS]
        if not files:
            raise ValueError(
                f"{path}: expected a folder of texts, got no file that ends with one of "
                f"{', '.join(_ENDINGS)}"
            )
    else:
        files = [path]
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}: expected a text in UTF-8, got {error}"
            ) from error
        if file.suffix == ".jsonl":
            yield from _texts_in_lines(file, text)
        else:
            yield text


def _texts_in_lines(file: Path, text: str) -> Iterator[str]:
    """The texts of JSON lines, each {"text": ...} or a bare text."""
    # Not `splitlines`, because JSON's texts may hold the other ends of lines that Unicode has.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{file}:{number}: expected a line of JSON, got {error}"
            ) from error
        found = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(found, str):
            got = sorted(entry) if isinstance(entry, dict) else entry
            raise ValueError(
                f'{file}:{number}: expected {{"text": ...}}, got {got}'
            )
        yield found


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return f"sha256:{digest.hexdigest()}"


def token_windows(
    model: Any, texts: Texts, tokens: int | None, count: int | None
) -> Windows:
    """The first windows of texts, which are joined one after another.

    Args:
        model: a `Model` with a tokenizer.
        texts: what is read.
        tokens: of a window; None for 512, or as many as the model takes.
        count: how many windows; None for the usual number, or as many as there are.

    Raises:
        ValueError: the model takes fewer tokens, or the texts have too few.
    """
    from sqjax.models.evaluation.perplexity import windows

    most = model.config.max_length
    length = min(TOKENS, most) if tokens is None else tokens
    if length > most:
        raise ValueError(
            f"--tokens: expected at most {most}, which is what the model takes, got {length}; give "
            "a smaller --tokens"
        )
    ids: list[int] = []
    for text in texts.texts:
        ids += model.tokenizer.encode(text)
    available = len(ids) // length
    if available < 1:
        raise ValueError(
            f"{texts.name}: expected at least {length} tokens, got {len(ids)}; give a longer text, "
            "or a smaller --tokens"
        )
    if count is None:
        count = min(available, WINDOWS[texts.purpose])
    return Windows(windows(ids, length, count), available, texts.name)


def lines(texts: Texts, count: int | None) -> Sequence[str]:
    """The lines that an encoder reads: 8 for each window."""
    found: list[str] = []
    for text in texts.texts:
        found += [line.strip() for line in text.splitlines() if line.strip()]
    windows = WINDOWS[texts.purpose] if count is None else count
    return found[: _LINES * windows]


def say(talk: Talk, what: str, read: object) -> None:
    """Says which text is read."""
    talk.note(f"{what}: {read}")
