"""Mixtures of experts: one scale vector an expert where each has its own activation; int8 matrix by
matrix; 1 + w.
"""

import functools
import re
import warnings
from typing import Any, NamedTuple

import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax
from slow import slow_but

import sqjax as sq
from sqjax._trees import named_leaves
from sqjax.folding.apply import unfold
from sqjax.folding.find_graph import find_graph
from sqjax.folding.groups import Survey
from sqjax.program.facts import Program
from sqjax.program.trace import trace

EXPERTS, TOKENS, WIDTH, HIDDEN = 3, 8, 4, 6
PRESETS = {"O1": sq.W8A8_O1, "O3": sq.W8A8_O3}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


X = normal(TOKENS, WIDTH)
MIXTURE = {
    "gain": 2 + normal(WIDTH),
    "router": normal(WIDTH, EXPERTS),
    "up": normal(EXPERTS, WIDTH, HIDDEN),
    "down": normal(EXPERTS, HIDDEN, WIDTH),
}


def leaves(tree):
    return dict(zip(*named_leaves(tree)[:2], strict=True))


def calibrate(fn, params, *batches, **kwargs):
    """Without the warning that some expert saw no token, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibrate: no token reached")
        return sq.calibrate(fn, params, batches or [X], **kwargs)


# Programs and their groups ------------------------------------------------------------------------


class Case(NamedTuple):
    """A function, its parameters, its groups: (number of scales, absorbing leaves, sites)."""

    fn: Any
    params: Any
    groups: set


def normed(p, x):
    return x * p["gain"][None]


def chosen(p, h):
    """The most likely expert of every token."""
    return jnp.argmax(h @ p["router"], -1)


def every_expert_sees_all():
    """Dense: all experts run on all tokens, weighed by the router; each has a hidden activation of
    its own.
    """

    def fn(p, x):
        h = normed(p, x)
        odds = jax.nn.softmax(h @ p["router"], -1)
        hidden = jax.nn.relu(jnp.einsum("td,edf->tef", h, p["up"]))
        return jnp.einsum("te,ted->td", odds, jnp.einsum("tef,efd->ted", hidden, p["down"]))

    groups = {(WIDTH, ("gain",), ("router", "up")), (EXPERTS * HIDDEN, ("up",), ("down",))}
    return Case(fn, MIXTURE, groups)


def contracted_with_the_experts():
    """The experts' results are added up by the same einsum: experts and channels are contracted
    together.
    """

    def fn(p, x):
        h = normed(p, x)
        odds = jax.nn.softmax(h @ p["router"], -1)
        hidden = jax.nn.relu(jnp.einsum("td,edf->tef", h, p["up"]))
        return jnp.einsum("tef,efd->td", odds[..., None] * hidden, p["down"])

    return every_expert_sees_all()._replace(fn=fn)


def dispatched_by_a_mask():
    """Every expert gets the tokens that chose it, and zeros; the gain before the router is that of
    all of them.
    """

    def fn(p, x):
        h = normed(p, x)
        mine = jax.nn.one_hot(chosen(p, h), EXPERTS)
        routed = jnp.einsum("te,td->etd", mine, h)
        hidden = jax.nn.relu(jnp.einsum("etd,edf->etf", routed, p["up"]))
        return jnp.einsum("te,etd->td", mine, jnp.einsum("etf,efd->etd", hidden, p["down"]))

    return every_expert_sees_all()._replace(fn=fn)


def dispatched_to_places():
    """Switch's dispatch: (tokens, experts, places), at most four tokens for each expert."""

    def fn(p, x):
        h = normed(p, x)
        mine = jax.nn.one_hot(chosen(p, h), EXPERTS)
        place = (jnp.cumsum(mine, 0) * mine - 1).astype(jnp.int32)
        dispatch = jax.nn.one_hot(place, 4) * mine[..., None]
        routed = jnp.einsum("tec,td->ecd", dispatch, h)
        hidden = jax.nn.relu(jnp.einsum("ecd,edf->ecf", routed, p["up"]))
        return jnp.einsum("tec,ecd->td", dispatch, jnp.einsum("ecf,efd->ecd", hidden, p["down"]))

    return every_expert_sees_all()._replace(fn=fn)


