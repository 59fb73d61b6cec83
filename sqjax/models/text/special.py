"""The special tokens of a directory: what its files say begins, ends and fills a text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sqjax.models.fields import (
    ID,
    IDS,
    TEXT,
    Key,
    What,
    beyond,
    check,
    read_fields,
)
from sqjax.models.json_files import read_object_if_there
from sqjax.models.text.building import add_tokens
from sqjax.models.text.packages import tokenizers_package

_TOKENIZER = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
#: These two have ids; the first two have texts.
_OF_IDS = ("config.json", "generation_config.json")

_ROLES = tuple(
    f"{role}_token"
    for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)


class Settings(NamedTuple):
    """What the files beside a tokenizer say.

    Attributes:
        directory: where they are, for messages of errors.
        files: {name: the object in it}; an empty one for a file that is not there.
    """

    directory: Path
    files: Mapping[str, Mapping[str, Any]]

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """What ``tokenizer_config.json`` says."""
        return self.files[_TOKENIZER]

    @property
    def class_name(self) -> str:
        """The name of the tokenizer's class, without "Fast"; "" if no file names one."""
        name = self.tokenizer.get("tokenizer_class") or ""
        return str(name).removesuffix("Fast")

    @property
    def model_type(self) -> str:
        """The name of the model's family; "" if no file names one."""
        return str(self.files["config.json"].get("model_type") or "")


def read_settings(directory: Path) -> Settings:
    """Reads the files that say something of a tokenizer."""
    names = (_TOKENIZER, _MAP, *_OF_IDS)
    return Settings(
        directory,
        {name: read_object_if_there(directory / name) for name in names},
    )


# Texts ------------------------------------------------------------------------------------------


def token_texts(settings: Settings) -> dict[str, str]:
    """{"bos_token": its text, ...} of the special tokens that the files name.

    Raises:
        ValueError: something else is in the place of a text.
    """
    # ``tokenizer_config.json`` counts where both name one.
    return {**_texts(settings, _MAP), **_texts(settings, _TOKENIZER)}


def _texts(settings: Settings, name: str) -> dict[str, str]:
    """As `token_texts`, of one file."""
    says = settings.files[name]
    tokens = {role: _content(says.get(role)) for role in _ROLES}
    named = {role: token for role, token in tokens.items() if token is not None}
    for role, token in named.items():
        if not TEXT.holds(token):
            raise ValueError(
                f"{settings.directory / name}: expected {role} to be a token of tokenizer.json, "
                f"got {token!r}"
            )
    return named


def _content(token: Any) -> Any:
    """What a token's text is, which may also stand as {"content": text, ...}."""
    return token.get("content") if isinstance(token, Mapping) else token


def template_tokens(
    settings: Settings, texts: Mapping[str, str]
) -> dict[str, Any]:
    """The special tokens that a chat template may name: each role's, and further ones."""
    says = settings.tokenizer
    further = says.get("extra_special_tokens")
    tokens = {
        **texts,
        **(further if isinstance(further, Mapping) else {}),
    }
    more = says.get("additional_special_tokens")
    if isinstance(more, list):
        tokens["additional_special_tokens"] = list(map(_content, more))
    return tokens


def declare(backend: Any, settings: Settings, texts: Mapping[str, str]) -> None:
    """Tells a tokenizer of special tokens that only the files beside it name.

    Raises:
        ValueError: a file gives such a token another id than it has, or can get.
    """
    path = settings.directory / _TOKENIZER
    declared = settings.tokenizer.get("added_tokens_decoder") or {}
    check(f"{path}: added_tokens_decoder", declared, _DECODER)
    for key in sorted(declared, key=int):
        _declare(backend, int(key), declared[key], path)
    added = backend.get_added_tokens_decoder().values()
    missing = set(texts.values()) - {token.content for token in added}
    known = [text for text in missing if backend.token_to_id(text) is not None]
    add_tokens(backend, sorted(known), special=True)


def _are_declared(x: Any) -> bool:
    """Whether these are tokens by their ids, as JSON has them: {"3": {"content": "<s>"}}."""
    return (
        isinstance(x, Mapping)
        and all(map(str.isdecimal, x))
        and all(isinstance(token, Mapping) for token in x.values())
        and all(TEXT.holds(token.get("content")) for token in x.values())
    )


_DECODER = What("an object {id: {content: text}}", _are_declared)


def _declare(backend: Any, token_id: int, token: Any, path: Path) -> None:
    """Adds one token, with its flags, unless the tokenizer has it among those that it adds."""
    if token_id in backend.get_added_tokens_decoder():
        return
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    given = {name: bool(token[name]) for name in flags if name in token}
    content = token["content"]
    added = tokenizers_package().AddedToken(content, **given)
    backend.add_tokens([added])
    got = backend.token_to_id(content)
    if got != token_id:
        raise ValueError(
            f"{path}: expected added_tokens_decoder to give {content!r} the id {got}, which it "
            f"has by the tokenizer, got {token_id}"
        )


# Ids --------------------------------------------------------------------------------------------


def end_id(
    backend: Any, settings: Settings, texts: Mapping[str, str]
) -> int | None:
    """The id of the token that a file names as the end of a text; None if none does.

    Raises:
        ValueError: it is no token of the tokenizer.
    """
    text = texts.get("eos_token")
    found = id_of(backend, text)
    if found is None and text is not None:
        raise ValueError(
            f"{settings.directory / _TOKENIZER}: expected eos_token to be a token of "
            f"tokenizer.json, got {text!r}"
        )
    return found


def id_of(backend: Any, text: str | None) -> int | None:
    """The id of a token; None if there is none.

    A token that begins or fills a text may be one that the tokenizer does not have: then nothing
    ever puts it there.
    """
    return None if text is None else backend.token_to_id(text)


def ids_of_config(
    settings: Settings, key: str, vocab_size: int | None
) -> list[int]:
    """The ids that ``config.json`` and ``generation_config.json`` have under a key, such as
    ``eos_token_id``: an id each, or a list.

    Raises:
        ValueError: they are no ids, or beyond the vocabulary.
    """
    found: list[int] = []
    for name in _OF_IDS:
        values = settings.files[name]
        fields, problems = read_fields(values, [Key(key, "ids", IDS, [])])
        ids = fields.get("ids", [])
        problems = problems or beyond(key, ids, vocab_size or 2**31)
        if problems:
            raise ValueError(f"{settings.directory / name}: {problems[0]}")
        found += jax.tree.leaves(ids)
    return found


def ids_if_some(settings: Settings, key: str) -> list[int]:
    """As `ids_of_config`, of what a model can do without; some write -1 for none."""
    found: list[Any] = [settings.files[name].get(key) for name in _OF_IDS]
    return list(filter(ID.holds, found))
