"""Checkpoints that declare what they do not hold, and configurations of any JSON at all."""

import contextlib
import json
import os
import struct
import time
from dataclasses import replace

import hf_directories as of_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tiny_llama import looking_back
from untyped import untyped

from sqjax.models import LlamaConfig, Model, load
from sqjax.models.checkpoints.gguf_file import Block, read_header
from sqjax.models.checkpoints.mapping import parameter_shapes
from sqjax.models.config import Experts, LayerKind, Norm
from sqjax.models.rope import Rope
from sqjax.models.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
of_gguf = pytest.importorskip("gguf_files")

# Configurations -----------------------------------------------------------------------------------

WRONG = {
    "text": ({"hidden_size": "32"}, "hidden_size: expected a whole number .*, got '32'"),
    "float": ({"hidden_size": 12.0}, "hidden_size: expected a whole number .*, got 12.0"),
    "huge": ({"hidden_size": 2**63}, "hidden_size: expected a whole number"),
    "bool": ({"num_hidden_layers": True}, "num_hidden_layers: expected a whole number .*True"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number"),
    "list": ({"vocab_size": [31]}, r"vocab_size: expected a whole number .*, got \[31\]"),
    "long": ({"vocab_size": "x" * 500}, r"vocab_size: expected a whole number .*, got 'x+\.\.\."),
    "eps": ({"rms_norm_eps": -1}, "rms_norm_eps: expected a finite number of at least 0, got -1"),
    "eps NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number"),
    "theta NaN": ({"rope_theta": float("nan")}, "rope_theta: expected a finite number above 0"),
    "theta inf": ({"rope_theta": float("inf")}, "rope_theta: expected a finite number above 0"),
    "theta text": ({"rope_theta": "1e4"}, "rope_theta: expected a finite number above 0"),
    "theta huge": ({"rope_theta": 10**400}, "rope_theta: expected a finite number above 0"),
    "inner theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
        "rope_parameters: rope_theta: expected a finite number above 0, got -1",
    ),
    "window": (
        {"model_type": "mistral", "sliding_window": 1.5},
        "sliding_window: expected a whole number",
    ),
    "tie": (
        {"tie_word_embeddings": "false"},
        "tie_word_embeddings: expected true or false, got 'f",
    ),
    "bias": ({"attention_bias": 1}, "attention_bias: expected true or false, got 1"),
    "rope": (
        {"rope_scaling": "linear"},
        "rope_scaling: expected an object with names, got 'linear",
    ),
    "layers": ({"layer_types": "full_attention"}, "layer_types: expected a list of texts"),
    "layers of one": ({"layer_types": ["full_attention"]}, "expected 2 times 'full_attention'"),
    "act": ({"hidden_act": ["silu"]}, "hidden_act: expected one of .*'silu'"),
    "type": ({"model_type": ["llama"]}, r"model_type to be one of .*'llama'.*, got \['llama'\]"),
    "no end": ({"eos_token_id": []}, r"eos_token_id: expected a token id, or a list of some"),
    "end": ({"eos_token_id": 31}, "eos_token_id: expected token ids below .* 31, got 31"),
    "ends": ({"eos_token_id": [2, -1]}, "eos_token_id: expected a token id"),
    "odd head": ({"head_dim": 5}, "DecoderConfig.head_dim: expected an even number .*got 5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_that_is_none(tmp_path, case):
    change, message = WRONG[case]
    (tmp_path / "config.json").write_text(json.dumps(of_hf.CONFIG | change))
    with pytest.raises(ValueError, match=rf"config\.json[^$]*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 10**5, '{"a": 1', "\ud800"])
def test_a_configuration_of_no_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        load(tmp_path)


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: .*expected a file, got a directory"):
        load(tmp_path)
    for path in (None, 5, b"model", ["model"]):
        with untyped(), pytest.raises(ValueError, match=r"load: expected one of .* or a path, got"):
            load(path)
    for dtype in (np.int8, "nonsense", 3):
        with untyped(), pytest.raises(ValueError, match="load: expected a dtype of floats"):
            load(tmp_path, dtype)


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": ()},
        {"kinds": [looking_back(4)]},
        {"norm": "rms"},
        {"activation": "tanh"},
        {"logit_softcap": -1.0},
        {"tie_embeddings": "false"},
        {"num_layers": True},
        {"head_dim": 4.0},
        {"max_length": 2**40},
    ],
)
def test_a_configuration_made_by_hand_is_checked_too(change):
    [(name, _)] = change.items()
    with untyped(), pytest.raises(ValueError, match=rf"DecoderConfig\.{name}: expected"):
        replace(LlamaConfig(31, 12, 20, 2, 6, 2, 4), **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Norm(eps=-1.0), "Norm.eps: expected a finite number of at least 0"),
        (lambda: Norm(eps=float("nan")), "Norm.eps: expected a finite number of at least 0"),
        (lambda: Norm("batch"), r"Norm.kind: expected one of \('rms', 'layer'\), got 'batch'"),
        (lambda: Rope(float("nan")), "Rope.theta: expected a finite number above 0"),
        (lambda: Rope(scaling="linear"), "Rope.scaling: expected a scaling"),
        (lambda: LayerKind(1.5), "LayerKind.sliding_window: expected a whole number"),
        (lambda: Experts(4, 5, 8), "Experts.per_token: expected .* got 5 of 4 in"),
    ],
)
def test_a_part_made_by_hand_is_checked_too(make, message):
    with untyped(), pytest.raises(ValueError, match=message):
        make()


