"""`quantized(fn)`: any function on quantized leaves, in int8 where it multiplies them, refusing what it can not do."""

import re
from dataclasses import replace

import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import schemes_in_numpy as oracle
from flax import linen as nn
from flax import nnx

import sqjax as sq
from sqjax.models import LlamaConfig, Model

SCHEMES = {"O1": sq.W8A8_O1, "O2": sq.W8A8_O2, "O3": sq.W8A8_O3}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def quantize(fn, params, *inputs, scheme=sq.W8A8):
    return sq.quantize(params, sq.calibrate(fn, params, [inputs]), scheme)


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


def check(fn, params, *inputs, scheme=sq.W8A8, sites=None):
    """fn on the quantized tree: close to the float result but not equal to it, every matmul of a leaf in int8."""
    qparams = quantize(fn, params, *inputs, scheme=scheme)
    expected, got = fn(params, *inputs), jax.jit(sq.quantized(fn))(qparams, *inputs)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert 1e-4 < relative_error(got, expected) < 0.06
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(sq.quantized(fn), qparams, *inputs))]
    assert dots.count(jaxprs.INT8_DOT) == (len(dots) if sites is None else sites)
    return qparams


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="down")(nn.gelu(nn.Dense(32, name="up")(x)))


def linen_net():
    x = normal(5, 16)
    params = Net().init(jax.random.key(0), x)["params"]
    return (lambda params, x: Net().apply({"params": params}, x)), params, x


# The numbers ------------------------------------------------------------------------------------------------------

ONE_MATMUL = {
    "x @ w": (lambda p, x: x @ p["w"], (16, 8)),
    "x @ w.T": (lambda p, x: x @ p["w"].T, (8, 16)),
    "w @ x.T": (lambda p, x: (p["w"] @ x.T).T, (8, 16)),
    "w.T @ x.T": (lambda p, x: (p["w"].T @ x.T).T, (16, 8)),
    "einsum": (lambda p, x: jnp.einsum("ti,oi->to", x, p["w"]), (8, 16)),
    "einsum, weight first": (lambda p, x: jnp.einsum("io,ti->to", p["w"], x), (16, 8)),
    "nested jit": (lambda p, x: jax.jit(lambda w, x: jax.jit(jnp.dot)(x, w))(p["w"], x), (16, 8)),
    "remat": (lambda p, x: jax.checkpoint(lambda w, x: x @ w)(p["w"], x), (16, 8)),
}


ALL_SCHEMES = {**SCHEMES, "per_tensor": sq.Scheme(weight=sq.Int8(per_tensor=True))}


