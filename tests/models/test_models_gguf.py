"""GGUF files written with the `gguf` package and read back; everything that must be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sqjax.models import load

gguf = pytest.importorskip("gguf")
gguf_files = pytest.importorskip("gguf_files")
METADATA, tensors, write = gguf_files.METADATA, gguf_files.tensors, gguf_files.write


def leaf(params, i, name):
    return flatten_dict(params, sep="/")[f"model/layers/{i}/{name}/kernel"]


@pytest.mark.slow
def test_round_trip(tmp_path):
    model, params = load(write(tmp_path / "model.gguf"))
    config, weights = model.config, tensors()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (31, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (
        2,
        4,
        2,
        8,
    )
    assert (config.kinds[0].rope.theta, config.max_length, config.tie_embeddings) == (
        5000.0,
        128,
        False,
    )
    assert model.tokenizer is None
    names = {
        "attn_q": "self_attn/q_proj",
        "attn_k": "self_attn/k_proj",
        "attn_v": "self_attn/v_proj",
    }
    names |= {"attn_output": "self_attn/o_proj"} | {
        f"ffn_{n}": f"mlp/{n}_proj" for n in ("gate", "up", "down")
    }
    for i in range(2):
        for theirs, ours in names.items():
            np.testing.assert_array_equal(
                leaf(params, i, ours), weights[f"blk.{i}.{theirs}.weight"].T
            )
        norms = params["model"]["layers"][str(i)]
        np.testing.assert_array_equal(
            norms["input_layernorm"]["weight"], weights[f"blk.{i}.attn_norm.weight"]
        )
        np.testing.assert_array_equal(
            norms["post_attention_layernorm"]["weight"], weights[f"blk.{i}.ffn_norm.weight"]
        )
    np.testing.assert_array_equal(
        params["model"]["embed_tokens"]["embedding"], weights["token_embd.weight"]
    )
    np.testing.assert_array_equal(params["model"]["norm"]["weight"], weights["output_norm.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], weights["output.weight"].T)
    assert jnp.isfinite(jax.jit(model.apply)(params, jnp.asarray([[1, 2]]))).all()


def test_no_output_tensor_means_tied_and_dtype_is_kept(tmp_path):
    model, params = load(write(tmp_path / "model.gguf", tensors(tied=True)), dtype=jnp.bfloat16)
    assert model.config.tie_embeddings
    assert "lm_head" not in params
    assert leaf(params, 0, "mlp/up_proj").dtype == jnp.bfloat16


def test_quantized_tensors_are_dequantized(tmp_path):
    name = "blk.1.attn_q.weight"
    _, params = load(write(tmp_path / "model.gguf", quantized=[name]))
    original = tensors()[name].T
    error = np.abs(leaf(params, 1, "self_attn/q_proj") - original).max()
    assert 0 < error < np.abs(original).max() / 127


def test_head_size_from_the_hidden_size(tmp_path):
    keys = (
        "llama.attention.key_length",
        "llama.attention.value_length",
        "llama.rope.dimension_count",
    )
    metadata = {key: value for key, value in METADATA.items() if key not in keys}
    metadata |= {"llama.attention.head_count": 8, "llama.rope.scaling.type": "none"}
    weights = tensors()
    for i in range(2):
        weights |= {
            f"blk.{i}.attn_q.weight": np.ones((64, 64), np.float32),
            f"blk.{i}.attn_output.weight": np.ones((64, 64), np.float32),
        }
    model, _ = load(write(tmp_path / "model.gguf", weights, metadata))
    assert model.config.head_dim == 8


def test_biases(tmp_path):
    weights, rng = tensors(), np.random.default_rng(1)
    for i in range(2):
        for part, size in (("q", 32), ("k", 16), ("v", 16), ("output", 64)):
            weights[f"blk.{i}.attn_{part}.bias"] = rng.normal(size=size).astype(np.float32)
    _, params = load(write(tmp_path / "model.gguf", weights))
    got = params["model"]["layers"]["1"]["self_attn"]["q_proj"]["bias"]
    np.testing.assert_array_equal(got, weights["blk.1.attn_q.bias"])


def test_every_tensor_problem_in_one_error(tmp_path):
    weights = tensors()
    del weights["blk.1.ffn_up.weight"]
    weights["blk.0.ffn_down.weight"] = weights["blk.0.ffn_down.weight"].T.copy()
    weights["rope_factors.weight"] = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"model.gguf does not hold .* 3 problem\(s\)") as caught:
        load(write(tmp_path / "model.gguf", weights))
    for line in (
        "model/layers/1/mlp/up_proj/kernel: expected a tensor for it, got none",
        "blk.0.ffn_down.weight: expected shape (64, 96), got (96, 64)",
        "rope_factors.weight: expected no such tensor, got one of shape (4,)",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"llama.rope.scaling.type": "yarn"},
            "llama.rope.scaling.factor: expected a finite number above 0, got none",
        ),
        (
            {"llama.expert_count": 8},
            "llama.expert_used_count: expected a whole number from 1 to .*, got none",
        ),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5: expected no such key"),
        ({"llama.rope.dimension_count": 4}, "dimension_count: expected the head size 8, got 4"),
        ({"llama.attention.value_length": 16}, "value_length: expected the head size 8, got 16"),
    ],
)
def test_metadata_that_would_be_computed_wrongly(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "model.gguf", metadata=METADATA | change))


def test_incomplete_metadata_and_other_architectures(tmp_path):
    metadata = {key: value for key, value in METADATA.items() if "length" not in key}
    with pytest.raises(ValueError, match=r"3 problem\(s\)") as caught:
        load(write(tmp_path / "model.gguf", metadata=metadata))
    assert "llama.feed_forward_length: expected a whole number from 1 to" in str(caught.value)
    with pytest.raises(ValueError, match=r"expected general\.architecture to be .*got 'bert'"):
        load(write(tmp_path / "other.gguf", architecture="bert"))


@pytest.mark.parametrize("size", [0, 3, 40, 5000])
def test_damaged_files(tmp_path, size):
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.gguf: expected a GGUF file"):
        load(path)


def test_a_file_of_another_format(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK" * 500)
    with pytest.raises(ValueError, match=r"model\.gguf: expected a GGUF file"):
        load(tmp_path / "model.gguf")
