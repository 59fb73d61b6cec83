"""Layers in a scan: one scale vector a layer, the same numbers as the layers written out, int8 in
the scan's body.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from slow import slow_but

import sqjax as sq
from sqjax._trees import named_leaves
from sqjax.folding.find_graph import find_graph
from sqjax.folding.groups import Survey
from sqjax.program.facts import Program
from sqjax.program.trace import trace

LAYERS, WIDTH, HIDDEN = 3, 4, 6
SCHEMES = {
    "O1": sq.W8A8_O1,
    "O2": sq.W8A8_O2,
    "O3": sq.W8A8_O3,
    "per_tensor": sq.Scheme(weight=sq.Int8(per_tensor=True), activation=sq.Static()),
}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def rms(x):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def layer(x, p):
    """A gain, two matmuls and a residual."""
    return x + 0.5 * jax.nn.relu((rms(x) * p["gain"][None]) @ p["up"]) @ p["down"]


def layers_of(*lead):
    return {
        "gain": 2 + normal(*lead, WIDTH),
        "up": normal(*lead, WIDTH, HIDDEN),
        "down": normal(*lead, HIDDEN, WIDTH, seed=1),
    }


STACKED = layers_of(LAYERS)
X = normal(5, WIDTH)
BATCHES = [normal(n, WIDTH, seed=n) * jnp.array([[1.0, 8.0, 0.2, 1.0]]) for n in (5, 3)]


def jittered(tree):
    """Every leaf random: ones and zeros would hide what happens to gains and biases."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), tree)


def at(tree, *index):
    return jax.tree.map(lambda a: a[index], tree)


def scanned(p, x):
    return lax.scan(lambda x, q: (layer(x, q), None), x, p)[0]


def written_out(p, x):
    for name in sorted(p):
        x = layer(x, p[name])
    return x


APART = {f"layer{i}": at(STACKED, i) for i in range(LAYERS)}


@functools.cache
def calibrated():
    """(statistics of the scanned net, of the same net written out)."""
    return sq.calibrate(scanned, STACKED, BATCHES), sq.calibrate(written_out, APART, BATCHES)


def graph(fn, params, *args):
    """Searched, not yet proved: what is refused needs no compilation."""
    return find_graph(Survey.of(Program(trace(fn, params, args or (X,), {})[0]), {}))


def groups(found):
    return {(g.size, g.absorbers, tuple(path for path, _ in g.sites)) for g in found.groups}


def leaves(tree):
    return dict(zip(*named_leaves(tree)[:2], strict=True))


# The same numbers as written out ------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["absmax", "abs_sum", "weight_absmax", "count"])
@pytest.mark.slow
def test_statistics_of_every_layer_are_those_of_the_layers_written_out(statistic):
    stacked, apart = (getattr(stats, statistic) for stats in calibrated())
    assert set(stacked) == {"up", "down"}
    for path, found in stacked.items():
        for i in range(LAYERS):
            mine = found if statistic == "count" else found[i]
            np.testing.assert_allclose(mine, apart[f"layer{i}/{path}"], rtol=1e-6)
    assert statistic == "count" or not np.allclose(stacked["up"][0], stacked["up"][1])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.slow
def test_scales_of_every_layer_are_those_of_the_layers_written_out(alpha):
    (stats, apart) = calibrated()
    s, of_layer = sq.scales(STACKED, stats, alpha), sq.scales(APART, apart, alpha)
    assert {name: x.shape for name, x in s.items()} == {
        "up": (LAYERS * WIDTH,),
        "down": (LAYERS * HIDDEN,),
    }
    for path, found in s.items():
        expected = np.stack([of_layer[f"layer{i}/{path}"] for i in range(LAYERS)])
        np.testing.assert_allclose(found.reshape(LAYERS, -1), expected, rtol=1e-5)
    smoothed, expected = sq.smooth(STACKED, stats, alpha), sq.smooth(APART, apart, alpha)
    for i in range(LAYERS):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            at(smoothed, i),
            expected[f"layer{i}"],
        )
    assert not np.allclose(smoothed["gain"], STACKED["gain"])