@pytest.mark.parametrize(
    ("case", "scheme"),
    [*((case, "O1") for case in ONE_MATMUL), *(("x @ w.T", s) for s in ALL_SCHEMES if s != "O1")],
)
def test_a_matmul_is_the_integer_product_of_numpy(case, scheme):
    (fn, shape), scheme = ONE_MATMUL[case], ALL_SCHEMES[scheme]
    x = numpy_int8.away_from_ties(
        normal(5, 16), 1 if isinstance(scheme.activation, sq.PerToken) else None
    )
    contracted = shape.index(16)
    w = numpy_int8.away_from_ties(
        normal(*shape, seed=1), contracted if scheme.weight.granularity == "per_channel" else None
    )
    qparams = quantize(fn, {"w": jnp.asarray(w)}, jnp.asarray(x), scheme=scheme)
    expected = numpy_int8.matmul(
        x,
        w if contracted == 0 else w.T,
        1 if isinstance(scheme.activation, sq.PerToken) else None,
        0 if scheme.weight.granularity == "per_channel" else None,
    )
    got = jax.jit(sq.quantized(fn))(qparams, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert relative_error(fn({"w": jnp.asarray(w)}, x), expected) > 1e-4


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_a_weight_on_the_left_keeps_the_order_of_the_result(batch):
    fn = lambda p, x: jax.lax.dot_general(
        p["w"], x, (((1,), (x.ndim - 1,)), ((), ()))
    )  # (a, c) then x's free axes
    params, x = {"w": normal(4, 16, 3)}, normal(*batch, 5, 16, seed=1)
    qparams = check(fn, params, x)
    assert jax.jit(sq.quantized(fn))(qparams, x).shape == (4, 3, *batch, 5)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_linen_network(scheme):
    fn, params, x = linen_net()
    qparams = check(fn, params, x, scheme=scheme, sites=2)
    assert qparams["up"]["bias"] is params["up"]["bias"]
    assert qparams["up"]["kernel"].tensor.values.shape == (32, 16)


def test_an_nnx_network():
    class Module(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.gelu(self.up(x)))

    graphdef, state = nnx.split(Module(nnx.Rngs(0)))
    check(lambda state, x: nnx.merge(graphdef, state)(x), state, normal(5, 16), sites=2)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(23, 16, name="embed")
        return embed.attend(nn.LayerNorm()(embed(ids)))


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
def test_tied_embeddings_are_gathered_and_multiplied_as_int8(weights):
    ids = jnp.asarray([[0, 5, 22], [7, 7, 1]])
    params = Tied().init(jax.random.key(0), ids)["params"]
    fn = lambda params, ids: Tied().apply({"params": params}, ids)
    qparams = check(
        fn,
        params,
        ids,
        scheme=sq.Scheme(weight=oracle.with_granularity(sq.Int8(), weights)),
        sites=1,
    )
    program = jaxprs.of(sq.quantized(fn), qparams, ids)
    assert jaxprs.largest_float(program) < 23 * 16
    gathered = [e for e in jaxprs.equations(program) if e.primitive.name == "gather"]
    assert "int8" in {e.outvars[0].aval.dtype.name for e in gathered}


def test_a_jax_checkpointed_and_custom_derivative_matmul_runs_in_int8():
    @jax.custom_vjp
    def vjp(w, x):
        return x @ w

    vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))

    @jax.custom_jvp
    def jvp(w, x):
        return x @ w

    jvp.defjvp(lambda primals, tangents: (jvp(*primals), jvp(*primals)))
    fn = lambda p, x: jax.checkpoint(jvp)(p["b"], jnp.tanh(vjp(p["a"], x)))
    check(fn, {"a": normal(16, 12), "b": normal(12, 8, seed=1)}, normal(5, 16, seed=2), sites=2)


@pytest.mark.parametrize("tie", [False, True])
def test_a_llama_runs_every_weight_in_int8_and_holds_no_float_copy(tie):
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tie_embeddings=tie,
    )
    model, ids = Model(config), jnp.asarray([[3, 1, 47]])
    params = jax.jit(model.init)(jax.random.key(0))
    qparams = quantize(model.apply, params, ids)
    is_site = lambda path: path[-1].key == "kernel" or (tie and path[-1].key == "embedding")
    sites = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if is_site(path)]
    smallest = 32 * 16  # k_proj; the activations have at most 3 x 64 elements
    program = jaxprs.of(sq.quantized(model.apply), qparams, ids)
    int8 = [dot for dot in jaxprs.dots(program) if dot.dtypes == jaxprs.INT8_DOT]
    attention = [dot for dot in jaxprs.dots(program) if dot.dtypes != jaxprs.INT8_DOT]
    assert len(int8) == len(sites) == 14 + 1
    assert (
        len(attention) == 2 * config.num_layers
    )  # q . k and probabilities . v multiply two activations
    assert jaxprs.widened(program, larger_than=smallest - 1) == []
    if tie:
        assert jaxprs.largest_float(program) < smallest
    else:  # the embedding is no matmul's weight: it stays float, the largest float there is
        assert jaxprs.largest_float(program) == 48 * 32
    logits = jax.jit(sq.quantized(model.apply))(qparams, ids)
    assert 1e-4 < relative_error(logits, jax.jit(model.apply)(params, ids)) < 0.1


