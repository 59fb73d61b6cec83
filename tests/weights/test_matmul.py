"""Quantized matmuls: exact int32 sums, scaled in float32, with the gradient of the float matmul."""

from dataclasses import replace

import int8_in_numpy as numpy_int8
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import schemes_in_numpy as oracle
from jax import lax
from slow import slow_but

from sqjax.numerics.dots import LONGEST_CONTRACTION, narrow_dot
from sqjax.numerics.matrix import Matrix
from sqjax.numerics.weight_products import Recipe, product
from sqjax.weights.dot_general import quantized_dot_general
from sqjax.weights.qtensor import QTensor, dequantize
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.quantize import quantize_weight
from sqjax.weights.schemes import Int8, Scheme

DENSE = (((1,), (0,)), ((), ()))
ACTIVATIONS = ["per_token", "per_tensor", "static"]
WEIGHTS = ["per_channel", "per_tensor"]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def scheme_of(activations="per_token", weights="per_channel"):
    return Scheme(
        weight=Int8(per_tensor=weights == "per_tensor"),
        activation=oracle.activation_of(activations),
    )


def matrices(activations="per_token", weights="per_channel", rows=5, inner=48, outputs=7, seed=0):
    """x and w of very different rows and columns, so that every granularity gives another result."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inner)) * 4.0 ** rng.integers(-2, 3, (rows, 1))
    w = rng.normal(size=(inner, outputs)) * 4.0 ** rng.integers(-2, 3, (1, outputs))
    x = numpy_int8.away_from_ties(x, 1 if activations == "per_token" else None)
    w = numpy_int8.away_from_ties(w, 0 if weights == "per_channel" else None)
    return jnp.asarray(x), jnp.asarray(w)


def dense(x, w, activations="per_token", weights="per_channel"):
    """(fn, weight): fn(x, weight) is the quantized x @ w, static scales taken from x itself."""
    weight = quantize_weight(
        w, (0,), scheme_of(activations, weights), absmax=jnp.max(jnp.abs(x), axis=0)
    )
    return (lambda x, weight: quantized_dot_general(x, weight, DENSE, "kernel")), weight


def reference(x, w, activations="per_token", weights="per_channel"):
    x_axis = 1 if activations == "per_token" else None
    return numpy_int8.matmul(x, w, x_axis, 0 if weights == "per_channel" else None)


def relative_error(got, expected):
    return np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


def cosine(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


# Sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize("inner", [1, 3, 64, 2049])
def test_sums_are_the_integers_bit_for_bit(rows, inner):
    rng = np.random.default_rng(inner)
    q, values = (
        rng.integers(-127, 128, shape, dtype=np.int8) for shape in ((rows, inner), (6, inner))
    )
    q[0], values[0] = 127, -127
    sums = jax.jit(narrow_dot)(jnp.asarray(q), jnp.asarray(values))
    assert sums.dtype == jnp.int32
    np.testing.assert_array_equal(sums, q.astype(np.int64) @ values.astype(np.int64).T)


def test_the_longest_contraction_is_exact_where_float32_is_not():
    q = np.full((2, LONGEST_CONTRACTION), 127, np.int8)
    values = q * np.array([[1], [-1]], np.int8)
    values[1, 0] = 126
    expected = q.astype(np.int64) @ values.astype(np.int64).T
    assert expected.max() > 2**31 - 127**2  # no longer one would fit
    assert (expected != expected.astype(np.float32).astype(np.int64)).any()
    np.testing.assert_array_equal(
        jax.jit(narrow_dot)(jnp.asarray(q), jnp.asarray(values)), expected
    )


def test_a_longer_contraction_is_refused():
    x, w = jnp.ones((1, LONGEST_CONTRACTION + 1)), jnp.ones((LONGEST_CONTRACTION + 1, 1))
    fn, weight = dense(x, w)
    with pytest.raises(
        ValueError, match=r"^kernel: contracts 133145 channels; .* exact up to 133144"
    ):
        jax.eval_shape(fn, x, weight)


# Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_is_the_scaled_integer_product(activations, weights, wrap):
    x, w = matrices(activations, weights)
    fn, weight = dense(x, w, activations, weights)
    got, expected = wrap(fn)(x, weight), reference(x, w, activations, weights)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (
        relative_error(expected, np.asarray(x) @ np.asarray(w)) > 1e-4
    )  # the float product is another number


def test_a_static_scale_clips_what_calibration_did_not_see():
    x, w = matrices("static")
    weight = quantize_weight(w, (0,), scheme_of("static"), absmax=jnp.max(jnp.abs(x)) / 4)
    scale = numpy_int8.scale_of(x)[0, 0] / 4
    x = jnp.asarray(numpy_int8.away_from_ties(x, scale=scale))
    expected = numpy_int8.matmul(x, w, x_scale=scale)
    np.testing.assert_allclose(quantized_dot_general(x, weight, DENSE, "w"), expected, rtol=1e-6)
    assert (numpy_int8.rounded(x, scale) == 127).any()


def test_a_static_scheme_without_a_scale_is_refused():
    x, w = matrices()
    with pytest.raises(ValueError, match="static scheme needs the activation's absmax"):
        quantize_weight(w, (0,), scheme_of("static"))
    _, weight = dense(x, w)
    with pytest.raises(ValueError, match="need an input_scale"):
        quantized_dot_general(x, replace(weight, activations="static"), DENSE, "w")


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(
    "kind", ["zeros", "one zero row", "constant rows", "one huge channel", "dead columns"]
)
def test_degenerate_activations_and_weights(kind, activations):
    x, w = matrices(activations)
    x, w = np.array(x), np.array(w)
    if kind == "zeros":
        x[:] = 0
    elif kind == "one zero row":
        x[2] = 0
    elif kind == "constant rows":
        x[:] = np.array([1.0, -3.0, 0.5, 1e-6, 100.0])[:, None]
    elif kind == "one huge channel":
        x[:, 3] = 1e6
    else:
        w[:, :2] = 0
    x = numpy_int8.away_from_ties(x, 1 if activations == "per_token" else None)
    fn, weight = dense(jnp.asarray(x), jnp.asarray(w), activations)
    np.testing.assert_allclose(
        jax.jit(fn)(jnp.asarray(x), weight), reference(x, w, activations), rtol=1e-6
    )


@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
def test_no_rows_give_no_rows(activations):
    x, w = matrices()
    fn, weight = dense(x, w, activations)
    assert jax.jit(fn)(x[:0], weight).shape == (0, 7)


@pytest.mark.slow
def test_half_precision_is_scaled_in_float32():
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.integers(-100, 101, shape), jnp.bfloat16) for shape in ((5, 64), (64, 7))
    )
    x, w = x.at[:, 0].set(101), w.at[0].set(101)  # x / scale is 127 x / 101: never near a tie
    fn, weight = dense(x, w)
    got = fn(x, weight)
    assert got.dtype == jnp.float32  # the caller casts, once
    expected = reference(x.astype(np.float32), w.astype(np.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    rounded_scale = np.float32(jnp.bfloat16(101 / 127)) / np.float32(101 / 127)
    assert relative_error(expected * rounded_scale, expected) > 1e-3


@pytest.mark.slow
def test_half_precision_is_smoothed_in_float32():
    x, w = normal(6, 32, dtype=jnp.bfloat16), normal(32, 8, seed=1, dtype=jnp.bfloat16)
    s = jnp.linspace(1.0, 9.0, 32)
    x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
    half, single = (quantize_weight(a, (0,), Scheme(), smoothing=s) for a in (w, w32))
    np.testing.assert_array_equal(half.tensor.values, single.tensor.values)
    assert half.dtype == jnp.bfloat16
    got = quantized_dot_general(x, half, DENSE, "w")
    np.testing.assert_array_equal(got, quantized_dot_general(x32, single, DENSE, "w"))
    divided_in_half = (x / s.astype(jnp.bfloat16)[None, :]).astype(jnp.float32)
    assert (
        relative_error(got, quantized_dot_general(divided_in_half * s[None, :], single, DENSE, "w"))
        > 1e-5
    )


# A single row -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.slow
def test_one_row_equals_that_row_of_two(activations):
    x, w = matrices(activations, rows=2)
    x = jnp.stack([x[0], -x[0]])  # one scale for both rows, whatever the granularity
    fn, weight = dense(x, w, activations)
    both, one = jax.jit(fn)(x, weight), jax.jit(fn)(x[:1], weight)
    np.testing.assert_array_equal(one, both[:1])
    np.testing.assert_allclose(one, reference(x, w, activations)[:1], rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_on_a_cpu_the_weight_is_the_first_operand_of_a_few_rows(rows):
    q, values = jnp.ones((rows, 64), jnp.int8), jnp.ones((32, 64), jnp.int8)
    traced = jax.jit(narrow_dot).trace(q, values)
    on_cpu, on_gpu = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda"))
    plain = f"(tensor<{rows}x64xi8>, tensor<32x64xi8>) -> tensor<{rows}x32xi32>"
    padded = max(rows, 4)
    first = f"(tensor<32x64xi8>, tensor<{padded}x64xi8>) -> tensor<32x{padded}xi32>"
    assert plain in on_gpu
    assert first not in on_gpu
    assert (plain in on_cpu, first in on_cpu) == (rows > 8, rows <= 8)
    # XLA does not exchange them again.
    compiled = jax.jit(narrow_dot).lower(q, values).compile().as_text()
    assert (f"s32[32,{padded}]" in compiled) == (rows <= 8)


# Axes -------------------------------------------------------------------------------------------------------------

AXES = {  # x, w, contracted axes of x and of w
    "dense": ((5, 12), (12, 7), (1,), (0,)),
    "batched rows": ((2, 5, 12), (12, 7), (2,), (0,)),
    "row vector": ((12,), (12, 7), (0,), (0,)),
    "embedding attend": ((5, 12), (7, 12), (1,), (1,)),
    "x contracted first": ((12, 5), (12, 7), (0,), (0,)),
    "weight vector": ((5, 12), (12,), (1,), (0,)),
    "general out": ((5, 12), (12, 4, 3), (1,), (0,)),
    "general in": ((5, 4, 3), (4, 3, 7), (1, 2), (0, 1)),
    "swapped": ((5, 3, 4), (4, 3, 7), (1, 2), (1, 0)),
    "apart": ((4, 5, 3), (3, 7, 4), (0, 2), (2, 0)),
    "middle": ((5, 12), (4, 12, 3), (1,), (1,)),
    "all": ((4, 3), (4, 3), (0, 1), (0, 1)),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "case",
    slow_but(list(AXES), "row vector", "swapped", "apart"),
)
def test_contracts_any_axes(case, weights):
    x_shape, w_shape, x_axes, w_axes = AXES[case]
    x_free, w_free = (
        tuple(a for a in range(len(s)) if a not in t)
        for s, t in ((x_shape, x_axes), (w_shape, w_axes))
    )
    x = numpy_int8.away_from_ties(normal(*x_shape), x_axes)
    w = numpy_int8.away_from_ties(
        normal(*w_shape, seed=1), w_axes if weights == "per_channel" else None
    )
    weight = quantize_weight(jnp.asarray(w), w_axes, scheme_of("per_token", weights))
    got = quantized_dot_general(jnp.asarray(x), weight, ((x_axes, w_axes), ((), ())), "w")
    x_rows = x.transpose(*x_free, *x_axes).reshape(-1, np.prod([x_shape[a] for a in x_axes]))
    w_columns = w.transpose(*w_axes, *w_free).reshape(x_rows.shape[1], -1)
    expected = reference(x_rows, w_columns, weights=weights).reshape(
        np.tensordot(x, w, (x_axes, w_axes)).shape
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert got.shape == lax.dot_general(x, w, ((x_axes, w_axes), ((), ()))).shape
    assert relative_error(expected, np.tensordot(x, w, (x_axes, w_axes))) > 1e-5


@pytest.mark.parametrize("permutation", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_a_transposed_weight_is_contracted_where_it_is_stored(permutation):
    x, w = normal(5, 12), normal(12, 4, 3, seed=1)
    weight = quantize_weight(w, (0,), Scheme())
    expected = quantized_dot_general(x, weight, DENSE, "w")
    turned = replace(weight, tensor=weight.tensor.transpose(permutation))
    got = quantized_dot_general(x, turned, (((1,), (permutation.index(0),)), ((), ())), "w")
    free = [p - 1 for p in permutation if p != 0]  # the weight's free axes, in their new order
    np.testing.assert_array_equal(got, np.transpose(expected, (0, 1 + free[0], 1 + free[1])))


def test_contraction_along_an_axis_it_was_not_quantized_for_is_refused():
    weight = quantize_weight(normal(4, 3, 7), (1,), Scheme())
    with pytest.raises(
        ValueError, match=r"^attn/kernel: contracted along its axes \(0, 1\), but .* along \(1,\)"
    ):
        quantized_dot_general(normal(5, 4, 3), weight, (((1, 2), (0, 1)), ((), ())), "attn/kernel")
    weight = quantize_weight(
        normal(4, 3, 7), (0,), Scheme()
    )  # stored (3, 7, 4): the last two are contracted
    with pytest.raises(
        ValueError, match=r"^attn/kernel: contracted along its axes \(0, 2\), but .* along \(0,\)"
    ):
        quantized_dot_general(normal(5, 4, 7), weight, (((1, 2), (0, 2)), ((), ())), "attn/kernel")


@pytest.mark.slow
def test_contraction_along_some_of_the_quantized_axes_uses_their_shared_scale():
    x, w = normal(5, 3), normal(4, 3, 7, seed=1)
    weight = quantize_weight(w, (0, 1), Scheme())
    got = quantized_dot_general(x, weight, (((1,), (1,)), ((), ())), "w")
    assert relative_error(got, jnp.einsum("tb,abc->tac", x, dequantize(weight.tensor))) < 0.02
    assert got.shape == (5, 4, 7)


BATCHES = {  # x's shape, its contracted and batch axes; w's shape, its contracted and batch axes
    "first": ((2, 5, 12), (2,), (0,), (2, 12, 7), (1,), (0,)),
    "last": ((12, 5, 2), (0,), (2,), (12, 7, 2), (0,), (2,)),
    "middle, several axes": ((5, 2, 4, 3), (2, 3), (1,), (4, 2, 7, 3), (0, 3), (1,)),
    "two": ((2, 3, 5, 12), (3,), (0, 1), (3, 12, 2, 7), (1,), (2, 0)),
    "no free axis of x": ((2, 12), (1,), (0,), (2, 12, 7), (1,), (0,)),
}


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("case", slow_but(list(BATCHES), "middle, several axes", "two"))
def test_every_matrix_of_a_batch_is_quantized_on_its_own(case, activations):
    x_shape, x_axes, x_batch, w_shape, w_axes, w_batch = BATCHES[case]
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    x = x * 4.0 ** jnp.arange(2.0).reshape([2 if a == x_batch[0] else 1 for a in range(x.ndim)])
    first = np.moveaxis(np.asarray(x), x_batch, range(len(x_batch)))
    inner = [x_shape[a] for a in x_axes]
    rows = np.moveaxis(
        np.asarray(x), [*x_batch, *x_axes], [*range(len(x_batch)), *range(-len(x_axes), 0)]
    )
    columns = np.moveaxis(
        np.asarray(w), [*w_batch, *w_axes], [*range(len(w_batch)), *range(-len(w_axes), 0)]
    )
    sizes = rows.shape[: len(x_batch)]
    rows = rows.reshape(*sizes, -1, int(np.prod(inner)))
    columns = columns.reshape(*sizes, -1, int(np.prod(inner)))
    # `batch` in the order of w's axes; its absmax likewise.
    batch = tuple(sorted(w_batch))
    absmax = np.abs(first.reshape(*sizes, -1)).max(-1).transpose([w_batch.index(a) for a in batch])
    weight = quantize_weight(w, w_axes, scheme_of(activations), jnp.asarray(absmax), batch=batch)
    got = jax.jit(
        lambda x: quantized_dot_general(x, weight, ((x_axes, w_axes), (x_batch, w_batch)), "w")
    )(x)
    expected = np.stack([reference(rows[i], columns[i].T, activations) for i in np.ndindex(*sizes)])
    exact = lax.dot_general(x, w, ((x_axes, w_axes), (x_batch, w_batch)))
    assert got.shape == exact.shape
    step = (
        np.abs(expected).max() * 2e-3
    )  # away from ties the two agree; at one, by a product of two int8
    difference = np.abs(np.asarray(got) - expected.reshape(exact.shape))
    assert np.mean(difference > 1e-5 * np.abs(expected).max()) < 0.02
    assert difference.max() < 10 * step
    assert relative_error(expected.reshape(exact.shape), exact) > 1e-4


def test_a_batch_that_the_weight_was_not_quantized_for_is_refused():
    x, dimensions = normal(2, 5, 12), (((2,), (1,)), ((0,), (0,)))
    weight = quantize_weight(normal(2, 12, 7), (0, 1), Scheme())
    with pytest.raises(
        ValueError,
        match=r"^experts/kernel: contracted along its axes \(1,\) in a batch along \(0,\)",
    ):
        quantized_dot_general(x, weight, dimensions, "experts/kernel")
    weight = quantize_weight(normal(2, 12, 7), (1,), Scheme(), batch=(2,))
    with pytest.raises(ValueError, match=r"^experts/kernel: contracted .* in a batch along \(0,\)"):
        quantized_dot_general(x, weight, dimensions, "experts/kernel")


# Smoothing at run time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.slow
def test_smoothing_at_run_time_divides_x_and_multiplies_w(activations):
    x, w = normal(6, 32) * jnp.where(jnp.arange(32) == 3, 64.0, 1.0)[None, :], normal(32, 8, seed=1)
    absmax = jnp.max(jnp.abs(x), axis=0)
    s = jnp.exp2(jnp.round(jnp.log2(absmax) / 2))
    smoothed = quantize_weight(w, (0,), scheme_of(activations), absmax, s)
    np.testing.assert_array_equal(
        smoothed.tensor.values, QTensor.quantize(w * s[:, None], (0,)).values
    )
    got = quantized_dot_general(x, smoothed, DENSE, "w")
    _, plain = dense(x / s[None, :], w * s[:, None], activations)
    np.testing.assert_array_equal(got, quantized_dot_general(x / s[None, :], plain, DENSE, "w"))
    unsmoothed = quantized_dot_general(
        x, quantize_weight(w, (0,), scheme_of(activations), absmax), DENSE, "w"
    )
    assert relative_error(got, x @ w) < relative_error(unsmoothed, x @ w) / 2
    assert relative_error(got, x @ w) < 0.02


@pytest.mark.parametrize("case", ["general in", "swapped", "apart"])
@pytest.mark.slow
def test_smoothing_follows_the_order_of_the_weight_axes(case):
    x_shape, w_shape, x_axes, w_axes = AXES[case]
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    s = jnp.exp2(4 * normal(*(w_shape[a] for a in sorted(w_axes)), seed=2))
    weight = quantize_weight(w, w_axes, Scheme(), smoothing=s)
    by_w_axis = dict(zip(sorted(w_axes), range(s.ndim), strict=True))
    in_x_order = jnp.transpose(
        s, [by_w_axis[b] for _, b in sorted(zip(x_axes, w_axes, strict=True))]
    )
    spread = jnp.expand_dims(in_x_order, [a for a in range(x.ndim) if a not in x_axes])
    got = quantized_dot_general(x * spread, weight, ((x_axes, w_axes), ((), ())), "w")
    expected = lax.dot_general(x * spread, w, ((x_axes, w_axes), ((), ())))
    assert relative_error(got, expected) < 0.05


# Transformations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_gradient_is_that_of_the_dequantized_weight(activations, smoothing):
    x, w, g = normal(6, 32), normal(32, 8, seed=1), normal(6, 8, seed=2)
    s = jnp.exp2(jnp.arange(32.0) % 3) if smoothing else None
    weight = quantize_weight(w, (0,), scheme_of(activations), jnp.max(jnp.abs(x), axis=0), s)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(quantized_dot_general(x, weight, DENSE, "w") * g)))(x)
    effective = dequantize(weight.tensor) / (1.0 if s is None else s[:, None])
    np.testing.assert_allclose(grad, g @ effective.T, rtol=1e-5, atol=1e-5)
    assert cosine(grad, g @ w.T) > 0.99
    assert not np.allclose(grad, g @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_forward_and_reverse_derivatives_agree():
    x, w = normal(4, 16), normal(16, 3, seed=1)
    fn, weight = dense(x, w)
    forward, reverse = jax.jacfwd(fn)(x, weight), jax.jacrev(fn)(x, weight)
    np.testing.assert_allclose(forward, reverse, rtol=1e-6, atol=1e-6)
    assert np.abs(forward).max() > 1


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_jit_equals_eager(activations):
    x, w = matrices(activations)
    fn, weight = dense(x, w, activations)
    np.testing.assert_allclose(jax.jit(fn)(x, weight), fn(x, weight), rtol=1e-6)


@pytest.mark.slow
def test_vmap_over_inputs_equals_a_loop():
    x = jnp.asarray(numpy_int8.away_from_ties(normal(3, 5, 12), 2))
    fn, weight = dense(x[0], normal(12, 7, seed=1))
    rows = jax.vmap(jax.vmap(fn, (0, None)), (0, None))(x[:, :, None, :], weight)[:, :, 0]
    batches = jax.vmap(fn, (0, None))(x, weight)
    loop = jnp.stack([fn(one, weight) for one in x])
    np.testing.assert_allclose(batches, loop, rtol=1e-6)
    np.testing.assert_allclose(rows, loop, rtol=1e-6)


@pytest.mark.slow
def test_vmap_over_stacked_weights_equals_a_loop():
    x, stack = normal(5, 12), normal(3, 12, 7, seed=1)
    weights = jax.vmap(lambda w: quantize_weight(w, (0,), Scheme()))(stack)
    fn, _ = dense(x, stack[0])
    got = jax.vmap(fn, (None, 0))(x, weights)
    np.testing.assert_allclose(got, jnp.stack([fn(x, dense(x, w)[1]) for w in stack]), rtol=1e-6)


def test_a_second_call_compiles_nothing():
    x, w = matrices()
    fn, weight = dense(x, w)
    compiled = jax.jit(fn)
    compiled(x, weight)
    compiled(x + 1, dense(x, 2 * w)[1])
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_the_program_multiplies_int8_and_never_widens_the_weight(rows, activations):
    x, w = matrices(activations, rows=rows)
    fn, weight = dense(x, w, activations)
    program = jaxprs.of(fn, x, weight)
    dots = jaxprs.dots(program)
    assert {dot.dtypes for dot in dots} == {jaxprs.INT8_DOT}
    of_weight = 0 if rows <= 8 else 1  # which operand it is
    assert {dot.shapes[of_weight] for dot in dots} == {weight.tensor.values.shape}
    assert jaxprs.widened(program, larger_than=0) == []
    assert jaxprs.largest_float(program) <= max(w.size - 1, x.size)


def test_the_walker_sees_a_float_matmul():
    """The test above would fail for a matmul with the dequantized weight."""
    x, w = matrices()
    _, weight = dense(x, w)
    program = jaxprs.of(
        jax.jit(lambda x, weight: jax.checkpoint(jnp.dot)(x, dequantize(weight.tensor))), x, weight
    )
    assert [dot.dtypes for dot in jaxprs.dots(program)] == [("float32", "float32", "float32")]
    assert jaxprs.widened(program, larger_than=w.size - 1) == [("float32", (7, 48))]
    assert jaxprs.largest_float(program) == w.size


def test_a_quantized_weight_looks_like_its_float_weight():
    weight = quantize_weight(normal(12, 4, 3, dtype=jnp.bfloat16), (0,), Scheme())
    assert isinstance(weight, QuantWeight)
    assert (weight.shape, weight.ndim, weight.dtype) == ((12, 4, 3), 3, jnp.bfloat16)


# A few rows and groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("inner", [96, 80])
def test_one_product_serves_all_groups_of_a_few_rows(rows, inner):
    """The last of the groups is shorter, or not; with many rows there is a product for each, or integers are made."""
    rng = np.random.default_rng(inner)
    groups = -(-inner // 32)
    q = rng.integers(-127, 128, (rows, inner), dtype=np.int8)
    codes = rng.integers(-8, 8, (6, inner), dtype=np.int8)
    zero, whole = (rng.integers(low, 8, (6, groups), dtype=np.int8) for low in (-8, 1))
    scale = rng.uniform(0.5, 2, (6, groups)).astype(np.float32)
    spread = lambda x: np.repeat(x, 32, axis=1)[:, :inner].astype(np.float64)
    weight = codes - spread(zero)
    operands = jnp.asarray(q, jnp.float32), jnp.asarray(codes), jnp.asarray(zero)

    def run(scale, group_scale):
        x, codes, zero = operands
        matrix = Matrix(codes, zero, group_scale, jnp.asarray(scale), jnp.float32(1))
        return jax.jit(product, static_argnums=0)(Recipe("static", group=32), x, matrix)

    exact = q.astype(np.float64) @ (weight * spread(scale)).T
    got = run(scale, None)
    np.testing.assert_allclose(got, exact, atol=1e-5 * np.abs(exact).max())
    small = np.clip(whole, 1, 7)  # so that an integer fits into int8
    exact = q.astype(np.float64) @ (weight * spread(small)).T
    np.testing.assert_array_equal(run(np.ones((6, 1), np.float32), jnp.asarray(small)), exact)
