"""Checkpoints for others: what is written is what the source has, and what is read again."""

import errno
import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_tensors as of_layouts
import tiny_checkpoint
import tiny_vision
from flax.traverse_util import flatten_dict
from hf_directories import CONFIG, tensors, write
from safetensors import safe_open
from safetensors.numpy import load_file
from slow import slow_but
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from untyped import untyped

import sqjax as sq
from sqjax.files.header import read_header
from sqjax.models import (
    fuse,
    load,
    load_encoder,
    load_vision,
    save_compressed_tensors,
    save_huggingface,
    stack_layers,
)
from sqjax.models.checkpoints.quantized.modules import Tensor
from sqjax.models.checkpoints.quantized.unpacking import centred, pack, unpack
from sqjax.models.text.chat import Template, Templates
from sqjax.models.tokenizer import Tokenizer
from sqjax.weights.quant_weight import is_quantized
from sqjax.weights.quantize import quantize_weight

CASES = tiny_checkpoint.cases()
# Sizes that words of 8 codes and groups of 8 divide.
LLAMA = CONFIG | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
TIED = LLAMA | {"tie_word_embeddings": True}
KERNEL = "model/layers/0/mlp/up_proj/kernel"


def other(params, seed=0):
    """Parameters of the same shapes, all of them other numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def with_leaf(params, path, leaf):
    """The tree with another leaf; None: without it."""
    flat = flatten_dict(params, sep="/") | {path: leaf}
    found = {}
    for name, x in flat.items():
        *parents, last = name.split("/")
        inner = found
        for part in parents:
            inner = inner.setdefault(part, {})
        if x is not None:
            inner[last] = x
    return found


def stored_in(directory):
    """All tensors of a directory, by name; numpy alone has no float8."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            entries = read_header(file).tensors
            found |= {name: Tensor(file, entry).read() for name, entry in entries.items()}
    return found


