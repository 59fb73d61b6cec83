"""Our classes in the files of others: `jax.export` and `flax.serialization`."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import sqjax as sq
from sqjax.models import CacheFormat, LlamaConfig, Model


def fn(p, x):
    return (x * p["norm"][None]) @ p["w"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


@functools.cache
def params():
    return {"norm": jnp.ones(32), "w": normal(32, 8)}


@functools.cache
def stats():
    return sq.calibrate(fn, params(), [normal(4, 32)], histogram=True)


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


SCHEMES = {
    "O3": sq.W8A8_O3.replace(smoothing=0.5),
    "outliers": sq.W8A8_OUTLIERS.replace(outliers=1.5),
    "W4A16": sq.W4A16_G64,
    "W4A8": sq.W4A8,
    "FP8": sq.FP8,
    "W4A4_ROTATED": sq.W4A4_ROTATED,
}


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.slow
def test_flax_writes_and_restores_a_quantized_tree(scheme):
    qparams = sq.quantize(params(), stats(), SCHEMES[scheme])
    blank = jax.tree.map(jnp.zeros_like, qparams)
    written = flax.serialization.to_bytes(qparams)
    same(flax.serialization.from_bytes(blank, written), qparams)


def test_flax_writes_and_restores_statistics():
    blank = jax.tree.map(jnp.zeros_like, stats())
    same(flax.serialization.from_bytes(blank, flax.serialization.to_bytes(stats())), stats())


def test_export_takes_statistics():
    """`quantize` itself as an exported function: parameters and statistics in, a quantized tree out."""
    run = jax.jit(lambda p, s: sq.quantize(p, s, "W8A8_O3"))
    program = export.export(run)(params(), stats())
    read = export.deserialize(program.serialize())
    same(read.call(params(), stats()), run(params(), stats()))


@pytest.mark.parametrize("cache", ["int8", "float"])
@pytest.mark.slow
def test_a_decoder_is_exported_with_its_cache(cache):
    model = Model(LlamaConfig(16, 8, 16, 1, 2, 1, 16))
    weights = jax.jit(model.init)(jax.random.key(0))
    empty = model.init_cache(1, 8, kind=cache)
    run = jax.jit(model.decode)
    ids = jnp.array([[1, 2]])
    program = export.deserialize(export.export(run)(weights, ids, empty).serialize())
    logits, filled = program.call(weights, ids, empty)
    expected, expected_cache = run(weights, ids, empty)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    same(filled, expected_cache)
    assert filled.keys[0].format == CacheFormat(cache) or cache == "float"
    blank = jax.tree.map(jnp.zeros_like, filled)
    restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(filled))
    same(restored, filled)
