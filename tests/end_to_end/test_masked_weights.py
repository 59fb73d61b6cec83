"""Weights that the function masks: their codes where the mask is 1, else that of 0, and the product in int8."""

from dataclasses import replace
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
W = normal(16, 12)
MASK = np.asarray(normal(16, 12, seed=5) > -0.3)
FLOAT = MASK.astype(np.float32)
TRI = np.tri(16, 12)


@pytest.fixture(autouse=True)
def promotions():
    """As users have them: a boolean beside a float becomes one, a row beside a matrix too."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def made(inputs, outputs):
    """A mask of MADE: an output sees the inputs of a smaller degree."""
    return (jnp.arange(inputs)[:, None] % 7 < jnp.arange(outputs)[None, :] % 5).astype(jnp.float32)


#: What x is multiplied with, and what remains of w.
WAYS = {
    "captured": (lambda p: p["w"] * FLOAT, MASK),
    "captured, in bfloat16": (lambda p: p["w"] * FLOAT.astype(jnp.bfloat16), MASK),
    "of integers": (lambda p: p["w"] * MASK.astype(np.int8), MASK),
    "on the left": (lambda p: jnp.asarray(FLOAT) * p["w"], MASK),
    "captured booleans": (lambda p: MASK * p["w"], MASK),
    "a boolean leaf": (lambda p: p["w"] * p["mask"], MASK),
    "a boolean leaf, converted": (lambda p: p["w"] * p["mask"].astype(jnp.float32), MASK),
    "where": (lambda p: jnp.where(MASK, p["w"], 0), MASK),
    "where a leaf": (lambda p: jnp.where(p["mask"], p["w"], 0.0), MASK),
    "where not": (lambda p: jnp.where(p["mask"], jnp.zeros_like(p["w"]), p["w"]), ~MASK),
    "1 - mask": (lambda p: p["w"] * (1 - FLOAT), ~MASK),
    "transposed": (lambda p: (p["w"].T * FLOAT.T).T, MASK),
    "a mask that is transposed": (lambda p: p["w"] * jnp.asarray(FLOAT.T).T, MASK),
    "tril": (lambda p: jnp.tril(p["w"]), TRI),
    "tril of ones": (lambda p: p["w"] * jnp.tril(jnp.ones((16, 12))), TRI),
    "two masks": (lambda p: p["w"] * FLOAT * jnp.tri(16, 12), MASK * TRI),
    "a product of masks": (lambda p: p["w"] * (FLOAT * jnp.tri(16, 12)), MASK * TRI),
    "channels": (lambda p: p["w"] * FLOAT[:, :1], MASK[:, :1]),
    "outputs": (lambda p: p["w"] * FLOAT[:1], MASK[:1]),
    "a switch": (lambda p: p["w"] * p["mask"][0, 0], MASK[0, 0]),
    "made": (lambda p: p["w"] * made(16, 12), made(16, 12)),
    "heads": (lambda p: (p["w"] * FLOAT).reshape(16, 3, 4).reshape(16, 12), MASK),
    "behind a barrier": (lambda p: lax.optimization_barrier((p["w"] * FLOAT, p["mask"]))[0], MASK),
    "then a gain": (lambda p: p["w"] * FLOAT * np.linspace(2, 3, 12, dtype=np.float32),
                    MASK * np.linspace(2, 3, 12)),
    "a captured gain": (lambda p: p["w"] / np.linspace(2, 3, 12, dtype=np.float32),
                        1 / np.linspace(2, 3, 12)),
}  # fmt: skip


def in_int8(x, w, mask):
    """x @ (w * mask) in float64, of the codes of all of w."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    of_x = np.abs(x).max(1, keepdims=True) / 127
    of_w = np.abs(w).max(0, keepdims=True) / 127
    return np.round(x / of_x) @ (np.round(w / of_w) * mask) * of_x * of_w


@pytest.mark.slow
def test_masked_weights_run_in_int8():
    """Every way in one program."""
    params = {name: {"w": W, "mask": jnp.asarray(MASK)} for name in WAYS}

    def fn(p, x):
        return {name: x @ way(p[name]) for name, (way, _) in WAYS.items()}

    stats = sq.calibrate(fn, params, [X])
    assert [site.path for site in stats.graph.sites] == [f"{name}/w" for name in WAYS]
    qparams = sq.quantize(params, stats)
    run = sq.quantized(fn)
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, X))]
    assert dots == [jaxprs.INT8_DOT] * len(WAYS)
    got = jax.jit(run)(qparams, X)
    for name, (_, remains) in WAYS.items():
        expected = in_int8(X, W, np.asarray(remains, np.float64))
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-3, err_msg=name)


