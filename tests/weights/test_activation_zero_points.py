"""int4 activations with a zero point for each token: products and convolutions beside numpy."""

import convolutions_in_numpy
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import schemes_in_numpy as oracle

import sqjax as sq
from sqjax.numerics.formats import INT4
from sqjax.numerics.weight_products import quantized_rows
from sqjax.weights.quantize import quantize_weight

EPS = 2.0**-23
ROWS, INNER, OUTPUTS = 20, 200, 9  # the last group of 32 is shorter
ZERO_POINT = sq.PerToken(format="int4", zero_point=True)
WEIGHTS = {
    "int8": sq.Int8(),
    "int4 in groups": sq.Int4(group_size=32),
    "int4 with zeros": sq.Int4(group_size=32, zero_point=True),
    "two levels": sq.Int4(group_size=32, zero_point=True, two_level=True),
}
SCHEMES = {name: sq.Scheme(weight=w, activation=ZERO_POINT) for name, w in WEIGHTS.items()}


def fn(p, x):
    return x @ p["w"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def tokens(rows=ROWS, inner=INNER):
    """Tokens of very different ranges, which are about 0, or on one side of it, or all 0."""
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, inner)) + rng.integers(-4, 5, (rows, 1))
    x *= 4.0 ** rng.integers(-3, 4, (rows, 1))
    x[0], x[1], x[2] = np.abs(x[0]), -np.abs(x[1]), 0.0
    return jnp.asarray(x, jnp.float32)


def weights(w):
    """{name: the weight in each scheme}, by one program."""
    make = lambda w: {name: quantize_weight(w, (0,), s) for name, s in SCHEMES.items()}
    return jax.jit(make)(w)


def relative(got, exact):
    return np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)


# Codes ------------------------------------------------------------------------------------------------------------


def test_codes_less_zero_points_are_those_of_numpy_bit_for_bit():
    x = oracle.settled(np.float64(tokens()), np.ones((1, INNER)), [SCHEMES["int8"]], [])[0]
    expected, scale = oracle.quantize_activations(x, SCHEMES["int8"])
    run = jax.jit(lambda x: quantized_rows(x, "per_token_zero_point", None, INT4))
    got, of_rows = run(jnp.float32(x))
    assert got.dtype == jnp.int8
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(of_rows, scale, rtol=3e-7)
    assert (expected.min(), expected.max()) == (-15, 15)
    assert np.ptp(expected, axis=1).max() == 15  # 16 codes a token
    assert (np.abs(expected * scale - x) <= scale * 0.500001).all()


def test_a_token_on_one_side_of_0_has_half_the_error():
    """Its step is max / 15, in place of max / 7."""
    x = jax.nn.relu(normal(200, 256))
    errors = []
    for kind in ("per_token_zero_point", "per_token"):
        q, scale = quantized_rows(x, kind, None, INT4)
        errors.append(relative(np.asarray(q) * np.asarray(scale), np.asarray(x)))
    assert errors[0] / errors[1] == pytest.approx(7 / 15, rel=0.03)


def test_rows_that_hold_nan_are_nan():
    x = tokens()
    x = x.at[4, 7].set(np.nan).at[5, 3].set(-np.float32(np.nan))
    weight = quantize_weight(normal(INNER, OUTPUTS), (0,), SCHEMES["int8"])
    got = np.asarray(jax.jit(sq.quantized(fn))({"w": weight}, x))
    np.testing.assert_array_equal(np.isnan(got).all(1), np.isnan(x).any(1))
    np.testing.assert_array_equal(np.isnan(got).any(1), np.isnan(x).any(1))


# Products ---------------------------------------------------------------------------------------------------------


def exact_operands():
    """Integers times powers of two: each token has 15 steps between its ends; all scales are exact."""
    rng = np.random.default_rng(5)
    low = rng.integers(-15, 1, (ROWS, 1))
    x = rng.integers(0, 16, (ROWS, INNER)) + low
    x[:, :2] = np.concatenate([low, low + 15], 1)
    w = rng.integers(-127, 128, (INNER, OUTPUTS))
    w[0] = 127
    return x, 2.0 ** rng.integers(-9, 9, (ROWS, 1)), w, 2.0 ** rng.integers(-9, 9, OUTPUTS)


