"""A built program: calls written out, bodies entered, dead code gone, facts of its variables, and its runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from sqjax.program.build import build
from sqjax.program.entries import carried, entries
from sqjax.program.equations import Known, Var, all_equations
from sqjax.program.evaluate import evaluate
from sqjax.program.facts import Program
from sqjax.program.gathers import rows_last
from sqjax.program.replication import reduced_axes, varying
from sqjax.program.trace import array_leaves, trace

X = jnp.arange(6.0).reshape(2, 3)


def program_of(fn, params, *args):
    return Program(trace(fn, params, args, {})[0])


def names(program):
    return [equation.name for equation in program.equations]


def maker_of_result(program):
    return program.maker[program.results[0]]


def on_devices(fn, in_specs, out_specs):
    """`fn` on a mesh of one device: what a program says of it is the same for any number."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    options = {"in_specs": in_specs, "out_specs": out_specs, "check_vma": False}
    return jax.shard_map(fn, mesh=mesh, **options)


# Tracing and building ---------------------------------------------------------------------------


def test_inputs_are_the_leaves_then_the_arrays_among_the_arguments():
    def fn(params, x, train, *, scale):
        assert train is True
        return x @ params["w"] * scale

    args, kwargs = (X, True), {"scale": np.float32(2)}
    traced, inputs = trace(fn, {"b": X, "w": X.T}, args, kwargs)
    assert traced.paths == ("b", "w")
    assert [np.shape(x) for x in inputs] == [(2, 3), ()]
    assert [np.shape(x) for x in array_leaves((args, kwargs))] == [(2, 3), ()]
    flat = build(traced)
    assert list(flat.leaves.values()) == ["b", "w"]
    assert list(flat.roots.values()) == ["input 0 of fn", "input 1 of fn"]


def test_calls_are_written_out_and_dead_code_is_gone():
    @jax.jit
    def called(x):
        jnp.exp(x)  # nobody reads it
        return jax.checkpoint(jnp.sin)(x) * 2.0

    program = program_of(lambda p, x: called(x) + p["w"], {"w": X}, X)
    assert names(program) == ["sin", "mul", "add"]
    [_, two] = program.maker[maker_of_result(program).inputs[0]].inputs
    assert isinstance(two, Known)
    assert str(two) == "2.0"


def test_effects_and_carries_are_not_dead():
    def fn(params, x):
        jax.debug.print("{}", x.sum())

        def step(carry, _):
            return (carry[0] + carry[1], jnp.cos(carry[1])), jnp.exp(carry[0])

        (total, _), _ = lax.scan(step, (x, x), None, length=3)
        return total

    found = names(program_of(fn, {"w": X}, X))
    assert {"reduce_sum", "cos", "add"} <= set(found)
    assert found.count("scan") == 1


def test_two_functions_share_a_cast_of_a_leaf():
    def fn(params, x):
        return [x @ params["w"].astype(jnp.float16).T for _ in range(2)]

    program = program_of(fn, {"w": X}, X.astype(jnp.float16))
    assert names(program) == ["convert_element_type", "transpose", "dot_general", "dot_general"]


def test_scans_of_one_length_share_the_slices_of_a_leaf():
    def over(layers, x):
        return lax.scan(lambda c, w: (c * w, None), x, layers)[0]

    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((5, 3))}
    x = jnp.ones(3)
    program = program_of(lambda p, x: over(p["w"], x) + over(p["w"], 2 * x), params, x)
    first, second = (entries(e)[0] for e in program.equations if e.name == "scan")
    assert first.inner == second.inner
    assert program.leaf_views[first.inner].stacked == {first.scan: 0}
    assert program.barred == {}
    others = program_of(lambda p, x: over(p["w"], x) + over(p["v"], x), params, x)
    first, second = (entries(e)[0] for e in others.equations if e.name == "scan")
    assert first.scan != second.scan
    outside = program_of(lambda p, x: over(p["w"], x) + p["w"].sum(), params, x)
    [why] = outside.barred.values()
    assert why == "w is read outside this scan too"


