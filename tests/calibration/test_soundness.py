"""Calibration takes only what it can use: no NaN, whatever a CPU makes of a maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq

RNG = np.random.default_rng(0)
PARAMS = {
    "gain": np.ones(256, np.float32),
    "w": RNG.normal(size=(256, 8)).astype(np.float32) / 16,
}
X = jnp.asarray(np.abs(RNG.normal(size=(16, 256))), jnp.float32)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_an_activation_that_is_nan_is_refused(rows):
    """XLA's maximum over 16 rows and more loses a NaN on CPUs (openxla/xla); the sum does not."""
    fn = lambda p, x: jnp.sqrt(x * p["gain"][None]) @ p["w"]
    bad = X[:rows].at[0, 3].set(-1.0)
    with pytest.raises(ValueError, match="activation at w: 1 of 256 values are NaN"):
        sq.calibrate(fn, PARAMS, [bad])


@pytest.mark.slow
def test_nan_in_a_layer_of_a_scan_is_refused():
    def fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.sqrt(h @ w), None), x, p["w"])[0]

    positive = jnp.stack([jnp.ones((16, 16)), -jnp.ones((16, 16)), jnp.ones((16, 16))])
    with pytest.raises(ValueError, match=r"activation at w: .* are NaN"):
        sq.calibrate(fn, {"w": positive}, [X[:, :16]])


@pytest.mark.slow
def test_an_additive_mask_of_minus_infinity_is_an_input_like_any_other():
    def attend(p, x, bias):
        h = x * p["gain"][None]
        return jax.nn.softmax(h @ h.T + bias, -1) @ h @ p["w"]

    bias = jnp.where(jnp.tri(16, dtype=bool), 0.0, -jnp.inf)
    assert sq.calibrate(attend, PARAMS, [(X, bias)]).count["w"] == 16
    with pytest.raises(ValueError, match="activation at w"):  # where it reaches a matmul
        sq.calibrate(lambda p, x: x @ p["w"], PARAMS, [X.at[0, 0].set(-jnp.inf)])
