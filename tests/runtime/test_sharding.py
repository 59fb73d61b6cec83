"""Functions with shard_map inside, and sharded parameters: on four devices the same as on one."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but

import sqjax as sq
from sqjax.calibration.analysis import shared_arrays
from sqjax.folding.find_graph import find_graph
from sqjax.folding.groups import Survey
from sqjax.folding.heads import find_heads
from sqjax.folding.sites import find_sites
from sqjax.program.facts import Program
from sqjax.program.replication import varying
from sqjax.program.trace import trace
from sqjax.runtime.quantized import quantized
from sqjax.weights.quantize import quantize_weight


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2, devices=jax.devices("cpu")[:4])


def on_devices(fn, in_specs, out_specs=None, **options):
    out_specs = P() if out_specs is None else out_specs
    return jax.shard_map(fn, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, **options)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


class Case(NamedTuple):
    """A function with shard_map inside, the same without, their parameters and input, and the groups to be found.

    A group is (number of scales, steps and devices over which they are stacked, absorbing leaves, sites).
    """

    fn: Any
    plain: Any
    params: dict[str, Any]
    x: Any
    groups: list


def weights(*lead, **shapes):
    sizes = {"norm": (8,), "w1": (8, 16), "b1": (16,), "w2": (16, 8)} | shapes
    leaves = {name: normal(*lead, *shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}
    return {name: 1 + 0.3 * x if x.ndim == 1 + len(lead) else x / 3 for name, x in leaves.items()}


def outliers(*shape):
    return normal(*shape, seed=7) * jnp.exp(normal(*(1,) * (len(shape) - 1), shape[-1]))


def block(p, x, total=lambda y: y):
    """norm, then fc1, ReLU and fc2; `total` adds up the parts of the product."""
    g, b = (v.reshape((1,) * (x.ndim - 1) + v.shape) for v in (p["norm"], p["b1"]))
    return total(jax.nn.relu(jnp.dot(x * g, p["w1"]) + b) @ p["w2"])


MEGATRON = {"norm": P(), "w1": P(None, "model"), "b1": P("model"), "w2": P("model", None)}


def over(*names):
    return lambda y: lax.psum(y, names)


def megatron(check_vma=True):
    """Columns of fc1 and rows of fc2 on each device along "model"; tokens cut along "data"."""

    def fn(p, x):
        parts = lambda p, x: block(p, x, over("model"))
        return on_devices(parts, (MEGATRON, P("data")), P("data"), check_vma=check_vma)(p, x)

    groups = [(8, (), ["norm"], ["w1"]), (16, (2,), ["b1", "w1"], ["w2"])]
    return Case(fn, block, weights(), outliers(4, 8), groups)


def megatron_unchecked():
    return megatron(check_vma=False)


def two_mesh_axes():
    both = ("data", "model")
    specs = {"norm": P(), "w1": P(None, both), "b1": P(both), "w2": P(both)}
    fn = on_devices(lambda p, x: block(p, x, over(*both)), (specs, P()))
    groups = [(8, (), ["norm"], ["w1"]), (16, (2, 2), ["b1", "w1"], ["w2"])]
    return Case(fn, block, weights(), outliers(4, 8), groups)


def one_bias_for_all():
    """A bias that every device reads whole: the scales of its channels are shared by all devices."""
    params = weights(b1=(8,))
    fn = on_devices(lambda p, x: block(p, x, over("model")), (MEGATRON | {"b1": P()}, P()))
    plain = lambda p, x: block(p | {"b1": jnp.tile(p["b1"], 2)}, x)
    groups = [(8, (), ["norm"], ["w1"]), (8, (), ["b1", "w1"], ["w2"])]
    return Case(fn, plain, params, outliers(4, 8), groups)


def norm_outside():
    """What enters a shard_map carries no scale; "data" is left to the compiler."""
    inside = {name: spec for name, spec in MEGATRON.items() if name != "norm"}

    def fn(p, x):
        parts = lambda q, x: block(q | {"norm": jnp.ones(8)}, x, over("model"))
        rest = {name: p[name] for name in inside}
        return on_devices(parts, (inside, P()), axis_names={"model"})(rest, x * p["norm"][None, :])

    return Case(fn, block, weights(), outliers(4, 8), [(16, (2,), ["b1", "w1"], ["w2"])])


def through_layers(p, x, total=lambda y: y):
    return lax.scan(lambda x, q: (x + block(q, jnp.tanh(x), total), None), x, p)[0]


LAYERS = [(24, (3,), ["norm"], ["w1"])]


def scan_inside():
    specs = {name: P(None, *spec) for name, spec in MEGATRON.items()}
    fn = on_devices(lambda p, x: through_layers(p, x, over("model")), (specs, P("data")), P("data"))
    groups = [*LAYERS, (48, (2, 3), ["b1", "w1"], ["w2"])]
    return Case(fn, through_layers, weights(3), outliers(4, 8), groups)


def scan_outside():
    parts = on_devices(lambda p, x: block(p, x, over("model")), (MEGATRON, P("data")), P("data"))

    def fn(p, x):
        return lax.scan(lambda x, q: (x + parts(q, jnp.tanh(x)), None), x, p)[0]

    groups = [*LAYERS, (48, (3, 2), ["b1", "w1"], ["w2"])]
    return Case(fn, through_layers, weights(3), outliers(4, 8), groups)


def layers_cut():
    """Each device scans over the layers that it has."""

    def layers(p, x, start):
        return lax.scan(lambda y, q: (y + block(q, jnp.tanh(x)), None), start, p)[0]

    def parts(p, x):
        return lax.psum(layers(p, x, lax.pcast(jnp.zeros_like(x), "model", to="varying")), "model")

    plain = lambda p, x: layers(p, x, jnp.zeros_like(x))
    groups = [(32, (2, 2), ["norm"], ["w1"]), (64, (2, 2), ["b1", "w1"], ["w2"])]
    return Case(on_devices(parts, (P("model"), P())), plain, weights(4), outliers(4, 8), groups)


def experts():
    """One expert on every device: what they share has one scale, what is theirs has its own."""

    def plain(p, x):
        h = jax.nn.relu(jnp.einsum("ti,eio->eto", x * p["norm"][None, :], p["w1"]))
        return jnp.einsum("eti,eio->eto", h, p["w2"]).sum(0)

    both = ("data", "model")
    specs = {"norm": P(), "w1": P(both), "w2": P(both)}
    fn = on_devices(lambda p, x: lax.psum(plain(p, x), both), (specs, P()))
    params = {"norm": 1 + 0.3 * normal(8), "w1": normal(4, 8, 16), "w2": normal(4, 16, 8)}
    groups = [(8, (), ["norm"], ["w1"]), (64, (2, 2), ["w1"], ["w2"])]
    return Case(fn, plain, params, outliers(4, 8), groups)


def summed_over_devices():
    """A sum over devices carries a scale only if they all have the same: that of w2 is not stacked."""

    def plain(p, x, total=lambda y: y):
        h = total(x @ p["w1"])
        return total(
            jnp.einsum(
                "eti,eio->eto", jnp.broadcast_to(h, (p["w2"].shape[0], *h.shape)), p["w2"]
            ).sum(0)
        )

    fn = on_devices(
        lambda p, x: plain(p, x, over("model")),
        ({"w1": P("model"), "w2": P("model")}, P(None, "model")),
    )
    params = {"w1": normal(8, 6), "w2": normal(2, 6, 5)}
    return Case(fn, plain, params, outliers(4, 8), [(6, (), ["w1"], ["w2"])])


def columns_of_their_own():
    """Every device has features, gains and columns of its own: a channel of w1 meets two gains, so these share s."""

    def plain(p, x):
        return sum(
            x[:, i : i + 4] * p["norm"][None, i : i + 4] @ p["w1"][:, 2 * i : 2 * i + 8]
            for i in (0, 4)
        )

    def parts(p, x):
        return lax.psum(x * p["norm"][None, :] @ p["w1"], "model")

    fn = on_devices(parts, ({"norm": P("model"), "w1": P(None, "model")}, P(None, "model")))
    params = {"norm": 1 + 0.3 * normal(8), "w1": normal(4, 16)}
    return Case(fn, plain, params, outliers(4, 8), [(4, (), ["norm"], ["w1"])])


CASES = [
    *(megatron, megatron_unchecked, two_mesh_axes, one_bias_for_all, norm_outside),
    *(scan_inside, scan_outside, layers_cut, experts, summed_over_devices, columns_of_their_own),
]


def program_of(fn, params, *args):
    return Program(trace(fn, params, args, {})[0])


def close(got, expected, rtol=1e-5):
    """Equal but for the order of summation: float32 sums of at most some hundred terms."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        np.asarray(got), expected, rtol=rtol, atol=rtol * np.abs(expected).max(initial=0)
    )