@pytest.mark.parametrize("rows", [ROWS, 3])
def test_products_are_the_integers_sums_bit_for_bit(rows):
    x, of_rows, w, of_outputs = exact_operands()
    x, of_rows = x[:rows], of_rows[:rows]
    weight = quantize_weight(jnp.float32(w * of_outputs), (0,), SCHEMES["int8"])
    got = jax.jit(sq.quantized(fn))({"w": weight}, jnp.float32(x * of_rows))
    np.testing.assert_array_equal(got, (x @ w) * of_rows * of_outputs)


@pytest.mark.parametrize("rows", [ROWS, 3])
def test_every_weight_meets_the_same_codes(rows):
    """A few rows have programs of their own on a CPU."""
    x, w = tokens()[:rows], normal(INNER, OUTPUTS, seed=1)
    schemes = [*SCHEMES.values()]
    x, w = map(jnp.float32, oracle.settled(x, w.T, schemes, schemes))
    made = weights(w.T)
    run = lambda made, x: {name: sq.quantized(fn)({"w": one}, x) for name, one in made.items()}
    program = jax.make_jaxpr(run)(made, x)
    dots = jaxprs.dots(program)
    assert {dot.dtypes for dot in dots} == {jaxprs.INT8_DOT}
    assert len(dots) >= len(made)
    got = jax.jit(run)(made, x)
    plain = {name: s.replace(activation=sq.PerToken(format="int4")) for name, s in SCHEMES.items()}
    for name, scheme in SCHEMES.items():
        expected = oracle.matmul(x, w, scheme)
        limit = (8 + INNER) * EPS * expected.magnitude
        assert (np.abs(got[name] - expected.out) <= limit).all(), name
        other = oracle.matmul(x, w, plain[name])
        assert (np.abs(got[name] - other.out) > limit).any(), name


