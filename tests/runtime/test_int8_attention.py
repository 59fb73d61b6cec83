"""int8 attention: the batched matmuls of two activations on int8, against numpy with int64 sums."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax
from slow import slow_but

import sqjax as sq
from sqjax.numerics.dots import LONGEST_CONTRACTION, int8_dot

GRANULARITIES = ["per_token", "per_tensor"]
granularities = pytest.mark.parametrize("granularity", GRANULARITIES)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def cosine(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def relative_error(got, expected):
    return np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


def in_numpy(lhs, rhs, formula, shared, granularity):
    """einsum on integers; `shared`: the axes (of lhs, of rhs) that are summed over."""
    sides = []
    for x, axes in ((lhs, shared[0]), (rhs, shared[1])):
        x = np.asarray(x, np.float64)
        scale = (
            np.abs(x).max(axis=axes if granularity == "per_token" else None, keepdims=True) / 127
        )
        scale = np.where(scale == 0, 1.0, scale)
        sides.append(
            (
                np.clip(np.rint(x / scale), -127, 127).astype(np.int64),
                np.broadcast_to(scale, x.shape),
            )
        )
    (q_l, s_l), (q_r, s_r) = sides
    scales = [s.take([0], axis=a[0]) for s, a in ((s_l, shared[0]), (s_r, shared[1]))]
    return np.einsum(formula, q_l, q_r) * np.einsum(formula, *scales)


def settled(x, axes):
    """Zeros in place of what is nearly halfway between two integers times either scale."""
    x = np.array(x, np.float32)
    for axis in (axes, None):
        r = x.astype(np.float64) / (
            np.abs(x).max(axis=axis, keepdims=True).astype(np.float64) / 127
        )
        x[np.rint(r * (1 + 1e-5)) != np.rint(r * (1 - 1e-5))] = 0
    return x


EINSUMS = {  # formula, shapes, summed axes
    "scores": ("bhqd,bhkd->bhqk", (2, 3, 5, 8), (2, 3, 7, 8), ((3,), (3,))),
    "values": ("bhqk,bhkd->bhqd", (2, 3, 5, 7), (2, 3, 7, 8), ((3,), (2,))),
    "heads inside": ("bqhd,bkhd->bhqk", (2, 5, 3, 8), (2, 7, 3, 8), ((3,), (3,))),
    "other order of batch axes": ("hqbd,bkhd->bhqk", (3, 5, 2, 8), (2, 7, 3, 8), ((3,), (3,))),
    "batch last": ("qdb,kdb->bqk", (5, 8, 2), (7, 8, 2), ((1,), (1,))),
    "no free axis": ("bd,bkd->bk", (2, 8), (2, 7, 8), ((1,), (2,))),
    "grouped queries": ("bqghd,bkgd->bghqk", (2, 5, 2, 3, 8), (2, 7, 2, 8), ((4,), (3,))),
}


#: Those that run without `jit` too, where each operation is compiled by itself.
EAGER = ["grouped queries"]


@pytest.mark.parametrize("granularity", slow_but(["per_tensor", "per_token"]))
@pytest.mark.slow
def test_a_batched_matmul_is_the_scaled_integer_product(granularity):
    """Every form of it in one program."""
    operands, expected = {}, {}
    for name, (formula, left, right, shared) in EINSUMS.items():
        rows = 4.0 ** jnp.arange(float(left[0])).reshape(-1, *[1] * (len(left) - 1))
        x = jnp.asarray(settled(normal(*left) * rows, shared[0]))
        y = jnp.asarray(settled(normal(*right, seed=1), shared[1]))
        operands[name] = x, y
        expected[name] = in_numpy(x, y, formula, shared, granularity)
    fn = lambda p, pairs: {
        name: jnp.einsum(EINSUMS[name][0], x, y) * p["gain"] for name, (x, y) in pairs.items()
    }
    params = {"gain": jnp.ones(())}
    fast = sq.int8_attention(fn, granularity)
    got = jax.jit(fast)(params, operands)
    eager = fast(params, {name: operands[name] for name in EAGER})
    for name, (x, y) in operands.items():
        exact = np.einsum(EINSUMS[name][0], np.asarray(x, np.float64), np.asarray(y, np.float64))
        assert got[name].dtype == jnp.float32
        close = np.abs(expected[name]).max() * 1e-6
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, atol=close, err_msg=name)
        assert 1e-4 < relative_error(expected[name], exact) < 0.05
    for name, result in eager.items():
        np.testing.assert_allclose(result, got[name], rtol=1e-6, err_msg=name)
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(fast, params, operands))]
    assert dots == [jaxprs.INT8_DOT] * len(EINSUMS)


@granularities
def test_batch_axes_may_come_in_any_order(granularity):
    rows = 4.0 ** jnp.arange(6.0).reshape(2, 3, 1, 1)
    x, y = normal(2, 3, 5, 8) * rows, normal(3, 2, 7, 8, seed=1) * rows.transpose(1, 0, 2, 3)
    x, y = (jnp.asarray(settled(a, 3)) for a in (x, y))
    got = jax.jit(int8_dot, static_argnums=(0, 1))(
        (((3,), (3,)), ((0, 1), (1, 0))), granularity, x, y
    )
    expected = in_numpy(x, y, "abqd,bakd->abqk", ((3,), (3,)), granularity)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
def test_granularities_differ_by_row():
    x, y = normal(1, 4, 16) * 10.0 ** -jnp.arange(4.0)[None, :, None], normal(1, 6, 16, seed=1)
    dims = (((2,), (2,)), ((0,), (0,)))
    exact = lax.dot_general(x, y, dims)
    errors = {g: np.abs(int8_dot(dims, g, x, y) - exact).max((0, 2)) for g in GRANULARITIES}
    assert errors["per_token"][3] < errors["per_tensor"][3] / 20


def attention(p, x):
    """Two heads, causal; four sites and two batched matmuls."""
    q, k, v = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / x.dtype.type(2.0)
    mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, x.dtype.type(-1e30)), axis=-1)
    return x + jnp.einsum("bhqk,bkhd,hdc->bqc", weights, v, p["o"])


def layer(seed=0, dtype=jnp.float32):
    shapes = {"q": (16, 2, 8), "k": (16, 2, 8), "v": (16, 2, 8), "o": (2, 8, 16)}
    return {
        name: normal(*shape, seed=seed + i, dtype=dtype) / 4
        for i, (name, shape) in enumerate(shapes.items())
    }


@granularities
def test_attention_runs_its_two_batched_matmuls_in_int8_and_nothing_else(granularity):
    params, x = layer(), normal(2, 6, 16, seed=9)
    fast = sq.int8_attention(attention, granularity)
    dots = [dot.dtypes for dot in jaxprs.dots(jaxprs.of(fast, params, x))]
    assert dots.count(jaxprs.INT8_DOT) == 2
    assert dots.count(("float32",) * 3) == 4
    got, expected = jax.jit(fast)(params, x), attention(params, x)
    assert 1e-5 < relative_error(got, expected) < 0.03


@pytest.mark.slow
@granularities
def test_gradients_are_those_of_the_float_attention(granularity):
    params, x, g = layer(), normal(2, 6, 16, seed=9), normal(2, 6, 16, seed=10)
    grads = [
        jax.jit(jax.grad(lambda p, x, fn=fn: jnp.sum(fn(p, x) * g), argnums=(0, 1)))(params, x)
        for fn in (sq.int8_attention(attention, granularity), attention)
    ]
    for got, expected in zip(*map(jax.tree.leaves, grads), strict=True):
        assert cosine(got, expected) > 0.99
        assert not np.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.slow
def test_the_derivative_of_a_product_is_that_of_the_float_product(operand):
    x, y, g = normal(2, 5, 8), normal(2, 7, 8, seed=1), normal(2, 5, 7, seed=2)
    dims = (((2,), (2,)), ((0,), (0,)))
    got = jax.grad(lambda *a: jnp.sum(int8_dot(dims, "per_token", *a) * g), argnums=operand)(x, y)
    expected = jax.grad(lambda *a: jnp.sum(lax.dot_general(*a, dims) * g), argnums=operand)(x, y)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_scan_over_layers_runs_in_int8():
    stack = jax.tree.map(lambda *a: jnp.stack(a), layer(0), layer(4))
    model = lambda p, x: lax.scan(lambda x, one: (attention(one, x), None), x, p)[0]
    program = jaxprs.of(sq.int8_attention(model), stack, normal(2, 6, 16))
    assert [dot.dtypes for dot in jaxprs.dots(program)].count(jaxprs.INT8_DOT) == 2


@pytest.mark.slow
@pytest.mark.every_case
def test_a_scan_over_layers_is_each_of_them():
    stack = jax.tree.map(lambda *a: jnp.stack(a), layer(0), layer(4), layer(8))
    model = lambda p, x: lax.scan(lambda x, one: (attention(one, x), None), x, p)[0]
    x = normal(2, 6, 16, seed=9)
    fast = sq.int8_attention(model)
    got, expected = jax.jit(fast)(stack, x), x
    for i in range(3):
        expected = sq.int8_attention(attention)(jax.tree.map(lambda a, i=i: a[i], stack), expected)
    np.testing.assert_allclose(
        got, expected, rtol=1e-3, atol=2e-3
    )  # ulps of one layer may move a code of the next
    assert relative_error(got, model(stack, x)) < 0.05


@pytest.mark.parametrize(
    "order",
    [
        "attention of quantized",
        pytest.param("quantized of attention", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_composes_with_quantized_weights(order):
    params, x = layer(), normal(2, 6, 16, seed=9)
    qparams = sq.quantize(params, sq.calibrate(attention, params, [x]))
    if order == "attention of quantized":
        both = sq.int8_attention(sq.quantized(attention))
    else:
        both = sq.quantized(sq.int8_attention(attention))
    assert [dot.dtypes for dot in jaxprs.dots(jaxprs.of(both, qparams, x))] == [jaxprs.INT8_DOT] * 6
    assert 1e-4 < relative_error(jax.jit(both)(qparams, x), attention(params, x)) < 0.05


def test_stacks_of_experts_stay_as_they_are():
    stacks = {
        "as they are": lambda p: p["w"],
        "computed": lambda p: jnp.tanh(p["w"] * 2.0).swapaxes(1, 2).swapaxes(1, 2) + p["w"],
    }
    params, x = {"w": normal(2, 8, 4)}, normal(2, 5, 8, seed=1)
    for stack in stacks.values():
        experts = lambda p, x, stack=stack: jnp.einsum("eti,eio->eto", x, stack(p))
        fast = sq.int8_attention(experts)
        assert [dot.dtypes for dot in jaxprs.dots(jaxprs.of(fast, params, x))] == [("float32",) * 3]
        np.testing.assert_array_equal(fast(params, x), experts(params, x))


@pytest.mark.slow
def test_half_precision_keeps_its_dtype_and_scales_in_float32():
    params, x = layer(dtype=jnp.bfloat16), normal(2, 6, 16, seed=9, dtype=jnp.bfloat16)
    got = jax.jit(sq.int8_attention(attention))(params, x)
    assert got.dtype == jnp.bfloat16
    wide = attention(jax.tree.map(lambda a: a.astype(jnp.float32), params), x.astype(jnp.float32))
    assert relative_error(got.astype(jnp.float32), wide) < 0.05
    dims = (((2,), (2,)), ((0,), (0,)))
    exact = [normal(1, 3, 8, seed=s, dtype=jnp.bfloat16) for s in (0, 1)]
    one, other = (
        int8_dot(dims, "per_token", *(a.astype(d) for a in exact))
        for d in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_zero_rows_give_zeros():
    x, y = normal(1, 4, 8).at[0, 2].set(0.0), normal(1, 5, 8, seed=1)
    for granularity in GRANULARITIES:
        got = int8_dot((((2,), (2,)), ((0,), (0,))), granularity, x, y)
        assert not np.any(got[0, 2])
        assert np.isfinite(got).all()
        assert not np.any(int8_dot((((2,), (2,)), ((0,), (0,))), granularity, x * 0.0, y))


def test_longer_sums_than_int32_holds_are_refused():
    scores = lambda p, x, y: jnp.einsum("bqd,bkd->bqk", x, y) * p["gain"]
    params = {"gain": jax.ShapeDtypeStruct((), jnp.float32)}
    long = jax.ShapeDtypeStruct((1, 1, LONGEST_CONTRACTION + 1), jnp.float32)
    with pytest.raises(
        ValueError, match=r"^int8_attention: dot_general sums over 133145 products; .* up to 133144"
    ):
        jax.eval_shape(sq.int8_attention(scores), params, long, long)
    fits = jax.ShapeDtypeStruct((1, 1, LONGEST_CONTRACTION), jnp.float32)
    assert jax.eval_shape(sq.int8_attention(scores), params, fits, fits).shape == (1, 1, 1)


@pytest.mark.slow
def test_a_second_call_compiles_nothing():
    params, x = layer(), normal(2, 6, 16, seed=9)
    fast = jax.jit(sq.int8_attention(attention))
    fast(params, x)
    fast(layer(3), 2 * x)
    assert fast._cache_size() == 1