def test_entries_say_which_variable_is_which_slice_block_or_carry():
    def fn(params, x):
        total, kept = lax.scan(lambda c, w: (c + w.sum(), c), x[0, 0], params["w"])
        spec = PartitionSpec(None, ("data", "model"))
        return total, kept, on_devices(lambda w: w * 2, spec, spec)(params["w"])

    program = program_of(fn, {"w": X}, X)
    [scan] = [e for e in program.equations if e.name == "scan"]
    [sliced] = entries(scan)
    [value] = carried(scan)
    assert program.leaves[sliced.outer] == "w"
    assert program.shape(sliced.inner) == (3,)
    assert (value.first, value.following) == (scan.inputs[0], scan.body.outputs[0])
    assert program.roots[value.inner].startswith("the carry of `scan` at ")
    [shard_map] = [e for e in program.equations if e.name == "shard_map"]
    [block] = entries(shard_map)
    data, model = shard_map.body.scopes
    assert block.shards == {1: [(data, 1), (model, 1)]}
    assert block.mesh_axes == {data, model}
    assert carried(shard_map) == []
    assert not any(entries(e) for e in program.equations if e.body is None)


# Facts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "dtype", "offset", "barred"),
    [
        (lambda w: 1 + w, "float32", 1.0, None),
        (lambda w: w.astype("float32") + 0.5, "bfloat16", 0.5, "bfloat16 too coarse to rescale"),
        (lambda w: 0.1 + w, "float32", 0.1, "can not be rescaled exactly"),
        (lambda w: 300.0 + w, "float32", 300.0, "can not be rescaled exactly"),
        (lambda w: 0.0 + w, "float32", None, None),
        (lambda w: (1 + w) * w, "float32", None, None),  # w has another reader
        (lambda w: 1 + w.sum(), "float32", None, None),
        (lambda w: jnp.full(3, 2.0) + w, "float32", 2.0, None),
    ],
)
def test_offsets_stand_for_leaves(fn, dtype, offset, barred):
    program = program_of(lambda p: fn(p["w"]), {"w": jnp.ones(3, dtype)})
    assert list(program.offsets.values()) == ([] if offset is None else [pytest.approx(offset)])
    assert [barred in why for why in program.barred.values()] == ([] if barred is None else [True])


def test_known_numbers_and_what_an_index_picks():
    def fn(params, x, i):
        zeros = jnp.zeros((1, 3)).reshape(3).astype(jnp.float32)
        row = lax.dynamic_index_in_dim(params["w"], i, keepdims=False)
        return zeros + x, row * x

    program = program_of(fn, {"w": X}, jnp.ones(3), jnp.int32(1))
    add, mul = (program.maker[v] for v in program.results)
    assert program.is_scale_free(add.inputs[0])
    assert not program.is_scale_free(add.inputs[1])
    row = mul.inputs[0]
    assert program.picked[row].name == "dynamic_slice"
    assert row not in program.from_leaves  # the index is an input
    assert program.leaves_behind(row) == {"w"}


@pytest.mark.parametrize(
    ("lookup", "last"),
    [
        (lambda table, ids: table[ids], True),
        (lambda table, ids: table[:, ids], False),
        (lambda table, ids: jnp.take(table.T, ids, axis=1), False),
    ],
)
def test_rows_last(lookup, last):
    table, ids = X.T, jnp.array([[0, 1], [1, 0]])
    program = program_of(lambda p, ids: lookup(p["w"], ids), {"w": table}, ids)
    [gather] = [e for e in program.equations if e.name == "gather"]
    rank = len(program.shape(gather.inputs[1]))
    assert rows_last(gather.params["dimension_numbers"], rank) == last
    assert type(gather.params["slice_sizes"][0]) is int


