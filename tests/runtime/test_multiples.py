"""A weight times or by a number is a site: the number belongs to the weight's scale."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax
from traced import normal

import sqjax as sq

X, W = normal(6, 16), normal(16, 12)
CAPTURED = jnp.float32(3.0)

#: What the function multiplies x with, and the number that this is times w.
MULTIPLES = {
    "a literal": (lambda p: p["w"] * 2.0, 2),
    "a literal on the left": (lambda p: 0.25 * p["w"], 0.25),
    "an integer": (lambda p: p["w"] * 1, 1),
    "a quotient": (lambda p: p["w"] / 8**0.5, 8**-0.5),
    "a root that the program takes": (lambda p: p["w"] / jnp.sqrt(8.0), 8**-0.5),
    "a number that fn captured": (lambda p: p["w"] * CAPTURED, 3),
    "a filled array": (lambda p: p["w"] * jnp.full((16, 12), 0.5), 0.5),
    "a negative one": (lambda p: p["w"] * -4.0, -4),
    "the sign": (lambda p: -p["w"], -1),
    "a leaf of one number": (lambda p: p["w"] * p["gain"], 1.5),
    "twice, beside a transpose": (lambda p: ((p["w"] * 2.0).T / 4.0).T, 0.5),
}


@pytest.mark.parametrize("case", MULTIPLES)
def test_a_multiple_of_a_weight_runs_in_int8(case):
    multiple, number = MULTIPLES[case]
    params = {"w": W, "gain": jnp.full((1, 1), 1.5)}

    def fn(p, x):
        return x @ multiple(p)

    stats = sq.calibrate(fn, params, [X])
    assert [site.path for site in stats.graph.sites] == ["w"]
    qparams = sq.quantize(params, stats)
    run = sq.quantized(fn)
    assert [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, X))] == [jaxprs.INT8_DOT]
    # What the stored integers stand for, times the number, in float64.
    weight = np.asarray(sq.dequantize(qparams["w"].tensor), np.float64)
    rows = np.asarray(X, np.float64)
    scale = np.abs(rows).max(axis=1, keepdims=True) / 127
    expected = np.round(rows / scale) * scale @ weight * number
    np.testing.assert_allclose(jax.jit(run)(qparams, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8_OUTLIERS", "W8A8_O3", "W4A8"])
@pytest.mark.slow
@pytest.mark.every_case
def test_other_schemes_take_the_number_too(scheme):
    x, w = normal(6, 128).at[:, 3].mul(40), normal(128, 12)
    fns = [lambda p, x: x @ p["w"], lambda p, x: x @ (p["w"] * -0.5)]
    stats = [sq.calibrate(fn, {"w": w}, [x]) for fn in fns]
    plain, scaled = (
        jax.jit(sq.quantized(fn))(sq.quantize({"w": w}, s, getattr(sq, scheme)), x)
        for fn, s in zip(fns, stats, strict=True)
    )
    np.testing.assert_allclose(scaled, -0.5 * plain, rtol=1e-6)


@pytest.mark.slow
def test_a_scale_passes_to_a_multiple_and_the_norm_absorbs_it():
    params = {"norm": jnp.ones((1, 16)), "w": W}

    def fn(p, x):
        return (x * p["norm"]) @ (p["w"] * 2.0)

    stats = sq.calibrate(fn, params, [X.at[:, 2].mul(50)])
    assert [group.absorbers for group in stats.graph.groups] == [("norm",)]
    smoothed = sq.smooth(params, stats, 0.5)
    assert not np.allclose(smoothed["w"], W)
    np.testing.assert_allclose(fn(smoothed, X), fn(params, X), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_a_layer_of_a_stack_that_was_multiplied_as_a_whole():
    params = {"stack": normal(3, 16, 16)}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"] / 4.0)[0]

    qparams = sq.quantize(params, sq.calibrate(fn, params, [X]))
    got, expected = jax.jit(sq.quantized(fn))(qparams, X), fn(params, X)
    assert 0 < np.abs(got - expected).max() < 0.03


def test_one_plus_a_multiple_is_not_one_plus_the_leaf():
    params = {"norm": jnp.ones((1, 16)), "w": W}

    def fn(p, x):
        return (x * (1 + 2.0 * p["norm"])) @ p["w"]

    stats = sq.calibrate(fn, params, [X])
    assert stats.graph.offsets == ()
    assert not stats.graph.groups


#: What the function multiplies x with, and what that is times each of w's 12 outputs.
GAINS = {
    "a gain": (lambda p: p["w"] * p["g"], 1),
    "on the left": (lambda p: p["g"] * p["w"], 1),
    "computed": (lambda p: p["w"] * (jnp.abs(p["g"]) * jnp.sign(p["g"]) * 2.0), 2),
    "a quotient": (lambda p: p["w"] / (0.5 / p["g"]), 2),
    "of the transpose": (lambda p: (p["w"].T * -p["g"].T).T, -1),
    "of heads": (lambda p: (p["w"].reshape(16, 3, 4) * p["g"].reshape(1, 3, 4)).reshape(16, 12), 1),
    "with an adapter": (lambda p: (p["w"] + 0 * (p["rows"] @ p["g"])) * p["g"], 1),
}


@pytest.mark.slow
def test_a_gain_of_the_outputs_belongs_to_the_scale():
    """Every way in one program; w * g as weight norm has it, where v / norm(v) is stored."""
    gain = jnp.linspace(-2.0, 3.0, 12)[None]
    params = {name: {"w": W, "g": gain, "rows": normal(16, 1)} for name in GAINS}

    def fn(p, x):
        return {name: x @ way(p[name]) for name, (way, _) in GAINS.items()}

    stats = sq.calibrate(fn, params, [X])
    assert [site.path for site in stats.graph.sites] == [f"{name}/w" for name in GAINS]
    qparams = sq.quantize(params, stats)
    run = sq.quantized(fn)
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, X))]
    assert dots.count(jaxprs.INT8_DOT) == len(GAINS)
    got = jax.jit(run)(qparams, X)
    weight = np.asarray(sq.dequantize(qparams["a gain"]["w"].tensor), np.float64)
    rows = np.asarray(X, np.float64)
    scale = np.abs(rows).max(axis=1, keepdims=True) / 127
    product = np.round(rows / scale) * scale @ weight * np.asarray(gain, np.float64)
    for name, (_, number) in GAINS.items():
        np.testing.assert_allclose(got[name], product * number, rtol=1e-4, atol=1e-4, err_msg=name)


GAIN_SCHEMES = {
    "outliers": sq.W8A8_OUTLIERS,
    "static, smoothed": sq.W8A8_O3.replace(smoothing=0.5),
    "per tensor": sq.W8A8.replace(weight=sq.Int8(per_tensor=True)),
    "in groups": sq.W4A16_G64,
}


@pytest.mark.slow
@pytest.mark.every_case
def test_other_schemes_take_the_gain_too():
    x, w, gain = normal(6, 128).at[:, 3].mul(40), normal(128, 12), jnp.linspace(-2.0, 3.0, 12)[None]
    params = {name: {"w": w, "g": gain} for name in GAIN_SCHEMES}
    rules = {f"^{name}/": scheme for name, scheme in GAIN_SCHEMES.items()}

    def within(p, x):
        return {name: x @ (p[name]["w"] * p[name]["g"]) for name in GAIN_SCHEMES}

    def after(p, x):
        return {name: x @ p[name]["w"] * p[name]["g"] for name in GAIN_SCHEMES}

    qparams = sq.quantize(params, sq.calibrate(within, params, [x]), rules)
    got, expected = (jax.jit(sq.quantized(fn))(qparams, x) for fn in (within, after))
    for name in GAIN_SCHEMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_gain_of_the_outputs_of_each_layer_and_of_a_kernel():
    def fn(p, x):
        layers = p["stack"] * p["gain"]
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]
        return lax.conv_general_dilated(x[None], p["conv"] * p["gain"][:1], (1,), "SAME", **NWC)

    NWC = {"dimension_numbers": ("NWC", "WIO", "NWC")}
    params = {"stack": normal(3, 16, 16) / 4, "gain": normal(3, 1, 16), "conv": normal(3, 16, 16)}
    stats = sq.calibrate(fn, params, [X])
    assert {site.path for site in stats.graph.sites} == {"stack", "conv"}
    got, expected = jax.jit(sq.quantized(fn))(sq.quantize(params, stats), X), fn(params, X)
    assert 0 < np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


NO_MULTIPLES = {
    "a number divided by it": lambda p: 2.0 / p["w"],
    "a gain of the channels": lambda p: p["w"] * p["rows"],
    "of the channels, transposed": lambda p: (p["w"].T * p["rows"].T).T,
    "a matrix": lambda p: p["w"] * (p["rows"] @ p["g"]),
    "a norm of the channels": lambda p: p["w"] / jnp.linalg.norm(p["w"], axis=1, keepdims=True),
}


@pytest.mark.parametrize("case", NO_MULTIPLES)
def test_what_is_no_multiple_stays_float(case):
    params = {"w": W, "rows": jnp.arange(1.0, 17.0)[:, None], "g": jnp.ones((1, 12))}

    def fn(p, x):
        return x @ NO_MULTIPLES[case](p)

    with pytest.raises(ValueError, match=r"w: `dot_general` at .* multiplies what `\w+` at"):
        sq.calibrate(fn, params, [X])


@pytest.mark.slow
def test_a_gain_that_is_multiplied_itself_stays_float():
    """x @ g is a matmul too, but w * g needs g's elements."""

    def fn(p, x):
        one = p["one"] * p["one"]  # of one number there is no gain beside it
        return x @ p["g"].T * jnp.sum(x @ (p["w"] * p["g"] * one))

    params = {"w": normal(12, 12), "g": normal(1, 12), "one": jnp.ones((1, 1))}
    x = normal(6, 12)
    stats = sq.calibrate(fn, params, [x])
    assert [site.path for site in stats.graph.sites] == ["w"]
    assert np.isfinite(sq.quantized(fn)(sq.quantize(params, stats), x)).all()


