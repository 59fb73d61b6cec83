"""`QTensor`: what it stands for, its invariants, its life as a pytree."""

from dataclasses import replace

import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.weights.qtensor import QTensor


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


LAYOUTS = {  # shape, contracted axes, stored shape, scale shape
    "dense": ((6, 4), (0,), (4, 6), (4, 1)),
    "embedding": ((6, 4), (1,), (6, 4), (6, 1)),
    "vector": ((6,), (0,), (6,), (1,)),
    "general in": ((6, 4, 3), (0,), (4, 3, 6), (4, 3, 1)),
    "general out": ((6, 4, 3), (0, 1), (3, 6, 4), (3, 1, 1)),
    "middle": ((6, 4, 3), (1,), (6, 3, 4), (6, 3, 1)),
    "from the end": ((6, 4, 3), (-2, 0), (3, 6, 4), (3, 1, 1)),
    "any order": ((6, 4, 3), (1, 0), (3, 6, 4), (3, 1, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stores_the_contracted_axes_last(layout):
    shape, contracting, stored, scale = LAYOUTS[layout]
    q = QTensor.quantize(normal(*shape), contracting)
    assert (q.values.shape, q.scale.shape, q.shape, q.ndim) == (stored, scale, shape, len(shape))
    assert (q.values.dtype, q.scale.dtype, q.dtype) == (jnp.int8, jnp.float32, jnp.float32)
    q.check("w")


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stands_for_the_rounded_array(layout, granularity):
    shape, contracting, *_ = LAYOUTS[layout]
    axes = contracting if granularity == "per_channel" else None
    x = numpy_int8.away_from_ties(normal(*shape), axes)
    scale = numpy_int8.scale_of(x, axes)
    q = QTensor.quantize(jnp.asarray(x), contracting, granularity)
    np.testing.assert_allclose(sq.dequantize(q), numpy_int8.rounded(x, scale) * scale, rtol=1e-6)
    error = np.abs(np.asarray(sq.dequantize(q)) - x)
    assert (error <= 0.5001 * scale).all()
    assert error.max() > 0.2 * scale.min()
    assert q.scale.size == scale.size


@pytest.mark.parametrize("permutation", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
@pytest.mark.slow
def test_a_transpose_moves_no_value(permutation):
    q = QTensor.quantize(normal(6, 4, 3), (0,))
    t = q.transpose(permutation)
    assert t.values is q.values
    assert t.shape == tuple(q.shape[p] for p in permutation)
    t.check("w")
    np.testing.assert_array_equal(sq.dequantize(t), np.transpose(sq.dequantize(q), permutation))
    twice = t.transpose(permutation).transpose((1, 0, 2))
    expected = np.transpose(
        np.transpose(np.transpose(sq.dequantize(q), permutation), permutation), (1, 0, 2)
    )
    np.testing.assert_array_equal(sq.dequantize(twice), expected)


def test_bfloat16_keeps_its_dtype_and_float32_scales():
    x = normal(6, 4, dtype=jnp.bfloat16)
    q = QTensor.quantize(x, (0,))
    assert (q.dtype, q.scale.dtype, sq.dequantize(q).dtype) == (
        jnp.bfloat16,
        jnp.float32,
        jnp.bfloat16,
    )
    np.testing.assert_allclose(
        q.scale[:, 0], np.abs(np.asarray(x, np.float32)).max(0) / 127, rtol=2e-7
    )


def test_nbytes_counts_values_and_scales():
    assert QTensor.quantize(normal(6, 4), (0,)).nbytes == 6 * 4 + 4 * 4
    assert QTensor.quantize(normal(6, 4), (0,), "per_tensor").nbytes == 6 * 4 + 4


LAYERS = 3
STACKED = {  # how a stack of layers came to be
    "vmap": lambda x: jax.vmap(lambda layer: QTensor.quantize(layer, (0,)))(x),
    "stacked leaf": lambda x: QTensor.quantize(x, (1,)),
    "stack of tensors": lambda x: jax.tree.map(
        lambda *a: jnp.stack(a), *[QTensor.quantize(w, (0,)) for w in x]
    ),
}


@pytest.mark.parametrize("made", STACKED)
def test_a_slice_of_stacked_layers_is_that_layer(made):
    x = normal(LAYERS, 6, 4)
    stack = STACKED[made](x)
    assert (stack.shape, stack.values.shape, stack.scale.shape) == (
        (LAYERS, 6, 4),
        (LAYERS, 4, 6),
        (LAYERS, 4, 1),
    )
    stack.check("layers")
    for i, layer in enumerate(x):
        got, expected = jax.tree.map(lambda a, i=i: a[i], stack), QTensor.quantize(layer, (0,))
        got.check("layer")
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        np.testing.assert_array_equal(got.values, expected.values)
        np.testing.assert_array_equal(got.scale, expected.scale)
    whole = np.stack([sq.dequantize(QTensor.quantize(layer, (0,))) for layer in x])
    np.testing.assert_array_equal(sq.dequantize(stack), whole)


def test_a_scan_over_stacked_layers_sees_each_layer():
    stack = STACKED["stacked leaf"](normal(LAYERS, 6, 4))

    def body(total, layer):
        layer.check("layer")
        return total + sq.dequantize(layer), layer.transpose((1, 0)).shape[0] * jnp.ones(())

    total, sizes = jax.lax.scan(body, jnp.zeros((6, 4)), stack)
    np.testing.assert_allclose(total, sq.dequantize(stack).sum(0), rtol=1e-5, atol=1e-6)
    assert sizes.tolist() == [4.0] * LAYERS


def test_is_a_pytree_of_values_and_scale():
    q = QTensor.quantize(normal(6, 4), (0,))
    assert [a.dtype for a in jax.tree.leaves(q)] == [jnp.int8, jnp.float32]
    back = jax.tree.unflatten(jax.tree.structure(q), jax.tree.leaves(q))
    assert back.order == q.order
    assert back.dtype == q.dtype
    spec = jax.eval_shape(lambda x: QTensor.quantize(x, (0,)), normal(6, 4))
    assert (spec.shape, spec.values.dtype) == ((6, 4), jnp.int8)
    assert jax.tree.structure(spec) == jax.tree.structure(q)


def test_works_under_jit_and_vmap():
    x = jnp.asarray(numpy_int8.away_from_ties(normal(6, 4), 0))
    q = QTensor.quantize(x, (0,))
    np.testing.assert_array_equal(jax.jit(lambda x: QTensor.quantize(x, (0,)))(x).values, q.values)
    stacked = jax.vmap(lambda x: sq.dequantize(QTensor.quantize(x, (0,))))(jnp.stack([x, x]))
    np.testing.assert_allclose(stacked[1], sq.dequantize(q), rtol=1e-6)


GOOD = QTensor.quantize(jnp.arange(1.0, 25.0).reshape(6, 4), (0,))
BROKEN = {
    "values must be int8, got float32": replace(GOOD, values=GOOD.values.astype(jnp.float32)),
    "scale must be float32, got bfloat16": replace(GOOD, scale=GOOD.scale.astype(jnp.bfloat16)),
    "scale of rank 2 expected": replace(GOOD, scale=GOOD.scale[:, 0]),
    r"scale \(3, 1\) does not broadcast": replace(GOOD, scale=GOOD.scale[:3]),
    "order must permute the last 2 axes": replace(GOOD, order=(-1, -1)),
    "values of rank 2 or more expected": jax.tree.map(lambda a: a[0], GOOD),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_check_names_the_place_and_the_problem(problem):
    with pytest.raises(
        ValueError, match=rf"^mlp/kernel: not a valid QTensor: {problem}.*; quantize the float leaf"
    ):
        BROKEN[problem].check("mlp/kernel")


@pytest.mark.slow
def test_a_cast_of_the_whole_tree_is_caught_where_the_tensor_is_used():
    fn = lambda p, x: x @ p["layer"]["kernel"]
    params, x = {"layer": {"kernel": normal(6, 4)}}, normal(2, 6)
    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]))
    for dtype in (jnp.bfloat16, jnp.float32):
        cast = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), qparams)
        with pytest.raises(
            ValueError, match=r"layer/kernel: not a valid QTensor: .*was the tree cast"
        ):
            jax.jit(sq.quantized(fn))(cast, x)
