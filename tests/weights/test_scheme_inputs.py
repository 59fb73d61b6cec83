"""Schemes on difficult inputs, outlier channels, gradients, rules and refusals, embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import schemes_in_numpy as oracle
from slow import slow_but

import sqjax as sq
from sqjax.numerics.dots import LONGEST_CONTRACTION
from sqjax.weights.dot_general import quantized_dot_general
from sqjax.weights.quant_weight import Outliers
from sqjax.weights.quantize import quantize_weight

DENSE = (((1,), (0,)), ((), ()))
EPS = 2.0**-23
PRESETS = {
    "W8A8_O1": sq.W8A8_O1,
    "W8A8_O2": sq.W8A8_O2,
    "W8A8_O3": sq.W8A8_O3,
    "W8A8 in groups": sq.W8A8.replace(weight=sq.Int8(group_size=64)),
    "W8A16": sq.W8A16,
    "FP8": sq.FP8,
    "FP8_E5M2": sq.FP8_E5M2,
    "FP8 static in groups": sq.FP8.replace(
        weight=sq.Float8(group_size=32), activation=sq.Static(format="e4m3")
    ),
    "W4A16": sq.W4A16,
    "W4A16_G64": sq.W4A16_G64,
    "W4A8": sq.W4A8,
    "W4A8 static g32": sq.W4A8.replace(
        weight=sq.Int4(group_size=32, zero_point=True, two_level=True), activation=sq.Static()
    ),
    "W4A8 symmetric": sq.Scheme(weight=sq.Int4(group_size=32)),
}
QUICK = ("W8A8_O1", "W8A8_O3", "W8A16", "FP8 static in groups", "W4A16_G64", "W4A8")
presets = pytest.mark.parametrize("name", slow_but(list(PRESETS), *QUICK))


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def fn(p, x):
    return x @ p["layer"]["w"]


def cosine(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def assert_close(got, expected, terms):
    """Within what float32 rounds when it adds up so many terms."""
    assert (
        np.abs(np.asarray(got, np.float64) - expected.out)
        <= (16 + terms) * EPS * expected.magnitude
    ).all()


# Inputs -----------------------------------------------------------------------------------------------------------

INNER = 136


def difficult(kind, scheme):
    """(x, w) of some degenerate kind; w has its outputs first."""
    x, w = (
        np.array(normal(*shape, seed=seed)) for shape, seed in (((4, INNER), 0), ((6, INNER), 1))
    )
    if kind == "zeros":
        x[:] = 0
    elif kind == "a zero row":
        x[1] = 0
    elif kind == "zero weight":
        w[:] = 0
    elif kind == "dead outputs and groups":
        w[:2], w[3, 32:96] = 0, 0
    elif kind == "constant":
        x[:], w[:] = (
            np.array([[1.0], [-3.0], [1e-6], [100.0]]),
            np.array([[0.5], [-2.0], [1e-5], [7.0], [1.0], [-1.0]]),
        )
    elif kind == "one huge channel":
        x[:, 5], w[:, 70] = 1e6, -1e5
    elif kind == "tiny":
        x, w = x * np.float32(1e-20), w * np.float32(1e-15)
    return oracle.settled(x, w, [scheme] if scheme.activation else [], [scheme])


KINDS = (
    "zeros",
    "a zero row",
    "zero weight",
    "dead outputs and groups",
    "constant",
    "one huge channel",
    "tiny",
)


@presets
@pytest.mark.slow
def test_degenerate_activations_and_weights(name):
    scheme = PRESETS[name]

    @jax.jit
    def multiply(x, w):
        weight = quantize_weight(w, (0,), scheme, jnp.max(jnp.abs(x), axis=0))
        return quantized_dot_general(x, weight, DENSE, "w"), weight.tensor.codes().astype(
            jnp.float32
        )

    for kind in KINDS:
        x, w = difficult(kind, scheme)
        got, codes = multiply(jnp.asarray(x), jnp.asarray(w.T))
        expected = oracle.matmul(x, w, scheme)
        np.testing.assert_array_equal(
            np.asarray(codes), oracle.quantize(w, scheme).codes, err_msg=kind
        )
        assert np.isfinite(got).all(), kind
        assert_close(got, expected, INNER)
        if kind in ("zeros", "zero weight"):
            assert not np.any(got)
        if (
            kind == "constant"
            and scheme.weight.fmt.name != "int4"
            and (scheme.activation is None or isinstance(scheme.activation, sq.PerToken))
        ):  # every element is the end of its range
            np.testing.assert_allclose(got, x @ w.T, rtol=1e-5)


@pytest.mark.parametrize("fmt", ["int8", "e4m3", "e5m2"])
def test_static_scales_clip_what_lies_beyond_them(fmt):
    """A float8 cast of such a number would give NaN or infinity."""
    weight = sq.Int8() if fmt == "int8" else sq.Float8(format=fmt)
    scheme = sq.Scheme(weight=weight, activation=sq.Static(format=fmt))
    bound, rng = oracle.BOUNDS[fmt], np.random.default_rng(0)
    x, w = (
        rng.integers(-4, 5, (3, 16)).astype(np.float32),
        rng.integers(-4, 5, (5, 16)).astype(np.float32),
    )
    x[0, 0], x[1, 2], x[2] = 3 * bound, -1.2 * bound, 1e30
    w[:, 3] = 4  # every output's scale
    _, w = oracle.settled(np.zeros((1, 16)), w, [], [scheme])
    weight = quantize_weight(jnp.asarray(w.T), (0,), scheme, jnp.full(16, bound))
    got = jax.jit(lambda x: quantized_dot_general(x, weight, DENSE, "w"))(jnp.asarray(x))
    assert_close(got, oracle.matmul(x, w, scheme, absmax=bound), 16)
    assert_close(got, oracle.matmul(np.clip(x, -bound, bound), w, scheme, absmax=bound), 16)


@pytest.mark.slow
def test_ranges_of_integers_are_divided_exactly():
    """Two levels: every (min, max) of a group. A float quotient of 75 and 15 may lie above 5, and its ceiling is 6."""
    low, high = np.meshgrid(-np.arange(120), np.arange(120), indexing="ij")
    rest = np.linspace(0, 1, 14)
    q = np.rint(low[..., None] + rest * (high - low)[..., None]).reshape(-1, 14)
    q[:, 0], q[:, -1] = low.ravel(), high.ravel()
    w = np.concatenate(
        [q, np.full((len(q), 1), 119), np.full((len(q), 1), -119)], axis=1
    )  # the channel's scale is 1
    w = np.concatenate([w[:, :14], np.zeros((len(q), 2)), w[:, 14:]], axis=1).astype(np.float32)
    expected = oracle.two_level(w, 16)
    for quantize in (
        sq.QTensor.quantize_twice,
        jax.jit(sq.QTensor.quantize_twice, static_argnums=(1, 2)),
    ):
        got = quantize(jnp.asarray(w.T), (0,), 16)
        np.testing.assert_array_equal(got.group_scale[:, 0], expected.step[:, 0])
        np.testing.assert_array_equal(got.zero[:, 0], expected.zero[:, 0])
        np.testing.assert_array_equal(got.values, expected.values)
        error = np.abs(np.asarray(got.codes(), np.int64) - w)
        assert (2 * error <= expected.step).all()
        assert np.abs(np.asarray(got.codes(), np.int64)).max() <= 127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@presets
def test_parameters_that_are_not_finite_are_refused(name, bad):
    params, x = {"layer": {"w": normal(8, 4)}}, normal(2, 8)
    stats = _stats(8, 4)
    broken = {"layer": {"w": params["layer"]["w"].at[1, 2].set(bad)}}
    with pytest.raises(
        ValueError, match=r"^parameter layer/w: 1 of 32 values are NaN or infinite; .*mend"
    ):
        sq.quantize(broken, stats, PRESETS[name])
    assert np.isfinite(sq.quantized(fn)(sq.quantize(params, stats, PRESETS[name]), x)).all()


@functools.lru_cache
def _stats(inner, outputs):
    return sq.calibrate(fn, {"layer": {"w": normal(inner, outputs)}}, [normal(2, inner)])


@presets
def test_contractions_beyond_exact_int32_sums(name):
    scheme, inner = PRESETS[name], LONGEST_CONTRACTION + 1
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, inner), (inner, 1)))
    run = lambda x, w: quantized_dot_general(
        x, quantize_weight(w, (0,), scheme, x[0]), DENSE, "layer/w"
    )
    if (
        scheme.weight.group_size is not None and not oracle.has_two_levels(scheme)
    ) or scheme.weight.fmt.name in oracle.FLOAT8:
        assert jax.eval_shape(run, x, w).shape == (2, 1)  # a sum for each group, or in float32
        return
    with pytest.raises(
        ValueError, match=r"^layer/w: contracts 133145 channels; .* exact up to 133144: split"
    ):
        jax.eval_shape(run, x, w)


# Gradients --------------------------------------------------------------------------------------------------------


@presets
@pytest.mark.slow
def test_the_gradient_for_activations_is_that_of_the_dequantized_weight(name):
    x, w, g = normal(4, INNER), normal(INNER, 6, seed=1), normal(4, 6, seed=2)
    weight = quantize_weight(w, (0,), PRESETS[name], jnp.max(jnp.abs(x), axis=0))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(quantized_dot_general(x, weight, DENSE, "w") * g)))(x)
    expected = np.asarray(g, np.float64) @ np.asarray(sq.dequantize(weight.tensor), np.float64).T
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)
    assert cosine(grad, g @ w.T) > (0.98 if isinstance(PRESETS[name].weight, sq.Int4) else 0.99)
    assert not np.allclose(grad, g @ w.T, rtol=1e-4, atol=1e-4)


# Outlier channels -------------------------------------------------------------------------------------------------

LARGE = [3, 70, 131]
OUTLIERS = {
    "W8A8": sq.W8A8_OUTLIERS,
    "per_tensor": sq.W8A8_OUTLIERS.replace(
        weight=sq.Int8(per_tensor=True), activation=sq.PerTensor()
    ),
    "static": sq.W8A8_OUTLIERS.replace(activation=sq.Static()),
    "in groups": sq.W8A8_OUTLIERS.replace(weight=sq.Int8(group_size=64)),
    "W4A8": sq.W4A8.replace(outliers=6.0),
    "FP8": sq.FP8.replace(outliers=6.0),
}


def with_large_channels(scheme):
    """(x, w): three channels beyond the threshold, with weights that would spoil the others' scales."""
    x, w = np.array(normal(4, INNER)), np.array(normal(6, INNER, seed=1))
    x = np.clip(x, -5, 5)
    x[:, LARGE], w[:, LARGE] = x[:, LARGE] * 40 + 7, w[:, LARGE] * 30
    normal_x, normal_w = x.copy(), w.copy()
    normal_x[:, LARGE], normal_w[:, LARGE] = 0, 0
    settled_x, settled_w = oracle.settled(normal_x, normal_w, [scheme], [scheme])
    settled_x[:, LARGE], settled_w[:, LARGE] = x[:, LARGE], w[:, LARGE]
    return settled_x, settled_w


