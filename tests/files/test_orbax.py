"""Orbax writes and restores our trees: a plain one without help, a quantized one into its shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq

ocp = pytest.importorskip("orbax.checkpoint")


def saved(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restored(path, *shapes):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *shapes)


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)

    def equal(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(equal, got, expected)


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_a_plain_tree(tmp_path):
    tree = {"layers": {"0": {"kernel": jnp.ones((4, 3)), "bias": jnp.arange(3.0)}}}
    saved(tmp_path / "x", tree)
    same(restored(tmp_path / "x", shapes_of(tree)), tree)
    same(restored(tmp_path / "x"), tree)


SCHEMES = {
    "int8": sq.W8A8.replace(smoothing=0.5),
    "static": sq.W8A8_O3,
    "outliers": sq.W8A8.replace(outliers=1.0),
    "int4": sq.W4A16.replace(weight=sq.Int4(group_size=8, zero_point=True)),
    "levels": sq.W4A8.replace(weight=sq.Int4(group_size=8, zero_point=True, two_level=True)),
    "float8": sq.FP8,
}


@pytest.mark.slow
def test_a_quantized_tree(tmp_path):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(16, 3)), jnp.float32) for name in SCHEMES}
    x = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)

    def fn(params, x):
        return [x @ w for w in params.values()]

    stats = sq.calibrate(fn, params, [x])
    qparams = sq.quantize(params, stats, dict(SCHEMES))
    saved(tmp_path / "x", qparams)
    same(restored(tmp_path / "x", shapes_of(qparams)), qparams)
