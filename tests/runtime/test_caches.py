"""Quantized arguments of functions that are not ours: a key/value cache as int8."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax_transformers import flax_transformers
from jax import lax

import sqjax as sq

BATCH, SLOTS, HEADS, QUERIES, WIDTH = 2, 10, 2, 4, 16


def params(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"q": QUERIES * WIDTH, "k": HEADS * WIDTH, "v": HEADS * WIDTH}
    return {
        name: jnp.asarray(rng.normal(size=(24, n)) / 24**0.5, jnp.float32)
        for name, n in sizes.items()
    }


def empty():
    return {name: jnp.zeros((BATCH, SLOTS, HEADS, WIDTH)) for name in ("key", "value")} | {
        "index": jnp.int32(0)
    }


def attention(p, x, cache, repeat=True):
    """One layer of attention with grouped queries that writes to a cache, and reads all of it."""
    tokens = x.shape[1]
    q, k, v = (
        jnp.einsum("btc,cd->btd", x, p[n]).reshape(BATCH, tokens, -1, WIDTH)
        for n in ("q", "k", "v")
    )
    start = cache["index"]
    zero = jnp.zeros_like(start)
    cache = {
        "key": lax.dynamic_update_slice(cache["key"], k, (zero, start, zero, zero)),
        "value": lax.dynamic_update_slice(cache["value"], v, (zero, start, zero, zero)),
        "index": start + tokens,
    }
    seen = (start + jnp.arange(tokens))[:, None] >= jnp.arange(SLOTS)[None, :]
    if repeat:
        keys, values = (jnp.repeat(cache[n], QUERIES // HEADS, axis=2) for n in ("key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, keys) / WIDTH**0.5
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -1e9))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(BATCH, tokens, -1), cache
    grouped = q.reshape(BATCH, tokens, HEADS, QUERIES // HEADS, WIDTH)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, cache["key"]) / WIDTH**0.5
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -1e9))
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, cache["value"]).reshape(
        BATCH, tokens, -1
    ), cache


def rounded(x, axis=-1):
    """x on the grid of int8 with a scale along an axis, in float64."""
    x = np.asarray(x, np.float64)
    scale = np.max(np.abs(x), axis=axis, keepdims=True) / 127
    return np.rint(x / np.where(scale == 0, 1, scale)) * scale


def reference(p, xs):
    """The last output of `attention` over all the tokens, keys, values and queries rounded, and weights times the
    values' scales too, in numpy."""
    x = np.concatenate([np.asarray(x, np.float64) for x in xs], axis=1)
    heads = {n: (x @ np.asarray(p[n], np.float64)).reshape(BATCH, x.shape[1], -1, WIDTH) for n in p}
    q, k = rounded(heads["q"][:, -1:]), np.repeat(rounded(heads["k"]), 2, axis=2)
    v = np.repeat(heads["v"], 2, axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / WIDTH**0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    scale = np.max(np.abs(v), axis=-1).transpose(0, 2, 1)[:, :, None, :] / 127
    codes = np.rint(v / (np.max(np.abs(v), axis=-1, keepdims=True) / 127))
    return np.einsum("bhqk,bkhd->bqhd", rounded(weights * scale), codes).reshape(BATCH, 1, -1)


def inputs(*lengths):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=(BATCH, n, 24)), jnp.float32) for n in lengths]