def test_touching_and_read():
    program = program_of(lambda p, x: (x @ p["w"]) * 2, {"w": X.T}, X)
    dot, mul = program.equations
    assert program.touching(dot.outputs[0]) == [dot, mul]
    assert program.touching(program.inputs[0]) == [dot]
    assert not dot.runs_a_program
    assert list(all_equations(program.main)) == [dot, mul]
    assert all(isinstance(v, Var) for v in dot.variables)


# Runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_runs_as_its_function_and_probes_see_every_step():
    def fn(params, x):
        def layer(x, w):
            def row(total, v):
                return total + v, jnp.tanh(v)

            total, rows = lax.scan(row, jnp.zeros(3), x @ w)
            return rows + total[None] / 10, x.sum()

        return lax.scan(layer, x, params["w"], reverse=True)

    params = {"w": jnp.linspace(-1, 1, 4 * 9).reshape(4, 3, 3)}
    program = program_of(fn, params, X)
    tanh = next(e for e in program.equations if e.name == "tanh")
    [v] = tanh.inputs
    dot = next(e for e in program.equations if e.name == "dot_general").outputs[0]
    probes = {v: jnp.abs, dot: jnp.shape, program.inputs[1]: jnp.max}
    (last, sums), seen = jax.jit(lambda *args: evaluate(program, *args, probes))([params["w"]], [X])
    expected = fn(params, X)
    np.testing.assert_allclose(last, expected[0], rtol=1e-5)
    np.testing.assert_allclose(sums, expected[1], rtol=1e-5)
    assert seen[v].shape == (4, 2, 3)  # layers, rows, channels
    np.testing.assert_allclose(seen[v][-1], np.abs(X @ params["w"][-1]), rtol=1e-5)
    assert [np.shape(n) for n in seen[dot]] == [(4,), (4,)]  # the shape (2, 3) at every step
    assert float(seen[program.inputs[1]]) == 5


@pytest.mark.slow
def test_probes_in_a_shard_map_see_every_device_and_captured_arrays_are_there():
    captured = jnp.full(3, 2.0)

    def fn(params, x):
        def block(w, x):
            return lax.psum(x * captured[None], "model") @ w

        specs = (PartitionSpec(), PartitionSpec("data"))
        return on_devices(block, specs, PartitionSpec("data"))(params["w"], x)

    params = {"w": jnp.ones((3, 4))}
    program = program_of(fn, params, X)
    psum = next(e for e in program.equations if e.name.startswith("psum"))
    probes = {psum.outputs[0]: lambda x: x.max(0)}
    [got], seen = evaluate(program, [params["w"]], [X], probes)
    np.testing.assert_array_equal(got, fn(params, X))
    assert seen[psum.outputs[0]].shape == (1, 1, 3)  # data, model, channels
    data, model = program.scopes[psum.outputs[0]]
    assert reduced_axes(program, psum) == {model}
    differing = varying(program)
    assert differing[psum.outputs[0]] == {data}


def test_what_a_scan_carries_differs_once_any_step_makes_it_differ():
    def block(x):
        def step(carry, _):
            a, b, c = carry
            return (b, c, c + lax.axis_index("model").astype(c.dtype)), a

        start = jnp.zeros(3)
        (a, b, c), kept = lax.scan(step, (start, start, start), None, length=5)
        looped = lax.while_loop(lambda v: v.sum() < 0, lambda v: v + 1, start)  # not looked into
        agreed = lax.pmax(x, ("data", "model"))
        return x, agreed, jnp.cumsum(start), a, b, c, kept, looped

    fn = on_devices(block, PartitionSpec("data"), PartitionSpec())
    program = program_of(lambda p, x: fn(x), {"w": X}, X)
    body = program.main[-1].body
    differing = varying(program)
    found = [{program.mesh_axes[a] for a in differing[v]} for v in body.outputs]
    model = {"model"}
    assert found == [{"data"}, set(), set(), model, model, model, model, {"data", "model"}]
