"""Every scheme in every dtype: how far from float64, and what rows of NaN do to themselves and others.

20 rows, because XLA:CPU loses NaN in maxima that it computes in vectors: from 16 rows on.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq

BAD = 3
SCHEMES = {
    "O1": sq.W8A8,
    "O2": sq.W8A8_O2,
    "O3": sq.W8A8_O3,
    "outliers": sq.W8A8_OUTLIERS.replace(outliers=1.0),
    "smoothed": sq.W8A8.replace(smoothing=0.5),
    "fp8": sq.FP8,
    "W8A16": sq.W8A16,
    "W4A16": sq.W4A16_G64,
    "W4A8": sq.W4A8.replace(weight=sq.W4A8.weight.replace(group_size=16)),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def every_scheme(dtype):
    """(a function that multiplies x with one weight for each scheme, its quantized parameters)."""
    params = {n: jnp.asarray(normal(64, 24, seed=i), dtype) for i, n in enumerate(SCHEMES)}

    def fn(p, x):
        return {name: x @ p[name] for name in SCHEMES}

    stats = sq.calibrate(fn, params, [jnp.asarray(normal(20, 64), dtype)])
    return jax.jit(sq.quantized(fn)), sq.quantize(params, stats, SCHEMES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.slow
def test_every_scheme_is_near_float64(dtype):
    """The largest error of an output, of outputs of size 8."""
    run, qparams = every_scheme(dtype)
    x = normal(20, 64)
    got = run(qparams, jnp.asarray(x, dtype))
    allowed = {"fp8": 1.5, "W4A16": 2.5, "W4A8": 2.5}
    for i, name in enumerate(SCHEMES):
        assert got[name].dtype == dtype
        exact = x.astype(np.float64) @ normal(64, 24, seed=i)
        error = np.abs(np.asarray(got[name], np.float64) - exact).max()
        assert error < allowed.get(name, 0.45), (name, error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_row_of_nan_is_nan_and_the_others_are_as_without_it(dtype):
    run, qparams = every_scheme(dtype)
    x = normal(20, 64)
    without, one_nan = x.copy(), x.copy()
    without[BAD] = 0.0
    one_nan[BAD, 5] = np.nan
    expected = run(qparams, jnp.asarray(without, dtype))
    got = run(qparams, jnp.asarray(one_nan, dtype))
    for name in SCHEMES:
        rows = np.asarray(got[name], np.float32)
        assert np.isnan(rows[BAD]).all(), name
        others = np.delete(np.asarray(expected[name], np.float32), BAD, axis=0)
        np.testing.assert_array_equal(np.delete(rows, BAD, axis=0), others, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_an_infinite_row_does_not_touch_the_others(dtype):
    """O2 shares one scale among all rows, but an infinite one would make it infinite."""
    run, qparams = every_scheme(dtype)
    x = normal(20, 64)
    infinite = x.copy()
    infinite[BAD, 5] = np.inf
    expected = np.asarray(run(qparams, jnp.asarray(x, dtype))["O2"], np.float32)
    got = np.asarray(run(qparams, jnp.asarray(infinite, dtype))["O2"], np.float32)
    assert not np.isfinite(got[BAD]).any()
    assert np.abs(np.delete(got - expected, BAD, axis=0)).max() < 1.0


@pytest.mark.slow
def test_experts_keep_nan_in_the_row():
    fn = lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes)
    params, x = {"w": jnp.asarray(normal(2, 32, 8))}, jnp.asarray(normal(20, 32))
    sizes = jnp.array([9, 11], jnp.int32)
    stats = sq.calibrate(fn, params, [(x, sizes)])
    bad = x.at[BAD, 0].set(jnp.nan)
    for scheme in (sq.W8A8, sq.W8A8_O2, sq.W8A8_O3):
        qparams = sq.quantize(params, stats, scheme)
        got = np.asarray(jax.jit(sq.quantized(fn))(qparams, bad, sizes))
        assert np.isnan(got[BAD]).all()
        assert np.isfinite(np.delete(got, BAD, axis=0)).all()


def attention(p, q, k, v, mask):
    scores = jnp.einsum("bqd,bkd->bqk", q * p["one"], k) / 4
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bqk,bkd->bqd", weights, v)


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_int8_attention_keeps_a_query_of_nan(granularity):
    q, k, v = (jnp.asarray(normal(1, 20, 16, seed=i)) for i in range(3))
    mask = jnp.ones((1, 20, 20), bool)
    bad = q.at[0, BAD, 2].set(jnp.nan)
    run = jax.jit(sq.int8_attention(attention, granularity))
    got = np.asarray(run({"one": jnp.float32(1)}, bad, k, v, mask))[0]
    exact = np.asarray(attention({"one": jnp.float32(1)}, q, k, v, mask))[0]
    assert np.isnan(got[BAD]).all()
    others = np.delete(got, BAD, axis=0)
    assert np.abs(others - np.delete(exact, BAD, axis=0)).max() < 0.1


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.slow
def test_values_that_no_query_reads_do_not_make_the_scales_coarser(granularity):
    q, k, v = (jnp.asarray(normal(2, 20, 16, seed=i)) for i in range(3))
    read = jnp.arange(20, dtype=jnp.int32) >= 4
    mask = jnp.broadcast_to(read, (2, 20, 20))
    large = jnp.where(read[None, :, None], v, 100 * v)
    run = jax.jit(sq.int8_attention(attention, granularity))
    one = {"one": jnp.float32(1)}
    exact = np.asarray(attention(one, q, k, v, mask))
    assert np.abs(np.asarray(run(one, q, k, large, mask)) - exact).max() < 0.03


@pytest.mark.slow
def test_a_cache_keeps_nan():
    """A key of nan in one slot: its score is nan, the other slots' are as before."""

    def fn(p, cache, key, query):
        keys = jax.lax.dynamic_update_slice(cache["k"], key, (0, 0, 0))
        return jnp.einsum("bqd,bkd->bqk", query * p["one"], keys), {"k": keys}

    key, query = jnp.asarray(normal(1, 20, 16)), jnp.asarray(normal(1, 20, 16, seed=1))
    cache = sq.quantize_cache({"k": jnp.zeros((1, 20, 16))})
    run = jax.jit(sq.quantized(fn))
    one = {"one": jnp.float32(1)}
    bad_key, bad_query = key.at[0, BAD, 1].set(jnp.nan), query.at[0, BAD, 1].set(jnp.nan)
    expected = np.asarray(run(one, cache, key, query)[0])[0]
    of_key = np.asarray(run(one, cache, bad_key, query)[0])[0]
    of_query = np.asarray(run(one, cache, key, bad_query)[0])[0]
    assert np.isnan(of_key[:, BAD]).all()
    assert np.isnan(of_query[BAD]).all()
    np.testing.assert_array_equal(np.delete(of_key, BAD, axis=1), np.delete(expected, BAD, axis=1))
    np.testing.assert_array_equal(
        np.delete(of_query, BAD, axis=0), np.delete(expected, BAD, axis=0)
    )