NORMED = {"norm": 1 + normal(1, 16) / 9, "w": W, "mask": jnp.asarray(MASK)}


@pytest.mark.parametrize("mask", [lambda p: FLOAT, lambda p: p["mask"], lambda p: made(16, 12)])
@pytest.mark.parametrize("by", [jnp.multiply, lambda w, m: jnp.where(m, w, 0)])
def test_a_smoothing_scale_passes_through_a_mask(by, mask):
    def fn(p, x):
        return (x * p["norm"]) @ by(
            p["w"], mask(p).astype(bool if by is not jnp.multiply else None)
        )

    stats = sq.calibrate(fn, NORMED, [X])
    [group] = stats.graph.groups
    assert group.absorbers == ("norm",)
    smoothed = sq.smooth(NORMED, stats, 0.5)
    s = np.asarray(NORMED["norm"] / smoothed["norm"])[0]
    assert s.max() > 2 * s.min()
    np.testing.assert_allclose(smoothed["w"], W * s[:, None], rtol=1e-5)
    np.testing.assert_allclose(fn(smoothed, X), fn(NORMED, X), rtol=1e-4, atol=1e-4)


SCHEMES = {
    "static, smoothed": sq.W8A8_O3.replace(smoothing=0.5),
    "outliers": sq.W8A8_OUTLIERS.replace(smoothing=0.3),
    "int4": sq.W4A16_G64,
    "int4, int8": sq.W4A8,
    "float8": sq.FP8,
}


@pytest.mark.slow
@pytest.mark.every_case
def test_other_schemes_mask_their_codes():
    """fn with a mask is, bit for bit, x @ w with what numpy has masked of the codes."""
    x, w, mask = normal(6, 128).at[:, (3, 70)].mul(40), 1 + normal(128, 12), np.tri(128, 12, -60)
    params = {name: {"w": w} for name in SCHEMES}
    rules = {f"^{name}/": scheme for name, scheme in SCHEMES.items()}

    def fn(p, x):
        return {name: x @ (p[name]["w"] * mask.astype(np.float32)) for name in SCHEMES}

    def plain(p, x):
        return {name: x @ p[name]["w"] for name in SCHEMES}

    def masked(weight):
        tensor = weight.tensor
        group = tensor.group or 128
        zero = np.zeros((12, 1)) if tensor.zero is None else np.asarray(tensor.zero, int)
        zeros = np.repeat(zero, group, 1)[:, :128] if zero.shape[1] > 1 else zero
        values = np.where(mask.T, np.asarray(tensor.values), zeros.astype(tensor.values.dtype))
        changed = replace(weight, tensor=replace(tensor, values=jnp.asarray(values)))
        if weight.outliers is None:
            return changed
        kept = np.asarray(weight.outliers.weight) * mask.T[:, np.asarray(weight.outliers.channels)]
        return replace(changed, outliers=weight.outliers._replace(weight=jnp.asarray(kept)))

    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), rules)
    assert qparams["outliers"]["w"].outliers.channels.size
    assert qparams["int4"]["w"].tensor.zero is not None
    by_numpy = {name: {"w": masked(qparams[name]["w"])} for name in SCHEMES}
    got, expected = jax.jit(sq.quantized(fn))(qparams, x), jax.jit(sq.quantized(plain))(by_numpy, x)
    for name in SCHEMES:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
        exact = np.asarray(fn(params, x)[name])
        assert 0 < np.abs(got[name] - exact).max() < 0.1 * np.abs(exact).max()


def within(p, x):
    """Masks of the layers that the scan runs over, too."""
    return lax.scan(lambda x, own: (jnp.tanh(x @ (own["w"] * own["mask"])), None), x, p)[0]


def captured(p, x):
    masks = np.asarray(LAYERS["mask"], np.float32)
    return lax.scan(lambda x, own: (jnp.tanh(x @ (own[0] * own[1])), None), x, (p["w"], masks))[0]


def before(p, x):
    stack = jnp.where(p["mask"], p["w"], 0)
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


LAYERS = {"w": normal(2, 8, 8), "mask": jnp.asarray(normal(2, 8, 8, seed=3) > 0)}


