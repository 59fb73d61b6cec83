"""The Mosaic-GPU matmul in Pallas's interpreter, beside numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from sqjax.numerics import mosaic

has_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="needs jax 0.11"
)


def interpreted(*args, **kwargs):
    # Fewer than there are blocks, which then take turns.
    out = mosaic.matmul(*args, multiprocessors=2, interpret=True, **kwargs)
    return np.asarray(out, np.float64)


def integers(rng, low, high, shape, dtype=jnp.int8):
    return jnp.asarray(rng.integers(low, high, shape), jnp.int8).astype(dtype)


def scales(rng, *shape):
    return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)


@has_interpreter
@pytest.mark.parametrize(("rows", "channels"), [(5, 256), (100, 128), (300, 256)])
def test_w8a8_is_exact_but_for_its_scales(rows, channels):
    rng = np.random.default_rng(rows)
    x, w = integers(rng, -127, 128, (rows, channels)), integers(rng, -127, 128, (128, channels))
    scale, x_scale = scales(rng, 128, 1), scales(rng, rows)
    got = interpreted(x, w, scale, x_scale=x_scale, dtype=jnp.float32)
    sums = np.asarray(x, np.int64) @ np.asarray(w, np.int64).T
    want = np.asarray(x_scale, np.float64)[:, None] * sums * np.asarray(scale, np.float64).T
    np.testing.assert_allclose(got, want, rtol=4 * 2.0**-24)


@has_interpreter
@pytest.mark.parametrize("rows", [5, 300])
def test_float8_is_near_float64(rows):
    rng = np.random.default_rng(rows)
    x, w = (
        jnp.asarray(rng.normal(size=(n, 256)), jnp.float32).astype(jnp.float8_e4m3fn)
        for n in (rows, 128)
    )
    scale, x_scale = scales(rng, 128, 1), scales(rng, rows)
    got = interpreted(x, w, scale, x_scale=x_scale, dtype=jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    want = np.asarray(x_scale, np.float64)[:, None] * exact * np.asarray(scale, np.float64).T
    # 256 products, each sum rounded to float32; the interpreter adds as float32 does.
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 256 * 2.0**-24


@has_interpreter
@pytest.mark.parametrize("zeros", [False, True])
def test_int4_in_groups(zeros):
    rng = np.random.default_rng(0)
    rows, channels, outputs = 20, 512, 128
    x = jnp.asarray(rng.normal(size=(rows, channels)), jnp.bfloat16)
    w, scale = integers(rng, -8, 8, (outputs, channels), jnp.int4), scales(rng, outputs, 2)
    zero = integers(rng, -8, 8, (outputs, 2)) if zeros else None
    got = interpreted(x, w, scale, zero=zero)
    whole = np.asarray(w.astype(jnp.int8), np.float64)
    if zeros:
        whole = whole - np.repeat(np.asarray(zero, np.float64), 256, 1)
    whole = whole * np.repeat(np.asarray(scale, np.float64), 256, 1)
    want = np.asarray(x, np.float64) @ whole.T
    # Scale, weight and result are bfloat16, each off by 2^-9 at most.
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 3 * 2.0**-9


@has_interpreter
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_weights_with_one_scale_are_exact_in_bfloat16(dtype):
    rng = np.random.default_rng(0)
    x = integers(rng, -9, 10, (130, 256)).astype(jnp.bfloat16)
    w, scale = integers(rng, -8, 8, (128, 256), dtype), scales(rng, 128, 1)
    got = interpreted(x, w, scale, dtype=jnp.float32)
    sums = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.int8), np.float64).T
    np.testing.assert_allclose(got, sums * np.asarray(scale, np.float64).T, rtol=2 * 2.0**-24)


X, W, S = jnp.ones((4, 256), jnp.int8), jnp.ones((128, 256), jnp.int8), jnp.ones((128, 1))


@pytest.mark.parametrize(
    ("operands", "more", "problem"),
    [
        ((X.astype(jnp.float32), W, S), {}, r"got \('float32', 'int8'\)"),
        ((X[:, :128], W, S), {}, r"ask for values of shape \(128, 128\), got \(128, 256\)"),
        ((X, W, S), {"x_scale": jnp.ones(3)}, r"x_scale of shape \(4,\), got \(3,\)"),
        ((X[:, :200], W[:, :200], S), {}, "multiples of 128, got 200 and 128"),
        ((X, W, jnp.ones((128, 2))), {}, "expected one group .* got 2 of 128"),
        ((X.astype(jnp.bfloat16), W, jnp.ones((128, 4))), {}, "256 channels in 4 groups"),
        (
            (X.astype(jnp.bfloat16), W, S),
            {"x_scale": jnp.ones(4)},
            "x_scale is for an int8 or float8 x, got .* bfloat16",
        ),
        (
            (X.astype(jnp.bfloat16), W, S),
            {"zero": jnp.ones((128, 1), jnp.int8)},
            "zero points are for int4 values",
        ),
    ],
)
def test_what_does_not_fit_is_named(operands, more, problem):
    with pytest.raises(ValueError, match=problem):
        mosaic.matmul(*operands, **more)


@pytest.mark.skipif(hasattr(plgpu, "InterpretGPUParams"), reason="jax 0.10 only")
def test_an_older_jax_is_told():
    with pytest.raises(ValueError, match=r"expected jax 0\.11 or later, got 0\.10"):
        mosaic.matmul(X, W, S)
