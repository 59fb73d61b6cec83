"""Histograms and the ranges chosen from them, against what float64 numpy makes of the raw values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but

import sqjax as sq
from sqjax.numerics.formats import E4M3, E5M2, FORMATS, INT4, INT8
from sqjax.numerics.ranges import (
    BINS,
    EDGES,
    Histogram,
    _integral,
    expected_error,
    magnitudes,
    mse_range,
    percentile_range,
)

WIDE = 17 / 16  # the widest bin: upper edge over lower edge
MSE = sq.W8A8_O3.replace(activation=sq.Static(range="mse"))


def rng(*seed):
    return np.random.default_rng(seed)


def values(name, n=40000):
    draw = rng(len(name), n)
    x = {
        "normal": lambda: draw.normal(size=n),
        "laplace": lambda: 1e-4 * draw.laplace(size=n),
        "uniform": lambda: draw.uniform(-3, 3, size=n),
        "heavy": lambda: 50 * draw.standard_t(3, size=n),
        "relu": lambda: np.maximum(draw.normal(size=n) - 1.5, 0),
        "outlier": lambda: np.append(draw.normal(size=n - 1), 60.0),
    }[name]()
    return x.astype(np.float32)


VALUES = ("normal", "laplace", "uniform", "heavy", "relu", "outlier")


def histogram(x):
    return Histogram.of(jnp.asarray(x))


def rounded(u, fmt):
    """The nearest of a format's magnitudes, by the dtype's own rounding where it has one."""
    u = np.minimum(u, fmt.bound)
    return u.astype(fmt.dtype).astype(np.float64) if fmt.floating else np.rint(u)


def raw_error(x, t, fmt):
    """The mean squared error of rounding the nonzero raw values, in float64."""
    u = np.abs(x[x != 0].astype(np.float64))
    scale = float(t) / fmt.bound
    return np.mean((u - scale * rounded(u / scale, fmt)) ** 2)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Histograms -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_counts_are_those_of_numpy():
    """Also of values that are edges, just below edges, subnormal, zero, and beyond all bins."""
    below = np.nextafter(EDGES, np.float32(0))
    spread = np.exp2(rng(0).uniform(-40, 40, 5000)).astype(np.float32)
    x = np.concatenate([EDGES, -below, spread, -spread, np.float32([0, 1e-40, 3e38, -3e38])])
    expected, _ = np.histogram(np.abs(x), np.append(EDGES[:-1], np.float32(np.inf)))
    got = histogram(x)
    np.testing.assert_array_equal(got.low, expected)
    np.testing.assert_array_equal(got.counts, expected)
    assert float(got.absmax) == np.float32(3e38)
    same(got, jax.jit(Histogram.of)(jnp.asarray(x)))


@pytest.mark.slow
def test_stacks_have_histograms_of_their_own():
    x = rng(1).normal(size=(2, 3, 50)).astype(np.float32)
    got = Histogram.of(jnp.asarray(x), batch=2)
    assert got.low.shape == (2, 3, BINS)
    for i in np.ndindex(2, 3):
        same(jax.tree.map(lambda a, i=i: a[i], got), histogram(x[i]))
    np.testing.assert_array_equal(
        mse_range(got), [[mse_range(histogram(x[i, j])) for j in range(3)] for i in range(2)]
    )
    np.testing.assert_array_equal(
        percentile_range(got, 0.9),
        [[percentile_range(histogram(x[i, j]), 0.9) for j in range(3)] for i in range(2)],
    )


@pytest.mark.slow
def test_histograms_merge_by_plus():
    parts = [values(name, 1000) for name in VALUES]
    whole = histogram(np.concatenate(parts))
    forwards = sum(map(histogram, parts[1:]), histogram(parts[0]))
    backwards = sum(map(histogram, parts[-2::-1]), histogram(parts[-1]))
    same(whole, forwards)
    same(whole, backwards)
    same(whole, whole + Histogram.empty())


def test_counts_are_exact_beyond_32_bits():
    one = Histogram.counted(jnp.full(BINS, 3_000_000_000, jnp.uint32), jnp.float32(1))
    total = one + one + one
    assert int(total.high[0]) * 2**32 + int(total.low[0]) == 9_000_000_000
    np.testing.assert_allclose(total.counts, 9e9, rtol=2**-24)


# Percentiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.3, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("name", slow_but(list(VALUES), "heavy", "outlier"))
@pytest.mark.slow
def test_a_percentile_is_reached_and_not_passed_by_a_bin(name, p):
    x = np.abs(values(name))
    x = np.sort(x[x > 0])
    t = float(percentile_range(histogram(values(name)), p))
    assert np.mean(x <= t) >= p
    exact = x[int(np.ceil(p * len(x) - 1e-6)) - 1]
    assert exact <= t <= min(exact * WIDE, x[-1])
    assert p < 1 or t == x[-1]


@pytest.mark.slow
def test_percentiles_of_nothing_and_of_almost_nothing():
    assert float(percentile_range(Histogram.empty(), 0.99)) == 0
    assert float(percentile_range(histogram(np.float32([0, 1e-12, 0])), 0.5)) == np.float32(1e-12)
    assert float(percentile_range(histogram(np.float32([3e38, 1e38])), 0.4)) == np.float32(3e38)


@pytest.mark.parametrize("p", [0.0, -0.1, 99.99])
def test_a_percentile_is_a_fraction(p):
    with pytest.raises(ValueError, match=r"expected a fraction in \(0, 1\], got"):
        percentile_range(Histogram.empty(), p)


# Least squared error --------------------------------------------------------------------------------------------------


def test_the_magnitudes_of_every_format():
    np.testing.assert_array_equal(magnitudes(INT8), range(128))
    np.testing.assert_array_equal(magnitudes(INT4), range(8))
    for fmt, smallest, number in ((E4M3, 2.0**-9, 127), (E5M2, 2.0**-16, 124)):
        grid = magnitudes(fmt)
        assert (grid[0], grid[1], grid[-1], len(grid)) == (0, smallest, fmt.bound, number)
        assert (np.diff(grid) > 0).all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_integral_of_the_squared_error(fmt):
    """Against a sum over many small steps, from far below the smallest step to far beyond the largest magnitude."""
    smallest = magnitudes(fmt)[1]
    for low, high in (
        (0, smallest / 3),
        (0, 1.3 * smallest),
        (2.2, 5.1),
        (0.8 * fmt.bound, 3 * fmt.bound),
    ):
        edges = np.linspace(low, high, 200_001)
        u = (edges[1:] + edges[:-1]) / 2
        expected = np.mean((u - rounded(u, fmt)) ** 2) * (high - low)
        got = np.diff(np.asarray(_integral(jnp.float32([low, high]), fmt), np.float64))[0]
        np.testing.assert_allclose(got, expected, rtol=2e-4)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", slow_but(list(VALUES), "heavy", "outlier"))
@pytest.mark.slow
def test_the_expected_error_is_that_of_the_raw_values(name, fmt):
    """Within what 40000 draws vary, for ranges from the absmax down to where most is clipped."""
    x = values(name)
    for shrink in (1.0, 0.7, 0.3, 0.05):
        t = np.abs(x).max() * np.float32(shrink)
        got = float(expected_error(histogram(x), jnp.float32(t), fmt))
        np.testing.assert_allclose(got, raw_error(x, t, fmt), rtol=0.06)


def brute_force(x, fmt):
    """(range, error) of least error of the raw values: for integers in finer steps than `mse_range` tries."""
    steps = 16 if fmt.floating else 32
    tried = np.abs(x).max() * 2.0 ** (-np.arange(6 * steps) / steps)
    errors = [raw_error(x, t, fmt) for t in tried]
    return tried[np.argmin(errors)], min(errors)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", slow_but(list(VALUES), "heavy", "outlier"))
@pytest.mark.slow
def test_the_range_of_least_error_is_that_of_the_raw_values(name, fmt):
    """Within a bin, and never worse than absmax. Float8, whose error has many minima: within 3% of those tried."""
    x = values(name)
    t = float(mse_range(histogram(x), fmt))
    best, least = brute_force(x, fmt)
    largest = np.abs(x).max()
    error, of_absmax = raw_error(x, t, fmt), raw_error(x, largest, fmt)
    assert 0 < t <= largest
    if fmt.floating:
        assert error <= 1.03 * least
    else:
        assert error <= of_absmax
        assert error <= 1.02 * least
        assert 1 / WIDE <= t / best <= WIDE
    if name == "outlier" and fmt == INT4:  # with absmax all others become 0
        assert error < of_absmax / 3


@pytest.mark.slow
@pytest.mark.every_case
def test_by_its_own_account_it_never_loses_to_absmax():
    for name in VALUES:
        for fmt in FORMATS.values():
            h = histogram(values(name))
            assert expected_error(h, mse_range(h, fmt), fmt) <= expected_error(h, h.absmax, fmt)


@pytest.mark.parametrize(
    "x", [[0.0, 1.0, 1.0, 1.0], [1e-12, -1e-11], [0.0], [2e38, -3e38], [5.0]], ids=lambda x: str(x)
)
@pytest.mark.slow
def test_values_that_absmax_serves_best_keep_it(x):
    x = np.float32(x)
    for fmt in FORMATS.values():
        assert float(mse_range(histogram(x), fmt)) == np.abs(x).max()


# Calibration ----------------------------------------------------------------------------------------------------------

WIDTH = 6
PARAMS = {
    name: jnp.asarray(rng(i).normal(size=shape), jnp.float32)
    for i, (name, shape) in enumerate({"gain": (WIDTH,), "a": (WIDTH, 8), "b": (8, 3)}.items())
}
BATCHES = [jnp.asarray(rng(9, n).normal(size=(n, WIDTH)), jnp.float32) for n in (5, 3, 8)]


def fn(p, x):
    return jax.nn.relu((x * p["gain"][None]) @ p["a"]) @ p["b"]


@functools.cache
def of_all_batches(histogram):
    return sq.calibrate(fn, PARAMS, BATCHES, histogram=histogram)


def calibrated(batches=BATCHES, params=PARAMS, **options):
    return sq.calibrate(fn, params, batches, histogram=True, **options)


def activations(x):
    h = x * PARAMS["gain"][None]
    return {"a": h, "b": jax.nn.relu(h @ PARAMS["a"])}


@pytest.mark.slow
def test_a_site_has_the_histogram_of_its_activations():
    stats = of_all_batches(True)
    seen = activations(jnp.concatenate(BATCHES))
    assert set(stats.histogram) == {"a", "b"}
    same(stats.histogram["a"], Histogram.of(seen["a"]))  # a product by itself: the same bits
    assert int(stats.histogram["b"].low.sum()) == np.count_nonzero(seen["b"])
    np.testing.assert_allclose(stats.histogram["b"].absmax, seen["b"].max(), rtol=1e-6)
    moved = np.cumsum(stats.histogram["b"].counts) - np.cumsum(Histogram.of(seen["b"]).counts)
    assert np.abs(moved).max() <= 1  # matmuls of other shapes may round over an edge


@pytest.mark.slow
def test_histograms_are_off_unless_asked_for_and_change_nothing_else():
    plain, stats = of_all_batches(False), of_all_batches(True)
    assert plain.histogram == {}
    for name in ("absmax", "abs_sum", "count", "weight_absmax", "folded"):
        same(getattr(plain, name), getattr(stats, name))
    assert plain.graph == stats.graph


@pytest.mark.slow
def test_merged_statistics_are_those_of_both_calibrations():
    first, second, both = calibrated(BATCHES[:1]), calibrated(BATCHES[1:]), of_all_batches(True)
    merged = jax.jit(sq.Stats.merge)(first, second)
    same(merged.histogram, both.histogram)
    same(merged.histogram, second.merge(first).histogram)
    assert jax.tree.structure(first) == jax.tree.structure(merged) == jax.tree.structure(both)
    assert jax.eval_shape(sq.Stats.merge, first, second).histogram["a"].low.dtype == jnp.uint32


@pytest.mark.slow
def test_padding_is_in_no_bin():
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    real = np.asarray(rng(3).normal(size=(2, 3, WIDTH)), np.float32)
    padded = jnp.asarray(np.where(mask[..., None], real, 1e6), jnp.float32)
    apply = lambda p, x: (x * p["gain"][None, None]) @ p["a"]
    got = sq.calibrate(apply, PARAMS, [padded], mask=lambda x: mask, histogram=True).histogram["a"]
    same(got, Histogram.of(jnp.asarray(real[mask]) * PARAMS["gain"][None]))
    assert sq.calibrate(apply, PARAMS, [padded], histogram=True).histogram["a"].absmax > 1e5


@pytest.mark.slow
@pytest.mark.every_case
def test_every_layer_of_a_scan_has_its_own():
    stack = {name: jnp.stack([x, 10 * x]) for name, x in PARAMS.items() if name != "b"}
    shared = {"stack": stack, "out": jnp.asarray(rng(4).normal(size=(8, WIDTH)), jnp.float32)}

    def layers(p, x):
        step = lambda x, q: (jnp.tanh(((x * q["gain"][None]) @ q["a"]) @ p["out"]), None)
        return lax.scan(step, x, p["stack"])[0]

    stats = sq.calibrate(layers, shared, BATCHES[:1], histogram=True)
    x, of_shared = BATCHES[0], Histogram.empty()
    for layer in range(2):
        h = x * stack["gain"][layer][None]
        own = jax.tree.map(lambda a, i=layer: a[i], stats.histogram["stack/a"])
        assert int(own.low.sum()) == h.size
        assert np.abs(np.cumsum(own.counts) - np.cumsum(Histogram.of(h).counts)).max() <= 1
        np.testing.assert_allclose(own.absmax, np.abs(h).max(), rtol=1e-5)
        of_shared += Histogram.of(h @ stack["a"][layer])
        x = jnp.tanh((h @ stack["a"][layer]) @ shared["out"])
    assert stats.histogram["out"].low.shape == (BINS,)  # read by both layers: one histogram of both
    assert np.abs(np.cumsum(stats.histogram["out"].counts) - np.cumsum(of_shared.counts)).max() <= 2
    ranges = sq.quantize(shared, stats, sq.W8A8_O3.replace(activation=sq.Static(range=0.5)))[
        "stack"
    ]["a"].input_scale
    np.testing.assert_allclose(
        ranges * 127, percentile_range(stats.histogram["stack/a"], 0.5), rtol=1e-6
    )


@pytest.mark.slow
def test_every_expert_has_its_own_and_one_without_tokens_takes_the_absmax_of_all():
    """Dispatched by a mask: rows of zeros for the tokens of others do not move an expert's percentile."""
    up = jnp.asarray(rng(5).normal(size=(3, WIDTH, 4)), jnp.float32)
    x = jnp.concatenate(BATCHES)
    expert = np.arange(16) % 2  # none for the third
    sent = jnp.asarray(expert[None] == np.arange(3)[:, None], jnp.float32)
    apply = lambda p, x: jnp.einsum("etd,edf->etf", sent[:, :, None] * x[None], p["up"])
    with pytest.warns(UserWarning, match="no token reached"):
        stats = sq.calibrate(apply, {"up": up}, [x], histogram=True)
    scale = sq.quantize({"up": up}, stats, sq.W8A8_O3.replace(activation=sq.Static(range=0.75)))[
        "up"
    ].input_scale
    for e in range(2):
        own = Histogram.of(x[expert == e])
        same(jax.tree.map(lambda a, e=e: a[e], stats.histogram["up"]), own)
        np.testing.assert_allclose(scale[e] * 127, percentile_range(own, 0.75), rtol=1e-6)
    # No histogram says what the third would see, so it is lent all that the others saw.
    np.testing.assert_allclose(scale[2] * 127, np.abs(x).max(), rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.slow
@pytest.mark.every_case
def test_sharded_batches_count_as_on_one_device(kind):
    mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices("cpu")[:2])
    x = BATCHES[2]
    with jax.set_mesh(mesh):
        cut = jax.device_put(x, NamedSharding(mesh, P("data")))
        stats = sq.calibrate(
            fn, jax.device_put(PARAMS, NamedSharding(mesh, P())), [cut], histogram=True
        )
    same(jax.device_get(stats.histogram["a"]), jax.device_get(calibrated([x]).histogram["a"]))


