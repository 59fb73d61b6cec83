"""Text to token ids and back, with the `tokenizers` package, from what a checkpoint holds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from sqjax.files.opening import open_file
from sqjax.models.fields import (
    ID,
    IDS,
    TEXT,
    TEXTS,
    WHOLE_NUMBERS,
    Key,
    beyond,
    read_fields,
    wrong,
)
from sqjax.models.json_files import read_object_if_there

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer`, and the ids that end a text.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        eos_id: the id that ends a text; None if the checkpoint has none.
        more_ends: other ids that end one too.
    """

    backend: Any
    eos_id: int | None
    more_ends: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a text."""
        first = () if self.eos_id is None else (self.eos_id,)
        return (*first, *self.more_ends)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens the checkpoint asks for.

        Raises:
            ValueError: it is no text, or not one of Unicode (half of a surrogate pair is in it).
        """
        check_text(text, "encode")
        return self.backend.encode(text).ids

    def decode(self, ids: Iterable) -> str:
        """The text of token ids, special tokens left out."""
        return self.backend.decode(
            list(map(int, ids)), skip_special_tokens=True
        )


def check_text(text: Any, where: str) -> None:
    """Raises ValueError, naming `where`, if this is no text, or one that has no UTF-8 form."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected a text of Unicode, got half of a surrogate pair at "
            f"{error.start}; decode the text's bytes as UTF-8"
        ) from error


# GGUF ---------------------------------------------------------------------------------------------

# What is read of the metadata. Whatever ends a turn or a message ends what is generated.
_GGUF_KEYS = (
    Key("tokenizer.ggml.tokens", "tokens", TEXTS),
    Key("tokenizer.ggml.token_type", "kinds", WHOLE_NUMBERS),
    Key("tokenizer.ggml.merges", "merges", TEXTS),
    Key("tokenizer.ggml.eos_token_id", "end", ID),
    Key("tokenizer.ggml.eot_token_id", "end_of_turn", ID),
    Key("tokenizer.ggml.eom_token_id", "end_of_message", ID),
)
_LISTS = ("tokens", "kinds", "merges")
_ENDS = ("end", "end_of_turn", "end_of_message")


def from_gguf_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuilds SmolLM's tokenizer: byte-level BPE as in GPT-2, after every digit was split off.

    Args:
        metadata: the GGUF file's fields, ``tokenizer.ggml.*`` among them.

    Raises:
        ValueError: if the file describes another tokenizer (how another one splits text is not
            written in the file, so it cannot be rebuilt from there), or fields are missing or not
            what they must be.
        ImportError: if `tokenizers` is not installed.
    """
    _check_smollm(metadata)
    fields = _gguf_fields(metadata)
    tokenizers = _import_tokenizers()
    tokens = fields["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A merge is written as its two parts with a space between: "ab c" merges "ab" and "c".
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    try:
        model = tokenizers.models.BPE(vocab=vocabulary, merges=merges)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"tokenizer in the GGUF file: expected merges of its own tokens, got {error}"
        ) from error
    backend = tokenizers.Tokenizer(model)

    split = tokenizers.pre_tokenizers
    digits = split.Digits(individual_digits=True)
    byte_level = split.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = split.Sequence([digits, byte_level])
    backend.decoder = tokenizers.decoders.ByteLevel()

    # Both kinds are never split or merged. Only control tokens are left out of decoded text.
    control, user_defined = [], []
    for token, kind in zip(tokens, fields["kinds"], strict=True):
        if kind == CONTROL:
            control.append(_added(tokenizers, token, special=True))
        elif kind == USER_DEFINED:
            user_defined.append(_added(tokenizers, token, special=False))
    backend.add_special_tokens(control)
    backend.add_tokens(user_defined)
    return _tokenizer(backend, itemgetter(*_ENDS)(fields))


