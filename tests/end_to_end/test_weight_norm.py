"""Weights that the function divides by their own norm: the norm of the dequantized weight, the product in int8."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax
from traced import normal, program_of

import sqjax as sq
from sqjax.folding.certificate import certify

X = normal(6, 16).at[:, 3].mul(30)
PARAMS = {"v": normal(16, 12), "g": jnp.linspace(-2.0, 3.0, 12)[None], "a": normal(16, 2) / 9}


def norm(v, axis=0):
    return jnp.linalg.norm(v, axis=axis, keepdims=True)


#: What x is multiplied with, and the gain that this is in float64, of the dequantized v and of g.
WAYS = {
    "g v / |v|": (lambda p: p["g"] * p["v"] / norm(p["v"]), lambda v, g: g / two(v)),
    "v (g / |v|)": (lambda p: p["v"] * (p["g"] / norm(p["v"])), lambda v, g: g / two(v)),
    "powers, rsqrt": (
        lambda p: p["v"] * lax.rsqrt((p["v"] ** 2).sum(0, keepdims=True) + 1e-6) * p["g"],
        lambda v, g: g / two(v),
    ),
    "sum of magnitudes": (
        lambda p: p["v"] / jnp.abs(p["v"]).sum(0, keepdims=True),
        lambda v, g: 1 / np.abs(v).sum(0),
    ),
    "largest magnitude": (
        lambda p: p["v"] / jnp.abs(p["v"]).max(0, keepdims=True),
        lambda v, g: 1 / np.abs(v).max(0),
    ),
    "of the transpose": (
        lambda p: (p["v"].T * (p["g"].T / norm(p["v"].T, 1))).T,
        lambda v, g: g / two(v),
    ),
    "of half of it": (
        lambda p: p["v"] / jnp.sqrt(jnp.square(0.5 * p["v"]).sum(0, keepdims=True)),
        lambda v, g: 2 / two(v),
    ),
    "one number": (
        lambda p: p["v"] / jnp.sqrt((p["v"] * p["v"]).sum()),
        lambda v, g: 1 / np.sqrt((v**2).sum()),
    ),
    "masked": (
        lambda p: (lambda w: w / norm(w))(jnp.tril(p["v"], 3)),
        lambda v, g: np.tri(16, 12, 3) / two(v * np.tri(16, 12, 3)),
    ),
    "heads": (
        lambda p: (lambda w: w / norm(w))(p["v"].reshape(16, 3, 4)).reshape(16, 12),
        lambda v, g: 1 / two(v),
    ),
}  # fmt: skip


def two(v):
    return np.sqrt((v**2).sum(0))


def codes(w, axis=0):
    """(codes, scale) of int8 in float64."""
    w = np.asarray(w, np.float64)
    scale = np.abs(w).max(axis, keepdims=True) / 127
    return np.round(w / scale), scale


@pytest.mark.slow
def test_the_norm_is_a_gain_and_the_product_runs_in_int8():
    """Every way in one program."""
    params = {name: {"v": PARAMS["v"], "g": PARAMS["g"]} for name in WAYS}

    def fn(p, x):
        return {name: x @ way(p[name]) for name, (way, _) in WAYS.items()}

    stats = sq.calibrate(fn, params, [X])
    assert [site.path for site in stats.graph.sites] == [f"{name}/v" for name in WAYS]
    qparams = sq.quantize(params, stats)
    run = sq.quantized(fn)
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, X))]
    assert dots == [jaxprs.INT8_DOT] * len(WAYS)
    got = jax.jit(run)(qparams, X)
    (q, scale), (qx, scale_x) = codes(PARAMS["v"]), codes(X, 1)
    for name, (_, gain) in WAYS.items():
        of_v = np.broadcast_to(gain(q * scale, np.asarray(PARAMS["g"][0], np.float64)), (16, 12))
        expected = (qx * scale_x) @ (q * scale * of_v)
        np.testing.assert_allclose(got[name], expected, rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("features", [-1, None])
def test_flax_linen(features):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(12, name="one"), feature_axes=features)(x)
            return nn.WeightNorm(nn.Dense(4, name="two"))(nn.relu(x))

    model = Model()
    with jax.numpy_dtype_promotion("standard"):
        variables = jax.jit(model.init)(jax.random.key(0), X)
        stats = sq.calibrate(model.apply, variables, [X])
        qvariables = sq.quantize(variables, stats)
        exact = np.asarray(model.apply(variables, X))
        got = jax.jit(sq.quantized(model.apply))(qvariables, X)
    paths = [site.path for site in stats.graph.sites]
    assert paths == ["params/one/kernel", "params/two/kernel"]
    assert all(
        isinstance(qvariables["params"][name]["kernel"], sq.QuantWeight) for name in ("one", "two")
    )
    assert 0 < np.abs(got - exact).max() < 0.03 * np.abs(exact).max()


# Smoothing ----------------------------------------------------------------------------------------

NORMED = PARAMS | {"norm": 1 + normal(1, 16) / 9, "k": normal(16, 12)}


def normed(p, x):
    return (x * p["norm"]) @ (p["g"] * p["v"] / norm(p["v"]))


@pytest.mark.slow
def test_no_scale_is_folded_through_a_norm_which_it_would_change():
    stats = sq.calibrate(normed, NORMED, [X])
    assert not stats.graph.groups
    why = stats.graph.explain("v")
    assert (
        "multiplies v as fn has scaled it by its own norm, which a smoothing scale would change"
        in why
    )
    smoothed, qparams = sq.smooth(NORMED, stats, 0.5), sq.quantize(NORMED, stats)
    jax.tree.map(np.testing.assert_array_equal, smoothed, NORMED)
    exact = np.asarray(normed(NORMED, X))
    got = sq.quantized(normed)(qparams, X)
    assert 0 < np.abs(got - exact).max() < 0.03 * np.abs(exact).max()


def test_nor_for_another_weight_that_reads_what_it_reads():
    def fn(p, x):
        return normed(p, x) + (x * p["norm"]) @ p["k"]

    graph = sq.calibrate(fn, NORMED, [X]).graph
    assert not graph.groups
    assert "multiplies v as fn has scaled it by its own norm" in graph.explain("k")


def test_the_certificate_finds_it_too():
    """Labels that would be lawful, were v multiplied with g alone."""
    alone = program_of(lambda p, x: (x * p["norm"]) @ (p["g"] * p["v"]), NORMED, X)
    of_norm = program_of(normed, NORMED, X)
    for program, problem in ((alone, None), (of_norm, "does not pass the scale on")):
        divided, labels = -1 - np.arange(16)[None], {}
        labels[program.whole["norm"]] = divided
        for equation in program.equations:
            [y] = equation.outputs
            of_v = program.whole["v"] in program.chain(y)
            if equation.name == "dot_general" and program.is_activation(y):
                continue
            if program.path_of(y) == "v" and of_v:
                labels[y] = -divided.T
            elif program.is_activation(y) or program.path_of(y) == "norm":
                labels[y] = divided
        labels[program.whole["v"]] = -divided.T
        found = certify(program, labels)
        assert (found is None) == (problem is None)
        assert (problem or "") in (found or "")


SCHEMES = {
    "smoothed": sq.W8A8.replace(smoothing=0.5),
    "static, smoothed": sq.W8A8_O3.replace(smoothing=0.5),
    "outliers": sq.W8A8_OUTLIERS,
    "outliers, smoothed": sq.W8A8_OUTLIERS.replace(smoothing=0.3),
    "int4": sq.W4A16_G64,
    "int4, int8": sq.W4A8,
}


def floats(weight):
    """The weight (16 or more, 12) that it stands for, in float64: unsmoothed, outliers among the others."""
    found = np.array(sq.dequantize(weight.tensor), np.float64)
    if weight.outliers is not None:
        found[np.asarray(weight.outliers.channels)] = np.asarray(weight.outliers.weight).T
    return found if weight.smoothing is None else found / np.asarray(weight.smoothing)[:, None]


@pytest.mark.slow
@pytest.mark.every_case
def test_other_schemes_measure_the_weight_as_it_was_before_smoothing():
    """x @ (g v / |v|) is the scheme's x @ v, times g / |v| in float64 of what v is dequantized."""
    x, v = normal(6, 128).at[:, (3, 70)].mul(40), normal(128, 12)
    params = {name: {"v": v, "g": PARAMS["g"]} for name in SCHEMES}
    rules = {f"^{name}/": scheme for name, scheme in SCHEMES.items()}

    def fn(p, x):
        return {n: x @ (p[n]["g"] * p[n]["v"] / norm(p[n]["v"])) for n in SCHEMES}

    def plain(p, x):
        return {n: x @ p[n]["v"] for n in SCHEMES}

    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), rules)
    got, products = (jax.jit(sq.quantized(f))(qparams, x) for f in (fn, plain))
    for name, scheme in SCHEMES.items():
        weight = qparams[name]["v"]
        assert (weight.smoothing is not None) == (scheme.smoothing is not None)
        assert np.abs(floats(weight) - v).max() < 0.5
        gain = np.asarray(PARAMS["g"]) / two(floats(weight))
        np.testing.assert_allclose(
            got[name], products[name] * gain, rtol=1e-4, atol=1e-4, err_msg=name
        )


