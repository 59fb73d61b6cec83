"""`jax.export` for other platforms: what is kept of the quantized matmuls."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import sqjax as sq
from sqjax.linen import QuantDense, quantize_dense
from sqjax.models import LlamaConfig, Model

PLATFORMS = ("cuda", "tpu", "cpu")
INT8_DOT = re.compile(
    r"stablehlo\.dot_general .*: \(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>"
)


def exported(fn, *args, platforms=PLATFORMS):
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    leaves, tree = jax.tree.flatten(specs)  # no pytree classes of ours in what is exported
    return export.export(jax.jit(lambda leaves: fn(*tree.unflatten(leaves))), platforms=platforms)(
        leaves
    )


def int8_dots(program):
    return len(INT8_DOT.findall(program.mlir_module()))


@pytest.mark.parametrize(
    "scheme",
    [
        sq.W8A8_O1,
        pytest.param(sq.W8A8_O2, marks=pytest.mark.slow),
        pytest.param(sq.W8A8_O3, marks=pytest.mark.slow),
    ],
    ids=["O1", "O2", "O3"],
)
@pytest.mark.slow
def test_a_dense_layer_keeps_its_int8_matmul(scheme):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 32)), jnp.float32)
    params = quantize_dense(
        {"kernel": kernel, "bias": jnp.ones(16)}, scheme, absmax=jnp.max(jnp.abs(x), axis=0)
    )
    run = lambda params, x: QuantDense(16).apply({"params": params}, x)
    for platform in PLATFORMS:
        alone = exported(run, params, x, platforms=[platform])
        assert (int8_dots(alone), alone.mlir_module().count("stablehlo.dot_general")) == (1, 1)
    program = exported(run, params, x)
    assert set(program.platforms) == set(PLATFORMS)
    assert int8_dots(program) == program.mlir_module().count(
        "stablehlo.dot_general"
    )  # one or more a platform
    got = program.call(jax.tree.leaves((params, x)))
    np.testing.assert_array_equal(got, jax.jit(run)(params, x))
    assert 1e-4 < np.abs(got - (x @ kernel + 1)).max() < 0.5  # it was not the float layer


@pytest.mark.slow
@pytest.mark.every_case
def test_a_decoder_keeps_every_int8_matmul():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 5)), jnp.int32)
    qparams = sq.quantize(params, sq.calibrate(model.apply, params, [ids]), sq.W8A8)
    run = sq.quantized(model.apply)
    for platform in PLATFORMS:
        assert int8_dots(exported(run, qparams, ids, platforms=[platform])) == 7 + 1
    program = exported(run, qparams, ids)
    assert set(program.platforms) == set(PLATFORMS)
    got = program.call(jax.tree.leaves((qparams, ids)))
    np.testing.assert_allclose(got, jax.jit(run)(qparams, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16_G64", "W8A8"])
@pytest.mark.slow
def test_one_program_for_any_number_of_rows(scheme):
    """A symbolic batch: no code may ask in Python whether there are few rows."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(128, 16)), jnp.float32)}
    fn = lambda p, x: x @ p["w"]
    stats = sq.calibrate(fn, params, [jnp.ones((2, 128))])
    qparams = sq.quantize(params, stats, scheme)
    (rows,) = export.symbolic_shape("rows")
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), qparams)
    x_type = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
    program = export.export(jax.jit(sq.quantized(fn)))(types, x_type)
    weight = np.asarray(sq.dequantize(qparams["w"].tensor), np.float64)
    for count in (1, 40):
        x = np.random.default_rng(count).normal(size=(count, 128)).astype(np.float32)
        exact = x @ weight
        error = np.abs(program.call(qparams, jnp.asarray(x)) - exact).max()
        assert error < (0.02 if scheme == "W8A8" else 1e-5) * np.abs(exact).max()