QUICK = (norm_outside, experts)


@pytest.mark.parametrize(
    "make",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda c: c.__name__,
)
@pytest.mark.slow
def test_groups_and_their_folds(make):
    """The certificate alone (no proof by bits) says what can be folded; real s then change no output."""
    case = make()
    graph = find_graph(
        Survey.of(program_of(case.fn, case.params, case.x), shared_arrays(case.params))
    )
    got = [
        (g.size, g.steps, sorted(g.absorbers), [path for path, _ in g.sites]) for g in graph.groups
    ]
    assert sorted(got) == sorted(case.groups)
    rng = np.random.default_rng(0)
    s = {g.name: jnp.asarray(np.exp(rng.normal(size=g.size)), jnp.float32) for g in graph.groups}
    folded = sq.fold(case.params, graph, s)
    moved = {path for *_, absorbers, sites in case.groups for path in (*absorbers, *sites)}
    assert {p for p, x in case.params.items() if not np.allclose(x, folded[p], rtol=0.01)} == moved
    close(jax.jit(case.fn)(folded, case.x), case.plain(case.params, case.x), 2e-5)


def stats_on_one_device(case, known={}):  # noqa: B006 the cases that are alike there share them
    key = case.plain, str(jax.tree.map(jnp.shape, case.params))
    if key not in known:
        known[key] = sq.calibrate(case.plain, case.params, [case.x])
    return known[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    slow_but(
        [megatron_unchecked, one_bias_for_all, layers_cut, megatron, scan_inside, experts],
        megatron,
        scan_inside,
    ),
)
def test_statistics_and_quantized_products_are_those_of_one_device(make):
    case = make()
    stats, plain = sq.calibrate(case.fn, case.params, [case.x]), stats_on_one_device(case)
    assert len(stats.graph.groups) == len(case.groups)  # all pass the proof
    assert set(stats.graph.sites) == set(plain.graph.sites)
    for path, absmax in plain.absmax.items():
        close(stats.absmax[path], absmax)
        mean = np.asarray(plain.abs_sum[path]) / int(plain.count[path])
        close(np.asarray(stats.abs_sum[path]) / int(stats.count[path]), mean)
        assert int(stats.count[path]) == int(plain.count[path])
    qparams = sq.quantize(case.params, stats, sq.W8A8_O3.replace(smoothing=0.5))
    run = jax.jit(quantized(case.fn))
    assert {dot.dtypes for dot in jaxprs.dots(run.trace(qparams, case.x).jaxpr)} == {
        jaxprs.INT8_DOT
    }
    close(run(qparams, case.x), jax.jit(quantized(case.plain))(qparams, case.x))