# Layers, kernels, sums ----------------------------------------------------------------------------


def within(p, x):
    def layer(x, own):
        return jnp.tanh(x @ (own["g"] * own["v"] / norm(own["v"]))), None

    return lax.scan(layer, x, p)[0]


def before(p, x):
    stack = p["g"] * p["v"] / norm(p["v"], 1)
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


@pytest.mark.slow
@pytest.mark.parametrize("fn", [within, before])
def test_layers_that_a_scan_runs_over(fn):
    params, x = {"v": normal(2, 8, 8), "g": normal(2, 1, 8)}, normal(3, 8)
    stats = sq.calibrate(fn, params, [x])
    assert [(site.path, site.channels) for site in stats.graph.sites] == [("v", (2, 8))]
    scheme = sq.W8A8.replace(smoothing=0.5)
    expected = np.asarray(x, np.float64)
    qparams, run = sq.quantize(params, stats), sq.quantized(fn)
    assert jaxprs.INT8_DOT in [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, x))]
    for v, g in zip(params["v"], params["g"], strict=True):
        (q, scale), (qx, scale_x) = codes(v), codes(expected, 1)
        expected = np.tanh((qx * scale_x) @ (q * scale) * np.asarray(g) / two(q * scale))
    np.testing.assert_allclose(run(qparams, x), expected, atol=1e-4)
    smoothed = run(sq.quantize(params, stats, scheme), x)
    assert np.abs(smoothed - fn(params, x)).max() < 0.05


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_convolution_smoothed_at_run_time(groups):
    def kernel(p):
        return p["g"] * p["v"] / norm(p["v"], (0, 1))

    def fn(p, x):
        return lax.conv_general_dilated(
            x, kernel(p), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )  # fmt: skip

    params, x = (
        {"v": normal(3, 8 // groups, 6), "g": normal(1, 1, 6)},
        normal(2, 7, 8).at[..., 3].mul(9),
    )
    stats = sq.calibrate(fn, params, [x])
    exact, run = np.asarray(fn(params, x)), jax.jit(sq.quantized(fn))
    for scheme in (sq.W8A8, sq.W8A8.replace(smoothing=0.5)):
        qparams = sq.quantize(params, stats, scheme)
        np.testing.assert_allclose(qparams["v"].dequantize(), params["v"], atol=0.05)
        assert 0 < np.abs(run(qparams, x) - exact).max() < 0.03 * np.abs(exact).max()


def test_dora():
    """The norm of w + a @ b, of which w is quantized."""

    def fn(p, x):
        merged = p["v"] + p["a"] @ p["b"]
        return x @ (p["g"] * merged / lax.stop_gradient(norm(merged)))

    params = PARAMS | {"b": normal(2, 12)}
    stats = sq.calibrate(fn, params, [X])
    assert [site.path for site in stats.graph.sites] == ["v"]
    (q, scale), (qx, scale_x) = codes(PARAMS["v"]), codes(X, 1)
    added = np.asarray(params["a"], np.float64) @ np.asarray(params["b"], np.float64)
    product = (qx * scale_x) @ (q * scale) + np.asarray(X, np.float64) @ added
    expected = product * np.asarray(PARAMS["g"]) / two(q * scale + added)
    got = jax.jit(sq.quantized(fn))(sq.quantize(params, stats), X)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


FLOAT = {  # what x is multiplied with, or fn as a whole, and the reason that the graph gives
    "along the outputs": (lambda p, x: x @ (p["v"] / norm(p["v"], 1)), "multiplies what `div`"),
    "its mean": (
        lambda p, x: x @ ((p["v"] - p["v"].mean(0, keepdims=True)) / p["v"].std(0, keepdims=True)),
        "`reduce_sum` at .* reads it too",
    ),
    "returned": (
        lambda p, x: (lambda n: (x @ (p["v"] / n), n))(norm(p["v"])),
        "`mul` at .* reads it too",
    ),
    "beside an input": (
        lambda p, x: (lambda n: x @ (p["v"] / n) + n * x[:, :1])(norm(p["v"])),
        "`mul` at .* reads it too",
    ),
    "by an exponential": (
        lambda p, x: x @ (p["v"] / jnp.exp(p["v"]).sum(0, keepdims=True)),
        "`exp` at .* reads it too",
    ),
    "by its first row": (lambda p, x: x @ (p["v"] * p["v"][:1]), "multiplies what `mul`"),
    "channels and outputs in one": (
        lambda p, x: x @ (p["v"] / jnp.abs(p["v"].reshape(-1)).max()),
        "`abs` at .* reads it too",
    ),
}


@pytest.mark.parametrize("case", FLOAT)
def test_what_else_reads_a_weight_keeps_it_in_float(case):
    fn, reason = FLOAT[case]
    with pytest.raises(ValueError, match=reason):
        sq.calibrate(fn, PARAMS, [X])


@pytest.mark.slow
def test_a_regularizer_that_quantized_meets_measures_the_dequantized_weight():
    """fn is another one than was calibrated; the norm is still the one of what runs."""
    qparams = sq.quantize(PARAMS, sq.calibrate(lambda p, x: x @ p["v"], PARAMS, [X]))
    qparams["v"] = replace(qparams["v"], smoothing=jnp.full(16, 2.0))
    q, scale = codes(PARAMS["v"])
    got = sq.quantized(lambda p: jnp.abs(p["v"]).sum())(qparams)
    np.testing.assert_allclose(got, np.abs(q * scale).sum() / 2, rtol=1e-5)