def test_what_a_mistral_leaves_out_is_what_transformers_takes(tmp_path):
    """A window of 4096 and 8 key/value heads, where a Llama has none and as many as heads."""
    left_out = ("sliding_window", "num_key_value_heads", "max_position_embeddings")
    config = {key: value for key, value in of_hf.CONFIG.items() if key not in left_out}
    config |= {"model_type": "mistral", "num_attention_heads": 8, "head_dim": 4}
    weights = of_hf.tensors(of_hf.CONFIG | config | {"num_key_value_heads": 8})
    found = load(of_hf.write(tmp_path, config, weights))[0].config
    assert (found.kinds[0].sliding_window, found.num_kv_heads, found.max_length) == (
        4096,
        8,
        131072,
    )
    config |= {"sliding_window": None}
    assert load(of_hf.write(tmp_path, config, weights))[0].config.kinds[0].sliding_window is None


@pytest.mark.parametrize(
    ("stored", "dtype", "number"),
    [
        (np.float64, jnp.float32, 1e39),
        (np.float32, jnp.float16, 7e4),
        (jnp.bfloat16, jnp.float16, 7e4),
    ],
)
def test_a_number_that_would_become_infinite(tmp_path, stored, dtype, number):
    weights = of_hf.tensors(dtype=stored)
    load(of_hf.write(tmp_path, weights=weights), dtype)
    weights["model.norm.weight"][3] = -number
    of_hf.write(tmp_path, weights=weights)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected numbers up to .* wider"):
        load(tmp_path, dtype)
    weights["model.norm.weight"][3] = np.inf  # what the file says is kept
    load(of_hf.write(tmp_path, weights=weights), dtype)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are those of POSIX")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_fifo_in_a_directory_is_not_waited_for(tmp_path, name):
    of_hf.write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        load(tmp_path)


def test_a_path_that_is_too_long():
    with pytest.raises(ValueError, match="got no such path"):
        load("a" * 5000)


#: Experts in the second layer only.
MIXED = {"experts": Experts(3, 2, 7, shared_size=5, dense_layers=(0,))}

# What is declared ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, MIXED]
)
def test_the_shapes_are_those_of_the_model(changes):
    config = replace(LlamaConfig(31, 12, 20, 2, 6, 2, 4), **changes)
    made = flatten_dict(jax.eval_shape(Model(config).init, jax.random.key(0)), sep="/")
    assert parameter_shapes(config, 2) == {path: leaf.shape for path, leaf in made.items()}