def ragged():
    """Tokens sorted by expert; rows of one array meet different matrices, so all experts share one
    scale vector.
    """

    def fn(p, x):
        h = normed(p, x)
        expert = chosen(p, h)
        order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=EXPERTS)
        hidden = jax.nn.relu(lax.ragged_dot(h[order], p["up"], sizes))
        return jnp.zeros_like(x).at[order].set(lax.ragged_dot(hidden, p["down"], sizes))

    groups = {(WIDTH, ("gain",), ("router", "up")), (HIDDEN, ("up",), ("down",))}
    return Case(fn, MIXTURE, groups)


def beside_a_shared_expert():
    """DeepSeek's: one expert that sees every token joins the routed ones' group."""
    routed = dispatched_by_a_mask()

    def together(p, x):  # one norm for both
        h = normed(p, x)
        ones = {**p, "gain": jnp.ones(WIDTH)}
        return routed.fn(ones, h) + jax.nn.relu(h @ p["shared_up"]) @ p["shared_down"]

    params = {**MIXTURE, "shared_up": normal(WIDTH, 5), "shared_down": normal(5, WIDTH)}
    groups = {
        (WIDTH, ("gain",), ("router", "shared_up", "up")),
        (EXPERTS * HIDDEN, ("up",), ("down",)),
        (5, ("shared_up",), ("shared_down",)),
    }
    return Case(together, params, groups)


def gains_of_their_own():
    """Every expert with a norm of its own, and a bias."""

    def fn(p, x):
        h = x[None] * p["gain"][:, None]
        hidden = jax.nn.relu(jnp.einsum("etd,edf->etf", h, p["up"]) + p["bias"][:, None])
        return jnp.einsum("etf,efd->etd", hidden, p["down"])

    params = {name: MIXTURE[name] for name in ("up", "down")}
    params |= {"gain": 2 + normal(EXPERTS, WIDTH), "bias": normal(EXPERTS, HIDDEN)}
    groups = {(EXPERTS * WIDTH, ("gain",), ("up",)), (EXPERTS * HIDDEN, ("bias", "up"), ("down",))}
    return Case(fn, params, groups)


def mapped():
    """vmap over the experts."""

    def fn(p, x):
        expert = lambda up, down: jax.nn.relu(normed(p, x) @ up) @ down
        return jax.vmap(expert)(p["up"], p["down"])

    params = {name: MIXTURE[name] for name in ("gain", "up", "down")}
    return Case(fn, params, {(WIDTH, ("gain",), ("up",)), (EXPERTS * HIDDEN, ("up",), ("down",))})


def in_a_scan():
    case = dispatched_by_a_mask()
    fn = lambda p, x: lax.scan(lambda x, q: (x + case.fn(q, x), None), x, p)[0]
    params = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), case.params)
    groups = {(2 * WIDTH, ("gain",), ("router", "up")), (2 * EXPERTS * HIDDEN, ("up",), ("down",))}
    return Case(fn, params, groups)


def ragged_in_a_scan():
    case = ragged()
    fn = lambda p, x: lax.scan(lambda x, q: (x + case.fn(q, x), None), x, p)[0]
    params = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), case.params)
    return Case(fn, params, {(2 * size, absorb, sites) for size, absorb, sites in case.groups})


CASES = [
    every_expert_sees_all,
    contracted_with_the_experts,
    dispatched_by_a_mask,
    dispatched_to_places,
    ragged,
    beside_a_shared_expert,
    gains_of_their_own,
    mapped,
    in_a_scan,
    ragged_in_a_scan,
]


@functools.cache
def found(build):
    case = build()
    return case, calibrate(case.fn, case.params)


