"""`search_alpha`: beside numpy in float64, never worse than no smoothing, and the same of stacked layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.choosing import candidates
from sqjax.choosing.alphas import search_alpha
from sqjax.numerics.formats import INT4
from tests.helpers.slow import slow_but

GRID = (0.0, 0.5, 0.85, 1.0)


def fn(p, x):
    h = jnp.tanh((x * p["norm"][None]) @ p["a"]) * ((x * p["norm"][None]) @ p["b"])
    return h @ p["c"]


def arrays(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def model(seed=0):
    """All matrices are of one shape, so that their programs are compiled once."""
    params = {
        "norm": 1 + 0.1 * draw([seed, 0], 24),
        "a": draw([seed, 1], 24, 24) / 5,
        "b": draw([seed, 2], 24, 24) / 5,
        "c": draw([seed, 3], 24, 24) / 5,
    }
    outliers = np.where(np.arange(24) == 3, 60.0, 1.0)
    return arrays((params, draw([seed, 4], 200, 24) * outliers))


@functools.cache
def calibrated():
    params, x = model()
    return params, sq.calibrate(fn, params, [x[:100], x[100:]], sample=64, gram=True)


def rounded(x, absmax):
    scale = absmax / 127
    return np.clip(np.round(x / scale), -127, 127) * scale


def static_error(x, w, absmax, tokens, s):
    """|X W - Q(X / s) Q(s W)|^2 / |X W|^2 in float64, with one static scale, and a scale an output; and what
    new tokens will lose beyond the scale.
    """
    u = absmax / s
    xq = rounded(x / s, u.max())
    sw = s[:, None] * w
    wq = rounded(sw, np.abs(sw).max(0))
    more = tokens / len(x)
    power = np.log(more) / np.log(absmax / np.abs(x).max(0)).mean()
    beyond = (u / u.max()) ** power * 2 * u.max() ** 2 / ((power - 1) * (power - 2)) / more
    has_tail = absmax <= 2 * np.abs(x).max(0) * more ** (1 / power)
    lost = ((has_tail * beyond)[:, None] * wq**2).sum()
    assert power > 2.5
    of_tokens = np.square(xq @ wq - x @ w).sum(1) / np.square(x @ w).sum(1)
    return of_tokens.mean() + lost / np.square(x @ w).sum()


def test_errors_are_those_of_numpy():
    params, stats = calibrated()
    found = search_alpha(params, stats, sq.W8A8_O3, grid=GRID)
    for i, alpha in enumerate((None, *GRID)):
        s = np.ones(24)
        if alpha is not None:
            s = np.asarray(sq.scales(params, stats, alpha)["a"], np.float64)
        expected = 0
        for site in "ab":
            x = np.asarray(stats.sample[site].rows, np.float64)
            absmax = np.asarray(stats.absmax[site], np.float64)
            expected += static_error(x, np.asarray(params[site], np.float64), absmax, 200, s)
        # float32 rounds some halves the other way.
        np.testing.assert_allclose(found.errors["a"][i], expected, rtol=2e-2)


@pytest.mark.parametrize(
    "scheme",
    slow_but(["W8A8", "W8A8_O2", "W8A8_O3", "W4A16_G64", "FP8", "W4A8"], "W8A8_O3"),
)
def test_never_worse_than_no_smoothing_and_ready_to_fold(scheme):
    params, stats = calibrated()
    found = search_alpha(params, stats, scheme, grid=GRID)
    assert found.s.keys() == {"a", "c"}
    for name, errors in found.errors.items():
        best = int(np.argmin(errors))
        alpha = (np.nan, *GRID)[best]
        np.testing.assert_equal(found.alphas[name], alpha)
        s = np.ones(found.s[name].shape)
        if best:
            s = sq.scales(params, stats, alpha)[name]
        np.testing.assert_array_equal(found.s[name], s)
    if scheme == "W8A8_O3":
        assert found.errors["a"].min() < 0.75 * found.errors["a"][0]
    folded = sq.fold(params, stats.graph, found.s)
    sq.verify(fn, params, folded, model()[1])
    sq.quantize(folded, sq.fold_stats(stats, found.s), scheme)


@pytest.mark.slow
def test_a_weights_error_by_gram_is_that_of_all_tokens():
    params, stats = calibrated()
    found = search_alpha(params, stats, sq.W4A16_G64, grid=GRID)
    p, x = jax.tree.map(lambda leaf: np.asarray(leaf, float), model())
    w, normed = p["c"], x * p["norm"]
    h = np.tanh(normed @ p["a"]) * (normed @ p["b"])
    for s, error in zip(alphas_of("c", params, stats), found.errors["c"], strict=True):
        scaled = jnp.asarray(w * np.asarray(s)[:, None], jnp.float32)
        narrow = np.asarray(
            sq.dequantize(sq.QTensor.quantize(scaled, (0,), 64, INT4, (), True)), float
        )
        change = h @ (narrow / np.asarray(s, float)[:, None] - w)
        expected = np.square(change).sum() / np.square(h @ w).sum()
        np.testing.assert_allclose(error, expected, rtol=1e-3)


def alphas_of(name, params, stats):
    """s for each candidate: none, then those of the grid."""
    return [np.ones(24), *(sq.scales(params, stats, alpha)[name] for alpha in GRID)]


def stacked(p, x):
    def layer(x, own):
        return x + 0.3 * fn(own, x), None

    return jax.lax.scan(layer, x, p)[0]


def unrolled(p, x):
    for i in range(3):
        x = x + 0.3 * fn(p[i], x)
    return x


@pytest.mark.slow
def test_stacked_layers_have_an_alpha_each_as_single_layers_do():
    layers = [model(seed)[0] for seed in range(3)]
    x = model()[1]
    stack = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)
    together = sq.calibrate(stacked, stack, [x], sample=64)
    apart = sq.calibrate(unrolled, layers, [x], sample=64)
    one = search_alpha(stack, together, sq.W8A8_O3, grid=GRID)
    each = search_alpha(layers, apart, sq.W8A8_O3, grid=GRID)
    for site in "ac":
        of_layers = [each.errors[f"{i}/{site}"] for i in range(3)]
        np.testing.assert_allclose(one.errors[site], np.stack(of_layers, 1), rtol=2e-2)
        alphas = [each.alphas[f"{i}/{site}"] for i in range(3)]
        np.testing.assert_equal(one.alphas[site], alphas)
        s = np.concatenate([each.s[f"{i}/{site}"] for i in range(3)])
        np.testing.assert_allclose(one.s[site], s, rtol=1e-5)


@pytest.mark.slow
def test_layers_of_one_shape_share_their_programs():
    layers = [model(seed)[0] for seed in range(3)]
    x = model()[1]
    stats = sq.calibrate(unrolled, layers, [x], sample=64)
    candidates.site_errors.clear_cache()
    search_alpha(layers, stats, sq.W8A8, grid=(0.25, 0.5, 0.75))
    # All sites have one shape.
    assert candidates.site_errors._cache_size() == 1


@pytest.mark.slow
def test_the_same_bits_twice_and_batches_in_any_order():
    params, x = model()
    found = []
    for order in ((0, 1), (0, 1), (1, 0)):
        halves = [x[:100], x[100:]]
        stats = sq.calibrate(fn, params, [halves[i] for i in order], sample=64)
        found.append(search_alpha(params, stats, sq.W8A8, grid=GRID))
    for name, errors in found[0].errors.items():
        np.testing.assert_array_equal(errors, found[1].errors[name])
        np.testing.assert_allclose(errors, found[2].errors[name], rtol=1e-4)


def test_what_is_refused():
    params, stats = calibrated()
    with pytest.raises(ValueError, match="sample=512"):
        search_alpha(params, sq.calibrate(fn, params, [model()[1][:100]]), sq.W8A8)
    with pytest.raises(ValueError, match="grid: expected a number in"):
        search_alpha(params, stats, sq.W8A8, grid=(0.5, 1.5))
    with pytest.raises(ValueError, match="without outliers"):
        search_alpha(params, stats, sq.W8A8_OUTLIERS)
    with pytest.raises(ValueError, match="no embeddings"):
        search_alpha(params, stats, sq.EMBEDDING_INT8)
    smoothed = sq.smooth(params, stats, 0.5)
    with pytest.raises(ValueError, match="of other parameters"):
        search_alpha(smoothed, stats, sq.W8A8)
    for search in (search_alpha, sq.awq, sq.smooth_awq):
        name = search.__name__
        with pytest.raises(
            ValueError, match=f"^{name}: .* got tracers: call it outside of jax.jit"
        ):
            jax.eval_shape(lambda params: search(params, stats, sq.W4A8).s, params)  # noqa: B023


@pytest.mark.slow
def test_a_group_with_a_convolution_stays_as_it_is():
    def convolved(p, x):
        y = x * p["norm"][None]
        window = jax.lax.conv_general_dilated(
            y[None], p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return (window[0] * p["gain"][None]) @ p["w"]

    params = {"norm": np.ones(4), "k": draw(0, 3, 4, 24), "gain": np.ones(24), "w": draw(1, 24, 24)}
    params, x = arrays((params, draw(2, 100, 4)))
    stats = sq.calibrate(convolved, params, [x], sample=64)
    assert {group.name for group in stats.graph.groups} == {"k", "w"}
    assert search_alpha(params, stats, sq.W8A8, grid=GRID).s.keys() == {"w"}
