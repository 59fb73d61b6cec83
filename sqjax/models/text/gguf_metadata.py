"""A tokenizer as the metadata of a GGUF file: the inverse of `sqjax.models.text.gguf`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sqjax.models.text.building import (
    CONTROL,
    NORMAL,
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
    tokens = {
        i: _Token(text, kind, score)
        for i, (text, score, kind) in enumerate(model.pieces)
    }
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
    """The steps in the words of `Splits`, of what a tokenizer.json says."""
    if stated is None:
        return ()
    kind = stated["type"]
    if kind == "Sequence":
        return tuple(
            step for one in stated["pretokenizers"] for step in _steps(one)
        )
    if kind == "ByteLevel":
        # The package knows the expression of GPT-2 by itself.
        words = GPT2.steps if stated.get("use_regex", True) else ()
        return (
            (("prefix", ""),)
            if stated["add_prefix_space"]
            else (
                *words,
                (BYTES, ""),
            )
        )
    if kind == "Digits":
        return ((DIGITS if stated["individual_digits"] else NUMBERS, ""),)
    if kind == "Punctuation" and stated["behavior"] == "Contiguous":
        return ((PUNCTUATION, ""),)
    regex = stated.get("pattern", {}).get("Regex")
    is_alone = stated.get("behavior") == "Isolated" and not stated["invert"]
    return ((SPLIT, regex) if regex and is_alone else (kind, ""),)


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
    for begins in (False, True):
        for ends in (False, True):
            before = [tokenizer.bos_id] if begins else []
            after = [tokenizer.eos_id] if ends else []
            if around == [*before, *after]:
                return {"add_bos_token": begins, "add_eos_token": ends}
    raise _refuse("a begin and an end around every text, or none", around)


def _templates(tokenizer: Tokenizer) -> dict[str, str]:
    """The chat templates: the usual one, and others by name."""
    found = {}
    for name, template in tokenizer.templates.named.items():
        end = "" if name == DEFAULT else f".{name}"
        found[f"tokenizer.chat_template{end}"] = template.text
    return found
