"""The Llama decoder against a float64 model written in numpy, one head at a time; cache; generation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_llama import GROUPED, random_ids, random_params

from sqjax.models import Model, greedy

CONFIGS = {
    "grouped": GROUPED,
    "one head a group": replace(GROUPED, num_kv_heads=6),
    "one group": replace(GROUPED, num_kv_heads=1),
    "rope_theta": replace(GROUPED, rope_theta=37.0),
    "narrow heads": replace(GROUPED, head_dim=2),
    "large eps": replace(GROUPED, rms_norm_eps=0.3),
    "untied": replace(GROUPED, tie_embeddings=False),
    "biases": replace(GROUPED, attention_bias=True, mlp_bias=True),
}


def oracle(config, params, ids):
    """The logits in float64 numpy: one token's row, one head and one earlier position at a time."""
    tree = {
        path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(params, sep="/").items()
    }

    def norm(x, name):
        return (
            x
            / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)
            * tree[f"{name}/weight"]
        )

    def dense(x, name):
        return x @ tree[f"{name}/kernel"] + tree.get(f"{name}/bias", 0.0)

    def turn(row, position):
        out, half = np.empty_like(row), config.head_dim // 2
        for i in range(half):
            angle = position / config.rope_theta ** (2 * i / config.head_dim)
            pair = complex(row[i], row[i + half]) * np.exp(1j * angle)
            out[i], out[i + half] = pair.real, pair.imag
        return out

    def attention(x, name):
        d, group = config.head_dim, config.num_heads // config.num_kv_heads
        q, k, v = (dense(x, f"{name}/{part}_proj") for part in "qkv")
        mixed = np.zeros_like(q)
        for head in range(config.num_heads):
            own, shared = (
                slice(head * d, head * d + d),
                slice(head // group * d, head // group * d + d),
            )
            rows = [turn(k[s, shared], s) for s in range(len(x))]
            for t in range(len(x)):
                scores = np.array([turn(q[t, own], t) @ rows[s] / np.sqrt(d) for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                mixed[t, own] = weights / weights.sum() @ v[: t + 1, shared]
        return dense(mixed, f"{name}/o_proj")

    def mlp(x, name):
        gate = dense(x, f"{name}/gate_proj")
        return dense(gate / (1 + np.exp(-gate)) * dense(x, f"{name}/up_proj"), f"{name}/down_proj")

    def row(tokens):
        x = tree["model/embed_tokens/embedding"][tokens]
        for i in range(config.num_layers):
            layer = f"model/layers/{i}"
            x = x + attention(norm(x, f"{layer}/input_layernorm"), f"{layer}/self_attn")
            x = x + mlp(norm(x, f"{layer}/post_attention_layernorm"), f"{layer}/mlp")
        head = (
            tree["model/embed_tokens/embedding"].T
            if config.tie_embeddings
            else tree["lm_head/kernel"]
        )
        return norm(x, "model/norm") @ head

    return np.stack([row(tokens) for tokens in np.asarray(ids)])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_the_oracle(config):
    model = Model(config)
    params, ids = random_params(model), random_ids(2, 11)
    expected = oracle(config, params, ids)
    got = jax.jit(model.apply)(params, ids)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_the_oracle_can_tell_the_configurations_apart():
    """So that the test above would fail if, say, rope_theta or the grouping were ignored."""
    model = Model(GROUPED)
    params, ids = random_params(model), random_ids(1, 11)
    base = oracle(GROUPED, params, ids)
    for name in ("rope_theta", "large eps"):
        assert (
            np.abs(oracle(CONFIGS[name], params, ids) - base).max() > 1e-3 * np.abs(base).max()
        ), name


def test_tree_has_hugging_face_names():
    shapes = jax.eval_shape(
        Model(replace(GROUPED, num_layers=1, tie_embeddings=False)).init, jax.random.key(0)
    )
    got = {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}
    assert got == {
        "model/embed_tokens/embedding": (61, 24),
        "model/layers/0/self_attn/q_proj/kernel": (24, 48),
        "model/layers/0/self_attn/k_proj/kernel": (24, 16),
        "model/layers/0/self_attn/v_proj/kernel": (24, 16),
        "model/layers/0/self_attn/o_proj/kernel": (48, 24),
        "model/layers/0/mlp/gate_proj/kernel": (24, 40),
        "model/layers/0/mlp/up_proj/kernel": (24, 40),
        "model/layers/0/mlp/down_proj/kernel": (40, 24),
        "model/layers/0/input_layernorm/weight": (24,),
        "model/layers/0/post_attention_layernorm/weight": (24,),
        "model/norm/weight": (24,),
        "lm_head/kernel": (24, 61),
    }


def test_bfloat16_stays_bfloat16_and_near_float32():
    model = Model(GROUPED)
    ids = random_ids(2, 9)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(model))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    apply = jax.jit(model.apply)
    got, expected = apply(params, ids), apply(wide, ids)
    assert got.dtype == jnp.bfloat16
    cache = model.init_cache(2, 9, jnp.bfloat16)
    assert jax.eval_shape(model.decode, params, ids, cache)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max()
    )


def test_the_future_does_not_change_the_past():
    model = Model(GROUPED)
    params, ids = random_params(model), random_ids(1, 10)
    other = ids.at[:, 6:].set(5)
    apply = jax.jit(model.apply)
    a, b = apply(params, ids), apply(params, other)
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert np.abs(a[:, 6:] - b[:, 6:]).max() > 0.1


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        *((name, (7, 1, 1)) for name in CONFIGS),
        *(("grouped", p) for p in [(9,), (1,) * 9, (3, 4, 2)]),
    ],
)
def test_cached_decode_equals_apply(name, pieces):
    model = Model(CONFIGS[name])
    params, ids = random_params(model), random_ids(2, 9)
    expected = jax.jit(model.apply)(params, ids)
    decode, cache, read = jax.jit(model.decode), model.init_cache(2, 13), 0
    for piece in pieces:
        logits, cache = decode(params, ids[:, read : read + piece], cache)
        read += piece
        tolerance = 3e-6 * np.abs(expected).max()
        np.testing.assert_allclose(logits, expected[:, read - 1], rtol=0, atol=tolerance)
    assert cache.length == 9