def gathered(h):
    return lax.all_gather(h, "model", axis=1, tiled=True)


def passed_round(h):
    return lax.ppermute(h, "model", [(0, 1), (1, 0)])


def exchanged(h):
    return lax.all_to_all(h, "model", 0, 0, tiled=True)


@pytest.mark.parametrize(
    "collective",
    [
        gathered,
        pytest.param(passed_round, marks=pytest.mark.slow),
        pytest.param(exchanged, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_other_collectives_are_barriers(collective):
    """Refused with the equation; what is not folded is seen and quantized all the same."""

    def parts(p, x):
        return lax.psum(collective(jax.nn.relu(x @ p["w1"])) @ p["w2"], "model")

    rows = 8 if collective is gathered else 4
    fn = on_devices(parts, ({"w1": P(None, "model"), "w2": P()}, P()))
    params, x = {"w1": normal(8, 8), "w2": normal(rows, 5)}, outliers(4, 8)
    stats = sq.calibrate(fn, params, [x])
    assert stats.graph.groups == ()
    assert re.search(
        "`(all_gather|ppermute|all_to_all)` at .*stands in the way", dict(stats.graph.refused)["w2"]
    )
    blocks = np.asarray(jax.nn.relu(x @ params["w1"]))
    halves = np.abs(blocks).max(0).reshape(2, 4)
    close(stats.absmax["w2"], halves.ravel() if collective is gathered else halves.max(0))
    got = jax.jit(quantized(fn))(sq.quantize(params, stats), x)
    expected = fn(params, x)
    assert 0 < np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.slow
def test_a_leaf_that_is_also_read_outside_is_not_scaled():
    case = megatron()
    fn = lambda p, x: case.fn(p, x) + jnp.sum(p["w1"] ** 2)
    reasons = dict(sq.calibrate(fn, case.params, [case.x]).graph.refused)
    assert reasons["w2"].startswith("w1 is read outside this shard_map too")


def test_heads_are_found_in_a_shard_map():
    case = megatron()
    program = program_of(case.fn, case.params, case.x)
    assert find_heads(program, find_sites(program)[0]) == {"w2"}


@pytest.mark.slow
def test_a_mask_that_a_shard_map_would_cut_is_refused():
    params, x = {"w": normal(8, 6)}, outliers(4, 3, 8)
    mask = lambda x: np.arange(12).reshape(4, 3) % 3 < 2
    apply = lambda p, x: x @ p["w"]
    cut, whole = (on_devices(apply, (P(), spec), spec) for spec in (P("data"), P()))
    with pytest.raises(
        ValueError, match=r"mask of shape \(4, 3\) does not fit the activation \(2, 3, 8\).*at w;"
    ):
        sq.calibrate(cut, params, [x], mask=mask)
    stats = sq.calibrate(whole, params, [x], mask=mask)
    close(stats.absmax["w"], np.abs(x)[:, :2].max((0, 1)))
    assert int(stats.count["w"]) == 8


def test_what_differs_from_device_to_device():
    """By the specs and the collectives, without the types that check_vma=False does not give."""

    def parts(x, y):
        total = lax.psum(x, "model")
        start = jnp.zeros_like(y)
        _, (kept, _) = lax.scan(
            lambda c, _: ((c[1], c[1] + x[0, 0]), c), (start, start), None, length=3
        )
        return (
            x,
            total,
            y,
            y + lax.axis_index("data").astype(y.dtype),
            kept,
            lax.ppermute(y, "model", [(0, 1)]),
        )

    fn = on_devices(parts, (P("model"), P()), P(("data", "model")), check_vma=False)
    program = program_of(lambda p, x: fn(x, x), {"w": normal(1)}, normal(4, 8))
    [body] = [e.body for e in program.equations if e.body is not None and e.name == "shard_map"]
    found = varying(program)
    names = [{program.mesh_axes[scope] for scope in found[v]} for v in body.outputs]
    assert names == [{"model"}, set(), set(), {"data"}, {"model"}, {"model"}]


# Groups of channels -----------------------------------------------------------------------------------------------


def rows_on_devices(p, x):
    """x @ w, with half the rows of each w on each of two devices."""
    half = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))
    parts = jax.shard_map(
        lambda w, x: lax.psum(x @ w, "m"),
        mesh=half,
        in_specs=(P("m", None), P(None, "m")),
        out_specs=P(),
    )
    return {name: parts(w, x) for name, w in p.items()}


@pytest.mark.slow
def test_groups_run_in_a_shard_map():
    """Two groups on each device; a single group may even be cut, because its scale is that of both parts."""
    schemes = {
        "float x": sq.Scheme(weight=sq.Int8(group_size=64), activation=None),
        "int8 x": sq.Scheme(weight=sq.Int8(group_size=64)),
        "W4A16": sq.W4A16_G64,
        "one group": sq.W4A16.replace(weight=sq.Int4(group_size=256, zero_point=True)),
    }
    params, x = {name: normal(256, 8, seed=i) for i, name in enumerate(schemes)}, normal(5, 256)
    stats = sq.calibrate(rows_on_devices, params, [x])
    qparams = sq.quantize(params, stats, {f"^{name}$": s for name, s in schemes.items()})
    got = jax.jit(quantized(rows_on_devices))(qparams, x)
    for name, weight in qparams.items():
        exact = np.asarray(x, np.float64) @ np.asarray(sq.dequantize(weight.tensor), np.float64)
        error = np.abs(got[name] - exact).max() / np.abs(exact).max()
        assert error < (0.02 if name == "int8 x" else 1e-6)


@pytest.mark.slow
def test_a_shard_map_that_would_begin_inside_a_group_is_refused():
    """200 channels in groups of 64 have 4 scales, two for each device, but the second block begins in the second."""
    params, x = {"w": normal(200, 8)}, normal(5, 200, seed=1)
    scheme = sq.W4A8.replace(weight=sq.Int4(group_size=64, zero_point=True, two_level=True))
    qparams = sq.quantize(params, sq.calibrate(rows_on_devices, params, [x]), scheme)
    with pytest.raises(
        ValueError, match=r"^w: its 200 contracted channels can not be .* into 2 blocks of whole"
    ):
        jax.eval_shape(quantized(rows_on_devices), qparams, x)


# Sharded parameters -----------------------------------------------------------------------------------------------


def shardings_of(specs, kind=AxisType.Auto):
    return {name: NamedSharding(mesh(kind), spec) for name, spec in specs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_parameters_stay_so_and_give_the_same(kind):
    """Calibrate, smooth, quantize and run on parameters cut as Megatron cuts them, and on the same on one device."""

    def fn(p, x):
        h = jax.nn.relu(jnp.dot(x * p["norm"][None, :], p["w1"]) + p["b1"][None, :])
        return jnp.dot(
            h, p["w2"], out_sharding=P("data", None) if kind == AxisType.Explicit else None
        )

    params, x, where = weights(), outliers(4, 8), shardings_of(MEGATRON, kind)
    plain = sq.calibrate(block, params, [x])
    with jax.set_mesh(mesh(kind)):
        _sharded_as_on_one_device(fn, params, x, plain, where)


def _sharded_as_on_one_device(fn, params, x, plain, where):
    cut = jax.device_put(params, where)
    cut_x = jax.device_put(x, NamedSharding(where["norm"].mesh, P("data")))
    stats = sq.calibrate(fn, cut, [cut_x])
    assert len(plain.graph.groups) == 2
    assert [g._replace(ways=()) for g in stats.graph.groups] == [
        g._replace(ways=()) for g in plain.graph.groups
    ]
    for seen, expected in zip(jax.tree.leaves(stats), jax.tree.leaves(plain), strict=True):
        close(seen, expected)
    smoothed = sq.smooth(cut, stats)
    for name, expected in sq.smooth(params, plain).items():
        close(smoothed[name], expected)
        assert smoothed[name].sharding.is_equivalent_to(where[name], expected.ndim)
    qparams, expected = sq.quantize(cut, plain, sq.W8A8_O3), sq.quantize(params, plain, sq.W8A8_O3)
    jax.tree.map(np.testing.assert_array_equal, qparams, expected)
    of_arrays = sq.shardings(qparams, where)
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in _pairs(qparams, of_arrays))
    assert of_arrays["w1"].tensor.values.spec == P("model", None)
    assert of_arrays["w2"].tensor.scale.spec == P(None, None)
    moved = jax.device_put(expected, of_arrays)
    close(jax.jit(quantized(fn))(moved, cut_x), jax.jit(quantized(block))(expected, x))


def test_a_matmul_on_a_mesh_with_explicit_axes_is_sharded_as_the_float_one():
    """By its type: nothing is compiled."""
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x = jax.device_put(outliers(4, 8), NamedSharding(mesh(AxisType.Explicit), P("data", None)))
        qparams = {"w": quantize_weight(normal(8, 6), (0,), sq.W8A8)}
        program = jax.make_jaxpr(quantized(lambda p, x: x @ p["w"]))(qparams, x)
    [result] = program.out_avals
    assert result.sharding.spec == P("data", None)
    assert [dot.dtypes for dot in jaxprs.dots(program)] == [jaxprs.INT8_DOT]


@pytest.mark.slow
@pytest.mark.every_case
def test_shard_map_over_a_mesh_with_explicit_axes():
    """There the types of arrays say how they are cut, and shard_map wants specs that agree."""
    case, where = megatron(), shardings_of(MEGATRON, AxisType.Explicit)

    def fn(p, x):
        parts = jax.shard_map(
            lambda p, x: block(p, x, over("model")),
            in_specs=(MEGATRON, P("data", None)),
            out_specs=P("data", None),
        )
        return parts(p, x)

    with jax.set_mesh(mesh(AxisType.Explicit)):
        cut = jax.device_put(case.params, where)
        x = jax.device_put(case.x, NamedSharding(where["w1"].mesh, P("data", None)))
        stats = sq.calibrate(fn, cut, [x])
        assert sorted((g.size, g.steps) for g in stats.graph.groups) == [(8, ()), (16, (2,))]
        qparams = sq.quantize(cut, stats, sq.W8A8_O3)
        got = jax.jit(quantized(fn))(jax.device_put(qparams, sq.shardings(qparams, where)), x)
    expected = sq.quantize(case.params, stats_on_one_device(case), sq.W8A8_O3)
    close(got, jax.jit(quantized(block))(expected, case.x))


def _pairs(tree, other):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)


