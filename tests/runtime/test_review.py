"""What a review found: shard_maps, groups, stacks, tables, and shapes at the edge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sqjax as sq

G64 = {
    "float x": sq.Scheme(weight=sq.Int8(group_size=64), activation=None),
    "int8 x": sq.Scheme(weight=sq.Int8(group_size=64)),
    "W4A16": sq.W4A16_G64,
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rows_on_devices(p, x):
    """x @ w, with half the rows of w on each of two devices."""
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))
    parts = jax.shard_map(
        lambda w, x: lax.psum(x @ w, "m"),
        mesh=mesh,
        in_specs=(P("m", None), P(None, "m")),
        out_specs=P(),
    )
    return parts(p["w"], x)


def quantize(fn, params, *inputs, scheme):
    return sq.quantize(params, sq.calibrate(fn, params, [inputs]), scheme)


def error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


def as_float(weight):
    """The weight that a QuantWeight stands for, in float64."""
    return np.asarray(sq.dequantize(weight.tensor), np.float64)


@pytest.mark.parametrize("scheme", G64)
def test_groups_run_in_a_shard_map(scheme):
    params, x = {"w": normal(256, 8)}, normal(5, 256, seed=1)
    qparams = quantize(rows_on_devices, params, x, scheme=G64[scheme])
    got = jax.jit(sq.quantized(rows_on_devices))(qparams, x)
    exact = np.asarray(x, np.float64) @ as_float(qparams["w"])
    assert error(got, exact) < (0.02 if scheme == "int8 x" else 1e-6)


def test_a_shard_map_that_would_begin_inside_a_group_is_refused():
    """200 channels in groups of 64 have 4 scales, two for each device, but the second block begins in the second."""
    params, x = {"w": normal(200, 8)}, normal(5, 200, seed=1)
    qparams = quantize(
        rows_on_devices,
        params,
        x,
        scheme=sq.W4A8.replace(weight=sq.Int4(group_size=64, zero_point=True, two_level=True)),
    )
    with pytest.raises(
        ValueError, match=r"^w: its 200 contracted channels can not be cut into 2 blocks of whole"
    ):
        sq.quantized(rows_on_devices)(qparams, x)


def test_one_group_may_be_cut():
    params, x = {"w": normal(64, 8)}, normal(5, 64, seed=1)
    qparams = quantize(rows_on_devices, params, x, scheme=sq.W4A16_G64)
    got = sq.quantized(rows_on_devices)(qparams, x)
    assert error(got, np.asarray(x, np.float64) @ as_float(qparams["w"])) < 1e-6


def test_a_group_too_long_for_int32_is_refused():
    params, x = {"w": jnp.ones((300_000, 1))}, jnp.ones((2, 300_000))
    fn = lambda p, x: x @ p["w"]
    qparams = quantize(fn, params, x, scheme=sq.Scheme(weight=sq.Int8(group_size=150_000)))
    with pytest.raises(
        ValueError, match="w: contracts 150000 channels; int32 sums are exact up to 133144"
    ):
        sq.quantized(fn)(qparams, x)


@pytest.mark.parametrize("scheme", [sq.W8A8, sq.W8A16, *G64.values(), sq.FP8, sq.W4A8])
def test_no_rows(scheme):
    fn = lambda p, x: x @ p["w"]
    qparams = quantize(fn, {"w": normal(130, 3)}, normal(2, 130), scheme=scheme)
    assert sq.quantized(fn)(qparams, jnp.zeros((0, 130))).shape == (0, 3)


def test_smoothing_at_run_time_leaves_tables_alone():
    fn = lambda p, ids: jax.nn.gelu(p["embed"][ids]) @ p["w"]
    params, ids = {"embed": normal(10, 8), "w": normal(8, 4, seed=1)}, jnp.arange(5)
    qparams = sq.smoothquant(
        fn, params, [ids], scheme={"embed": sq.EMBEDDING_INT8, "w": sq.W8A8}, runtime=0.5
    )
    assert qparams["embed"].smoothing is None
    assert qparams["w"].smoothing.shape == (8,)
    assert 0 < error(sq.quantized(fn)(qparams, ids), fn(params, ids)) < 0.03


OUTLIERS = {
    "outliers": sq.W8A8_OUTLIERS,
    "and smoothing": sq.W8A8_OUTLIERS.replace(smoothing=0.5),
    "and static": sq.W8A8_O3.replace(smoothing=0.5, outliers=6.0),
    "static": sq.W8A8_O3,
    "smoothing": sq.W8A8.replace(smoothing=0.5),
}


@pytest.mark.parametrize("scheme", OUTLIERS)
@pytest.mark.parametrize("stack", ["layers", "layers of experts"])
def test_a_layer_of_a_stack_keeps_its_outliers_and_scales(stack, scheme):
    """params["w"][i]: which matrix it is shows in its numbers, since each layer's activations have another size."""
    big = np.where(np.arange(16) % 5 == 0, 20.0, 1.0)
    if stack == "layers":
        w, x = normal(3, 16, 16), jnp.asarray(normal(8, 16, seed=1) * big[None], jnp.float32)
        fn = lambda p, x: jnp.stack([(x * 4.0**i) @ p["w"][i] / 4.0**i for i in range(3)])
    else:
        w, x = (
            normal(2, 3, 16, 16),
            jnp.asarray(normal(3, 8, 16, seed=1) * big[None, None], jnp.float32),
        )
        fn = lambda p, x: jnp.stack(
            [lax.batch_matmul(x[:, :, :: 1 - 2 * i], p["w"][i]) for i in range(2)]
        )
    qparams = quantize(fn, {"w": w}, x, scheme=OUTLIERS[scheme])
    assert isinstance(qparams["w"], sq.QuantWeight)
    got = jax.jit(sq.quantized(fn))(qparams, x)
    assert (
        error(got, fn({"w": w}, x)) < 0.02
    )  # all channels of the largest layer are outliers: there it may be 0