def assert_same(tree, expected):
    """Bit for bit, quantized leaves too."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


# Floats -------------------------------------------------------------------------------------------


def assert_written_as_read(directory, source, loader):
    """A model's own parameters are the source's tensors; others come back as they were."""
    model, params = loader(source)
    save_huggingface(directory / "same", model, params, like=source)
    config = (source / "config.json").read_bytes()
    assert (directory / "same/config.json").read_bytes() == config
    assert_same(stored_in(directory / "same"), stored_in(source))
    changed = other(params)
    save_huggingface(directory / "new", model, changed, like=source)
    again, read = loader(directory / "new")
    assert again == model
    assert_same(read, changed)


@pytest.mark.parametrize("name", slow_but(CASES, "llama_tied", "phi3", "mixtral"))
def test_a_family_is_written_as_it_is_read(tmp_path, name):
    source = tiny_checkpoint.write(tiny_checkpoint.load(name), tmp_path / "source")
    assert_written_as_read(tmp_path, source, load)


ENCODERS = [name for name in tiny_checkpoint.cases("encoders") if name != "nomic_bert"]


@pytest.mark.parametrize("name", slow_but(ENCODERS, "roberta"))
def test_an_encoder_of_texts_is_written_as_it_is_read(tmp_path, name):
    """Its pooler and the heads of tasks, which are not read here, are copied."""
    source = tiny_checkpoint.write(tiny_checkpoint.load(name, "encoders"), tmp_path / "source")
    assert_written_as_read(tmp_path, source, load_encoder)


@pytest.mark.parametrize("name", slow_but(tiny_vision.cases(), "clip"))
def test_an_encoder_of_images_is_written_as_it_is_read(tmp_path, name):
    """Of two towers that of texts is copied."""
    source = tiny_vision.write(tiny_vision.load(name), tmp_path / "source")
    assert_written_as_read(tmp_path, source, load_vision)


@pytest.mark.slow
def test_smoothed_parameters_are_the_same_function(tmp_path):
    source = tiny_checkpoint.write(tiny_checkpoint.load("gemma2"), tmp_path / "source")
    model, params = load(source)
    ids = jnp.asarray(tiny_checkpoint.load("gemma2")["vectors"]["ids"])
    smooth = sq.smooth(params, sq.calibrate(model.apply, params, [ids]), alpha=0.5)
    save_huggingface(tmp_path / "new", model, smooth, like=source)
    read = load(tmp_path / "new")[1]
    assert_same(read, smooth)
    run = jax.jit(model.apply)
    expected, got = np.asarray(run(params, ids)), np.asarray(run(read, ids))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", [stack_layers, fuse, lambda x: fuse(stack_layers(x))])
def test_stacked_and_fused_parameters_are_taken_apart(tmp_path, form):
    source = write(tmp_path / "source", LLAMA)
    model, params = load(source)
    save_huggingface(tmp_path / "new", model, form(params), like=source)
    assert_same(stored_in(tmp_path / "new"), stored_in(source))


def test_shards(tmp_path):
    source = write(tmp_path / "source", LLAMA)
    model, params = load(source)
    save_huggingface(tmp_path / "new", model, params, like=source, max_shard_bytes=3000)
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    held = {file.name: load_file(file) for file in files}
    where = {name: file for file, found in held.items() for name in found}
    assert index["weight_map"] == where
    sizes = {file: sum(x.nbytes for x in found.values()) for file, found in held.items()}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert all(size <= 3000 or len(held[file]) == 1 for file, size in sizes.items())
    assert_same(stored_in(tmp_path / "new"), stored_in(source))
    assert_same(load(tmp_path / "new")[1], params)


def test_another_dtype(tmp_path):
    source = write(tmp_path / "source", LLAMA | {"torch_dtype": "float32"})
    model, params = load(source)
    save_huggingface(tmp_path / "new", model, params, like=source, dtype=jnp.bfloat16)
    for name, x in stored_in(tmp_path / "new").items():
        np.testing.assert_array_equal(x, stored_in(source)[name].astype(ml_dtypes.bfloat16))
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config == LLAMA | {"torch_dtype": "bfloat16"}
    # Without a dtype each has its own.
    narrow = load(tmp_path / "new", jnp.bfloat16)[1]
    save_huggingface(tmp_path / "third", model, narrow, like=source)
    assert_same(stored_in(tmp_path / "third"), stored_in(tmp_path / "new"))


def test_a_reader_of_headers_finds_the_tensors_aligned(tmp_path):
    """torch views the bytes of a file as wider numbers, which must begin at a multiple of their size."""
    source = write(tmp_path / "source", LLAMA)
    model, params = load(source)
    save_huggingface(tmp_path / "new", model, params, like=source)
    with safe_open(tmp_path / "new/model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors(LLAMA))


def test_what_else_is_in_the_directory(tmp_path):
    """Tokenizers and templates are taken over, weights of other kinds and folders are not."""
    source = write(tmp_path / "source", LLAMA)
    model, params = load(source)
    (source / "tokenizer.model").write_bytes(b"\x00\x01")
    others = ("chat_template.jinja", "generation_config.json", "tokenizer_config.json")
    for name in others:
        (source / name).write_text('{"a": 1}')
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden"):
        (source / name).write_text("{}")
    (source / "original").mkdir()
    save_huggingface(tmp_path / "new", model, params, like=source)
    expected = {*others, "config.json", "model.safetensors", "tokenizer.model"}
    assert set(names_in(tmp_path / "new")) == expected
    assert (tmp_path / "new/tokenizer_config.json").read_text() == '{"a": 1}'
    assert (tmp_path / "new/tokenizer.model").read_bytes() == b"\x00\x01"


def test_the_folders_of_an_encoder_of_sentences(tmp_path):
    """modules.json names them; others, such as another format's, are not taken over."""
    source = tiny_checkpoint.write(tiny_checkpoint.load("bert", "encoders"), tmp_path / "source")
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"models.{kind}"} for path, kind in kinds.items()]
    (source / "modules.json").write_text(json.dumps(modules))
    for folder in ("1_Pooling", "onnx"):
        (source / folder).mkdir()
        (source / folder / "config.json").write_text('{"pooling_mode": "max"}')
    model, params = load_encoder(source)
    for _ in range(2):
        how = {"like": source, "overwrite": True}
        save_huggingface(tmp_path / "new", model, params, **how)
        expected = ["1_Pooling", "config.json", "model.safetensors", "modules.json"]
        assert names_in(tmp_path / "new") == expected
    assert load_encoder(tmp_path / "new")[0] == model
    assert model.pooling.modes == ("max",)


