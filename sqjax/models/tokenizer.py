"""Text to token ids and back, with the `tokenizers` package, from what a checkpoint holds."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` and the id that ends a text (None where the checkpoint names none)."""

    backend: Any
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens the checkpoint asks for."""
        return self.backend.encode(text).ids

    def decode(self, ids: Iterable) -> str:
        """The text of token ids, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def from_gguf_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuilds SmolLM's tokenizer: byte-level BPE as in GPT-2, after every digit was split off.

    Args:
        metadata: the GGUF file's fields, ``tokenizer.ggml.*`` among them.

    Raises:
        ValueError: if the file describes another tokenizer (how another one splits text is not written in the
            file, so it cannot be rebuilt from there).
        ImportError: if `tokenizers` is not installed.
    """
    _check_smollm(metadata)
    tokenizers = _import_tokenizers()
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    split = tokenizers.pre_tokenizers
    backend.pre_tokenizer = split.Sequence(
        [
            split.Digits(individual_digits=True),
            split.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    named = list(zip(tokens, kinds, strict=True))
    backend.add_special_tokens(
        [_added(tokenizers, t, special=True) for t, kind in named if kind == CONTROL]
    )
    backend.add_tokens(
        [_added(tokenizers, t, special=False) for t, kind in named if kind == USER_DEFINED]
    )
    return Tokenizer(backend, metadata.get("tokenizer.ggml.eos_token_id"))


def from_directory(directory: Path) -> Tokenizer | None:
    """Reads ``tokenizer.json`` (None where there is none); the configuration files beside it name the end.

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
    expected = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
    }
    got = {name: metadata.get(name, False if "bos" in name else None) for name in expected}
    if got != expected:
        raise ValueError(
            f"tokenizer in the GGUF file: expected {expected}, got {got}; "
            "load the model's Hugging Face directory, whose tokenizer.json is complete"
        )


def _added(tokenizers, token: str, special: bool):
    return tokenizers.AddedToken(token, special=special, normalized=False)


def _end_of_text(directory: Path, backend) -> int | None:
    token = _read_json(directory / "tokenizer_config.json").get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        return backend.token_to_id(token)
    ids = _read_json(directory / "config.json").get("eos_token_id")
    return ids[0] if isinstance(ids, list) else ids


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _import_tokenizers():
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