@pytest.mark.parametrize(
    "build", slow_but(CASES, dispatched_by_a_mask, ragged, every_expert_sees_all)
)
@pytest.mark.slow
def test_groups_are_those_written_by_hand(build):
    case, stats = found(build)
    got = {
        (g.size, tuple(sorted(g.absorbers)), tuple(sorted(p for p, _ in g.sites)))
        for g in stats.graph.groups
    }
    assert got == case.groups
    assert not stats.graph.refused


@pytest.mark.parametrize("build", slow_but(CASES, dispatched_by_a_mask, ragged, in_a_scan))
@pytest.mark.slow
def test_powers_of_two_change_no_bit_and_any_scale_only_rounding(build):
    case, stats = found(build)
    run = jax.jit(
        lambda params, s, x: (folded := sq.fold(params, stats.graph, s), case.fn(folded, x))
    )
    rng, draws = np.random.default_rng(0), []
    for draw in (
        np.ones,
        lambda n: 2.0 ** rng.choice([-3, -2, -1, 1, 2], n),
        lambda n: rng.uniform(0.4, 2.5, n),
    ):
        draws.append({g.name: jnp.asarray(draw(g.size), jnp.float32) for g in stats.graph.groups})
    results = [run(case.params, s, X) for s in draws]
    before, after = leaves(case.params), leaves(results[1][0])
    for path in {path for g in stats.graph.groups for path, _ in g.leaves}:
        assert not np.array_equal(before[path], after[path]), path
    expected, exact, rounded = (out for _, out in results)
    np.testing.assert_array_equal(expected, exact)
    assert np.abs(expected - rounded).max() <= 2e-5 * np.abs(expected).max()


def int8_products(program):
    """The dtypes of every product of int8 numbers, ragged ones included."""
    names = ("dot_general", "ragged_dot_general")
    products = [e for e in jaxprs.equations(program) if e.primitive.name in names]
    dtypes = [
        (*(v.aval.dtype.name for v in e.invars[:2]), e.outvars[0].aval.dtype.name) for e in products
    ]
    return [d for d in dtypes if "int8" in d[0] or "int8" in d[1]]


@pytest.mark.parametrize("scheme", slow_but(["O1", "O3"], "O3"))
@pytest.mark.parametrize("build", slow_but(CASES, ragged_in_a_scan))
@pytest.mark.slow
def test_every_expert_runs_in_int8(build, scheme):
    case, stats = found(build)
    rules = (
        {"router": None} if "router" in case.params else {}
    )  # in float, so that no token changes its expert
    qparams = sq.quantize(case.params, stats, {**rules, "": PRESETS[scheme]})
    expected, got = case.fn(case.params, X), jax.jit(sq.quantized(case.fn))(qparams, X)
    assert 1e-4 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05
    sites = [s.path for s in stats.graph.sites if s.path != "router"]
    assert int8_products(jaxprs.of(sq.quantized(case.fn), qparams, X)) == [jaxprs.INT8_DOT] * len(
        sites
    )


# Statistics and scales of every expert ------------------------------------------------------------


