"""`quantized(fn)`: the same function on quantized leaves; its dtypes, derivatives, calls and networks."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sqjax as sq
from sqjax.models import LlamaConfig, Model


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


def net(params, x):
    return Net().apply({"params": params}, x)


@pytest.fixture(scope="module")
def linen_net():
    """(params, input, statistics, W8A8 params) of `net`, calibrated once for all tests."""
    x = normal(5, 16)
    params = Net().init(jax.random.key(0), x)["params"]
    stats = sq.calibrate(net, params, [x])
    return params, x, stats, sq.quantize(params, stats)


# Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [
        sq.W8A8_O1,
        pytest.param(sq.W8A8_O2, marks=pytest.mark.slow),
        pytest.param(sq.W8A8_O3, marks=pytest.mark.slow),
    ],
    ids=["O1", "O2", "O3"],
)
@pytest.mark.slow
def test_a_linen_network(linen_net, scheme):
    params, x, stats, _ = linen_net
    qparams = sq.quantize(params, stats, scheme)
    got = jax.jit(sq.quantized(net))(qparams, x)
    assert 1e-4 < relative_error(got, net(params, x)) < 0.06
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(sq.quantized(net), qparams, x))]
    assert dots == [jaxprs.INT8_DOT] * 2
    assert qparams["up"]["bias"] is params["up"]["bias"]
    assert qparams["up"]["kernel"].tensor.values.shape == (32, 16)


@pytest.mark.slow
def test_an_nnx_network():
    class Module(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.gelu(self.up(x)))

    graphdef, state = nnx.split(Module(nnx.Rngs(0)))
    check(lambda state, x: nnx.merge(graphdef, state)(x), state, normal(5, 16), sites=2)


@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True])
def test_a_llama_runs_every_weight_in_int8_and_holds_no_float_copy(tie):
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
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
    assert len(int8) == len(sites) == 7 + 1
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


# Dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_parameters_give_bfloat16(linen_net):
    params, x, _, _ = linen_net
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    qparams = quantize(net, params, x.astype(jnp.bfloat16))
    got = jax.jit(sq.quantized(net))(qparams, x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert 0 < relative_error(got, net(params, x.astype(jnp.bfloat16))) < 0.06
    assert qparams["up"]["kernel"].tensor.scale.dtype == jnp.float32


@pytest.mark.slow
def test_the_result_has_the_dtype_that_the_function_asked_for():
    fn = lambda p, x: jnp.dot(x, p["w"], preferred_element_type=jnp.float32)
    assert check(fn, {"w": normal(64, 8, dtype=jnp.bfloat16)}, normal(5, 64, dtype=jnp.bfloat16))
    cast = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    qparams = quantize(cast, {"w": normal(64, 8)}, normal(5, 64))
    assert jax.jit(sq.quantized(cast))(qparams, normal(5, 64)).dtype == jnp.bfloat16


# Transformations --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jit_equals_eager(linen_net):
    params, x, _, qparams = linen_net
    eager = sq.quantized(net)(qparams, x)
    np.testing.assert_allclose(jax.jit(sq.quantized(net))(qparams, x), eager, rtol=1e-2, atol=2e-3)
    assert relative_error(eager, net(params, x)) > 1e-4


@pytest.mark.slow
def test_vmap_over_inputs_is_the_batch(linen_net):
    params, x, _, qparams = linen_net
    rows = jax.jit(jax.vmap(sq.quantized(net), (None, 0)))(qparams, x)
    np.testing.assert_allclose(rows, jax.jit(sq.quantized(net))(qparams, x), rtol=1e-2, atol=2e-3)
    assert relative_error(rows, net(params, x)) > 1e-4


@pytest.mark.slow
def test_the_gradient_of_the_inputs_is_the_float_one(linen_net):
    params, x, _, qparams = linen_net
    g = normal(5, 8, seed=3)
    loss = lambda run: lambda x: jnp.sum(run(x) * g)
    got = jax.jit(jax.grad(loss(lambda x: sq.quantized(net)(qparams, x))))(x)
    expected = jax.grad(loss(lambda x: net(params, x)))(x)
    assert not np.array_equal(got, expected)
    cosine = jnp.sum(got * expected) / jnp.linalg.norm(got) / jnp.linalg.norm(expected)
    assert 0.99 < cosine < 1 - 1e-7


@jax.custom_vjp
def reversed_gradient(x):
    return jnp.tanh(x)


reversed_gradient.defvjp(lambda x: (jnp.tanh(x), ()), lambda saved, g: (-g,))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_float_tree_gives_what_the_function_gives(linen_net):
    params, x, _, _ = linen_net
    np.testing.assert_array_equal(sq.quantized(net)(params, x), net(params, x))
    np.testing.assert_array_equal(jax.jit(sq.quantized(net))(params, x), jax.jit(net)(params, x))
    program = jaxprs.of(sq.quantized(net), params, x)
    assert {dot.dtypes for dot in jaxprs.dots(program)} == {("float32",) * 3}
    grads = [
        jax.grad(lambda p, run=run: jnp.sum(run(p, x) ** 2))(params)
        for run in (net, sq.quantized(net))
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


@pytest.mark.slow
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


# Rules of `quantize` ----------------------------------------------------------------------------------------------


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
def test_the_first_rule_that_matches_a_site_decides(linen_net, rules, expected):
    params, x, stats, _ = linen_net
    qparams = sq.quantize(params, stats, rules)
    assert kinds(qparams) == expected
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(sq.quantized(net), qparams, x))]
    assert dots.count(jaxprs.INT8_DOT) == sum(kind is not None for kind in expected.values())


def test_a_rule_that_matches_nothing_lists_near_misses(linen_net):
    params, _, stats, _ = linen_net
    with pytest.raises(
        ValueError, match=r"quantize rule 'upp/kernel' matches nothing. Near misses: 'up/kernel'"
    ):
        sq.quantize(params, stats, {"upp/kernel": sq.W8A8})
    with pytest.raises(ValueError, match=r"'up/bias' matches nothing"):  # a leaf, but no site
        sq.quantize(params, stats, {"up/bias": sq.W8A8})


def test_a_rule_that_is_no_regular_expression_is_refused(linen_net):
    params, _, stats, _ = linen_net
    with pytest.raises(ValueError, match=r"quantize rule 'up\(' is not a regular expression"):
        sq.quantize(params, stats, {"up(": sq.W8A8})
