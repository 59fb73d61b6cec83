"""Text to token ids and back, with the `tokenizers` package, from what a checkpoint holds."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer`, and the id that ends a text (None if the checkpoint has none)."""

    backend: Any
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens the checkpoint asks for."""
        return self.backend.encode(text).ids

    def decode(self, ids: Iterable) -> str:
        """The text of token ids, special tokens left out."""
        return self.backend.decode(
            [int(i) for i in ids], skip_special_tokens=True
        )


def from_gguf_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuilds SmolLM's tokenizer: byte-level BPE as in GPT-2, after every digit was split off.

    Args:
        metadata: the GGUF file's fields, ``tokenizer.ggml.*`` among them.

    Raises:
        ValueError: if the file describes another tokenizer (how another one splits text is not
            written in the file, so it cannot be rebuilt from there).
        ImportError: if `tokenizers` is not installed.
    """
    _check_smollm(metadata)
    tokenizers = _import_tokenizers()
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A merge is written as its two parts with a space between: "ab c" merges "ab" and "c".
    merges = [
        tuple(merge.split(" ", 1))
        for merge in metadata["tokenizer.ggml.merges"]
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=merges)
    )

    split = tokenizers.pre_tokenizers
    digits = split.Digits(individual_digits=True)
    byte_level = split.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = split.Sequence([digits, byte_level])
    backend.decoder = tokenizers.decoders.ByteLevel()

    # Both kinds are never split or merged. Only control tokens are left out of decoded text.
    control, user_defined = [], []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == CONTROL:
            control.append(_added(tokenizers, token, special=True))
        elif kind == USER_DEFINED:
            user_defined.append(_added(tokenizers, token, special=False))
    backend.add_special_tokens(control)
    backend.add_tokens(user_defined)
    return Tokenizer(backend, metadata.get("tokenizer.ggml.eos_token_id"))


def from_directory(directory: Path) -> Tokenizer | None:
    """Reads ``tokenizer.json``, None where there is none; the files beside it name the end.

    Raises:
        ValueError: if ``tokenizer.json`` cannot be read.
        ImportError: if `tokenizers` is not installed.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizers = _import_tokenizers()
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"{path}: expected a tokenizer of the `tokenizers` package, got {error}"
        ) from error
    return Tokenizer(backend, _end_of_text(directory, backend))


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


def _end_of_text(directory: Path, backend) -> int | None:
    """The id of the token that ends a text, from the files beside ``tokenizer.json``.

    ``tokenizer_config.json`` names the token; older ones describe it by a dict. Where it does not,
    ``config.json`` has the id, or a list of ids of which the first is meant.
    """
    token = _read_json(directory / "tokenizer_config.json").get("eos_token")
    # An AddedToken, written as {"content": "<|im_end|>", ...}.
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        return backend.token_to_id(token)
    ids = _read_json(directory / "config.json").get("eos_token_id")
    return ids[0] if isinstance(ids, list) else ids


def _read_json(path: Path) -> dict:
    return (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    )


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
