"""Statistics are used only with the parameters that they describe; scales are above 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {
    "gain": np.ones(16, np.float32),
    "up": normal(16, 24) / 4,
    "down": normal(24, 8) / 5,
    "bias": np.ones(8, np.float32),
}
X = normal(12, 16)
X[:, 3] *= 40


def mlp(p, x):
    hidden = jax.nn.relu((x * p["gain"][None]) @ p["up"])
    return hidden @ p["down"] + p["bias"][None]


@pytest.fixture(scope="module")
def stats():
    return sq.calibrate(mlp, PARAMS, [X])


@pytest.mark.slow
def test_smoothing_twice_with_the_same_statistics_is_refused(stats):
    smoothed = sq.smooth(PARAMS, stats, 0.85)
    for method in (sq.smooth, sq.scales):
        with pytest.raises(ValueError, match=r"up: .*would smooth them a second time.*fold_stats"):
            method(smoothed, stats, 0.85)


@pytest.mark.slow
def test_what_follows_from_smoothing_once_stays_lawful(stats):
    s = sq.scales(PARAMS, stats, 0.85)
    smoothed = sq.fold(PARAMS, stats.graph, s)
    sq.quantize(smoothed, stats, sq.W8A8)  # takes nothing from the statistics
    again = sq.scales(smoothed, sq.fold_stats(stats, s), 0.85)
    # The formula of what it made itself: X / s and s W have the sizes that it aims at.
    np.testing.assert_allclose(again["down"], np.ones(24), rtol=1e-5)


@pytest.mark.slow
def test_groups_may_be_smoothed_one_after_the_other(stats):
    """The first leaves the activation and the weight of the second as they were."""
    norms_first = sq.smooth(PARAMS, stats, 0.5, groups="norm")
    both = sq.smooth(norms_first, stats, 0.5, groups="down")
    at_once = sq.smooth(PARAMS, stats, 0.5)
    for path in PARAMS:
        np.testing.assert_allclose(both[path], at_once[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("path", ["gain", "bias", "down"])
@pytest.mark.slow
def test_static_scales_of_parameters_that_were_trained_since_are_refused(stats, path):
    trained = PARAMS | {path: PARAMS[path] * 3}
    with pytest.raises(ValueError, match=f"{path}: the statistics are of other parameters"):
        sq.quantize(trained, stats, sq.W8A8_O3)
    sq.quantize(trained, stats, sq.W8A8)


def test_the_message_shows_both_sizes_that_are_compared(stats):
    """One element was changed: mean |w| moves a little, max |w| tells what happened."""
    trained = PARAMS | {"gain": np.where(np.arange(16) == 3, 5, PARAMS["gain"]).astype(np.float32)}
    message = r"max \|w\| is 5 and the mean \|w\| 1.25; when calibrated they were 1 and 1\)"
    with pytest.raises(ValueError, match=message):
        sq.quantize(trained, stats, sq.W8A8_O3)


def test_parameters_that_were_cast_are_the_same(stats):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    sq.quantize(narrow, stats, sq.W8A8_O3)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_not_above_0_are_refused(stats, wrong):
    s = {"up": jnp.ones(16).at[5].set(wrong)}
    for act in (
        lambda: sq.fold(PARAMS, stats.graph, s),
        lambda: sq.fold_stats(stats, s),
    ):
        with pytest.raises(
            ValueError, match=r"up: expected scales above 0 and finite, got .* at 5"
        ):
            act()


@pytest.mark.slow
def test_float16_takes_its_own_statistics():
    """A weight times a small s is one of float16's smallest numbers, which have few digits."""
    spread = jnp.geomspace(1e-5, 1, 16)[None]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS)
    qparams = sq.smoothquant(mlp, params, [(X * spread).astype(jnp.float16)], 0.85, sq.W8A8_O3)
    assert qparams["up"].input_scale > 0