def test_tensors_that_follow_from_the_rest(tmp_path):
    """A stored head is the new embedding; rotary angles are copied."""
    stored = tensors(TIED)
    angles = (5000.0 ** -(np.arange(0, 4, 2) / 4)).astype(np.float32)
    stored |= {
        "lm_head.weight": stored["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": angles,
    }
    source = write(tmp_path / "source", TIED, stored)
    model, params = load(source)
    changed = other(params)
    save_huggingface(tmp_path / "new", model, changed, like=source)
    got = stored_in(tmp_path / "new")
    assert set(got) == set(stored)
    embedding = changed["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(got["lm_head.weight"], embedding)
    np.testing.assert_array_equal(got["model.embed_tokens.weight"], embedding)
    np.testing.assert_array_equal(got["model.layers.0.self_attn.rotary_emb.inv_freq"], angles)
    assert_same(load(tmp_path / "new")[1], changed)


# What is refused ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(the source, the model, its parameters)."""
    source = write(tmp_path_factory.mktemp("of_all") / "source", LLAMA)
    return source, *load(source)


def refused(message, directory, *arguments, save=save_huggingface, **others):
    before = names_in(directory.parent)
    with untyped(), pytest.raises(ValueError, match=message) as caught:
        save(directory, *arguments, **others)
    assert str(caught.value).startswith(save.__name__)
    assert names_in(directory.parent) == before


def quantized(x):
    return sq.QuantWeight(sq.QTensor.quantize(x, (0,)), None, None, None)


WIDER = jnp.zeros((16, 25))
LEAVES = {
    "missing": (KERNEL, None, f"{KERNEL}: expected a leaf of shape .16, 24., got none"),
    "shape": (KERNEL, WIDER, f"{KERNEL}: expected shape .16, 24. .*got .16, 25.; are these anoth"),
    "too many": ("model/more/kernel", WIDER, "model/more/kernel: expected no such leaf"),
    "integers": (
        KERNEL,
        jnp.zeros((16, 24), jnp.int8),
        f"{KERNEL}: expected an array of floats, got int8",
    ),
    "wide": (KERNEL, np.zeros((16, 24)), f"float32, .*{KERNEL} of float64; pass dtype=jnp.float32"),
    "no array": (KERNEL, "text", f"{KERNEL}: expected an array"),
    "quantized": (
        KERNEL,
        quantized(jnp.ones((16, 24))),
        f"{KERNEL}: expected a float leaf, .*save_compressed_tensors",
    ),
}


@pytest.mark.parametrize("case", LEAVES)
def test_leaves_that_are_not_the_models(tmp_path, loaded, case):
    source, model, params = loaded
    path, leaf, message = LEAVES[case]
    refused(message, tmp_path / "new", model, with_leaf(params, path, leaf), like=source)


def test_a_stack_with_a_layer_too_few(tmp_path, loaded):
    source, model, params = loaded
    one = {**params, "model": {**params["model"], "layers": {"0": params["model"]["layers"]["0"]}}}
    message = "model/layers/1/.*expected a leaf of shape .*, got none"
    refused(message, tmp_path / "new", model, stack_layers(one), like=source)


def test_arguments(tmp_path, loaded):
    source, model, params = loaded
    new = tmp_path / "new"
    refused("expected a model as sqjax.models.load", new, params, params, like=source)
    refused("the parameters of a model", new, model, None, like=source)
    for like in ("smollm2-135m", tmp_path, 3):
        refused("like: expected the directory that the model was", new, model, params, like=like)
    for dtype in (jnp.int8, "text", np.float64):
        refused("dtype: expected one of float32", new, model, params, like=source, dtype=dtype)
    refused("max_shard_bytes: .*got 0", new, model, params, like=source, max_shard_bytes=0)
    inside = tmp_path / "no" / "new"
    with pytest.raises(ValueError, match=f"make {inside.parent} first"):
        save_huggingface(inside, model, params, like=source)


def test_another_models_directory(tmp_path, loaded):
    _, model, params = loaded
    source = write(tmp_path / "other", LLAMA | {"rope_theta": 1.5})
    message = r"model.config.kinds: expected .*1\.5.*, as .*other says, got .*5000"
    refused(message, tmp_path / "new", model, params, like=source)
    bert = tiny_checkpoint.write(tiny_checkpoint.load("bert", "encoders"), tmp_path / "bert")
    message = "expected model_type to be one of .*this is an encoder of texts"
    refused(message, tmp_path / "new", model, params, like=bert)
    encoder, params = load_encoder(bert)
    refused("only a Llama can be written, .*EncoderC", tmp_path / "new", encoder, params)


def test_numbers_beyond_the_dtype(tmp_path, loaded):
    source, model, params = loaded
    big = with_leaf(params, KERNEL, np.full((16, 24), 1e5, np.float32))
    message = f"{KERNEL}: expected numbers up to 6.55e.04, the range of float16, got 1e.05"
    refused(message, tmp_path / "new", model, big, like=source, dtype=jnp.float16)
    # An infinity that was there is none that was made.
    endless = with_leaf(params, KERNEL, np.full((16, 24), np.inf, np.float32))
    save_huggingface(tmp_path / "new", model, endless, like=source, dtype=jnp.float16)


# A directory that is there ------------------------------------------------------------------------


def test_a_directory_is_replaced_as_a_whole(tmp_path, loaded):
    source, model, params = loaded
    new = tmp_path / "new"
    new.mkdir()  # An empty one is free.
    save_huggingface(new, model, params, like=source, max_shard_bytes=3000)
    refused("got a directory with files in it; pass overwrite", new, model, params, like=source)
    new.chmod(0o750)
    changed = other(params)
    save_huggingface(new, model, changed, like=source, overwrite=True)
    assert names_in(new) == ["config.json", "model.safetensors"]
    assert new.stat().st_mode & 0o777 == 0o750
    assert_same(load(new)[1], changed)
    assert names_in(tmp_path) == ["new"]


def test_directories_that_are_no_checkpoint_stay(tmp_path, loaded):
    source, model, params = loaded
    new = tmp_path / "new"
    new.mkdir()
    (new / "thesis.tex").write_text("x")
    save = {"like": source, "overwrite": True}
    refused("expected to replace a checkpoint, .*got one without it", new, model, params, **save)
    (new / "config.json").write_text("{}")
    (new / "chapters").mkdir()
    refused(r"got one that holds \['chapters'\]", new, model, params, **save)
    refused("does not hold like = ", source, model, params, **save)
    refused("does not hold like = ", source.parent, model, params, **save)
    refused("got a file", new / "thesis.tex", model, params, **save)


@pytest.mark.parametrize("exchange", [True, False])
def test_what_fails_leaves_the_old_one(tmp_path, loaded, monkeypatch, exchange):
    source, model, params = loaded
    if not exchange:
        monkeypatch.setattr("sqjax.files.aside._exchange", lambda new, old: False)
    new = tmp_path / "new"
    save_huggingface(new, model, params, like=source)
    big = with_leaf(params, "lm_head/kernel", np.full((16, 31), 1e5, np.float32))
    how = {"like": source, "overwrite": True, "dtype": jnp.float16, "max_shard_bytes": 2000}
    with pytest.raises(ValueError, match="lm_head/kernel: expected numbers up to"):
        save_huggingface(new, model, big, **how)
    assert names_in(tmp_path) == ["new"]
    assert_same(load(new)[1], params)
    save_huggingface(new, model, params, **how)
    assert names_in(tmp_path) == ["new"]
    assert stored_in(new)["lm_head.weight"].dtype == np.float16


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, loaded, monkeypatch):
    source, model, params = loaded

    def full(path, *others):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sqjax.models.checkpoints.writing.directory.write_tensors", full)
    with pytest.raises(OSError, match=r"save_huggingface: .*new: No space left") as caught:
        save_huggingface(tmp_path / "new", model, params, like=source)
    assert caught.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []


# compressed-tensors -------------------------------------------------------------------------------

WRITTEN = ("int8", "int8_tensor", "int4", "int4_zeros", "float8", "int8_packed")


def drawn(layout, config):
    """(quantized tensors, float tensors, quantization_config) of a model, by the format's definition."""
    quantization, draw = of_layouts.LAYOUTS[layout]
    rng = np.random.default_rng(0)
    floats = tensors(config)
    stored = {}
    for name, x in floats.items():
        if "_proj.weight" not in name:
            stored[name] = x
            continue
        module = name.removesuffix(".weight")
        own, *_ = draw(rng, x.shape)
        stored |= {f"{module}.{end}": x for end, x in own.items()}
    return stored, floats, quantization


@pytest.mark.parametrize("layout", WRITTEN)
def test_tensors_are_those_of_the_format(tmp_path, layout):
    stored, floats, quantization = drawn(layout, LLAMA)
    source = write(tmp_path / "source", LLAMA, floats)
    theirs = write(tmp_path / "theirs", LLAMA | {"quantization_config": quantization}, stored)
    model, params = load(theirs)
    save_compressed_tensors(tmp_path / "new", model, params, like=source)
    got = stored_in(tmp_path / "new")
    ends = {name.rpartition(".")[2] for name in got}
    if layout in ("int8", "int8_tensor"):
        # Weights alone are packed, because vLLM reads them so.
        assert "weight_packed" in ends
    else:
        assert set(got) == set(stored)
    for name in got.keys() & stored.keys():
        expected = stored[name].reshape(got[name].shape)
        np.testing.assert_array_equal(got[name].astype(np.float64), expected.astype(np.float64))
    again, read = load(tmp_path / "new")
    assert again == model
    assert_same(read, params)


def test_packing_is_the_inverse_of_unpacking():
    codes = np.random.default_rng(0).integers(-8, 8, (3, 16)).astype(np.int8)
    np.testing.assert_array_equal(pack(codes, 4), of_layouts.pack(codes + 8, 4))
    np.testing.assert_array_equal(centred(unpack(pack(codes, 4), 4), 4), codes)
    wide = np.random.default_rng(0).integers(-128, 128, (3, 5)).astype(np.int8)
    np.testing.assert_array_equal(pack(wide, 8), of_layouts.pack(wide.astype(int) + 128, 8)[:, :2])


SCHEMES = {
    "w8a8": sq.W8A8,
    "w8a8_tensor": sq.W8A8_O2.replace(weight=sq.Int8(per_tensor=True)),
    "w8a16": sq.W8A16,
    "w4a16": sq.W4A16.replace(weight=sq.Int4(group_size=8)),
    "w4a8": sq.W4A16.replace(weight=sq.Int4(group_size=8), activation=sq.PerToken()),
    "fp8": sq.FP8,
    "w8a8_static": sq.W8A8_O3,
    "fp8_blocks": sq.FP8.replace(weight=sq.Float8(block_size=8)),
}


def statistics(model, params):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 8)))
    return sq.calibrate(model.apply, params, [ids])