@pytest.mark.parametrize("fn", [within, captured, before])
@pytest.mark.slow
def test_layers_that_a_scan_runs_over(fn):
    x = normal(3, 8)
    stats = sq.calibrate(fn, LAYERS, [x])
    assert [(site.path, site.channels) for site in stats.graph.sites] == [("w", (2, 8))]
    qparams = sq.quantize(LAYERS, stats)
    run = sq.quantized(fn)
    assert jaxprs.INT8_DOT in [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, x))]
    expected = np.asarray(x, np.float64)
    for w, mask in zip(np.asarray(LAYERS["w"]), np.asarray(LAYERS["mask"]), strict=True):
        expected = np.tanh(in_int8(expected, w, mask))
    np.testing.assert_allclose(run(qparams, x), expected, atol=1e-4)


@pytest.mark.slow
def test_a_kernel_of_which_a_causal_mask_takes_the_centre():
    """PixelCNN's masked convolution; in float64 of the kernel's codes, and of the image."""
    causal = np.arange(9).reshape(3, 3, 1, 1) < 4

    def fn(p, x):
        kernel = p["w"] * causal.astype(np.float32)
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params, x = {"w": normal(3, 3, 4, 5)}, normal(2, 5, 6, 4)
    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
    assert isinstance(qparams["w"], sq.QuantWeight)
    got = np.asarray(jax.jit(sq.quantized(fn))(qparams, x))
    kernel = np.asarray(sq.dequantize(qparams["w"].tensor), np.float64)
    expected = np.zeros((2, 5, 6, 5))
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0)):
        expected += padded[:, i : i + 5, j : j + 6] @ kernel[i, j]
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.slow
def test_a_mask_of_what_every_device_has():
    mesh = Mesh(jax.devices()[:1], ("model",))
    by_outputs = PartitionSpec(None, "model")
    specs = (PartitionSpec(), by_outputs, by_outputs)

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=by_outputs)
    def product(x, w, mask):
        return lax.cond(x[0, 0] > 99, lambda: x @ w, lambda: x @ (w * mask))

    def fn(p, x):
        return product(x, p["w"], FLOAT)

    qparams = sq.quantize({"w": W}, sq.calibrate(fn, {"w": W}, [X]))
    got = sq.quantized(fn)(qparams, X)
    np.testing.assert_allclose(got, in_int8(X, W, MASK), rtol=1e-4, atol=1e-3)


GENERAL = np.linspace(1, 2, 192, dtype=np.float32).reshape(16, 12)
MADE_OF_IT = "w: `dot_general` at .* multiplies what `{}` at .* makes of it: it stays float"
NO_MASKS = {  # what is multiplied, and the reason that the graph gives
    "a leaf of floats": (lambda p, x: p["w"] * p["m"], "; if one is a mask, make the mask boolean"),
    "no mask": (lambda p, x: p["w"] * GENERAL, MADE_OF_IT.format("mul")),
    "a number for each channel": (lambda p, x: p["w"] * GENERAL[:, :1], MADE_OF_IT.format("mul")),
    "divided by a mask": (lambda p, x: p["w"] / FLOAT, MADE_OF_IT.format("div")),
    "other than zeros": (lambda p, x: jnp.where(MASK, p["w"], 1.0), MADE_OF_IT.format("select_n")),
    "by its own elements": (
        lambda p, x: jnp.where(jnp.abs(p["w"]) > 0.5, p["w"], 0),
        MADE_OF_IT.format("select_n"),
    ),
    "the condition": (lambda p, x: jnp.where(p["w"] > 0, GENERAL, 0), "no matmul"),
}


@pytest.mark.parametrize("case", NO_MASKS)
def test_what_is_no_mask_stays_float(case):
    way, reason = NO_MASKS[case]
    params = {"w": W, "m": jnp.asarray(FLOAT)}
    with pytest.raises(ValueError, match=reason):
        sq.calibrate(lambda p, x: x @ way(p, x), params, [X])


@pytest.mark.slow
def test_a_mask_that_an_input_makes_is_none():
    def fn(p, x):
        return x @ (p["w"] * (x[:1].T > 0)) + x @ p["other"]

    params = {"w": W, "other": W}
    assert [site.path for site in sq.calibrate(fn, params, [X]).graph.sites] == ["other"]


@pytest.mark.slow
def test_a_quantized_weight_meets_another_mask_than_it_was_calibrated_with():
    """What was a mask then and holds other numbers now is refused, not taken for one."""

    def fn(p, x, c):
        return x @ (p["w"] * (c > 0.5))

    qparams = sq.quantize({"w": W}, sq.calibrate(lambda p, x: x @ p["w"], {"w": W}, [X]))
    got = jax.jit(sq.quantized(fn))(qparams, X, FLOAT)
    np.testing.assert_allclose(got, in_int8(X, W, MASK), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"w: quantized, but `mul` at .* has no rule"):
        sq.quantized(lambda p, x: x @ (p["w"] * GENERAL))(qparams, X)
