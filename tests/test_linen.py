"""`QuantDense`: nn.Dense on int8, within the error that theory allows."""

import chex
import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import linen as nn

import sqjax as sq
from sqjax.linen import QuantDense, quantize_dense
from sqjax.matmul import QuantWeight
from sqjax.smoothing import smoothing_scales

SCHEMES = {"O1": sq.W8A8_O1, "O2": sq.W8A8_O2, "O3": sq.W8A8_O3, "per_tensor": sq.Scheme(weights="per_tensor")}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def layer(inputs=32, features=8, bias=True, dtype=jnp.float32):
    """(float parameters of nn.Dense, an input in which two channels are outliers)."""
    params = {"kernel": normal(inputs, features, dtype=dtype)}
    params |= {"bias": normal(features, seed=1, dtype=dtype)} if bias else {}
    outliers = jnp.where((jnp.arange(inputs) == 3) | (jnp.arange(inputs) == 17), 50.0, 1.0)
    return params, (normal(6, inputs, seed=2) * outliers[None, :]).astype(dtype)


def smoothing_of(params, x, alpha=0.5):
    absmax = jnp.max(jnp.abs(x), axis=0)
    return absmax, smoothing_scales(absmax, jnp.max(jnp.abs(params["kernel"]), axis=1), alpha)


def float_and_int8(params, x, scheme=sq.W8A8, smooth=False):
    absmax, s = smoothing_of(params, x)
    qparams = quantize_dense(params, scheme, absmax=absmax, smoothing=s if smooth else None)
    bias = "bias" in params
    return (
        nn.Dense(8, use_bias=bias).apply({"params": params}, x),
        QuantDense(8, use_bias=bias).apply({"params": qparams}, x),
    )


def total_error(pair):
    return float(jnp.linalg.norm(pair[0] - pair[1]))


# Smoothing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_a_smoothed_float_layer_is_the_same_layer(alpha):
    params, x = layer()
    _, s = smoothing_of(params, x, alpha)
    smoothed = {**params, "kernel": params["kernel"] * s[:, None]}
    assert float(s.max() / s.min()) > 2
    plain = nn.Dense(8).apply({"params": params}, x)
    chex.assert_trees_all_close(nn.Dense(8).apply({"params": smoothed}, x / s[None, :]), plain, rtol=1e-5, atol=1e-4)
    assert not np.allclose(nn.Dense(8).apply({"params": smoothed}, x), plain, rtol=1e-2)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_element_is_within_the_bound_of_theory(scheme, smooth):
    """|err_tj| <= sum_k |x_tk| sw_j / 2 + |w_kj| sx_t / 2 + sx_t sw_j / 4: both operands are off by half a step."""
    params, x = layer()
    expected, got = float_and_int8(params, x, scheme, smooth)
    s = smoothing_of(params, x)[1] if smooth else jnp.ones(32)
    x, w = np.asarray(x / s[None, :], np.float64), np.asarray(params["kernel"] * s[:, None], np.float64)
    sx = numpy_int8.scale_of(x, 1 if scheme.activations == "per_token" else None).astype(np.float64)
    sw = numpy_int8.scale_of(w, 0 if scheme.weights == "per_channel" else None).astype(np.float64)
    bound = np.abs(x).sum(1, keepdims=True) * sw / 2 + sx / 2 * np.abs(w).sum(0) + len(w) * sx * sw / 4
    rounding = 1e-5 * (np.abs(x) @ np.abs(w) + 10)
    error = np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
    assert (error <= bound + rounding).all()
    assert error.max() > 0.01 * bound.max()  # an int8 layer does err
    assert bound.max() < np.abs(np.asarray(expected)).max()  # and the bound says something


@pytest.mark.parametrize("scheme", ["O2", "O3"])
def test_smoothing_reduces_the_error_where_channels_are_outliers(scheme):
    params, x = layer()
    rough, smooth = (total_error(float_and_int8(params, x, SCHEMES[scheme], smooth)) for smooth in (False, True))
    assert smooth < rough / 2


def test_smoothing_by_ones_changes_nothing():
    params, x = layer()
    plain = quantize_dense(params)
    ones = quantize_dense(params, smoothing=jnp.ones(32))
    outputs = [QuantDense(8).apply({"params": p}, x) for p in (plain, ones)]
    chex.assert_trees_all_equal(*outputs)
    assert total_error((outputs[0], nn.Dense(8).apply({"params": params}, x))) > 1e-3


