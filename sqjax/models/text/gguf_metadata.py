"""A tokenizer as the metadata of a GGUF file: the inverse of `sqjax.models.text.gguf`."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sqjax.models.text.building import (
    CONTROL,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
)
from sqjax.models.text.chat import DEFAULT
from sqjax.models.text.sentencepiece_file import read_sentencepiece
from sqjax.models.text.splits import (
    BY_NAME,
    BYTES,
    DIGITS,
    GPT2,
    NUMBERS,
    PUNCTUATION,
    SPLIT,
    Splits,
    Steps,
)
from sqjax.models.text.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_FIX = (
    "give like= the .gguf file or the directory that the model was loaded from, or write it "
    "without a tokenizer: sqjax.models.Model(model.config)"
)


class _Token(NamedTuple):
    """A token: its text, its kind, and its score, where there are scores."""

    text: str
    kind: int
    score: float = 0.0


def gguf_metadata(
    tokenizer: Tokenizer, vocab_size: int, directory: Path | None = None
) -> dict[str, Any]:
    """The keys and values that describe a tokenizer.

    Of a byte-level one everything is in the tokenizer, and a name stands for how it splits a text.
    Of a sentencepiece model the scores are needed, which ``tokenizer.model`` has.

    Args:
        tokenizer: the tokenizer.
        vocab_size: the rows of the embedding: a file has a token for each of them.
        directory: where ``tokenizer.model`` may be.

    Raises:
        ValueError: GGUF has no words for this tokenizer.
    """
    stated = json.loads(tokenizer.backend.to_str())
    steps = _steps(stated["pre_tokenizer"])
    file = (directory or Path()) / "tokenizer.model"
    has_pieces = directory is not None and file.is_file()
    # Some directories have both files; bytes are no pieces.
    if has_pieces and (BYTES, "") not in steps:
        known, keys = _of_pieces(file)
    else:
        known, keys = _of_bytes(stated, steps)
    tokens = _all_tokens(known, stated["added_tokens"], vocab_size)
    texts, kinds, scores = zip(*tokens, strict=True)
    if "scores" in keys:
        keys["scores"] = list(map(float, scores))
    keys |= {"tokens": list(texts), "token_type": list(kinds)}
    keys |= _ids(tokenizer) | _around(tokenizer)
    named = {f"{_PREFIX}{key}": x for key, x in keys.items() if x is not None}
    return named | _templates(tokenizer)


def _refuse(expected: str, got: Any) -> ValueError:
    return ValueError(
        f"tokenizer: expected {expected}, because GGUF has words for no other, got {got}; {_FIX}"
    )


# Tokens -------------------------------------------------------------------------------------------


def _all_tokens(
    known: Mapping[int, _Token], added: list[dict[str, Any]], vocab_size: int
) -> list[_Token]:
    """A token for each row of the embedding, in their order."""
    tokens = dict(known)
    for token in added:
        _check_plain(token)
        kind = CONTROL if token["special"] else USER_DEFINED
        # A sentencepiece model says itself what kind a token of its own is.
        if token["id"] not in known or known[token["id"]].kind == NORMAL:
            tokens[token["id"]] = _Token(token["content"], kind)
    beyond = [i for i in tokens if i >= vocab_size]
    if beyond:
        raise _refuse(
            f"ids below {vocab_size}, the embedding's rows", beyond[0]
        )
    # Embeddings often have more rows than there are tokens.
    return [
        tokens.get(i, _Token(f"[PAD{i}]", UNUSED)) for i in range(vocab_size)
    ]


def _check_plain(token: Mapping[str, Any]) -> None:
    """Raises ValueError for an added token that takes the spaces around it, or whole words only."""
    flags = [x for x in ("lstrip", "rstrip", "single_word") if token[x]]
    if flags:
        raise _refuse(
            "added tokens without flags", f"{token['content']!r} with {flags}"
        )


def _of_pieces(file: Path) -> tuple[dict[int, _Token], dict[str, Any]]:
    """The tokens of a sentencepiece model, and the keys of its own."""
    model, _ = read_sentencepiece(file)
    if not model.merges or model.characters or model.one_space:
        raise _refuse("a sentencepiece model that merges", f"that of {file}")
    tokens = {}
    for i, (text, score, kind) in enumerate(model.pieces):
        # The file holds a user's symbol as it stands in a text.
        is_symbol = kind == USER_DEFINED
        shown = text.replace(SPACE, " ") if is_symbol else text
        tokens[i] = _Token(shown, kind, score)
    keys = {
        "model": "llama",
        "pre": "default",
        "scores": [],
        "unknown_token_id": model.unknown,
        "add_space_prefix": model.prefix,
    }
    return tokens, keys


def _of_bytes(
    stated: Mapping[str, Any], steps: Steps
) -> tuple[dict[int, _Token], dict[str, Any]]:
    """The tokens of a byte-level tokenizer, and the keys of its own."""
    model = stated["model"]
    if model["type"] != "BPE" or (BYTES, "") not in steps:
        raise _refuse(
            "a byte-level tokenizer (or tokenizer.model)", model["type"]
        )
    vocabulary = model["vocab"].items()
    tokens = {i: _Token(text, NORMAL) for text, i in vocabulary}
    merges = [
        pair if isinstance(pair, str) else " ".join(pair)
        for pair in model["merges"]
    ]
    composes = _composes(stated["normalizer"])
    whole_words = bool(model.get("ignore_merges"))
    wanted = Splits(steps, composes, whole_words)
    keys = {"model": "gpt2", "pre": _name_of(wanted), "merges": merges}
    return tokens, keys


# How a text is split ------------------------------------------------------------------------------


def _name_of(wanted: Splits) -> str:
    """The name of a way to split a text."""
    for name, splits in BY_NAME.items():
        steps = splits.steps
        if (BYTES, "") not in steps:
            steps = (*steps, (BYTES, ""))
        if splits._replace(steps=steps, begins=False) == wanted:
            return name
    raise _refuse(f"a way to split a text of {sorted(BY_NAME)}", wanted)


def _steps(stated: Any) -> Steps:
    """The steps in the words of `Splits`, of what a tokenizer.json says.

    A step that has no words there keeps the name of its type, which no `Splits` has.
    """
    if stated is None:
        return ()
    kind = stated["type"]
    make = _WORDS_OF.get(kind)
    return ((kind, ""),) if make is None else make(stated)


def _of_sequence(stated: Mapping[str, Any]) -> Steps:
    inside = map(_steps, stated["pretokenizers"])
    return tuple(itertools.chain.from_iterable(inside))


def _of_byte_level(stated: Mapping[str, Any]) -> Steps:
    prefix = (("prefix", ""),) if stated["add_prefix_space"] else ()
    # The package knows the expression of GPT-2 by itself.
    words = GPT2.steps if stated.get("use_regex", True) else ()
    return (*prefix, *words, (BYTES, ""))


def _of_digits(stated: Mapping[str, Any]) -> Steps:
    return ((DIGITS if stated["individual_digits"] else NUMBERS, ""),)


def _of_punctuation(stated: Mapping[str, Any]) -> Steps:
    return ((PUNCTUATION + _unless(stated, "Contiguous"), ""),)


def _of_split(stated: Mapping[str, Any]) -> Steps:
    regex = stated["pattern"].get("Regex", "")
    inverted = " of all else" if stated["invert"] else ""
    return ((SPLIT + _unless(stated, "Isolated") + inverted, regex),)


def _unless(stated: Mapping[str, Any], usual: str) -> str:
    """A behaviour in words, but for the one that GGUF's names stand for."""
    behavior = stated["behavior"]
    return "" if behavior == usual else f" ({behavior})"