@pytest.mark.slow
def test_every_expert_has_the_statistics_of_its_own_tokens():
    _, stats = found(dispatched_by_a_mask)
    h = np.asarray(normed(MIXTURE, X))
    expert = np.argmax(h @ np.asarray(MIXTURE["router"]), -1)
    assert len(set(expert.tolist())) == EXPERTS
    for e in range(EXPERTS):
        mine = h[expert == e]
        hidden = np.maximum(mine @ np.asarray(MIXTURE["up"][e]), 0)
        np.testing.assert_allclose(stats.absmax["up"][e], np.abs(mine).max(0), rtol=1e-5)
        np.testing.assert_allclose(stats.abs_sum["up"][e], np.abs(mine).sum(0), rtol=1e-5)
        np.testing.assert_allclose(stats.absmax["down"][e], hidden.max(0), rtol=1e-5)
        np.testing.assert_array_equal(
            stats.weight_absmax["down"][e], np.abs(MIXTURE["down"][e]).max(1)
        )
    np.testing.assert_allclose(stats.absmax["router"], np.abs(h).max(0), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
@pytest.mark.slow
def test_scales_of_every_expert_are_the_formula_and_shared_ones_take_the_largest(alpha):
    _, stats = found(dispatched_by_a_mask)
    s = sq.scales(MIXTURE, stats, alpha)
    x, w = np.asarray(stats.absmax["down"]), np.abs(MIXTURE["down"]).max(2)
    own = np.where(x > 0, np.where(x > 0, x, 1) ** alpha / w ** (1 - alpha), 1)
    np.testing.assert_allclose(s["down"].reshape(EXPERTS, HIDDEN), own, rtol=1e-5)
    assert not np.allclose(own[0], own[1])
    (name,) = set(s) - {"down"}
    x = np.maximum(np.asarray(stats.absmax["up"]).max(0), stats.absmax["router"])
    w = np.maximum(np.abs(MIXTURE["up"]).max((0, 2)), np.abs(MIXTURE["router"]).max(1))
    np.testing.assert_allclose(s[name], x**alpha / w ** (1 - alpha), rtol=1e-5)


@pytest.mark.slow
def test_static_scales_are_one_an_expert():
    _, stats = found(dispatched_by_a_mask)
    qparams = sq.quantize(MIXTURE, stats, sq.W8A8_O3)
    np.testing.assert_allclose(
        qparams["down"].input_scale,
        np.asarray(stats.absmax["down"]).max(1) / np.float32(127),
        rtol=1e-6,
    )
    assert qparams["router"].input_scale.shape == ()


# Experts without tokens ---------------------------------------------------------------------------


def avoiding(expert):
    """The router never chooses this expert."""
    case = gains_of_their_own()

    def fn(p, x):
        others = jnp.where(jnp.arange(EXPERTS) == expert, 0.0, 1.0)[:, None, None]
        h = others * x[None] * p["gain"][:, None]
        hidden = others * jax.nn.relu(jnp.einsum("etd,edf->etf", h, p["up"]) + p["bias"][:, None])
        return jnp.einsum("etf,efd->etd", hidden, p["down"])

    return case._replace(fn=fn)


@pytest.mark.slow
def test_experts_without_tokens_keep_a_scale_of_1_and_are_named():
    case = avoiding(1)
    with pytest.warns(
        UserWarning,
        match=r"no token reached up\[\(1,\)\], down\[\(1,\)\]; smoothing scales stay 1",
    ):
        stats = sq.calibrate(case.fn, case.params, [X])
    assert stats.unreached == {"up": ((1,),), "down": ((1,),)}
    s = sq.scales(case.params, stats, 0.5)
    for path, found_ in s.items():
        by_expert = np.asarray(found_).reshape(EXPERTS, -1)
        np.testing.assert_array_equal(by_expert[1], 1)
        assert (by_expert[[0, 2]] != 1).any(1).all(), path
    smoothed = sq.smooth(case.params, stats)
    for path in case.params:
        np.testing.assert_array_equal(smoothed[path][1], case.params[path][1])
        assert not np.array_equal(smoothed[path][0], case.params[path][0])
    qparams = sq.quantize(case.params, stats, sq.W8A8_O3)
    largest = np.asarray(stats.absmax["up"]).max() / np.float32(127)
    np.testing.assert_allclose(qparams["up"].input_scale[1], largest, rtol=1e-6)  # not 0, not 1


@pytest.mark.slow
def test_experts_that_another_batch_reaches_are_not_named():
    """Nor are those of a merge. A site of one matrix is named alone."""
    by_token = lambda p, x: jnp.einsum("etd,edf->etf", x, p["up"])
    params = {"up": MIXTURE["up"]}
    some = jnp.stack([X, 0 * X, X])
    with pytest.warns(UserWarning, match=r"up\[\(1,\)\]"):
        first = sq.calibrate(by_token, params, [some])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = sq.calibrate(by_token, params, [some, jnp.stack([X, X, X])])
        second = sq.calibrate(by_token, params, [jnp.stack([0.5 * X] * EXPERTS)])
    with pytest.warns(UserWarning, match=r"every activation was zero at w \(a norm's gain of 0"):
        flat = sq.calibrate(lambda p, x: 0 * x @ p["w"], {"w": MIXTURE["router"]}, [X])
    assert first.unreached == {"up": ((1,),)}
    assert flat.unreached == {"w": ((),)}
    assert both.unreached == second.unreached == first.merge(second).unreached == {}


@pytest.mark.slow
def test_layers_and_experts_are_named_together():
    def fn(p, x):
        def step(x, q):
            h = x[None] * q["on"][:, None, None]
            return x + jnp.tanh(jnp.einsum("etd,edf->etf", h, q["w"]).sum(0)), None

        return lax.scan(step, x, p)[0]

    params = {
        "on": jnp.array([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]]),
        "w": normal(2, EXPERTS, WIDTH, WIDTH),
    }
    stats = calibrate(fn, params)
    assert stats.unreached == {"w": ((0, 1), (1, 2))}


