"""Tokenizers of directories and of GGUF metadata, against transformers, sentencepiece and the module `regex`."""

import contextlib
import json

import numpy as np
import pytest
from tokenizer_vectors import (
    DIRECTORIES,
    SENTENCEPIECES,
    merges_of,
    vectors,
    write_directory,
    write_json,
    write_model,
)

from sqjax.models.checkpoints.gguf_file import read_header
from sqjax.models.decoding.prompts import encode_alone
from sqjax.models.text.building import byte_level
from sqjax.models.text.splits import BY_NAME
from sqjax.models.tokenizer import Tokenizer, from_directory, from_gguf_metadata

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
    "change", [{"model": "bert"}, {"pre": "viking"}, {"pre": None}, {"pre": []}]
)
def test_other_tokenizers_are_not_guessed(change):
    got = metadata(**change)
    pair = f"{got['tokenizer.ggml.model']!r} with {got['tokenizer.ggml.pre']!r}"
    with pytest.raises(ValueError, match=r"expected tokenizer\.ggml\.model .*got ") as raised:
        from_gguf_metadata(got)
    assert pair in str(raised.value)
    assert "'qwen2'" in str(raised.value)


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
        ({"merges": ["ab"]}, "expected merges of two of its own tokens"),
        ({"merges": ["z z"]}, "expected merges of two of its own tokens, got .*`z`"),
        ({"eos_token_id": 99}, "end: expected token ids below"),
        ({"eos_token_id": "1"}, "eos_token_id: expected a token id"),
        ({"bos_token_id": 99}, "begin: expected token ids below"),
        ({"add_bos_token": True}, "an id of the token that is to begin every text, got none"),
        ({"model": "llama"}, "scores: expected a list, got none"),
        (
            {"model": "llama", "scores": [0.0]},
            "types and scores, got 13 different ones and .*'scores': 1",
        ),
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


# Directories ----------------------------------------------------------------------------------------------------------


def check(tokenizer, expected, first=()):
    """Encodes and decodes as the reference does; `first` are ids that it does not put before a text."""
    for text, ids, decoded in zip(
        expected["texts"], expected["ids"], expected["decoded"], strict=True
    ):
        assert tokenizer.encode(text) == [*first, *ids], text
        if "\u2047" not in decoded:  # what sentencepiece shows for what is unknown
            assert tokenizer.decode(ids) == decoded, text


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_that_transformers_reads(name, tmp_path):
    expected = vectors(name)
    tokenizer = from_directory(write_directory(tmp_path, name))
    check(tokenizer, expected)
    special = expected["special"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == tuple(special.values())


@pytest.mark.parametrize("name", SENTENCEPIECES)
def test_sentencepiece_models(name, tmp_path):
    expected = vectors(name)
    tokenizer = from_directory(write_model(tmp_path, name))
    check(tokenizer, expected)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        {"spm_bpe": (1, 2, None), "spm_unigram": (None, 1, 0)}[name]
    )


def test_sentencepiece_of_a_llama_begins_every_text(tmp_path):
    """By the class of the tokenizer, by the model's type, and by a flag, which counts most."""
    write_model(tmp_path, "spm_bpe")
    [plain] = [from_directory(tmp_path).encode("a")]
    for class_name, model_type, flag in [
        ("LlamaTokenizer", None, None),
        (None, "mistral", None),
        ("AnyTokenizer", None, True),
    ]:
        config = {"tokenizer_class": class_name, "add_bos_token": flag, "add_eos_token": flag}
        write_json(tmp_path, tokenizer_config=config, config={"model_type": model_type})
        ids = from_directory(tmp_path).encode("a")
        assert ids == [1, *plain, 2] if flag else [1, *plain]
    write_json(
        tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
    )
    assert from_directory(tmp_path).encode("a") == plain


