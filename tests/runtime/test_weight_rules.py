"""What primitives do to a quantized weight: matmuls in int8, movements, stacks; the others are refused."""

import re

import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax

import sqjax as sq


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def quantize(fn, params, *inputs, scheme=sq.W8A8):
    return sq.quantize(params, sq.calibrate(fn, params, [inputs]), scheme)


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


def check(fn, params, *inputs, scheme=sq.W8A8, sites=None):
    """fn on the quantized tree: close to the float result but not equal to it, every matmul of a leaf in int8."""
    qparams = quantize(fn, params, *inputs, scheme=scheme)
    expected, got = fn(params, *inputs), jax.jit(sq.quantized(fn))(qparams, *inputs)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert 1e-4 < relative_error(got, expected) < 0.06
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(sq.quantized(fn), qparams, *inputs))]
    assert dots.count(jaxprs.INT8_DOT) == (len(dots) if sites is None else sites)
    return qparams


# Matmuls ----------------------------------------------------------------------------------------------------------

ONE_MATMUL = {
    "x @ w": (lambda w, x: x @ w, (16, 8)),
    "x @ w.T": (lambda w, x: x @ w.T, (8, 16)),
    "w @ x.T": (lambda w, x: (w @ x.T).T, (8, 16)),
    "w.T @ x.T": (lambda w, x: (w.T @ x.T).T, (16, 8)),
    "einsum": (lambda w, x: jnp.einsum("ti,oi->to", x, w), (8, 16)),
    "einsum, weight first": (lambda w, x: jnp.einsum("io,ti->to", w, x), (16, 8)),
    "nested jit": (lambda w, x: jax.jit(lambda w, x: jax.jit(jnp.dot)(x, w))(w, x), (16, 8)),
    "remat": (lambda w, x: jax.checkpoint(lambda w, x: x @ w)(w, x), (16, 8)),
}
SCHEMES = {
    "O1": sq.W8A8_O1,
    "O2": sq.W8A8_O2,
    "O3": sq.W8A8_O3,
    "per tensor": sq.Scheme(weight=sq.Int8(per_tensor=True)),
}


def test_a_matmul_is_the_integer_product_of_numpy():
    """Every form of it, and every scheme, in one program: {name: (form, scheme)}."""
    cases = {form: (form, "O1") for form in ONE_MATMUL}
    cases |= {scheme: ("x @ w.T", scheme) for scheme in SCHEMES if scheme != "O1"}
    params, inputs, expected = {}, {}, {}
    for seed, (name, (form, scheme)) in enumerate(cases.items()):
        shape = ONE_MATMUL[form][1]
        contracted = shape.index(16)
        per_token = isinstance(SCHEMES[scheme].activation, sq.PerToken)
        per_channel = SCHEMES[scheme].weight.granularity == "per_channel"
        x = numpy_int8.away_from_ties(normal(5, 16, seed=seed), 1 if per_token else None)
        w = numpy_int8.away_from_ties(
            normal(*shape, seed=100 + seed), contracted if per_channel else None
        )
        params[name], inputs[name] = jnp.asarray(w), jnp.asarray(x)
        expected[name] = numpy_int8.matmul(
            x,
            w if contracted == 0 else w.T,
            1 if per_token else None,
            0 if per_channel else None,
        )
    fn = lambda p, xs: {name: ONE_MATMUL[cases[name][0]][0](p[name], xs[name]) for name in cases}
    rules = {f"^{re.escape(name)}$": SCHEMES[scheme] for name, (_, scheme) in cases.items()}
    qparams = quantize(fn, params, inputs, scheme=rules)
    got = jax.jit(sq.quantized(fn))(qparams, inputs)
    exact = fn(params, inputs)
    for name in cases:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert relative_error(exact[name], expected[name]) > 1e-4