# The layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_integer_product_of_numpy(bias):
    params, x = layer(bias=bias)
    x = numpy_int8.away_from_ties(x, 1)
    params["kernel"] = jnp.asarray(numpy_int8.away_from_ties(params["kernel"], 0))
    expected = numpy_int8.matmul(x, params["kernel"]) + (np.asarray(params["bias"])[None, :] if bias else 0)
    got = QuantDense(8, use_bias=bias).apply({"params": quantize_dense(params)}, jnp.asarray(x))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    assert total_error((got, nn.Dense(8, use_bias=bias).apply({"params": params}, x))) > 1e-2


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_only_matmul_is_int8(scheme, smooth):
    params, x = layer()
    absmax, s = smoothing_of(params, x)
    qparams = quantize_dense(params, scheme, absmax=absmax, smoothing=s if smooth else None)
    program = jaxprs.of(QuantDense(8).apply, {"params": qparams}, x)
    dots = [e for e in jaxprs.equations(program) if e.primitive.name == "dot_general"]
    assert [dot.dtypes for dot in jaxprs.dots(program)] == [jaxprs.INT8_DOT]
    assert dots[0].params["preferred_element_type"] == jnp.int32
    assert jaxprs.widened(program, larger_than=0) == []


def test_jit_vmap_and_leading_axes_agree():
    params, x = layer()
    variables = {"params": quantize_dense(params)}
    eager = QuantDense(8).apply(variables, x)
    chex.assert_trees_all_close(jax.jit(QuantDense(8).apply)(variables, x), eager, rtol=1e-4, atol=1e-3)
    rows = jax.vmap(lambda x: QuantDense(8).apply(variables, x))(x)
    chex.assert_trees_all_close(rows, eager, rtol=1e-4, atol=1e-3)
    batched = QuantDense(8).apply(variables, x.reshape(2, 3, 32))
    chex.assert_trees_all_close(batched.reshape(6, 8), eager, rtol=1e-6)
    assert total_error((eager, nn.Dense(8).apply({"params": params}, x))) > 1e-2