@pytest.mark.parametrize(
    ("scheme", "smooth"),
    slow_but(
        {f"{s}-{smooth}": (s, smooth) for s in SCHEMES for smooth in (False, True)}, "O3-True"
    ),
)
@pytest.mark.slow
@pytest.mark.every_case
def test_int8_in_a_scan_is_int8_written_out(scheme, smooth):
    results = []
    for fn, params, stats in zip(
        (scanned, written_out), (STACKED, APART), calibrated(), strict=True
    ):
        if smooth:  # powers of two, so that the two trees are the same to the bit
            s = sq.scales(params, stats, round_scales="pow2")
            params, stats = sq.fold(params, stats.graph, s), sq.fold_stats(stats, s)
        qparams = sq.quantize(params, stats, SCHEMES[scheme])
        results.append((qparams, jax.jit(sq.quantized(fn))(qparams, BATCHES[0])))
    (qscan, got), (qapart, expected) = results
    for path in ("up", "down"):
        for i in range(LAYERS):
            np.testing.assert_array_equal(
                qscan[path].tensor.values[i], qapart[f"layer{i}"][path].tensor.values
            )
            np.testing.assert_array_equal(
                qscan[path].tensor.scale[i], qapart[f"layer{i}"][path].tensor.scale
            )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    exact = scanned(STACKED, BATCHES[0])
    assert 1e-4 < np.abs(got - exact).max() / np.abs(exact).max() < 0.1


@pytest.mark.slow
def test_static_scales_are_one_a_layer():
    stats, _ = calibrated()
    qparams = sq.quantize(STACKED, stats, sq.W8A8_O3)
    for path in ("up", "down"):
        expected = np.asarray(stats.absmax[path]).max(1) / np.float32(127)
        np.testing.assert_allclose(qparams[path].input_scale, expected, rtol=1e-6)
        assert len(set(expected.tolist())) == LAYERS


@pytest.mark.slow
def test_the_matmuls_in_the_body_of_the_scan_are_int8():
    stats, _ = calibrated()
    for scheme in SCHEMES.values():
        program = jaxprs.of(sq.quantized(scanned), sq.quantize(STACKED, stats, scheme), X)
        scans = [e for e in jaxprs.equations(program) if e.primitive.name == "scan"]
        assert len(scans) == 1
        assert scans[0].params["length"] == LAYERS
        assert [d.dtypes for d in jaxprs.dots(scans[0].params["jaxpr"])] == [jaxprs.INT8_DOT] * 2
        assert len(jaxprs.dots(program)) == 2
        assert (
            jaxprs.largest_float(program) < LAYERS * WIDTH * HIDDEN
        )  # no float copy of a stacked weight


@pytest.mark.slow
def test_jit_equals_eager():
    stats, _ = calibrated()
    qparams = sq.quantize(STACKED, stats)
    eager = sq.quantized(scanned)(qparams, X)
    np.testing.assert_allclose(
        jax.jit(sq.quantized(scanned))(qparams, X), eager, rtol=1e-2, atol=1e-2
    )
    assert not np.allclose(eager, scanned(STACKED, X), rtol=1e-6)


@pytest.mark.slow
def test_layers_of_one_stack_indexed_one_by_one_are_the_scanned_ones():
    """No scan, but the same statistics, the same scales and the same int8 as the scanned form."""

    def fn(p, x):
        for i in range(LAYERS):
            x = layer(x, jax.tree.map(lambda a, i=i: lax.index_in_dim(a, i, 0, keepdims=False), p))
        return x

    stats, (scan, _) = sq.calibrate(fn, STACKED, BATCHES), calibrated()
    assert len(stats.graph.groups) == 2 * LAYERS
    for path in ("up", "down"):
        np.testing.assert_allclose(stats.absmax[path], scan.absmax[path], rtol=1e-6)
        np.testing.assert_allclose(stats.abs_sum[path], scan.abs_sum[path], rtol=1e-5)
        assert int(stats.count[path]) == int(scan.count[path])
    one_by_one, at_once = sq.smooth(STACKED, stats), sq.smooth(STACKED, scan)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one_by_one, at_once)
    assert not np.allclose(one_by_one["up"], STACKED["up"], rtol=1e-2)
    got = jax.jit(sq.quantized(fn))(sq.quantize(STACKED, stats), X)
    expected = jax.jit(sq.quantized(scanned))(sq.quantize(STACKED, scan), X)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# Programs and their groups ------------------------------------------------------------------------


