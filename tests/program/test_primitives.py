"""The table of identities: a weight behind any of them is calibrated, folded, quantized, and runs in int8."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sqjax as sq
from sqjax.program import primitives
from sqjax.program.facts import Program
from sqjax.program.trace import trace

MESH = Mesh(jax.devices()[:1], ("data",))
CHANNELS = 8


def barrier_beside(w, x):
    """A barrier of several operands: its second result is its second operand."""
    return lax.optimization_barrier((x, w, jnp.float32(2)))[1]


WAYS = {  # what a function may do to a weight before it multiplies with it
    "copy": lambda w, x: jnp.copy(w),
    "name": lambda w, x: checkpoint_name(w, "w"),
    "stop_gradient": lambda w, x: lax.stop_gradient(w),
    "sharding_constraint": lambda w, x: lax.with_sharding_constraint(
        w, NamedSharding(MESH, PartitionSpec())
    ),
    "layout_constraint": lambda w, x: with_layout_constraint(w, Layout((1, 0))),
    "barrier": lambda w, x: lax.optimization_barrier(w),
    "barrier beside an activation": barrier_beside,
    "barrier of a transposed weight": lambda w, x: lax.optimization_barrier((x, w.T))[1].T,
}


def fn(params, x):
    """Every weight behind an identity of its own; one norm before all of them."""
    h = x * params["norm"][None]
    return sum(h @ way(params[name], h) for name, way in WAYS.items())


def layers(params, x):
    """Barriers in the body of a scan, as rematerialised models have them."""

    def layer(x, own):
        norm, w, x = lax.optimization_barrier((own["norm"], own["w"], x))
        return jnp.tanh((x * norm[None]) @ w), None

    return lax.scan(layer, x, params)[0]


@pytest.fixture(scope="module")
def case():
    keys = iter(jax.random.split(jax.random.key(0), len(WAYS) + 2))
    params = {name: jax.random.normal(next(keys), (CHANNELS, CHANNELS)) for name in WAYS}
    params["norm"] = jnp.linspace(0.5, 20.0, CHANNELS)
    x = jax.random.normal(next(keys), (4, CHANNELS))
    return params, x, sq.calibrate(fn, params, [x])


@pytest.mark.slow
def test_a_weight_behind_an_identity_is_a_site_that_folds(case):
    params, x, stats = case
    assert {site.path for site in stats.graph.sites} == set(WAYS)
    [group] = stats.graph.groups
    assert dict(group.sites).keys() == set(WAYS)
    assert "norm" in group.absorbers
    smoothed = sq.smooth(params, stats, 0.5)
    assert not np.allclose(smoothed["norm"], params["norm"])
    sq.verify(fn, params, smoothed, x)


@pytest.mark.slow
def test_a_weight_behind_an_identity_runs_in_int8(case):
    params, x, stats = case
    qparams = sq.quantize(params, stats, sq.W8A8)
    program = jaxprs.of(sq.quantized(fn), qparams, x)
    assert [dot.dtypes for dot in jaxprs.dots(program)] == [("int8", "int8", "int32")] * len(WAYS)
    got, expected = jax.jit(sq.quantized(fn))(qparams, x), fn(params, x)
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.slow
def test_a_barrier_in_a_scan_keeps_every_layer_a_site():
    params = {"norm": jnp.ones((3, CHANNELS)), "w": jnp.stack([0.5 * jnp.eye(CHANNELS)] * 3)}
    x = jnp.linspace(-1, 1, 2 * CHANNELS).reshape(2, CHANNELS)
    stats = sq.calibrate(layers, params, [x])
    [group] = stats.graph.groups
    assert (group.absorbers, group.steps) == (("norm",), (3,))
    qparams = sq.quantize(params, stats, sq.W8A8)
    got = jax.jit(sq.quantized(layers))(qparams, x)
    np.testing.assert_allclose(got, layers(params, x), atol=0.02)


def test_a_barrier_passes_on_one_operand_each():
    """No result of a barrier is made of its other operands."""

    def barred(params, x):
        w, v, y, zeros = lax.optimization_barrier((params["w"], params["v"].T, x, jnp.zeros(3)))
        return w + 1, v, y, zeros

    params = {"v": jnp.ones((2, 3)), "w": jnp.ones((2, 3))}
    program = Program(trace(barred, params, (jnp.ones(4),), {})[0])
    [barrier] = [e for e in program.equations if e.name == "optimization_barrier"]
    w, v, y, _ = barrier.outputs
    assert (program.views[w].path, program.views[v].path) == ("w", "v")
    assert program.views[v].leaf_axes == (1, 0)
    assert program.from_leaves.intersection(barrier.outputs) == {w, v}
    assert y not in program.views
    assert [program.is_scale_free(result) for result in barrier.outputs] == [
        False,
        False,
        False,
        True,
    ]
    assert [program.leaves_behind(result) for result in (v, y)] == [{"v"}, set()]


def test_no_primitive_is_in_two_classes():
    classes = [
        primitives.COPIES,
        primitives.RESHARDINGS,
        primitives.MOVEMENTS,
        primitives.PICKS,
        primitives.ELEMENTWISE,
        primitives.COMPARISONS,
        primitives.REDUCTIONS,
        primitives.RUNNING,
    ]
    names = [name for kind in classes for name in kind]
    assert len(set(names)) == len(names)
