"""Channels far above all others: which ones are found, and what becomes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.choosing.massive import massive_channels, without

RNG = np.random.default_rng(0)
#: Both matrices have one shape, so that their programs are compiled once.
PARAMS = {
    "norm": jnp.asarray(np.ones((1, 64), np.float32)),
    "up": jnp.asarray(RNG.normal(size=(64, 64)) / 8, jnp.float32),
    "down": jnp.asarray(RNG.normal(size=(64, 64)) / 8, jnp.float32),
}
#: The first token has a channel that is 300 times as large as all others.
X = np.float32(RNG.normal(size=(96, 64)))
X[0, 5] = 900.0
X = jnp.asarray(X)


def mlp(params, x):
    return jnp.tanh((x * params["norm"]) @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def stats():
    return sq.calibrate(mlp, PARAMS, [X], gram=True, sample=96)


def test_they_are_found_where_all_tokens_share_a_scale(stats):
    [found] = massive_channels(stats, {"up": sq.W8A8_O3, "down": sq.W8A8_O3}).items()
    path, (channels, threshold) = found
    assert path == "up"
    assert np.flatnonzero(channels).tolist() == [5]
    ordered = np.sort(abs(np.asarray(X)).max(0))
    assert threshold == pytest.approx(8 * ordered[-5])
    assert massive_channels(stats, {"up": sq.W8A8_O2}).keys() == {"up"}
    spared = [sq.W8A8, sq.W8A16, sq.W8A8_O3.replace(smoothing=0.5)]
    assert not any(massive_channels(stats, {"up": scheme}) for scheme in spared)


def test_statistics_without_them(stats):
    quiet = without(stats, massive_channels(stats, {"up": sq.W8A8_O3}))
    kept = np.array(X)
    kept[:, 5] = 0
    np.testing.assert_array_equal(quiet.absmax["up"], abs(kept).max(0))
    np.testing.assert_allclose(quiet.gram["up"], kept.T @ kept, rtol=1e-4, atol=1e-3)
    rows = np.asarray(quiet.sample["up"].rows)
    assert not rows[:, 5].any()
    assert rows[:, 6].any()
    np.testing.assert_array_equal(quiet.gram["down"], stats.gram["down"])
    assert sq.scales(PARAMS, quiet, 0.5)["up"][5] == 1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W8A8_O2", "W8A8_O3"])
def test_they_stay_float_and_the_others_are_rounded_finely(stats, scheme):
    scheme = getattr(sq, scheme)
    found = sq.search_alpha(PARAMS, stats, scheme)
    folded, after = sq.fold(PARAMS, stats.graph, found.s), sq.fold_stats(stats, found.s)
    alone = sq.quantize(folded, after, scheme)
    together = sq.quantize_by_search(PARAMS, stats, scheme)
    assert together["up"].outliers.channels.tolist() == [5]

    exact = np.asarray(jax.jit(mlp)(PARAMS, X), float)

    def error(qparams):
        got = jax.jit(sq.quantized(mlp))(qparams, X)
        return np.linalg.norm(got - exact) / np.linalg.norm(exact)

    assert error(together) < 0.5 * error(alone)