@pytest.mark.parametrize("batch", [(2, 3), pytest.param((), marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_weight_on_the_left_keeps_the_order_of_the_result(batch):
    fn = lambda p, x: jax.lax.dot_general(
        p["w"], x, (((1,), (x.ndim - 1,)), ((), ()))
    )  # (a, c) then x's free axes
    params, x = {"w": normal(4, 16, 3)}, normal(*batch, 5, 16, seed=1)
    qparams = check(fn, params, x)
    assert jax.jit(sq.quantized(fn))(qparams, x).shape == (4, 3, *batch, 5)


@pytest.mark.slow
def test_a_jax_checkpointed_and_custom_derivative_matmul_runs_in_int8():
    @jax.custom_vjp
    def vjp(w, x):
        return x @ w

    vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))

    @jax.custom_jvp
    def jvp(w, x):
        return x @ w

    jvp.defjvp(lambda primals, tangents: (jvp(*primals), jvp(*primals)))
    fn = lambda p, x: jax.checkpoint(jvp)(p["b"], jnp.tanh(vjp(p["a"], x)))
    check(fn, {"a": normal(16, 12), "b": normal(12, 8, seed=1)}, normal(5, 16, seed=2), sites=2)


@pytest.mark.slow
def test_a_leaf_that_is_contracted_along_different_axes_is_one_site():
    fn = lambda p, x: jnp.tanh(x @ p["tied"]) @ p["tied"].T @ p["head"]
    qparams = check(
        fn, {"tied": normal(16, 12), "head": normal(16, 8, seed=1)}, normal(5, 16, seed=2), sites=3
    )
    assert isinstance(qparams["tied"], sq.QuantWeight)


def test_numpy_parameters_are_quantized_too():
    params, x = {"w": np.asarray(normal(16, 8))}, normal(5, 16)
    fn = lambda p, x: x @ p["w"]
    qparams = check(fn, params, x)
    expected = quantize(fn, jax.tree.map(jnp.asarray, params), x)
    jax.tree.map(np.testing.assert_array_equal, qparams, expected)


EMPTY = {
    "O1": sq.W8A8,
    "W8A16": sq.W8A16,
    "groups, float x": sq.Scheme(weight=sq.Int8(group_size=64), activation=None),
    "groups": sq.Scheme(weight=sq.Int8(group_size=64)),
    "W4A16": sq.W4A16_G64,
    "FP8": sq.FP8,
    "W4A8": sq.W4A8,
}


@pytest.mark.slow
def test_no_rows():
    params = {name: normal(130, 3) for name in EMPTY}
    fn = lambda p, x: {name: x @ p[name] for name in EMPTY}
    rules = {f"^{name}$": scheme for name, scheme in EMPTY.items()}
    qparams = quantize(fn, params, normal(2, 130), scheme=rules)
    got = sq.quantized(fn)(qparams, jnp.zeros((0, 130)))
    assert {name: x.shape for name, x in got.items()} == dict.fromkeys(EMPTY, (0, 3))


# Stacks -----------------------------------------------------------------------------------------------------------

STACKS = {
    "outliers": sq.W8A8_OUTLIERS,
    "outliers, smoothing": sq.W8A8_OUTLIERS.replace(smoothing=0.5),
    "outliers, static": sq.W8A8_O3.replace(smoothing=0.5, outliers=6.0),
    "static": sq.W8A8_O3,
    "smoothing": sq.W8A8.replace(smoothing=0.5),
}
LARGE_CHANNELS = np.where(np.arange(16) % 5 == 0, 20.0, 1.0)


def layers(w, x):
    """Three layers: the activations of each have another size, so its own scales must be its own."""
    return jnp.stack([(x * 4.0**i) @ w[i] / 4.0**i for i in range(3)])


def layers_of_experts(w, x):
    """Two layers of three experts: the second one meets the channels in reversed order."""
    return jnp.stack([lax.batch_matmul(x[:, :, :: 1 - 2 * i], w[i]) for i in range(2)])


@pytest.mark.parametrize(
    ("fn", "shape", "rows"),
    [
        (layers, (3, 16, 16), (8,)),
        pytest.param(layers_of_experts, (2, 3, 16, 16), (3, 8), marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_layer_of_a_stack_keeps_its_outliers_and_scales(fn, shape, rows):
    """Every scheme in one program."""
    params = {name: normal(*shape, seed=i) for i, name in enumerate(STACKS)}
    large = LARGE_CHANNELS.reshape((1,) * len(rows) + (16,))
    x = jnp.asarray(normal(*rows, 16, seed=9) * large, jnp.float32)
    all_of = lambda p, x: {name: fn(p[name], x) for name in STACKS}
    rules = {f"^{name}$": scheme for name, scheme in STACKS.items()}
    qparams = quantize(all_of, params, x, scheme=rules)
    got, exact = jax.jit(sq.quantized(all_of))(qparams, x), all_of(params, x)
    for name in STACKS:
        assert isinstance(qparams[name], sq.QuantWeight)
        # All channels of the largest layer are outliers, so there the error may be 0.
        assert relative_error(got[name], exact[name]) < 0.02


@pytest.mark.slow
def test_batch_axes_that_the_weight_was_not_quantized_for_are_refused_by_leaf():
    """Here one scale is shared by all rows of w, so a batch along them has no matrices of its own."""
    fn = lambda p, x: jnp.einsum("bi,bio->bo", x, p["experts"])
    shared = lambda p, x: jnp.einsum("bi,bio->o", x, p["experts"])
    params, x = {"experts": normal(2, 16, 8)}, normal(2, 16)
    with pytest.raises(
        ValueError, match=r"^experts: contracted along its axes \(1,\) in a batch along \(0,\)"
    ):
        sq.quantized(fn)(quantize(shared, params, x), x)
    check(fn, params, x)


# Refusals ---------------------------------------------------------------------------------------------------------

# A line each, because the refusal names it.
REFUSED = {
    "mul": lambda w, x: x @ (w * w.T),
    "exp": lambda w, x: x @ jnp.exp(w**2),
    "add": lambda w, x: x @ (w + w),
    "reshape": lambda w, x: x @ w.reshape(8, 32)[:, :16].reshape(16, 8),  # mixes rows and columns
    "sin": lambda w, x: x @ jnp.sin(w),
    "reduce_sum": lambda w, x: x @ w + jnp.sum(w),
    "scan": lambda w, x: x @ lax.scan(lambda c, _: (c.T, None), w, None, length=2)[0],  # carried
    "gather": lambda w, x: x @ w + w[jnp.array([1])],  # rows, but stored by columns
    "convert_element_type": lambda w, x: x @ w + w.astype(jnp.int32)[0, 0].astype(jnp.float32),
    "dot_general": lambda w, x: x @ w**2,
}


@pytest.fixture(scope="module")
def square():
    """({"net": {"w": a quantized (16, 16) matrix}}, an input)."""
    params, x = {"net": {"w": normal(16, 16)}}, normal(5, 16)
    return quantize(lambda p, x: x @ p["net"]["w"], params, x), x


@pytest.mark.parametrize("primitive", REFUSED)
def test_a_primitive_without_a_rule_is_refused_by_name_leaf_and_line(square, primitive):
    qparams, x = square
    refused = REFUSED[primitive]
    line = refused.__code__.co_firstlineno
    message = (
        rf"^net/w: quantized, but `{primitive}` at \S*test_weight_rules.py:{line}:"
        r".*has no rule.*'net/w': None"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sq.quantized(lambda p, x: refused(p["net"]["w"], x)), qparams, x)


@pytest.mark.slow
def test_the_refusal_says_how_to_go_on():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] ** 2
    params, x = {"a": normal(16, 16), "b": normal(16, 16)}, normal(5, 16)
    stats = sq.calibrate(lambda p, x: (x @ p["a"]) @ p["b"], params, [x])
    with pytest.raises(ValueError, match=re.escape("quantize(params, stats, {'b': None, ...})")):
        sq.quantized(fn)(sq.quantize(params, stats), x)
    qparams = sq.quantize(params, stats, {"b": None, "": sq.W8A8})
    assert 1e-4 < relative_error(sq.quantized(fn)(qparams, x), fn(params, x)) < 0.06


@pytest.mark.slow
def test_a_returned_leaf_is_refused():
    fn = lambda p, x: (x @ p["w"], p["w"])
    qparams = quantize(lambda p, x: x @ p["w"], {"w": normal(16, 8)}, normal(5, 16))
    with pytest.raises(ValueError, match=r"^w: fn returns this quantized leaf; keep it in float"):
        sq.quantized(fn)(qparams, normal(5, 16))


@pytest.mark.slow
def test_a_group_too_long_for_int32_is_refused():
    params, x = {"w": jnp.ones((300_000, 1))}, jnp.ones((2, 300_000))
    fn = lambda p, x: x @ p["w"]
    qparams = quantize(fn, params, x, scheme=sq.Scheme(weight=sq.Int8(group_size=150_000)))
    with pytest.raises(
        ValueError, match="w: contracts 150000 channels; int32 sums are exact up to 133144"
    ):
        sq.quantized(fn)(qparams, x)


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_O3", "W8A16", "W8A8_OUTLIERS"])
@pytest.mark.slow
def test_leaves_without_elements_stay_as_they_are(scheme):
    params = {"w": normal(8, 5), "channels": normal(0, 5), "outputs": normal(8, 0)}

    def fn(p, x):
        y = x @ p["w"] + x[:, :0] @ p["channels"]
        return jnp.concatenate([y, x @ p["outputs"]], 1)

    x = normal(6, 8)
    with pytest.warns(UserWarning, match="every activation was zero at channels"):
        stats = sq.calibrate(fn, params, [x])
    qparams = sq.quantize(params, stats, scheme)
    assert [isinstance(qparams[name], sq.QuantWeight) for name in params] == [True, False, False]
    got = jax.jit(sq.quantized(fn))(qparams, x)
    np.testing.assert_allclose(got, x @ params["w"], atol=0.2)
