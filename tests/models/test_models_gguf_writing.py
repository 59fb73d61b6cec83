"""GGUF files that are written here: as llama.cpp's converter would have it, and read again."""

import errno
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny
from slow import slow_but
from tiny_llama import GROUPED, random_params
from tokenizer_vectors import vectors, write_directory, write_json, write_model
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers
from untyped import untyped

import sqjax as sq
from sqjax.models import Model, fuse, llama_config, load, save_gguf, stack_layers
from sqjax.models.checkpoints.gguf import read_metadata
from sqjax.models.text.chat import Template, Templates
from sqjax.models.text.directory import from_directory
from sqjax.models.text.gguf import from_gguf_metadata
from sqjax.models.text.gguf_metadata import gguf_metadata
from sqjax.models.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
converted = pytest.importorskip("gguf_converted")

#: But one with a layer without experts among others with some, for which GGUF has no words.
CASES = [name for name in converted.CASES if name != "qwen2_moe"]
#: Sizes that blocks of 32 divide, and a row that they do not.
CONFIGURATION = llama_config(64, 64, 96, 2, 4, 2, 16, tie_embeddings=True, max_length=64)
MODEL = Model(CONFIGURATION)


def read_file(path):
    """({name: (type, array dequantized by the package)}, metadata)."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        floats = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = tensor.tensor_type.name, floats
    return found, read_metadata(path)


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.parametrize("name", slow_but(CASES, "llama_llama3"))
def test_tensors_and_keys_are_those_of_the_converter(tmp_path, name):
    case = tiny.load(name)
    source = tiny.write(case, tmp_path / "source")
    config, weights = case["configs"]["4"], tiny.weights(case)
    model, params = load(source)
    path = tmp_path / "new.gguf"
    save_gguf(path, model, params, "f32", like=source)
    got, metadata = read_file(path)
    expected = converted.tensors(config, weights)
    assert got.keys() == expected.keys()
    for tensor, array in expected.items():
        tolerance = 1e-7 if tensor.startswith("rope_") else 0
        np.testing.assert_allclose(got[tensor][1], array.reshape(got[tensor][1].shape), tolerance)
    architecture, keys = converted.metadata(config)
    assert metadata["general.architecture"] == architecture
    for key, value in keys.items():
        stated = metadata.get(f"{architecture}.{key}", value)
        expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert stated == expected, key
    again, read = load(path)
    assert again.config.num_layers == model.config.num_layers
    # Of Gemma's gains 1 + w is stored, in float32.
    tolerance = 2.0**-23 if "gemma" in name else 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, tolerance), read, params)


@pytest.mark.parametrize("dtype", slow_but(["f32", "f16", "bf16", "q4_0", "q4_1", "q8_0"], "q4_1"))
def test_each_type_is_read_as_the_package_dequantizes_it(tmp_path, dtype):
    params = random_params(MODEL)
    path = tmp_path / "new.gguf"
    save_gguf(path, MODEL, stack_layers(fuse(params)), dtype)
    got, metadata = read_file(path)
    kinds = {name: kind for name, (kind, _) in got.items()}
    assert kinds.pop("token_embd.weight") == {"q4_0": "Q8_0", "q4_1": "Q8_0"}.get(
        dtype, dtype.upper()
    )
    for name, kind in kinds.items():
        assert kind == ("F32" if "norm" in name else dtype.upper())
    mostly = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    assert metadata["general.file_type"] == gguf.LlamaFileType[mostly]
    again, read = load(path)
    assert again == MODEL
    up = read["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(up, got["blk.1.ffn_up.weight"][1].T)
    original = params["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    bits = {"f32": 24, "f16": 11, "bf16": 8, "q8_0": 7, "q4_0": 3, "q4_1": 3.5}[dtype]
    error = np.abs(up - original).max() / np.abs(original).max()
    assert (error == 0) if dtype == "f32" else 0 < error < 1.1 * 2.0**-bits


def test_rows_that_blocks_do_not_fill_are_float16(tmp_path):
    model = Model(replace(GROUPED, hidden_size=24))
    save_gguf(tmp_path / "new.gguf", model, random_params(model), "q4_0")
    kinds = {name: kind for name, (kind, _) in read_file(tmp_path / "new.gguf")[0].items()}
    assert kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["blk.0.ffn_norm.weight"] == "F32"


# Tokenizers ---------------------------------------------------------------------------------------


def byte_level(*steps, normalizer=None):
    """A tokenizer.json's tokenizer: letters that stand for bytes, two merges, special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "he", "hel", "<s>", "</s>", "<tool>"]
    vocabulary = {token: i for i, token in enumerate(tokens[:-3])}
    backend = Backend(models.BPE(vocabulary, [("h", "e"), ("he", "l")]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<tool>"])
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    templates = Templates({"default": Template("{{ bos_token }}!", "here")}, {"bos_token": "<s>"})
    return Tokenizer(backend, len(tokens) - 2, bos_id=len(tokens) - 3, templates=templates)


#: SmolLM2's, in the words of its own file.
SMOLLM = byte_level(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False))


def test_a_byte_level_tokenizer_is_named_and_comes_back(tmp_path):
    model = Model(llama_config(270, 8, 16, 1, 2, 1, 4), SMOLLM)
    save_gguf(tmp_path / "new.gguf", model, random_params(model), "f32")
    metadata = read_metadata(tmp_path / "new.gguf")
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    kinds = metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [kinds[tokens.index(t)] for t in ("he", "<s>", "<tool>", "[PAD269]")] == [1, 3, 4, 5]
    back = from_gguf_metadata(metadata)
    for text in ("hello <tool> 1234 he's</s>", "e\u0301  \n\n x"):
        assert back.encode(text) == SMOLLM.encode(text)
    assert (back.ends, back.bos_id, back.pad_id) == (SMOLLM.ends, SMOLLM.bos_id, None)
    assert back.chat([{"role": "user", "content": "Hi"}]) == "<s>!"


@pytest.mark.parametrize(
    ("name", "pre"), [("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("qwen2", "qwen2")]
)
def test_files_of_tokenizers_as_their_makers_write_them(tmp_path, name, pre):
    tokenizer = from_directory(write_directory(tmp_path, name))
    metadata = gguf_metadata(tokenizer, 1000)
    assert metadata["tokenizer.ggml.pre"] == pre
    back = from_gguf_metadata(metadata)
    for text in vectors(name)["texts"]:
        assert back.encode(text) == tokenizer.encode(text), text


def test_scores_are_read_of_the_sentencepiece_file(tmp_path):
    expected = vectors("spm_bpe")
    config = {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}
    write_json(write_model(tmp_path, "spm_bpe"), tokenizer_config=config)
    tokenizer = from_directory(tmp_path)
    metadata = gguf_metadata(tokenizer, 1000, tmp_path)
    pieces = len(expected["pieces"])
    assert metadata["tokenizer.ggml.scores"][:pieces] == [row[1] for row in expected["pieces"]]
    back = from_gguf_metadata(metadata)
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        assert back.encode(text) == [1, *ids, 2], text
    with pytest.raises(ValueError, match="expected a byte-level tokenizer"):
        gguf_metadata(tokenizer, 1000)


def refused(message, path, *arguments, **others):
    with pytest.raises(ValueError, match=message):
        save_gguf(path, *arguments, **others)
    assert not path.exists()


def test_what_gguf_has_no_words_for_is_refused(tmp_path):
    path, config = tmp_path / "new.gguf", llama_config(270, 8, 16, 1, 2, 1, 4)
    params = random_params(Model(config))
    words = pre_tokenizers.Split("a", "removed")
    refused(
        r"save_gguf: tokenizer: expected a way to split .*give like= the \.gguf",
        path,
        Model(config, byte_level(words, pre_tokenizers.ByteLevel(False))),
        params,
    )
    lower = byte_level(pre_tokenizers.ByteLevel(False), normalizer=normalizers.Lowercase())
    refused("expected a text that is taken as it is, or NFC", path, Model(config, lower), params)
    word = Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")), None)
    refused("expected a byte-level tokenizer", path, Model(config, word), params)
    small = llama_config(40, 8, 16, 1, 2, 1, 4)
    few = random_params(Model(small))
    refused("ids below 40, the embedding's rows", path, Model(small, SMOLLM), few)


def test_keys_of_a_file_are_copied(tmp_path):
    model = Model(llama_config(270, 8, 16, 1, 2, 1, 4), SMOLLM)
    params = random_params(model)
    save_gguf(tmp_path / "first.gguf", model, params, "f32")
    plain = Model(model.config)
    save_gguf(tmp_path / "new.gguf", plain, params, "f32", like=tmp_path / "first.gguf")
    assert (tmp_path / "new.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
    save_gguf(tmp_path / "none.gguf", plain, params, "f32")
    assert read_metadata(tmp_path / "none.gguf")["tokenizer.ggml.model"] == "no_vocab"
    assert load(tmp_path / "none.gguf")[0].tokenizer is None
    few = Model(llama_config(40, 8, 16, 1, 2, 1, 4))
    refused(
        "like: expected a file with 40 tokens, .*got 'one with 270'",
        tmp_path / "few.gguf",
        few,
        random_params(few),
        like=tmp_path / "first.gguf",
    )


# Refusals -----------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    params, path = random_params(MODEL), tmp_path / "new.gguf"
    with untyped():
        refused("dtype: expected one of", path, MODEL, params, "q8")
    refused(r'expected a name that ends with "\.gguf"', tmp_path / "new.bin", MODEL, params)
    refused("make .*none first", tmp_path / "none/new.gguf", MODEL, params)
    refused("like: expected the .gguf file or", path, MODEL, params, like=tmp_path / "no")
    tensor = sq.QTensor.quantize(params["model"]["embed_tokens"]["embedding"], (1,))
    embedding = {"embedding": sq.QuantWeight(tensor, None, None, None)}
    quantized = {"model": params["model"] | {"embed_tokens": embedding}}
    refused("a quantized one; save_gguf quantizes float parameters itself", path, MODEL, quantized)
    case = tiny.load("gpt2")
    other, its = load(tiny.write(case, tmp_path / "gpt2"))
    refused("expected a model that llama.cpp has as one of .*'qwen3'", path, other, its)


def test_numbers_that_are_none_leave_the_old_file(tmp_path, monkeypatch):
    params, path = random_params(MODEL), tmp_path / "new.gguf"
    save_gguf(path, MODEL, params)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a path that is free, got a file; pass overwrite=True"):
        save_gguf(path, MODEL, params)
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)
    with pytest.raises(ValueError, match=r"\.weight: expected finite numbers"):
        save_gguf(path, MODEL, bad, overwrite=True)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match=r"save_gguf: .*new\.gguf: No space left"):
        save_gguf(path, MODEL, params, overwrite=True)
    assert path.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["new.gguf"]
    (tmp_path / "tmp.gguf").mkdir()
    with pytest.raises(ValueError, match=r"tmp\.gguf: expected a path that is free, got a dir"):
        save_gguf(tmp_path / "tmp.gguf", MODEL, params, overwrite=True)


def full(self, array):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
