"""The tokenizer of a directory, as Hugging Face and the models' makers write it."""

import re
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from sqjax.files.opening import open_file
from sqjax.models.fields import WHOLE_NUMBERS, check
from sqjax.models.json_files import read_object, read_object_if_there
from sqjax.models.text.building import (
    add_by_kind,
    add_tokens,
    asked,
    begin_and_end,
    byte_level,
    pair,
    sentencepiece,
)
from sqjax.models.text.chat import Templates
from sqjax.models.text.packages import tokenizers_package
from sqjax.models.text.sentencepiece_file import read_sentencepiece
from sqjax.models.text.special import (
    Settings,
    declare,
    end_id,
    id_of,
    ids_if_some,
    ids_of_config,
    read_settings,
    template_tokens,
    token_texts,
)
from sqjax.models.text.splits import GPT2, QWEN2
from sqjax.models.text.template_files import read_templates
from sqjax.models.text.tokenizer import Tokenizer, with_ids

#: A tokenizer, and {"bos_token": text, ...} of the special tokens that its file names itself.
_Read = tuple[Any, Mapping[str, str]]


class _Adds(NamedTuple):
    """Whether a token is put before every text, and whether one after it."""

    begins: bool = False
    ends: bool = False


#: {the class of a tokenizer: what it puts around a text, where no file says so}.
_USUAL = {
    "LlamaTokenizer": _Adds(begins=True),
    "CodeLlamaTokenizer": _Adds(begins=True),
    "GemmaTokenizer": _Adds(begins=True),
    "CohereTokenizer": _Adds(begins=True),
    "GPTNeoXTokenizer": _Adds(),
    "T5Tokenizer": _Adds(ends=True),
    "RobertaTokenizer": _Adds(begins=True, ends=True),
}
#: Those of which the flags in ``tokenizer_config.json`` count more than what tokenizer.json says.
_OBEYED = tuple(_USUAL)[:5]

#: {the class of a tokenizer: how it splits a text}, of those with ``vocab.json``.
_SPLITS = {
    "": GPT2,
    "GPT2Tokenizer": GPT2,
    "CodeGenTokenizer": GPT2,
    "RobertaTokenizer": GPT2,
    "Qwen2Tokenizer": QWEN2,
}

#: {the start of a model's type: the class of its tokenizer}, for a directory that names no class.
_OF_MODELS = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "phi3": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "t5": "T5Tokenizer",
    "gpt2": "GPT2Tokenizer",
    "gptj": "GPT2Tokenizer",
    "gpt_neo": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "phi": "CodeGenTokenizer",
    "qwen": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
}


def from_directory(
    directory: Path, vocab_size: int | None = None
) -> Tokenizer | None:
    """Reads the tokenizer of a directory; None where there is none.

    It is in ``tokenizer.json``, or else in ``tokenizer.model`` (sentencepiece), or else in
    ``vocab.json`` and ``merges.txt`` (byte-level, as GPT-2's). The files beside it say which tokens
    begin, end and fill a text, and hold the chat templates.

    Args:
        directory: of the checkpoint.
        vocab_size: the model's, beyond which no end may be; None where it is not known.

    Raises:
        ValueError: if a file cannot be read, or what ends a text is no token.
        ImportError: if `tokenizers` is not installed.
    """
    there = [name for name in _READERS if (directory / name).exists()]
    if not there:
        return None
    first = there[0]
    settings = read_settings(directory)
    backend, own_texts = _READERS[first](directory / first, settings)
    texts = {**own_texts, **token_texts(settings)}
    declare(backend, settings, texts)
    tokenizer = _with_settings(backend, settings, texts, vocab_size)
    adds = _adds(settings, complete=first == _COMPLETE)
    if adds is not None:
        _put_around(tokenizer, adds, settings)
    return tokenizer


def _with_settings(
    backend: Any,
    settings: Settings,
    texts: Mapping[str, str],
    vocab_size: int | None,
) -> Tokenizer:
    """The tokenizer, with its special tokens and its templates."""
    begins = [
        id_of(backend, texts.get("bos_token")),
        *ids_if_some(settings, "bos_token_id"),
    ]
    ends = [
        end_id(backend, settings, texts),
        *ids_of_config(settings, "eos_token_id", vocab_size),
    ]
    # The old way to clean a text up is for tokenizers of words: of others it takes spaces away.
    by_merges = type(backend.model).__name__ == "BPE"
    asks = settings.tokenizer.get("clean_up_tokenization_spaces") is True
    return with_ids(
        backend,
        begins,
        ends,
        fills=[
            id_of(backend, texts.get("pad_token")),
            *ids_if_some(settings, "pad_token_id"),
        ],
        templates=Templates(
            read_templates(settings), template_tokens(settings, texts)
        ),
        tidies=asks and not by_merges,
    )


# What is put around every text -----------------------------------------------------------------


def _class_of(settings: Settings) -> str:
    """The name of the tokenizer's class, or of its model's usual one; "" if none is known."""
    family = settings.model_type
    starts = [start for start in _OF_MODELS if family.startswith(start)]
    # "phi3" says more than "phi".
    start = max(starts, key=len, default="")
    return settings.class_name or _OF_MODELS.get(start, "")