def test_a_leaf_that_is_contracted_along_different_axes_stays_float():
    fn = lambda p, x: jnp.tanh(x @ p["tied"]) @ p["tied"].T @ p["head"]
    qparams = check(
        fn, {"tied": normal(16, 12), "head": normal(16, 8, seed=1)}, normal(5, 16, seed=2), sites=1
    )
    assert isinstance(qparams["tied"], jax.Array)


def test_numpy_parameters_are_quantized_too():
    params, x = {"w": np.asarray(normal(16, 8))}, normal(5, 16)
    fn = lambda p, x: x @ p["w"]
    qparams = check(fn, params, x)
    expected = quantize(fn, jax.tree.map(jnp.asarray, params), x)
    jax.tree.map(np.testing.assert_array_equal, qparams, expected)


# Dtypes -----------------------------------------------------------------------------------------------------------


def test_bfloat16_parameters_give_bfloat16():
    fn, params, x = linen_net()
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    qparams = quantize(fn, params, x.astype(jnp.bfloat16))
    got = jax.jit(sq.quantized(fn))(qparams, x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert 0 < relative_error(got, fn(params, x.astype(jnp.bfloat16))) < 0.06
    assert qparams["up"]["kernel"].tensor.scale.dtype == jnp.float32


def test_the_result_has_the_dtype_that_the_function_asked_for():
    fn = lambda p, x: jnp.dot(x, p["w"], preferred_element_type=jnp.float32)
    assert check(fn, {"w": normal(64, 8, dtype=jnp.bfloat16)}, normal(5, 64, dtype=jnp.bfloat16))
    cast = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    qparams = quantize(cast, {"w": normal(64, 8)}, normal(5, 64))
    assert jax.jit(sq.quantized(cast))(qparams, normal(5, 64)).dtype == jnp.bfloat16


# Transformations --------------------------------------------------------------------------------------------------


def test_jit_equals_eager():
    fn, params, x = linen_net()
    qparams = quantize(fn, params, x)
    eager = sq.quantized(fn)(qparams, x)
    np.testing.assert_allclose(jax.jit(sq.quantized(fn))(qparams, x), eager, rtol=1e-2, atol=2e-3)
    assert relative_error(eager, fn(params, x)) > 1e-4


def test_vmap_over_inputs_is_the_batch():
    fn, params, x = linen_net()
    qparams = quantize(fn, params, x)
    rows = jax.jit(jax.vmap(sq.quantized(fn), (None, 0)))(qparams, x)
    np.testing.assert_allclose(rows, jax.jit(sq.quantized(fn))(qparams, x), rtol=1e-2, atol=2e-3)
    assert relative_error(rows, fn(params, x)) > 1e-4


def test_the_gradient_of_the_inputs_is_the_float_one():
    fn, params, x = linen_net()
    qparams, g = quantize(fn, params, x), normal(5, 8, seed=3)
    loss = lambda run: lambda x: jnp.sum(run(x) * g)
    got = jax.jit(jax.grad(loss(lambda x: sq.quantized(fn)(qparams, x))))(x)
    expected = jax.grad(loss(lambda x: fn(params, x)))(x)
    assert not np.array_equal(got, expected)
    cosine = jnp.sum(got * expected) / jnp.linalg.norm(got) / jnp.linalg.norm(expected)
    assert 0.99 < cosine < 1 - 1e-7


@jax.custom_vjp
def reversed_gradient(x):
    return jnp.tanh(x)


reversed_gradient.defvjp(lambda x: (jnp.tanh(x), ()), lambda saved, g: (-g,))


def test_custom_gradients_survive():
    fn = lambda p, x: reversed_gradient(x * p["gain"]) @ p["w"]
    params, x = {"gain": jnp.full((1, 16), 2.0), "w": normal(16, 8)}, normal(5, 16, seed=1)
    total = lambda run: lambda x: jnp.sum(run(x))
    expected = jax.grad(total(lambda x: fn(params, x)))(x)
    np.testing.assert_array_equal(
        jax.grad(total(lambda x: sq.quantized(fn)(params, x)))(x), expected
    )
    qparams = quantize(fn, params, x)
    got = jax.grad(total(lambda x: sq.quantized(fn)(qparams, x)))(x)
    effective = sq.dequantize(qparams["w"].tensor)
    np.testing.assert_allclose(
        got, -2 * jnp.broadcast_to(effective.sum(1), x.shape), rtol=1e-5, atol=1e-5
    )


def test_a_float_tree_gives_what_the_function_gives():
    fn, params, x = linen_net()
    np.testing.assert_array_equal(sq.quantized(fn)(params, x), fn(params, x))
    np.testing.assert_array_equal(jax.jit(sq.quantized(fn))(params, x), jax.jit(fn)(params, x))
    program = jaxprs.of(sq.quantized(fn), params, x)
    assert {dot.dtypes for dot in jaxprs.dots(program)} == {("float32",) * 3}
    grads = [
        jax.grad(lambda p, run=run: jnp.sum(run(p, x) ** 2))(params)
        for run in (fn, sq.quantized(fn))
    ]
    jax.tree.map(np.testing.assert_array_equal, *grads)


# Calls ------------------------------------------------------------------------------------------------------------


def test_the_same_function_gives_the_same_wrapper_and_is_traced_once():
    traces = []

    def fn(params, x):
        traces.append(1)
        return x @ params["w"]

    qparams = quantize(fn, {"w": normal(16, 8)}, normal(5, 16))
    assert sq.quantized(fn) is sq.quantized(fn)
    assert sq.quantized(fn).__name__ == "fn"
    traces.clear()
    results = [
        jax.jit(sq.quantized(fn))(qparams, x) for x in (normal(5, 16), normal(5, 16, seed=1))
    ]
    assert len(traces) == 1
    assert not np.array_equal(*results)
    jax.jit(sq.quantized(fn))(qparams, normal(6, 16))
    assert len(traces) == 2  # another shape


def test_the_same_bound_method_gives_the_same_wrapper():
    model = Model(LlamaConfig(8, 8, 8, 1, 1, 1, 8))
    assert sq.quantized(model.apply) is sq.quantized(model.apply)


def test_a_function_that_can_not_be_hashed_works():
    class Fn:
        __hash__ = None

        def __call__(self, params, x):
            return x @ params["w"]

    fn = Fn()
    check(fn, {"w": normal(16, 8)}, normal(5, 16))


def test_keywords_and_python_values_reach_the_function():
    def fn(params, x, shift=None, *, double: bool, mode: str, extra=None):
        assert isinstance(double, bool)
        y = x @ params["w"]
        y = y if shift is None else y + shift
        return {"y": 2 * y if double else y, "mode": jnp.int32(mode == "a"), "extra": extra}

    params, x, shift = {"w": normal(16, 8)}, normal(5, 16), jnp.full((1, 8), 100.0)
    qparams = quantize(lambda p, x: x @ p["w"], params, x)
    base = sq.quantized(fn)(qparams, x, double=False, mode="a")
    assert base["mode"] == 1
    assert base["extra"] is None
    assert 1e-4 < relative_error(base["y"], x @ params["w"]) < 0.06
    got = sq.quantized(fn)(qparams, x, shift, double=True, mode="b", extra=np.arange(3))
    np.testing.assert_allclose(got["y"], 2 * (base["y"] + 100), rtol=1e-6)
    assert got["mode"] == 0
    assert got["extra"].tolist() == [0, 1, 2]
    by_name = jax.jit(lambda p, x, s: sq.quantized(fn)(p, x, shift=s, double=True, mode="b"))(
        qparams, x, shift
    )
    np.testing.assert_allclose(by_name["y"], got["y"], rtol=1e-6)


# Rows of an embedding ---------------------------------------------------------------------------------------------

TAKES = {
    "default": lambda table, ids: jnp.take(table, ids, axis=0),
    "fill 5": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill", fill_value=5.0),
    "fill 0": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill", fill_value=0.0),
    "clip": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "wrap": lambda table, ids: jnp.take(table, ids, axis=0, mode="wrap"),
    "index": lambda table, ids: table[ids],
    "at": lambda table, ids: table.at[ids].get(mode="fill"),
}


@pytest.mark.parametrize("shape", [(6, 8), (6, 2, 4)])
@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("take", TAKES)
def test_rows_are_those_of_the_dequantized_table_out_of_range_too(take, weights, shape):
    axes = tuple(range(1, len(shape)))
    head = lambda p, x: jnp.tensordot(x, p["table"], (axes, axes))
    fn = lambda p, ids: TAKES[take](p["table"], ids)
    qparams = quantize(
        head,
        {"table": normal(*shape)},
        normal(5, *shape[1:]),
        scheme=sq.Scheme(weight=oracle.with_granularity(sq.Int8(), weights)),
    )
    ids = jnp.asarray([[0, 5, 3], [-1, 6, -100], [1000, -6, -7]])
    expected = fn({"table": sq.dequantize(qparams["table"].tensor)}, ids)
    assert np.isnan(expected).any() == (take in ("default", "at"))
    np.testing.assert_array_equal(jax.jit(sq.quantized(fn))(qparams, ids), expected)
    assert not np.array_equal(expected, fn({"table": normal(*shape)}, ids))


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


def test_rows_of_a_cast_table_are_refused():
    fn = lambda p, ids: p["table"][ids]
    weight = quantize(lambda p, x: x @ p["table"].T, {"table": normal(6, 4)}, normal(3, 4))
    cast = jax.tree.map(lambda a: a.astype(jnp.float32), weight)
    with pytest.raises(ValueError, match="table: not a valid QTensor"):
        sq.quantized(fn)(cast, jnp.asarray([1]))


# Refusals ---------------------------------------------------------------------------------------------------------


REFUSED = {  # primitive, a function that meets the leaf with it
    "integer_pow": lambda p, x: x @ p["net"]["w"] ** 2,
    "mul": lambda p, x: x @ (2.0 * p["net"]["w"]),
    "add": lambda p, x: x @ (p["net"]["w"] + p["net"]["w"]),
    "reshape": lambda p, x: (
        x @ p["net"]["w"].reshape(8, 32)[:, :16].reshape(16, 8)
    ),  # mixes rows and columns
    "sin": lambda p, x: x @ jnp.sin(p["net"]["w"]),
    "reduce_sum": lambda p, x: x @ p["net"]["w"] + jnp.sum(p["net"]["w"]),
    "concatenate": lambda p, x: x @ jnp.concatenate([p["net"]["w"], p["net"]["w"]], 1),
    "scan": lambda p, x: jax.lax.scan(lambda w, _: (w.T, None), p["net"]["w"], None, length=2)[
        0
    ],  # carried
    "gather": lambda p, x: (
        x @ p["net"]["w"] + p["net"]["w"][jnp.array([1])]
    ),  # rows, but stored by columns
    "convert_element_type": lambda p, x: (
        x @ p["net"]["w"] + p["net"]["w"].astype(jnp.int32)[0, 0].astype(jnp.float32)
    ),
    "dot_general": lambda p, x: x @ (p["net"]["w"] @ p["net"]["w"]),
}


@pytest.mark.parametrize("primitive", REFUSED)
def test_a_primitive_without_a_rule_is_refused_by_name_leaf_and_line(primitive):
    fn = REFUSED[primitive]
    params, x = {"net": {"w": normal(16, 16)}}, normal(5, 16)
    qparams = quantize(lambda p, x: x @ p["net"]["w"], params, x)
    line = fn.__code__.co_firstlineno
    message = rf"^net/w: quantized, but `{primitive}` at \S*test_execution.py:{line}.*has no rule.*'net/w': None"
    with pytest.raises(ValueError, match=message):
        jax.jit(sq.quantized(fn))(qparams, x)


def test_the_refusal_says_how_to_go_on():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] ** 2
    params, x = {"a": normal(16, 16), "b": normal(16, 16)}, normal(5, 16)
    stats = sq.calibrate(lambda p, x: (x @ p["a"]) @ p["b"], params, [x])
    with pytest.raises(ValueError, match=re.escape("quantize(params, stats, {'b': None, ...})")):
        sq.quantized(fn)(sq.quantize(params, stats), x)
    qparams = sq.quantize(params, stats, {"b": None, "": sq.W8A8})
    assert 1e-4 < relative_error(sq.quantized(fn)(qparams, x), fn(params, x)) < 0.06


