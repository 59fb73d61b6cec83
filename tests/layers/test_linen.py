"""`QuantDense`: nn.Dense on int8, within the error that theory allows."""

import chex
import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import optax
import pytest
from flax import linen as nn
from slow import slow_but

import sqjax as sq
from sqjax.linen import QuantDense, QuantDenseGeneral, quantize_dense, quantize_dense_general
from sqjax.numerics.smoothing import smoothing_scales
from sqjax.weights.quant_weight import QuantWeight

SCHEMES = {
    "O1": sq.W8A8_O1,
    "O2": sq.W8A8_O2,
    "O3": sq.W8A8_O3,
    "per_tensor": sq.Scheme(weight=sq.Int8(per_tensor=True)),
}
NAMES = {sq.PerToken: "per_token", sq.PerTensor: "per_tensor", sq.Static: "static"}
#: Every preset for matmuls, with what relative error its rounding may leave in a product of 128 random channels.
PRESETS = {
    "W8A8_O1": (sq.W8A8_O1, 0.03),
    "W8A8_O2": (sq.W8A8_O2, 0.1),
    "W8A8_O3": (sq.W8A8_O3, 0.1),
    "W8A8_OUTLIERS": (sq.W8A8_OUTLIERS, 0.02),
    "FP8": (sq.FP8, 0.06),
    "FP8_E5M2": (sq.FP8_E5M2, 0.12),
    "W8A16": (sq.W8A16, 0.02),
    "W4A16": (sq.W4A16, 0.15),
    "W4A16_G64": (sq.W4A16_G64, 0.15),
    "W4A8": (sq.W4A8, 0.15),
    "W4A4_ROTATED": (sq.W4A4_ROTATED, 0.2),
    "smoothing": (sq.W8A8_O2.replace(smoothing=0.5), 0.03),
    "outliers and smoothing": (sq.W8A8_OUTLIERS.replace(smoothing=0.5, outliers=2.0), 0.02),
    "static outliers": (sq.W8A8_O3.replace(outliers=6.0), 0.05),
    "grouped": (sq.W8A8.replace(weight=sq.Int8(group_size=32)), 0.03),
}
#: Of formats that differ in one number only, one is enough where time is short.
QUICK = ("W8A8_O3", "W4A8", "outliers and smoothing")
each_preset = pytest.mark.parametrize(("scheme", "error"), slow_but(PRESETS, *QUICK))


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
    chex.assert_trees_all_close(
        nn.Dense(8).apply({"params": smoothed}, x / s[None, :]), plain, rtol=1e-5, atol=1e-4
    )
    assert not np.allclose(nn.Dense(8).apply({"params": smoothed}, x), plain, rtol=1e-2)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "O1", "O3"))
def test_every_element_is_within_the_bound_of_theory(scheme, smooth):
    """|err_tj| <= sum_k |x_tk| sw_j / 2 + |w_kj| sx_t / 2 + sx_t sw_j / 4: both operands are off by half a step."""
    params, x = layer()
    expected, got = float_and_int8(params, x, scheme, smooth)
    s = smoothing_of(params, x)[1] if smooth else jnp.ones(32)
    x, w = (
        np.asarray(x / s[None, :], np.float64),
        np.asarray(params["kernel"] * s[:, None], np.float64),
    )
    sx = numpy_int8.scale_of(x, 1 if isinstance(scheme.activation, sq.PerToken) else None).astype(
        np.float64
    )
    sw = numpy_int8.scale_of(w, 0 if scheme.weight.granularity == "per_channel" else None).astype(
        np.float64
    )
    bound = (
        np.abs(x).sum(1, keepdims=True) * sw / 2 + sx / 2 * np.abs(w).sum(0) + len(w) * sx * sw / 4
    )
    rounding = 1e-5 * (np.abs(x) @ np.abs(w) + 10)
    error = np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
    assert (error <= bound + rounding).all()
    assert error.max() > 0.01 * bound.max()  # an int8 layer does err
    assert bound.max() < np.abs(np.asarray(expected)).max()  # and the bound says something