@pytest.mark.parametrize("scheme", slow_but(SCHEMES))
def test_what_quantize_gives_comes_back_bit_for_bit(tmp_path, scheme):
    source = write(tmp_path / "source", TIED)
    model, params = load(source)
    rules = {"embed_tokens": None, ".*": scheme}
    given = sq.quantize(params, statistics(model, params), rules)
    save_compressed_tensors(tmp_path / "new", model, given, like=source)
    config = json.loads((tmp_path / "new/config.json").read_text())["quantization_config"]
    # The tied head is a Linear layer of torch, though no file has a tensor for it.
    assert config["ignore"] == ["lm_head"]
    assert [*config["config_groups"]] == ["group_0"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert_same(load(tmp_path / "new")[1], given)


def test_scales_of_blocks_are_written_once(tmp_path, loaded):
    """Blocks of 8 x 8: of 24 outputs and 16 inputs there are 3 x 2. Others are scales of groups."""
    source, model, params = loaded
    scheme = sq.FP8.replace(weight=sq.Float8(block_size=8))

    def choose(path):
        return {"up_proj": blocks, "down_proj": groups}.get(path.split("/")[-2])

    def blocks(x):
        return quantize_weight(x, (0,), scheme)

    def groups(x):
        return quantize_weight(x, (0,), sq.FP8.replace(weight=sq.Float8(group_size=8)))

    given = by_hand(params, choose)
    save_compressed_tensors(tmp_path / "new", model, given, like=source)
    config = json.loads((tmp_path / "new/config.json").read_text())["quantization_config"]
    by_strategy = {x["weights"]["strategy"]: x for x in config["config_groups"].values()}
    assert by_strategy["block"]["weights"]["block_structure"] == [8, 8]
    assert by_strategy["block"]["targets"] == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert by_strategy["group"]["weights"]["group_size"] == 8
    stored = stored_in(tmp_path / "new")
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].shape == (3, 2)
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (16, 3)
    assert_same(load(tmp_path / "new")[1], given)


