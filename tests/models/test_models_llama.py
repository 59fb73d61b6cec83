"""The Llama decoder against a float64 model written in numpy, one head at a time; cache; generation."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from slow import slow_but
from tiny_llama import GROUPED, compiled, looking_back, random_ids, random_params
from untyped import untyped

from sqjax.models import Model, greedy
from sqjax.models.config import Norm

ONE_LAYER = replace(GROUPED, num_layers=1)
#: Two layers once; for what a field changes inside a layer one is enough.
CONFIGS = {
    "grouped": GROUPED,
    "one head a group": replace(ONE_LAYER, num_kv_heads=4),
    "one group": replace(ONE_LAYER, num_kv_heads=1),
    "rope_theta": replace(ONE_LAYER, kinds=looking_back(theta=37.0)),
    "narrow heads": replace(ONE_LAYER, head_dim=2),
    "large eps": replace(ONE_LAYER, norm=Norm(eps=0.3)),
    "untied": replace(ONE_LAYER, tie_embeddings=False),
    "biases": replace(ONE_LAYER, attention_bias=True, output_bias=True, mlp_bias=True),
}
each_config = pytest.mark.parametrize(
    "name", slow_but(list(CONFIGS), "grouped", "one head a group", "narrow heads", "biases")
)
IDS = random_ids(2, 11)


@functools.cache
def params_of(config):
    return random_params(Model(config))


@functools.cache
def logits_of(config):
    """Of IDS, without a cache. (Every test of `apply` has ids of this shape, which is compiled once.)"""
    return compiled(config, "apply")(params_of(config), IDS)


def oracle(config, params, ids):
    """The logits in float64 numpy: one token's row, one head and one earlier position at a time."""
    tree = {
        path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(params, sep="/").items()
    }

    def norm(x, name):
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm.eps) * tree[f"{name}/weight"]
        )

    def dense(x, name):
        return x @ tree[f"{name}/kernel"] + tree.get(f"{name}/bias", 0.0)

    def turn(row, position):
        out, half = np.empty_like(row), config.head_dim // 2
        for i in range(half):
            angle = position / config.kinds[0].rope.theta ** (2 * i / config.head_dim)
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


@each_config
@pytest.mark.slow
def test_logits_equal_the_oracle(name):
    config = CONFIGS[name]
    expected, got = oracle(config, params_of(config), IDS), logits_of(config)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_the_oracle_can_tell_the_configurations_apart():
    """So that the test above would fail if, say, rope_theta or the grouping were ignored."""
    params, ids = params_of(ONE_LAYER), IDS[:1]
    base = oracle(ONE_LAYER, params, ids)
    for name in ("rope_theta", "large eps"):
        other = oracle(CONFIGS[name], params, ids)
        assert np.abs(other - base).max() > 1e-3 * np.abs(base).max(), name


def test_tree_has_hugging_face_names():
    unlike = replace(GROUPED, hidden_size=24, intermediate_size=40, num_heads=6)
    shapes = jax.eval_shape(
        Model(replace(unlike, num_layers=1, tie_embeddings=False)).init, jax.random.key(0)
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


@pytest.mark.slow
def test_bfloat16_stays_bfloat16_and_near_float32():
    model = Model(GROUPED)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(GROUPED))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    apply = compiled(GROUPED, "apply")
    got, expected = apply(params, IDS), apply(wide, IDS)
    assert got.dtype == jnp.bfloat16
    cache = model.init_cache(2, 11, jnp.bfloat16)
    assert jax.eval_shape(model.decode, params, IDS, cache)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max()
    )


def test_the_future_does_not_change_the_past():
    before = logits_of(GROUPED)
    after = compiled(GROUPED, "apply")(params_of(GROUPED), IDS.at[:, 6:].set(5))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 0.1


def read_in_pieces(config, pieces):
    """Each piece's last logits beside those without a cache; the cache has room to spare."""
    decode, cache, read = compiled(config, "decode"), Model(config).init_cache(2, 13), 0
    expected = logits_of(config)
    for piece in pieces:
        logits, cache = decode(params_of(config), IDS[:, read : read + piece], cache)
        read += piece
        tolerance = 3e-6 * np.abs(expected).max()
        np.testing.assert_allclose(logits, expected[:, read - 1], rtol=0, atol=tolerance)
    assert cache.length == read


PIECES = [(11,), (1,) * 11, (4, 4, 1, 1, 1)]


@pytest.mark.parametrize("pieces", slow_but(PIECES, PIECES[2]))
@pytest.mark.slow
def test_cached_decode_equals_apply(pieces):
    read_in_pieces(GROUPED, pieces)


