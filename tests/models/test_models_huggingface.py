"""Hugging Face directories written with safetensors and read back; everything that must be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_directories import CONFIG, shard, tensors, write

import sqjax as sq
from sqjax.models import Model, generate, load, load_model
from sqjax.models.checkpoints.families.llama import LLAMA
from sqjax.models.checkpoints.loading import check_options
from sqjax.models.model import check_ids

IDS = np.arange(8, dtype=np.int32).reshape(2, 4)


def expected_tree(weights):
    """Paths and arrays, by string surgery that shares nothing with the library's table."""
    tree = {}
    for name, array in weights.items():
        path = name.replace(".", "/")
        if array.ndim == 2:
            array = array if "embed" in path else array.T
            path = path.replace("weight", "embedding" if "embed" in path else "kernel")
        tree[path] = array
    return tree


def assert_same(params, weights, dtype=jnp.float32):
    got, expected = flatten_dict(params, sep="/"), expected_tree(weights)
    assert got.keys() == expected.keys()
    for path, leaf in got.items():
        assert leaf.dtype == dtype, path
        np.testing.assert_array_equal(
            leaf.astype(jnp.float32), expected[path].astype(np.float32), path
        )


@pytest.mark.slow
def test_round_trip(tmp_path):
    model, params = load(write(tmp_path))
    assert_same(params, tensors())
    assert model.config.kinds[0].rope.theta == 5000.0
    assert model.config.max_length == 128
    assert model.tokenizer is None
    assert jnp.isfinite(jax.jit(model.apply)(params, jnp.asarray([[1, 2, 3]]))).all()


@pytest.mark.parametrize("stored", [jnp.bfloat16, np.float16, np.float64])
def test_other_dtypes(tmp_path, stored):
    weights = tensors(dtype=stored)
    _, params = load(write(tmp_path, weights=weights))
    assert_same(params, weights)
    _, params = load(tmp_path, dtype=jnp.bfloat16)
    rounded = {name: array.astype(jnp.bfloat16) for name, array in weights.items()}
    assert_same(params, rounded, jnp.bfloat16)


def test_biases(tmp_path):
    config = CONFIG | {"attention_bias": True, "mlp_bias": True}
    model, params = load(write(tmp_path, config))
    assert_same(params, tensors(config))
    assert model.config.attention_bias
    assert model.config.mlp_bias


ANGLES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_what_follows_from_the_rest_is_compared(tmp_path, dtype):
    config = CONFIG | {"tie_word_embeddings": True}
    weights = tensors(config, dtype)
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        ANGLES: np.array([1, 5000**-0.5], dtype),
    }
    _, params = load(write(tmp_path, config, weights | extra))
    assert_same(params, weights)
    for name, message in {
        "lm_head.weight": "expected model.embed_tokens.weight, because tie_word_embeddings is true",
        ANGLES: "expected the angles of rope_theta = 5000; got other numbers",
    }.items():
        other = extra | {name: (extra[name] * 1.5).astype(dtype)}
        with pytest.raises(ValueError, match=f"1 problem.*\n.*{name}: {message}"):
            load(write(tmp_path, config, weights | other))


def test_shards(tmp_path):
    _, params = load(shard(tmp_path, tensors()))
    assert_same(params, tensors())


def test_missing_shard(tmp_path):
    shard(tmp_path, tensors())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: expected this file"):
        load(tmp_path)


def test_older_and_newer_configurations_agree(tmp_path):
    older = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "head_dim")}
    newer = older | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "head_dim": 4,
    }
    older |= {"rope_theta": 5000.0, "num_key_value_heads": None, "num_attention_heads": 3}
    model, _ = load(write(tmp_path / "newer", newer, tensors()))
    assert model.config.kinds[0].rope.theta == 5000.0
    full = CONFIG | {"num_key_value_heads": 3, "num_attention_heads": 3}
    model, _ = load(write(tmp_path / "older", older, tensors(full)))
    assert (model.config.num_kv_heads, model.config.head_dim) == (3, 4)


def test_mistral_without_a_window(tmp_path):
    config = CONFIG | {"model_type": "mistral", "sliding_window": None}
    model, _ = load(write(tmp_path, config, tensors()))
    assert isinstance(model, Model)
    assert model.config.kinds[0].sliding_window is None


