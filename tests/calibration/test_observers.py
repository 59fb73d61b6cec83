"""Gram matrices and samples that calibration keeps, beside activations recomputed in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq

FEATURES, HIDDEN = 4, 6


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "norm": 1 + 0.1 * draw(1, 1, 1, FEATURES),
    "up": draw(2, FEATURES, HIDDEN),
    "down": draw(3, HIDDEN, FEATURES),
}
BATCHES = [jnp.asarray(draw(seed, 2, 5, FEATURES)) for seed in (4, 5, 6)]


def mlp(params, x):
    return jnp.tanh((x * params["norm"]) @ params["up"]) @ params["down"]


def inputs_of(params, x):
    """{site: its activations}, (tokens, features), in float64."""
    up = (np.asarray(x, float) * params["norm"]).reshape(-1, FEATURES)
    return {"up": up, "down": np.tanh(up @ params["up"])}


def grams(batches):
    each = [inputs_of(PARAMS, x) for x in batches]
    return {path: sum(x[path].T @ x[path] for x in each) for path in ("up", "down")}


def assert_close(found, exact):
    for path, gram in exact.items():
        np.testing.assert_allclose(found[path], gram, atol=1e-5 * abs(gram).max(), rtol=0)


def test_gram_matrices_and_samples_of_all_batches():
    stats = sq.calibrate(mlp, PARAMS, BATCHES, gram=True, sample=7)
    assert_close(stats.gram, grams(BATCHES))
    for path in ("up", "down"):
        every = np.concatenate([inputs_of(PARAMS, x)[path] for x in BATCHES])
        distance = abs(np.asarray(stats.sample[path].rows)[:, None] - every).max(-1)
        assert (distance.min(1) < 1e-5).all()
        assert len({*distance.argmin(1).tolist()}) == 7
    assert sq.gram_bytes(stats.graph) == sum(x.nbytes for x in stats.gram.values())
    assert not sq.calibrate(mlp, PARAMS, BATCHES).gram


def test_merged_in_any_order_they_are_those_of_all_batches():
    one, two, three = (sq.calibrate(mlp, PARAMS, [x], gram=True, sample=7) for x in BATCHES)
    merged = three.merge(one).merge(two)
    whole = sq.calibrate(mlp, PARAMS, BATCHES, gram=True, sample=7)
    assert_close(merged.gram, grams(BATCHES))
    jax.tree.map(np.testing.assert_array_equal, merged.sample, whole.sample)


def test_what_only_one_has_does_not_merge():
    one = sq.calibrate(mlp, PARAMS, BATCHES[:1], gram=True)
    with pytest.raises(ValueError, match="no Gram matrices"):
        one.merge(sq.calibrate(mlp, PARAMS, BATCHES[1:2]))
    few, more = (sq.calibrate(mlp, PARAMS, BATCHES[:1], sample=n) for n in (3, 4))
    with pytest.raises(ValueError, match="samples of one size, got 3 and 4"):
        few.merge(more)


def test_padding_counts_nowhere():
    keep = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], bool)
    stats = sq.calibrate(mlp, PARAMS, BATCHES[:1], mask=lambda x: keep, gram=True, sample=9)
    of = {path: x[keep.reshape(-1)] for path, x in inputs_of(PARAMS, BATCHES[0]).items()}
    assert_close(stats.gram, {path: x.T @ x for path, x in of.items()})
    assert [(np.asarray(s.priority) > 0).sum() for s in stats.sample.values()] == [5, 5]


def test_folded_statistics_are_those_of_the_folded_parameters():
    stats = sq.calibrate(mlp, PARAMS, BATCHES, gram=True, sample=7)
    s = sq.scales(PARAMS, stats, 0.5)
    folded = sq.fold_stats(stats, s)
    again = sq.calibrate(mlp, sq.fold(PARAMS, stats.graph, s), BATCHES, gram=True)
    assert_close(folded.gram, jax.tree.map(np.asarray, again.gram))
    expected = np.asarray(stats.sample["up"].rows) / np.asarray(s["up"])
    np.testing.assert_allclose(folded.sample["up"].rows, expected, rtol=1e-6)
    assert abs(expected - stats.sample["up"].rows).max() > 0.01


LAYERS = {"norm": 1 + 0.1 * draw(7, 3, 1, 1, FEATURES), "w": draw(8, 3, FEATURES, FEATURES)}


def stacked(params, x):
    def layer(x, p):
        return jnp.tanh((x * p["norm"]) @ p["w"]), None

    return jax.lax.scan(layer, x, params)[0]


def test_each_layer_of_a_scan_has_its_own():
    stats = sq.calibrate(stacked, LAYERS, BATCHES[:2], gram=True, sample=4)
    expected = np.zeros((3, FEATURES, FEATURES))
    for x in BATCHES[:2]:
        x = np.asarray(x, float).reshape(-1, FEATURES)
        for i in range(3):
            x = x * LAYERS["norm"][i, 0]
            expected[i] += x.T @ x
            x = np.tanh(x @ LAYERS["w"][i])
    assert_close(stats.gram, {"w": expected})
    assert stats.sample["w"].rows.shape == (3, 4, FEATURES)
    assert (np.asarray(stats.sample["w"].priority) > 0).all()


def test_one_weight_at_every_step_of_a_scan_has_the_sum_of_all_steps():
    def recurrent(params, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["w"]), None), x, None, length=3)[0]

    params = {"w": LAYERS["w"][0]}
    x = np.asarray(BATCHES[0], float).reshape(-1, FEATURES)
    expected, every = 0, []
    for _ in range(3):
        expected = expected + x.T @ x
        every.append(x)
        x = np.tanh(x @ params["w"])
    stats = sq.calibrate(recurrent, params, BATCHES[:1], gram=True, sample=25)
    assert_close(stats.gram, {"w": expected})
    distance = abs(np.asarray(stats.sample["w"].rows)[:, None] - np.concatenate(every)).max(-1)
    assert (distance.min(1) < 1e-5).all()
    assert len({*distance.argmin(1).tolist()}) == 25


def test_experts_that_are_a_batch_axis_have_one_each():
    def experts(params, x):
        return jnp.einsum("etc,ecf->etf", x, params["w"])

    x = jnp.asarray(draw(9, 3, 5, FEATURES))
    stats = sq.calibrate(experts, {"w": LAYERS["w"]}, [x], gram=True, sample=5)
    exact = np.einsum("etc,etd->ecd", np.asarray(x, float), np.asarray(x, float))
    assert_close(stats.gram, {"w": exact})


def test_several_contracted_axes_are_one():
    def heads(params, x):
        return jnp.einsum("thd,hdo->to", x, params["w"])

    x = jnp.asarray(draw(10, 7, 2, 3))
    stats = sq.calibrate(heads, {"w": jnp.asarray(draw(11, 2, 3, 5))}, [x], gram=True, sample=2)
    flat = np.asarray(x, float).reshape(7, 6)
    assert_close(stats.gram, {"w": flat.T @ flat})
    assert stats.sample["w"].rows.shape == (2, 6)


def test_they_are_saved_and_loaded(tmp_path):
    stats = sq.calibrate(mlp, PARAMS, BATCHES, gram=True, sample=7)
    sq.save(tmp_path / "all.safetensors", PARAMS, stats=stats)
    loaded = sq.load_saved(tmp_path / "all.safetensors").stats
    jax.tree.map(np.testing.assert_array_equal, loaded, stats)


@pytest.mark.parametrize("option", ["sample", "seed"])
def test_a_number_below_0_is_refused(option):
    with pytest.raises(
        ValueError, match=f"calibrate: {option}=: expected an int of 0 or more, got -1"
    ):
        sq.calibrate(mlp, PARAMS, BATCHES, **{option: -1})


# Clips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W4A16_G64", "W8A8", "W4A8", "FP8"])
def test_clips_are_the_ranges_of_scales(scheme):
    w = draw(12, 256, 3)
    stats = sq.calibrate(lambda p, x: x @ p["w"], {"w": w}, [draw(13, 4, 256)])
    scheme = getattr(sq, scheme)
    size = scheme.weight.group_size or 256
    clip = np.linspace(0.4, 1, 3 * (256 // size)).reshape(3, -1).astype(np.float32)
    got = sq.quantize({"w": w}, stats, scheme, clips={"w": jnp.asarray(clip)})["w"]
    grouped = w.T.reshape(3, -1, size)
    low, high = grouped.min(-1), grouped.max(-1)
    if not getattr(scheme.weight, "zero_point", False):
        high = abs(grouped).max(-1)
        low = -high
    inside = np.clip(grouped, (low * clip)[..., None], (high * clip)[..., None])
    expected = sq.quantize({"w": inside.reshape(3, 256).T}, stats, scheme)["w"]
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert (
        np.asarray(got.tensor.scale) < sq.quantize({"w": w}, stats, scheme)["w"].tensor.scale
    ).any()


def test_clips_that_are_none_are_refused():
    stats = sq.calibrate(mlp, PARAMS, BATCHES)
    with pytest.raises(ValueError, match="'upp' is no matmul's weight"):
        sq.quantize(PARAMS, stats, sq.W8A8, clips={"upp": jnp.ones((1, 1))})
    with pytest.raises(ValueError, match=r"clips of 'up': expected factors in \(0, 1\]"):
        sq.quantize(PARAMS, stats, sq.W8A8, clips={"up": jnp.zeros((HIDDEN, 1))})
    with pytest.raises(ValueError, match=r"up: clips: expected .* shape \(6, 1\), got \(7, 1\)"):
        sq.quantize(PARAMS, stats, sq.W8A8, clips={"up": jnp.ones((7, 1))})


# Leaves that are looked up ------------------------------------------------------------------------


def test_a_head_that_is_the_embedding_is_rounded_as_usual():
    def tied(params, ids):
        return jnp.tanh(params["embed"][ids] @ params["w"]) @ params["embed"].T

    params = {"embed": jnp.asarray(draw(14, 40, 32)), "w": jnp.asarray(draw(15, 32, 32))}
    stats = sq.calibrate(tied, params, [jnp.arange(40).reshape(2, 20)], gram=True, sample=4)
    assert stats.gram.keys() == {"w"}
    assert stats.sample.keys() == {"w", "embed"}
    rounded = sq.quantize(params, stats, sq.W4A16_G64)
    for make in (sq.gptq, sq.quantize_by_search):
        found = make(params, stats, sq.W4A16_G64)
        jax.tree.map(np.testing.assert_array_equal, found["embed"], rounded["embed"])
        assert (found["w"].tensor.values != rounded["w"].tensor.values).any()


def test_activations_whose_squares_overflow_are_refused():
    with pytest.raises(ValueError, match=r"Gram matrix .* at up"):
        sq.calibrate(mlp, PARAMS, [BATCHES[0] * 1e20], gram=True)
