"""Quantized leaves behave as leaves of a tree do: in every transformation, on every device, in print and in files."""

import copy
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import schemes_in_numpy as oracle
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but

import sqjax as sq
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight

INT4 = sq.W4A16.replace(weight=sq.Int4(group_size=32, zero_point=True))
TWO_LEVEL = sq.W4A8.replace(weight=sq.Int4(group_size=32, zero_point=True, two_level=True))
FORMATS = {
    "int8": sq.W8A8,
    "static": sq.W8A8_O3,
    "smoothing": sq.W8A8_O2.replace(smoothing=0.5),
    "outliers": sq.W8A8_OUTLIERS,
    "int8_alone": sq.W8A16,
    "int4": INT4,
    "two_level": TWO_LEVEL,
    "e4m3": sq.FP8,
    "e5m2": sq.FP8_E5M2,
}
#: Relative error of a chain of two products: a few times that of one rounding, 2^-3 for the coarsest format.
ERRORS = {"e5m2": 0.25, "e4m3": 0.12, "int4": 0.25, "two_level": 0.25}
OUTLIERS = np.where((np.arange(64) == 3) | (np.arange(64) == 17), 10.0, 1.0).astype(np.float32)
#: With a static scale, with outliers, with groups and integer scales.
QUICK = ("static", "outliers", "two_level")
each_format = pytest.mark.parametrize("name", slow_but(list(FORMATS), *QUICK))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def relu_mlp(p, x):
    h = jax.nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"][None, :])
    return h @ p["down"]["kernel"]


def one_product(p, x):
    return x @ p["up"]["kernel"]


@functools.cache
def model():
    """(parameters, an input in which two channels are outliers)."""
    up = {"kernel": normal(64, 128) / 8, "bias": normal(128, seed=1)}
    return {"up": up, "down": {"kernel": normal(128, 32, seed=2) / 8}}, normal(
        6, 64, seed=3
    ) * OUTLIERS[None, :]


@functools.cache
def statistics(fn=relu_mlp):
    params, x = model()
    return sq.calibrate(fn, params, [x])


@functools.cache
def quantized_model(name, fn=relu_mlp):
    """(qparams, quantized fn, params, x)."""
    params, x = model()
    return sq.quantize(params, statistics(fn), FORMATS[name]), sq.quantized(fn), params, x


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def is_weight(x):
    return isinstance(x, QuantWeight)