def by_hand(params, choose):
    """The tree with each kernel that `choose(path)` gives a function for changed by it."""
    changed = dict(flatten_dict(params, sep="/"))
    for path, x in changed.items():
        change = choose(path) if path.endswith("kernel") else None
        changed[path] = x if change is None else change(x)
    return with_leaf(changed, "none", None)


def test_modules_of_several_kinds(tmp_path, loaded):
    source, model, params = loaded

    def choose(path):
        if "self_attn" in path:
            return quantized
        if "down" in path:
            return changed_tensor(input_scale=np.float32(0.3), activations="static")
        return None if "head" in path else narrow

    def narrow(x):
        tensor = sq.QTensor.quantize(x, (0,), 8, sq.numerics.formats.INT4)
        return sq.QuantWeight(tensor, None, None, "per_token")

    given = by_hand(params, choose)
    save_compressed_tensors(tmp_path / "new", model, given, like=source)
    config = json.loads((tmp_path / "new/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["format"] == "mixed-precision"
    groups = {len(group["targets"]): group for group in config["config_groups"].values()}
    attention, mlp, down = groups[8], groups[4], groups[2]
    assert attention["input_activations"] is None
    assert sorted(down["targets"]) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert down["input_activations"]["dynamic"] is False
    assert mlp["weights"]["num_bits"] == 4
    assert mlp["input_activations"]["strategy"] == "token"
    assert_same(load(tmp_path / "new")[1], given)


@pytest.mark.parametrize("name", slow_but(["bloom", "phi3", "mixtral"], "phi3"))
def test_fused_modules_and_experts(tmp_path, name):
    source = tiny_checkpoint.write(tiny_checkpoint.load(name), tmp_path / "source")
    model, params = load(source)

    def choose(path):
        return None if "router" in path or "head" in path else one

    def one(x):
        batch = (0,) if x.ndim == 3 else ()
        tensor = sq.QTensor.quantize(x, (x.ndim - 2,), batch=batch)
        return sq.QuantWeight(tensor, None, None, "per_token")

    given = by_hand(params, choose)
    save_compressed_tensors(tmp_path / "new", model, given, like=source)
    save_compressed_tensors(tmp_path / "stack", model, stack_layers(given), like=source)
    assert_same(load(tmp_path / "new")[1], given)
    assert_same(stored_in(tmp_path / "stack"), stored_in(tmp_path / "new"))


def test_scales_of_whole_tensors_in_one_module_become_those_of_outputs(tmp_path):
    source = tiny_checkpoint.write(tiny_checkpoint.load("phi3"), tmp_path / "source")
    model, params = load(source)

    def whole(x):
        return sq.QuantWeight(sq.QTensor.quantize(x, (0,), "per_tensor"), None, None, "per_tensor")

    given = by_hand(params, lambda path: whole if "self_attn" in path else None)
    save_compressed_tensors(tmp_path / "new", model, given, like=source)
    read = flatten_dict(load(tmp_path / "new")[1], sep="/")
    for path, expected in flatten_dict(given, sep="/").items():
        if is_quantized(expected):
            np.testing.assert_array_equal(read[path].dequantize(), expected.dequantize())


def changed_tensor(**changes):
    def change(x):
        weight = quantized(x)
        own = {k: v for k, v in changes.items() if hasattr(weight.tensor, k)}
        tensor = sq.QTensor(**{**vars(weight.tensor), **own})
        rest = {k: v for k, v in changes.items() if k not in own}
        return sq.QuantWeight(**{**vars(weight), "tensor": tensor, **rest})

    return change


REFUSED = {
    "no smoothing at run time": changed_tensor(smoothing=jnp.ones(16), activations="per_token"),
    "no rotation at run time": changed_tensor(rotation=8, activations="per_token"),
    "one level of scales": changed_tensor(group_scale=jnp.ones((24, 1), jnp.int8)),
    "int8, int4 or e4m3 weights": changed_tensor(fmt=sq.numerics.formats.E5M2),
    "int8 or e4m3 activations": changed_tensor(activation_format="e5m2", activations="per_token"),
    "activations without zero points": changed_tensor(
        activation_format="int4", activations="per_token_zero_point"
    ),
    "groups that divide its 16 inputs": changed_tensor(
        group=5, scale=jnp.ones((16, 4), jnp.float32)
    ),
    "a kernel .in, out., stored outputs first": changed_tensor(order=()),
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_the_format_has_no_name_for(tmp_path, loaded, expected):
    source, model, params = loaded
    square = "model/layers/0/self_attn/q_proj/kernel"
    given = by_hand(params, lambda path: REFUSED[expected] if path == square else None)
    refused(
        f"{square}: expected {expected}.*compressed-tensors has no other",
        *(tmp_path / "new", model, given),
        save=save_compressed_tensors,
        like=source,
    )


def test_float_parameters_and_a_fused_kernel(tmp_path, loaded):
    source, model, params = loaded
    how = {"save": save_compressed_tensors, "like": source}
    refused("expected parameters that sqjax.quantize gave", tmp_path / "new", model, params, **how)
    given = fuse(by_hand(params, lambda path: quantized if "self_attn" in path else None))
    message = "self_attn/q_proj.k_proj.v_proj/kernel: .*save the parameters from before `fuse`"
    refused(message, tmp_path / "new", model, given, **how)


def test_leaves_of_one_tensor_that_are_not_alike(tmp_path):
    source = tiny_checkpoint.write(tiny_checkpoint.load("phi3"), tmp_path / "source")
    model, params = load(source)
    how = {"save": save_compressed_tensors, "like": source}
    given = by_hand(params, lambda path: quantized if "q_proj" in path else None)
    message = "k_proj/kernel: expected a quantized leaf, because the checkpoint has one tensor"
    refused(message, tmp_path / "new", model, given, **how)

    def static(path):
        scale = jnp.float32(0.5 if "q_proj" in path else 0.25)
        change = changed_tensor(input_scale=scale, activations="static")
        return change if "self_attn" in path and "o_proj" not in path else None

    message = "k_proj/kernel: expected to be quantized as model/layers/0/self_attn/q_proj/kernel is"
    refused(message, tmp_path / "new", model, by_hand(params, static), **how)


def test_kernels_that_are_no_linear_layers(tmp_path):
    source = tiny_checkpoint.write(tiny_checkpoint.load("gpt2"), tmp_path / "source")
    model, params = load(source)
    given = by_hand(params, lambda path: quantized)
    message = r"q_proj/kernel: expected a kernel .*Conv1D.*\{'model/layers.*q_proj/kernel': None, '"
    refused(message, tmp_path / "new", model, given, like=source, **SAVE)


def test_a_quantized_source(tmp_path, loaded):
    stored, _, quantization = drawn("int8", LLAMA)
    theirs = write(tmp_path / "theirs", LLAMA | {"quantization_config": quantization}, stored)
    _, model, params = loaded
    refused("like: expected a float checkpoint", tmp_path / "new", model, params, like=theirs)


SAVE = {"save": save_compressed_tensors}


# Without a source ---------------------------------------------------------------------------------

MADE = {
    "tied": sq.models.llama_config(31, 16, 24, 2, 4, 2, 4, tie_embeddings=True, rope_theta=5e5),
    "biases": sq.models.llama_config(31, 16, 24, 1, 4, 4, 8, attention_bias=True, mlp_bias=True),
    "window": sq.models.llama_config(31, 16, 24, 1, 4, 4, 4, sliding_window=4, max_length=99),
}


@pytest.mark.parametrize("case", MADE)
def test_a_llama_needs_no_source(tmp_path, case):
    model = sq.models.Model(MADE[case])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = other(shapes)
    save_huggingface(tmp_path / "new", model, params)
    again, read = load(tmp_path / "new")
    assert again == model
    assert_same(read, params)
    # It is a source like any other from then on.
    save_huggingface(tmp_path / "third", model, params, like=tmp_path / "new")
    assert_same(stored_in(tmp_path / "third"), stored_in(tmp_path / "new"))


def test_a_new_llama_has_the_names_of_one(tmp_path):
    source = write(tmp_path / "source", LLAMA)
    model, params = load(source)
    save_huggingface(tmp_path / "new", model, params)
    assert_same(stored_in(tmp_path / "new"), stored_in(source))


def test_its_tokenizer_is_written_whole(tmp_path):
    words = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = Template("{{ messages[0].content }}{{ eos_token }}", "a test")
    templates = Templates({"default": template}, {"eos_token": "</s>"})
    tokenizer = Tokenizer(backend, eos_id=3, templates=templates)
    model = sq.models.Model(MADE["tied"], tokenizer)
    params = other(jax.eval_shape(model.init, jax.random.key(0)))
    save_huggingface(tmp_path / "new", model, params)
    read = load(tmp_path / "new")[0].tokenizer
    assert read.encode("b a c") == tokenizer.encode("b a c") == [2, 1, 0]
    assert (read.ends, read.bos_id) == ((3,), None)
    assert read.chat([{"role": "user", "content": "b"}]) == "b</s>"


def test_other_models_need_one(tmp_path):
    capped = replace(MADE["tied"], logit_softcap=3.0)
    # torch's Mistral has no biases.
    biased = replace(MADE["window"], attention_bias=True, output_bias=True)
    for config in (capped, biased):
        model = sq.models.Model(config)
        params = other(jax.eval_shape(model.init, jax.random.key(0)))
        message = "like: expected the directory .*only a Llama can be written"
        refused(message, tmp_path / "new", model, params)