@pytest.mark.slow
def test_mistral_with_a_window(tmp_path):
    model, params = load(
        write(tmp_path, CONFIG | {"model_type": "mistral", "sliding_window": 3}, tensors())
    )
    wide, _ = load(
        write(tmp_path, CONFIG | {"model_type": "mistral", "sliding_window": None}, tensors())
    )
    assert model.config.kinds[0].sliding_window == 3
    ids = jnp.asarray([[1, 2, 3, 4, 5]])
    differs = (
        np.abs(jax.jit(model.apply)(params, ids) - jax.jit(wide.apply)(params, ids)).max(
            axis=(0, 2)
        )
        > 1e-6
    )
    np.testing.assert_array_equal(differs, [False, False, False, True, True])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "expected model_type to be one of .*'llama'.*, got 'mamba'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling: low_freq_factor: expected a finite number above 0, got none",
        ),
        (
            {"rope_scaling": {"type": "mrope"}},
            "rope_type = 'mrope': not supported, .* one of .*'llama3'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: factor: expected a finite"),
        ({"sliding_window": 4096}, "sliding_window = 4096: expected no such key; the model"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types = .*: not supported for this family; expected 2 times 'full_attention'",
        ),
        ({"hidden_act": "tanh"}, "hidden_act: expected one of .*'silu'.*, got 'tanh'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: expected 1; the"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected quant_method to be"),
        ({"vocab_size": None}, "vocab_size: expected a whole number from 1 to .*, got none"),
        ({"num_key_value_heads": 4}, "expected a multiple of num_kv_heads"),
    ],
)
def test_configurations_that_would_be_computed_wrongly(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, CONFIG | change, tensors()))


def test_every_tensor_problem_in_one_error(tmp_path):
    weights = tensors()
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = weights[
        "model.layers.1.mlp.up_proj.weight"
    ].T.copy()
    weights["model.layers.2.mlp.up_proj.weight"] = np.ones((24, 12), np.float32)
    weights["model.layers.0.mlp.experts"] = np.ones(3, np.float32)
    weights["lm_head.weight"] = np.ones((31, 12), np.int8)
    with pytest.raises(ValueError, match=r"5 problem\(s\)") as caught:
        load(write(tmp_path, weights=weights))
    for line in (
        "model/norm/weight: expected a tensor for it, got none",
        "model.layers.1.mlp.up_proj.weight: expected shape (24, 12), got (12, 24)",
        "model.layers.2.mlp.up_proj.weight: expected no such tensor, got one of shape (24, 12)",
        "model.layers.0.mlp.experts: expected no such tensor, got one of shape (3,)",
        "lm_head.weight: expected a dtype of ('F64', 'F32', 'F16', 'BF16'), got I8",
    ):
        assert line in str(caught.value)


def test_broken_directories(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: expected this file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        load(tmp_path)
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load(tmp_path)


def test_nothing_to_load(tmp_path):
    accepted = r"expected one of \['smollm2-135m'\], an existing .gguf file, or a directory"
    with pytest.raises(ValueError, match=accepted + ".*no such path; .*snapshot_download"):
        load(tmp_path / "absent.gguf")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=accepted + ".*another kind of file; sqjax.load reads"):
        load(tmp_path / "model.bin")


@pytest.mark.slow
@pytest.mark.every_case
def test_numpy_ids_and_jit(tmp_path):
    model, params = load(write(tmp_path))
    ids = np.asarray([[3, 4, 5, 6]])
    expected = model.apply(params, ids)
    tolerance = 3e-6 * np.abs(expected).max()
    np.testing.assert_allclose(jax.jit(model.apply)(params, ids), expected, rtol=0, atol=tolerance)


def test_options_that_are_none():
    """Asked directly, because the tests' type checker is before every public function."""
    fine = lambda path, shape: None
    check_options("load", [LLAMA], fine)
    with pytest.raises(ValueError, match=r"load: expected placement to be a function .*got 3"):
        check_options("load", (), 3)
    with pytest.raises(ValueError, match=r"load: expected families to be a list .*got 3"):
        check_options("load", 3, fine)
    with pytest.raises(ValueError, match=r"load: expected families .*got \['llama'\]"):
        check_options("load", ["llama"], fine)


def test_a_model_without_its_parameters(tmp_path):
    write(tmp_path)
    model, _ = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert load_model(tmp_path) == model
    with pytest.raises(ValueError, match=r"absent: expected a directory with config.json, got no"):
        load_model(tmp_path / "absent")


@pytest.mark.slow
def test_quantized_leaves_need_quantized(tmp_path):
    write(tmp_path)
    model, params = load(tmp_path)
    qparams = sq.quantize(params, sq.calibrate(model.apply, params, [IDS]), sq.W8A16)
    assert jax.eval_shape(sq.quantized(model.apply), qparams, IDS).shape[:2] == IDS.shape
    cache = model.init_cache(*IDS.shape)
    for call in (model.apply, lambda *args: model.decode(*args, cache)):
        with pytest.raises(ValueError, match=r"/kernel: expected an array, got a quantized weight"):
            call(qparams, IDS)


def test_ids_that_are_none(tmp_path):
    write(tmp_path)
    model, params = load(tmp_path)
    for ids in ([[1, 2]], "a cat"):
        with pytest.raises(ValueError, match=r"ids: expected an array .* encoded by a tokenizer"):
            check_ids(ids)
    with pytest.raises(ValueError, match=r"prompts\[0\]: .* got a message; .*encode_chat"):
        generate(model, params, [{"role": "user", "content": "Hi"}], 2)