@pytest.mark.slow
@pytest.mark.every_case
def test_a_shard_map_counts_as_one_device():
    """Rows of the second weight, and its activation's channels, on two devices; the first's activation counts once."""
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
    specs = {"gain": P(), "a": P(None, "model"), "b": P("model")}
    cut = jax.shard_map(
        lambda p, x: lax.psum(fn(p, x), "model"), mesh=mesh, in_specs=(specs, P()), out_specs=P()
    )
    got, expected = sq.calibrate(cut, PARAMS, BATCHES[:1], histogram=True), calibrated(BATCHES[:1])
    for path in ("a", "b"):
        np.testing.assert_array_equal(
            got.histogram[path].low.sum(), expected.histogram[path].low.sum()
        )
        moved = np.cumsum(got.histogram[path].counts) - np.cumsum(expected.histogram[path].counts)
        assert np.abs(moved).max() <= 1


# Schemes --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_static_scales_cover_the_range():
    stats = of_all_batches(True)
    for how, expected in (("mse", mse_range), (0.9, lambda h: percentile_range(h, 0.9))):
        scheme = sq.W8A8_O3.replace(activation=sq.Static(range=how))
        eager, jitted = (
            run(PARAMS, stats) for run in (_quantize(scheme), jax.jit(_quantize(scheme)))
        )
        for path in ("a", "b"):
            t = expected(stats.histogram[path])
            assert 0 < t < stats.absmax[path].max() or how == "mse"
            np.testing.assert_allclose(eager[path].input_scale, t / 127, rtol=1e-6)
            np.testing.assert_allclose(jitted[path].input_scale, t / 127, rtol=1e-6)
            np.testing.assert_allclose(stats.input_range(path, how), t, rtol=1e-6)
    same(
        _quantize(sq.W8A8_O3.replace(activation=sq.Static(range=1.0)))(PARAMS, stats),
        _quantize(sq.W8A8_O3)(PARAMS, stats),
    )
    assert float(stats.input_range("a")) == float(stats.absmax["a"].max())


