"""`quantized(fn)` on kernels of convolutions: in programs, stacks, files; what is refused."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax

import sqjax as sq
from sqjax.weights.quant_weight import QuantWeight

LAST = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def conv(x, w, layout=LAST, strides=(1, 1), padding="SAME", **more):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **more)


X = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)


def dequantized(params):
    def of(leaf):
        return sq.dequantize(leaf.tensor) if isinstance(leaf, QuantWeight) else leaf

    return jax.tree.map(of, params, is_leaf=lambda x: isinstance(x, QuantWeight))


def net(p, x):
    """Patches, a 3 x 3 over 150 channels (too long for float32), a depthwise, a pointwise."""
    x = jax.nn.relu(conv(x, p["patches"], strides=(2, 2), padding="VALID"))
    x = jax.nn.relu(conv(x, p["long"]))
    x = conv(x, p["depthwise"], feature_group_count=4)
    return conv(x, p["pointwise"]).mean((1, 2))


def net_params():
    return {
        "patches": normal(2, 2, 4, 150),
        "long": normal(3, 3, 150, 4),
        "depthwise": normal(3, 3, 1, 4),
        "pointwise": normal(1, 1, 4, 3),
    }


@pytest.mark.slow
def test_a_program_of_convolutions_runs_in_int8():
    """No float convolution or matmul is left of four sites, and the result is near the float one."""
    params = net_params()
    stats = sq.calibrate(net, params, [X])
    assert len(stats.graph.sites) == 4
    qparams = sq.quantize(params, stats, sq.W8A8)
    run = sq.quantized(net)
    dots = jaxprs.dots(jaxprs.of(run, qparams, X))
    assert dots
    assert {dot.dtypes for dot in dots} == {jaxprs.INT8_DOT}
    expected = net(params, X)
    got = jax.jit(run)(qparams, X)
    assert float(jnp.abs(got - expected).max() / jnp.abs(expected).max()) < 0.03
    weight_only = sq.quantize(params, stats, sq.W8A16)
    near = jax.jit(sq.quantized(net))(weight_only, X)
    exact = net(dequantized(weight_only), X)
    np.testing.assert_allclose(near, exact, rtol=1e-4, atol=1e-5)


def scanned(p, x):
    def step(x, w):
        return jnp.tanh(conv(x, w, feature_group_count=2)), None

    return lax.scan(step, x, p["w"])[0]


def unrolled(p, x):
    for i in range(3):
        x = jnp.tanh(conv(x, p["w"][i], feature_group_count=2))
    return x


@pytest.mark.parametrize("scheme", [sq.W8A8, sq.W8A8_O3, sq.W8A8.replace(smoothing=0.5)], ids=str)
@pytest.mark.slow
def test_layers_of_a_stack_are_quantized_each_for_itself(scheme):
    """Scanned, and indexed one by one: the same numbers; smoothing at run time in both."""
    params = {"w": normal(3, 3, 3, 2, 4) * jnp.asarray([1.0, 4.0, 0.25]).reshape(3, 1, 1, 1, 1)}
    results = []
    for fn in (scanned, unrolled):
        stats = sq.calibrate(fn, params, [X])
        qparams = sq.quantize(params, stats, scheme)
        results.append(jax.jit(sq.quantized(fn))(qparams, X))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(results[0] - scanned(params, X)).max()) < 0.3


@pytest.mark.slow
def test_a_file_keeps_quantized_kernels(tmp_path):
    params = net_params()
    scheme = sq.W8A8_O3.replace(smoothing=0.5)
    qparams = sq.quantize(params, sq.calibrate(net, params, [X]), scheme)
    sq.save(tmp_path / "q.safetensors", qparams)
    loaded = sq.load(tmp_path / "q.safetensors")
    for name, weight in qparams.items():
        ours, theirs = jax.tree.leaves(weight), jax.tree.leaves(loaded[name])
        assert all(map(np.array_equal, ours, theirs)), name
        assert jax.tree.structure(weight) == jax.tree.structure(loaded[name])
    float_bytes = sum(x.nbytes for x in params.values())
    assert (tmp_path / "q.safetensors").stat().st_size < float_bytes / 2


@pytest.mark.slow
def test_outliers_and_images_of_weights_are_refused():
    params = net_params()
    stats = sq.calibrate(net, params, [X])
    with pytest.raises(ValueError, match=r"depthwise: outlier channels are for matmuls"):
        sq.quantize(params, stats, sq.W8A8.replace(outliers=1.0))
    weight = sq.quantize(params, stats, sq.W8A8)["pointwise"]
    turned = {"w": weight}
    with pytest.raises(ValueError, match=r"w: quantized, but `conv_general_dilated` at"):
        sq.quantized(lambda p, x: conv(p["w"], x))(turned, normal(3, 3, 3, 5))


@pytest.mark.slow
def test_a_reshaped_dense_kernel_runs_as_a_pointwise_convolution():
    def fn(p, x):
        return conv(x, p["w"][None, None])

    params = {"w": normal(4, 5)}
    qparams = sq.quantize(params, sq.calibrate(fn, params, [X]), sq.W8A8)

    def dense(p, x):
        return x @ p["w"]

    as_dense = sq.quantize(params, sq.calibrate(dense, params, [X]), sq.W8A8)
    np.testing.assert_array_equal(qparams["w"].tensor.values, as_dense["w"].tensor.values)
    got = jax.jit(sq.quantized(fn))(qparams, X)
    expected = conv(X, sq.dequantize(qparams["w"].tensor)[None, None])
    assert float(jnp.abs(got - expected).max()) < 0.05