def test_greedy_equals_recomputing_every_token():
    model = Model(GROUPED)
    params, prompt = random_params(model), random_ids(3, 5)
    apply = jax.jit(model.apply)
    ids = jnp.pad(
        prompt, ((0, 0), (0, 12))
    )  # what stands later does not matter: the model is causal
    for i in range(5, 17):
        ids = ids.at[:, i].set(apply(params, ids)[:, i - 1].argmax(-1).astype(ids.dtype))
    got = greedy(model, params, prompt, 12)
    np.testing.assert_array_equal(got, ids[:, 5:])
    assert len(np.unique(got)) > 3  # a constant answer would prove little
    np.testing.assert_array_equal(greedy(model, params, prompt, 1), ids[:, 5:6])


def test_greedy_compiles_once_for_equal_models():
    params, prompt = random_params(Model(GROUPED)), random_ids(2, 4, seed=7)
    greedy(Model(GROUPED), params, prompt, 3)
    size = greedy._cache_size()
    greedy(Model(GROUPED), params, prompt + 1, steps=3)
    greedy(Model(GROUPED, tokenizer=None), random_params(Model(GROUPED), seed=5), prompt, 3)
    # By name and by position are two entries of jax's outer cache; a third would be a recompilation.
    assert greedy._cache_size() <= size + 1


def test_models_are_equal_by_configuration():
    assert Model(GROUPED) == Model(replace(GROUPED))
    assert hash(Model(GROUPED)) == hash(Model(replace(GROUPED)))
    assert Model(GROUPED) != Model(CONFIGS["untied"])


def test_init_dtype_and_keys():
    model = Model(GROUPED)
    init = jax.jit(model.init, static_argnums=1)
    a, b = init(jax.random.key(0), jnp.bfloat16), init(jax.random.key(1), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(a)} == {jnp.dtype(jnp.bfloat16)}
    assert not np.array_equal(
        a["model"]["embed_tokens"]["embedding"], b["model"]["embed_tokens"]["embedding"]
    )


def test_an_unknown_token_is_not_silently_another():
    """jax clamps indices by default; the embedding lookup must not."""
    model = Model(GROUPED)
    assert np.isnan(model.apply(random_params(model), jnp.asarray([[GROUPED.vocab_size]]))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "num_heads: expected a multiple of num_kv_heads = 4, got 6"),
        ({"head_dim": 7}, "head_dim: expected an even number, got 7"),
        ({"num_layers": 0}, "num_layers: expected a positive number, got 0"),
        ({"rope_theta": -1.0}, "rope_theta: expected a positive number, got -1.0"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GROUPED, **change)


def test_too_many_tokens():
    model = Model(GROUPED)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"at most 64 \(config\.max_length\), got 65"):
        jax.eval_shape(model.apply, params, random_ids(1, 65))
    with pytest.raises(ValueError, match="at most 64"):
        model.init_cache(1, 65)
    with pytest.raises(ValueError, match="room for 5 tokens, got 4"):
        jax.eval_shape(model.decode, params, random_ids(1, 5), model.init_cache(1, 4))
    with pytest.raises(ValueError, match="tokens: expected at least one, got none"):
        model.apply({}, random_ids(1, 0))
    with pytest.raises(ValueError, match="tokens: expected at least one, got none"):
        model.decode({}, random_ids(1, 0), model.init_cache(1, 4))


def test_greedy_refuses_nothing_to_do_and_too_much():
    model = Model(GROUPED)
    params = random_params(model)
    with pytest.raises(
        ValueError, match="at least one prompt token and one step, got 3 tokens and 0 steps"
    ):
        greedy(model, params, random_ids(1, 3), 0)
    with pytest.raises(ValueError, match="got 0 tokens and 2 steps"):
        greedy(model, params, random_ids(1, 0), 2)
    with pytest.raises(ValueError, match="at most 64"):
        greedy(model, params, random_ids(1, 60), 5)