@pytest.mark.parametrize("layers", [3, 2000, 10**9])
def test_layers_that_are_not_there_cost_nothing(tmp_path, layers):
    start = time.perf_counter()
    config = of_hf.CONFIG | {"num_hidden_layers": layers}
    with pytest.raises(
        ValueError, match=rf"expected the tensors of {layers} layers, got those of 2"
    ):
        load(of_hf.write(tmp_path, config, of_hf.tensors()))
    path = of_gguf.write(
        tmp_path / "model.gguf", metadata=of_gguf.METADATA | {"llama.block_count": layers}
    )
    with pytest.raises(
        ValueError, match=rf"expected the tensors of {layers} layers, got those of 2"
    ):
        load(path)
    assert time.perf_counter() - start < 5


def test_very_many_problems_are_not_all_listed(tmp_path):
    weights = {f"no.{i}": np.zeros(1, np.float32) for i in range(500)}
    with pytest.raises(ValueError, match=r"no\.0: (.|\n)*and \d+ more") as caught:
        load(of_hf.write(tmp_path, weights=weights))
    assert len(str(caught.value).splitlines()) < 40


def test_a_tensor_belongs_in_one_shard_and_where_the_index_says(tmp_path):
    weights = of_hf.tensors()
    of_hf.shard(tmp_path, weights)
    one, two = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    names = sorted(weights)
    # A second, other copy in the last file, which would win.
    again = {name: weights[name] for name in names[1::2]} | {names[0]: weights[names[0]] + 1}
    save_file(again, two)
    expected = rf"{names[0]}: expected it in one file, got it in {one.name} and {two.name}"
    with pytest.raises(ValueError, match=expected):
        load(tmp_path)
    save_file({name: weights[name] for name in names[2::2]}, one)
    with pytest.raises(ValueError, match=rf"{names[0]}: expected it in {one.name}, as the index"):
        load(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map(tmp_path, index):
    of_hf.shard(tmp_path, of_hf.tensors())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: expected a weight_map of names and files"):
        load(tmp_path)


# GGUF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.attention.head_count": "4"}, "head_count: expected a whole number .*, got '4'"),
        ({"llama.attention.head_count": float("nan")}, "head_count: expected a whole number .*nan"),
        ({"llama.attention.head_count": 0}, "head_count: expected a whole number .*, got 0"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base: expected a finite number above 0"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon: expected a finite number"),
        ({"llama.vocab_size": 32}, "vocab_size: expected the embedding's rows 31, got 32"),
        ({"llama.attention.key_length": 7}, "value_length: expected the head size 7"),
    ],
)
def test_metadata_that_are_none(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"model\.gguf[^$]*{message}"):
        load(of_gguf.write(tmp_path / "model.gguf", metadata=of_gguf.METADATA | change))


def split(folder, weights, parts, metadata=of_gguf.METADATA, **changes):
    """The checkpoint in parts, tensors in turn; `changes` of the keys that tell the parts."""
    paths = []
    for number in range(parts):
        path = folder / f"model-{number + 1:05d}-of-{parts:05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        keys = {"no": number, "count": parts, "tensors.count": len(weights)} | changes
        writer.add_uint16("split.no", keys["no"])
        writer.add_uint16("split.count", keys["count"])
        writer.add_int32("split.tensors.count", keys["tensors.count"])
        for key, value in metadata.items() if number == 0 else ():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(key, value)
        for name in list(weights)[number::parts]:
            array = weights[name]
            if ".attn_q." in name or ".attn_k." in name:
                array = of_gguf.interleaved(array)
            writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.mark.parametrize("named", [0, 2])
def test_all_parts_are_read_whichever_is_named(tmp_path, named):
    weights = of_gguf.tensors()
    _, whole = load(of_gguf.write(tmp_path / "whole.gguf", weights))
    model, params = load(split(tmp_path, weights, 3)[named])
    assert not model.config.tie_embeddings
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_a_part_that_is_missing_or_another(tmp_path):
    weights = of_gguf.tensors()
    first, second, third = split(tmp_path, weights, 3)
    second.unlink()
    missing = rf"{first.name}: expected all 3 parts .* 1 are missing: \['{second.name}'\]"
    with pytest.raises(ValueError, match=missing):
        load(first)
    third.rename(second)
    split(tmp_path / ".", weights, 3)[1].write_bytes(third.read_bytes())
    with pytest.raises(
        ValueError, match=rf"{second.name}: expected split.no .* \(1, 3\), got \(2, 3\)"
    ):
        load(first)


