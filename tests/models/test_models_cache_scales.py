"""Static scales of a cache: measured against numpy, and in a checkpoint of compressed-tensors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
from hf_directories import CONFIG, write
from safetensors.numpy import load_file
from tiny_llama import GROUPED, random_ids, random_params
from untyped import untyped

import sqjax as sq
from sqjax.models import Model, cache_scales, load, save_compressed_tensors

MODEL = Model(GROUPED)


def first_layer(params, ids):
    """(max |K|, max |V|) of layer 0, in float64: embedding, RMS norm, matmul, rotation."""
    model = jax.tree.map(lambda x: np.asarray(x, np.float64), params["model"])
    layer = model["layers"]["0"]
    x = model["embed_tokens"]["embedding"][np.asarray(ids)]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * layer["input_layernorm"]["weight"]
    keys = (x @ layer["self_attn"]["k_proj"]["kernel"]).reshape(*ids.shape, 2, 2, 4)
    angles = np.arange(ids.shape[1])[:, None] * 10000.0 ** (-np.arange(4) / 4)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = keys[..., 0, :], keys[..., 1, :]
    turned = np.stack([first * cos - second * sin, second * cos + first * sin])
    values = x @ layer["self_attn"]["v_proj"]["kernel"]
    return np.abs(turned).max(), np.abs(values).max()


def test_scales_are_the_largest_numbers_divided_by_the_largest_code():
    params, batches = random_params(MODEL), [random_ids(2, 7, 1), (random_ids(2, 7, 2),)]
    got = cache_scales(MODEL, params, batches)
    keys, values = np.max([first_layer(params, ids) for ids in (batches[0], *batches[1])], axis=0)
    assert got.fmt == "int8"
    np.testing.assert_allclose((got.keys[0], got.values[0]), (keys / 127, values / 127), 1e-5)
    assert got.keys.shape == got.values.shape == (2,)
    narrow = cache_scales(MODEL, params, batches, "fp8")
    np.testing.assert_allclose(narrow.keys, got.keys * 127 / 448, 1e-6)


def test_what_can_not_be_measured_is_refused():
    params = random_params(MODEL)
    with pytest.raises(ValueError, match="cache_scales: expected at least one batch, got none"):
        cache_scales(MODEL, params, [])
    with untyped(), pytest.raises(ValueError, match=r"fmt: expected one of .*got 'int4'"):
        cache_scales(MODEL, params, [random_ids(1, 2)], "int4")
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="expected finite keys and values"):
        cache_scales(MODEL, bad, [random_ids(2, 7)])


def quantized(params):
    """The projections as W8A8 has them; made here, because to calibrate takes seconds."""

    def one(path, x):
        if "_proj" not in jax.tree_util.keystr(path):
            return x
        return sq.QuantWeight(sq.QTensor.quantize(x, (0,)), None, None, "per_token")

    return jax.tree_util.tree_map_with_path(one, params)


def scales_of(layers, fmt):
    rng = np.random.default_rng(0)
    keys, values = rng.uniform(0.1, 1, (2, layers)).astype(np.float32)
    return sq.models.CacheScales(fmt, keys, values)


@pytest.mark.parametrize(("fmt", "kind"), [("int8", "int"), ("fp8", "float")])
def test_a_checkpoint_has_the_scales_beside_the_projections(tmp_path, fmt, kind):
    source = write(tmp_path / "source", CONFIG)
    model, params = load(source)
    given, scales = quantized(params), scales_of(2, fmt)
    save_compressed_tensors(tmp_path / "new", model, given, like=source, cache_scales=scales)
    stored = load_file(tmp_path / "new/model.safetensors")
    for layer in range(2):
        for name, expected in (("k", scales.keys), ("v", scales.values)):
            got = stored[f"model.layers.{layer}.self_attn.{name}_scale"]
            np.testing.assert_array_equal(got, expected[layer : layer + 1])
    config = json.loads((tmp_path / "new/config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["type"] == kind
    assert config["kv_cache_scheme"]["dynamic"] is False
    with pytest.warns(UserWarning, match="kv_cache_scheme is not used"):
        again, read = load(tmp_path / "new")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, given)


@pytest.mark.slow
def test_of_fused_projections_the_attention_is_found_too(tmp_path):
    source = tiny_checkpoint.write(tiny_checkpoint.load("phi3"), tmp_path / "source")
    model, params = load(source)
    given, scales = quantized(params), scales_of(model.config.num_layers, "fp8")
    save_compressed_tensors(tmp_path / "new", model, given, like=source, cache_scales=scales)
    stored = load_file(tmp_path / "new/model.safetensors").keys()
    assert "model.layers.1.self_attn.v_scale" in stored
    assert "model.layers.1.self_attn.qkv_proj.weight" in stored


def test_scales_of_another_model_are_refused(tmp_path):
    source = write(tmp_path / "source", CONFIG)
    model, params = load(source)
    given = quantized(params)
    with pytest.raises(ValueError, match=r"expected scales of 2 layers .*got 3 and 3"):
        save_compressed_tensors(
            tmp_path / "new", model, given, like=source, cache_scales=scales_of(3, "int8")
        )
    assert not (tmp_path / "new").exists()