@pytest.mark.parametrize("legacy", ["true", "false"])
def test_sentencepiece_of_a_llama_as_transformers(legacy, tmp_path):
    """The space before a text: after special tokens too, or at the start only."""
    write_model(tmp_path, "spm_bpe")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": json.loads(legacy)}
    tokenizer = from_directory(write_json(tmp_path, tokenizer_config=config))
    for text, ids in vectors("spm_bpe")["as_llama"][legacy].items():
        assert tokenizer.encode(text) == ids, text


def test_a_text_alone(tmp_path):
    """Without what is put before and after every text."""
    tokenizer = from_directory(write_directory(tmp_path, "llama2"))
    [begin, *ids, end] = tokenizer.encode("text")
    assert (begin, end) == (1, 2)
    assert encode_alone(tokenizer, "text") == ids
    assert encode_alone(tokenizer, "</s>") == [2]
    assert encode_alone(tokenizer, "") == []


def test_flags_beside_tokenizer_json(tmp_path):
    """Llama's class obeys them; of other classes tokenizer.json counts."""
    content = vectors("gpt2")["files"]
    [text, ids] = ["text", from_directory(write_directory(tmp_path, "gpt2")).encode("text")]
    flags = {"add_bos_token": True, "add_eos_token": True}
    for class_name, around in [("PreTrainedTokenizerFast", False), ("LlamaTokenizerFast", True)]:
        config = content["tokenizer_config.json"] | flags | {"tokenizer_class": class_name}
        write_json(tmp_path, tokenizer_config=config)
        assert from_directory(tmp_path).encode(text) == ([0, *ids, 1] if around else ids)
    write_json(
        tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    )
    with pytest.raises(ValueError, match=r"expected a bos_token in tokenizer_config\.json"):
        from_directory(tmp_path)