class Case(NamedTuple):
    """A function, its parameters, its groups: (number of scales, absorbing leaves, sites); the
    number of sites.
    """

    fn: Any
    params: Any
    groups: set
    sites: int = 2


BOTH = {
    (LAYERS * WIDTH, ("gain",), ("up",)),
    (LAYERS * HIDDEN, ("up",), ("down",)),
}
SHARED = {
    (WIDTH, ("gain",), ("up",)),
    (HIDDEN, ("up",), ("down",)),
}  # one scale vector for all layers


def plain():
    return Case(scanned, STACKED, BOTH)


def backwards_and_unrolled():
    fn = lambda p, x: lax.scan(lambda x, q: (layer(x, q), x.sum()), x, p, reverse=True, unroll=2)
    return Case(fn, STACKED, BOTH)


def rematerialised():
    step = jax.checkpoint(lambda x, q: (layer(x, q), None))
    return Case(lambda p, x: lax.scan(step, x, p)[0], STACKED, BOTH)


def in_a_jit():
    return Case(lambda p, x: jax.jit(scanned)(p, x), STACKED, BOTH)


def nested():
    groups = {(2 * LAYERS * WIDTH, ("gain",), ("up",)), (2 * LAYERS * HIDDEN, ("up",), ("down",))}
    fn = lambda p, x: lax.scan(lambda x, q: lax.scan(lambda x, r: (layer(x, r), None), x, q), x, p)[
        0
    ]
    return Case(fn, layers_of(2, LAYERS), groups)


def nested_inside_out():
    """The outer scan runs over the leaves' second axis."""
    case = nested()
    swapped = lambda p, x: case.fn(jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), p), x)
    return case._replace(fn=swapped, params=layers_of(LAYERS, 2))


def transposed_and_cast():
    """Stacks along the last axis; moved, and cast back and forth, before the scan runs over
    them.
    """

    def fn(p, x):
        stacks = {
            "gain": p["gain"].T.astype(jnp.bfloat16).astype(jnp.float32),
            "up": jnp.moveaxis(p["up"], 2, 0),
            "down": p["down"].transpose(2, 1, 0),
        }
        return scanned(stacks, x)

    shapes = {
        "gain": (WIDTH, LAYERS),
        "up": (WIDTH, HIDDEN, LAYERS),
        "down": (WIDTH, HIDDEN, LAYERS),
    }
    return Case(fn, {name: normal(*shape) for name, shape in shapes.items()}, BOTH)


def transposed_inside():
    step = lambda x, q: (layer(x, {**q, "up": q["up"].T}), None)
    params = {**STACKED, "up": jnp.swapaxes(STACKED["up"], 1, 2)}
    return Case(lambda p, x: lax.scan(step, x, p)[0], params, BOTH)


def offset_gains():
    """Gemma's 1 + w, in every layer."""
    step = lambda x, q: (layer(x, {**q, "gain": 1 + q["gain"]}), None)
    coarse = jnp.round(STACKED["gain"] * 256) / 256
    return Case(lambda p, x: lax.scan(step, x, p)[0], {**STACKED, "gain": coarse}, BOTH)


def shared_by_all_layers():
    """Constants of the scan are sites, of every step; what absorbs would have to be shared out
    too.
    """
    fn = lambda p, x: lax.scan(lambda x, _: (layer(x, p), None), x, None, length=2)[0]
    return Case(fn, at(STACKED, 0), SHARED)