#: {type of a pre-tokenizer: its steps}.
_WORDS_OF: dict[str, Callable[[Mapping[str, Any]], Steps]] = {
    "Sequence": _of_sequence,
    "ByteLevel": _of_byte_level,
    "Digits": _of_digits,
    "Punctuation": _of_punctuation,
    "Split": _of_split,
}


def _composes(stated: Any) -> bool:
    """Whether accents are composed with their letters, which is all that a name may stand for."""
    if stated is None:
        return False
    inside = stated.get("normalizers", [stated])
    kinds = [one["type"] for one in inside]
    if kinds not in ([], ["NFC"]):
        raise _refuse("a text that is taken as it is, or NFC of it", kinds)
    return kinds == ["NFC"]


# Special tokens -----------------------------------------------------------------------------------


def _ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The keys of special tokens. What ends a text may be three of them."""
    if len(tokenizer.ends) > 3:
        raise _refuse("at most 3 tokens that end a text", tokenizer.ends)
    ends = [*tokenizer.ends, None, None, None]
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0],
        "eot_token_id": ends[1],
        "eom_token_id": ends[2],
        "padding_token_id": tokenizer.pad_id,
    }


def _around(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether a token is put before every text, and one after it."""
    around = tokenizer.encode("")
    begin, end = [tokenizer.bos_id], [tokenizer.eos_id]
    # With one token for both, that of an empty text is its begin.
    begins = around[:1] == begin
    rest = around[begins:]
    if rest not in ([], end):
        raise _refuse("a begin and an end around every text, or none", around)
    return {"add_bos_token": begins, "add_eos_token": rest == end}


def _templates(tokenizer: Tokenizer) -> dict[str, str]:
    """The chat templates: the usual one, and others by name."""
    found = {}
    for name, template in tokenizer.templates.named.items():
        end = "" if name == DEFAULT else f".{name}"
        found[f"tokenizer.chat_template{end}"] = template.text
    return found