def _quantize(scheme):
    return lambda params, stats: sq.quantize(params, stats, scheme)


@pytest.mark.slow
def test_clipping_a_planted_outlier_beats_absmax():
    """One value of a million is 300 times as large as the others: with absmax most of them become 0."""
    x = rng(6).normal(size=(4096, 256)).astype(np.float32)
    x[7, 11] = 300.0
    params = {"w": jnp.asarray(rng(7).normal(size=(256, 16)) / 16, jnp.float32)}
    apply = lambda p, x: x @ p["w"]
    stats = sq.calibrate(apply, params, list(jnp.asarray(x).reshape(4, 1024, 256)), histogram=True)
    exact = x.astype(np.float64) @ np.asarray(params["w"], np.float64)

    def error(how):
        qparams = sq.quantize(params, stats, sq.W8A8_O3.replace(activation=sq.Static(range=how)))
        got = np.asarray(jax.jit(sq.quantized(apply))(qparams, jnp.asarray(x)), np.float64)
        return np.mean((got - exact)[np.arange(4096) != 7] ** 2) / np.mean(
            exact[np.arange(4096) != 7] ** 2
        )

    assert error("absmax") > 0.3
    assert error("mse") < error("absmax") / 10
    assert error(0.9999) < 1e-3


@pytest.mark.slow
def test_the_range_of_least_error_has_less_error_in_the_output_than_absmax():
    """A milder outlier, all rows counted: clipping must earn what it costs."""
    x = rng(8).normal(size=(4096, 64)).astype(np.float32)
    x[5, 3] = 60.0
    params = {"w": jnp.asarray(rng(9).normal(size=(64, 16)) / 8, jnp.float32)}
    apply = lambda p, x: x @ p["w"]
    stats = sq.calibrate(apply, params, [jnp.asarray(x)], histogram=True)
    exact = x.astype(np.float64) @ np.asarray(params["w"], np.float64)
    errors = {}
    for how in ("absmax", "mse", 0.9999):
        qparams = sq.quantize(params, stats, sq.W8A8_O3.replace(activation=sq.Static(range=how)))
        errors[how] = np.mean(
            (np.asarray(jax.jit(sq.quantized(apply))(qparams, jnp.asarray(x))) - exact) ** 2
        )
    assert errors["mse"] < 0.6 * errors["absmax"]
    assert errors["mse"] < errors[0.9999]