def shared_weight_own_gains():
    fn = lambda p, x: lax.scan(lambda x, g: (layer(x, {**p, "gain": g}), None), x, p["gain"])[0]
    return Case(fn, {**at(STACKED, 0), "gain": STACKED["gain"]}, SHARED)


def own_weights_shared_gain():
    step = lambda p: lambda x, q: (layer(x, {**q, "gain": p["gain"]}), None)
    fn = lambda p, x: lax.scan(step(p), x, {n: p[n] for n in ("up", "down")})[0]
    groups = {(WIDTH, ("gain",), ("up",)), (LAYERS * HIDDEN, ("up",), ("down",))}
    return Case(fn, {**STACKED, "gain": STACKED["gain"][0]}, groups)


def an_inner_loop_over_one_layer():
    """Every layer runs twice: its leaves are constants of the inner scan."""
    twice = lambda x, q: (lax.scan(lambda x, _: (layer(x, q), None), x, None, length=2)[0], None)
    return Case(lambda p, x: lax.scan(twice, x, p)[0], STACKED, BOTH)


def the_whole_stack_twice():
    fn = lambda p, x: lax.scan(lambda x, _: (scanned(p, x), None), x, None, length=2)[0]
    return Case(fn, STACKED, BOTH)


def an_activation_from_outside():
    """Every layer reads the same normed input, as a decoder's layers read the encoder's output."""

    def fn(p, x):
        h = rms(x) * p["gain"][None]
        return lax.scan(lambda c, w: (c + jnp.tanh(h @ w), None), x, p["w"])[0]

    return Case(
        fn,
        {"gain": 2 + normal(WIDTH), "w": normal(LAYERS, WIDTH, WIDTH)},
        {(WIDTH, ("gain",), ("w",))},
        1,
    )


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.relu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(WIDTH, name="down")(h), None


def linen(axis, body=Layer):
    stack = nn.scan(
        body, variable_axes={"params": axis}, split_rngs={"params": True}, length=LAYERS
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="head")(
                nn.LayerNorm(name="last")(stack(name="layers")(x, None)[0])
            )

    net = Net()
    params = jittered(jax.jit(net.init)(jax.random.key(0), X)["params"])
    groups = {
        (LAYERS * WIDTH, ("layers/norm/bias", "layers/norm/scale"), ("layers/up/kernel",)),
        (LAYERS * HIDDEN, ("layers/up/bias", "layers/up/kernel"), ("layers/down/kernel",)),
        (WIDTH, ("last/bias", "last/scale"), ("head/kernel",)),
    }
    return Case(lambda p, x: net.apply({"params": p}, x), params, groups, 3)


def linen_axis_0():
    return linen(0)


def linen_axis_1():
    return linen(1)


def linen_remat():
    return linen(0, nn.remat(Layer))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(WIDTH, HIDDEN, rngs=rngs),
            nnx.Linear(HIDDEN, WIDTH, rngs=rngs),
        )

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


def nnx_scan():
    create = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block, in_axes=(0,), out_axes=0))
    graphdef, state = nnx.split(create(nnx.Rngs(0)))
    forward = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    groups = {
        (LAYERS * WIDTH, ("norm/scale/value",), ("up/kernel/value",)),
        (LAYERS * HIDDEN, ("up/bias/value", "up/kernel/value"), ("down/kernel/value",)),
    }
    return Case(lambda state, x: forward(x, nnx.merge(graphdef, state)), jittered(state), groups)


CASES = [
    plain,
    backwards_and_unrolled,
    rematerialised,
    in_a_jit,
    nested,
    nested_inside_out,
    transposed_and_cast,
    transposed_inside,
    offset_gains,
    shared_by_all_layers,
    shared_weight_own_gains,
    own_weights_shared_gain,
    an_inner_loop_over_one_layer,
    the_whole_stack_twice,
    an_activation_from_outside,
    linen_axis_0,
    linen_axis_1,
    linen_remat,
    nnx_scan,
]


