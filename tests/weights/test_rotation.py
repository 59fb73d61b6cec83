"""Rotation at run time: (X Q)(Q W) on a scheme's operands, beside numpy; and int4 activations."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import schemes_in_numpy as oracle
from slow import slow_but

import sqjax as sq
from sqjax.numerics.hadamard import hadamard, rotated
from sqjax.weights.quantize import block_of

EPS = 2.0**-23
BLOCK, INNER, OUTPUTS = 64, 128, 24
SCHEMES = {
    "W8A8": sq.W8A8,
    "O2": sq.W8A8_O2,
    "O3": sq.W8A8_O3,
    "W8A16": sq.W8A16,
    "W4A16 g32": sq.Scheme(weight=sq.Int4(group_size=32, zero_point=True), activation=None),
    "W4A8 g32": sq.W4A8.replace(weight=sq.W4A8.weight.replace(group_size=32)),
    "W4A4 g32": sq.Scheme(weight=sq.Int4(group_size=32), activation=sq.PerToken(format="int4")),
    "W4A4 O2": sq.Scheme(weight=sq.Int4(), activation=sq.PerTensor(format="int4")),
    "FP8": sq.FP8,
}


def fn(p, x):
    return x @ p["w"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def with_outliers(*shape, seed=0):
    """Activations of which a few channels are 50 times as large as the others, as after a GLU."""
    large = np.random.default_rng(seed).choice(shape[-1], 4, replace=False)
    return normal(*shape, seed=seed).at[..., large].multiply(50.0)


def quantized(scheme, params, x, **options):
    return sq.quantize(params, sq.calibrate(fn, params, [x], sample=64), scheme, **options)


def relative(got, exact):
    return np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)


# Products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(list(SCHEMES), "W8A8", "O3", "W4A16 g32", "W4A4 g32"))
def test_a_rotated_product_is_that_of_the_rotated_operands(name):
    scheme = SCHEMES[name]
    x, w = with_outliers(20, INNER), normal(INNER, OUTPUTS, seed=1)
    qparams = quantized(scheme.replace(rotation=BLOCK), {"w": w}, x)
    run = jax.jit(sq.quantized(fn))
    got = np.asarray(run(qparams, x), np.float64)
    # Beside numpy these are in test_hadamard; here codes must be made of the same numbers.
    turned_x = np.asarray(rotated(x, BLOCK, exact=scheme.activation is None), np.float64)
    turned_w = np.asarray(rotated(w.T, BLOCK), np.float64)
    expected = oracle.matmul(turned_x, turned_w, scheme, np.abs(turned_x).max())
    assert (np.abs(got - expected.out) <= (16 + INNER) * EPS * expected.magnitude).all()
    plain = np.asarray(run(quantized(scheme, {"w": w}, x), x), np.float64)
    assert (np.abs(got - plain) > (16 + INNER) * EPS * expected.magnitude).any()


@pytest.mark.parametrize("name", slow_but(["W8A8", "O3", "W4A8 g32", "W4A4 g32"], "O3", "W4A4 g32"))
def test_what_meets_the_weight_is_int8(name):
    x, w = normal(20, 96), normal(96, OUTPUTS)
    qparams = quantized(SCHEMES[name].replace(rotation="hadamard"), {"w": w}, x)
    program = jax.make_jaxpr(sq.quantized(fn))(qparams, x)
    of_floats = [dot for dot in jaxprs.dots(program) if dot.dtypes != jaxprs.INT8_DOT]
    assert [dot.shapes[1] for dot in of_floats] == [(96, 96)]  # the transform alone
    assert len(jaxprs.dots(program)) >= 2
    assert not jaxprs.widened(program, larger_than=x.size)


@pytest.mark.parametrize("rotation", ["hadamard", 4, 48])
def test_the_weight_that_it_stands_for_is_the_float_one(rotation):
    w = normal(48, 10)
    weight = quantized(sq.W8A8.replace(rotation=rotation), {"w": w}, normal(4, 48))["w"]
    assert weight.rotation == (48 if rotation == "hadamard" else rotation)
    assert f"rotated in blocks of {weight.rotation}" in repr(weight)
    # Each code is off by half a step; Q adds up errors of independent signs.
    step = float(weight.tensor.scale.max())
    assert np.abs(np.asarray(weight.dequantize() - w)).max() < 2 * step
    assert np.abs(np.asarray(sq.dequantize(weight.tensor) - w)).max() > 10 * step


def test_several_contracted_axes_are_rotated_as_one():
    x, w = normal(5, 6, 8), normal(6, 8, 10)
    heads = lambda p, x: jnp.einsum("thd,hdo->to", x, p["w"])
    stats = sq.calibrate(heads, {"w": w}, [x])
    qparams = sq.quantize({"w": w}, stats, sq.W8A16.replace(rotation=48))
    flat = np.asarray(qparams["w"].tensor.values).reshape(10, 48)
    turned = hadamard(48) @ np.asarray(w, np.float64).reshape(48, 10)
    expected = oracle.symmetric(turned.T, "per_channel", "int8").values
    assert np.abs(flat - expected).max() <= 1
    assert (flat == expected).mean() > 0.99
    got = jax.jit(sq.quantized(heads))(qparams, x)
    assert relative(got, np.asarray(heads({"w": w}, x))) < 0.01


def test_smoothing_comes_before_the_rotation():
    x, w = with_outliers(64, 128), normal(128, 32)
    exact = np.asarray(fn({"w": w}, x))
    scheme = sq.W8A8_O2.replace(smoothing=0.5, rotation="hadamard")
    weight = quantized(scheme, {"w": w}, x)["w"]
    s = np.asarray(weight.smoothing, np.float64)
    turned = hadamard(128) @ (s[:, None] * np.asarray(w, np.float64))
    stored = np.asarray(weight.tensor.values) * np.asarray(weight.tensor.scale)
    assert np.abs(stored - turned.T).max() <= 0.51 * float(weight.tensor.scale.max())
    assert relative(jax.jit(sq.quantized(fn))({"w": weight}, x), exact) < 0.02
    assert relative(weight.dequantize(), np.asarray(w)) < 0.02


# What it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "factor"),
    [
        (sq.W4A4_ROTATED, 1.5),
        (sq.W8A8_O2.replace(rotation="hadamard"), 4.0),
        (sq.W8A8_O3_ROTATED, 4.0),
    ],
    ids=["W4A4", "O2", "O3"],
)
def test_activations_with_outliers_lose_several_times_less(scheme, factor):
    x, w = with_outliers(256, 512), normal(512, 64) / 20
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    run = jax.jit(sq.quantized(fn))

    def error(scheme):
        return relative(run(quantized(scheme, {"w": w}, x), x), exact)

    plain, whole = error(scheme.replace(rotation=None)), error(scheme)
    blocks = error(scheme.replace(rotation=64))
    assert whole * factor < plain
    assert whole < blocks < plain


# Transformations --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stacked_layers_in_a_scan_are_those_apart():
    layers, x = normal(3, 32, 32) / 6, normal(5, 32)

    def stack(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    scheme = sq.W4A4_ROTATED.replace(rotation=16)
    qparams = sq.quantize({"w": layers}, sq.calibrate(stack, {"w": layers}, [x]), scheme)
    got = jax.jit(sq.quantized(stack))(qparams, x)
    for w in layers:
        x = jnp.tanh(jax.jit(sq.quantized(fn))(quantized(scheme, {"w": w}, x), x))
    np.testing.assert_allclose(got, x, atol=1e-6)


@pytest.mark.slow
def test_experts_of_a_ragged_dot_are_those_apart():
    w, x, sizes = normal(2, 32, 8), with_outliers(20, 32), jnp.array([9, 11], jnp.int32)
    ragged = lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes)
    for scheme in (sq.W8A8, sq.W4A4.replace(weight=sq.Int4())):
        scheme = scheme.replace(rotation="hadamard")
        stats = sq.calibrate(ragged, {"w": w}, [(x, sizes)], sample=64)
        got = jax.jit(sq.quantized(ragged))(sq.quantize({"w": w}, stats, scheme), x, sizes)
        for expert, rows in ((0, slice(0, 9)), (1, slice(9, 20))):
            alone = quantized(scheme, {"w": w[expert]}, x[rows])
            np.testing.assert_allclose(
                got[rows], sq.quantized(fn)(alone, x[rows]), rtol=2e-5, atol=1e-4
            )


def test_gradients_are_those_of_the_dequantized_product():
    x, w, g = normal(6, 48), normal(48, 10), normal(6, 10, seed=3)
    qparams = quantized(sq.W4A4_ROTATED, {"w": w}, x)
    _, pull = jax.vjp(lambda x: sq.quantized(fn)(qparams, x), x)
    expected = np.asarray(g, np.float64) @ np.asarray(qparams["w"].dequantize(), np.float64).T
    np.testing.assert_allclose(pull(g)[0], expected, rtol=1e-5, atol=1e-5)


def test_vmap_and_jit_of_quantize_change_nothing():
    x, w = normal(3, 6, 48), normal(48, 10)
    stats = sq.calibrate(fn, {"w": w}, [x])
    qparams = sq.quantize({"w": w}, stats, sq.W4A4_ROTATED)
    under_jit = jax.jit(lambda p, stats: sq.quantize(p, stats, sq.W4A4_ROTATED))({"w": w}, stats)
    jax.tree.map(np.testing.assert_array_equal, qparams, under_jit)
    run = sq.quantized(fn)
    each = jax.vmap(lambda x: run(qparams, x))(x)
    np.testing.assert_allclose(each, run(qparams, x), rtol=1e-6)


def test_a_tied_head_is_rotated_back_where_its_rows_are_read():
    table, ids = normal(40, 32), jnp.array([[3, 39, 0]])

    def tied(p, ids):
        x = p["embed"][ids]
        return x, x @ p["embed"].T, (x @ p["embed"].T) @ p["embed"]

    stats = sq.calibrate(tied, {"embed": table}, [ids])
    weight = sq.quantize({"embed": table}, stats, sq.W8A16.replace(rotation="hadamard"))
    got = jax.jit(sq.quantized(tied))(weight, ids)
    for ours, exact in zip(got, tied({"embed": table}, ids), strict=True):
        assert relative(ours, np.asarray(exact)) < 0.01


def test_a_mask_of_channels_is_refused_because_codes_are_of_their_sums():
    x, w = normal(5, 32), normal(32, 8)
    mask = jnp.broadcast_to(jnp.arange(32)[:, None] % 2, (32, 8))
    masked = lambda p, x: x @ jnp.where(mask > 0, p["w"], 0.0)
    weight = quantized(sq.W8A16.replace(rotation="hadamard"), {"w": w}, x)
    with pytest.raises(ValueError, match=r"^w: quantized, but `select_n`.* has no rule"):
        sq.quantized(masked)(weight, x)


# Static ranges ----------------------------------------------------------------------------------------------------


def test_a_static_range_is_that_of_the_sampled_tokens():
    x, w = with_outliers(64, 48), normal(48, 10)
    weight = quantized(sq.W8A8_O3_ROTATED, {"w": w}, x)["w"]
    largest = np.abs(np.asarray(x, np.float64) @ hadamard(48)).max()
    np.testing.assert_allclose(weight.input_scale, largest / 127, rtol=2.0**-8)
    errors = sq.site_errors(fn, {"w": w}, {"w": weight}, 2 * x)
    assert 0 < errors["w"].clipped < 0.2
    assert sq.site_errors(fn, {"w": w}, {"w": weight}, x)["w"].clipped == 0


def test_smoothquant_keeps_the_sample_that_a_static_range_needs():
    x, w = with_outliers(64, 48), normal(48, 10)
    weight = sq.smoothquant(fn, {"w": w}, [x], scheme=sq.W8A8_O3_ROTATED)["w"]
    largest = np.abs(np.asarray(x, np.float64) @ hadamard(48)).max()
    np.testing.assert_allclose(weight.input_scale, largest / 127, rtol=2.0**-8)


def test_a_static_range_without_a_sample_is_refused():
    params, x = {"w": normal(48, 10)}, normal(5, 48)
    stats = sq.calibrate(fn, params, [x])
    message = r"^w: a static range of rotated .* call calibrate\(..., sample=512\)"
    with pytest.raises(ValueError, match=message):
        sq.quantize(params, stats, sq.W8A8_O3_ROTATED)


def test_a_static_range_covers_what_a_token_outside_of_the_sample_was():
    """3000 is once in 100 tokens, of which 4 are sampled; it becomes 3000 / 8 in 64 channels."""
    w = normal(64, 10)
    x = normal(100, 64).at[int(np.random.default_rng(0).integers(100)), 3].set(3000.0)
    sampled = sq.calibrate(fn, {"w": w}, [x], sample=4)
    assert np.abs(sampled.sample["w"].rows).max() < 3000
    weight = sq.quantize({"w": w}, sampled, sq.W8A8_O3_ROTATED)["w"]
    np.testing.assert_allclose(weight.input_scale, 3000 / 8 / 127, rtol=1e-6)


def test_an_expert_that_few_tokens_reached_takes_the_largest_range():
    experts = lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"])
    w, x = normal(2, 32, 8), normal(2, 64, 32).at[1, 4:].set(0.0)
    with pytest.warns(UserWarning, match="less than 32 tokens reached"):
        stats = sq.calibrate(experts, {"w": w}, [x], sample=64)
    scale = sq.quantize({"w": w}, stats, sq.W8A8_O3_ROTATED)["w"].input_scale
    largest = np.abs(np.asarray(x[0], np.float64) @ hadamard(32)).max()
    np.testing.assert_allclose(scale, [largest / 127] * 2, rtol=2.0**-8)


def test_a_static_range_of_several_axes_is_that_of_the_stored_order():
    """The activation has its axes in another order than the weight."""
    x, w = with_outliers(40, 8, 6), normal(6, 10, 8)
    turned = lambda p, x: jnp.einsum("tji,ioj->to", x, p["w"])
    stats = sq.calibrate(turned, {"w": w}, [x], sample=64)
    qparams = sq.quantize({"w": w}, stats, sq.W8A8_O3_ROTATED)
    flat = np.asarray(x, np.float64).swapaxes(1, 2).reshape(40, 48)
    largest = np.abs(flat @ hadamard(48)).max()
    np.testing.assert_allclose(qparams["w"].input_scale, largest / 127, rtol=2.0**-8)


# Files, layers ----------------------------------------------------------------------------------------------------


def test_a_saved_weight_is_rotated_still(tmp_path):
    x, w = normal(5, 48), normal(48, 10)
    qparams = quantized(sq.W4A4_ROTATED, {"w": w}, x)
    sq.save(tmp_path / "w.safetensors", qparams)
    again = sq.load(tmp_path / "w.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(qparams)
    jax.tree.map(np.testing.assert_array_equal, again, qparams)


def test_a_layer_alone_has_no_static_range_of_rotated_activations():
    params = {"kernel": normal(48, 10)}
    with pytest.raises(ValueError, match=r"^quantize_dense: kernel: a static range of rotated"):
        sq.linen.quantize_dense(params, sq.W8A8_O3_ROTATED, absmax=jnp.ones(48))


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        (sq.W8A8, {"rotation": 1}, r"Scheme\.rotation: expected 'hadamard', an int of 2 or more"),
        (sq.EMBEDDING_INT8, {"rotation": 8}, r"Scheme\.rotation: expected None, because embedd"),
        (sq.W8A8_OUTLIERS, {"rotation": 8}, r"Scheme\.outliers: expected None with a rotation"),
        (
            sq.W8A8_O3.replace(activation=sq.Static(range="mse")),
            {"rotation": 8},
            r"Scheme\.activation: expected range='absmax' with",
        ),
        (sq.FP8, {"activation": sq.PerToken(format="int4")}, r"Scheme\.activation: expected a fo"),
    ],
)
def test_a_scheme_that_can_not_be_is_refused(scheme, changes, message):
    with pytest.raises(ValueError, match=message):
        scheme.replace(**changes)


def test_blocks_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(
        ValueError, match=r"^w: rotation: .* 48 contracted channels, got 32; take 'hadamard'"
    ):
        quantized(sq.W8A8.replace(rotation=32), {"w": normal(48, 10)}, normal(5, 48))
    assert block_of("hadamard", 48) == 48


def test_a_convolution_is_refused():
    conv = lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME")
    params, x = {"w": normal(4, 3, 3, 3)}, normal(1, 3, 8, 8)
    stats = sq.calibrate(conv, params, [x])
    with pytest.raises(ValueError, match=r"^w: rotations are for matmuls"):
        sq.quantize(params, stats, sq.W8A8.replace(rotation="hadamard"))
