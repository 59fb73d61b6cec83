"""Scales against the formula in float64 numpy; folding of parameters and of statistics; what is refused."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sqjax as sq
from sqjax._trees import named_leaves
from sqjax.folding.apply import expand, unfold
from sqjax.models import LlamaConfig, Model
from sqjax.numerics.smoothing import smoothing_scales


class Calibrated(NamedTuple):
    """A function with its parameters, its batches and their statistics."""

    fn: Any
    params: Any
    batches: list
    stats: sq.Stats


def draw(rng, *shape, spread=1.0):
    """Normal numbers whose last axis has outlier channels."""
    return jnp.asarray(
        rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape[-1:])), jnp.float32
    )


def two_layers(p, x):
    """norm -> q, k; q -> ReLU -> down; a head behind a tanh: two groups."""
    h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["norm"][None]
    return jnp.tanh(jax.nn.relu(h @ p["q"]) @ p["down"] + h @ p["k"]) @ p["head"]


@functools.cache
def small():
    rng = np.random.default_rng(0)
    params = {
        "norm": draw(rng, 6),
        "q": draw(rng, 6, 8),
        "k": draw(rng, 6, 3),
        "down": draw(rng, 8, 3),
        "head": draw(rng, 3, 2),
    }
    batches = [draw(rng, 5, 6), draw(rng, 7, 6), draw(rng, 5, 6)]
    return Calibrated(two_layers, params, batches, sq.calibrate(two_layers, params, batches))


@functools.cache
def llama():
    """Grouped queries: v_proj stands in two groups, o_proj's channels are tied."""
    model = Model(LlamaConfig(31, 12, 10, 2, 6, 2, 4))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: draw(rng, *x.shape) if x.ndim == 1 else draw(rng, *x.shape) / x.shape[0] ** 0.5,
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    batches = [jnp.asarray(rng.integers(0, 31, (2, 6))) for _ in range(2)]
    return Calibrated(model.apply, params, batches, sq.calibrate(model.apply, params, batches))