@functools.cache
def found(build):
    case = build()
    return case, sq.calibrate(case.fn, case.params, [X])


@pytest.mark.parametrize("build", slow_but(CASES, plain, offset_gains))
def test_groups_are_those_written_by_hand(build):
    case, stats = found(build)
    got = {
        (g.size, tuple(sorted(g.absorbers)), tuple(sorted(p for p, _ in g.sites)))
        for g in stats.graph.groups
    }
    assert got == case.groups
    assert len(stats.graph.sites) == case.sites


@pytest.mark.parametrize(
    "build",
    slow_but(CASES, plain, transposed_and_cast, offset_gains),
)
@pytest.mark.slow
def test_powers_of_two_change_no_bit_and_any_scale_only_rounding(build):
    """Other scales at every layer, so that layers that were mixed up would show."""
    case, stats = found(build)
    run = jax.jit(
        lambda params, s, x: (folded := sq.fold(params, stats.graph, s), case.fn(folded, x))
    )
    rng, draws = np.random.default_rng(0), []
    for draw in (
        np.ones,
        lambda n: 2.0 ** rng.integers(-3, 4, n),
        lambda n: rng.uniform(0.4, 2.5, n),
    ):
        draws.append({g.name: jnp.asarray(draw(g.size), jnp.float32) for g in stats.graph.groups})
    results = [run(case.params, s, X) for s in draws]
    before, after = leaves(case.params), leaves(results[1][0])
    for path in {path for g in stats.graph.groups for path, _ in g.leaves}:
        assert not np.array_equal(before[path], after[path]), path
    expected, exact, rounded = (jax.tree.leaves(out) for _, out in results)
    for a, b, c in zip(expected, exact, rounded, strict=True):
        np.testing.assert_array_equal(a, b)
        coarse = 2e-2 if build is transposed_and_cast else 2e-5  # that one casts to bfloat16 itself
        assert np.abs(a - c).max() <= coarse * np.abs(a).max()