def test_what_reads_the_weight_the_other_way_has_zero_points_too():
    """x @ w.T of a w that was quantized for x @ w: x times the scales is what is rounded."""
    weight = quantize_weight(normal(40, 64), (0,), SCHEMES["int8"])
    x = jnp.abs(tokens(6, 64))
    got = jax.jit(sq.quantized(lambda p, x: x @ p["w"].T))({"w": weight}, x)
    codes = np.asarray(weight.tensor.values, np.int64)
    scaled = np.float64(x) * np.float64(weight.tensor.scale)[:, 0]
    q, scale = oracle.quantize_activations(scaled, SCHEMES["int8"])
    np.testing.assert_allclose(got, (q @ codes) * scale, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_dequantized_product():
    x, g = tokens(6, 48), normal(6, 10, seed=3)
    weight = quantize_weight(normal(48, 10), (0,), sq.W4A4.replace(activation=ZERO_POINT))
    _, pull = jax.vjp(lambda x: sq.quantized(fn)({"w": weight}, x), x)
    expected = np.asarray(g, np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    np.testing.assert_allclose(pull(g)[0], expected, rtol=1e-5, atol=1e-5)


def test_vmap_and_jit_change_nothing():
    x = tokens(12, 48).reshape(3, 4, 48)
    scheme = sq.W4A4_ROTATED.replace(activation=ZERO_POINT)
    qparams = {"w": quantize_weight(normal(48, 10), (0,), scheme)}
    run = sq.quantized(fn)
    each = jax.vmap(lambda x: run(qparams, x))(x)
    np.testing.assert_allclose(each, run(qparams, x), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(run)(qparams, x), run(qparams, x), rtol=1e-6)


@pytest.mark.slow
def test_experts_of_a_ragged_dot_are_those_apart():
    w, x, sizes = normal(2, 32, 8), tokens(20, 32), jnp.array([9, 11], jnp.int32)
    ragged = lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes)
    stack = quantize_weight(w, (1,), SCHEMES["int8"], batch=(0,))
    got = sq.quantized(ragged)({"w": stack}, x, sizes)
    for expert, rows in ((0, slice(0, 9)), (1, slice(9, 20))):
        alone = quantize_weight(w[expert], (0,), SCHEMES["int8"])
        np.testing.assert_allclose(got[rows], sq.quantized(fn)({"w": alone}, x[rows]), rtol=2e-5)


# Convolutions -----------------------------------------------------------------------------------------------------


def test_convolutions_have_a_zero_point_for_each_image():
    """What is padded is 0, which is 0 in codes less zero points too."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 16, (2, 5, 6, 3)) - np.array([3, 12]).reshape(2, 1, 1, 1)
    x[:, 0, 0, :2] = [[-3, 12], [-12, 3]]
    kernel = rng.integers(-127, 128, (3, 3, 3, 4))
    kernel[0, 0, 0] = 127
    of_images = np.array([0.25, 8.0]).reshape(2, 1, 1, 1)
    run = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    params, images = {"w": jnp.float32(kernel)}, jnp.float32(x * of_images)
    qparams = sq.quantize(params, sq.calibrate(run, params, [images]), SCHEMES["int8"])
    got = jax.jit(sq.quantized(run))(qparams, images)
    sums = convolutions_in_numpy.convolve(x, kernel, (1, 1), ((1, 1),) * 2, (1, 1), (1, 1))
    np.testing.assert_array_equal(got, sums * of_images)


# Trees, searches, files -------------------------------------------------------------------------------------------


def test_a_saved_weight_and_its_texts(tmp_path):
    scheme = sq.W4A4_ROTATED.replace(activation=ZERO_POINT)
    weight = quantize_weight(normal(48, 10), (0,), scheme)
    sq.save(tmp_path / "w.safetensors", {"w": weight})
    again = sq.load(tmp_path / "w.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure({"w": weight})
    jax.tree.map(np.testing.assert_array_equal, again, {"w": weight})
    assert "activations int4 per_token_zero_point" in repr(weight)
    assert eval(repr(scheme), vars(sq)) == scheme


@pytest.mark.slow
def test_a_search_and_site_errors_see_the_zero_points():
    """Both compute with the codes of the product, in which a one-sided token has half the error."""
    scaled = lambda p, x: (x * p["norm"]) @ p["w"]
    x, params = jax.nn.relu(normal(64, 48)), {"norm": jnp.ones((1, 48)), "w": normal(48, 10)}
    stats = sq.calibrate(scaled, params, [x], sample=64)
    exact = np.asarray(scaled(params, x), np.float64)
    errors = []
    for activation in (ZERO_POINT, sq.PerToken(format="int4")):
        scheme = sq.Scheme(weight=sq.Int8(), activation=activation)
        qparams = sq.quantize(params, stats, scheme)
        change = np.square(np.asarray(sq.quantized(scaled)(qparams, x)) - exact)
        snr = sq.site_errors(scaled, params, qparams, x)["w"].snr_db
        wanted = np.square(exact).sum() / change.sum()
        assert 10 ** (snr / 10) == pytest.approx(wanted, rel=1e-3)
        of_tokens = change.sum(1) / np.square(exact).sum(1)
        [found] = sq.search_alpha(params, stats, scheme, grid=[0.5]).errors.values()
        assert found[0] == pytest.approx(of_tokens.mean(), rel=0.01)
        errors.append(np.sqrt(change.sum()))
    assert errors[0] / errors[1] == pytest.approx(7 / 15, rel=0.1)


def test_a_layer_and_a_kernel_of_pallas():
    layer = sq.linen.quantize_dense({"kernel": normal(48, 10)}, SCHEMES["int8"])
    assert layer["kernel"].activations == "per_token_zero_point"
    with pytest.raises(ValueError, match=r"^kernel: the kernel 'pallas' "):
        sq.with_kernel(layer, "pallas")
