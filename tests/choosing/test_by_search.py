"""`quantize_by_search`: which search goes with which scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "norm": jnp.ones((1, 128)),
    "up": jax.random.normal(KEYS[0], (128, 32)) / 8,
    "down": jax.random.normal(KEYS[1], (32, 16)) / 4,
}
X = jax.random.normal(KEYS[2], (96, 128)) * jnp.geomspace(0.05, 20.0, 128)[None]


def mlp(params, x):
    return jnp.tanh((x * params["norm"]) @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def stats():
    return sq.calibrate(mlp, PARAMS, [X], gram=True, sample=64)


def error(qparams):
    exact = np.asarray(mlp(PARAMS, X), float)
    return np.linalg.norm(sq.quantized(mlp)(qparams, X) - exact) / np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_O3", "W8A16", "W4A16_G64", "W4A8"])
def test_it_is_better_than_rounding(stats, scheme):
    scheme = getattr(sq, scheme)
    found = sq.quantize_by_search(PARAMS, stats, scheme)
    assert found["up"].tensor.fmt == scheme.weight.fmt
    assert error(found) < 0.9 * error(sq.quantize(PARAMS, stats, scheme))


@pytest.mark.slow
def test_rules_with_int4_and_int8_weights(stats):
    found = sq.quantize_by_search(PARAMS, stats, {"up": sq.W4A16_G64, ".*": sq.W8A16})
    assert [found[path].tensor.fmt.name for path in ("up", "down")] == ["int4", "int8"]


def test_statistics_of_maxima_alone_are_refused():
    stats = sq.calibrate(mlp, PARAMS, [X])
    for scheme in (sq.W8A8, sq.W4A16_G64):
        with pytest.raises(ValueError, match=r"gram=True|sample="):
            sq.quantize_by_search(PARAMS, stats, scheme)
