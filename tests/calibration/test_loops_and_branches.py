"""Matmuls inside while loops and branches: what calibration sees of them, and that they run in int8."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import sqjax as sq

WIDTH, STEPS = 8, 3
STATIC = sq.W8A8_O3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "gain": 1 + normal(1, WIDTH, seed=1) ** 2,
    "w": normal(WIDTH, WIDTH, seed=2) / 2,
    "v": normal(WIDTH, WIDTH, seed=3) / 2,
}
X = normal(5, WIDTH)
PLUS = np.abs(X)


def looped(p, x, steps):
    """A loop that runs `steps` times, which only its input says."""

    def step(carry):
        i, h = carry
        return i + 1, jnp.tanh((h * p["gain"]) @ p["w"])

    return lax.while_loop(lambda carry: carry[0] < steps, step, (jnp.int32(0), x))[1]


def chosen(p, x):
    h = x * p["gain"]
    return lax.cond(x[0, 0] > 0, lambda h: h @ p["w"] + x, lambda h: jnp.tanh(h) @ p["v"], h)


def seen(activations):
    """(absmax, sum, tokens) over lists of tokens, in float64."""
    rows = np.concatenate(activations).astype(np.float64)
    return np.abs(rows).max(0), np.abs(rows).sum(0), len(rows)


def check(stats, path, activations):
    absmax, total, tokens = seen(activations)
    np.testing.assert_allclose(stats.absmax[path], absmax, rtol=1e-5)
    np.testing.assert_allclose(stats.abs_sum[path], total, rtol=1e-5)
    assert int(stats.count[path]) == int(np.sum(stats.reached[path])) == tokens
    if path in stats.histogram:
        assert int(stats.histogram[path].counts.sum()) == np.concatenate(activations).size


def int8_dots(fn, *args):
    program = jaxprs.of(sq.quantized(fn), *args)
    return [dot.dtypes for dot in jaxprs.dots(program)]


def smoothed_is_the_same(fn, stats, params, *inputs):
    smoothed = sq.smooth(params, stats, 0.5)
    np.testing.assert_allclose(fn(smoothed, *inputs), fn(params, *inputs), rtol=2e-4, atol=1e-5)
    return smoothed


@pytest.mark.slow
def test_a_while_loop_adds_what_every_step_saw():
    stats = sq.calibrate(
        looped, PARAMS, [(X, np.int32(STEPS)), (PLUS, np.int32(0))], histogram=True
    )
    h, activations = X, []
    for _ in range(STEPS):
        activations.append(h * PARAMS["gain"])
        h = np.tanh(activations[-1] @ PARAMS["w"])
    check(stats, "w", activations)
    assert [group.absorbers for group in stats.graph.groups] == [("gain",)]
    smoothed = smoothed_is_the_same(looped, stats, PARAMS, X, np.int32(2))
    assert np.abs(smoothed["gain"] - PARAMS["gain"]).max() > 0.01


def test_of_a_cond_the_branch_that_is_taken_sees():
    with pytest.warns(UserWarning, match=r"no token reached v \(branch 0 of `cond` at .*chosen"):
        stats = sq.calibrate(chosen, PARAMS, [PLUS])
    check(stats, "w", [PLUS * PARAMS["gain"]])
    assert not stats.absmax["v"].any()
    assert not stats.count["v"]
    with pytest.raises(ValueError, match=r"v: calibration saw no token here \(branch 0 of `cond`"):
        sq.quantize(PARAMS, stats, STATIC)
    assert sq.quantize(PARAMS, stats, {"v": sq.W8A8, "w": STATIC})


def test_both_branches_over_two_batches():
    stats = sq.calibrate(chosen, PARAMS, [PLUS, -PLUS, -2 * PLUS], histogram=True)
    check(stats, "w", [PLUS * PARAMS["gain"]])
    check(stats, "v", [np.tanh(-k * PLUS * PARAMS["gain"]) for k in (1, 2)])
    # h feeds the tanh of the other branch, so nothing may be folded into w.
    assert stats.graph.groups == ()


def test_a_gain_that_both_branches_read_is_folded_for_both():
    def fn(p, x):
        h = x * p["gain"]
        return lax.cond(x[0, 0] > 0, lambda h: h @ p["w"], lambda h: jnp.tanh(h @ p["v"]), h)

    stats = sq.calibrate(fn, PARAMS, [PLUS, -PLUS])
    [group] = stats.graph.groups
    assert group.absorbers == ("gain",)
    assert {path for path, _ in group.sites} == {"v", "w"}
    for x in (X, -X):
        smoothed_is_the_same(fn, stats, PARAMS, x)


def both(p, x, steps):
    return looped(p, x, steps), chosen(p, x)


BATCHES = [(x, np.int32(STEPS)) for x in (PLUS, -PLUS)]


@functools.cache
def stats_of_both():
    return sq.calibrate(both, PARAMS, BATCHES)


@pytest.mark.parametrize("scheme", [sq.W8A16, sq.W8A8, STATIC])
def test_loops_and_branches_run_in_int8(scheme):
    qparams = sq.quantize(PARAMS, stats_of_both(), scheme)
    float_fn = jax.jit(both)
    int8_fn = jax.jit(sq.quantized(both))
    for batch in BATCHES:
        got, expected = int8_fn(qparams, *batch), float_fn(PARAMS, *batch)
        for a, b in zip(got, expected, strict=True):
            assert 0 < np.abs(a - b).max() < 0.2
    dots = int8_dots(both, qparams, *BATCHES[0])
    if scheme != sq.W8A16:
        assert dots == [jaxprs.INT8_DOT] * 3
    # The codes go into the loop as they are.
    [loop] = [
        e
        for e in jaxprs.equations(jaxprs.of(sq.quantized(both), qparams, *BATCHES[0]))
        if e.primitive.name == "while"
    ]
    assert "int8" in {v.aval.dtype.name for v in loop.invars}


@pytest.mark.slow
def test_stacks_in_switches_and_scans():
    stack = {"e": normal(3, WIDTH, WIDTH, seed=4)}

    def fn(p, x, i):
        branches = [lambda x, k=k: jnp.tanh(x @ p["e"][k]) for k in range(3)]
        return lax.switch(i, branches, x)

    with pytest.warns(UserWarning, match=r"e\[\(1,\)\] \(branch 1 of `cond` at .* was not taken\)"):
        stats = sq.calibrate(fn, stack, [(X, np.int32(0)), (2 * X, np.int32(2))])
    expected = np.stack([np.abs(X).max(0), np.zeros(WIDTH), np.abs(2 * X).max(0)])
    np.testing.assert_allclose(stats.absmax["e"], expected)
    assert stats.reached["e"].tolist() == [5, 0, 5]

    def layers(p, x):
        def step(x, w):
            once = lambda c: (c[0] + 1, jnp.tanh(c[1] @ w))
            twice = lambda x: lax.while_loop(lambda c: c[0] < 2, once, (0, x))[1]
            return lax.cond(x[0, 0] > 0, twice, lambda x: -x, x), None

        return lax.scan(step, x, p["e"])[0]

    stats = sq.calibrate(layers, stack, [PLUS])
    h, absmax, reached = PLUS, [], []
    for w in stack["e"]:
        taken = h[0, 0] > 0
        rows = [h, np.tanh(h @ w)] if taken else [np.zeros_like(h)]
        absmax.append(np.abs(np.concatenate(rows)).max(0))
        reached.append(10 if taken else 0)
        h = np.tanh(rows[1] @ w) if taken else -h
    np.testing.assert_allclose(stats.absmax["e"], absmax, rtol=1e-5)
    assert stats.reached["e"].tolist() == reached


@pytest.mark.slow
def test_a_loop_that_generates_tokens():
    params = {
        "embed": normal(11, WIDTH, seed=5),
        "value": normal(WIDTH, WIDTH, seed=6),
        "gain": PARAMS["gain"],
        "head": normal(WIDTH, 11, seed=7),
    }

    def generate(p, start, length):
        def step(carry):
            i, tokens, cache = carry
            h = p["embed"][tokens[i]][None]
            cache = lax.dynamic_update_slice(cache, h @ p["value"], (i, 0))
            mixed = cache.sum(0, keepdims=True) / (i + 1).astype(jnp.float32)
            following = jnp.argmax((mixed * p["gain"]) @ p["head"]).astype(jnp.int32)
            return i + 1, tokens.at[i + 1].set(following), cache

        tokens = jnp.zeros(6, jnp.int32).at[0].set(start)
        first = jnp.int32(0), tokens, jnp.zeros((6, WIDTH))
        return lax.while_loop(lambda carry: carry[0] < length, step, first)[1:]

    stats = sq.calibrate(generate, params, [(np.int32(3), np.int32(4))])
    token, rows, mixed = 3, [], []
    for _ in range(4):
        rows.append(params["embed"][token][None])
        cache = np.concatenate(rows) @ params["value"]
        mixed.append(cache.mean(0, keepdims=True) * params["gain"])
        token = int(np.argmax(mixed[-1] @ params["head"]))
    check(stats, "value", rows)
    check(stats, "head", mixed)
    qparams = sq.quantize(params, stats, STATIC)
    dots = int8_dots(generate, qparams, np.int32(3), np.int32(1))
    assert set(dots) == {jaxprs.INT8_DOT}  # some twice: an int8 product of few rows has ways to run


def test_a_mask_is_followed_through_branches():
    def fn(p, x):
        y = lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: jnp.tanh(x @ p["v"]), x)
        return y @ p["last"]

    params = {**PARAMS, "last": PARAMS["w"].T}
    real = np.array([True, True, False, True, False])
    stats = sq.calibrate(fn, params, [PLUS, -PLUS], mask=lambda x: real)
    check(stats, "w", [PLUS[real]])
    check(stats, "last", [(PLUS @ params["w"])[real], np.tanh(-PLUS @ params["v"])[real]])


def test_where_a_loop_loses_the_mask_it_is_said():
    with pytest.warns(UserWarning, match=r"could not be followed to w: `while` at .*looped"):
        sq.calibrate(lambda p, x: looped(p, x, 2), PARAMS, [X], mask=lambda x: np.ones(5, bool))


def test_leaves_that_a_loop_changes_or_a_branch_returns_stay_float():
    def changed(p, x):
        w, _ = lax.while_loop(lambda c: c[1] < 1, lambda c: (2 * c[0], c[1] + 1), (p["w"], x[0, 0]))
        return x @ p["w"] + w.sum() + x @ p["v"]

    def returned(p, x):
        return x @ p["v"] + x @ p["w"], lax.cond(x[0, 0] > 0, lambda w: w, lambda w: -w, p["w"])

    for fn, reason in ((changed, "`while`"), (returned, "what leaves `cond`")):
        stats = sq.calibrate(fn, PARAMS, [X])
        assert [site.path for site in stats.graph.sites] == ["v"]
        assert reason in dict(stats.graph.refused)["w"]


def test_the_test_of_a_loop_is_looked_into():
    def fn(p, x):
        return lax.while_loop(lambda h: (h @ p["w"]).sum() < -1e9, lambda h: h @ p["v"], x)

    with pytest.warns(UserWarning, match=r"reached v \(the body of `while` at .* never ran\)"):
        stats = sq.calibrate(fn, PARAMS, [X])
    check(stats, "w", [X])


def test_every_device_of_a_shard_map_has_a_branch_of_its_own():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def fn(p, x):
        def block(p, x):
            y = lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: jnp.tanh(x @ p["v"]), x)
            return lax.while_loop(lambda h: h.sum() < -1e9, lambda h: h @ p["w"], y)

        split = PartitionSpec("data")
        specs = {"mesh": mesh, "in_specs": (PartitionSpec(), split), "out_specs": split}
        return jax.shard_map(block, **specs)(p, x)

    stats = sq.calibrate(fn, PARAMS, [np.concatenate([PLUS, -2 * PLUS])])
    check(stats, "w", [PLUS])
    check(stats, "v", [2 * PLUS])
