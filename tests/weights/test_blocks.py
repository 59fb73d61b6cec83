"""float8 weights with a scale for each block of outputs and channels, against numpy."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sqjax as sq
from sqjax.weights.quantize import quantize_weight

SCHEME = sq.FP8.replace(weight=sq.Float8(block_size=8))


def scales_of(kernel, size):
    """The scales of a kernel (in, out), outputs first: loops over the blocks."""
    w = np.asarray(kernel, np.float64).T
    scales = np.zeros((w.shape[0], -(-w.shape[1] // size)))
    for i in range(0, w.shape[0], size):
        for j in range(0, w.shape[1], size):
            largest = np.abs(w[i : i + size, j : j + size]).max()
            scales[i : i + size, j // size] = largest / 448
    return scales


def test_every_block_has_the_scale_of_its_largest_number():
    """Neither axis is a multiple of 8; and a stack of two kernels."""
    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 19, 20)), jnp.float32)
    one = quantize_weight(kernels[0], (0,), SCHEME)
    both = quantize_weight(kernels, (1,), SCHEME, batch=(0,))
    one.tensor.check("w")
    assert (one.tensor.group, one.activations) == (8, "per_token")
    scale = np.asarray(one.tensor.scale)
    np.testing.assert_allclose(scale, scales_of(kernels[0], 8), 2e-7)
    np.testing.assert_array_equal(scale[:8], np.broadcast_to(scale[:1], (8, 3)))
    of_channels = np.repeat(scale, 8, axis=1)[:, :19]
    codes = np.clip(np.asarray(kernels[0]).T / of_channels, -448, 448)
    expected = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.float32(one.tensor.values), expected)
    np.testing.assert_allclose(both.tensor.scale[1], scales_of(kernels[1], 8), 2e-7)
    np.testing.assert_array_equal(both.tensor.scale[0], scale)


@pytest.mark.slow
def test_a_matmul_takes_them():
    rng = np.random.default_rng(0)
    kernel, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 24), (4, 32)))
    fn = lambda params, x: x @ params["w"]
    params = {"w": kernel}
    got = sq.quantized(fn)(sq.quantize(params, sq.calibrate(fn, params, [x]), SCHEME), x)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel)
    error = np.abs(got - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.06


def test_what_has_no_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Float8\.block_size: expected None with a group size"):
        sq.Float8(block_size=8, group_size=8)
    with pytest.raises(ValueError, match=r"block_size: expected an int of 1 or more .*got 0"):
        sq.Float8(block_size=0)
    with pytest.raises(ValueError, match=r"expected a kernel \(in, out\), got one of 3 axes"):
        quantize_weight(jnp.ones((8, 2, 4)), (0,), SCHEME)
