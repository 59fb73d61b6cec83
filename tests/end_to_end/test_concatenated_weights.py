"""Weights that the function concatenates itself: each is a site, folds, and runs in its own scheme."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import linen as nn
from traced import normal

import sqjax as sq

X = normal(6, 16).at[:, 3].mul(30)
PARAMS = {
    "norm": 1 + normal(1, 16) / 9,
    "q": normal(16, 8),
    "k": normal(16, 4),
    "v": normal(16, 4),
}


def joined(p):
    return jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)


WAYS = {
    "on the right": lambda p, h: h @ joined(p),
    "cast": lambda p, h: (h.astype(jnp.bfloat16) @ joined(p).astype(jnp.bfloat16)).astype(h.dtype),
    "on the left": lambda p, h: (joined(p).T @ h.T).T,
    "stored as (out, in)": lambda p, h: jnp.einsum(
        "ti,oi->to", h, jnp.concatenate([p["q"].T, p["k"].T, p["v"].T])
    ),
    "in a batch": lambda p, h: jnp.einsum("bti,io->bto", h[None], joined(p))[0],
}


@pytest.mark.parametrize("case", WAYS)
@pytest.mark.slow
def test_each_of_them_is_a_site_and_runs_in_int8(case):
    def fn(p, x):
        return WAYS[case](p, x * p["norm"])

    stats = sq.calibrate(fn, PARAMS, [X])
    assert {site.path for site in stats.graph.sites} == {"q", "k", "v"}
    [group] = stats.graph.groups
    assert group.absorbers == ("norm",)
    for path in "qkv":
        np.testing.assert_allclose(stats.absmax[path], np.abs(X * PARAMS["norm"]).max(0), rtol=1e-2)
    smoothed = sq.smooth(PARAMS, stats, 0.5)
    qparams = sq.quantize(smoothed, stats, {"k": None, "q|v": sq.W8A8})
    run = sq.quantized(fn)
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, X))]
    assert dots.count(jaxprs.INT8_DOT) == 2
    assert len(dots) == 3
    expected = np.asarray(X * PARAMS["norm"], np.float64) @ np.asarray(joined(PARAMS), np.float64)
    got = jax.jit(run)(qparams, X)
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.slow
def test_pieces_that_are_leaves_stored_as_outputs_by_inputs():
    def fn(p, x):
        return jnp.einsum("ti,oi->to", x, jnp.concatenate([p["a"], p["b"]]))

    params = {"a": normal(3, 16), "b": normal(2, 16)}
    qparams = sq.quantize(params, sq.calibrate(fn, params, [X]))
    exact = np.asarray(fn(params, X))
    got = sq.quantized(fn)(qparams, X)
    assert 0 < np.abs(got - exact).max() < 0.03 * np.abs(exact).max()


def test_pieces_that_are_no_outputs_are_none():
    def fn(p, x):
        return x @ jnp.concatenate([p["a"], p["b"]])  # along the channels

    params = {"a": normal(8, 4), "b": normal(8, 4)}
    with pytest.raises(ValueError, match=r"a: `dot_general` .* multiplies what `concatenate` at"):
        sq.calibrate(fn, params, [X])


@pytest.mark.slow
def test_flax_lstm_cells():
    cell = nn.OptimizedLSTMCell(8)
    carry = normal(6, 8, seed=1), normal(6, 8, seed=2)
    params = jax.jit(cell.init)(jax.random.key(1), carry, X)["params"]

    def fn(p, x):
        return cell.apply({"params": p}, carry, x)[1]

    stats = sq.calibrate(fn, params, [X])
    kernels = {f"{side}{gate}/kernel" for side in "ih" for gate in "ifgo"}
    assert {site.path for site in stats.graph.sites} == kernels
    got = jax.jit(sq.quantized(fn))(sq.quantize(params, stats), X)
    assert 0 < np.abs(got - jax.jit(fn)(params, X)).max() < 0.05