@pytest.mark.parametrize("name", slow_but(list(CONFIGS), "biases"))
@pytest.mark.slow
def test_cached_decode_equals_apply_for_every_configuration(name):
    read_in_pieces(CONFIGS[name], (4, 4))


@pytest.mark.slow
def test_greedy_equals_recomputing_every_token():
    model, params, prompt = Model(GROUPED), params_of(GROUPED), IDS[:, :5]
    apply = compiled(GROUPED, "apply")
    # What stands later does not matter, because the model is causal.
    ids = jnp.pad(prompt, ((0, 0), (0, 6)))
    for i in range(5, 11):
        ids = ids.at[:, i].set(apply(params, ids)[:, i - 1].argmax(-1).astype(ids.dtype))
    got = greedy(model, params, prompt, 6)
    np.testing.assert_array_equal(got, ids[:, 5:])
    assert len(np.unique(got)) > 3  # a constant answer would prove little

    size = greedy._cache_size()
    greedy(Model(GROUPED), params, prompt + 1, steps=6)
    greedy(Model(GROUPED, tokenizer=None), random_params(model, seed=5), prompt, 6)
    # By name and by position are two entries of jax's outer cache; a third would be a recompilation.
    assert greedy._cache_size() <= size + 1


@pytest.mark.slow
def test_greedy_of_one_step():
    expected = logits_of(GROUPED)[:, 4].argmax(-1)[:, None]
    got = greedy(Model(GROUPED), params_of(GROUPED), IDS[:, :5], 1)
    np.testing.assert_array_equal(got, expected)


def test_models_are_equal_by_configuration():
    assert Model(GROUPED) == Model(replace(GROUPED))
    assert hash(Model(GROUPED)) == hash(Model(replace(GROUPED)))
    assert Model(GROUPED) != Model(CONFIGS["untied"])


def test_init_dtype_and_keys():
    model = Model(ONE_LAYER)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.bfloat16), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
    # Of one leaf, so that only its draw is compiled.
    one_leaf = jax.jit(lambda key: model.init(key)["model"]["embed_tokens"]["embedding"])
    first, other = one_leaf(jax.random.key(0)), one_leaf(jax.random.key(1))
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, one_leaf(jax.random.key(0)))


def test_an_unknown_token_is_not_silently_another():
    """jax clamps indices by default; the embedding lookup must not."""
    unknown = IDS.at[0, 0].set(GROUPED.vocab_size)
    logits = compiled(GROUPED, "apply")(params_of(GROUPED), unknown)
    assert np.isnan(logits[0]).all()
    np.testing.assert_array_equal(logits[1], logits_of(GROUPED)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads: expected a multiple of num_kv_heads = 3, got 4"),
        ({"head_dim": 7}, "head_dim: expected an even number .*got 7"),
        ({"num_layers": 0}, "num_layers: expected a whole number from 1 to 2147483647, got 0"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GROUPED, **change)


def test_an_impossible_base():
    with pytest.raises(ValueError, match=r"Rope.theta: expected a finite number above 0, got -1.0"):
        looking_back(theta=-1.0)


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
    model, params = Model(GROUPED), params_of(GROUPED)
    with pytest.raises(
        ValueError, match="at least one prompt token and one step, got 3 tokens and 0 steps"
    ):
        greedy(model, params, random_ids(1, 3), 0)
    with pytest.raises(ValueError, match="got 0 tokens and 2 steps"):
        greedy(model, params, random_ids(1, 0), 2)
    with pytest.raises(ValueError, match="at most 64"):
        greedy(model, params, random_ids(1, 60), 5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], r"ids: expected an array \(batch, tokens\), got list"),
        (np.array([1, 2]), r"ids: expected an array \(batch, tokens\), got \(2,\)"),
        (np.zeros((1, 2), np.float32), "ids: expected integers, got float32"),
        (np.zeros((0, 2), np.int32), r"expected at least one, got none: ids of shape \(0, 2\)"),
    ],
)
def test_ids_that_are_none(ids, message):
    model = Model(GROUPED)
    for method in (model.apply, model.decode, model.read):
        cache = () if method == model.apply else (None,)
        with untyped(), pytest.raises(ValueError, match=message):
            method({}, ids, *cache)


@pytest.mark.parametrize("sizes", [(0, 4), (1, 4.0), (1, 0), (True, 4), (1, None)])
def test_a_cache_of_no_size(sizes):
    with untyped(), pytest.raises(ValueError, match=r"(batch|length): expected a whole number"):
        Model(GROUPED).init_cache(*sizes)
