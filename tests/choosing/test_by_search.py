"""`quantize_by_search`: which search goes with which scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape)


def arrays(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


#: Both matrices have one shape, so that their programs are compiled once.
PARAMS = arrays(
    {"norm": np.ones((1, 128)), "up": normal(128, 128) / 8, "down": normal(128, 128) / 8}
)
X = arrays(normal(96, 128) * np.geomspace(0.05, 20.0, 128))


def mlp(params, x):
    return jnp.tanh((x * params["norm"]) @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def stats():
    return sq.calibrate(mlp, PARAMS, [X], gram=True, sample=64)


def error(qparams):
    exact = np.asarray(jax.jit(mlp)(PARAMS, X), float)
    got = jax.jit(sq.quantized(mlp))(qparams, X)
    return np.linalg.norm(got - exact) / np.linalg.norm(exact)


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

    x = arrays(normal(256, 16) * np.exp(2 * normal(1, 16)))
    rows = np.exp(2 * normal(16, 1))
    params = {"norm": np.ones((1, 16)), "q": rows * normal(16, 8), "k": rows.repeat(8, 1)}
    params = arrays(params)
    stats = sq.calibrate(both, params, [x], gram=True, sample=64)
    found = sq.quantize_by_search(params, stats, {"q": sq.W8A8_O3, "k": sq.W4A16_G64})
    alone = sq.search_alpha(params, stats, {"q": sq.W8A8_O3})
    folded, after = sq.fold(params, stats.graph, alone.s), sq.fold_stats(stats, alone.s)
    unclipped = sq.quantize(folded, after, {"k": sq.W4A16_G64})
    exact = np.asarray(x, float) @ np.asarray(params["k"], float)

    def error(k):
        narrow = np.asarray(sq.dequantize(k.tensor), float) / np.asarray(alone.s["q"])[:, None]
        return np.linalg.norm(np.asarray(x, float) @ narrow - exact)

    assert error(found["k"]) <= error(unclipped["k"]) * (1 + 1e-5)


def test_static_ranges_of_histograms_are_refused(stats):
    scheme = sq.W8A8_O3.replace(activation=sq.Static(range="mse"))
    with pytest.raises(ValueError, match="up: expected a static range of 'absmax'"):
        sq.quantize_by_search(PARAMS, stats, scheme)
