"""Rows of a quantized embedding are gathered as they are stored, and only they are dequantized."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import schemes_in_numpy as oracle
from flax import linen as nn
from jax import lax

import sqjax as sq


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def quantize(fn, params, *inputs, scheme=sq.W8A8):
    return sq.quantize(params, sq.calibrate(fn, params, [inputs]), scheme)


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


TAKES = {
    "default": lambda table, ids: jnp.take(table, ids, axis=0),
    "fill 5": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill", fill_value=5.0),
    "fill 0": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill", fill_value=0.0),
    "clip": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "wrap": lambda table, ids: jnp.take(table, ids, axis=0, mode="wrap"),
    "index": lambda table, ids: table[ids],
    "at": lambda table, ids: table.at[ids].get(mode="fill"),
}


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.slow
def test_rows_are_those_of_the_dequantized_table_out_of_range_too(weights):
    """Every way to take them, from tables whose rows are vectors and matrices, in one program."""
    tables = {"vectors": normal(6, 8), "matrices": normal(6, 2, 4)}
    axes = {name: tuple(range(1, table.ndim)) for name, table in tables.items()}
    heads = lambda p, x: {
        name: jnp.tensordot(x.reshape(5, *p[name].shape[1:]), p[name], (axes[name], axes[name]))
        for name in tables
    }
    scheme = sq.Scheme(weight=oracle.with_granularity(sq.Int8(), weights))
    qparams = quantize(heads, tables, normal(5, 8), scheme=scheme)
    fn = lambda p, ids: {
        (name, how): take(p[name], ids) for name in tables for how, take in TAKES.items()
    }
    ids = jnp.asarray([[0, 5, 3], [-1, 6, -100], [1000, -6, -7]])
    expected = fn({name: sq.dequantize(w.tensor) for name, w in qparams.items()}, ids)
    got, exact = jax.jit(sq.quantized(fn))(qparams, ids), fn(tables, ids)
    for case, rows in expected.items():
        assert np.isnan(rows).any() == (case[1] in ("default", "at"))
        np.testing.assert_array_equal(got[case], rows)
        assert not np.array_equal(rows, exact[case])


@pytest.mark.slow
def test_rows_with_scales_of_their_own_parts():
    """A table quantized along its last axis only has several scales a row."""
    table = normal(6, 2, 4)
    fn = lambda p, ids: p["table"][ids]
    weight = replace(
        quantize(lambda p, x: x @ p["table"], {"table": normal(4, 2)}, normal(3, 4))["table"],
        tensor=sq.QTensor.quantize(table, (2,)),
    )
    got = sq.quantized(fn)({"table": weight}, jnp.asarray([4, 1]))
    np.testing.assert_array_equal(got, sq.dequantize(weight.tensor)[jnp.asarray([4, 1])])


@pytest.mark.slow
def test_rows_of_a_cast_table_are_refused():
    fn = lambda p, ids: p["table"][ids]
    weight = quantize(lambda p, x: x @ p["table"].T, {"table": normal(6, 4)}, normal(3, 4))
    cast = jax.tree.map(lambda a: a.astype(jnp.float32), weight)
    with pytest.raises(ValueError, match="table: not a valid QTensor"):
        sq.quantized(fn)(cast, jnp.asarray([1]))


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_fills_rows_out_of_range_is_not_divided_by_a_smoothing():
    fn = lambda p, ids: jnp.tanh(p["embed"][ids]) @ p["embed"].T
    look = lambda p, ids: jnp.take(p["embed"], ids, axis=0, mode="fill", fill_value=3.0)
    params, ids = {"embed": normal(20, 12)}, jnp.array([[0, 1, 3]])
    qparams = quantize(fn, params, ids, scheme=sq.W8A8.replace(smoothing=0.5))
    with pytest.raises(ValueError, match="embed: quantized, but `gather`"):
        sq.quantized(look)(qparams, jnp.array([25]))
    filled = sq.quantized(look)(quantize(fn, params, ids, scheme=sq.W8A8), jnp.array([25]))
    np.testing.assert_array_equal(filled, np.full((1, 12), 3.0))


@pytest.mark.slow
def test_smoothing_at_run_time_leaves_tables_alone():
    fn = lambda p, ids: jax.nn.gelu(p["embed"][ids]) @ p["w"]
    params, ids = {"embed": normal(10, 8), "w": normal(8, 4, seed=1)}, jnp.arange(5)
    qparams = sq.smoothquant(
        fn, params, [ids], scheme={"embed": sq.EMBEDDING_INT8, "w": sq.W8A8}, runtime=0.5
    )
    assert qparams["embed"].smoothing is None
    assert qparams["w"].smoothing.shape == (8,)
    assert 0 < relative_error(sq.quantized(fn)(qparams, ids), fn(params, ids)) < 0.03


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(23, 16, name="embed")
        return embed.attend(nn.LayerNorm()(embed(ids)))


@pytest.mark.parametrize(
    "weights", ["per_channel", pytest.param("per_tensor", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_tied_embeddings_are_gathered_and_multiplied_as_int8(weights):
    ids = jnp.asarray([[0, 5, 22], [7, 7, 1]])
    params = Tied().init(jax.random.key(0), ids)["params"]
    fn = lambda params, ids: Tied().apply({"params": params}, ids)
    scheme = sq.Scheme(weight=oracle.with_granularity(sq.Int8(), weights))
    qparams = quantize(fn, params, ids, scheme=scheme)
    got = jax.jit(sq.quantized(fn))(qparams, ids)
    assert 1e-4 < relative_error(got, fn(params, ids)) < 0.06
    program = jaxprs.of(sq.quantized(fn), qparams, ids)
    assert [dot.dtypes for dot in jaxprs.dots(program)] == [jaxprs.INT8_DOT]
    assert jaxprs.largest_float(program) < 23 * 16
    gathered = [e for e in jaxprs.equations(program) if e.primitive.name == "gather"]
    assert "int8" in {e.outvars[0].aval.dtype.name for e in gathered}
