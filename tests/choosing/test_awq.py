"""`awq` and `smooth_awq` beside numpy in float64; their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.choosing import clips as clip_module
from sqjax.numerics.output_error import best_changes, gram_error
from tests.helpers.schemes_in_numpy import quantize as in_numpy
from tests.helpers.slow import slow_but

G8 = sq.Scheme(weight=sq.Int4(group_size=8, zero_point=True), activation=None)
TWO_LEVEL = sq.W4A8.replace(weight=sq.W4A8.weight.replace(group_size=8))
GRID = (0.0, 0.3, 0.6, 0.9)


def fn(p, x):
    h = jnp.tanh((x * p["norm"][None]) @ p["a"]) * ((x * p["norm"][None]) @ p["b"])
    return h @ p["c"]


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def arrays(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@functools.cache
def model():
    """All matrices are of one shape, so that their programs are compiled once."""
    params = {
        "norm": 1 + 0.1 * draw(0, 24),
        "a": draw(1, 24, 24) / 4,
        "b": draw(2, 24, 24) / 4,
        "c": draw(3, 24, 24) / 4,
    }
    # Large and small channels side by side, so that groups hold both.
    sizes = np.exp(np.linspace(-2, 2, 24)).reshape(3, 8).T.reshape(-1)
    return arrays((params, draw(4, 256, 24) * sizes))


@functools.cache
def calibrated():
    params, x = model()
    return params, sq.calibrate(fn, params, [x[:128], x[128:]], gram=True, sample=128)


def float64(params, x):
    """{site: its activation}, and the parameters, in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    normed = np.asarray(x, np.float64) * p["norm"]
    hidden = np.tanh(normed @ p["a"]) * (normed @ p["b"])
    return p, {"a": normed, "b": normed, "c": hidden}


def dequantized(w, scheme):
    """The float array of a kernel (in, out) quantized in numpy."""
    q = in_numpy(w.T, scheme)
    return q.floats.T


def weight_error(x, w, s, scheme):
    change = dequantized(s[:, None] * w, scheme) / s[:, None] - w
    return np.square(x @ change).sum() / np.square(x @ w).sum()


def test_errors_and_scales_are_those_of_the_papers_formula():
    params, stats = calibrated()
    p, activations = float64(params, model()[1])
    found = sq.awq(params, stats, G8, grid=GRID, clip=False)
    for name, sites in {"a": "ab", "c": "c"}.items():
        mean = np.abs(activations[name]).mean(0)
        expected = []
        for r in GRID:
            s = mean**r
            s = s / np.sqrt(s.max() * s.min())
            errors = [weight_error(activations[k], p[k], s, G8) for k in sites]
            expected.append((sum(errors), s))
        np.testing.assert_allclose(found.errors[name], [e for e, _ in expected], rtol=1e-2)
        best = int(np.argmin([e for e, _ in expected]))
        assert found.exponents[name] == GRID[best]
        np.testing.assert_allclose(found.s[name], expected[best][1], rtol=1e-4)
    # Large channels are worth more: their rows are rounded more finely.
    assert found.errors["a"].min() < 0.7 * found.errors["a"][0]


SCHEMES = {
    "groups": G8,
    "int8": sq.W8A16,
    "per channel": sq.W4A16.replace(weight=sq.Int4()),
    "per tensor": sq.W4A16.replace(weight=sq.Int4(per_tensor=True)),
    "two levels": TWO_LEVEL,
}


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "groups"))
def test_clips_never_make_an_output_worse(scheme):
    params, stats = calibrated()
    found = sq.awq(params, stats, scheme, grid=GRID)
    folded, after = sq.fold(params, stats.graph, found.s), sq.fold_stats(stats, found.s)
    sq.verify(fn, params, folded, model()[1])
    p, activations = float64(folded, model()[1])
    clipped = sq.quantize(folded, after, scheme, clips=found.clips)
    plain = sq.quantize(folded, after, scheme)
    for site, x in activations.items():
        before, now = (
            np.square(x @ (np.asarray(sq.dequantize(q[site].tensor)) - p[site])).sum(0)
            for q in (plain, clipped)
        )
        if scheme == SCHEMES["per tensor"]:  # one range for all outputs
            before, now = before.sum(keepdims=True), now.sum(keepdims=True)
        assert (now <= before * (1 + 1e-4) + 1e-9).all()
        clip = np.asarray(found.clips[site])
        assert clip.min() >= 0.5
        assert clip.max() <= 1
        if scheme == G8:
            assert now.sum() < 0.99 * before.sum()
            assert clip.shape == (p[site].shape[1], 3)


@pytest.mark.slow
def test_a_clip_is_the_best_of_its_block():
    """One group an output: then the block is the whole matrix, and brute force in numpy finds the same."""
    scheme = sq.W4A16.replace(weight=sq.Int4())
    params, stats = calibrated()
    found = sq.awq(params, stats, scheme, grid=(0.0,))
    p, activations = float64(params, model()[1])
    for site, x in activations.items():
        errors = []
        for ratio in clip_module.SHRINKING:
            w = p[site]
            edge = ratio * np.abs(w).max(0)
            change = dequantized(np.clip(w, -edge, edge), scheme) - w
            errors.append(np.square(x @ change).sum(0))
        errors = np.stack(errors)
        ours = np.searchsorted(
            -np.array(clip_module.SHRINKING), -np.asarray(found.clips[site])[:, 0] - 1e-3
        )
        taken = errors[ours, np.arange(errors.shape[1])]
        np.testing.assert_allclose(taken, errors.min(0), rtol=1e-2)