@pytest.mark.parametrize("scheme", ["O2", "O3"])
def test_smoothing_reduces_the_error_where_channels_are_outliers(scheme):
    params, x = layer()
    rough, smooth = (
        total_error(float_and_int8(params, x, SCHEMES[scheme], smooth)) for smooth in (False, True)
    )
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
    expected = numpy_int8.matmul(x, params["kernel"]) + (
        np.asarray(params["bias"])[None, :] if bias else 0
    )
    got = QuantDense(8, use_bias=bias).apply({"params": quantize_dense(params)}, jnp.asarray(x))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    assert total_error((got, nn.Dense(8, use_bias=bias).apply({"params": params}, x))) > 1e-2


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "O1", "O3"))
def test_the_only_matmul_is_int8(scheme, smooth):
    params, x = layer()
    absmax, s = smoothing_of(params, x)
    qparams = quantize_dense(params, scheme, absmax=absmax, smoothing=s if smooth else None)
    program = jaxprs.of(QuantDense(8).apply, {"params": qparams}, x)
    dots = [e for e in jaxprs.equations(program) if e.primitive.name == "dot_general"]
    assert [dot.dtypes for dot in jaxprs.dots(program)] == [jaxprs.INT8_DOT]
    assert dots[0].params["preferred_element_type"] == jnp.int32
    assert jaxprs.widened(program, larger_than=0) == []


@pytest.mark.slow
def test_jit_vmap_and_leading_axes_agree():
    params, x = layer()
    variables = {"params": quantize_dense(params)}
    eager = QuantDense(8).apply(variables, x)
    chex.assert_trees_all_close(
        jax.jit(QuantDense(8).apply)(variables, x), eager, rtol=1e-4, atol=1e-3
    )
    rows = jax.vmap(lambda x: QuantDense(8).apply(variables, x))(x)
    chex.assert_trees_all_close(rows, eager, rtol=1e-4, atol=1e-3)
    batched = QuantDense(8).apply(variables, x.reshape(2, 3, 32))
    chex.assert_trees_all_close(batched.reshape(6, 8), eager, rtol=1e-6)
    assert total_error((eager, nn.Dense(8).apply({"params": params}, x))) > 1e-2


@pytest.mark.slow
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


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "O3"))
@pytest.mark.slow
def test_init_makes_parameters_that_run(scheme):
    x = normal(5, 16)
    variables = QuantDense(8, scheme=scheme).init(jax.random.key(0), x)
    params = variables["params"]
    assert isinstance(params["kernel"], QuantWeight)
    assert (params["kernel"].shape, params["kernel"].activations) == (
        (16, 8),
        NAMES[type(scheme.activation)],
    )
    chex.assert_shape(params["bias"], (8,))
    expected = x @ sq.dequantize(params["kernel"].tensor)
    error = jnp.abs(QuantDense(8, scheme=scheme).apply(variables, x) - expected).max()
    assert 1e-4 < float(error) < 0.1
    float_kernel = nn.Dense(8).init(jax.random.key(0), x)["params"][
        "kernel"
    ]  # the same draw, quantized
    assert float(jnp.abs(sq.dequantize(params["kernel"].tensor) - float_kernel).max()) < 0.01


@pytest.mark.slow
def test_init_without_bias_has_no_bias():
    assert set(QuantDense(8, use_bias=False).init(jax.random.key(0), normal(5, 16))["params"]) == {
        "kernel"
    }


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
    error = (
        np.abs(got.astype(np.float32) - reference.astype(np.float32)).max()
        / np.abs(reference).max()
    )
    assert 1e-3 < error < 0.05


@pytest.mark.slow
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


@pytest.mark.slow
def test_replaces_dense_in_a_larger_module_under_remat():
    x = normal(5, 32)
    params = jax.jit(Net(nn.Dense).init)(jax.random.key(0), x)["params"]
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


@pytest.mark.slow
def test_lifts_through_vmap_and_scan():
    kernels, x = normal(3, 16, 16) / 4, normal(5, 16, seed=1)
    layers = [quantize_dense({"kernel": kernel}) for kernel in kernels]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    each = [QuantDense(16, use_bias=False).apply({"params": p}, x) for p in layers]

    over_layers = nn.vmap(
        QuantDense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}
    )
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


