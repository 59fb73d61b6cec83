"""Quantized `Conv` layers of linen and NNX: drop-ins for Flax's, in every geometry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sqjax as sq

X = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)
LAYERS = {
    "same": {"features": 5, "kernel_size": (3, 3)},
    "strides, no bias": {"features": 5, "kernel_size": (3, 2), "strides": 2, "use_bias": False},
    "circular": {"features": 3, "kernel_size": (3, 3), "padding": "CIRCULAR"},
    "dilated": {"features": 3, "kernel_size": (2, 2), "kernel_dilation": 2, "padding": 1},
    "depthwise": {"features": 4, "kernel_size": (3, 3), "feature_group_count": 4},
    "groups": {"features": 6, "kernel_size": (3, 3), "feature_group_count": 2},
}


@functools.cache
def drawn(name):
    layer = nn.Conv(**LAYERS[name])
    return layer, layer.init(jax.random.key(1), jnp.asarray(X))["params"]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.slow
def test_layers_are_flax_layers_on_the_dequantized_kernel(name):
    """Weight-only: exactly Flax's layer. W8A8: what `quantized` makes of that layer."""
    layer, params = drawn(name)
    groups = layer.feature_group_count
    ours = sq.linen.QuantConv(**LAYERS[name])
    for scheme in (sq.W8A16, sq.W8A8):
        qparams = sq.linen.quantize_conv(params, scheme, feature_group_count=groups)
        got = jax.jit(ours.apply)({"params": qparams}, jnp.asarray(X))
        expected = jax.jit(sq.quantized(layer.apply))({"params": qparams}, X)
        np.testing.assert_array_equal(got, expected)
        wide = {**params, "kernel": sq.dequantize(qparams["kernel"].tensor)}
        near = layer.apply({"params": wide}, X)
        tolerance = 1e-5 if scheme == sq.W8A16 else 0.03 * float(jnp.abs(near).max())
        np.testing.assert_allclose(got, near, atol=tolerance)
        # int8 activations were rounded: a layer that ran in float would be nearer.
        rounded = float(jnp.abs(got - near).max() / jnp.abs(near).max())
        assert (rounded > 1e-4) == (scheme == sq.W8A8)


@pytest.mark.parametrize("name", ["depthwise", "groups"])
@pytest.mark.slow
def test_nnx_and_linen_compute_the_same(name):
    layer, params = drawn(name)
    fields = dict(LAYERS[name])
    features = fields.pop("features")
    theirs = nnx.Conv(4, features, rngs=nnx.Rngs(0), **fields)
    theirs.kernel[...] = params["kernel"]
    theirs.bias[...] = params["bias"]
    absmax = jnp.asarray(np.abs(X).max((0, 1, 2)))
    scheme = sq.W8A8_O3.replace(smoothing=0.5)
    ours = sq.nnx.QuantConv.from_conv(theirs, scheme, absmax)
    groups = layer.feature_group_count
    qparams = sq.linen.quantize_conv(params, scheme, feature_group_count=groups, absmax=absmax)
    expected = sq.linen.QuantConv(**LAYERS[name]).apply({"params": qparams}, jnp.asarray(X))
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(ours, jnp.asarray(X)), expected)
    near = theirs(jnp.asarray(X))
    assert float(jnp.abs(expected - near).max()) < 0.05 * float(jnp.abs(near).max())


@pytest.mark.slow
def test_init_draws_flax_kernel_and_takes_static_scales_from_x():
    _, params = drawn("same")
    ours = sq.linen.QuantConv(**LAYERS["same"], scheme=sq.W8A8_O3)
    got = ours.init(jax.random.key(1), jnp.asarray(X))["params"]["kernel"]
    expected = sq.linen.quantize_conv(
        params, sq.W8A8_O3, absmax=jnp.asarray(np.abs(X).max((0, 1, 2)))
    )["kernel"]
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(expected)))


def test_what_does_not_fit_is_refused():
    _, params = drawn("groups")
    quantize = functools.partial(sq.linen.quantize_conv, params, feature_group_count=2)
    with pytest.raises(ValueError, match=r"kernel: expected absmax of shape \(4,\), got \(2,\)"):
        quantize(absmax=jnp.ones(2))
    with pytest.raises(ValueError, match=r"a static scheme needs the activation's absmax"):
        quantize(sq.W8A8_O3)
    with pytest.raises(ValueError, match=r"kernel: outlier channels are for matmuls"):
        quantize(sq.W8A8.replace(outliers=6.0), absmax=jnp.ones(4))
    with pytest.raises(
        ValueError, match=r"expected a kernel of shape \(\*window, inputs, features"
    ):
        sq.linen.quantize_conv({"kernel": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match=r"quantize_conv: expected a 'kernel', got {}"):
        sq.linen.quantize_conv({})
    with pytest.raises(ValueError, match=r"expected a QuantWeight, got .*quantize_conv\(params\)"):
        sq.linen.QuantConv(**LAYERS["groups"]).apply({"params": params}, jnp.asarray(X))
    odd = nnx.Conv(4, 5, (3, 3), preferred_element_type=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"has a preferred_element_type of its own"):
        sq.nnx.QuantConv.from_conv(odd)