def test_rows_that_a_gather_puts_first_are_no_table():
    numbers = lax.GatherDimensionNumbers((0,), (0,), (0,))
    fn = lambda p, ids: (
        lax.gather(p["embed"], ids[:, None], numbers, (1, 10), mode="clip").T @ p["w"]
    )
    params, ids = {"embed": normal(20, 10), "w": normal(10, 4)}, jnp.arange(6)
    assert fn(params, ids).shape == (6, 4)
    assert sq.calibrate(fn, params, [ids]).graph.tables == ()
    lookup = lambda p, ids: p["embed"][ids] @ p["w"]
    qparams = sq.quantize(params, sq.calibrate(lookup, params, [ids]), {"embed": sq.EMBEDDING_INT4})
    with pytest.raises(ValueError, match="embed: quantized, but `gather`"):
        sq.quantized(fn)(qparams, ids)


def test_int8_attention_composes_with_quantized_either_way():
    fn = lambda p, x: jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["q"])
    params, x = {"q": normal(4, 4)}, normal(2, 3, 4)
    qparams = quantize(fn, params, x, scheme=sq.W8A8)
    assert 0 < error(sq.int8_attention(sq.quantized(fn))(qparams, x), fn(params, x)) < 0.05
    assert 0 < error(sq.quantized(sq.int8_attention(fn))(qparams, x), fn(params, x)) < 0.05


def test_what_fills_rows_out_of_range_is_not_divided_by_a_smoothing():
    fn = lambda p, ids: jnp.tanh(p["embed"][ids]) @ p["embed"].T
    look = lambda p, ids: jnp.take(p["embed"], ids, axis=0, mode="fill", fill_value=3.0)
    params, ids = {"embed": normal(20, 12)}, jnp.array([[0, 1, 3]])
    qparams = quantize(fn, params, ids, scheme=sq.W8A8.replace(smoothing=0.5))
    with pytest.raises(ValueError, match="embed: quantized, but `gather`"):
        sq.quantized(look)(qparams, jnp.array([25]))
    filled = sq.quantized(look)(quantize(fn, params, ids, scheme=sq.W8A8), jnp.array([25]))
    np.testing.assert_array_equal(filled, np.full((1, 12), 3.0))