@pytest.mark.slow
def test_no_weight_travels_when_it_is_smoothed_and_quantized():
    """Only maxima do: the compiled program gathers and permutes nothing; what goes in may be donated."""
    params, where = weights(), shardings_of(MEGATRON)
    stats = sq.calibrate(block, params, [outliers(4, 8)])
    expected = sq.smooth(params, stats)
    both = lambda p: sq.quantize(sq.smooth(p, stats), stats)
    out = sq.shardings(jax.eval_shape(both, params), where)
    cut = jax.device_put(params, where)
    text = jax.jit(both, in_shardings=(where,), out_shardings=out).lower(cut).compile().as_text()
    moved = re.findall(
        r"= .*?\b(all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", text
    )
    assert set(moved) == {"all-reduce"}
    assert not re.search(r"s8\[[^=]*all-reduce", text)
    smoothed = jax.jit(lambda p: sq.smooth(p, stats), donate_argnums=0, out_shardings=where)(cut)
    assert all(x.is_deleted() for x in cut.values())
    jax.tree.map(close, smoothed, expected)


@pytest.mark.slow
def test_shardings_of_a_stack_with_smoothing_and_static_scales():
    def fn(p, x):
        return jnp.einsum("eti,eio->eto", x, p["w"])

    params, x = {"w": normal(4, 6, 8), "other": normal(3)}, normal(4, 5, 6)
    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), sq.W8A8_O3.replace(smoothing=0.5))
    found = sq.shardings(qparams, {"w": P("data", "model"), "other": None})
    assert found["other"] is None
    assert found["w"].tensor.values == P("data", None, "model")
    assert found["w"].tensor.scale == P("data", None, None)
    assert (found["w"].input_scale, found["w"].smoothing) == (P("data"), P("data", "model"))


