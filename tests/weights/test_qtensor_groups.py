"""`QTensor` with groups, zero points and integer scales: invariants, views, stacks; int4 in nibbles."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_but

import sqjax as sq
from sqjax.numerics.formats import E4M3, INT4
from sqjax.numerics.int4 import pack_int4, unpack_int4
from sqjax.weights.qtensor import QTensor


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


MADE = {
    "symmetric": lambda x, contracting, group: QTensor.quantize(x, contracting, group, INT4),
    "zero point": lambda x, contracting, group: QTensor.quantize(
        x, contracting, group, INT4, (), True
    ),
    "two levels": lambda x, contracting, group: QTensor.quantize_twice(x, contracting, group),
    "e4m3": lambda x, contracting, group: QTensor.quantize(x, contracting, group, E4M3),
}
made = pytest.mark.parametrize("how", MADE)


# Nibbles ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 3), length=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.slow
def test_nibbles_come_back(rows, length, seed):
    x = np.random.default_rng(seed).integers(-8, 8, (rows, length)).astype(np.int8)
    packed = pack_int4(x)
    assert (packed.shape, packed.dtype) == ((rows, (length + 1) // 2), np.uint8)
    back = unpack_int4(packed, length)
    assert back.dtype == jnp.int4
    np.testing.assert_array_equal(back.astype(np.int8), x)
    np.testing.assert_array_equal(pack_int4(jnp.asarray(x, jnp.int4)), packed)


def test_nibbles_are_low_then_high():
    every = np.arange(-8, 8, dtype=np.int8)
    assert pack_int4(every).tolist() == [0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x76]
    assert pack_int4(every[:3]).tolist() == [0x98, 0x0A]  # the last nibble is zero
    assert unpack_int4(np.array([0x98, 0xFA], np.uint8), 3).tolist() == [
        -8,
        -7,
        -6,
    ]  # and is not read


@pytest.mark.parametrize("length", [2, 5, 6])
def test_nibbles_of_another_length_are_refused(length):
    with pytest.raises(
        ValueError, match=rf"^unpack_int4: {length} elements take {(length + 1) // 2} bytes, got 2"
    ):
        unpack_int4(np.zeros((3, 2), np.uint8), length)


# Layout -----------------------------------------------------------------------------------------------------------


@made
@pytest.mark.slow
def test_one_scale_for_every_group_and_a_shorter_last_one(how):
    q = MADE[how](normal(20, 6), (0,), 8)
    assert (q.values.shape, q.shape, q.group) == ((6, 20), (20, 6), 8)
    parts = {"scale": q.scale, "zero": q.zero, "group_scale": q.group_scale}
    shapes = {name: x.shape for name, x in parts.items() if x is not None}
    assert (
        shapes
        == {
            "symmetric": {"scale": (6, 3)},
            "e4m3": {"scale": (6, 3)},
            "zero point": {"scale": (6, 3), "zero": (6, 3)},
            "two levels": {"scale": (6, 1), "zero": (6, 3), "group_scale": (6, 3)},
        }[how]
    )
    q.check("w")
    whole = MADE[how](normal(20, 6), (0,), 64)  # a shorter axis is one group
    assert whole.scale.shape == (6, 1)
    whole.check("w")


@made
@pytest.mark.slow
def test_each_group_is_quantized_by_itself(how):
    x = normal(20, 6)
    q, other = (MADE[how](a, (0,), 8) for a in (x, x.at[9].multiply(0.5)))
    same = np.ones(20, bool)
    same[8:16] = False  # two levels share the channel's scale, which this leaves alone
    np.testing.assert_array_equal(
        np.asarray(sq.dequantize(q))[same], np.asarray(sq.dequantize(other))[same]
    )
    assert (np.asarray(sq.dequantize(q))[9] != np.asarray(sq.dequantize(other))[9]).any()


@pytest.mark.slow
def test_nbytes_of_int4_is_half_a_byte_an_element():
    q = QTensor.quantize(normal(21, 6), (0,), 8, INT4, (), True)
    assert q.nbytes == 6 * 11 + 6 * 3 * 4 + 6 * 3
    assert q.stored_as(jnp.int4).nbytes == q.nbytes
    two = QTensor.quantize_twice(normal(21, 6), (0,), 8)
    assert two.nbytes == 6 * 11 + 6 * 4 + 2 * 6 * 3


@made
def test_int4_stored_as_int4_is_the_same_array(how):
    q = MADE[how](normal(20, 6), (0,), 8)
    narrow = q.stored_as(jnp.int4)
    assert narrow.values.dtype == (jnp.int4 if how != "e4m3" else jnp.float8_e4m3fn)
    narrow.check("w")
    np.testing.assert_array_equal(sq.dequantize(narrow), sq.dequantize(q))
    assert jax.tree.structure(narrow) == jax.tree.structure(q)


GOOD = QTensor.quantize(normal(20, 6), (0,), 8, INT4, (), True)
TWO = QTensor.quantize_twice(normal(20, 6), (0,), 8)
EIGHT = QTensor.quantize(normal(20, 6), (0,), 8)
BROKEN = {
    "values must be int4, got int16": replace(GOOD, values=GOOD.values.astype(jnp.int16)),
    "values must be e4m3, got int8": replace(GOOD, fmt=E4M3),
    "values must be int8, got int4": replace(EIGHT, values=EIGHT.values.astype(jnp.int4)),
    "zero must be int8, got float32": replace(GOOD, zero=GOOD.zero.astype(jnp.float32)),
    "group_scale must be int8, got int32": replace(
        TWO, group_scale=TWO.group_scale.astype(jnp.int32)
    ),
    r"zero of rank 2 expected, got shape \(3,\)": replace(GOOD, zero=GOOD.zero[0]),
    r"zero \(6, 2\) does not broadcast against values \(6, 20\) in groups of 8": replace(
        GOOD, zero=GOOD.zero[:, :2]
    ),
    r"scale \(6, 3\) does not broadcast against values \(6, 20\)": replace(GOOD, group=None),
    r"scale \(6, 3\) does not broadcast against values \(6, 20\) in groups of 4": replace(
        GOOD, group=4
    ),
    r"group_scale \(5, 3\) does not broadcast": replace(TWO, group_scale=TWO.group_scale[:5]),
    "scale must be float32, got float16": replace(TWO, scale=TWO.scale.astype(jnp.float16)),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_check_names_the_place_and_the_problem(problem):
    with pytest.raises(
        ValueError, match=rf"^mlp/kernel: not a valid QTensor: {problem}.*; quantize the float leaf"
    ):
        BROKEN[problem].check("mlp/kernel")


def test_a_zero_point_in_another_format_is_refused():
    with pytest.raises(
        ValueError, match="zero points are for int4 weights, got e4m3; use a symmetric range"
    ):
        QTensor.quantize(normal(20, 6), (0,), 8, E4M3, (), True)


# Views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permutation", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
@made
@pytest.mark.slow
def test_a_transpose_moves_no_value(how, permutation):
    q = MADE[how](normal(20, 3, 4), (0,), 8)
    t = q.transpose(permutation)
    assert t.values is q.values
    t.check("w")
    np.testing.assert_array_equal(sq.dequantize(t), np.transpose(sq.dequantize(q), permutation))


@made
@pytest.mark.slow
def test_slices_of_outputs_are_those_of_the_dequantized_array_and_of_channels_are_refused(how):
    q = MADE[how](normal(20, 6, 4), (0,), 8)
    floats = np.asarray(sq.dequantize(q))
    for cuts in (
        (slice(None), slice(1, 5, 2), slice(None)),
        (slice(None), slice(2, 3), slice(0, 2)),
    ):
        part = q.slice(cuts)
        part.check("w")
        np.testing.assert_array_equal(sq.dequantize(part), floats[cuts])
    assert q.slice((slice(0, 8), slice(None), slice(None))) is None
    assert q.slice((slice(8, 20), slice(None), slice(None))) is None


RESHAPES = {  # shape, contracted axes, group, new shape, whether it is possible
    "outputs split": ((16, 12), (0,), 8, (16, 3, 4), True),
    "outputs joined": ((16, 3, 4), (0,), 8, (16, 12), True),
    "axes of 1": ((16, 12), (0,), 8, (1, 16, 1, 12), True),
    "channels split at groups": ((16, 12), (0,), 4, (2, 8, 12), True),
    "channels split inside groups": ((16, 12), (0,), 8, (4, 4, 12), False),
    "channels split of ragged groups": ((20, 12), (0,), 8, (2, 10, 12), False),
    "ragged and outputs split": ((20, 12), (0,), 8, (20, 4, 3), True),
    "contracted axes joined": ((3, 16, 12), (0, 1), 8, (48, 12), True),
    "mixed": ((16, 12), (0,), 8, (12, 16), False),
    "flat": ((16, 12), (0,), 8, (192,), False),
}


@pytest.mark.parametrize("case", slow_but(list(RESHAPES), "channels split inside groups", "mixed"))
@made
def test_reshapes_are_those_of_the_dequantized_array_or_refused(how, case):
    shape, contracting, group, new, possible = RESHAPES[case]
    q = MADE[how](normal(*shape), contracting, group)
    got = q.reshape(new)
    assert (got is not None) == possible
    if possible:
        got.check("w")
        assert got.shape == new
        np.testing.assert_array_equal(sq.dequantize(got), np.reshape(sq.dequantize(q), new))


@made
@pytest.mark.slow
def test_layers_of_a_stack_are_those_of_a_loop(how):
    x = normal(3, 20, 6)
    stack, mapped = MADE[how](x, (1,), 8), jax.vmap(lambda x: MADE[how](x, (0,), 8))(x)
    assert jax.tree.structure(stack) == jax.tree.structure(mapped)
    for a, b in zip(jax.tree.leaves(stack), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-7)
    for i, layer in enumerate(x):
        one = jax.tree.map(lambda a, i=i: a[i], stack)
        one.check("layer")
        np.testing.assert_allclose(
            sq.dequantize(one), sq.dequantize(MADE[how](layer, (0,), 8)), rtol=1e-6
        )
    _, floats = jax.lax.scan(lambda c, one: (c, sq.dequantize(one)), 0, stack)
    np.testing.assert_array_equal(floats, sq.dequantize(stack))


@made
@pytest.mark.slow
def test_a_quantized_function_sees_views_of_grouped_weights(how):
    """Slices, transposes and splits of outputs inside fn."""
    scheme = {
        "symmetric": sq.Scheme(weight=sq.Int4(group_size=8)),
        "zero point": sq.W4A16.replace(weight=sq.Int4(group_size=8, zero_point=True)),
        "two levels": sq.W4A8.replace(
            weight=sq.Int4(group_size=8, zero_point=True, two_level=True)
        ),
        "e4m3": sq.FP8.replace(weight=sq.Float8(group_size=8)),
    }[how]
    whole = lambda p, x: x @ p["w"]
    views = {
        "part": lambda p, x: x @ p["w"][:, 2:8],
        "turned": lambda p, x: (p["w"].T @ x.T).T,
        "split": lambda p, x: jnp.einsum("ti,ihd->thd", x, p["w"].reshape(20, 3, 4)).reshape(
            -1, 12
        ),
    }
    params, x = {"w": normal(20, 12)}, normal(5, 20, seed=1)
    qparams = sq.quantize(params, sq.calibrate(whole, params, [x]), scheme)
    expected = jax.jit(sq.quantized(whole))(qparams, x)
    for name, fn in views.items():
        got = jax.jit(sq.quantized(fn))(qparams, x)
        np.testing.assert_allclose(
            got, expected[:, 2:8] if name == "part" else expected, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"^w: quantized, but `slice` .*rule of None"):
        jax.eval_shape(sq.quantized(lambda p, x: x[:, :8] @ p["w"][:8]), qparams, x)