@pytest.mark.parametrize("name", slow_but(list(OUTLIERS), "static"))
@pytest.mark.slow
def test_outlier_channels_are_multiplied_in_float(name):
    scheme = OUTLIERS[name]
    x, w = with_large_channels(scheme)
    params = {"layer": {"w": jnp.asarray(w.T)}}
    qparams = sq.quantize(params, sq.calibrate(fn, params, [jnp.asarray(x)]), scheme)
    weight = qparams["layer"]["w"]
    assert weight.outliers.channels.tolist() == LARGE
    np.testing.assert_array_equal(weight.outliers.weight, w[:, LARGE])
    assert not np.asarray(weight.tensor.codes(), np.float32)[:, LARGE].any()
    rest = np.where(np.isin(np.arange(INNER), LARGE), 0, w)
    np.testing.assert_array_equal(
        np.asarray(weight.tensor.codes(), np.float32),
        oracle.quantize(rest, scheme).codes.astype(np.float32),
    )
    got = jax.jit(sq.quantized(fn))(qparams, jnp.asarray(x))
    expected = oracle.with_outliers(x, w, scheme, LARGE)
    assert_close(got, expected, INNER)
    np.testing.assert_allclose(got, sq.quantized(fn)(qparams, jnp.asarray(x)), rtol=1e-5, atol=1e-3)
    plain = oracle.matmul(x, w, scheme).out
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert np.abs(got - exact).max() < np.abs(plain - exact).max() / 3


