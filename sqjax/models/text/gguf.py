"""The tokenizer of a GGUF file, rebuilt from its metadata."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from sqjax.models.fields import (
    FLAG,
    ID,
    NUMBERS,
    TEXT,
    TEXTS,
    WHOLE_NUMBERS,
    Key,
    beyond,
    read_fields,
)
from sqjax.models.text.building import (
    BYTE,
    SPACE,
    Piece,
    Pieces,
    add_by_kind,
    asked,
    begin_and_end,
    byte_level,
    pair,
    sentencepiece,
)
from sqjax.models.text.chat import DEFAULT, Template, Templates
from sqjax.models.text.splits import BY_NAME
from sqjax.models.text.tokenizer import Tokenizer, with_ids

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_BEGINS = "tokenizer.ggml.add_bos_token"
_TEMPLATE = "tokenizer.chat_template"

# What is read of the metadata. Whatever ends a turn or a message ends what is generated.
_KEYS = (
    Key("tokenizer.ggml.tokens", "tokens", TEXTS),
    Key("tokenizer.ggml.token_type", "kinds", WHOLE_NUMBERS),
    Key("tokenizer.ggml.merges", "merges", TEXTS),
    Key("tokenizer.ggml.scores", "scores", NUMBERS),
    Key("tokenizer.ggml.bos_token_id", "begin", ID),
    Key("tokenizer.ggml.eos_token_id", "end", ID),
    Key("tokenizer.ggml.eot_token_id", "end_of_turn", ID),
    Key("tokenizer.ggml.eom_token_id", "end_of_message", ID),
    Key("tokenizer.ggml.unknown_token_id", "unknown", ID),
    Key("tokenizer.ggml.padding_token_id", "padding", ID),
    Key(_BEGINS, "begins", FLAG),
    Key("tokenizer.ggml.add_eos_token", "ends", FLAG, False),
    Key("tokenizer.ggml.add_space_prefix", "prefix", FLAG, True),
    Key(_TEMPLATE, "template", TEXT),
)
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
#: {tokenizer.ggml.model: the lists it must have}.
_LISTS = {
    _BYTE_LEVEL: ("tokens", "kinds", "merges"),
    _SENTENCEPIECE: ("tokens", "kinds", "scores"),
}
_ENDS = ("end", "end_of_turn", "end_of_message")
_IDS = ("begin", *_ENDS, "unknown", "padding")


def from_gguf_metadata(
    metadata: Mapping[str, Any], where: str = "the GGUF file"
) -> Tokenizer:
    """Rebuilds the tokenizer of a GGUF file.

    Those of ``tokenizer.ggml.model`` "llama" (sentencepiece: Llama 1 and 2, Mistral, Gemma) are
    complete there. Of "gpt2" (byte-level) the file has a name only for how text is split,
    ``tokenizer.ggml.pre``: those in `sqjax.models.text.splits` are known.

    Args:
        metadata: the GGUF file's fields, ``tokenizer.*`` among them.
        where: the file, for messages of errors.

    Raises:
        ValueError: if the file describes another tokenizer (how another one splits text is not
            written in the file, so it cannot be rebuilt from there), or fields are missing or not
            what they must be.
        ImportError: if `tokenizers` is not installed.
    """
    model, pre = str(metadata.get(_MODEL)), metadata.get(_PRE)
    begins = _usually_begins(model, pre)
    fields = _fields({_BEGINS: begins, **metadata}, _LISTS[model])
    backend = _BACKENDS[model](fields, pre)
    tokens = [backend.id_to_token(i) for i in range(len(fields["tokens"]))]
    add_by_kind(backend, tokens, fields["kinds"])
    begin_and_end(
        backend,
        asked(backend, fields["begins"], fields["begin"], _lacks("begin")),
        asked(backend, fields["ends"], fields["end"], _lacks("end")),
    )
    return with_ids(
        backend,
        [fields["begin"]],
        itemgetter(*_ENDS)(fields),
        [fields["padding"]],
        templates=Templates(_templates(metadata, where), _texts(fields)),
    )


def _usually_begins(model: str, pre: Any) -> bool:
    """Whether such a tokenizer puts a token before every text, where a file does not say.

    Raises:
        ValueError: it is not known here.
    """
    if model == _SENTENCEPIECE:
        return True
    if model == _BYTE_LEVEL and pre in tuple(BY_NAME):
        return BY_NAME[pre].begins
    raise ValueError(
        f"tokenizer in the GGUF file: expected {_MODEL} to be {_SENTENCEPIECE!r}, or "
        f"{_BYTE_LEVEL!r} with a {_PRE} of {sorted(BY_NAME)}, got {model!r} with {pre!r}; load "
        "the model's Hugging Face directory, whose tokenizer.json is complete"
    )


def _lacks(place: str) -> str:
    return (
        f"tokenizer in the GGUF file: expected an id of the token that is to {place} every text, "
        "got none; fetch the file again"
    )


# Fields -----------------------------------------------------------------------------------------


def _fields(
    metadata: Mapping[str, Any], lists: Sequence[str]
) -> dict[str, Any]:
    """The fields of the metadata, each what it must be, and all of one length."""
    fields, problems = read_fields(metadata, _KEYS)
    for name in lists:
        if fields.get(name, ()) is None:
            problems.append(f"{name}: expected a list, got none")
    problems = problems or _misfits(fields, lists)
    if problems:
        raise ValueError(
            f"tokenizer in the GGUF file: {'; '.join(problems)}; fetch the file again"
        )
    return fields


def _misfits(fields: Mapping[str, Any], lists: Sequence[str]) -> list[str]:
    """One problem for each field that does not go with the tokens."""
    tokens = fields["tokens"]
    # All lists but that of the merges have an entry for each token.
    counts = {name: len(fields[name]) for name in {*lists} - {"merges"}}
    different = len(set(tokens))
    problems = []
    if not tokens or {different, *counts.values()} != {len(tokens)}:
        problems.append(
            f"expected as many different tokens as types and scores, got {different} different "
            f"ones and {counts}"
        )
    for name in _IDS:
        problems += beyond(name, fields[name], len(tokens))
    return problems


# Kinds ------------------------------------------------------------------------------------------


def _byte_level(fields: Mapping[str, Any], pre: str) -> Any:
    """A byte-level tokenizer, which splits a text as its name says."""
    vocabulary = {token: i for i, token in enumerate(fields["tokens"])}
    merges = list(map(pair, fields["merges"]))
    try:
        return byte_level(vocabulary, merges, BY_NAME[pre])
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"tokenizer in the GGUF file: expected merges of two of its own tokens, got {error}"
        ) from error


def _sentencepiece(fields: Mapping[str, Any], pre: Any) -> Any:
    """A sentencepiece tokenizer."""
    del pre
    kinds = fields["kinds"]
    rows = zip(fields["tokens"], fields["scores"], kinds, strict=True)
    return sentencepiece(
        Pieces(
            pieces=[Piece(_signed(token), *row) for token, *row in rows],
            merges=True,
            unknown=fields["unknown"] or 0,
            bytes_for_unknown=BYTE in kinds,
            prefix=fields["prefix"],
        )
    )


def _signed(token: str) -> str:
    """A token of spaces alone, which files hold as such, as the signs for them."""
    return token if token.strip(" ") else SPACE * len(token)


_BACKENDS = {_BYTE_LEVEL: _byte_level, _SENTENCEPIECE: _sentencepiece}


# Templates --------------------------------------------------------------------------------------


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": text, ...} of the special tokens that the file has."""
    roles = {
        "bos_token": "begin",
        "eos_token": "end",
        "unk_token": "unknown",
        "pad_token": "padding",
    }
    tokens = fields["tokens"]
    return {
        role: tokens[fields[name]]
        for role, name in roles.items()
        if fields[name] is not None
    }


def _templates(metadata: Mapping[str, Any], where: str) -> dict[str, Template]:
    """The chat templates: the usual one, and others by name."""
    texts = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or DEFAULT: text
        for key, text in metadata.items()
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    return {
        name: Template(text, f"{where}: chat template {name!r}")
        for name, text in texts.items()
    }