def test_a_part_by_another_name_is_no_whole_model(tmp_path):
    paths = split(tmp_path, of_gguf.tensors(), 2)
    paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"model\.gguf: expected a file that is whole.*count = 2"):
        load(tmp_path / "model.gguf")
    of_gguf.write(tmp_path / "a-00001-of-00002.gguf")
    with pytest.raises(ValueError, match=r"expected a file that is whole.*count = 1"):
        load(tmp_path / "a-00001-of-00002.gguf")


def test_parts_that_hold_too_much_or_too_little(tmp_path):
    weights = of_gguf.tensors()
    paths = split(tmp_path, weights, 2, **{"tensors.count": len(weights) + 1})
    with pytest.raises(
        ValueError, match=rf"expected {len(weights) + 1} tensors .* got {len(weights)}"
    ):
        load(paths[0])


BLOCKS = {int(kind): Block(*sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def u32(x):
    return struct.pack("<I", x)


def u64(x):
    return struct.pack("<Q", x)


def text(x):
    return u64(len(x)) + x.encode()


def file_of(tmp_path, *keys, tensors=(), data=b"", version=3, counts=None):
    """A GGUF file put together by hand."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = b"GGUF" + u32(version) + u64(tensor_count) + u64(key_count)
    raw = head + b"".join(keys) + b"".join(tensors)
    raw += b"\0" * (-len(raw) % 32) + data
    (tmp_path / "x.gguf").write_bytes(raw)
    return tmp_path / "x.gguf"


def tensor(name, shape=(4,), kind=0, offset=0):
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


key = text("k")
DAMAGED = {
    "big-endian": (dict(version=0x03000000), "a big-endian one.*gguf-convert-endian"),
    "version": (dict(version=9), "one of version 9"),
    "keys": (dict(counts=(0, 2**60)), r"1152921504606846976 keys declared in \d+ bytes"),
    "tensors": (dict(counts=(2**60, 0)), r"1152921504606846976 tensors declared"),
    "length": ((u64(2**50) + b"12345",), "bytes of a key declared"),
    "numbers": ((key + u32(9) + u32(0) + u64(2**60),), "numbers of k declared"),
    "texts": ((key + u32(9) + u32(8) + u64(2**60),), "values of k declared"),
    "lists": ((key + u32(9) + (u32(9) + u64(1)) * 9,), "k: a value of type 9"),
    "type": ((key + u32(77),), "k: a value of type 77"),
    "twice": ((key + u32(0) + b"1", key + u32(0) + b"1"), "the key k twice"),
    "bool": ((key + u32(7) + b"\2",), "k: a bool that is neither 0 nor 1"),
    "utf-8": ((u64(1) + b"\xff" + u32(0) + b"1",), "a key: .*utf-8"),
    "alignment": ((text("general.alignment") + u32(4) + u32(0),), "general.alignment = 0"),
    "alignment text": (
        (text("general.alignment") + u32(8) + text("a"),),
        "general.alignment = 'a'",
    ),
    "axes": (dict(tensors=[tensor("a", (1,) * 9)]), "a: a tensor of 9 axes"),
    "misaligned": (
        dict(tensors=[tensor("a", offset=16)], data=b"\0" * 64),
        "a: the offset 16, which is no multiple of 32",
    ),
    "overlap": (
        dict(tensors=[tensor("a", (16,)), tensor("b", offset=32)], data=b"\0" * 96),
        "a and b, whose data overlap",
    ),
    "one place": (
        dict(tensors=[tensor("a"), tensor("b")], data=b"\0" * 96),
        "a and b, whose data overlap",
    ),
    "outside": (dict(tensors=[tensor("a", (2**40, 2**40))], data=b"\0" * 32), "a: data up to byte"),
    "one name": (dict(tensors=[tensor("a"), tensor("a")]), "two tensors of one name"),
    "block": (
        dict(tensors=[tensor("a", (5,), 8)], data=b"\0" * 64),
        "a: rows of 5 in blocks of 32",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_gguf_header_that_is_none(tmp_path, case):
    changes, message = DAMAGED[case]
    path = (
        file_of(tmp_path, *changes) if isinstance(changes, tuple) else file_of(tmp_path, **changes)
    )
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"x\.gguf: expected a GGUF file, got .*{message}"):
        load(path)
    assert time.perf_counter() - start < 2


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "a": ("uint8", 200),
        "b": ("int8", -5),
        "c": ("int16", -300),
        "d": ("uint64", 2**60),
        "e": ("int64", -(2**60)),
        "f": ("float64", 0.1),
        "g": ("bool", True),
        "h": ("string", "Ġé"),
        "i": ("array", ["x", "yz"]),
        "j": ("array", [1, 2, 3]),
        "k": ("array", [1.5, 2.5]),
        "l": ("array", [True, False]),
    }
    for name, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(name, value)
    arrays = {"t": np.arange(12, dtype=np.float32).reshape(3, 4), "u": np.ones((2, 64), np.float16)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("rb") as file:
        header = read_header(file, BLOCKS)
    theirs = gguf.GGUFReader(path)
    for name, (_, value) in values.items():
        assert header.metadata[name] == value == theirs.fields[name].contents()
    for ours, other in zip(header.tensors, theirs.tensors, strict=True):
        assert (ours.name, ours.shape) == (other.name, tuple(other.shape[::-1]))
        assert header.data_start + ours.offset == other.data_offset


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_byte_never_hangs_and_never_escapes(tmp_path, seed):
    """Every byte of the header may be another: the file loads or is refused by its name."""
    path = of_gguf.write(tmp_path / "model.gguf", of_gguf.tensors(tied=True))
    raw, rng = path.read_bytes(), np.random.default_rng(seed)
    for where in rng.integers(0, 1200, 60):
        changed = bytearray(raw)
        changed[where] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with path.open("rb") as file, contextlib.suppress(ValueError):
            read_header(file, BLOCKS)


def test_a_tokenizer_that_is_none_is_a_warning_with_the_file(tmp_path):
    """GGUF without tokens: the model itself can be used with ids."""
    metadata = of_gguf.METADATA | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    path = of_gguf.write(tmp_path / "model.gguf", metadata=metadata)
    with pytest.warns(
        UserWarning, match=r"model\.gguf: .* without a tokenizer: .*tokens: expected a"
    ):
        model, _ = load(path)
    assert model.tokenizer is None


# Ends ---------------------------------------------------------------------------------------------

tokenizers = pytest.importorskip("tokenizers")


def with_tokenizer(directory, **files):
    of_hf.write(directory)
    words = {"a": 0, "b": 1, "c": 2, "<end>": 3, "<turn>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_every_end_ends_a_text(tmp_path):
    with_tokenizer(
        tmp_path,
        config=of_hf.CONFIG | {"eos_token_id": [4, 3]},
        generation_config={"eos_token_id": [3, 2]},
        tokenizer_config={"eos_token": "<end>"},
    )
    model, _ = load(tmp_path)
    assert model.tokenizer.eos_id == 3
    assert model.tokenizer.ends == (3, 4, 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"generation_config": {"eos_token_id": 31}},
            r"generation_config\.json: eos_token_id: .*31",
        ),
        ({"generation_config": {"eos_token_id": []}}, r"generation_config\.json: eos_token_id"),
        ({"generation_config": []}, r"generation_config\.json: expected JSON of an object"),
        (
            {"tokenizer_config": {"eos_token": "<no>"}},
            r"tokenizer_config\.json: expected eos_token",
        ),
        ({"tokenizer_config": {"eos_token": 3}}, r"tokenizer_config\.json: expected eos_token"),
        ({"tokenizer_config": {"eos_token": {"content": []}}}, "expected eos_token to be a token"),
    ],
)
def test_an_end_that_is_no_token(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load(with_tokenizer(tmp_path, **files))


@pytest.mark.parametrize("prompt", ["\ud800", 5, None, b"a"])
def test_what_is_no_text_is_not_encoded(prompt):
    with untyped(), pytest.raises(ValueError, match="encode: expected a text"):
        Tokenizer(None, None).encode(prompt)