@pytest.mark.slow
def test_gradients_reach_what_a_weight_is_multiplied_with():
    """Those of the float function with the dequantized weights, each way in one program."""
    NWC = {"dimension_numbers": ("NWC", "WIO", "NWC")}
    sizes = jnp.array([2, 4], jnp.int32)

    def fn(p, x):
        out = {}
        out["gain"] = x @ (p["w"] * p["gain"])
        out["number"] = x @ (p["one"] * p["w2"])
        out["in groups"] = x @ (p["w4"] * p["gain4"])
        out["convolved"] = lax.conv_general_dilated(
            x[None], p["kernel"] * p["gain3"], (1,), "SAME", **NWC
        )
        out["experts"] = lax.ragged_dot(x, p["experts"] * p["gain5"], sizes)
        out["tied"] = jnp.tanh(x @ (p["t"] * p["one2"]).T) @ (p["t"] * p["one2"])
        return {name: jnp.sum(jnp.sin(y)) for name, y in out.items()}

    shapes = {
        "w": (16, 12), "gain": (1, 12), "w2": (16, 12), "one": (), "w4": (16, 12), "gain4": (1, 12),
        "kernel": (3, 16, 4), "gain3": (1, 1, 4), "experts": (2, 16, 5), "gain5": (2, 1, 5),
        "t": (7, 16), "one2": (),
    }  # fmt: skip
    params = {name: 0.2 * normal(*shape, seed=3) for name, shape in shapes.items()}
    rules = {"^w4$": sq.W4A16.replace(weight=sq.Int4(group_size=4)), ".*": sq.W8A8}
    qparams = sq.quantize(params, sq.calibrate(fn, params, [X]), rules)
    trainable, frozen = sq.split(qparams, ["gain", "one"])
    weights = {
        name: sq.dequantize(leaf.tensor) if isinstance(leaf, sq.QuantWeight) else leaf
        for name, leaf in frozen.items()
    }
    assert sum(isinstance(leaf, sq.QuantWeight) for leaf in frozen.values()) == 6

    def gradient(run, frozen):
        def loss(trainable):
            return sum(run(sq.merge(trainable, frozen), X).values())

        return jax.jit(jax.grad(loss))(trainable)

    got, expected = gradient(sq.quantized(fn), frozen), gradient(fn, weights)
    for name in ("gain", "one", "gain3", "gain4", "gain5", "one2"):
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(got[name], expected[name], atol=0.05 * size, err_msg=name)
        assert size > 0.1