@pytest.mark.parametrize("wrap", [nn.with_partitioning, nn.with_logical_partitioning])
@pytest.mark.slow
def test_shardings_of_boxed_leaves(wrap):
    """Flax's boxes stay around quantized leaves; what flax says of a box is said of its leaf."""
    init = wrap(nn.initializers.lecun_normal(), (None, "model"))
    module, x = nn.Dense(4, kernel_init=init), normal(2, 6)
    params = module.init(jax.random.key(0), x)
    qparams = sq.quantize(params, sq.calibrate(module.apply, params, [x]))
    found = sq.shardings(qparams, nn.get_partition_spec(params))
    boxed = nn.unbox(found)["params"]["kernel"].tensor
    assert (boxed.values, boxed.scale) == (P("model", None), P("model", None))
    where = sq.shardings(qparams, nn.get_sharding(params, mesh()))
    moved = jax.device_put(qparams, where)
    exact = np.asarray(module.apply(params, x), np.float64)
    assert np.abs(jax.jit(sq.quantized(module.apply))(moved, x) - exact).max() < 0.05


def test_shardings_are_found_by_name_whatever_the_order_of_keys():
    tree = {2: jnp.ones(2), 10: jnp.ones(4)}
    assert sq.shardings(tree, {"10": P("model"), "2": P()}) == {2: P(), 10: P("model")}