def test_a_returned_leaf_is_refused():
    fn = lambda p, x: (x @ p["w"], p["w"])
    qparams = quantize(lambda p, x: x @ p["w"], {"w": normal(16, 8)}, normal(5, 16))
    with pytest.raises(ValueError, match=r"^w: fn returns this quantized leaf; keep it in float"):
        sq.quantized(fn)(qparams, normal(5, 16))


def test_batch_axes_that_the_weight_was_not_quantized_for_are_refused_by_leaf():
    """Here one scale is shared by all rows of w, so a batch along them has no matrices of its own."""
    fn = lambda p, x: jnp.einsum("bi,bio->bo", x, p["experts"])
    shared = lambda p, x: jnp.einsum("bi,bio->o", x, p["experts"])
    params, x = {"experts": normal(2, 16, 8)}, normal(2, 16)
    with pytest.raises(
        ValueError, match=r"^experts: contracted along its axes \(1,\) in a batch along \(0,\)"
    ):
        sq.quantized(fn)(quantize(shared, params, x), x)
    check(fn, params, x)


# Rules ------------------------------------------------------------------------------------------------------------


def kinds(qparams):
    """{path: how its activations are quantized, or None} of the kernels."""
    return {
        name: getattr(layer["kernel"], "activations", None)
        for name, layer in qparams.items()
        if "kernel" in layer
    }


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"": sq.W8A8_O2}, {"up": "per_tensor", "down": "per_tensor"}),
        ({"up": None, "": sq.W8A8}, {"up": None, "down": "per_token"}),  # the first match wins
        ({"": sq.W8A8, "up": None}, {"up": "per_token", "down": "per_token"}),
        ({"down/kernel$": sq.W8A8_O3}, {"up": None, "down": "static"}),  # unmatched stays float
        ({"^up": sq.W8A8_O2, "d[ow]+n": sq.W8A8_O1}, {"up": "per_tensor", "down": "per_token"}),
        ({"kernel": None}, {"up": None, "down": None}),
    ],
)
def test_the_first_rule_that_matches_a_site_decides(rules, expected):
    fn, params, x = linen_net()
    qparams = quantize(fn, params, x, scheme=rules)
    assert kinds(qparams) == expected
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(sq.quantized(fn), qparams, x))]
    assert dots.count(jaxprs.INT8_DOT) == sum(kind is not None for kind in expected.values())


def test_a_rule_that_matches_nothing_lists_near_misses():
    fn, params, x = linen_net()
    with pytest.raises(
        ValueError, match=r"quantize rule 'upp/kernel' matches nothing. Near misses: 'up/kernel'"
    ):
        quantize(fn, params, x, scheme={"upp/kernel": sq.W8A8})
    with pytest.raises(ValueError, match=r"'up/bias' matches nothing"):  # a leaf, but no site
        quantize(fn, params, x, scheme={"up/bias": sq.W8A8})


def test_a_rule_that_is_no_regular_expression_is_refused():
    fn, params, x = linen_net()
    with pytest.raises(ValueError, match=r"quantize rule 'up\(' is not a regular expression"):
        quantize(fn, params, x, scheme={"up(": sq.W8A8})