# Every scheme ----------------------------------------------------------------------------------------------------


def cosine(a, b):
    return float(jnp.sum(a * b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


@each_preset
@pytest.mark.slow
def test_every_scheme_runs_and_is_trained_around(scheme, error):
    """The product, under jit and vmap, and the straight-through gradient: that of the float product with the weight."""
    params, x = layer(128, 16)
    qparams = quantize_dense(params, scheme, absmax=jnp.max(jnp.abs(x), axis=0))
    g = normal(6, 16, seed=4)

    @jax.jit
    def program(qparams, x):
        run = lambda x: QuantDense(16).apply({"params": qparams}, x)
        # Under vmap every row has a scale of its own, which per-tensor schemes do not have.
        per_tensor = isinstance(scheme.activation, sq.PerTensor)
        rows = run(x) if per_tensor else jax.vmap(run)(x)
        return run(x), rows, jax.grad(lambda x: jnp.sum(run(x) * g))(x)

    expected = nn.Dense(16).apply({"params": params}, x)
    got, rows, dx = program(qparams, x)
    assert 1e-4 < total_error((got, expected)) / float(jnp.linalg.norm(expected)) < error
    chex.assert_trees_all_close(rows, got, atol=1e-2 * float(jnp.abs(got).max()))
    coarse = scheme.weight.fmt.name in ("int4", "e5m2")
    assert (0.98 if coarse else 0.99) < cosine(dx, g @ params["kernel"].T)


@each_preset
@pytest.mark.slow
def test_init_measures_its_input_for_every_scheme(scheme, error):
    x = layer(128, 16, bias=False)[1]
    module = QuantDense(16, use_bias=False, scheme=scheme)
    variables = module.init(jax.random.key(0), x)
    drawn = nn.Dense(16, use_bias=False).init(jax.random.key(0), x)["params"]
    expected = quantize_dense(drawn, scheme, absmax=jnp.max(jnp.abs(x), axis=0))
    chex.assert_trees_all_equal(variables["params"], expected)
    if scheme.outliers is None:
        assert jax.tree.structure(
            jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        ) == jax.tree.structure(expected)
    else:
        with pytest.raises(
            ValueError, match=r"^kernel: how many channels exceed .* quantize outliers outside jit"
        ):
            jax.jit(module.init)(jax.random.key(0), x)


def powers_of_two(x):
    return jnp.exp2(jnp.round(jnp.log2(x)))


@pytest.mark.parametrize("smoothed", ["folded", "at run time"])
def test_smoothing_by_powers_of_two_moves_the_steps_and_nothing_else(smoothed):
    """(X / s)(s W) = X W. Powers of two are exact: X / s and s W lose no bit, so float products are equal bit for bit;
    at run time and folded, the quantized layers are equal too, and within the bound of theory of X W."""
    params, x = layer(32, 8, bias=False)
    s = powers_of_two(smoothing_of(params, x)[1])
    assert float(s.max() / s.min()) >= 4
    moved = {"kernel": params["kernel"] * s[:, None]}
    plain, dense = nn.Dense(8, use_bias=False), QuantDense(8, use_bias=False)
    expected = plain.apply({"params": params}, x)
    chex.assert_trees_all_equal(plain.apply({"params": moved}, x / s[None, :]), expected)
    folded = dense.apply({"params": quantize_dense(moved)}, x / s[None, :])
    at_run_time = dense.apply({"params": quantize_dense(params, smoothing=s)}, x)
    chex.assert_trees_all_equal(at_run_time, folded)
    got = {"folded": folded, "at run time": at_run_time}[smoothed]
    xs, ws = np.asarray(x / s[None, :], np.float64), np.asarray(moved["kernel"], np.float64)
    sx, sw = np.abs(xs).max(1, keepdims=True) / 127, np.abs(ws).max(0) / 127
    bound = (
        np.abs(xs).sum(1, keepdims=True) * sw / 2
        + sx / 2 * np.abs(ws).sum(0)
        + len(ws) * sx * sw / 4
    )
    chex.assert_trees_all_close(
        np.asarray(got) / bound, np.asarray(expected) / bound, rtol=0, atol=1 + 1e-4
    )
    assert total_error((got, expected)) > 1e-3
    assert total_error(
        (dense.apply({"params": quantize_dense(params)}, x), expected)
    ) > total_error((got, expected))


class Around(nn.Module):
    """A norm and a float head around a layer that may be quantized."""

    dense: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(
            nn.tanh(self.dense(16, name="body")(nn.LayerNorm(name="norm")(x)))
        )


def split(params):
    """(the float leaves, the quantized ones), with None in the place of the others: None is no leaf to jax."""
    is_weight = lambda x: isinstance(x, QuantWeight)
    floats = jax.tree.map(lambda x: None if is_weight(x) else x, params, is_leaf=is_weight)
    return floats, jax.tree.map(lambda x: x if is_weight(x) else None, params, is_leaf=is_weight)


def merged(floats, weights):
    is_leaf = lambda x: x is None or isinstance(x, QuantWeight)
    return jax.tree.map(lambda a, b: b if a is None else a, floats, weights, is_leaf=is_leaf)


TRAINED = {"W8A8": sq.W8A8, "W4A8": sq.W4A8, "FP8": sq.FP8}


@pytest.mark.parametrize("scheme", slow_but(TRAINED, "W8A8"))
@pytest.mark.slow
def test_what_is_around_a_quantized_layer_trains(scheme):
    """Gradients are taken with respect to the float leaves; norm, bias and head learn, the quantized kernel stays."""
    x, target = normal(32, 64), normal(32, 4, seed=1)
    params = jax.jit(Around(nn.Dense).init)(jax.random.key(0), x)["params"]
    qparams = {**params, "body": quantize_dense(params["body"], scheme)}
    floats, weights = split(qparams)
    before = jax.tree.map(jnp.array, weights)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def loss(floats):
        out = Around(QuantDense).apply({"params": merged(floats, weights)}, x)
        return jnp.mean((out - target) ** 2)

    @jax.jit
    def step(floats, state):
        value, grads = jax.value_and_grad(loss)(floats)
        updates, state = optimizer.update(grads, state, floats)
        return optax.apply_updates(floats, updates), state, value

    trained, state, losses = floats, optimizer.init(floats), []
    for _ in range(12):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    for old, new in zip(jax.tree.leaves(floats), jax.tree.leaves(trained), strict=True):
        assert float(jnp.abs(new - old).max()) > 1e-3
    chex.assert_trees_all_equal(split(merged(trained, weights))[1], before)


# QuantDenseGeneral ------------------------------------------------------------------------------------------------

#: The layer's fields, the shape of x.
LAYERS = {
    "dense": ({"features": 8}, (3, 5, 64)),
    "heads": ({"features": (2, 4)}, (3, 5, 64)),
    "merge heads": ({"features": 8, "axis": (-2, -1)}, (3, 5, 4, 64)),
    "axes in any order": ({"features": (2, 3), "axis": (-1, 1)}, (3, 4, 5, 64)),
    "first axis": ({"features": (2, 3), "axis": 0, "use_bias": False}, (64, 5)),
    "batch": ({"features": 8, "batch_dims": (0,)}, (3, 5, 64)),
    "batches": ({"features": (4, 2), "axis": (-2, -1), "batch_dims": (0, 1)}, (2, 3, 5, 2, 64)),
}


def general(name, dtype=jnp.float32):
    """(fields, float parameters, x with outliers, its absmax by channel)."""
    fields, shape = LAYERS[name]
    x = normal(*shape, dtype=dtype) * (
        1 + 9 * (jax.random.uniform(jax.random.key(1), shape[-1:]) > 0.9).astype(dtype)
    )
    params = nn.DenseGeneral(**fields, param_dtype=dtype).init(jax.random.key(0), x)["params"]
    params = {n: normal(*p.shape, seed=3, dtype=dtype) for n, p in params.items()}
    batch = len(fields.get("batch_dims", ()))
    axis = fields.get("axis", -1)
    axes = {a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
    return (
        fields,
        params,
        x,
        jnp.max(jnp.abs(x), axis=tuple(a for a in range(batch, x.ndim) if a not in axes)),
    )


def quantized_general(name, scheme=sq.W8A8, **options):
    fields, params, _, absmax = general(name)
    cut = {n: fields[n] for n in ("axis", "batch_dims") if n in fields}
    return quantize_dense_general(params, scheme, absmax=absmax, **cut, **options)


@pytest.fixture
def multiply_like_flax():
    """Ranks: x * (channels,) in `general`."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("multiply_like_flax")
@pytest.mark.parametrize("name", slow_but(list(LAYERS), "batches"))
@pytest.mark.slow
def test_dense_general_is_the_float_layer_on_the_dequantized_kernel(name):
    """With weights alone quantized the layer is the float one on the dequantized kernel; with int8 activations close
    to it, and to the float layer. Names and shapes are the float layer's, of init too."""
    fields, params, x, _ = general(name)
    float_layer, layer = nn.DenseGeneral(**fields), QuantDenseGeneral(**fields)
    expected = float_layer.apply({"params": params}, x)
    alone = quantized_general(name, sq.W8A16)
    assert {n: p.shape for n, p in alone.items()} == {n: p.shape for n, p in params.items()}
    dequantized = {**params, "kernel": sq.dequantize(alone["kernel"].tensor)}
    reference = float_layer.apply({"params": dequantized}, x)
    got = layer.apply({"params": alone}, x)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    chex.assert_trees_all_close(got, reference, atol=1e-5 * float(jnp.abs(expected).max()))
    assert total_error((got, expected)) > 1e-3
    int8 = jax.jit(layer.apply)({"params": quantized_general(name)}, x)
    assert 1e-3 < total_error((int8, expected)) / float(jnp.linalg.norm(expected)) < 0.03
    program = jaxprs.of(layer.apply, {"params": quantized_general(name)}, x)
    assert [dot.dtypes for dot in jaxprs.dots(program)] == [jaxprs.INT8_DOT]
    drawn, float_drawn = (m.init(jax.random.key(7), x)["params"] for m in (layer, float_layer))
    kernel = drawn.pop("kernel")
    assert kernel.shape == float_drawn["kernel"].shape
    step = jnp.max(kernel.tensor.scale)
    assert (
        0
        < float(jnp.abs(sq.dequantize(kernel.tensor) - float_drawn.pop("kernel")).max())
        <= 0.51 * float(step)
    )
    chex.assert_trees_all_equal(drawn, float_drawn)


@pytest.mark.usefixtures("multiply_like_flax")
@each_preset
@pytest.mark.parametrize("name", slow_but(["merge heads", "batches"]))
def test_dense_general_runs_every_scheme(name, scheme, error):
    scheme = (
        scheme
        if scheme.weight.group_size is None
        else scheme.replace(weight=scheme.weight.replace(group_size=32))
    )
    fields, params, x, _ = general(name)
    expected = nn.DenseGeneral(**fields).apply({"params": params}, x)
    qparams = quantized_general(name, scheme)
    got = jax.jit(QuantDenseGeneral(**fields).apply)({"params": qparams}, x)
    assert 1e-4 < total_error((got, expected)) / float(jnp.linalg.norm(expected)) < error


@pytest.mark.usefixtures("multiply_like_flax")
@pytest.mark.parametrize("name", slow_but(["merge heads", "batches"], "merge heads"))
@pytest.mark.slow
def test_dense_general_smoothed_by_powers_of_two_is_the_layer(name):
    fields, params, x, absmax = general(name)
    batch, inputs = len(fields.get("batch_dims", ())), absmax.ndim
    largest = jnp.max(jnp.abs(params["kernel"]), axis=tuple(range(inputs, params["kernel"].ndim)))
    s = powers_of_two(smoothing_scales(absmax, largest, 0.5))
    of_kernel = s.reshape(s.shape + (1,) * (params["kernel"].ndim - inputs))
    of_x = s.reshape(*s.shape[:batch], *(1,) * (x.ndim - inputs), *s.shape[batch:])
    moved = {**params, "kernel": params["kernel"] * of_kernel}
    float_layer, layer = nn.DenseGeneral(**fields), QuantDenseGeneral(**fields)
    expected = float_layer.apply({"params": params}, x)
    chex.assert_trees_all_equal(float_layer.apply({"params": moved}, x / of_x), expected)
    cut = {n: fields[n] for n in ("axis", "batch_dims") if n in fields}
    folded = layer.apply({"params": quantize_dense_general(moved, **cut)}, x / of_x)
    at_run_time = layer.apply({"params": quantize_dense_general(params, smoothing=s, **cut)}, x)
    chex.assert_trees_all_equal(at_run_time, folded)
    rough = layer.apply({"params": quantize_dense_general(params, **cut)}, x)
    assert 1e-3 < total_error((folded, expected)) < total_error((rough, expected))


class Attention(nn.Module):
    """Projections to heads and back."""

    general: type

    @nn.compact
    def __call__(self, x, _=None):
        q, k, v = (self.general((4, 8), name=name)(x) for name in ("query", "key", "value"))
        p = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k), axis=-1)
        return x + self.general(16, axis=(-2, -1), name="out")(
            jnp.einsum("hqk,khd->qhd", p, v)
        ), None


@pytest.mark.slow
def test_attention_scans_over_stacked_quantized_layers_and_has_gradients():
    x = normal(6, 16)
    draw = jax.jit(jax.vmap(lambda key: Attention(nn.DenseGeneral).init(key, x)["params"]))
    draws = draw(jax.random.split(jax.random.key(0), 3))
    axes = {"query": -1, "key": -1, "value": -1, "out": (-2, -1)}
    stacked = {
        n: jax.vmap(lambda p, n=n: quantize_dense_general(p, axis=axes[n]))(draws[n]) for n in axes
    }
    chain = nn.scan(Attention, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    run = lambda x: chain(QuantDenseGeneral).apply({"params": stacked}, x)[0]
    loop = float_loop = x
    for i in range(3):
        own, plain = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (stacked, draws))
        loop, _ = Attention(QuantDenseGeneral).apply({"params": own}, loop)
        float_loop, _ = Attention(nn.DenseGeneral).apply({"params": plain}, float_loop)
    chex.assert_trees_all_close(jax.jit(run)(x), loop, atol=1e-2)
    assert 1e-3 < total_error((loop, float_loop)) / float(jnp.linalg.norm(float_loop)) < 0.05
    g = normal(6, 16, seed=5)
    of_float = lambda x: chain(nn.DenseGeneral).apply({"params": draws}, x)[0]
    dx, fx = (jax.grad(lambda x, f=f: jnp.sum(f(x) * g))(x) for f in (run, of_float))
    assert 0.99 < cosine(dx, fx) < 1 - 1e-7


def test_dense_general_dtypes_are_those_of_flax():
    fields, shape = LAYERS["merge heads"]
    x = normal(*shape, dtype=jnp.bfloat16)
    params = {"kernel": normal(4, 64, 8, dtype=jnp.bfloat16), "bias": normal(8, dtype=jnp.bfloat16)}
    qparams = quantize_dense_general(params, axis=(-2, -1))
    for dtype in (None, jnp.float32):
        got, expected = (
            jax.eval_shape(
                m(**fields, dtype=dtype, param_dtype=jnp.bfloat16).apply, {"params": p}, x
            )
            for m, p in ((QuantDenseGeneral, qparams), (nn.DenseGeneral, params))
        )
        assert got.dtype == expected.dtype == (dtype or jnp.bfloat16)


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_float_parameters_are_refused_with_the_way_out():
    params, x = layer()
    with pytest.raises(
        ValueError, match=r"^kernel: expected a QuantWeight, got .*\(32, 8\); .*quantize_dense"
    ):
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
        (
            {"params": {"bias": jnp.ones(8)}},
            r"a 'kernel' of shape \(inputs, features\), got \{'bias': \(8,\)\}",
        ),
        (
            {"params": {"kernel": jnp.ones((2, 3, 4))}},
            r"expected a 'kernel' .* got \{'kernel': \(2, 3, 4\)\}",
        ),
        ({"smoothing": jnp.ones(8)}, r"expected smoothing of shape \(32,\), got \(8,\)"),
        ({"absmax": jnp.ones(31)}, r"expected absmax of shape \(32,\), got \(31,\)"),
        (
            {"scheme": sq.EMBEDDING_INT8},
            r"^quantize_dense: kernel: a scheme for embeddings, which meet indices; .*W8A8",
        ),
        (
            {"scheme": sq.W8A8_OUTLIERS},
            r"^quantize_dense: kernel: a scheme with outliers .* pass absmax=max",
        ),
        (
            {"scheme": sq.W8A8.replace(smoothing=0.5)},
            r"with outliers or smoothing needs the activation's absmax",
        ),
        (
            {
                "scheme": sq.W8A8.replace(smoothing=0.5),
                "absmax": jnp.ones(32),
                "smoothing": jnp.ones(32),
            },
            "two smoothings, the scheme's alpha and the given s; leave one out",
        ),
        (
            {"scheme": sq.W8A8_O3.replace(activation=sq.Static(range="mse"))},
            r"the range of Static\(range='mse'\) .* as absmax, with range='absmax'",
        ),
        ({"scheme": sq.W8A8_O3}, "a static scheme needs the activation's absmax"),
    ],
)
def test_quantize_dense_says_what_it_expected(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_dense(**{"params": layer()[0], **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"bias": jnp.ones(8)}}, r"expected a 'kernel', got \{'bias': \(8,\)\}"),
        (
            {"axis": (1, 2, 3)},
            r"expected a kernel of shape \(inputs0, inputs1, inputs2, features\), got \(4, 8, 16\)",
        ),
        ({"absmax": jnp.ones(32)}, r"expected absmax of shape \(4, 8\), got \(32,\)"),
        (
            {"batch_dims": (0,), "axis": -1, "smoothing": jnp.ones(8)},
            r"expected smoothing of shape \(4, 8\), got \(8,",
        ),
        (
            {"scheme": sq.W4A16.replace(weight=sq.Int4(group_size=5, zero_point=True))},
            r"^quantize_dense_general: kernel: .*groups of 5 do not .*do: 8$",
        ),
        ({"scheme": sq.EMBEDDING_INT4}, "a scheme for embeddings, which meet indices"),
    ],
)
@pytest.mark.slow
def test_quantize_dense_general_says_what_it_expected(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_dense_general(
            **{"params": {"kernel": jnp.ones((4, 8, 16))}, "axis": (-2, -1), **change}
        )


@pytest.mark.slow
def test_dense_general_says_what_it_expected():
    x, params = normal(3, 4, 8), {"kernel": normal(4, 8, 5), "bias": normal(5)}
    qparams = quantize_dense_general(params, axis=(-2, -1))
    run = lambda p=qparams, **fields: QuantDenseGeneral(5, **fields).apply({"params": p}, x)
    assert run(axis=(-2, -1)).shape == (3, 5)
    for fields, message in (
        (
            {"axis": -1},
            r"^kernel: expected shape \(8, 5\), got \(4, 8, 5\); .*quantize_dense_general",
        ),
        (
            {"axis": (-1, 2)},
            r"^kernel: expected axis to name axes of x \(3, 4, 8\), each once, .* got \(-1, 2\)",
        ),
        ({"axis": 3}, r"^kernel: expected axis to name axes"),
        ({"axis": (0, 1), "batch_dims": (0,)}, r"each once, no batch axis, got \(0, 1\)"),
        (
            {"batch_dims": (1,)},
            r"^kernel: expected batch_dims that are the leading axes, 0, 1, ..., got \(1,\)",
        ),
        (
            {"p": params, "axis": (-2, -1)},
            r"^kernel: expected a QuantWeight, got .*quantize_dense_general",
        ),
        (
            {"p": {**qparams, "kernel": quantize_dense_general(params)["kernel"]}, "axis": (1, 2)},
            r"^kernel: contracted",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(**fields)