@pytest.mark.slow
def test_without_large_channels_nothing_is_apart():
    params, x = {"layer": {"w": normal(8, 4)}}, jnp.clip(normal(2, 8), -5, 5)
    weight = sq.quantize(params, sq.calibrate(fn, params, [x]), sq.W8A8_OUTLIERS)["layer"]["w"]
    assert weight.outliers is None


@pytest.mark.slow
def test_outliers_at_run_time_smoothing_are_those_of_x_over_s():
    scheme = sq.W8A8_OUTLIERS.replace(smoothing=0.25)
    x, w = with_large_channels(scheme)
    w[:, LARGE[0]] *= 1e-5  # its s is large: no outlier any more
    w[:, 20] *= 1e5  # its s is small: an outlier now
    params = {"layer": {"w": jnp.asarray(w.T)}}
    weight = sq.quantize(params, sq.calibrate(fn, params, [jnp.asarray(x)]), scheme)["layer"]["w"]
    s = np.asarray(weight.smoothing, np.float64)
    found = np.flatnonzero(np.abs(x / s).max(0) > 6)
    assert set(found) == {20, *LARGE[1:]}
    assert weight.outliers.channels.tolist() == found.tolist()
    np.testing.assert_allclose(weight.outliers.weight, (w * s)[:, found], rtol=1e-6)
    got = jax.jit(sq.quantized(fn))({"layer": {"w": weight}}, jnp.asarray(x))
    expected = oracle.with_outliers(x / s, w * s, scheme, found)
    assert (
        np.abs(got - expected.out).max() < 0.005 * np.abs(expected.out).max()
    )  # an element or two round apart
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert (
        1e-6 < np.abs(got - exact).max() / np.abs(exact).max() < 1e-4
    )  # most of it is in the float channels


