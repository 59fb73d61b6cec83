"""Tokenizers rebuilt from GGUF metadata and from tokenizer.json."""

import json

import pytest

from sqjax.models.tokenizer import from_directory, from_gguf_metadata

tokenizers = pytest.importorskip("tokenizers")


def metadata(**changes):
    """A vocabulary of single characters, the merges of "ab", "abc" and "12", and two special tokens."""
    letters = [*"abc123", "Ġ", "ab", "abc", "12"]
    tokens = ["<|endoftext|>", "<|im_end|>", *letters, "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * len(letters), 4],
        "tokenizer.ggml.merges": ["a b", "ab c", "1 2"],
        "tokenizer.ggml.eos_token_id": 1,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def pieces(tokenizer, text):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


def test_every_digit_stands_alone():
    """The merge of "1 2" exists and must not be used: digits are split off before the merges."""
    tokenizer = from_gguf_metadata(metadata())
    assert pieces(tokenizer, "abc 123") == ["abc", "Ġ", "1", "2", "3"]
    assert tokenizer.decode(tokenizer.encode("abc 123")) == "abc 123"


def test_special_tokens():
    tokenizer = from_gguf_metadata(metadata())
    assert tokenizer.eos_id == 1
    ids = tokenizer.encode("ab<|im_end|>c<tool>")
    assert ids == [9, 1, 4, 12]
    assert tokenizer.decode(ids) == "abc<tool>"


@pytest.mark.parametrize(
    "change", [{"model": "llama"}, {"pre": "llama-bpe"}, {"add_bos_token": True}]
)
def test_other_tokenizers_are_not_guessed(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values()))).replace("-", ".")):
        from_gguf_metadata(metadata(**change))


def test_directory(tmp_path):
    assert from_directory(tmp_path) is None
    original = from_gguf_metadata(metadata())
    original.backend.save(str(tmp_path / "tokenizer.json"))
    assert from_directory(tmp_path).eos_id is None
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    assert from_directory(tmp_path).eos_id == 1
    for name in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        assert from_directory(tmp_path).eos_id == 0
    assert from_directory(tmp_path).encode("abc 123") == original.encode("abc 123")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "tokens: expected a list, got none"),
        ({"tokens": [1, 2]}, "tokens: expected a list of texts"),
        ({"token_type": [3]}, "as many different tokens as types"),
        ({"merges": ["ab"]}, "expected merges of two parts"),
        ({"merges": ["z z"]}, "expected merges of its own tokens"),
        ({"eos_token_id": 99}, "end: expected token ids below"),
        ({"eos_token_id": "1"}, "eos_token_id: expected a token id"),
    ],
)
def test_gguf_fields_that_are_none(change, message):
    with pytest.raises(ValueError, match=f"tokenizer in the GGUF file: .*{message}"):
        from_gguf_metadata(metadata(**change))


def test_gguf_has_several_ends():
    tokenizer = from_gguf_metadata(metadata(eot_token_id=0, eom_token_id=1))
    assert (tokenizer.eos_id, tokenizer.ends) == (1, (1, 0))


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer"):
        from_directory(tmp_path)