def write_merges(directory, name="gpt2", **files):
    vocabulary, merges = merges_of(name)
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return write_json(directory, vocab=vocabulary, **files)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", {"tokenizer_class": "GPT2Tokenizer"}),
        ("gpt2", {}),
        ("qwen2", {"tokenizer_class": "Qwen2TokenizerFast"}),
    ],
)
def test_vocabulary_and_merges(name, config, tmp_path):
    config |= {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    check(from_directory(write_merges(tmp_path, name, tokenizer_config=config)), vectors(name))


def test_vocabulary_and_merges_of_an_opt(tmp_path):
    """OPT puts its end of text before every text; its configuration alone names it."""
    write_merges(tmp_path, config={"model_type": "opt", "bos_token_id": 1, "eos_token_id": 1})
    plain = from_directory(tmp_path).encode("text")
    write_json(
        tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    )
    write_json(tmp_path, added_tokens={"<more>": 341, "<new>": 340})
    tokenizer = from_directory(tmp_path)
    assert tokenizer.encode("text<|end|><more>") == [1, *plain, 1, 341]
    assert tokenizer.decode(tokenizer.encode("text<|end|><more>")) == "text<more>"


def test_a_space_before_every_text(tmp_path):
    write_merges(tmp_path)
    plain = from_directory(tmp_path).encode
    spaced = from_directory(
        write_json(tmp_path, tokenizer_config={"add_prefix_space": True})
    ).encode
    assert spaced("a b") == plain(" a b")
    assert spaced(" a b") == plain(" a b")
    assert spaced("") == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"tokenizer_class": "HerTokenizer"}},
            "got 'HerTokenizer', whose way to split",
        ),
        ({"vocab": {"a": "b"}}, r"vocab\.json: ids: expected a list of whole numbers, got"),
        ({"vocab": {"a": 0}}, r"vocab\.json: expected merges of its own tokens"),
        (
            {"added_tokens": {"<more>": 900}},
            r"added_tokens\.json: expected '<more>' to have the next id, 340",
        ),
        ({"tokenizer_config": {"eos_token": "<no>"}}, "expected eos_token to be a token"),
        (
            {"tokenizer_config": {"bos_token": "<no>", "add_bos_token": True}},
            "expected a bos_token in tokenizer_config",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"900": {"content": "<x>"}}}},
            "'<x>' the id 340",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": {}}}},
            "added_tokens_decoder: expected an object .id: ",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": [1]}},
            "added_tokens_decoder: expected an object",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": "<x>"}}}, "got .'1': '<x>'"),
        ({"config": {"eos_token_id": "a"}}, r"config\.json: eos_token_id: expected a token id"),
    ],
)
def test_files_that_do_not_fit(files, message, tmp_path):
    write_merges(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_directory(write_json(tmp_path, **files))


@pytest.mark.parametrize(
    ("text", "message"), [("a", "two tokens a line, got 'a'"), (None, "the merges of vocab.json")]
)
def test_merges_that_are_none(text, message, tmp_path):
    write_merges(tmp_path)
    path = tmp_path / "merges.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=rf"merges\.txt: expected .*{message}"):
        from_directory(tmp_path)


def test_special_tokens_of_either_file(tmp_path):
    """tokenizer_config.json counts more; a token for padding need not be there."""
    write_directory(tmp_path, "gpt2")
    write_json(
        tmp_path,
        special_tokens_map={
            "bos_token": "<|end|>",
            "eos_token": {"content": "<|end|>"},
            "pad_token": "<no>",
        },
        tokenizer_config={"bos_token": "<|begin|>"},
        generation_config={"pad_token_id": -1, "eos_token_id": [1, 5], "bos_token_id": "no"},
    )
    tokenizer = from_directory(tmp_path, 340)
    assert (tokenizer.bos_id, tokenizer.ends, tokenizer.pad_id) == (0, (1, 5), None)
    write_json(
        tmp_path,
        tokenizer_config={},
        special_tokens_map={},
        config={"bos_token_id": 3, "pad_token_id": 7},
    )
    tokenizer = from_directory(tmp_path, 340)
    assert (tokenizer.bos_id, tokenizer.ends, tokenizer.pad_id) == (3, (1, 5), 7)


@pytest.mark.slow
def test_damaged_sentencepiece_models(tmp_path):
    """Wherever a file ends and whatever byte is wrong, it is read or refused with its name."""
    path = write_model(tmp_path, "spm_unigram") / "tokenizer.model"
    data = path.read_bytes()
    said = []
    for at in range(0, len(data), 97):
        for wrong in (data[:at], data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]):
            path.write_bytes(wrong)
            with contextlib.suppress(ValueError):
                from_directory(tmp_path)
                continue
            with pytest.raises(ValueError, match=r"tokenizer\.model: expected .*") as raised:
                from_directory(tmp_path)
            said.append(str(raised.value).split("got ")[1][:20])
    assert len(set(said)) > 2


def field(number, value):
    """A field of a message: a whole number below 128, or bytes of less than that."""
    if isinstance(value, int):
        return bytes([8 * (number % 16) + 128, number // 16, value])
    return bytes([8 * number + 2, len(value)]) + value


PIECES = [field(1, bytes([10, 1]) + text) for text in (b"u", b"s", b"e")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "an id 0 of 0 pieces"),
        ([*PIECES, PIECES[0]], "one with a piece twice"),
        ([*PIECES, field(2, field(3, 4))], "one of type 4, which is neither Unigram nor BPE"),
        ([*PIECES, field(2, field(24, 1))], "one that puts spaces after words"),
        ([*PIECES, field(3, field(5, 0))], "one that keeps spaces as they are"),
        ([*PIECES, field(1, b"\x0a\x02bb\x18\x06")], "one with pieces of 1 bytes, not of 256"),
        ([field(1, b"\x0a\x01\xff")], "a piece that is no UTF-8"),
        ([field(1, b"\x0a\x01a\x12\x01b")], "a score of 1 bytes"),
        ([field(1, b"\x08\x01")], "a number for a piece's text"),
        ([b"\x0b"], "a field of form 3"),
        ([b"\x0a\x7f"], "a field of 127 bytes where 0 are left"),
        ([b"\x80"], "a file that ends inside a number"),
        ([b"\x80" * 11], "a number of more than 10 bytes"),
        ([*PIECES, field(2, field(40, 9))], "an id 9 of 3 pieces"),
        ([*PIECES, field(3, field(2, b"ab"))], "expected a sentencepiece model"),
    ],
)
def test_what_is_no_sentencepiece_model(fields, message, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"".join(fields))
    with pytest.raises(ValueError, match=rf"tokenizer\.model: .*{message}"):
        from_directory(tmp_path)