@pytest.mark.slow
def test_outliers_of_a_smoothed_model_are_those_of_its_own_activations():
    x, w = with_large_channels(sq.W8A8_OUTLIERS)
    params, x = {"norm": jnp.ones(INNER), "w": jnp.asarray(w.T)}, jnp.asarray(x)
    net = lambda p, x: (x * p["norm"][None, :]) @ p["w"]
    stats = sq.calibrate(net, params, [x])
    s = sq.scales(params, stats, 0.25)
    folded, moved = sq.fold(params, stats.graph, s), sq.fold_stats(stats, s)
    weight = sq.quantize(folded, moved, sq.W8A8_OUTLIERS)["w"]
    found = np.flatnonzero(np.abs(x * folded["norm"][None, :]).max(0) > 6)
    assert weight.outliers.channels.tolist() == found.tolist()
    assert 0 < len(found) < INNER
    got = jax.jit(sq.quantized(net))({**folded, "w": weight}, x)
    exact = np.asarray(x, np.float64) @ w.T
    assert 1e-5 < np.abs(got - exact).max() / np.abs(exact).max() < 0.01


@pytest.mark.slow
def test_outliers_are_refused_under_jit():
    params, x = {"layer": {"w": normal(8, 4)}}, normal(2, 8)
    stats = sq.calibrate(fn, params, [x])
    with pytest.raises(
        ValueError, match=r"^layer/w: how many channels exceed 6.0 must be known.*outside jit"
    ):
        jax.jit(lambda p, stats: sq.quantize(p, stats, sq.W8A8_OUTLIERS))(params, stats)


