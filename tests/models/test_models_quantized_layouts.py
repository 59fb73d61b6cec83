"""The layouts of quantized checkpoints, module by module: vectors of the tools that write them, and the splits."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import quantized_tensors as of_layouts
from hf_directories import CONFIG
from safetensors.numpy import save_file

from sqjax.files.header import read_header
from sqjax.models.checkpoints import names
from sqjax.models.checkpoints.huggingface import read_config
from sqjax.models.checkpoints.quantized.known import read_quantization
from sqjax.models.checkpoints.quantized.modules import Tensor, sort_out
from sqjax.models.checkpoints.quantized.stored_weight import (
    Kind,
    StoredWeight,
    placed,
)
from sqjax.models.checkpoints.quantized.unpacking import unpack, with_one_more
from sqjax.numerics.formats import INT4

VECTORS = Path(__file__).parent / "vectors" / "quantized"
CONFIGS = json.loads((VECTORS / "compressed_tensors.json").read_text())
MODULE = "model.layers.0.mlp.up_proj"


def read_module(directory, config, tensors):
    """The weight of the module that these tensors are, as a file holds them."""
    named = {f"{MODULE}.{end}": np.ascontiguousarray(x) for end, x in tensors.items()}
    save_file(named, directory / "x.safetensors")
    quantization = read_quantization({"quantization_config": config}, "config.json")
    with open(directory / "x.safetensors", "rb") as file:
        stored = {name: Tensor(file, entry) for name, entry in read_header(file).tensors.items()}
        found = sort_out(stored, quantization)
        assert (found.problems, set(found.modules)) == ([], {f"{MODULE}.weight"})
        return found.modules[f"{MODULE}.weight"].read()


@pytest.mark.parametrize("case", CONFIGS)
def test_what_compressed_tensors_reads_back(tmp_path, case):
    with np.load(VECTORS / "compressed_tensors.npz") as arrays:
        tensors = {
            name.removeprefix(f"{case}/"): arrays[name] for name in arrays if f"{case}/" in name
        }
    expected = tensors.pop("expected")
    if case.startswith("fp8"):
        tensors["weight"] = tensors["weight"].view(ml_dtypes.float8_e4m3fn)
    weight = read_module(tmp_path, CONFIGS[case], tensors)
    leaf = placed(weight, np.float32, None)
    leaf.tensor.check(case)
    np.testing.assert_array_equal(leaf.dequantize(), expected.T)
    is_static = "input_scale" in tensors
    assert is_static == (leaf.activations == "static")
    assert not is_static or leaf.input_scale == tensors["input_scale"][0]


def test_what_the_converter_of_awq_reads(tmp_path):
    with np.load(VECTORS / "awq.npz") as arrays:
        expected = dict(arrays)
    tensors = {end: expected[end] for end in ("qweight", "qzeros", "scales")}
    weight = read_module(tmp_path, of_layouts.AWQ, tensors)
    np.testing.assert_array_equal(weight.values, expected["values"])
    np.testing.assert_array_equal(weight.zero, expected["zero"])
    np.testing.assert_array_equal(weight.scale, expected["scales"].T.astype(np.float32))


def test_words():
    codes = np.random.default_rng(0).integers(0, 256, (3, 16))
    np.testing.assert_array_equal(unpack(of_layouts.pack(codes, 8), 8), codes)
    np.testing.assert_array_equal(unpack(of_layouts.pack(codes % 16, 4), 4), codes % 16)
    # 0x11111111 taken away from a word is added again, whatever was borrowed on the way.
    words = of_layouts.pack(codes % 16, 4)
    less = (words.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    np.testing.assert_array_equal(with_one_more(less, 4), words)


def test_inputs_that_do_not_fill_a_word(tmp_path):
    rng = np.random.default_rng(0)
    config = of_layouts.LAYOUTS["int4_zeros"][0]
    tensors, known, weight = of_layouts.packed(rng, (11, 21), group=8)
    leaf = placed(read_module(tmp_path, config, tensors), np.float32, None)
    np.testing.assert_array_equal(leaf.tensor.zero, known["zero"])
    np.testing.assert_array_equal(leaf.dequantize(), weight.T)


def test_zero_points_that_are_not_packed(tmp_path):
    config = of_layouts.LAYOUTS["int4_zeros"][0]
    tensors, known, _ = of_layouts.packed(np.random.default_rng(0), (8, 16))
    tensors["weight_zero_point"] = known["zero"].astype(np.int8)
    weight = read_module(tmp_path, config, tensors)
    np.testing.assert_array_equal(weight.zero, known["zero"])


LAYOUTS = {
    "rows": (names.ONE_AFTER_ANOTHER, [24, 8, 8]),
    "columns": (names.COLUMNS_ONE_AFTER_ANOTHER, [24, 8, 8]),
    "by key head": (names.BY_KEY_HEAD, [24, 8, 8]),
    "transposed": (names.TRANSPOSED, [40]),
    "as it is": (names.AS_IS, [40]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_quantized_tensor_is_split_as_its_float_one(case):
    layout, outputs = LAYOUTS[case]
    _, config = read_config(CONFIG)  # 6 query heads of 4 channels, over 2 key/value heads
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (40, 16)).astype(np.int8)
    scale = rng.integers(1, 99, (40, 2)).astype(np.float32)
    zero = rng.integers(-8, 8, (40, 2)).astype(np.int8)
    weight = StoredWeight(Kind(INT4, 8), values, scale, zero)
    shapes = [(16, n) for n in outputs]
    inputs_first = case in ("columns", "as it is")
    theirs = (values - np.repeat(zero, 8, 1).astype(np.float32)) * np.repeat(scale, 8, 1)
    expected = layout.split(config, theirs.T if inputs_first else theirs, shapes)
    got = [placed(part, np.float32, None) for part in weight.split(layout, config, shapes)]
    for part, own in zip(got, expected, strict=True):
        np.testing.assert_array_equal(part.dequantize(), own)
