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
@pytest.mark.parametrize(
    "scheme", ["W8A8", "W8A8_O3", "W8A16", "W4A16_G64", "W4A8", "W4A4_ROTATED"]
)
def test_it_is_better_than_rounding(stats, scheme):
    scheme = getattr(sq, scheme)
    found = sq.quantize_by_search(PARAMS, stats, scheme)
    assert found["up"].tensor.fmt == scheme.weight.fmt
    assert error(found) < 0.9 * error(sq.quantize(PARAMS, stats, scheme))


@pytest.mark.slow
def test_rules_with_int4_and_int8_weights(stats):
    found = sq.quantize_by_search(PARAMS, stats, {"up": sq.W4A16_G64, ".*": sq.W8A16})
    assert [found[path].tensor.fmt.name for path in ("up", "down")] == ["int4", "int8"]


@pytest.mark.slow
def test_what_is_prepared_computes_the_same_and_rounds_to_the_same(stats):
    found = sq.prepare_by_search(PARAMS, stats, sq.W4A8)
    assert not np.allclose(found.params["up"], PARAMS["up"])
    assert sq.verify(mlp, PARAMS, found.params, X) < 1e-5
    rounded = sq.gptq(found.params, found.stats, found.rules, clips=found.clips)
    whole = sq.quantize_by_search(PARAMS, stats, sq.W4A8)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, rounded, whole)))
    assert 0 < float(found.clips["up"].min()) < 1


def test_statistics_of_maxima_alone_are_refused():
    stats = sq.calibrate(mlp, PARAMS, [X])
    for scheme in (sq.W8A8, sq.W4A16_G64):
        with pytest.raises(ValueError, match=r"gram=True|sample="):
            sq.quantize_by_search(PARAMS, stats, scheme)


def test_ranges_are_those_of_the_scales_that_are_folded():
    def both(params, x):
        normed = x * params["norm"]
        return normed @ params["q"], normed @ params["k"]

    keys = jax.random.split(jax.random.key(3), 4)
    x = jax.random.normal(keys[0], (256, 16)) * jnp.exp(2 * jax.random.normal(keys[1], (1, 16)))
    rows = jnp.exp(2 * jax.random.normal(keys[2], (16, 1)))
    params = {
        "norm": jnp.ones((1, 16)),
        "q": rows * jax.random.normal(keys[3], (16, 8)),
        "k": rows.T.repeat(8, 0).T,
    }
    stats = sq.calibrate(both, params, [x], gram=True, sample=64)
    found = sq.quantize_by_search(params, stats, {"q": sq.W8A8_O3, "k": sq.W4A16_G64})
    alone = sq.search_alpha(params, stats, {"q": sq.W8A8_O3})
    folded, after = sq.fold(params, stats.graph, alone.s), sq.fold_stats(stats, alone.s)
    unclipped = sq.quantize(folded, after, {"k": sq.W4A16_G64})
    exact = np.asarray(x @ params["k"], float)

    def error(k):
        narrow = np.asarray(sq.dequantize(k.tensor), float) / np.asarray(alone.s["q"])[:, None]
        return np.linalg.norm(np.asarray(x, float) @ narrow - exact)

    assert error(found["k"]) <= error(unclipped["k"]) * (1 + 1e-5)


def test_static_ranges_of_histograms_are_refused(stats):
    scheme = sq.W8A8_O3.replace(activation=sq.Static(range="mse"))
    with pytest.raises(ValueError, match="up: expected a static range of 'absmax'"):
        sq.quantize_by_search(PARAMS, stats, scheme)