@pytest.mark.slow
def test_every_matrix_of_a_stack_has_its_own_outliers():
    stack = lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"])
    x, params = jnp.clip(normal(2, 5, 16), -5, 5), {"w": normal(2, 16, 4, seed=1)}
    x = x.at[0, :, 3].set(50.0).at[1, :, 7].set(60.0).at[1, :, 9].set(-70.0)
    qparams = sq.quantize(params, sq.calibrate(stack, params, [x]), sq.W8A8_OUTLIERS)
    channels = qparams["w"].outliers.channels
    assert channels.shape == (2, 2)  # as many as the one that has most
    assert 3 in channels[0]
    assert channels[1].tolist() == [7, 9]
    assert isinstance(qparams["w"].outliers, Outliers)
    got, exact = jax.jit(sq.quantized(stack))(qparams, x), stack(params, x)
    assert 1e-6 < np.abs(got - exact).max() / np.abs(exact).max() < 0.005


# Rules ------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def model():
    def net(p, ids):
        x = p["embed"][ids]
        for layer in p["layers"]:
            x = jax.nn.silu(x @ layer["up_proj"]["kernel"]) @ layer["down_proj"]["kernel"]
        return x @ p["lm_head"]["kernel"]

    layer = lambda i: {
        "up_proj": {"kernel": normal(16, 32, seed=i)},
        "down_proj": {"kernel": normal(32, 16, seed=i + 1)},
    }
    params = {
        "embed": normal(11, 16, seed=8),
        "layers": [layer(0), layer(2)],
        "lm_head": {"kernel": normal(16, 11, seed=9)},
    }
    ids = jnp.array([[1, 2, 10], [0, 5, 7]])
    return net, params, ids, sq.calibrate(net, params, [ids])


