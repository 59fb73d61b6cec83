"""Calibration and the quantized run agree on what a program reads: dead code, what loops hand through."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import nnx
from traced import normal

import sqjax as sq
from sqjax.program.subprograms import handed_through

X, W = normal(8, 16), normal(16, 16) / 4
STACK = normal(3, 16, 16) / 4


def check(fn, params, sites):
    """Every matmul with a site runs in int8, and the result is near the float function's."""
    stats = sq.calibrate(fn, params, [X])
    assert {site.path for site in stats.graph.sites} == sites
    qparams, run = sq.quantize(params, stats), sq.quantized(fn)
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(run, qparams, X))]
    assert dots == [jaxprs.INT8_DOT] * len(dots)
    got, expected = jax.jit(run)(qparams, X), fn(params, X)
    assert 0 < np.abs(got - expected).max() < 0.1


# Dead code ----------------------------------------------------------------------------------------


def a_discarded_norm(p, x):
    jnp.linalg.norm(p["w"])
    return x @ p["w"]


def a_dead_output_of_a_call(p, x):
    y, _ = jax.jit(lambda p, x: (x @ p["w"], jnp.sum(p["w"] ** 2)))(p, x)
    return y


def a_dead_output_of_a_scan(p, x):
    def step(x, _):
        return jnp.tanh(x @ p["w"]), jnp.sum(p["w"] ** 2)

    return jax.lax.scan(step, x, None, length=2)[0]


@pytest.mark.parametrize("fn", [a_discarded_norm, a_dead_output_of_a_call, a_dead_output_of_a_scan])
@pytest.mark.slow
def test_dead_code_reads_nothing(fn):
    check(fn, {"w": W}, {"w"})


# What loops hand through --------------------------------------------------------------------------


def layer(w, x):
    return jax.checkpoint(lambda w, x: (w, jnp.tanh(x @ w)))(w, x)


def a_carry_of_a_scan(p, x):
    return jax.lax.scan(lambda c, _: (layer(*c), None), (p["w"], x), None, length=2)[0][1]


def slices_that_a_scan_gives_back(p, x):
    def step(x, w):
        w, x = layer(w, x)
        return x, w

    x, again = jax.lax.scan(step, x, p["stack"])
    return jax.lax.scan(lambda x, w: (x @ w, None), x, again)[0]


def a_while_loop(p, x):
    def step(carry):
        count, w, x = carry
        return (count + 1, *layer(w, x))

    start = jnp.max(jnp.abs(x)).astype(jnp.int32) * 0
    _, w, x = jax.lax.while_loop(lambda carry: carry[0] < 2, step, (start, p["w"], x))
    return x @ w


def both_branches(p, x):
    branches = [lambda w, x: (w, x), lambda w, x: (w, 2 * x)]
    w, x = jax.lax.switch((x[0, 0] > 0).astype(jnp.int32), branches, p["w"], x)
    return x @ w


@pytest.mark.parametrize(
    ("fn", "sites"),
    [
        (a_carry_of_a_scan, {"w"}),
        (slices_that_a_scan_gives_back, {"stack"}),
        (a_while_loop, {"w"}),
        (both_branches, {"w"}),
    ],
)
@pytest.mark.slow
def test_a_leaf_that_is_handed_through_stays_a_leaf(fn, sites):
    check(fn, {"w": W, "stack": STACK}, sites)


def test_handed_through_are_the_same_arrays_only():
    def program(a, b, c):
        same, other = jax.jit(lambda x, y: (x, y + 1))(a, b)
        _, kept = jax.lax.fori_loop(0, 2, lambda i, v: (v[0] + 1, v[1]), (b, c))
        return same, other, kept, a.T

    jaxpr = jax.make_jaxpr(program)(X, X, X)
    assert handed_through(jaxpr) == {0: 0, 2: 2}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


remat = nnx.remat(lambda block, x: block(x))


class Stacked(nnx.Module):
    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,), out_axes=0))
        self.blocks = make(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, block: remat(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.blocks)


class Looped(nnx.Module):
    def __init__(self, rngs):
        self.block = Block(rngs)

    def __call__(self, x):
        def step(i, carry):
            return carry[0], remat(*carry)

        return nnx.fori_loop(0, 2, step, (self.block, x))[1]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "stack"), [(Stacked, "blocks"), (Looped, "block")])
def test_nnx_loops_over_remat(module, stack):
    fn, params = sq.nnx.functional(module(nnx.Rngs(0)))
    stats = sq.calibrate(fn, params, [X])
    assert {group.absorbers for group in stats.graph.groups} == {
        (f"{stack}/norm/bias", f"{stack}/norm/scale"),
        (f"{stack}/up/bias", f"{stack}/up/kernel"),
    }
    got = jax.jit(sq.quantized(fn))(sq.quantize(params, stats), X)
    assert 0 < np.abs(got - fn(params, X)).max() < 0.2