def same(a, b, scale=1e-5):
    """Equal but for the order of float sums: within a few units in the last place of the largest element."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=scale * np.abs(b).max())


# Transformations --------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.slow
@pytest.mark.every_case
def test_an_argument_of_jit(name):
    qparams, run, params, x = quantized_model(name)
    expected = relu_mlp(params, x)
    traced = []

    @jax.jit
    def counted(p, x):
        traced.append(None)
        return run(p, x)

    got = counted(qparams, x)
    assert 1e-4 < distance(got, expected) < ERRORS.get(name, 0.05)
    counted(jax.tree.map(jnp.array, qparams), x + 1)
    assert len(traced) == 1
    assert distance(got, run(qparams, x)) < 1e-2  # a value next to a tie may round apart


@functools.cache
def other_model():
    """(other parameters, their statistics)."""
    params, x = model()
    other = jax.tree.map(lambda x: -x[::-1], params)
    return other, sq.calibrate(relu_mlp, other, [x])


@each_format
@pytest.mark.slow
def test_vmap_over_inputs_and_over_weights(name):
    qparams, run, params, x = quantized_model(name)
    rows = jax.jit(jax.vmap(lambda row: run(qparams, row[None, :])[0]))(x)
    if not isinstance(FORMATS[name].activation, sq.PerTensor):  # whose scale is that of a row here
        same(rows, run(qparams, x), 1e-2)
    assert distance(rows, relu_mlp(params, x)) < ERRORS.get(name, 0.05)
    if name == "outliers":  # their positions differ from matrix to matrix, their number must not
        return
    other, stats = other_model()
    second = sq.quantize(other, stats, FORMATS[name])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), qparams, second)
    both = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, x)
    same(both, jnp.stack([run(qparams, x), run(second, x)]), 1e-2)


@each_format
@pytest.mark.slow
def test_the_gradient_of_activations_is_nearly_that_of_the_float_function(name):
    qparams, run, params, x = quantized_model(name, fn=one_product)
    g = normal(6, 128, seed=9)
    got = jax.jit(jax.grad(lambda x: jnp.sum(run(qparams, x) * g)))(x)
    expected = g @ params["up"]["kernel"].T
    cosine = float(jnp.sum(got * expected) / jnp.linalg.norm(got) / jnp.linalg.norm(expected))
    if name in ("int4", "two_level"):
        # The weight is off by a uniform error of variance step^2 / 12: 1 / sqrt(1 + (noise / signal)^2) in the mean.
        weight = qparams["up"]["kernel"].tensor
        noise = distance(sq.dequantize(weight), params["up"]["kernel"])
        assert abs(cosine - (1 + noise**2) ** -0.5) < 2e-3
    assert (0.985 if name in ("int4", "two_level", "e5m2") else 0.99) < cosine < 1 - 1e-7


def split(params):
    """(the float leaves, the quantized ones), with None in the place of the others: None is no leaf to jax."""
    floats = jax.tree.map(lambda x: None if is_weight(x) else x, params, is_leaf=is_weight)
    return floats, jax.tree.map(lambda x: x if is_weight(x) else None, params, is_leaf=is_weight)


def merged(floats, weights):
    either = lambda a, b: b if a is None else a
    return jax.tree.map(either, floats, weights, is_leaf=lambda x: x is None or is_weight(x))


@each_format
@pytest.mark.slow
def test_gradients_of_a_tree_are_those_of_its_float_part(name):
    qparams, run, params, x = quantized_model(name)
    floats, weights = split(qparams)
    chex.assert_trees_all_equal(merged(floats, weights), qparams)
    g = normal(6, 32, seed=9)
    got = jax.grad(lambda floats: jnp.sum(run(merged(floats, weights), x) * g))(floats)
    assert jax.tree.map(jnp.shape, got) == {
        "up": {"kernel": None, "bias": (128,)},
        "down": {"kernel": None},
    }
    expected = jax.grad(lambda p: jnp.sum(relu_mlp(p, x) * g))(params)["up"]["bias"]
    assert 1e-6 < distance(got["up"]["bias"], expected) < 0.6
    whole = lambda: jax.grad(lambda p: jnp.sum(run(p, x)))(qparams)
    if name in (
        "e4m3",
        "e5m2",
    ):  # floats to jax too: their gradients are zero, as those of scales are
        assert not any(map(np.any, jax.tree.leaves(split(whole())[1])))
        return
    with pytest.raises(
        TypeError, match="real- or complex-valued"
    ):  # what jax says of all of the tree
        whole()


def scanned(p, x):
    return lax.scan(
        lambda x, layer: (jnp.tanh(x @ layer["w"]) * layer["gain"][None, :], None), x, p
    )[0]


def unrolled(p, x):
    for layer in p:
        x = jnp.tanh(x @ layer["w"]) * layer["gain"][None, :]
    return x


@functools.cache
def three_layers():
    """((parameters, statistics) of the stack, the same of its layers)."""
    kernels, x = jnp.stack([normal(64, 64, seed=i) / 8 for i in range(3)]), model()[1]
    gains = jnp.tile(
        OUTLIERS, (3, 1)
    )  # as many outliers in every layer: a stack has one number of them
    params = {"w": kernels, "gain": gains}
    layers = [{"w": kernels[i], "gain": gains[i]} for i in range(3)]
    return (params, sq.calibrate(scanned, params, [x])), (
        layers,
        sq.calibrate(unrolled, layers, [x]),
    )


@each_format
@pytest.mark.slow
def test_a_scan_over_stacked_leaves_is_the_loop(name):
    (params, stats), (layers, stats_apart) = three_layers()
    x, scheme = model()[1], FORMATS[name]
    stacked, apart = sq.quantize(params, stats, scheme), sq.quantize(layers, stats_apart, scheme)
    got, expected = (
        jax.jit(sq.quantized(scanned))(stacked, x),
        jax.jit(sq.quantized(unrolled))(apart, x),
    )
    same(got, expected, 1e-2)
    assert distance(got, scanned(params, x)) > 1e-4


# Trees ------------------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.slow
def test_tree_utilities(name):
    qparams, run, _, x = quantized_model(name)
    leaves, treedef = jax.tree.flatten(qparams)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    back = jax.tree.unflatten(treedef, leaves)
    chex.assert_trees_all_equal(run(back, x), run(qparams, x))
    assert jax.tree.structure(jax.tree.map(lambda x: x, qparams)) == treedef
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(qparams)]
    assert "['up']['kernel'].tensor.values" in names
    twin = copy.deepcopy(qparams)
    chex.assert_trees_all_equal(twin, qparams)
    assert jax.tree.structure(twin) == treedef
    on_host = jax.device_get(qparams)
    chex.assert_trees_all_equal(run(jax.device_put(on_host), x), run(qparams, x))


def floats_only(dtype):
    return lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


CASTS = {
    "all": lambda x: x.astype(jnp.bfloat16),
    "all, to float32": lambda x: x.astype(jnp.float32),
    "floats": floats_only(jnp.bfloat16),
    "floats, to float8": floats_only(jnp.float8_e4m3fn),
    "wide floats": lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x,
    "integers": lambda x: x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x,
}


@each_format
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.slow
def test_a_cast_is_caught_where_the_leaf_is_used(name, cast):
    """Also one of float8 values, which count as floats: helpers that cast "the floats" do it."""
    qparams, run, _, x = quantized_model(name)
    moved = {**qparams, "down": jax.tree.map(cast, qparams["down"])}
    if all(a is b for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(qparams), strict=True)):
        assert name in ("e4m3", "e5m2")  # nothing but floats in it
        return
    for call in (run, jax.jit(run)):
        with pytest.raises(
            ValueError,
            match=r"^down/kernel: not a valid QTensor: .*was the tree cast\?; quantize the f",
        ):
            call(moved, x)


@each_format
@pytest.mark.slow
def test_donation(name):
    qparams, run, _, x = quantized_model(name)
    expected = run(qparams, x)
    qparams = jax.tree.map(jnp.array, qparams)
    moved = jax.jit(lambda p: jax.tree.map(lambda x: x, p), donate_argnums=0)(qparams)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(qparams))
    chex.assert_trees_all_equal(run(moved, x), expected)


@each_format
@pytest.mark.slow
def test_eval_shape_of_quantize_is_quantize(name):
    (params, x), stats, scheme = model(), statistics(), FORMATS[name]
    qparams = sq.quantize(params, stats, scheme)
    abstract = jax.eval_shape(lambda p: sq.quantize(p, stats, scheme), params)
    assert jax.tree.structure(abstract) == jax.tree.structure(qparams)
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert shapes(abstract) == shapes(qparams)
    out = jax.eval_shape(sq.quantized(relu_mlp), abstract, x)
    assert (out.shape, out.dtype) == ((6, 32), jnp.float32)


# In print ---------------------------------------------------------------------------------------------------------

PRINTED = {
    "int8": "(64, 128) float32 as int8, per_channel, activations int8 per_token",
    "static": "(64, 128) float32 as int8, per_channel, activations int8 static",
    "smoothing": "(64, 128) float32 as int8, per_channel, activations int8 per_tensor, smoothing at run time",
    "outliers": "(64, 128) float32 as int8, per_channel, activations int8 per_token, 2 outlier channels",
    "int8_alone": "(64, 128) float32 as int8, per_channel, activations float",
    "int4": "(64, 128) float32 as int4, groups of 32, zero points, activations float",
    "two_level": "(64, 128) float32 as int4, groups of 32, integer group scales, zero points, activations int8 "
    "per_token",
    "e4m3": "(64, 128) float32 as e4m3, per_channel, activations e4m3 per_token",
    "e5m2": "(64, 128) float32 as e5m2, per_channel, activations e5m2 per_token",
}


@each_format
def test_a_weight_prints_in_a_line(name):
    qparams = quantized_model(name)[0]
    weight = qparams["up"]["kernel"]
    assert repr(weight) == str(weight) == f"QuantWeight({PRINTED[name]})"
    assert repr(jax.eval_shape(lambda p: p, qparams)["up"]["kernel"]) == repr(weight)
    assert re.fullmatch(
        r"QTensor\(\(64, 128\) float32 as .*, scale \[128, \d\]\)", repr(weight.tensor)
    )
    seen = []
    jax.jit(lambda w: (seen.append(repr(w)), w.tensor.values)[1])(weight)
    assert seen == [repr(weight)]


def test_trees_of_other_things_print_what_they_hold():
    weight = quantized_model("outliers")[0]["up"]["kernel"]
    rows, none = P("model", None), P(None)
    specs = sq.shardings({"w": weight}, {"w": P(None, "model")})["w"]
    assert repr(specs) == (
        f"QuantWeight(tensor=QTensor(int8, values={rows}, scale={rows}), "
        f"outliers=Outliers(channels={none}, weight={rows}))"
    )
    assert "NamedSharding" in repr(
        sq.shardings({"w": weight}, {"w": NamedSharding(mesh(), P())})["w"]
    )
    assert repr(jax.tree.map(lambda x: x.ndim, weight)) == (
        "QuantWeight(tensor=QTensor(int8, values=2, scale=2), outliers=Outliers(channels=1, weight=2))"
    )
    assert repr(jax.tree.map(lambda x: None, weight.tensor)) == "QTensor(int8)"


@pytest.mark.slow
def test_one_scale_for_all_and_stacks_print_so():
    fn = lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"])
    params, x = {"w": normal(4, 16, 8)}, normal(4, 5, 16)
    stats = sq.calibrate(fn, params, [x])
    printed = {
        g: repr(
            sq.quantize(
                params, stats, sq.W8A8.replace(weight=oracle.with_granularity(sq.Int8(), g))
            )
        )
        for g in ("per_tensor", "per_channel")
    }
    for granularity, text in printed.items():
        assert text == (
            f"{{'w': QuantWeight((4, 16, 8) float32 as int8, {granularity}, activations int8 per_token)}}"
        )
    assert (
        repr(QTensor.quantize(normal(4, 8), (0,)))
        == "QTensor((4, 8) float32 as int8, scale [8, 1])"
    )


# In files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def flatbuffers():
    """What jax.export writes with; the extra "test" installs it."""
    pytest.importorskip(
        "flatbuffers",
        reason="jax.export writes files with the package flatbuffers: install sqjax[test]",
    )


@each_format
@pytest.mark.usefixtures("flatbuffers")
@pytest.mark.slow
def test_an_exported_function_takes_a_quantized_tree(name):
    qparams, run, params, x = quantized_model(name)
    text = jax.export.export(jax.jit(run))(qparams, x).serialize()
    loaded = jax.export.deserialize(text)
    assert loaded.in_tree == jax.tree.structure(((qparams, x), {}))
    same(loaded.call(qparams, x), jax.jit(run)(qparams, x))
    assert distance(loaded.call(qparams, x), relu_mlp(params, x)) > 1e-4


@pytest.mark.usefixtures("flatbuffers")
@pytest.mark.slow
def test_a_quantized_tree_comes_out_of_an_exported_function():
    (params, _), stats = model(), statistics()
    make = jax.jit(lambda p: sq.quantize(p, stats, TWO_LEVEL))
    loaded = jax.export.deserialize(jax.export.export(make)(params).serialize())
    chex.assert_trees_all_equal(loaded.call(params), make(params))


# On devices -------------------------------------------------------------------------------------------------------


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


#: up cut by its outputs, down by its contracted channels; and the other way round.
COLUMNS_THEN_ROWS = {
    "up": {"kernel": P(None, "model"), "bias": P("model")},
    "down": {"kernel": P("model", None)},
}
ROWS_THEN_COLUMNS = {
    "up": {"kernel": P("model"), "bias": P()},
    "down": {"kernel": P(None, ("data", "model"))},
}


@pytest.mark.parametrize(
    "cuts", [COLUMNS_THEN_ROWS, ROWS_THEN_COLUMNS], ids=["columns_rows", "rows_columns"]
)
@each_format
@pytest.mark.slow
def test_cut_over_devices_as_the_float_leaf(name, cuts):
    qparams, run, params, x = quantized_model(name)
    where = jax.tree.map(lambda spec: NamedSharding(mesh(), spec), cuts)
    found = sq.shardings(qparams, where)
    moved = jax.device_put(qparams, found)
    float_blocks = jax.device_put(params, where)
    for layer in ("up", "down"):
        tensor, blocks = (
            moved[layer]["kernel"].tensor,
            float_blocks[layer]["kernel"].addressable_shards,
        )
        for own, block in zip(tensor.values.addressable_shards, blocks, strict=True):
            assert (
                own.data.shape == block.data.shape[::-1]
            )  # every device has the block that it had
            assert own.index == block.index[::-1]
        for scales in (tensor.scale, tensor.zero, tensor.group_scale):
            if scales is not None:
                cut = scales.sharding.shard_shape(scales.shape)
                assert all(
                    s == n or s * v == n * b
                    for s, n, v, b in zip(
                        cut,
                        scales.shape,
                        tensor.values.shape,
                        tensor.values.sharding.shard_shape(tensor.values.shape),
                        strict=True,
                    )
                )
    expected = jax.jit(run)(qparams, x)
    same(jax.jit(run)(moved, jax.device_put(x, NamedSharding(mesh(), P("data")))), expected, 1e-2)
    assert distance(expected, relu_mlp(params, x)) > 1e-4


def grouped(length, group, scheme=INT4):
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(length, 8)}, normal(4, length)
    return (
        fn,
        sq.quantize(
            params,
            sq.calibrate(fn, params, [x]),
            scheme.replace(weight=scheme.weight.replace(group_size=group)),
        ),
        x,
    )


@pytest.mark.parametrize("scheme", [INT4, TWO_LEVEL, sq.W8A8], ids=["int4", "two_level", "int8"])
@pytest.mark.slow
def test_groups_that_devices_would_cut_are_refused_with_the_sizes_that_fit(scheme):
    fn, qparams, x = grouped(192, 64, scheme)
    cut = {"w": NamedSharding(mesh(), P("model"))}
    with pytest.raises(
        ValueError,
        match=r"^w: its 192 .* 2 blocks of whole groups of 64; .* divides 96: 16, 32, 96$",
    ):
        sq.shardings(qparams, cut)
    fn, fitting, x = grouped(192, 32, scheme)
    found = sq.shardings(fitting, cut)
    same(
        jax.jit(sq.quantized(fn))(jax.device_put(fitting, found), x),
        jax.jit(sq.quantized(fn))(fitting, x),
    )
    sq.shardings(qparams, {"w": NamedSharding(mesh(), P(None, "model"))})
    sq.shardings(grouped(64, 64, scheme)[1], cut)  # one group is no group


@pytest.mark.parametrize("scheme", [INT4, TWO_LEVEL, sq.W8A8], ids=["int4", "two_level", "int8"])
@pytest.mark.slow
def test_a_shard_map_that_cuts_groups_is_refused_and_one_that_does_not_is_right(scheme):
    """120 channels in groups of 64: two groups for two devices, but not 60 channels each."""
    over_devices = jax.shard_map(
        lambda p, x: lax.psum(x @ p["w"], "model"),
        mesh=mesh(),
        in_specs=({"w": P("model")}, P(None, "model")),
        out_specs=P(),
    )
    _, qparams, x = grouped(120, 64, scheme)
    with pytest.raises(ValueError, match=r"^w: its 120 contracted channels .* divides 60"):
        sq.quantized(over_devices)(qparams, x)
    fn, qparams, x = grouped(128, 32, scheme)
    got, expected = jax.jit(sq.quantized(over_devices))(qparams, x), sq.quantized(fn)(qparams, x)
    assert distance(got, expected) < (
        1e-5 if scheme.activation is None else 0.02
    )  # per token and device


@pytest.mark.slow
def test_a_stack_over_devices():
    fn = lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"])
    params, x = (
        {"w": normal(4, 64, 8)},
        normal(4, 5, 64) * jnp.where(jnp.arange(64) == 5, 9.0, 1.0)[None, None, :],
    )
    stats = sq.calibrate(fn, params, [x])
    for scheme in (TWO_LEVEL, sq.W8A8_O3.replace(smoothing=0.5, outliers=3.0)):
        qparams = sq.quantize(params, stats, scheme)
        found = sq.shardings(qparams, {"w": NamedSharding(mesh(), P("data", "model"))})
        moved = jax.device_put(qparams, found)
        assert isinstance(moved["w"].outliers, Outliers | None)
        same(jax.jit(sq.quantized(fn))(moved, x), jax.jit(sq.quantized(fn))(qparams, x), 1e-2)