# GGUF -----------------------------------------------------------------------------------------------------------------


def sentencepiece_lists():
    texts, scores, kinds = (
        list(column) for column in zip(*vectors("spm_bpe")["pieces"], strict=True)
    )
    # The file holds what a user's symbol looks like in a text.
    texts = [
        text.replace("\u2581", " ") if kind == 4 else text
        for text, kind in zip(texts, kinds, strict=True)
    ]
    return texts, scores, kinds


def sentencepiece_metadata(**changes):
    texts, scores, kinds = sentencepiece_lists()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def test_sentencepiece_of_gguf():
    tokenizer = from_gguf_metadata(sentencepiece_metadata())
    check(tokenizer, vectors("spm_bpe"), first=[1])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.encode("<s>a</s>")[1] == 1


def test_a_file_of_gguf(tmp_path):
    """The metadata as a file holds them: scores are float32, whole numbers and flags have types."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    texts, scores, kinds = sentencepiece_lists()
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0].content }}{{ eos_token }}")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (tmp_path / "model.gguf").open("rb") as file:
        tokenizer = from_gguf_metadata(read_header(file, {}).metadata)
    check(tokenizer, vectors("spm_bpe"))
    ids = tokenizer.encode_chat([{"role": "user", "content": "text"}])
    assert ids == [*tokenizer.encode("text"), 2]


def test_flags_of_gguf():
    """Gemma's files say that no space is put before a text."""
    tokenizer = from_gguf_metadata(
        sentencepiece_metadata(add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    )
    with_space = from_gguf_metadata(sentencepiece_metadata()).encode("text")[1:]
    assert tokenizer.encode(" text") == [*with_space, 2]
    assert tokenizer.decode(with_space) == " text"


@pytest.mark.parametrize(
    ("name", "pre", "first"),
    [("gpt2", "gpt-2", []), ("llama3", "llama-bpe", []), ("qwen2", "qwen2", [])],
)
def test_byte_level_of_gguf(name, pre, first):
    vocabulary, merges = merges_of(name)
    tokens = sorted(vocabulary, key=vocabulary.get)
    got = from_gguf_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        }
    )
    check(got, vectors(name))


@pytest.mark.parametrize("name", vectors("splits")["pieces"])
def test_how_texts_are_split(name):
    expected = vectors("splits")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend = byte_level({letter: i for i, letter in enumerate(alphabet)}, [], BY_NAME[name])
    for text, pieces in zip(expected["texts"], expected["pieces"][name], strict=True):
        found = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert found == pieces, text


def test_every_name_can_be_built():
    for name in BY_NAME:
        splits = metadata(pre=name, bos_token_id=0)
        assert from_gguf_metadata(splits).decode([2, 3]) == "ab", name


# A text that is still written -----------------------------------------------------------------------------------------


def test_characters_come_whole(tmp_path):
    tokenizer = from_directory(write_directory(tmp_path, "gpt2"))
    text = "é 😀 日本"
    ids, shown, parts = tokenizer.encode(text), "", []
    for count in range(1, len(ids) + 1):
        new = tokenizer.decode_new(ids[:count], shown)
        parts.append(new)
        shown += new
    assert shown == text
    assert "\ufffd" not in "".join(parts)
    assert "😀" in parts or " 😀" in parts
    assert isinstance(tokenizer, Tokenizer)