def test_options_are_chosen_as_by_trying_all_of_them():
    rng = np.random.default_rng(0)
    x, changes = rng.normal(size=(30, 5)), rng.normal(size=(3, 5, 4))
    gram, options = jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(changes, jnp.float32)
    whole = gram_error(options[0], gram)
    np.testing.assert_allclose(whole, np.square(x @ changes[0]).sum(0), rtol=1e-5)
    got = np.asarray(best_changes(options, gram, 2, sweeps=5))
    assert got.shape == (4, 3)

    def error(output, chosen):
        option = np.repeat(chosen, 2)[:5]
        return np.square(x @ changes[option, np.arange(5), output]).sum()

    for output in range(4):
        own = error(output, got[output])
        # No single group can be changed for the better.
        for group in range(3):
            for option in range(3):
                other = got[output].copy()
                other[group] = option
                assert own <= error(output, other) * (1 + 1e-5)
        assert own <= error(output, [0, 0, 0])


@pytest.mark.slow
def test_the_hybrid_is_no_worse_than_smoothing_and_smoothing_than_nothing():
    params, stats = calibrated()
    found = sq.smooth_awq(params, stats, TWO_LEVEL, alphas=(0.3, 0.6), grid=GRID)
    alone = sq.search_alpha(params, stats, TWO_LEVEL, grid=(0.3, 0.6))
    for name, errors in found.errors.items():
        np.testing.assert_array_equal(errors[0], alone.errors[name].min())
        np.testing.assert_equal(found.alphas[name], alone.alphas[name])
        assert errors.min() <= errors[0] <= alone.errors[name][0]
    folded, after = sq.fold(params, stats.graph, found.s), sq.fold_stats(stats, found.s)
    sq.verify(fn, params, folded, model()[1])
    sq.quantize(folded, after, TWO_LEVEL, clips=found.clips)


def kernels(p, x):
    """Two contracted axes, outputs of two axes, and a stack of matrices."""
    x = x.reshape(-1, 4, 8) * p["norm"][None]
    h = jnp.einsum("thd,hdxy->txy", x, p["wide"])
    return jnp.einsum("txy,xyo->xto", jnp.tanh(h), p["stack"])


@pytest.mark.slow
def test_clips_of_other_axes_have_the_shape_of_the_scale():
    norm = np.ones((4, 8))
    params = arrays({"norm": norm, "wide": draw(0, 4, 8, 3, 5), "stack": draw(1, 3, 5, 7)})
    x = arrays(draw(2, 64, 32))
    scheme = G8.replace(weight=sq.Int4(group_size=4, zero_point=True))
    stats = sq.calibrate(kernels, params, [x], gram=True)
    found = sq.awq(params, stats, scheme, grid=GRID)
    q = sq.quantize(params, stats, scheme)
    for site, clip in found.clips.items():
        assert clip.shape == q[site].tensor.scale.shape
    folded, after = sq.fold(params, stats.graph, found.s), sq.fold_stats(stats, found.s)

    exact = jax.jit(kernels)(folded, x)
    run = jax.jit(sq.quantized(kernels))

    def loss(clips):
        made = sq.quantize(folded, after, scheme, clips=clips)
        return np.square(run(made, x) - exact).sum()

    assert found.clips.keys() == {"wide", "stack"}
    assert loss(found.clips) < 0.99 * loss(None)


@pytest.mark.slow
def test_the_same_bits_twice_and_programs_for_shapes_not_for_layers():
    params, stats = calibrated()
    first = sq.awq(params, stats, G8, grid=GRID)
    before = clip_module._clips._cache_size()
    second = sq.awq(params, stats, G8, grid=GRID)
    assert clip_module._clips._cache_size() == before
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_batches_in_any_order_give_the_same_errors():
    params, x = model()
    found = []
    for halves in ([x[:128], x[128:]], [x[128:], x[:128]]):
        stats = sq.calibrate(fn, params, halves, gram=True)
        found.append(sq.awq(params, stats, G8, grid=GRID, clip=False))
    for name, errors in found[0].errors.items():
        np.testing.assert_allclose(errors, found[1].errors[name], rtol=1e-3)


def test_what_is_refused():
    params, stats = calibrated()
    with pytest.raises(ValueError, match="gram=True"):
        sq.awq(params, sq.calibrate(fn, params, [model()[1][:128]]))
    with pytest.raises(ValueError, match="awq: grid: expected a number in"):
        sq.awq(params, stats, grid=(2.0,))
    with pytest.raises(ValueError, match="of other parameters"):
        sq.awq(sq.smooth(params, stats, 0.5), stats)


def test_statistics_of_other_parameters_are_refused_without_groups_too():
    def plain(p, x):
        return jnp.tanh(jnp.tanh(x) @ p["a"]) @ p["b"]

    params = arrays({"a": draw(0, 24, 24), "b": draw(1, 24, 24)})
    stats = sq.calibrate(plain, params, [arrays(draw(2, 32, 24))], gram=True)
    assert sq.awq(params, stats, sq.W4A16_G64).clips.keys() == {"a", "b"}
    with pytest.raises(ValueError, match="a:"):
        sq.awq({**params, "a": 3 * params["a"]}, stats, sq.W4A16_G64)