@pytest.mark.parametrize("repeat", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_is_the_attention_of_rounded_keys_and_values(repeat):
    p, xs = params(), inputs(4, 1, 1)
    fn = lambda p, x, cache: attention(p, x, cache, repeat)
    run = jax.jit(sq.quantized(fn))
    exact, cache, held = None, empty(), sq.quantize_cache(empty())
    for x in xs:
        exact, cache = fn(p, x, cache)
        out, held = run(p, x, held)
    expected = reference(p, xs)
    np.testing.assert_allclose(
        out, expected, atol=0.01 * np.abs(expected).max()
    )  # roundings at ties
    assert 1e-5 < np.abs(out - exact).max() / np.abs(exact).max() < 0.02
    assert int(held["index"]) == 6
    for name in ("key", "value"):
        assert isinstance(held[name], sq.QTensor)
        np.testing.assert_allclose(sq.dequantize(held[name]), rounded(cache[name]), atol=1e-5)


@pytest.mark.slow
def test_a_step_compiles_once_and_holds_no_float_copy_of_the_cache():
    fn, p = lambda p, x, cache: attention(p, x, cache, repeat=False), params()
    run = jax.jit(sq.quantized(fn))
    held = sq.quantize_cache(empty())
    program = jaxprs.of(run, p, inputs(1)[0], held)
    dots = [dot.dtypes for dot in jaxprs.dots(program)]
    assert dots.count(jaxprs.INT8_DOT) == 2
    assert jaxprs.largest_float(program) < BATCH * SLOTS * HEADS * WIDTH * 4
    assert not [
        shape for _, shape in jaxprs.widened(program, larger_than=BATCH * SLOTS * HEADS * WIDTH - 1)
    ]
    for x in inputs(1, 1):
        _, held = run(p, x, held)
    assert run._cache_size() == 1
    assert held["key"].nbytes == BATCH * SLOTS * HEADS * (WIDTH + 4)


@pytest.mark.slow
def test_composes_with_quantized_weights():
    p, xs = params(), inputs(4, 1)
    fn = lambda p, x, cache: attention(p, x, cache)
    qparams = sq.quantize(p, sq.calibrate(fn, p, [(xs[0], empty())]))
    run, exact_cache, held = jax.jit(sq.quantized(fn)), empty(), sq.quantize_cache(empty())
    for x in xs:
        exact, exact_cache = fn(p, x, exact_cache)
        out, held = run(qparams, x, held)
    assert np.abs(out - exact).max() < 0.05 * np.abs(exact).max()
    program = jaxprs.of(run, qparams, xs[1], held)
    assert {dot.dtypes for dot in jaxprs.dots(program)} == {jaxprs.INT8_DOT}


@pytest.mark.slow
def test_is_carried_by_a_loop_and_handed_out_by_a_scan():
    p, [x] = params(), inputs(1)
    layers = jax.tree.map(lambda *a: jnp.stack(a), params(1), params(2))

    def through_layers(layers, x, caches):
        def layer(total, this):
            out, cache = attention(this[0], x, this[1], repeat=False)
            return total + out, cache

        return lax.scan(layer, jnp.zeros((BATCH, 1, QUERIES * WIDTH)), (layers, caches))

    def looped(p, x, cache):
        return lax.fori_loop(0, 3, lambda i, c: attention(p, x * (i + 1.0), c)[1], cache)

    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), empty())
    exact, _ = through_layers(layers, x, stacked)
    out, held = jax.jit(sq.quantized(through_layers))(layers, x, sq.quantize_cache(stacked))
    assert 0 < np.abs(out - exact).max() < 0.02 * np.abs(exact).max()
    assert held["key"].scale.shape == (2, BATCH, SLOTS, HEADS, 1)
    cache, held = (
        looped(p, x, empty()),
        jax.jit(sq.quantized(looped))(p, x, sq.quantize_cache(empty())),
    )
    assert int(held["index"]) == 3
    np.testing.assert_allclose(sq.dequantize(held["key"]), rounded(cache["key"]), atol=1e-5)


@pytest.mark.slow
def test_a_mask_and_parts_of_a_cache_pass():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 6, 8)), jnp.float32)
    held, y = sq.quantize_cache({"c": x}), jnp.ones((3, 8))
    mask = (jnp.arange(6) < 4)[None, :, None] & jnp.ones(x.shape, bool)

    def fn(p, cache, start):
        c = jnp.where(mask, cache["c"], 0.0)
        c = (
            lax.dynamic_slice(c, (start, 0, 0), (2, 6, 8))[:, 1:5]
            .transpose(1, 0, 2)
            .reshape(4, 2, 2, 4)
        )
        return jnp.einsum("qd,tcd->qtc", y, c.reshape(4, 2, 8))

    expected = fn({}, {"c": jnp.asarray(rounded(x), jnp.float32)}, 1)
    for run in (sq.quantized(fn), jax.jit(sq.quantized(fn))):
        np.testing.assert_allclose(run({}, held, 1), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn])