# int8, against numpy ------------------------------------------------------------------------------


def stacked_operands():
    x = normal(EXPERTS, 5, 16) * 4.0 ** jnp.arange(-1.0, 2.0)[:, None, None]
    x = np.stack([numpy_int8.away_from_ties(m, 1) for m in x])
    w = np.stack([numpy_int8.away_from_ties(m, 0) for m in normal(EXPERTS, 16, 7)])
    return x, w


@pytest.mark.slow
def test_a_stack_of_experts_is_the_integer_product_of_numpy():
    x, w = stacked_operands()
    fn = lambda p, x: jnp.einsum("etd,edf->tef", x, p["w"])
    params = {"w": jnp.asarray(w)}
    qparams = sq.quantize(params, sq.calibrate(fn, params, [jnp.asarray(x)]))
    expected = np.stack([numpy_int8.matmul(x[e], w[e]) for e in range(EXPERTS)], 1)
    got = jax.jit(sq.quantized(fn))(qparams, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - fn(params, x)).max() > 1e-3


@pytest.mark.slow
def test_one_activation_for_all_experts_is_the_integer_product_of_numpy():
    x, w = stacked_operands()
    fn = lambda p, x: jnp.einsum("td,edf->tef", x, p["w"])
    params = {"w": jnp.asarray(w)}
    qparams = sq.quantize(params, sq.calibrate(fn, params, [jnp.asarray(x[0])]))
    expected = np.stack([numpy_int8.matmul(x[0], w[e]) for e in range(EXPERTS)], 1)
    np.testing.assert_allclose(
        jax.jit(sq.quantized(fn))(qparams, jnp.asarray(x[0])), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "sizes", [(5, 5, 5), (15, 0, 0), (0, 4, 11), (0, 0, 15), (7, 0, 8), (3, 3, 3)]
)
@pytest.mark.slow
def test_a_ragged_dot_is_the_integer_product_of_numpy(sizes):
    """Rows beyond the last group give zeros, as lax.ragged_dot's do."""
    x, w = stacked_operands()
    rows, params = x.reshape(15, 16), {"w": jnp.asarray(w)}
    fn = lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes)
    args = jnp.asarray(rows), jnp.asarray(sizes, jnp.int32)
    qparams = sq.quantize(params, calibrate(fn, params, args))
    expert = np.repeat(np.arange(EXPERTS), sizes)
    expected = np.zeros((15, 7), np.float32)
    for row, e in enumerate(expert):
        expected[row] = numpy_int8.matmul(rows[row : row + 1], w[e])
    got = jax.jit(sq.quantized(fn))(qparams, *args)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - fn(params, *args)).max() > 1e-3