def test_the_gradients_of_input_and_bias_are_those_of_the_float_layer():
    params, x = layer()
    kernel, g = quantize_dense(params)["kernel"], normal(6, 8, seed=4)

    def loss(apply, kernel):
        return lambda x, bias: jnp.sum(apply({"params": {"kernel": kernel, "bias": bias}}, x) * g)

    dx, db = jax.grad(loss(QuantDense(8).apply, kernel), (0, 1))(x, params["bias"])
    fx, fb = jax.grad(loss(nn.Dense(8).apply, params["kernel"]), (0, 1))(x, params["bias"])
    chex.assert_trees_all_close(db, fb, rtol=1e-6)
    cosine = jnp.sum(dx * fx) / jnp.linalg.norm(dx) / jnp.linalg.norm(fx)
    assert 0.99 < cosine < 1 - 1e-7
    chex.assert_trees_all_close(dx, g @ sq.dequantize(kernel.tensor).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_init_makes_parameters_that_run(scheme):
    x = normal(5, 16)
    variables = QuantDense(8, scheme=scheme).init(jax.random.key(0), x)
    params = variables["params"]
    assert isinstance(params["kernel"], QuantWeight)
    assert (params["kernel"].shape, params["kernel"].activations) == ((16, 8), scheme.activations)
    chex.assert_shape(params["bias"], (8,))
    reach = 1.0 if scheme.activations == "static" else jnp.inf  # with no statistics, a static scale clips at 1
    expected = jnp.clip(x, -reach, reach) @ sq.dequantize(params["kernel"].tensor)
    error = jnp.abs(QuantDense(8, scheme=scheme).apply(variables, x) - expected).max()
    assert 1e-4 < float(error) < 0.1
    float_kernel = nn.Dense(8).init(jax.random.key(0), x)["params"]["kernel"]  # the same draw, quantized
    assert float(jnp.abs(sq.dequantize(params["kernel"].tensor) - float_kernel).max()) < 0.01


def test_init_without_bias_has_no_bias():
    assert set(QuantDense(8, use_bias=False).init(jax.random.key(0), normal(5, 16))["params"]) == {"kernel"}


@pytest.mark.parametrize(
    ("x", "param", "dtype", "expected"),
    [
        (jnp.bfloat16, jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.float32, None, jnp.float32),
    ],
)
def test_dtypes_are_those_of_nn_dense(x, param, dtype, expected):
    params, inputs = layer(dtype=param)
    inputs = inputs.astype(x)
    qparams = quantize_dense(params)
    assert qparams["kernel"].dtype == param
    assert qparams["kernel"].tensor.scale.dtype == jnp.float32
    got = QuantDense(8, dtype=dtype, param_dtype=param).apply({"params": qparams}, inputs)
    reference = nn.Dense(8, dtype=dtype, param_dtype=param).apply({"params": params}, inputs)
    assert got.dtype == reference.dtype == expected
    error = np.abs(got.astype(np.float32) - reference.astype(np.float32)).max() / np.abs(reference).max()
    assert 1e-3 < error < 0.05


def test_param_dtype_is_that_of_the_parameters_that_init_makes():
    x = normal(5, 16, dtype=jnp.bfloat16)
    params = QuantDense(8, param_dtype=jnp.bfloat16).init(jax.random.key(0), x)["params"]
    assert (params["kernel"].dtype, params["bias"].dtype) == (jnp.bfloat16, jnp.bfloat16)


# Inside other modules ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers of a kind, the second behind nn.remat."""

    dense: type

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(self.dense(16, name="up")(x))
        return nn.remat(self.dense)(8, name="down")(hidden)


def test_replaces_dense_in_a_larger_module_under_remat():
    x = normal(5, 32)
    params = Net(nn.Dense).init(jax.random.key(0), x)["params"]
    qparams = {name: quantize_dense(p) for name, p in params.items()}
    expected = Net(nn.Dense).apply({"params": params}, x)
    got = jax.jit(Net(QuantDense).apply)({"params": qparams}, x)
    error = float(jnp.abs(got - expected).max() / jnp.abs(expected).max())
    assert 1e-4 < error < 0.05
    program = jaxprs.of(Net(QuantDense).apply, {"params": qparams}, x)
    assert [dot.dtypes for dot in jaxprs.dots(program)] == [jaxprs.INT8_DOT] * 2
    grad = jax.grad(lambda x: jnp.sum(Net(QuantDense).apply({"params": qparams}, x)))(x)
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() > 0.01


def test_lifts_through_vmap_and_scan():
    kernels, x = normal(3, 16, 16) / 4, normal(5, 16, seed=1)
    layers = [quantize_dense({"kernel": kernel}) for kernel in kernels]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    each = [QuantDense(16, use_bias=False).apply({"params": p}, x) for p in layers]

    over_layers = nn.vmap(QuantDense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True})
    got = over_layers(16, use_bias=False).apply({"params": stacked}, x)
    chex.assert_trees_all_close(got, jnp.stack(each), rtol=1e-5, atol=1e-5)
    assert total_error((got, jnp.einsum("ti,lio->lto", x, kernels))) > 1e-3

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return QuantDense(16, use_bias=False, name="dense")(x), None

    chain = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    got, _ = chain.apply({"params": {"dense": stacked}}, x, None)
    expected = x
    for p in layers:
        expected = QuantDense(16, use_bias=False).apply({"params": p}, expected)
    chex.assert_trees_all_close(got, expected, rtol=1e-2, atol=1e-2)


# Errors -----------------------------------------------------------------------------------------------------------


def test_float_parameters_are_refused_with_the_way_out():
    params, x = layer()
    with pytest.raises(ValueError, match=r"^kernel: expected a QuantWeight, got .*\(32, 8\); .*quantize_dense"):
        QuantDense(8).apply({"params": params}, x)
    net = Net(nn.Dense).init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match=r"^up/kernel: expected a QuantWeight"):
        Net(QuantDense).apply({"params": net}, x)


def test_a_kernel_of_another_shape_is_refused():
    params, x = layer()
    with pytest.raises(ValueError, match=r"^kernel: expected shape \(31, 8\), got \(32, 8\)"):
        QuantDense(8).apply({"params": quantize_dense(params)}, x[:, 1:])
    with pytest.raises(ValueError, match=r"^kernel: expected shape \(32, 9\), got \(32, 8\)"):
        QuantDense(9, use_bias=False).apply({"params": quantize_dense(params)}, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"bias": jnp.ones(8)}}, r"a 'kernel' of shape \(inputs, features\), got \{'bias': \(8,\)\}"),
        ({"params": {"kernel": jnp.ones((2, 3, 4))}}, r"expected a 'kernel' .* got \{'kernel': \(2, 3, 4\)\}"),
        ({"smoothing": jnp.ones(8)}, r"expected smoothing of shape \(32,\), got \(8,\)"),
        ({"absmax": jnp.ones(31)}, r"expected absmax of shape \(32,\), got \(31,\)"),
        ({"scheme": sq.W8A8_O3}, "a static scheme needs the activation's absmax"),
    ],
)
def test_quantize_dense_says_what_it_expected(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_dense(**{"params": layer()[0], **change})