@pytest.mark.slow
def test_refusals_of_schemes():
    plain = of_all_batches(False)
    for how in ("mse", 0.999):
        with pytest.raises(
            ValueError, match=r"^a: the range .* call calibrate\(\.\.\., histogram=True\)"
        ):
            sq.quantize(PARAMS, plain, sq.W8A8_O3.replace(activation=sq.Static(range=how)))
    of_x = "any other range comes from the histogram of X, not of X / s"
    with pytest.raises(ValueError, match=f"^Scheme.activation: expected range='absmax' .*{of_x}"):
        MSE.replace(smoothing=0.5)
    with pytest.raises(ValueError, match=rf"^b: Scheme.activation: .*{of_x}"):
        sq.smoothquant(fn, PARAMS, BATCHES, scheme=MSE, groups="^a$", runtime=0.5)
    with pytest.raises(ValueError, match=r"range comes from .* of X without outliers"):
        MSE.replace(outliers=6.0)


@pytest.mark.slow
def test_the_range_is_that_of_the_activations_format():
    stats = of_all_batches(True)
    fp8 = sq.FP8.replace(activation=sq.Static(range="mse", format="e4m3"))
    scale = sq.quantize(PARAMS, stats, fp8)["a"].input_scale
    np.testing.assert_allclose(scale * E4M3.bound, mse_range(stats.histogram["a"], E4M3), rtol=1e-6)