def test_shardings_that_do_not_fit():
    params = {"w": normal(6, 8)}
    qparams = sq.quantize(params, sq.calibrate(lambda p, x: x @ p["w"], params, [normal(2, 6)]))
    with pytest.raises(ValueError, match="w: expected a spec of at most 2 entries"):
        sq.shardings(qparams, {"w": P(None, None, "model")})
    with pytest.raises(
        ValueError, match="w: its axis 0 of size 6 can not be sharded into 4 blocks"
    ):
        sq.shardings(qparams, {"w": NamedSharding(mesh(), P(("data", "model")))})
    with pytest.raises(ValueError, match=r"the trees differ at \['v', 'w'\]"):
        sq.shardings(qparams, {"v": P()})
    with pytest.raises(
        ValueError, match="w: expected a NamedSharding, a PartitionSpec or None, got int"
    ):
        sq.shardings(qparams, {"w": 3})


# What is quantized inside a shard_map, or on a mesh with explicit axes ------------------------------------------------


def rounded_weights(qparams):
    """The weights that a quantized tree stands for, in float64."""
    return {n: np.asarray(sq.dequantize(w.tensor), np.float64) for n, w in qparams.items()}


def on_columns_and_rows(p, x):
    return jnp.maximum(x @ p["w1"], 0) @ p["w2"]