@pytest.mark.parametrize("scheme", slow_but(["O1", "O3"], "O3"))
@pytest.mark.parametrize("build", slow_but(CASES, the_whole_stack_twice))
@pytest.mark.slow
def test_every_site_runs_in_int8(build, scheme):
    case, stats = found(build)
    qparams = sq.quantize(case.params, stats, SCHEMES[scheme])
    expected, got = case.fn(case.params, X), jax.jit(sq.quantized(case.fn))(qparams, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert 1e-5 < np.abs(a - b).max() / np.abs(b).max() < 0.1
    dots = [d.dtypes for d in jaxprs.dots(jaxprs.of(sq.quantized(case.fn), qparams, X))]
    assert dots == [jaxprs.INT8_DOT] * case.sites


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.slow
@pytest.mark.every_case
def test_linen_stacks_along_either_axis_are_the_same_layers(axis):
    """variable_axes only says where the layers lie: the statistics have them first."""
    case, stats = found(linen_axis_1 if axis else linen_axis_0)
    kernel = case.params["layers"]["up"]["kernel"]
    assert kernel.shape[axis] == LAYERS
    (site,) = (s for s in stats.graph.sites if s.path == "layers/up/kernel")
    assert (site.batch, site.axes, site.channels) == ((axis,), (1 - axis,), (LAYERS, WIDTH))
    apart = {"norm": case.params["layers"]["norm"], "up": case.params["layers"]["up"]}
    first = jax.tree.map(lambda a: jnp.moveaxis(a, axis if a.ndim > 1 else 0, 0)[0], apart)
    h = nn.LayerNorm().apply({"params": first["norm"]}, X)
    np.testing.assert_allclose(stats.absmax["layers/up/kernel"][0], np.abs(h).max(0), rtol=1e-5)
    np.testing.assert_allclose(
        stats.weight_absmax["layers/up/kernel"][0], np.abs(first["up"]["kernel"]).max(1)
    )


@pytest.mark.slow
def test_steps_that_share_a_leaf_are_counted_together():
    """A leaf that is a constant of the scan sees all steps: maxima over them, sums, and all their
    tokens.
    """
    case, stats = found(shared_by_all_layers)
    first = rms(X) * case.params["gain"][None]
    second = rms(layer(X, case.params)) * case.params["gain"][None]
    both = np.abs(np.concatenate([first, second]))
    np.testing.assert_allclose(stats.absmax["up"], both.max(0), rtol=1e-5)
    np.testing.assert_allclose(stats.abs_sum["up"], both.sum(0), rtol=1e-5)
    assert int(stats.count["up"]) == 2 * len(X)


# Leaves that more than one layer reads ------------------------------------------------------------


def test_a_gain_read_outside_the_scan_too_is_refused():
    got = graph(lambda p, x: scanned(p, x) + p["gain"].sum(), STACKED)
    assert groups(got) == {(LAYERS * HIDDEN, ("up",), ("down",))}
    assert "gain is read outside this scan too" in dict(got.refused)["up"]


def test_a_weight_read_outside_the_scan_too_is_refused():
    """Both as a site of another shape, and as anything else."""
    got = graph(lambda p, x: (scanned(p, x), x @ p["up"][0]), STACKED)
    assert not got.groups
    assert "reads its layers in another way" in dict(got.refused)["up"]
    assert "up is read outside this scan too" in dict(got.refused)["down"]
    got = graph(lambda p, x: (scanned(p, x), p["down"][0]), STACKED)
    assert groups(got) == {(LAYERS * WIDTH, ("gain",), ("up",))}
    assert dict(got.refused)["down"] == "it is an output of fn too: it stays float"


@pytest.mark.slow
def test_two_scans_over_one_stack_share_its_slices():
    """A prefill and a step over the same layers: the same scales serve both."""
    params = {**STACKED, "first": normal(WIDTH, WIDTH)}
    got = graph(lambda p, x: scanned(at_layers(p), scanned(at_layers(p), x @ p["first"])), params)
    assert groups(got) == BOTH
    both = [
        lambda p, x: scanned(at_layers(p), x),
        lambda p, x: scanned(at_layers(p), jnp.tanh(x) @ p["first"]),
    ]
    stats = sq.calibrate(both, params, [[X], [X[:2]]])
    assert groups(stats.graph) == BOTH
    for fn in both:
        assert sq.verify(fn, params, sq.smooth(params, stats), X) < 1e-5
    alone = [sq.calibrate(fn, params, [x]) for fn, x in zip(both, (X, X[:2]), strict=True)]
    np.testing.assert_array_equal(
        stats.absmax["up"], np.maximum(alone[0].absmax["up"], alone[1].absmax["up"])
    )


def test_two_scans_that_run_over_a_stack_in_different_ways_are_refused():
    def fn(p, x):
        backwards = jax.tree.map(lambda a: a[::-1], at_layers(p))
        return scanned(backwards, scanned(at_layers(p), x))

    got = graph(fn, STACKED)
    assert not got.groups


def at_layers(p):
    return {name: p[name] for name in ("gain", "up", "down")}


@pytest.mark.parametrize("twice", ["up", "gain"])
def test_the_same_leaf_as_two_of_a_scans_inputs_is_one_leaf(twice):
    """The second reader, a sum, refuses."""

    def step(x, both):
        q, again = both
        return layer(x, q) + 0.1 * jnp.tanh(x.sum() * again.sum()), None

    got = graph(lambda p, x: lax.scan(step, x, (p, p[twice]))[0], STACKED)
    assert "`reduce_sum` at" in dict(got.refused)["up"]
    assert not any(twice in dict(g.leaves) for g in got.groups)


def test_a_leaf_read_as_a_constant_of_its_own_scan_is_refused():
    step = lambda p: lambda x, q: (layer(x, q) + p["gain"].sum(), None)
    got = graph(lambda p, x: lax.scan(step(p), x, p)[0], STACKED)
    assert groups(got) == {(LAYERS * HIDDEN, ("up",), ("down",))}


def test_a_leaf_that_a_step_hands_out_is_refused():
    got = graph(lambda p, x: lax.scan(lambda x, q: (layer(x, q), q["gain"]), x, p), STACKED)
    assert groups(got) == {(LAYERS * HIDDEN, ("up",), ("down",))}
    assert "gain is read outside this scan too" in dict(got.refused)["up"]


PARTS = {
    "reshaped": (
        lambda p: jax.tree.map(lambda a: a.reshape(2 * LAYERS, *a.shape[2:]), p),
        layers_of(2, LAYERS),
    ),
    "sliced": (lambda p: jax.tree.map(lambda a: a[1:], p), STACKED),
    "put together": (
        lambda p: jax.tree.map(lambda *a: jnp.stack(a), p["first"], p["second"]),
        {"first": at(STACKED, 0), "second": at(STACKED, 1)},
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_stacks_made_of_leaves_stay_float_and_are_reported(name):
    stack, params = PARTS[name]
    params = {"layers": params, "first": normal(WIDTH, WIDTH)}
    got = graph(lambda p, x: scanned(stack(p["layers"]), x @ p["first"]), params)
    assert [site.path for site in got.sites] == ["first"]
    reported = {path.split("/")[-1] for path, reason in got.refused if "makes of " in reason}
    assert reported == {"up", "down"}


# While and cond -----------------------------------------------------------------------------------


def looped(p, x):
    return lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x)
    )[1]


def branched(p, x):
    return lax.cond(x[0, 0] > 100, lambda y: y, lambda y: jnp.tanh(y @ p["w"]) @ p["v"], x)


def in_turn(p, x):
    """What the two above compute, in a line."""
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]), jnp.tanh(x @ p["w"]) @ p["v"]


