"""Slices and reshapes of a weight, on its arrays alone: no program is traced or compiled."""

import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.runtime.weight_shapes import reshaped, sliced
from sqjax.weights.quant_weight import Outliers

LAYERS, INNER, OUTER, OUTLIERS = 3, 16, 8, 2


def numbers(*shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


def stack():
    """Three layers of (16, 8), stored as (3, 8, 16), with every array that a matrix can have."""
    tensor = sq.QTensor(
        values=(jnp.arange(LAYERS * OUTER * INNER) % 127).astype(jnp.int8).reshape(3, 8, 16),
        scale=numbers(LAYERS, OUTER, 1) + 1,
        order=(-1, -2),
        dtype=jnp.dtype(jnp.float32),
    )
    return sq.QuantWeight(
        tensor,
        input_scale=numbers(LAYERS),
        smoothing=numbers(LAYERS, INNER),
        activations="static",
        outliers=Outliers(
            jnp.arange(LAYERS * OUTLIERS, dtype=jnp.int32).reshape(LAYERS, OUTLIERS),
            numbers(LAYERS, OUTER, OUTLIERS),
        ),
    )


def matrix():
    """An attention projection of 16 channels to 2 heads of 8, stored as (2, 8, 16)."""
    tensor = sq.QTensor.quantize(numbers(16, 2, 8), (0,))
    return sq.QuantWeight(tensor, jnp.float32(0.5), numbers(16), "static")


def assert_stands_for(weight, expected):
    np.testing.assert_array_equal(sq.dequantize(weight.tensor), expected)


@pytest.mark.slow
def test_a_slice_of_layers_takes_their_arrays():
    whole = stack()
    part = sliced(whole, [slice(1, 3), slice(0, 16), slice(0, 8, 2)])
    assert_stands_for(part, sq.dequantize(whole.tensor)[1:3, :, ::2])
    np.testing.assert_array_equal(part.input_scale, whole.input_scale[1:3])
    np.testing.assert_array_equal(part.smoothing, whole.smoothing[1:3])
    np.testing.assert_array_equal(part.outliers.channels, whole.outliers.channels[1:3])
    np.testing.assert_array_equal(part.outliers.weight, whole.outliers.weight[1:3, ::2])


@pytest.mark.slow
def test_a_slice_of_the_outputs_leaves_what_all_matrices_share():
    part = sliced(matrix(), [slice(0, 16), slice(1, 2), slice(0, 8)])
    assert_stands_for(part, sq.dequantize(matrix().tensor)[:, 1:])
    np.testing.assert_array_equal(part.smoothing, matrix().smoothing)
    assert part.input_scale.shape == ()


def test_a_slice_of_the_channels_has_no_place():
    assert sliced(stack(), [slice(0, 3), slice(0, 8), slice(0, 8)]) is None
    assert sliced(matrix(), [slice(0, 16, 2), slice(0, 2), slice(0, 8)]) is None


@pytest.mark.parametrize("shape", [(1, 3, 16, 8), (3, 16, 1, 8)])
def test_axes_of_size_1_are_added_to_the_batch_axes_and_removed(shape):
    found = reshaped(stack(), shape)
    assert_stands_for(found, sq.dequantize(stack().tensor).reshape(shape))
    assert found.tensor.values.shape == (1, 3, 8, 16)
    assert (found.input_scale.shape, found.smoothing.shape) == ((1, 3), (1, 3, 16))
    assert found.outliers.channels.shape == (1, 3, 2)
    assert found.outliers.weight.shape == (1, 3, 8, 2)
    back = reshaped(found, (3, 16, 8))
    assert_stands_for(back, sq.dequantize(stack().tensor))
    np.testing.assert_array_equal(back.smoothing, stack().smoothing)


def test_a_stack_of_several_matrices_is_not_reshaped_otherwise():
    assert reshaped(stack(), (3, 128)) is None
    assert reshaped(stack(), (48, 8)) is None


def test_heads_become_outputs_and_channels_several_axes():
    flat = reshaped(matrix(), (16, 16))
    assert_stands_for(flat, sq.dequantize(matrix().tensor).reshape(16, 16))
    assert (flat.contracted, flat.smoothing.shape, flat.input_scale.shape) == (1, (16,), ())
    apart = reshaped(flat, (4, 4, 16))
    assert_stands_for(apart, sq.dequantize(matrix().tensor).reshape(4, 4, 16))
    assert (apart.contracted, apart.smoothing.shape) == (2, (4, 4))


def test_rows_are_not_mixed():
    assert reshaped(matrix(), (32, 8)) is None
    one_row = sq.QuantWeight(sq.QTensor.quantize(numbers(4, 4), (1,)), None, None, None)
    assert reshaped(one_row, (2, 8)) is None