def _gguf_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the metadata, each what it must be, and all of one length."""
    fields, problems = read_fields(metadata, _GGUF_KEYS)
    for name in _LISTS:
        if fields.get(name, ()) is None:
            problems.append(f"{name}: expected a list, got none")
    problems = problems or _misfits(fields)
    if problems:
        raise ValueError(
            f"tokenizer in the GGUF file: {'; '.join(problems)}; fetch the file again"
        )
    return fields


def _misfits(fields: Mapping[str, Any]) -> list[str]:
    """One problem for each field that does not go with the tokens."""
    tokens, kinds = fields["tokens"], fields["kinds"]
    different = len(set(tokens))
    problems = []
    if not different == len(tokens) == len(kinds):
        problems.append(
            f"expected as many different tokens as types, got {different} of {len(tokens)} "
            f"tokens and {len(kinds)} types"
        )
    odd = [merge for merge in fields["merges"] if " " not in merge]
    if odd:
        problems.append(f"expected merges of two parts, got {odd[0]!r}")
    for name in _ENDS:
        problems += beyond(name, fields[name], len(tokens))
    return problems


def _tokenizer(backend: Any, ends: Iterable[int | None]) -> Tokenizer:
    """A tokenizer whose texts end with any of these ids, the first of which is its `eos_id`."""
    # A dict keeps the order, and has each once.
    found = list(dict.fromkeys(i for i in ends if i is not None))
    return Tokenizer(backend, next(iter(found), None), tuple(found[1:]))


# A directory --------------------------------------------------------------------------------------


def from_directory(
    directory: Path, vocab_size: int | None = None
) -> Tokenizer | None:
    """Reads ``tokenizer.json``, None where there is none; the files beside it name the ends.

    Args:
        directory: of the checkpoint.
        vocab_size: the model's, beyond which no end may be; None where it is not known.

    Raises:
        ValueError: if ``tokenizer.json`` cannot be read, or what ends a text is no token.
        ImportError: if `tokenizers` is not installed.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    tokenizers = _import_tokenizers()
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"{path}: expected a tokenizer of the `tokenizers` package, got {error}"
        ) from error
    return _tokenizer(backend, _ends_of_text(directory, backend, vocab_size))


def _check_smollm(metadata: Mapping[str, Any]) -> None:
    """Raises ValueError if the fields of a GGUF file describe another tokenizer than SmolLM's."""
    got = {
        "tokenizer.ggml.model": metadata.get("tokenizer.ggml.model"),
        "tokenizer.ggml.pre": metadata.get("tokenizer.ggml.pre"),
        # Files may leave this field out, which says that no token is put before a text.
        "tokenizer.ggml.add_bos_token": metadata.get(
            "tokenizer.ggml.add_bos_token", False
        ),
    }
    expected = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
    }
    if got != expected:
        raise ValueError(
            f"tokenizer in the GGUF file: expected {expected}, got {got}; "
            "load the model's Hugging Face directory, whose tokenizer.json is complete"
        )


def _added(tokenizers, token: str, special: bool):
    return tokenizers.AddedToken(token, special=special, normalized=False)


def _ends_of_text(
    directory: Path, backend: Any, vocab_size: int | None
) -> list[int | None]:
    """The ids of the tokens that end a text, from the files beside ``tokenizer.json``.

    ``tokenizer_config.json`` names one; ``config.json`` and ``generation_config.json`` have an id
    or a list of ids. A model may end a text with any of them.
    """
    ends: list[int | None] = [_named_end(directory, backend)]
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        ids = read_object_if_there(path).get("eos_token_id")
        if ids is not None and not IDS.holds(ids):
            raise ValueError(f"{path}: {wrong('eos_token_id', ids, IDS)}")
        for problem in beyond("eos_token_id", ids, vocab_size or 2**31):
            raise ValueError(f"{path}: {problem}")
        ends += ids if isinstance(ids, list) else [ids]
    return ends


def _named_end(directory: Path, backend: Any) -> int | None:
    """The id of the token that ``tokenizer_config.json`` names; older ones have a dict there."""
    path = directory / "tokenizer_config.json"
    token = read_object_if_there(path).get("eos_token")
    # An AddedToken, written as {"content": "<|im_end|>", ...}.
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    found = backend.token_to_id(token) if TEXT.holds(token) else None
    if found is None:
        raise ValueError(
            f"{path}: expected eos_token to be a token of tokenizer.json, got {token!r}"
        )
    return found


def _import_tokenizers():
    """The `tokenizers` package, imported only where a tokenizer is read because it is optional."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
    except ImportError as error:
        raise ImportError(
            "this checkpoint's tokenizer needs `tokenizers`: pip install sqjax[demo]"
        ) from error
    return tokenizers