@pytest.mark.slow
def test_what_can_not_be_merged():
    plain, stats = of_all_batches(False), of_all_batches(True)
    with pytest.raises(ValueError, match="merge: one of the two Stats has no histograms"):
        plain.merge(stats)
    s = sq.scales(PARAMS, stats)
    with pytest.raises(ValueError, match="merge: the two Stats are of other parameters at a"):
        stats.merge(sq.fold_stats(stats, s))
    with pytest.raises(ValueError, match="merge: the two Stats are of other parameters at a"):
        stats.merge(calibrated(params=sq.fold(PARAMS, stats.graph, s)))
    folded = sq.fold_stats(stats, s)
    np.testing.assert_array_equal(folded.merge(folded).absmax["a"], folded.absmax["a"])


# Smoothing ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_histogram_serves_only_where_nothing_was_smoothed():
    stats = of_all_batches(True)
    only_b = sq.scales(PARAMS, stats, groups="^b$")
    assert set(only_b) == {"b"}
    ones = {"a": jnp.ones(WIDTH)}
    smoothed, folded = (
        sq.fold(PARAMS, stats.graph, only_b | ones),
        sq.fold_stats(stats, only_b | ones),
    )
    qparams = sq.quantize(smoothed, folded, {"a": MSE, "b": sq.W8A8_O3})
    np.testing.assert_allclose(
        qparams["a"].input_scale * 127, mse_range(stats.histogram["a"]), rtol=1e-6
    )
    with pytest.raises(
        ValueError,
        match=r"^b: the range 'mse' needs a histogram of its activation X / s.*calibrate",
    ):
        sq.quantize(smoothed, folded, MSE)
    derive = jax.jit(
        lambda s: sq.quantize(sq.fold(PARAMS, stats.graph, s), sq.fold_stats(stats, s), MSE)
    )
    traced = derive(only_b | ones)  # where values can not be checked, a range of NaN
    assert np.isnan(traced["b"].input_scale)
    np.testing.assert_allclose(traced["a"].input_scale, qparams["a"].input_scale, rtol=1e-6)
    assert jax.tree.structure(folded) == jax.tree.structure(stats)


@pytest.mark.parametrize(
    "scheme",
    [MSE, {"a": sq.W8A8_O3.replace(activation=sq.Static(range=0.9)), "": sq.W8A8}],
    ids=["mse", "rules"],
)
@pytest.mark.slow
@pytest.mark.every_case
def test_smoothquant_calibrates_the_smoothed_parameters(scheme):
    """From an iterator of batches; the same as by hand, step by step."""
    stats = of_all_batches(False)
    smoothed = sq.smooth(PARAMS, stats, 0.5)
    again = calibrated(params=smoothed)
    same(
        sq.smoothquant(fn, PARAMS, iter(BATCHES), 0.5, scheme), sq.quantize(smoothed, again, scheme)
    )
    t = again.input_range("a", "mse")
    assert not np.allclose(t, mse_range(of_all_batches(True).histogram["a"]), rtol=1e-3)
