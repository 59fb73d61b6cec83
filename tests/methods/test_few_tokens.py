"""Channels, experts and sites of which calibration saw little or nothing."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sqjax as sq
from sqjax.numerics.smoothing import believable


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def error(fn, params, qparams, x, part=slice(None)):
    """The largest error of the quantized function, beside the float function's largest value."""
    expected = fn(params, x)[part]
    got = jax.jit(sq.quantized(fn))(qparams, x)[part]
    return float(jnp.abs(got - expected).max() / jnp.abs(expected).max())


# One matrix ---------------------------------------------------------------------------------------

DENSE = {"gain": np.ones(64, np.float32), "w": normal(1, 64, 128)}
X = normal(0, 64, 64)


def dense(p, x):
    return (x * p["gain"][None]) @ p["w"]


@pytest.mark.parametrize("alpha", [0.5, 0.85])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e-3])
@pytest.mark.slow
def test_a_channel_that_was_nearly_dead_may_come_alive(size, alpha):
    qparams = sq.smoothquant(dense, DENSE, [X.at[:, 5].mul(size)], alpha)
    assert error(dense, DENSE, qparams, X) < 0.02


@pytest.mark.slow
def test_channels_within_64th_of_the_median_are_as_the_authors_have_them():
    ranges = np.geomspace(1 / 50, 1000, 33).astype(np.float32) * np.float32(3)
    ranges[:8] = np.linspace(0.3, 3.0, 8)
    np.testing.assert_array_equal(believable(jnp.asarray(ranges), 0), ranges)
    layers = jnp.array([[1.0, 1.0, 1e-3], [1e-3, 1e-3, 1e-3]])
    np.testing.assert_array_equal(
        believable(layers, 1), np.float32([[1, 1, 1], [1e-3, 1e-3, 1e-3]])
    )


@pytest.mark.parametrize(
    ("x", "warned", "refused"),
    [
        (X[:0], "no token reached w", "calibration saw no token here"),
        (X * 0, "every activation was zero at w", "calibration saw 64 tokens, all zeros here"),
    ],
)
@pytest.mark.slow
def test_a_calibration_of_nothing_is_warned_of_and_gives_no_static_scale(x, warned, refused):
    with pytest.warns(UserWarning, match=warned):
        stats = sq.calibrate(dense, DENSE, [x])
    assert stats.unreached == {"w": ((),)}
    with pytest.raises(ValueError, match=f"w: {refused}.*dynamic scheme or None"):
        sq.quantize(DENSE, stats, sq.W8A8_O3)
    assert error(dense, DENSE, sq.quantize(DENSE, stats, sq.W8A8), X) < 0.02


# Experts ------------------------------------------------------------------------------------------

EXPERTS, TOKENS, WIDTH, HIDDEN = 3, 40, 16, 32
ALIKE = {
    "gain": np.ones((EXPERTS, WIDTH), np.float32),
    "up": np.stack([np.asarray(normal(2, WIDTH, HIDDEN))] * EXPERTS) / 4,
    "down": np.stack([np.asarray(normal(3, HIDDEN, WIDTH))] * EXPERTS) / 6,
}
WIDE = np.where(np.arange(WIDTH) == 2, 8, 1).astype(np.float32)
# All see the same, so that what is lent is what the borrower would have seen.
ROUTED = jnp.asarray(np.stack([np.asarray(normal(4, TOKENS, WIDTH)) * WIDE] * EXPERTS))


def experts(p, x):
    h = x * p["gain"][:, None]
    hidden = jax.nn.silu(jnp.einsum("etd,edf->etf", h, p["up"]))
    return jnp.einsum("etf,efd->etd", hidden, p["down"])


@pytest.mark.parametrize("scheme", [sq.W8A8, sq.W8A8_O3], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("tokens", "warned"),
    [
        (0, r"no token reached up\[\(0,\)\], down\[\(0,\)\]"),
        (1, r"less than 32 tokens reached up\[0\] \(1\), down\[0\] \(1\)"),
    ],
)
@pytest.mark.slow
def test_an_expert_that_few_tokens_reached_loses_little_by_smoothing(tokens, warned, scheme):
    """Its range is lent in the units of its own s, and its s is drawn towards 1."""
    batch = ROUTED.at[0, tokens:].set(0)
    with pytest.warns(UserWarning, match=warned):
        stats = sq.calibrate(experts, ALIKE, [batch])
    plain = error(experts, ALIKE, sq.quantize(ALIKE, stats, scheme), ROUTED, 0)
    s = sq.scales(ALIKE, stats, 0.85)
    smoothed = sq.fold(ALIKE, stats.graph, s)
    qparams = sq.quantize(smoothed, sq.fold_stats(stats, s), scheme)
    assert error(experts, ALIKE, qparams, ROUTED, 0) < max(1.5 * plain, 0.05)
    assert plain < 0.1


@pytest.mark.slow
def test_scales_are_drawn_to_1_by_the_tokens_that_were_seen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = sq.calibrate(experts, ALIKE, [ROUTED.at[0, 8:].set(0)])
    np.testing.assert_array_equal(stats.reached["up"], [8, TOKENS, TOKENS])
    s = np.asarray(sq.scales(ALIKE, stats, 0.5)["up"]).reshape(EXPERTS, WIDTH)
    x = np.abs(np.asarray(ROUTED[0, :8], np.float64)).max(0)
    w = np.abs(np.asarray(ALIKE["up"][0], np.float64)).max(1)
    np.testing.assert_allclose(s[0], (x / w) ** (0.5 * 8 / 32), rtol=1e-5)
    x = np.abs(np.asarray(ROUTED[1], np.float64)).max(0)
    np.testing.assert_allclose(s[1], (x / w) ** 0.5, rtol=1e-5)


@pytest.mark.slow
def test_ragged_experts_are_counted_one_by_one():
    def fn(p, x, sizes):
        return lax.ragged_dot(x * p["gain"][None], p["w"], sizes)

    params = {"gain": jnp.ones(WIDTH), "w": normal(5, EXPERTS, WIDTH, 4)}
    x = normal(6, 50, WIDTH)
    with pytest.warns(UserWarning, match="tokens? reached") as warned:
        stats = sq.calibrate(fn, params, [(x, jnp.array([45, 0, 5]))] * 2)
    assert stats.unreached == {"w": ((1,),)}
    np.testing.assert_array_equal(stats.reached["w"], [90, 0, 10])
    texts = [str(w.message) for w in warned]
    assert "no token reached w[(1,)]" in texts[0]
    assert "less than 32 tokens reached w[2] (10)" in texts[1]
    assert int(stats.count["w"]) == 100
    sq.quantize(params, stats, sq.W8A8_O3)  # they share one activation, and so one range


@pytest.mark.slow
def test_ragged_experts_in_a_scan_are_counted_layer_by_layer():
    def fn(p, x, sizes):
        def layer(x, both):
            w, sizes = both
            return jnp.tanh(lax.ragged_dot(x, w, sizes)), None

        return lax.scan(layer, x, (p["w"], sizes))[0]

    params = {"w": normal(5, 2, EXPERTS, WIDTH, WIDTH)}
    sizes = jnp.array([[4, 2, 0], [1, 2, 3]])
    with pytest.warns(UserWarning, match=r"no token reached w\[\(0, 2\)\]"):
        stats = sq.calibrate(fn, params, [(normal(6, 6, WIDTH), sizes)])
    np.testing.assert_array_equal(stats.reached["w"], sizes)