SPLIT = {"w1": P(None, "model"), "w2": P("model", None)}


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
@pytest.mark.slow
def test_quantized_in_a_shard_map_takes_blocks_of_weights_that_vary_over_devices(scheme):
    """`jax.shard_map(quantized(fn))`: a leaf's type says that its numbers differ from device to device."""
    params = {"w1": normal(8, 16), "w2": normal(16, 8)}
    x = normal(4, 8, seed=3)
    stats = sq.calibrate(on_columns_and_rows, params, [x])
    weight = sq.Int4(group_size=8, zero_point=True) if scheme == "W4A16" else sq.Int8()
    qparams = sq.quantize(params, stats, sq.W8A16.replace(weight=weight))
    block = sq.quantized(lambda p, x: lax.psum(on_columns_and_rows(p, x), "model"))
    got = jax.jit(on_devices(block, (sq.shardings(qparams, SPLIT), P())))(qparams, x)
    w = rounded_weights(qparams)
    exact = np.maximum(np.asarray(x, np.float64) @ w["w1"], 0) @ w["w2"]
    np.testing.assert_allclose(got, exact, atol=2e-5 * np.abs(exact).max())


@pytest.mark.slow
def test_outlier_channels_in_a_shard_map():
    """Outputs may be sharded. Channels may not, because x is indexed by its outlier channels."""
    params, x = {"w1": normal(8, 16)}, normal(4, 8, seed=3).at[:, 2].multiply(20)
    fn = lambda p, x: x @ p["w1"]
    scheme = sq.W8A8_OUTLIERS
    qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), scheme)
    by_outputs = on_devices(fn, ({"w1": P(None, "model")}, P()), P(None, "model"))
    got = jax.jit(sq.quantized(by_outputs))(qparams, x)
    exact = np.asarray(x, np.float64) @ np.asarray(params["w1"], np.float64)
    assert np.abs(got - exact).max() < 0.05
    summed = lambda p, x: lax.psum(fn(p, x), "model")
    by_channels = on_devices(summed, ({"w1": P("model", None)}, P(None, "model")))
    with pytest.raises(ValueError, match=r"^w1: has outlier channels, which need all of its"):
        jax.eval_shape(sq.quantized(by_channels), qparams, x)