@pytest.mark.slow
def test_the_first_rule_that_matches_wins():
    net, params, ids, stats = model()
    rules = {
        "lm_head": None,
        "down_proj": sq.W8A16,
        "layers/1": sq.W4A8.replace(weight=sq.Int4(group_size=16, zero_point=True, two_level=True)),
        ".*": sq.W8A8,
    }
    qparams = sq.quantize(params, stats, rules)
    assert qparams["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    assert qparams["embed"] is params["embed"]
    first, second = qparams["layers"]
    for layer in (first, second):
        assert layer["down_proj"]["kernel"].activations is None
        assert layer["down_proj"]["kernel"].tensor.fmt.name == "int8"
    assert (first["up_proj"]["kernel"].activations, first["up_proj"]["kernel"].tensor.fmt.name) == (
        "per_token",
        "int8",
    )
    assert second["up_proj"]["kernel"].tensor.group_scale is not None
    got, exact = jax.jit(sq.quantized(net))(qparams, ids), net(params, ids)
    assert 1e-4 < np.abs(got - exact).max() / np.abs(exact).max() < 0.3


@pytest.mark.slow
def test_a_rule_that_matches_nothing_lists_near_misses():
    _, params, _, stats = model()
    with pytest.raises(
        ValueError, match=r"^quantize rule 'dwn_proj' matches nothing. Near misses: .*down_proj"
    ):
        sq.quantize(params, stats, {"dwn_proj": sq.W8A16, ".*": sq.W8A8})
    with pytest.raises(
        ValueError, match=r"^quantize rule for embeddings 'embd' matches nothing. .*'embed'"
    ):
        sq.quantize(params, stats, {"embd": sq.EMBEDDING_INT8, ".*": sq.W8A8})
    with pytest.raises(
        ValueError, match=r"^quantize rule for embeddings 'lm_head' matches nothing"
    ):
        sq.quantize(params, stats, {"lm_head": sq.EMBEDDING_INT8})


@pytest.mark.slow
def test_groups_that_do_not_fit_several_contracted_axes_name_the_leaf_and_sizes_that_do():
    net = lambda p, x: jnp.einsum("tab,abo->to", x, p["out"]["w"])
    params, x = {"out": {"w": normal(3, 96, 4)}}, normal(2, 3, 96)
    stats = sq.calibrate(net, params, [x])
    with pytest.raises(
        ValueError,
        match=r"^out/w: quantize: groups of 64 do not divide the 96 .* that do: 16, 32, 96",
    ):
        sq.quantize(params, stats, sq.W4A16_G64)
    for size in (32, 96):
        got = jax.jit(sq.quantized(net))(
            sq.quantize(
                params, stats, sq.W4A16.replace(weight=sq.Int4(group_size=size, zero_point=True))
            ),
            x,
        )
        assert 1e-3 < np.abs(got - net(params, x)).max() / np.abs(net(params, x)).max() < 0.2


# Embeddings -------------------------------------------------------------------------------------------------------

HEAD = jnp.ones((4, 3))
TABLES = {
    "int8": sq.EMBEDDING_INT8,
    "int4": sq.EMBEDDING_INT4,
    "int4 in 16s": sq.EMBEDDING_INT4.replace(weight=sq.Int4(group_size=16, zero_point=True)),
}


def beside_a_head(lookup):
    """fn(params, ids) -> (what is looked up, a matmul): `calibrate` wants a site."""
    return lambda p, ids: ((x := lookup(p, ids)), jnp.full((1, 4), x.sum()) @ p["head"])


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.slow
def test_rows_of_a_table_are_gathered_narrow_and_only_they_are_dequantized(name):
    lookup = beside_a_head(lambda p, ids: p["embed"][ids] * 2.0)
    scheme, vocabulary = TABLES[name], 50
    _, table = oracle.settled(np.zeros((1, 72), np.float32), normal(vocabulary, 72), [], [scheme])
    params, ids = {"embed": jnp.asarray(table), "head": HEAD}, jnp.array([[3, 49, 0], [7, 7, -1]])
    qparams = sq.quantize(params, sq.calibrate(lookup, params, [ids]), {"embed": scheme})
    got, _ = jax.jit(sq.quantized(lookup))(qparams, ids)
    assert (got.shape, got.dtype) == ((2, 3, 72), jnp.float32)
    expected = oracle.quantize(table, scheme).floats[np.asarray(ids)] * 2
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    program = jax.make_jaxpr(sq.quantized(lookup))(qparams, ids)
    wide = [v.aval for e in program.eqns for v in e.outvars if v.aval.size >= vocabulary * 72]
    assert not [a for a in wide if jnp.issubdtype(a.dtype, jnp.floating)]


@pytest.mark.slow
@pytest.mark.every_case
def test_rows_out_of_range_follow_the_mode_of_the_lookup():
    table, ids = normal(5, 16), jnp.array([1, 5, 100])
    for mode in ("fill", "clip"):
        lookup = beside_a_head(
            lambda p, ids, mode=mode: jnp.take(p["embed"], ids, axis=0, mode=mode)
        )
        params = {"embed": table, "head": HEAD}
        qparams = sq.quantize(
            params, sq.calibrate(lookup, params, [ids[:1]]), {"embed": sq.EMBEDDING_INT8}
        )
        (got, _), (exact, _) = jax.jit(sq.quantized(lookup))(qparams, ids), lookup(params, ids)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
        np.testing.assert_allclose(got, exact, atol=float(jnp.abs(table).max()) / 127)
    filled = beside_a_head(lambda p, ids: p["embed"].at[ids].get(mode="fill", fill_value=2.5))
    for scheme in TABLES.values():
        params = {"embed": table, "head": HEAD}
        qparams = sq.quantize(params, sq.calibrate(filled, params, [ids]), {"embed": scheme})
        got, _ = jax.jit(sq.quantized(filled))(qparams, ids)
        np.testing.assert_allclose(got[0], table[1], atol=0.3)
        np.testing.assert_array_equal(got[1:], np.full((2, 16), 2.5))


@pytest.mark.slow
def test_a_tied_head_is_a_site_and_no_table():
    tied = lambda p, ids: jnp.tanh(p["embed"][ids]) @ p["embed"].T
    params, ids = {"embed": normal(20, 16)}, jnp.array([1, 2])
    stats = sq.calibrate(tied, params, [ids])
    assert [site.path for site in stats.graph.sites] == ["embed"]
    assert stats.graph.tables == ()
    with pytest.raises(ValueError, match=r"^quantize rule for embeddings 'embed' matches nothing"):
        sq.quantize(params, stats, {"embed": sq.EMBEDDING_INT8})
    for scheme, bound in (
        (sq.W8A8, 0.03),
        (sq.W4A16.replace(weight=sq.Int4(group_size=8, zero_point=True)), 0.3),
    ):
        got = jax.jit(sq.quantized(tied))(sq.quantize(params, stats, scheme), ids)
        assert (
            1e-4 < np.abs(got - tied(params, ids)).max() / np.abs(tied(params, ids)).max() < bound
        )


@pytest.mark.slow
def test_only_leaves_that_are_looked_up_and_nothing_else_are_tables():
    net = beside_a_head(
        lambda p, ids: p["table"][ids] + p["both"][ids] * p["both"].sum() + p["bias"]
    )
    params = {"head": HEAD, "table": normal(6, 4), "both": normal(6, 4), "bias": jnp.ones((1, 4))}
    graph = sq.calibrate(net, params, [jnp.array([1, 2])]).graph
    assert [site.path for site in graph.tables] == ["table"]
    assert [site.path for site in graph.sites] == ["head"]


@pytest.mark.slow
def test_a_function_that_only_looks_rows_up_is_calibrated_for_its_tables():
    fn, params = (
        lambda p, ids: p["e"][ids],
        {"e": jnp.asarray(np.random.default_rng(0).normal(size=(9, 6)), jnp.float32)},
    )
    ids = jnp.array([1, 4, 8])
    qparams = sq.quantize(params, sq.calibrate(fn, params, [ids]), {"e": sq.EMBEDDING_INT8})
    np.testing.assert_allclose(
        sq.quantized(fn)(qparams, ids), sq.dequantize(qparams["e"].tensor)[ids], rtol=1e-6
    )
    assert qparams["e"].tensor.values.dtype == jnp.int8
    with pytest.raises(ValueError, match="no matmul of an activation"):
        sq.calibrate(lambda p, x: x * p["s"][None], {"s": jnp.ones(3)}, [jnp.ones((2, 3))])


@pytest.mark.slow
@pytest.mark.every_case
def test_none_keeps_embeddings_float_too_where_it_comes_first():
    fn = lambda p, ids: p["embed"][ids] @ p["w"]
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in TABLE_SHAPES.items()
    }
    stats = sq.calibrate(fn, params, [jnp.array([1, 4])])
    for rules, narrow in (
        ({".*": None, "embed": sq.EMBEDDING_INT8}, set()),
        ({"embed": None, ".*": sq.W8A8}, {"w"}),
        ({"embed": sq.EMBEDDING_INT8, ".*": None}, {"embed"}),
        ({"w": None, "e": sq.EMBEDDING_INT8}, {"embed"}),
    ):
        qparams = sq.quantize(params, stats, rules)
        assert {name for name, x in qparams.items() if isinstance(x, sq.QuantWeight)} == narrow
    with pytest.raises(
        ValueError, match=r"quantize rule 'embd' matches nothing. Near misses: .*embed"
    ):
        sq.quantize(params, stats, {"embd": None, ".*": sq.W8A8})


TABLE_SHAPES = {"embed": (9, 6), "w": (6, 4)}