def absmax_of_inputs(batches, params):
    """What two_layers' sites see, in float64."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    norm, hidden = [], []
    for x in (np.asarray(b, np.float64) for b in batches):
        h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["norm"]
        norm.append(h)
        hidden.append(np.maximum(h @ p["q"], 0))
    return np.abs(np.concatenate(norm)).max(0), np.abs(np.concatenate(hidden)).max(0)


def formula(a, w, alpha):
    s = np.maximum(a**alpha / np.maximum(w, 1e-5) ** (1 - alpha), 1e-5)
    return np.where(a > 0, s, 1.0)


def flat(tree):
    return dict(zip(*named_leaves(tree)[:2], strict=True))


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


# Scales ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.slow
def test_scales_are_the_formula(alpha):
    case = small()
    w = {
        name: np.abs(np.asarray(x, np.float64)).max(1)
        for name, x in case.params.items()
        if x.ndim == 2
    }
    norm, hidden = absmax_of_inputs(case.batches, case.params)
    s = sq.scales(case.params, case.stats, alpha)
    assert set(s) == {"q", "down"}
    np.testing.assert_allclose(s["q"], formula(norm, np.maximum(w["q"], w["k"]), alpha), rtol=1e-5)
    np.testing.assert_allclose(s["down"], formula(hidden, w["down"], alpha), rtol=1e-5)
    assert all(x.dtype == jnp.float32 for x in s.values())


magnitudes = st.one_of(st.just(0.0), st.floats(1e-8, 1e6))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(magnitudes, magnitudes), min_size=1, max_size=5), st.floats(0, 1))
@pytest.mark.slow
def test_formula_with_its_floors(pairs, alpha):
    a, w = np.array(pairs, np.float32).T
    got = smoothing_scales(jnp.asarray(a), jnp.asarray(w), alpha)
    np.testing.assert_allclose(
        got, formula(a.astype(np.float64), w.astype(np.float64), alpha), rtol=2e-5
    )


@pytest.mark.parametrize(
    ("a", "w", "alpha", "s"),
    [
        (16.0, 1.0, 0.5, 4.0),
        (16.0, 4.0, 0.5, 2.0),
        (16.0, 4.0, 1.0, 16.0),
        (16.0, 4.0, 0.0, 0.25),
        (1.0, 0.0, 0.0, 1e5),  # the floor under max|W|
        (1e-9, 1e3, 1.0, 1e-5),  # the floor under s
        (0.0, 4.0, 0.5, 1.0),  # a channel that calibration never saw alive
        (0.0, 0.0, 0.0, 1.0),
    ],
)
def test_edge_values(a, w, alpha, s):
    assert smoothing_scales(jnp.float32(a), jnp.float32(w), alpha) == pytest.approx(s, rel=1e-6)


@pytest.mark.slow
def test_a_dead_channel_is_left_alone():
    params = {"norm": jnp.ones(3), "w": jnp.ones((3, 2))}

    def fn(p, x):
        return (x * p["norm"][None]) @ p["w"]

    x = jnp.array([[1.0, 0.0, 64.0]])
    smoothed = sq.smooth(params, sq.calibrate(fn, params, [x]), 0.5)
    np.testing.assert_array_equal(smoothed["norm"], [1, 1, 0.125])
    np.testing.assert_array_equal(smoothed["w"], [[1, 1], [1, 1], [8, 8]])


@pytest.mark.slow
def test_tied_channels_share_the_largest_statistics():
    case = llama()
    graph = case.stats.graph
    group = next(g for g in graph.groups if g.name == "model/layers/0/self_attn/o_proj/kernel")
    a = np.asarray(case.stats.absmax[group.name], np.float64).reshape(2, 3, 4)
    kernel = np.asarray(flat(case.params)[group.name], np.float64)
    w = np.abs(kernel).max(1).reshape(2, 3, 4)
    s = sq.scales(case.params, case.stats, 0.6, groups="o_proj")
    np.testing.assert_allclose(s[group.name], formula(a.max(1), w.max(1), 0.6).ravel(), rtol=1e-5)
    spread = np.asarray(expand(s, graph)[group.name]).reshape(2, 3, 4)
    np.testing.assert_array_equal(spread, np.broadcast_to(spread[:, :1], spread.shape))


def skip(p, x):
    h = x * p["norm"][None]
    return h @ p["a"] + jnp.concatenate([jnp.tanh(x), h], 1) @ p["both"]


@pytest.mark.slow
def test_channels_without_a_scale_take_no_part():
    """A site that reads the norm beside something else: the other channels change neither s nor their statistics."""
    rng = np.random.default_rng(3)
    params = {
        "norm": draw(rng, 4),
        "a": draw(rng, 4, 5),
        "both": draw(rng, 8, 5).at[:4].multiply(1e3),
    }
    x = draw(rng, 6, 4)
    stats = sq.calibrate(skip, params, [x])
    s = sq.scales(params, stats, 0.5)
    a = np.abs(np.asarray(x, np.float64) * np.asarray(params["norm"])).max(0)
    w = np.maximum(np.abs(params["a"]).max(1), np.abs(params["both"][4:]).max(1))
    np.testing.assert_allclose(s["a"], formula(a, w, 0.5), rtol=1e-5)
    np.testing.assert_array_equal(expand(s, stats.graph)["both"], [1, 1, 1, 1, *s["a"]])
    smoothed = sq.fold(params, stats.graph, s)
    np.testing.assert_array_equal(smoothed["both"][:4], params["both"][:4])
    assert sq.verify(skip, params, smoothed, x) < 1e-5
    again, folded = sq.calibrate(skip, smoothed, [x]), sq.fold_stats(stats, s)
    np.testing.assert_allclose(folded.absmax["both"], again.absmax["both"], rtol=2e-5)


# Fold ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fold_multiplies_sites_and_divides_absorbers():
    case = small()
    s = {"q": jnp.arange(1.0, 7.0), "down": jnp.arange(2.0, 10.0)}
    folded = sq.fold(case.params, case.stats.graph, s)
    row, column = np.arange(1.0, 7.0), np.arange(2.0, 10.0)
    old = jax.tree.map(np.asarray, case.params)
    np.testing.assert_allclose(folded["norm"], old["norm"] / row, rtol=1e-6)
    np.testing.assert_allclose(folded["q"], old["q"] * row[:, None] / column, rtol=1e-6)
    np.testing.assert_allclose(folded["k"], old["k"] * row[:, None], rtol=1e-6)
    np.testing.assert_allclose(folded["down"], old["down"] * column[:, None], rtol=1e-6)
    np.testing.assert_allclose(unfold(folded, case.stats.graph, s)["q"], old["q"], rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "alpha"),
    [
        (small, 0.5),
        (llama, 0.85),
        pytest.param(small, 0.85, marks=pytest.mark.slow),
        pytest.param(llama, 0.5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_smoothing_changes_the_parameters_but_not_the_function(case, alpha):
    case = case()
    smoothed = sq.smooth(case.params, case.stats, alpha)
    changed = {path for g in case.stats.graph.groups for path, _ in g.leaves}
    after = flat(smoothed)
    for path, before in flat(case.params).items():
        assert np.array_equal(before, after[path]) == (path not in changed)
    for batch in case.batches:
        assert 0 < sq.verify(case.fn, case.params, smoothed, batch) < 1e-5


@pytest.mark.parametrize("case", [small, pytest.param(llama, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_smoothing_is_pure_and_the_same_under_jit(case):
    case = case()
    before = jax.tree.map(lambda x: np.array(x), (case.params, case.stats))
    eager = sq.smooth(case.params, case.stats, 0.5)
    compiled = jax.jit(lambda p, stats, alpha: sq.smooth(p, stats, alpha))(
        case.params, case.stats, 0.5
    )
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)
    assert_trees_equal(before, jax.tree.map(np.asarray, (case.params, case.stats)))


@pytest.mark.slow
def test_the_order_of_groups_does_not_matter():
    """v_proj is multiplied in its rows by one group and divided in its columns by another."""
    case = llama()
    s = sq.scales(case.params, case.stats, 0.5)
    both = [
        g for g in case.stats.graph.groups if "layers/1/self_attn/v_proj/kernel" in str(g.leaves)
    ]
    assert len(both) == 2
    at_once = flat(sq.fold(case.params, case.stats.graph, s))
    for order in (list(s), list(s)[::-1]):
        folded = case.params
        for name in order:
            folded = sq.fold(folded, case.stats.graph, {name: s[name]})
        for path, leaf in flat(folded).items():
            np.testing.assert_allclose(leaf, at_once[path], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.every_case
def test_powers_of_two_fold_exactly_in_bfloat16():
    case = llama()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params)
    stats = sq.calibrate(case.fn, params, case.batches[:1])
    s = sq.scales(params, stats, 0.5, round_scales="pow2")
    exact = sq.scales(params, stats, 0.5)
    for name, scale in s.items():
        assert np.array_equal(np.log2(scale), np.round(np.log2(scale)))
        assert np.abs(np.log2(scale) - np.log2(exact[name])).max() <= 0.5 + 1e-5
    folded = sq.fold(params, stats.graph, s)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (params, folded)), strict=True)
    )
    run = jax.jit(case.fn)
    np.testing.assert_array_equal(run(params, case.batches[0]), run(folded, case.batches[0]))
    assert_trees_equal(sq.smooth(params, stats, 0.5, round_scales="pow2"), folded)


# Statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "groups"),
    [
        (small, "norm"),
        pytest.param(small, "all", marks=pytest.mark.slow),
        pytest.param(llama, "norm", marks=pytest.mark.slow),
        (llama, "all"),
    ],
)
@pytest.mark.slow
def test_folded_statistics_are_those_of_the_folded_model(case, groups):
    case = case()
    s = sq.scales(case.params, case.stats, 0.7, groups=groups)
    folded = sq.fold_stats(case.stats, s)
    again = sq.calibrate(case.fn, sq.fold(case.params, case.stats.graph, s), case.batches)
    changed = 0
    for site in case.stats.absmax:
        scale = np.abs(again.absmax[site]).max()
        np.testing.assert_allclose(
            folded.absmax[site], again.absmax[site], rtol=2e-5, atol=2e-5 * scale
        )
        np.testing.assert_allclose(
            folded.abs_sum[site], again.abs_sum[site], rtol=2e-5, atol=2e-5 * scale
        )
        assert folded.count[site] == again.count[site]
        changed += not np.allclose(folded.absmax[site], case.stats.absmax[site], rtol=1e-3)
    assert changed == sum(len(g.sites) for g in case.stats.graph.select(groups))


@pytest.mark.slow
def test_statistics_in_numpy():
    case = small()
    norm, hidden = absmax_of_inputs(case.batches, case.params)
    np.testing.assert_allclose(case.stats.absmax["q"], norm, rtol=1e-5)
    np.testing.assert_allclose(case.stats.absmax["k"], norm, rtol=1e-5)
    np.testing.assert_allclose(case.stats.absmax["down"], hidden, rtol=1e-5)
    np.testing.assert_array_equal(
        case.stats.weight_absmax["down"], np.abs(case.params["down"]).max(1)
    )
    assert case.stats.count["q"] == 17


@pytest.mark.parametrize("case", [small, pytest.param(llama, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_merged_halves_are_one_calibration(case):
    case = case()
    first, rest = (
        sq.calibrate(case.fn, case.params, b) for b in (case.batches[:1], case.batches[1:])
    )
    merged = first.merge(rest)
    assert jax.tree.structure(merged) == jax.tree.structure(case.stats)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(case.stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert not np.array_equal(
        first.absmax[case.stats.graph.sites[0].path], merged.absmax[case.stats.graph.sites[0].path]
    )
    assert merged.graph == case.stats.graph


@pytest.mark.slow
def test_scales_come_from_the_extremes_of_all_batches_not_from_their_mean():
    """Averaging s over batches breaks (X / s)(s W) = X W; the maximum over batches is kept."""
    params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}

    def fn(p, x):
        return (x * p["norm"][None]) @ p["w"]

    batches = [jnp.array([[64.0, 1.0]]), jnp.array([[1.0, 4.0]])]
    assert sq.scales(params, sq.calibrate(fn, params, batches), 0.5)["w"].tolist() == [8.0, 2.0]


# alpha and groups ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_alpha_by_name():
    case = llama()
    s = sq.scales(case.params, case.stats, {"layers/1/.*down": 1.0, "down": 0.0, ".*": 0.5})
    exact = {alpha: sq.scales(case.params, case.stats, alpha) for alpha in (0.0, 0.5, 1.0)}
    for name in s:
        alpha = (1.0 if "layers/1" in name else 0.0) if "down" in name else 0.5
        np.testing.assert_array_equal(s[name], exact[alpha][name])


@pytest.mark.slow
def test_a_pattern_may_name_any_site_of_a_group():
    case = small()
    s = sq.scales(case.params, case.stats, {"^k$": 1.0, "down": 0.0})
    np.testing.assert_array_equal(s["q"], sq.scales(case.params, case.stats, 1.0)["q"])


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ("all", {"q", "down"}),
        ("norm", {"q"}),
        ("down", {"down"}),
        (["^q$", "down"], {"q", "down"}),
        (("^k$",), {"q"}),
    ],
)
def test_groups_are_chosen(groups, names):
    case = small()
    stats = case.stats
    assert set(sq.scales(case.params, stats, 0.5, groups=groups)) == names
    smoothed = sq.smooth(case.params, stats, 0.5, groups=groups)
    changed = {path for path, x in smoothed.items() if not np.array_equal(x, case.params[path])}
    assert changed == {path for g in stats.graph.groups if g.name in names for path, _ in g.leaves}


def test_gradient_of_alpha():
    """d loss / d alpha against central differences of the formula in float64."""
    case = small()
    norm, hidden = absmax_of_inputs(case.batches, case.params)
    w = {
        name: np.abs(np.asarray(x, np.float64)).max(1)
        for name, x in case.params.items()
        if x.ndim == 2
    }

    def loss(alpha):
        s = sq.scales(case.params, case.stats, alpha)
        return jnp.log(s["q"]).sum() + (s["down"] ** 2).sum()

    def in_numpy(alpha):
        s = formula(norm, np.maximum(w["q"], w["k"]), alpha), formula(hidden, w["down"], alpha)
        return np.log(s[0]).sum() + (s[1] ** 2).sum()

    expected = (in_numpy(0.6 + 1e-6) - in_numpy(0.6 - 1e-6)) / 2e-6
    assert abs(expected) > 1
    assert jax.jit(jax.grad(loss))(0.6) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_values_that_a_jitted_function_closes_over_are_checked():
    case = small()
    eager = sq.quantize(case.params, case.stats, sq.W8A8_O3)
    staged = jax.jit(lambda: sq.quantize(case.params, case.stats, sq.W8A8_O3))()
    np.testing.assert_array_equal(staged["q"].tensor.values, eager["q"].tensor.values)
    smoothed = sq.smooth(case.params, case.stats, 0.5)
    with pytest.raises(ValueError, match="fold_stats"):
        jax.jit(lambda: sq.quantize(smoothed, case.stats, sq.W8A8_O3))()
    broken = {**case.params, "q": case.params["q"] * jnp.nan}
    with pytest.raises(ValueError, match="parameter q"):
        jax.jit(lambda: sq.scales(broken, case.stats))()


@pytest.mark.slow
def test_gradients_are_finite_where_a_channel_is_dead():
    params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3)).at[1].set(0.0)}

    def fn(p, x):
        return (x * p["norm"][None]) @ p["w"]

    stats = sq.calibrate(fn, params, [jnp.array([[4.0, 0.0]])])

    def size(alpha, params):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(sq.smooth(params, stats, alpha)))

    gradients = jax.grad(size, (0, 1))(0.5, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert abs(gradients[0]) > 0.1


# Refused ---------------------------------------------------------------------------------------------


def renamed(params):
    return {("value" if name == "k" else name): x for name, x in params.items()}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (renamed, r"2 leaves differ(.|\n)*k: expected .*missing(.|\n)*value: not in"),
        (lambda p: {**p, "k": p["k"][:, :2]}, r"k: expected shape \(6, 3\), got \(6, 2\)"),
        (lambda p: {**p, "norm": p["norm"].at[2].set(jnp.nan)}, "parameter norm: 1 of 6 values"),
        (lambda p: {**p, "q": p["q"].at[0].set(-jnp.inf)}, "parameter q: 8 of 48 values"),
    ],
)
@pytest.mark.parametrize("act", [sq.scales, sq.smooth, sq.quantize])
def test_other_parameters_are_refused(act, change, match):
    case = small()
    with pytest.raises(ValueError, match=match):
        act(change(case.params), case.stats)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"alpha": 1.1}, r"alpha: expected a number in \[0, 1\], got 1.1"),
        ({"alpha": -0.1}, "in \\[0, 1\\]"),
        ({"alpha": float("nan")}, "in \\[0, 1\\]"),
        ({"alpha": {"down": 2.0, ".*": 0.5}}, "alpha for 'down'"),
        (
            {"alpha": {"dwn": 0.5, ".*": 0.5}},
            "alpha pattern 'dwn' matches nothing. Near misses: 'down'",
        ),
        ({"alpha": {"down": 0.5}}, r"no pattern matches \['q'\]"),
        ({"alpha": {"(": 0.5}}, "not a regular expression"),
        ({"groups": "dowm"}, "groups pattern 'dowm' matches nothing. Near misses: 'down'"),
        ({"groups": ["q", "none"]}, "'none' matches nothing"),
    ],
)
def test_wrong_arguments_are_refused(arguments, match):
    case = small()
    with pytest.raises(ValueError, match=match):
        sq.scales(case.params, case.stats, **arguments)


@pytest.mark.parametrize(
    ("s", "match"),
    [
        ({"w": jnp.ones(6)}, "no group is named 'w'"),
        ({"q": jnp.ones(5)}, r"expected s of shape \(6,\), got \(5,\)"),
    ],
)
def test_scales_of_another_graph_are_refused(s, match):
    case = small()
    with pytest.raises(ValueError, match=match):
        sq.fold(case.params, case.stats.graph, s)
    with pytest.raises(ValueError, match=match):
        sq.fold_stats(case.stats, s)


GOOD = jnp.ones((2, 6))


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "batches is empty"),
        (iter(()), "batches is empty"),
        ([GOOD.at[0, 0].set(jnp.nan)], "calibration batch 0, input .*1 of 12 values"),
        ([GOOD, (GOOD.at[1].set(jnp.inf),)], "calibration batch 1, input .*6 of 12 values"),
        (
            [jnp.ones((2, 5))],
            r"batch 0: fn\(params, \*batch\) failed on inputs of shapes \(\(2, 5\),\)",
        ),
        ([GOOD, (GOOD, GOOD)], "batch 1: .*one argument, or a tuple"),
    ],
)
@pytest.mark.slow
def test_bad_batches_are_refused(batches, match):
    case = small()
    with pytest.raises(ValueError, match=match):
        sq.calibrate(two_layers, case.params, batches)


@pytest.mark.slow
def test_an_activation_that_overflows_is_refused():
    params = {"norm": jnp.full(6, 1e20), "q": small().params["q"]}
    with pytest.raises(ValueError, match="activation at q: 6 of 6 values"):
        sq.calibrate(lambda p, x: (x * p["norm"][None]) @ p["q"], params, [1e20 * GOOD])


def test_a_function_without_matmuls_is_refused():
    with pytest.raises(ValueError, match="no matmul of an activation"):
        sq.calibrate(lambda p, x: x * p["norm"][None], {"norm": jnp.ones(6)}, [GOOD])


def test_statistics_of_two_programs_do_not_merge():
    other = sq.calibrate(lambda p, x: x @ p["q"], {"q": small().params["q"]}, [GOOD])
    with pytest.raises(ValueError, match="different graphs"):
        small().stats.merge(other)


@pytest.mark.parametrize("groups", ["all", "norm", "down"])
@pytest.mark.slow
def test_static_scales_of_unsmoothed_statistics_are_refused(groups):
    """The trap: perplexity 688 where 51 was right."""
    case = small()
    s = sq.scales(case.params, case.stats, 0.5, groups=groups)
    smoothed, folded = sq.fold(case.params, case.stats.graph, s), sq.fold_stats(case.stats, s)
    with pytest.raises(ValueError, match="fold_stats"):
        sq.quantize(smoothed, case.stats, sq.W8A8_O3)
    with pytest.raises(ValueError, match="fold_stats"):
        sq.quantize(case.params, folded, sq.W8A8_O3)
    sq.quantize(smoothed, case.stats, sq.W8A8)  # dynamic scales need no statistics
    quantized = sq.quantize(smoothed, folded, sq.W8A8_O3)
    for name in ("q", "k", "down"):
        assert float(quantized[name].input_scale) == pytest.approx(
            float(folded.absmax[name].max()) / 127
        )


@pytest.mark.slow
def test_smoothquant_takes_the_mask_of_calibrate():
    fn = lambda p, x, real: (x * p["norm"][None, None]) @ p["w"]
    draw = lambda *shape: jax.random.normal(jax.random.key(1), shape)
    params, x = {"norm": jnp.ones(4), "w": draw(4, 3)}, draw(2, 5, 4)
    real = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])
    x = jnp.where(real[..., None], x, 100.0)
    mask = {"mask": lambda x, real: real}
    got = sq.smoothquant(fn, params, [(x, real)], 0.5, sq.W8A8_O3, **mask)
    stats = sq.calibrate(fn, params, [(x, real)], **mask)
    s = sq.scales(params, stats, 0.5)
    folded = sq.fold(params, stats.graph, s)
    assert_trees_equal(got, sq.quantize(folded, sq.fold_stats(stats, s), sq.W8A8_O3))
    assert float(stats.absmax["w"].max()) < 10


def test_smoothquant_is_the_sequence():
    case = small()
    s = sq.scales(case.params, case.stats, 0.6, groups="norm")
    expected = sq.quantize(
        sq.fold(case.params, case.stats.graph, s), sq.fold_stats(case.stats, s), sq.W8A8_O3
    )
    got = sq.smoothquant(case.fn, case.params, iter(case.batches), 0.6, sq.W8A8_O3, groups="norm")
    assert_trees_equal(got, expected)
    unsmoothed = sq.quantize(case.params, case.stats, sq.W8A8_O3)
    assert not np.array_equal(got["q"].tensor.values, unsmoothed["q"].tensor.values)