@pytest.mark.slow
def test_a_mask_may_fill_with_zeros_only(jit):
    held = sq.quantize_cache({"c": jnp.ones((4, 8))})

    def fn(p, cache, fill):
        return jnp.where(jnp.arange(4)[:, None] < 2, cache["c"], fill) @ jnp.ones((8, 1))

    np.testing.assert_allclose(
        jit(sq.quantized(lambda p, c: fn(p, c, 0.0)))({}, held)[:, 0], [8, 8, 0, 0], rtol=1e-6
    )
    for fill in (1.0, jnp.float32(-2)):
        with pytest.raises(ValueError, match="`select_n` at"):
            jit(sq.quantized(lambda p, c, fill=fill: fn(p, c, fill)))({}, held)


@pytest.mark.parametrize("zeros_are", ["an argument", "made in a call"])
def test_a_mask_in_a_call_is_told_of_zeros_made_outside(zeros_are):
    """`jnp.where` is a call, and what it is given may have been filled before."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)

    @jax.jit
    def masked(cache, zeros):
        if zeros_are == "made in a call":
            zeros = jnp.zeros_like(zeros)
        return jnp.where(jnp.arange(4)[:, None] < 2, cache, zeros)

    def fn(p, cache):
        return masked(cache["c"], jnp.zeros((4, 8))) @ jnp.ones((8, 1))

    got = jax.jit(sq.quantized(fn))({}, sq.quantize_cache({"c": x}))
    expected = rounded(x).sum(-1) * (np.arange(4) < 2)
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-5)


@pytest.mark.slow
def test_tokens_scattered_into_a_cache_are_quantized():
    """cache.at[rows, slots].set(new): every row writes to a slot of its own."""
    rng = np.random.default_rng(0)
    before, new = rng.normal(size=(3, 5, 2, 8)), rng.normal(size=(3, 2, 8))
    rows, slots = np.arange(3), np.array([4, 0, 2])

    def fn(p, cache, new):
        keys = cache["k"].at[rows, slots].set(new)
        return jnp.einsum("bshd,hd->bsh", keys, jnp.ones((2, 8))), {"k": keys}

    held = sq.quantize_cache({"k": jnp.asarray(before, jnp.float32)})
    sums, after = jax.jit(sq.quantized(fn))({}, held, jnp.asarray(new, jnp.float32))
    expected = rounded(before)
    expected[rows, slots] = rounded(new)
    assert after["k"].values.dtype == jnp.int8
    np.testing.assert_allclose(sq.dequantize(after["k"]), expected, atol=1e-5)
    np.testing.assert_allclose(sums, expected.sum(-1), atol=0.05)


def test_a_scatter_of_parts_of_what_shares_a_scale_is_refused():
    held = sq.quantize_cache({"k": jnp.zeros((3, 8))})
    for write in (lambda k: k.at[:, 2].set(1.0), lambda k: k.at[0, :4].set(jnp.ones(4))):
        with pytest.raises(ValueError, match=r"^0/0/k: a quantized argument, but `"):
            sq.quantized(lambda p, c, write=write: write(c["k"]))({}, held)


def test_a_quantized_weight_written_into_a_cache_is_named():
    params, x = {"w": jnp.ones((4, 8))}, jnp.ones((2, 4))
    stats = sq.calibrate(lambda p, x: x @ p["w"], params, [x])
    held = sq.quantize_cache({"k": jnp.zeros((4, 8))})
    fn = lambda p, c: lax.dynamic_update_slice(c["k"], p["w"], (0, 0))
    with pytest.raises(ValueError, match=r"^w: quantized, but `dynamic_update_slice` at"):
        sq.quantized(fn)(sq.quantize(params, stats), held)


@pytest.mark.slow
def test_what_has_no_rule_is_refused_with_its_name():
    held = sq.quantize_cache({"key": jnp.ones((2, 4)), "n": jnp.int32(3)})
    with pytest.raises(
        ValueError, match=r"key: a quantized argument, but `exp` at .*test_caches.py.* in float"
    ):
        sq.quantized(lambda p, c: jnp.exp(c["key"]))({}, held)
    grouped = sq.QTensor.quantize(jnp.ones((2, 4)), (-1,), 2)
    with pytest.raises(ValueError, match=r"key: expected an int8 array with symmetric scales"):
        sq.quantized(lambda p, c: c["key"])({}, {"key": grouped})
    with pytest.raises(ValueError, match="values must be int8, got float32: was the tree cast"):
        sq.quantized(lambda p, c: c["key"])({}, jax.tree.map(lambda x: x.astype(jnp.float32), held))


def test_only_float_arrays_of_that_name_are_quantized():
    cache = {
        "key": jnp.ones((2, 4)),
        "mask": jnp.ones((2, 4), bool),
        "scale": jnp.ones(3),
        "value": jnp.ones((2, 4)),
    }
    cache["index"] = 0
    kinds = {name: type(x) for name, x in sq.quantize_cache(cache, "key").items()}
    assert [name for name, kind in kinds.items() if kind is sq.QTensor] == ["key"]
    assert [name for name, x in sq.quantize_cache(cache).items() if isinstance(x, sq.QTensor)] == [
        "key",
        "value",
    ]
    with pytest.raises(ValueError, match=r"quantize_cache pattern .*kee"):
        sq.quantize_cache(cache, "kee")


@pytest.mark.slow
@pytest.mark.huggingface
@pytest.mark.every_case
def test_a_hugging_face_llama_decodes_with_an_int8_cache():
    hf = flax_transformers()

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    config = hf.LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model, mask = hf.FlaxLlamaForCausalLM(config, seed=0), jnp.ones((2, 12), jnp.int32)

    def fn(params, ids, past, positions):
        out = model(
            ids, params=params, past_key_values=past, attention_mask=mask, position_ids=positions
        )
        return out.logits, out.past_key_values

    run, ids = (
        jax.jit(sq.quantized(fn)),
        jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 8))),
    )
    past = model.init_cache(2, 12)
    held = sq.quantize_cache(past, "cached")
    for cut in (slice(0, 6), slice(6, 7), slice(7, 8)):
        positions = jnp.broadcast_to(jnp.arange(8)[cut], (2, len(range(8)[cut])))
        exact, past = run(model.params, ids[:, cut], past, positions)
        logits, held = run(model.params, ids[:, cut], held, positions)
        assert 0 < np.abs(logits - exact).max() < 0.01 * np.abs(exact).max()
    quantized = [
        x
        for x in jax.tree.leaves(held, is_leaf=lambda x: isinstance(x, sq.QTensor))
        if isinstance(x, sq.QTensor)
    ]
    assert len(quantized) == 4


def test_a_filled_cache_loses_what_one_written_slot_by_slot_does():
    """Also with one large key channel: both give every token and head a scale of its own."""
    keys = jax.random.normal(jax.random.key(5), (1, 6, 2, 8)).at[..., 3].multiply(20.0)
    at_once = sq.quantize_cache({"key": keys})["key"]

    @jax.jit
    @sq.quantized
    def put(params, cache, new, slot):
        return jax.lax.dynamic_update_slice(cache, new, (0, slot, 0, 0))

    written = sq.quantize_cache(jnp.zeros_like(keys))
    for slot in range(6):
        written = put({}, written, keys[:, slot : slot + 1], slot)
    np.testing.assert_array_equal(written.values, at_once.values)
    np.testing.assert_array_equal(written.scale, at_once.scale)