@pytest.mark.slow
def test_the_gradient_through_experts_is_the_dequantized_one():
    x, w = stacked_operands()
    params, sizes = {"w": jnp.asarray(w)}, jnp.array([5, 2, 8])
    stacked = lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"])
    rows = lambda p, x: lax.ragged_dot(x, p["w"], sizes)
    gradient = lambda loss: jax.jit(jax.grad(loss))
    for fn, args in ((stacked, jnp.asarray(x)), (rows, jnp.asarray(x.reshape(15, 16)))):
        qparams = sq.quantize(params, sq.calibrate(fn, params, [args]))
        effective = {"w": sq.dequantize(qparams["w"].tensor)}
        got = gradient(lambda x, fn=fn, q=qparams: jnp.sum(sq.quantized(fn)(q, x)))(args)
        expected = gradient(lambda x, fn=fn, p=effective: jnp.sum(fn(p, x)))(args)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        assert not np.allclose(got, 0)


# Gains of 1 + w -----------------------------------------------------------------------------------


def rms(x):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)


COARSE = {"n": jnp.round(normal(WIDTH) * 256) / 256, "w": normal(WIDTH, 5)}


def one_plus(p, x):
    return (rms(x) * (1 + p["n"])[None]) @ p["w"]


OFFSETS = {  # what stands for the gain of a norm, given its leaf; the constant
    "1 + w": (lambda n: 1 + n, 1),
    "w + 1": (lambda n: n + 1.0, 1),
    "ones + w": (lambda n: jnp.ones(WIDTH) + n, 1),
    "cast": (lambda n: 1 + n.astype(jnp.float32), 1),
    "-1 + w": (lambda n: n + -1.0, -1),
    "0.5 + w[None]": (lambda n: 0.5 + n[None], 0.5),  # expanded first, as Gemma's Flax code does
}


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.slow
def test_gains_of_a_constant_plus_w_absorb(name):
    gain, constant = OFFSETS[name]
    fn = lambda p, x: (rms(x) * jnp.reshape(gain(p["n"]), (1, WIDTH))) @ p["w"]
    stats = sq.calibrate(fn, COARSE, [X])
    assert [(g.size, g.absorbers) for g in stats.graph.groups] == [(WIDTH, ("n",))]
    assert dict(stats.graph.offsets) == {"n": constant}
    run = jax.jit(lambda p, s, x: fn(sq.fold(p, stats.graph, {"w": s}), x))
    rng = np.random.default_rng(0)
    expected = run(COARSE, jnp.ones(WIDTH), X)
    np.testing.assert_array_equal(run(COARSE, jnp.array([0.5, 4.0, 2.0, 0.125]), X), expected)
    s = jnp.asarray(rng.uniform(0.3, 3, WIDTH), jnp.float32)
    folded = sq.fold(COARSE, stats.graph, {"w": s})
    np.testing.assert_allclose(
        folded["n"], (COARSE["n"] + constant) / s - constant, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(folded["w"], COARSE["w"] * s[:, None], rtol=1e-6)
    assert np.abs(run(COARSE, s, X) - expected).max() < 1e-6 * np.abs(expected).max() * WIDTH
    back = unfold(folded, stats.graph, {"w": s})
    np.testing.assert_allclose(back["n"], COARSE["n"], atol=1e-6)


@pytest.mark.slow
def test_the_scales_of_an_offset_gain_are_those_of_a_plain_one():
    stats = sq.calibrate(one_plus, COARSE, [X])
    plain = {**COARSE, "n": 1 + COARSE["n"]}
    expected = sq.calibrate(lambda p, x: (rms(x) * p["n"][None]) @ p["w"], plain, [X])
    np.testing.assert_array_equal(stats.absmax["w"], expected.absmax["w"])
    smoothed, other = sq.smooth(COARSE, stats), sq.smooth(plain, expected)
    np.testing.assert_allclose(1 + smoothed["n"], other["n"], rtol=1e-6)
    np.testing.assert_array_equal(smoothed["w"], other["w"])


REFUSED = {  # fn, params, what the reason says
    "0.1 + w": (
        lambda p, x: (rms(x) * (0.1 + p["n"])[None]) @ p["w"],
        r"adds 0\.1, with which a sum can not",
    ),
    "1000 + w": (
        lambda p, x: (rms(x) * (1000 + p["n"])[None]) @ p["w"],
        r"adds 1000, with which a sum can not",
    ),
    "1 + tanh(w)": (
        lambda p, x: (rms(x) * (1 + jnp.tanh(p["n"]))[None]) @ p["w"],
        r"the constant 1\.0",
    ),
    "1 + 2 w": (lambda p, x: (rms(x) * (1 + 2 * p["n"])[None]) @ p["w"], r"the constant 1\.0"),
    "1 + exp(w)": (
        lambda p, x: (rms(x) * (1 + jnp.exp(p["n"]))[None]) @ p["w"],
        r"the constant 1\.0",
    ),
    "1 + w[::-1]": (
        lambda p, x: (rms(x) * (1 + p["n"][::-1])[None]) @ p["w"],
        r"the constant 1\.0",
    ),
    "1 + w of half": (
        lambda p, x: (rms(x)[:, :2] * (1 + p["n"][:2])[None]) @ p["w"][:2],
        r"parts or mixtures",
    ),
    "1 - w": (lambda p, x: (rms(x) * (1 - p["n"])[None]) @ p["w"], r"the constant 1\.0"),
    "w read twice": (
        lambda p, x: (rms(x) * (1 + p["n"])[None]) @ p["w"] + p["n"].sum(),
        r"the constant 1\.0",
    ),
    "the sum read twice": (
        lambda p, x: (rms(x) * (g := 1 + p["n"])[None]) @ p["w"] + g.sum(),
        r"`reduce_sum` at .*adds up its channels",
    ),
    "w returned": (
        lambda p, x: ((rms(x) * (1 + p["n"])[None]) @ p["w"], p["n"]),
        r"the constant 1\.0",
    ),
    "a constant of many values": (
        lambda p, x: (rms(x) * (np.array([1, 2, 1, 1], np.float32) + p["n"])[None]) @ p["w"],
        "a constant captured by fn",
    ),
}


def searched(fn, params, x):
    """Not yet proved: what is refused needs no compilation."""
    return find_graph(Survey.of(Program(trace(fn, params, (x,), {})[0]), {}))


@pytest.mark.parametrize("name", REFUSED)
def test_other_sums_are_refused(name):
    fn, reason = REFUSED[name]
    params = {**COARSE, "first": normal(WIDTH, WIDTH)}
    graph = searched(lambda p, x: fn(p, jnp.tanh(x @ p["first"])), params, X)
    assert not any("n" in dict(g.leaves) for g in graph.groups)
    assert re.search(reason, dict(graph.refused)["w"])


@pytest.mark.parametrize("cast", [False, True])
def test_gains_in_bfloat16_are_refused_with_the_reason(cast):
    """1 + w of a bfloat16 w has eight bits: (1 + w) / s - 1 would round to something else."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), COARSE)
    fn = lambda p, x: one_plus(jax.tree.map(lambda a: a.astype(jnp.float32), p) if cast else p, x)
    graph = searched(fn, params, X if cast else X.astype(jnp.bfloat16))
    assert not graph.groups
    assert re.search(
        r"1 \+ n, in bfloat16 too coarse to rescale: keep this leaf.*float32",
        dict(graph.refused)["w"],
    )


@pytest.mark.slow
def test_a_kernel_that_is_read_as_1_plus_w_absorbs_too():
    fn = lambda p, x: jax.nn.relu(x @ (1 + p["n"])) @ p["w"]
    params = {"n": jnp.round(normal(WIDTH, WIDTH) * 256) / 256, "w": COARSE["w"]}
    stats = sq.calibrate(fn, params, [X])
    assert [(g.absorbers, [p for p, _ in g.sites]) for g in stats.graph.groups] == [(("n",), ["w"])]
    assert [site.path for site in stats.graph.sites] == ["w"]  # 1 + w is not quantized
    s = {"w": jnp.array([0.5, 4.0, 2.0, 0.25])}
    np.testing.assert_array_equal(fn(sq.fold(params, stats.graph, s), X), fn(params, X))
