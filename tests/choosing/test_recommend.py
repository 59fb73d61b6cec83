"""`recommend`: which recipe is named, and what is said of the others, beside numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.choosing.judging import _quantile, divergence_of_trees
from sqjax.choosing.recommend import _BY_NAME, RECIPES, _checked, _split
from sqjax.weights.sizes import weight_bytes

RNG = np.random.default_rng(0)
#: Both matrices have one shape, so that their programs are compiled once.
PARAMS = {
    "norm": jnp.asarray(np.ones((1, 64), np.float32)),
    "up": jnp.asarray(RNG.normal(size=(64, 64)) / 8, jnp.float32),
    "down": jnp.asarray(RNG.normal(size=(64, 64)) / 8, jnp.float32),
}
#: A few channels are large, as in language models.
X = np.float32(RNG.normal(size=(8, 32, 64)) * np.where(np.arange(64) % 16 == 0, 9.0, 1.0))
BATCHES = list(map(jnp.asarray, X))


def mlp(params, x):
    return jnp.tanh((x * params["norm"]) @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def found():
    return sq.recommend(mlp, PARAMS, BATCHES, budget=np.float32(0.003))


def logprobs(outputs):
    outputs = np.asarray(outputs, float)
    shifted = outputs - outputs.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.slow
def test_every_recipe_is_tried_the_smallest_first(found):
    sizes = [one.nbytes for one in found.tried]
    assert sizes == sorted(sizes)
    assert {one.name for one in found.tried} == {
        "w8a8 static", "w8a8", "w8a16", "mixed", "w4a8", "w4a16"
    }  # fmt: skip
    assert found.float_bytes == weight_bytes(PARAMS) > max(sizes)


@pytest.mark.slow
def test_the_smallest_within_the_budget_is_named(found):
    within = [one for one in found.tried if one.difference + one.interval <= 0.003]
    assert 0 < len(within) < len(found.tried)
    smallest = min(one.nbytes for one in within)
    # What is larger by less than 1% is of the same size, and then the faster one is taken.
    alike = [one.name for one in within if 0.99 * one.nbytes <= smallest]
    assert found.name == min(alike, key=list(RECIPES).index)
    assert smallest <= weight_bytes(found.params) <= smallest / 0.99
    assert f"within 0.003: {found.name}" in str(found)
    [starred] = [line for line in str(found).splitlines() if line.startswith("*")]
    assert starred.endswith(found.name)


@pytest.mark.slow
def test_losses_are_divergences_from_the_float_model(found):
    [one] = [one for one in found.tried if one.name == found.name]
    losses = []
    exact, quantized = jax.jit(mlp), jax.jit(sq.quantized(mlp))
    for x in BATCHES[-2:]:  # the last quarter
        wanted = logprobs(exact(PARAMS, x))
        got = logprobs(quantized(found.params, x))
        losses.append((np.exp(wanted) * (wanted - got)).sum(-1).mean())
    assert found.float_loss == pytest.approx(0, abs=1e-6)
    assert one.difference == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-6)
    interval = 12.706 * np.std(losses, ddof=1) / np.sqrt(2)  # Student's t, 1 degree of freedom
    assert one.interval == pytest.approx(interval, rel=1e-2, abs=1e-6)


@pytest.mark.slow
def test_the_judge_s_batches_are_not_calibrated_on():
    larger = [*BATCHES[:6], *(100 * x for x in BATCHES[6:])]
    found = sq.recommend(mlp, PARAMS, larger, budget=1e9, recipes="w8a8 static")
    assert found.name == "w8a8 static"
    # Of 127 steps of a range that is 9 times a normal's, and not 900 times.
    assert float(found.params["up"].input_scale) * 127 < 50


@pytest.mark.slow
def test_one_s_own_loss_and_what_stays_float():
    def squared(outputs, exact, x):
        return jnp.mean((outputs - exact) ** 2)

    found = sq.recommend(
        mlp,
        PARAMS,
        BATCHES[:4],
        held_out=BATCHES[4:],
        loss=squared,
        floats="down",  # one pattern, and no letters
        recipes="w4a16",
        budget=1e9,
    )
    exact, quantized = jax.jit(mlp), jax.jit(sq.quantized(mlp))
    error = [
        np.mean(np.square(np.asarray(quantized(found.params, x)) - exact(PARAMS, x)), dtype=float)
        for x in BATCHES[4:]
    ]
    assert found.tried[0].loss == pytest.approx(np.mean(error), rel=1e-4)
    np.testing.assert_array_equal(found.params["down"], PARAMS["down"])


@pytest.mark.slow
def test_none_is_named_where_none_is_within():
    found = sq.recommend(mlp, PARAMS, BATCHES[:4], budget=0.0, recipes=["w8a16"])
    assert found.name is None
    assert found.rules is None
    assert found.params is PARAMS
    assert "within 0: none" in str(found)


@pytest.mark.slow
def test_outliers_of_a_few_tokens_are_rotated_away():
    """Smoothing divides channels that are large in all tokens: here each is large in a few."""

    def heads(params, x):
        return (x @ params["v"]) @ params["o"]

    draw = np.random.default_rng(1)
    params = {"v": np.eye(64), "o": draw.normal(size=(64, 64)) / 8}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    large = 100 * np.eye(64)[np.arange(256).reshape(8, 32) % 64]
    x = np.float32(draw.normal(size=(8, 32, 64)) + large)
    found = sq.recommend(
        heads,
        params,
        list(map(jnp.asarray, x)),
        budget=1e9,
        loss=lambda outputs, exact, x: jnp.mean((outputs - exact) ** 2),
        recipes=["w8a8 static", "w8a8 static rotated", _BY_NAME[0]],
        floats="^v$",
    )
    loss = {one.name: one.loss for one in found.tried}
    assert 0 < 4 * loss["w8a8 static rotated"] < loss["w8a8 static"]
    assert 0 < 4 * loss[_BY_NAME[0]] < loss["w8a8 static"]
    rules = {one.name: one.rules for one in found.tried}
    assert rules[_BY_NAME[0]] == {"^v$": None, ".*": sq.W8A8_O3_ROTATED}


def test_rotating_is_asked_for_where_nothing_may_turn():
    with pytest.raises(ValueError, match="rotate: this program has no space that may turn"):
        sq.recommend(mlp, PARAMS, BATCHES, recipes="w8a8 static rotated")


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="budget=: expected a number of 0 or more, got -1"):
        sq.recommend(mlp, PARAMS, BATCHES, budget=-1.0)
    with pytest.raises(ValueError, match=r"recipes=: expected some of .*w8a8.* got \['w2'\]"):
        sq.recommend(mlp, PARAMS, BATCHES, recipes=["w2"])
    with pytest.raises(
        ValueError, match="others or more to judge on, got 0 and 1; pass at least 3"
    ):
        sq.recommend(mlp, PARAMS, BATCHES[:1])
    with pytest.raises(ValueError, match=r"got 8 and 1; .* or held_out= with two or more"):
        sq.recommend(mlp, PARAMS, BATCHES, held_out=X[:1].tolist())


def test_two_batches_or_more_are_held_out():
    for count, judged in ((3, 2), (7, 2), (8, 2), (12, 3), (40, 10)):
        seen, held = _split(range(count), None)
        assert [*seen, *held] == list(range(count))
        assert len(held) == judged


def test_the_interval_is_student_s():
    # t = tan(angle) sqrt(freedom) has the density cos(angle) ** (freedom - 1), but for a factor.
    for freedom in range(1, 41):
        angles = np.linspace(-np.pi / 2, np.pi / 2, 100_001)
        weights = np.cumsum(np.cos(angles) ** (freedom - 1))
        angle = np.interp(0.975, weights / weights[-1], angles)
        assert _quantile(freedom) == pytest.approx(np.tan(angle) * freedom**0.5, rel=0.01)
    assert _quantile(10**6) == pytest.approx(1.96, rel=1e-4)


def test_mixed_is_tried_where_outputs_are_logits():
    every = [name for name in RECIPES if name not in _BY_NAME]
    assert len(every) == 7
    assert _checked(0.1, None, logits=True) == every
    assert _checked(0.1, None, logits=False) == [name for name in every if name != "mixed"]
    assert _checked(np.float32(0.1), "w8a16", logits=False) == ["w8a16"]
    with pytest.raises(ValueError, match="'mixed' takes the outputs as logits"):
        sq.recommend(mlp, PARAMS, BATCHES, loss=lambda *_: 0.0, recipes=["mixed"])


@pytest.mark.slow
def test_floats_are_found_and_leave_something():
    for floats, said in ((".*", "leave a matmul to quantize"), (["hea"], "'hea' matches nothing")):
        with pytest.raises(ValueError, match=f"recommend: floats=.*{said}"):
            sq.recommend(mlp, PARAMS, BATCHES[:3], floats=floats)


@pytest.mark.slow
def test_a_loss_that_does_not_fit_is_refused():
    cases = (
        (lambda outputs, x: 0.0, "does not take these 3 arguments"),
        (lambda outputs, exact, x: (outputs - exact)[0], r"expected a scalar.* got \(64,\)"),
        ("mse", r"expected a function loss\(outputs, float_outputs, \*batch\), got 'mse'"),
    )
    for loss, said in cases:
        with pytest.raises(ValueError, match=f"recommend: loss=: .*{said}"):
            sq.recommend(mlp, PARAMS, BATCHES[:3], loss=loss, recipes="w8a16")


def test_the_divergences_of_a_tree_are_added():
    outputs = {"a": X[0], "ids": jnp.arange(3), "b": (X[1, :4],)}
    others = {"a": X[2], "ids": jnp.arange(3), "b": (X[3, :4],)}
    expected = 0.0
    for exact, other in ((X[0], X[2]), (X[1, :4], X[3, :4])):
        wanted, got = logprobs(exact), logprobs(other)
        expected += (np.exp(wanted) * (wanted - got)).sum(-1).mean()
    assert float(divergence_of_trees(others, outputs)) == pytest.approx(expected, rel=1e-5)
    for without in ({"ids": jnp.arange(3)}, (X[0], X[0, 0, 0])):
        with pytest.raises(ValueError, match=r"last axis of logits.*; pass loss="):
            divergence_of_trees(without, without)