SQUARES = {"w": normal(WIDTH, WIDTH), "v": normal(WIDTH, WIDTH, seed=1)}


@pytest.mark.parametrize("scheme", ["O1", "O3"])
@pytest.mark.slow
def test_quantized_leaves_go_through_while_and_cond(scheme):
    stats = sq.calibrate(in_turn, SQUARES, [X])
    qparams = sq.quantize(SQUARES, stats, SCHEMES[scheme])
    expected = jax.jit(sq.quantized(in_turn))(qparams, X)
    for fn, result, count in zip((looped, branched), expected, (1, 2), strict=True):
        got = jax.jit(sq.quantized(fn))(qparams, X)
        np.testing.assert_allclose(got, result, rtol=1e-5, atol=1e-6)
        assert np.abs(got - fn(SQUARES, X)).max() > 1e-4
        dots = [d.dtypes for d in jaxprs.dots(jaxprs.of(sq.quantized(fn), qparams, X))]
        assert dots == [jaxprs.INT8_DOT] * count


@pytest.mark.slow
def test_a_quantized_leaf_that_is_no_stack_is_refused_by_a_scan_over_it():
    square = {"w": normal(WIDTH, WIDTH)}
    qparams = sq.quantize(square, sq.calibrate(lambda p, x: x @ p["w"].T, square, [X]))
    fine = lambda p, x: lax.scan(lambda c, row: (c, x @ row), 0.0, p["w"])[1]
    np.testing.assert_allclose(
        sq.quantized(fine)(qparams, X).T,
        sq.quantized(lambda p, x: x @ p["w"].T)(qparams, X),
        rtol=1e-5,
        atol=1e-6,
    )
    columns = lambda p, x: lax.scan(lambda c, column: (c + column.sum(), None), 0.0, p["w"].T)[0]
    with pytest.raises(ValueError, match=r"^w: quantized, but `scan` at \S*test_scan\.py:\d+"):
        sq.quantized(columns)(qparams, X)
