"""Weights to which the function adds something (LoRA, w + a @ b): w in int8, the rest beside it in float."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from traced import normal

import sqjax as sq

X = normal(6, 16).at[:, 3].mul(30)
PARAMS = {"w": normal(16, 12), "a": normal(16, 2), "b": normal(2, 12) / 4, "d": normal(16, 12)}

#: x times a sum with w, and that sum.
WAYS = {
    "merged": lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
    "on the other side": lambda p, x: x @ (p["a"] @ p["b"] + p["w"]),
    "with alpha / r": lambda p, x: x @ (p["w"] + 8 / 2 * (p["a"] @ p["b"])),
    "taken away": lambda p, x: x @ (p["w"] - p["a"] @ p["b"]),
    "taken away from": lambda p, x: x @ (p["a"] @ p["b"] - p["w"]),
    "two of them": lambda p, x: x @ (2.0 * p["d"] @ p["e"] - (p["w"] + p["a"] @ p["b"])),
    "transposed": lambda p, x: ((p["w"] + p["a"] @ p["b"]).T @ x.T).T,
    "reshaped, times a number": lambda p, x: jnp.einsum(
        "ti,ihk->thk", x, -0.5 * (p["w"] + p["a"] @ p["b"]).reshape(16, 3, 4)
    ).reshape(6, 12),
    "part of it": lambda p, x: jnp.tile(x @ (p["w"] + p["a"] @ p["b"])[:, 4:8], 3),
    "behind a barrier": lambda p, x: x @ lax.optimization_barrier(p["w"] + p["a"] @ p["b"]),
    "kept beside it": lambda p, x: x @ p["w"] + x @ p["a"] @ p["b"],
}
SITES = {"kept beside it": {"w", "a", "b"}}


def in_int8(x, w):
    """x @ w in float64, of the integers that int8 gives: a scale for each row, one for each output."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    of_x = np.abs(x).max(1, keepdims=True) / 127
    of_w = np.abs(w).max(0, keepdims=True) / 127
    return np.round(x / of_x) @ np.round(w / of_w) * of_x * of_w


@pytest.mark.slow
def test_the_weight_runs_in_int8_and_what_is_added_in_float():
    """Every way in one program. The reference is fn in float64, but for the one product of int8."""
    params = {name: dict(PARAMS, e=normal(12, 12) / 9) for name in WAYS}
    rules = {f"{name}/(a|b)": None for name in SITES} | {".*": sq.W8A8}

    def fn(p, x):
        return {name: way(p[name], x) for name, way in WAYS.items()}

    stats = sq.calibrate(fn, params, [X])
    sites = {site.path for site in stats.graph.sites}
    expected = {f"{name}/{leaf}" for name in WAYS for leaf in SITES.get(name, "w")}
    assert sites == expected
    for name in WAYS:
        np.testing.assert_array_equal(stats.absmax[f"{name}/w"], np.abs(X).max(0))
    qparams = sq.quantize(params, stats, rules)
    run = sq.quantized(fn)
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, X))]
    assert dots.count(jaxprs.INT8_DOT) == len(WAYS)
    got = jax.jit(run)(qparams, X)
    # Each way is affine in w: what it is at w = 0, and what the product with w adds to that.
    product = in_int8(X, PARAMS["w"])
    for name, way in WAYS.items():
        without_w = way(params[name] | {"w": jnp.zeros((16, 12))}, X)
        expected = without_w + _of_product(name, product)
        np.testing.assert_allclose(got[name], expected, rtol=2e-4, atol=2e-3, err_msg=name)


def _of_product(name, product):
    """What a way makes of x @ w."""
    if name in ("taken away from", "two of them"):
        return -product
    if name == "reshaped, times a number":
        return -0.5 * product
    return np.tile(product[:, 4:8], 3) if name == "part of it" else product


def merged(p, h):
    return h @ (p["w"] + 2.0 * (p["a"] @ p["b"]))


@pytest.mark.slow
def test_a_scale_passes_through_the_sum_to_both_terms():
    params = PARAMS | {"norm": 1 + normal(1, 16) / 9}
    stats = sq.calibrate(lambda p, x: merged(p, x * p["norm"]), params, [X])
    [group] = stats.graph.groups
    assert group.absorbers == ("norm",)
    smoothed = sq.smooth(params, stats, 0.5)
    s = np.asarray(params["norm"] / smoothed["norm"])[0]
    assert s.max() > 2 * s.min()
    for path in "wa":
        np.testing.assert_allclose(smoothed[path], params[path] * s[:, None], rtol=1e-5)
    np.testing.assert_array_equal(smoothed["b"], params["b"])


def test_where_the_addend_can_not_take_the_scale_the_weight_is_quantized_without_smoothing():
    def fn(p, x):
        return (x * p["norm"]) @ (p["w"] + jnp.tanh(p["a"] @ p["b"]))

    params = PARAMS | {"norm": 1 + normal(1, 16) / 9}
    stats = sq.calibrate(fn, params, [X])
    assert not stats.graph.groups
    assert "`tanh`" in stats.graph.explain("w")
    got = sq.quantized(fn)(sq.quantize(params, stats), X)
    exact = np.asarray(fn(params, X))
    assert 0 < np.abs(got - exact).max() < 0.03 * np.abs(exact).max()


SCHEMES = {
    "smoothed": sq.W8A8.replace(smoothing=0.5),
    "static, smoothed": sq.W8A8_O3.replace(smoothing=0.5),
    "outliers": sq.W8A8_OUTLIERS,
    "int4": sq.W4A16_G64,
}