def test_rotated_channels_in_a_shard_map_are_whole_blocks():
    """Each device rotates its own blocks; what would need another device's channels is refused."""
    params, x = {"w1": normal(16, 8)}, normal(4, 16, seed=3).at[:, 2].multiply(20)
    fn = lambda p, x: x @ p["w1"]
    summed = lambda p, x: lax.psum(fn(p, x), "model")
    by_channels = on_devices(summed, ({"w1": P("model", None)}, P(None, "model")))
    stats = sq.calibrate(fn, params, [x])
    blocks = sq.quantize(params, stats, sq.W8A16.replace(rotation=8))
    got = jax.jit(sq.quantized(by_channels))(blocks, x)
    np.testing.assert_allclose(got, sq.quantized(fn)(blocks, x), rtol=1e-5, atol=1e-5)
    whole = sq.quantize(params, stats, sq.W8A16.replace(rotation="hadamard"))
    message = r"^w1: is rotated in blocks of 16 of its 16 channels, and 2 devices would have 8"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sq.quantized(by_channels), whole, x)
    # Where the compiler shards arrays it moves what a block needs.
    where = sq.shardings(whole, {"w1": NamedSharding(mesh(), P("model", None))})
    placed = jax.jit(sq.quantized(fn))(jax.device_put(whole, where), x)
    np.testing.assert_allclose(placed, sq.quantized(fn)(whole, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=str)
@pytest.mark.slow
@pytest.mark.every_case
def test_groups_of_a_leaf_that_is_sharded_on_explicit_axes(spec):
    """The codes and scales are those of the leaf on one device, and stay sharded as it is."""
    params, x = {"w": normal(12, 8)}, normal(4, 12)
    stats = sq.calibrate(lambda p, x: x @ p["w"], params, [x])
    where = NamedSharding(mesh(AxisType.Explicit), spec)
    for weight in (sq.Int4(group_size=4, zero_point=True), sq.Int8(group_size=8)):
        scheme = sq.W8A16.replace(weight=weight)
        expected = sq.quantize(params, stats, scheme)["w"].tensor
        with jax.set_mesh(where.mesh):
            got = sq.quantize(jax.device_put(params, {"w": where}), stats, scheme)["w"].tensor
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert got.values.sharding.spec == P(*reversed(spec))
