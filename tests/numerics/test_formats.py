"""The arithmetic of one quantized array: rounding, bounds, scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sqjax.numerics.formats import (
    INT8,
    absmax,
    absmax_of_rows,
    range_of_rows,
    scale_from_absmax,
    to_format,
)

TINY = float(np.finfo(np.float32).tiny)  # the smallest normal float32

ROUNDING = [  # x / scale -> integer
    (0.0, 0),
    (0.5, 0),  # half to even
    (1.5, 2),
    (2.5, 2),
    (-0.5, 0),
    (-1.5, -2),
    (-2.5, -2),
    (0.50001, 1),
    (126.49999, 126),
    (126.5, 126),
    (126.50001, 127),
    (127.0, 127),
    (-127.0, -127),
    (127.5, 127),  # beyond the bound: clipped
    (-127.5, -127),
    (-128.0, -127),  # never -128
    (300.0, 127),  # no wrap to 44
    (-1e30, -127),
    (float("inf"), 127),
    (float("-inf"), -127),
]


@pytest.mark.parametrize(("x", "expected"), ROUNDING)
@pytest.mark.parametrize("scale", [1.0, 0.25, 1024.0])
def test_rounds_half_to_even_and_clips_at_the_bound(x, expected, scale):
    got = to_format(jnp.float32(x * scale), jnp.float32(scale))
    assert (got.dtype, int(got)) == (jnp.int8, expected)


@pytest.mark.parametrize(
    ("absmax", "expected"),
    [
        (127.0, 1.0),
        (254.0, 2.0),
        (1.0, 1 / 127),
        (0.0, 1.0),  # a dead channel
        (1e-40, 1.0),  # subnormal
        (TINY, 1.0),  # normal, but its scale would be subnormal
        (TINY * 126, 1.0),
        (TINY * 128, TINY * 128 / 127),
        (3e38, 3e38 / 127),
    ],
)
def test_scale_is_absmax_over_127_or_one_for_a_dead_channel(absmax, expected):
    scale = scale_from_absmax(jnp.float32(absmax))
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, expected, rtol=2e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scales_of_half_precision_are_float32(dtype):
    scale = scale_from_absmax(jnp.asarray([3.0, 0.0], dtype))
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, [3 / 127, 1.0], rtol=2e-7)  # 3 / 127 in bfloat16 is 7e-4 off


def test_half_precision_is_divided_in_float32():
    one = jnp.ones((), jnp.bfloat16)
    assert (
        int(to_format(one, jnp.float32(1 / 100.6))) == 101
    )  # in bfloat16 1 / scale is 100.5, which rounds to 100


@pytest.mark.parametrize("axis", [0, 1, (0, 1)], ids=["column", "row", "tensor"])
def test_scales_broadcast(axis):
    x = np.array([[1.0, -8.0, 3.0], [-2.0, 100.0, 0.5]], np.float32)
    scale = scale_from_absmax(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    got = np.asarray(to_format(jnp.asarray(x), scale))
    expected = np.rint(
        x.astype(np.float64) / (np.abs(x).max(axis=axis, keepdims=True).astype(np.float64) / 127)
    )
    np.testing.assert_array_equal(got, expected)
    assert (
        np.abs(got).max(axis=axis) == 127
    ).all()  # the largest element of every slice uses the whole range


@pytest.mark.slow
def test_a_dead_array_quantizes_to_exact_zeros():
    x = jnp.array([[0.0, -0.0, 1e-42]])
    assert not to_format(x, scale_from_absmax(jnp.max(jnp.abs(x), axis=1, keepdims=True))).any()


@pytest.mark.slow
def test_a_sign_change_is_exact():
    x = jnp.linspace(-3.0, 3.0, 999)
    scale = scale_from_absmax(jnp.max(jnp.abs(x)))
    assert np.array_equal(to_format(-x, scale), -to_format(x, scale))
    assert int(to_format(x, scale)[0]) == -127


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rows_to_int8(x):
    scale = scale_from_absmax(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    return to_format(x, scale), scale


@pytest.mark.parametrize("quantize", [rows_to_int8, jax.jit(rows_to_int8)], ids=["eager", "jit"])
@settings(max_examples=100, deadline=None)
@given(x=hnp.arrays(np.float32, (3, 5), elements=finite))
@pytest.mark.slow
def test_the_error_is_at_most_half_a_scale(quantize, x):
    q, scale = (np.asarray(a, np.float64) for a in quantize(jnp.asarray(x)))
    assert (np.abs(q) <= INT8.bound).all()
    few_ulp = 4 * np.finfo(np.float32).eps * np.abs(x.astype(np.float64))
    assert (np.abs(q * scale - x) <= scale / 2 + few_ulp).all()


@pytest.mark.parametrize("channels", [1, 255, 256, 577, 1536])
def test_the_largest_of_a_row_is_found_by_halves_too(channels):
    """In every place, with any sign; NaN is the largest, then infinity."""
    rows = np.random.default_rng(channels).normal(size=(channels, channels)).astype(np.float32)
    places = np.arange(channels)
    rows[places, places] = np.where(places % 2, -9.0, 9.0)
    expected = np.abs(rows).max(1, keepdims=True)
    for special in (-np.inf, np.nan):
        rows[places[:3], places[-3:]] = special
        expected[:3] = np.abs(special)
        got = jax.jit(absmax_of_rows)(rows)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(absmax(jnp.asarray(rows), 1), expected)
    of_blocks = absmax_of_rows(jnp.asarray(rows, jnp.bfloat16)[None])
    assert of_blocks.shape == (1, channels, 1)
    assert of_blocks.dtype == jnp.float32


@pytest.mark.parametrize("channels", [1, 255, 577])
def test_the_ends_of_a_row_are_found_by_halves_too(channels):
    """Each in every place; rows of one sign end at 0; NaN of either sign is in one of both."""
    rows = np.random.default_rng(channels).normal(size=(channels, channels)).astype(np.float32)
    places = np.arange(channels)
    rows[places, places] = np.where(places % 2, -9.0, 9.0)
    rows[0] = np.abs(rows[0])
    rows[-1] = -np.abs(rows[-1])
    low, high = jax.jit(range_of_rows)(rows)
    np.testing.assert_array_equal(low, np.minimum(rows.min(1, keepdims=True), 0))
    np.testing.assert_array_equal(high, np.maximum(rows.max(1, keepdims=True), 0))
    for special, end in ((np.inf, 1), (-np.inf, 0), (np.nan, 1), (-np.float32(np.nan), 0)):
        ends = range_of_rows(jnp.asarray(rows).at[0, -1].set(special))
        np.testing.assert_array_equal(ends[end][0], special)


def test_channels_that_devices_share_are_not_halved():
    """300 of them on 4 devices: 150 are not divisible."""
    mesh = jax.make_mesh((4,), ("channels",), axis_types=(AxisType.Explicit,))
    rows = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    with jax.set_mesh(mesh):
        split = jax.device_put(rows, NamedSharding(mesh, P(None, "channels")))
        got = jax.jit(absmax_of_rows)(split)
    np.testing.assert_array_equal(got, np.abs(rows).max(1, keepdims=True))