@pytest.mark.slow
@pytest.mark.every_case
def test_other_schemes_are_those_of_the_weight_alone():
    """x @ (w + d) is, bit for bit, what the scheme makes of x @ w, plus x @ d."""
    params = {name: PARAMS for name in SCHEMES}
    rules = {f"^{name}/": scheme for name, scheme in SCHEMES.items()}

    def alone(p, x):
        return {n: x @ p[n]["w"] + x @ (2.0 * (p[n]["a"] @ p[n]["b"])) for n in SCHEMES}

    def summed(p, x):
        return {n: merged(p[n], x) for n in SCHEMES}

    stats = sq.calibrate(summed, params, [X])
    qparams = sq.quantize(params, stats, rules)
    got, expected = (jax.jit(sq.quantized(fn))(qparams, X) for fn in (summed, alone))
    for name in SCHEMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(got[name] - summed(params, X)[name]).max() > 0


def layers(p, x):
    """Adapters that each layer adds to its weight."""
    return lax.scan(lambda x, own: (jnp.tanh(merged(own, x)), None), x, p)[0]


def layers_of_a_sum(p, x):
    """A stack to which a stack was added before the scan."""
    stack = p["w"] + 2.0 * jnp.einsum("lir,lro->lio", p["a"], p["b"])
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


@pytest.mark.parametrize("fn", [layers, layers_of_a_sum])
@pytest.mark.slow
def test_layers_that_a_scan_runs_over(fn):
    params = {"w": normal(2, 8, 8), "a": normal(2, 8, 1), "b": normal(2, 1, 8)}
    x = normal(3, 8)
    stats = sq.calibrate(fn, params, [x])
    assert [(site.path, site.channels) for site in stats.graph.sites] == [("w", (2, 8))]
    qparams = sq.quantize(params, stats)
    run = sq.quantized(fn)
    assert jaxprs.INT8_DOT in [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, x))]
    expected = np.asarray(x, np.float64)
    for w, a, b in zip(*(np.asarray(params[name], np.float64) for name in "wab"), strict=True):
        expected = np.tanh(in_int8(expected, w) + expected @ (2 * a @ b))
    np.testing.assert_allclose(run(qparams, x), expected, atol=1e-4)


@pytest.mark.slow
def test_a_sum_that_a_shard_map_is_given():
    mesh = Mesh(jax.devices()[:1], ("model",))
    by_outputs = PartitionSpec(None, "model")

    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), by_outputs), out_specs=by_outputs)
    def product(x, w):
        return x @ w

    def fn(p, x):
        return product(x, p["w"] + p["a"] @ p["b"])

    stats = sq.calibrate(fn, PARAMS, [X])
    run = sq.quantized(fn)
    qparams = sq.quantize(PARAMS, stats)
    expected = in_int8(X, PARAMS["w"]) + np.asarray(X @ (PARAMS["a"] @ PARAMS["b"]))
    np.testing.assert_allclose(run(qparams, X), expected, rtol=2e-4, atol=2e-3)


@pytest.mark.slow
def test_adapters_are_trained_beside_the_quantized_weight():
    qparams = sq.quantize(PARAMS, sq.calibrate(merged, PARAMS, [X]))
    trainable, frozen = sq.split(qparams, ["^a$", "^b$"])

    def loss(run, trainable, frozen):
        return (run(sq.merge(trainable, frozen), X) ** 3).mean()

    got = jax.grad(partial(loss, sq.quantized(merged)))(trainable, frozen)
    w = sq.dequantize(qparams["w"].tensor)
    expected = jax.grad(partial(loss, merged))(trainable, frozen | {"w": w})
    for name in "ab":
        np.testing.assert_allclose(got[name], expected[name], rtol=0.1, atol=30)


@pytest.mark.slow
def test_a_convolution_with_a_kernel_that_is_added_to():
    def fn(p, x):
        kernel = p["w"] + jnp.outer(p["a"], p["b"])[None]
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    params = {"w": normal(3, 4, 5), "a": normal(4), "b": normal(5)}
    x = normal(2, 7, 4)
    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
    assert isinstance(qparams["w"], sq.QuantWeight)
    exact = np.asarray(fn(params, x))
    got = jax.jit(sq.quantized(fn))(qparams, x)
    assert 0 < np.abs(got - exact).max() < 0.03 * np.abs(exact).max()


FLOAT = {  # what the function does, and the reason that the graph gives
    "two leaves": (lambda p, x: x @ (p["w"] + p["d"]), "multiplies what `add`"),
    "returned": (
        lambda p, x: (lambda w: (x @ w, w))(p["w"] + p["a"] @ p["b"]),
        "it is an output of fn too",
    ),
    "read": (
        lambda p, x: (lambda w: x @ w + (w * w).sum())(p["w"] + p["a"] @ p["b"]),
        "reads it too",
    ),
}


@pytest.mark.parametrize("case", FLOAT)
def test_other_sums_stay_float_with_a_reason(case):
    fn, reason = FLOAT[case]
    with pytest.raises(ValueError, match="found no matmul") as caught:
        sq.calibrate(fn, PARAMS, [X])
    assert reason in str(caught.value)


def test_a_barrier_beside_other_arrays_and_a_sum_that_is_looked_up():
    """What stands beside a weight in a barrier does not multiply it; rows of a sum are no rows of w."""

    def fn(p, x):
        w, gain, _ = lax.optimization_barrier((p["w"], p["gain"], x))
        return (x * gain) @ w + p["table"][jnp.array([1])] + (p["rows"] + p["a"] @ p["b"])[:1]

    params = PARAMS | {"gain": jnp.ones((1, 16)), "table": normal(4, 12), "rows": normal(16, 12)}
    graph = sq.calibrate(fn, params, [X]).graph
    assert [site.path for site in graph.sites] == ["w"]
    assert [table.path for table in graph.tables] == ["table"]