def _adds(settings: Settings, complete: bool) -> _Adds | None:
    """What is put around every text; None to leave that to the tokenizer.

    Args:
        settings: the files.
        complete: whether the tokenizer itself says so, because it is a ``tokenizer.json``. Some
            classes still obey the flags beside it.
    """
    name = _class_of(settings)
    flags = {"begins": "add_bos_token", "ends": "add_eos_token"}
    given = {
        field: settings.tokenizer[key]
        for field, key in flags.items()
        if isinstance(settings.tokenizer.get(key), bool)
    }
    obeyed = name in _OBEYED and len(given) > 0
    if complete and not obeyed:
        return None
    return _USUAL.get(name, _Adds())._replace(**given)


def _put_around(tokenizer: Tokenizer, adds: _Adds, settings: Settings) -> None:
    """Makes a tokenizer put tokens around every text.

    Raises:
        ValueError: there is no such token.
    """
    problem = (
        f"{settings.directory}: expected a %s in tokenizer_config.json, because one is put around "
        "every text, got none"
    )
    backend, begin, end = tokenizer.backend, tokenizer.bos_id, tokenizer.eos_id
    begin_and_end(
        backend,
        asked(backend, adds.begins, begin, problem % "bos_token"),
        asked(backend, adds.ends, end, problem % "eos_token"),
    )


# Kinds of files ---------------------------------------------------------------------------------


def _read_json(path: Path, settings: Settings) -> _Read:
    """``tokenizer.json``, which is complete."""
    del settings
    package = tokenizers_package()
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8")
        return package.Tokenizer.from_str(text), {}
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"{path}: expected a tokenizer of the `tokenizers` package, got {error}"
        ) from error


def _read_sentencepiece(path: Path, settings: Settings) -> _Read:
    """``tokenizer.model``, which names its own special tokens."""
    model, special = read_sentencepiece(path)
    # A Llama's tokenizer that is not "legacy" puts a space at the start only.
    once = settings.tokenizer.get("legacy") is False
    model = model._replace(prefix_once=once)
    try:
        backend = sentencepiece(model)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"{path}: expected a sentencepiece model, got {error}; fetch it again"
        ) from error
    texts, _, kinds = zip(*model.pieces, strict=True)
    add_by_kind(backend, texts, kinds)
    _add_further(backend, settings)
    return backend, special


def _read_merges(path: Path, settings: Settings) -> _Read:
    """``vocab.json`` with ``merges.txt`` beside it."""
    name = _class_of(settings)
    if name not in _SPLITS:
        raise ValueError(
            f"{path}: expected the tokenizer_class of tokenizer_config.json to be one of "
            f"{list(_SPLITS)[1:]}, got {name!r}, whose way to split a text is not written in this "
            "file; save the tokenizer as tokenizer.json"
        )
    vocabulary = read_object(path)
    check(f"{path}: ids", list(vocabulary.values()), WHOLE_NUMBERS)
    merges = _merges(path.with_name("merges.txt"))
    prefix = settings.tokenizer.get("add_prefix_space") is True
    try:
        backend = byte_level(vocabulary, merges, _SPLITS[name], prefix)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"{path}: expected merges of its own tokens, got {error}"
        ) from error
    _add_further(backend, settings)
    # No file beside the vocabulary need name its special tokens.
    ids = [
        *ids_if_some(settings, "bos_token_id"),
        *ids_of_config(settings, "eos_token_id", None),
    ]
    tokens = filter(None, map(backend.id_to_token, ids))
    add_tokens(backend, tokens, special=True)
    return backend, {}


def _merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a file, one a line."""
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected the merges of vocab.json, got {error}"
        ) from error
    text = re.sub(r"\A#version.*\n", "", text).replace("\r", "")
    rows = [row for row in text.split("\n") if row]
    odd = [row for row in rows if row.count(" ") != 1]
    if odd:
        raise ValueError(f"{path}: expected two tokens a line, got {odd[0]!r}")
    return list(map(pair, rows))


def _add_further(backend: Any, settings: Settings) -> None:
    """Adds the tokens of ``added_tokens.json``, {token: id}, which older checkpoints have.

    Raises:
        ValueError: a token has another id by then.
    """
    path = settings.directory / "added_tokens.json"
    tokens = read_object_if_there(path)
    check(f"{path}: ids", list(tokens.values()), WHOLE_NUMBERS)
    for token, expected in sorted(tokens.items(), key=itemgetter(1)):
        add_tokens(backend, [token], special=False)
        got = backend.token_to_id(token)
        if got != expected:
            raise ValueError(
                f"{path}: expected {token!r} to have the next id, {got}, got {expected}"
            )


_COMPLETE = "tokenizer.json"
#: The first one that there is counts.
_READERS: dict[str, Callable[[Path, Settings], _Read]] = {
    _COMPLETE: _read_json,
    "tokenizer.model": _read_sentencepiece,
    "vocab.json": _read_merges,
}
