"""The Pallas-Triton matmul, in Pallas's interpreter. What it becomes on a GPU: `test_gpu.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax.numerics import triton
from sqjax.numerics.formats import INT8, scale_from_absmax, to_format
from sqjax.numerics.weight_products import Matrix, Recipe, activation_scale, product

SMALL = triton.Blocks(rows=16, outputs=32)
UNIT = 2.0**-24  # the rounding of float32


def integers(largest, shape, dtype, seed):
    return jnp.asarray(
        np.random.default_rng(seed).integers(-largest, largest + 1, shape), jnp.int8
    ).astype(dtype)


def uniform(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 1.0, shape), jnp.float32)


def grouped(x, values, zero, groups):
    """The exact sum of each group and of its absolute values, (groups, rows, outputs) in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(values, np.float64)
    x, w = x.reshape(len(x), groups, -1), w.reshape(len(w), groups, -1)
    w = w if zero is None else w - np.asarray(zero, np.float64)[:, :, None]
    return np.einsum("mgk,ngk->gmn", x, w), np.einsum("mgk,ngk->gmn", np.abs(x), np.abs(w))


WEIGHTS = {
    "int8": (jnp.int8, False),
    "int4": (jnp.int4, False),
    "int4 with zeros": (jnp.int4, True),
}
#: (rows, outputs, channels), channels of a group, weight
CASES = [
    ((32, 64, 256), 256, "int8"),
    ((5, 37, 256), 256, "int8"),
    ((5, 37, 256), 32, "int8"),
    ((1, 32, 128), 128, "int4"),
    ((17, 1, 192), 64, "int4"),
    ((5, 37, 96), 32, "int4 with zeros"),
    ((16, 37, 96), 96, "int4 with zeros"),
]


@pytest.mark.parametrize(
    ("size", "length", "weight"),
    [
        pytest.param(
            *case, marks=() if case[0] in ((1, 32, 128), (5, 37, 96)) else pytest.mark.slow
        )
        for case in CASES
    ],
    ids=str,
)
@pytest.mark.slow
def test_int32_sums_are_exact_and_scaled_in_float32(size, length, weight):
    (rows, outputs, channels), (dtype, zeros) = size, WEIGHTS[weight]
    groups = channels // length
    x = integers(127, (rows, channels), jnp.int8, 0)
    values = integers(127 if dtype == jnp.int8 else 7, (outputs, channels), dtype, 1)
    zero = integers(7, (outputs, groups), jnp.int8, 2) if zeros else None
    sums, _ = grouped(x, values, zero, groups)

    ones = jnp.ones((outputs, groups))
    got = triton.matmul(x, values, ones, zero=zero, blocks=SMALL, interpret=True)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got, np.float64), sums.sum(0))  # all below 2^24

    scale, x_scale = uniform((outputs, groups), 3), uniform((rows,), 4)
    got = triton.matmul(x, values, scale, x_scale=x_scale, zero=zero, blocks=SMALL, interpret=True)
    terms = (
        sums
        * np.asarray(scale, np.float64).T[:, None, :]
        * np.asarray(x_scale, np.float64)[:, None]
    )
    # Each group is rounded when it becomes a float, is scaled and is added; their sum once more, by x_scale.
    assert (
        np.abs(np.asarray(got, np.float64) - terms.sum(0))
        <= (groups + 4) * UNIT * np.abs(terms).sum(0)
    ).all()


@pytest.mark.parametrize(
    ("x_dtype", "weight"),
    [(jnp.bfloat16, "int8"), (jnp.bfloat16, "int4 with zeros"), (jnp.float16, "int4")],
)
@pytest.mark.slow
def test_float_activations_meet_the_integers_in_float32(weight, x_dtype):
    dtype, zeros = WEIGHTS[weight]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 256)), x_dtype)
    values = integers(127 if dtype == jnp.int8 else 7, (37, 256), dtype, 1)
    scale, zero = uniform((37, 4), 2), integers(7, (37, 4), jnp.int8, 3) if zeros else None
    got = triton.matmul(x, values, scale, zero=zero, blocks=SMALL, interpret=True)
    sums, magnitudes = grouped(x, values, zero, 4)
    scale = np.asarray(scale, np.float64).T[:, None, :]
    error = np.abs(np.asarray(got, np.float64) - (sums * scale).sum(0))
    assert (error <= (64 + 4 + 4) * UNIT * (magnitudes * scale).sum(0)).all()
    narrow = triton.matmul(
        x, values, jnp.ones((37, 4)), zero=zero, dtype=jnp.bfloat16, blocks=SMALL, interpret=True
    )
    assert narrow.dtype == jnp.bfloat16
    assert (
        np.abs(np.asarray(narrow, np.float64) - sums.sum(0)) <= 2.0**-8 * magnitudes.sum(0)
    ).all()


@pytest.mark.slow
def test_it_is_the_plain_per_token_matmul():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(19, 256)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(33, 256)), jnp.float32)
    scale = scale_from_absmax(jnp.max(jnp.abs(w), axis=1, keepdims=True))
    values = to_format(w, scale, INT8)

    def fused(x):
        x_scale = activation_scale(x, "per_token", None, INT8)
        q = to_format(x, x_scale)
        return triton.matmul(
            q, values, scale, x_scale=x_scale.squeeze(1), blocks=SMALL, interpret=True
        )

    plain = product(Recipe("per_token"), x, Matrix(values, None, None, scale, None))
    np.testing.assert_allclose(fused(x), plain, rtol=4 * UNIT, atol=0)  # scaled in another order
    np.testing.assert_allclose(jax.jit(fused)(x), plain, rtol=8 * UNIT, atol=0)


def test_an_empty_result_is_empty():
    x, values, scale = jnp.zeros((0, 32), jnp.int8), jnp.zeros((4, 32), jnp.int8), jnp.ones((4, 1))
    assert triton.matmul(x, values, scale, interpret=True).shape == (0, 4)


def test_the_docstring_says_that_it_never_ran_on_a_gpu():
    assert "never run on a GPU" in triton.__doc__
    assert "Never run on a GPU" in triton.matmul.__doc__


X, W, ONE = jnp.zeros((2, 64), jnp.int8), jnp.zeros((3, 64), jnp.int8), jnp.ones((3, 1))
W4, BF16 = W.astype(jnp.int4), X.astype(jnp.bfloat16)
REFUSED = {
    "float weights": ((X, ONE, ONE), {}, "values of dtype int8 or int4, got float32"),
    "float32 x": (
        (X.astype(jnp.float32), W, ONE),
        {},
        "x of dtype int8 or bfloat16 or float16, got float32",
    ),
    "narrow scale": ((X, W, ONE.astype(jnp.bfloat16)), {}, "scale of dtype float32, got bfloat16"),
    "one row of x": ((X[0], W, ONE), {}, r"got \(64,\) and \(3, 1\)"),
    "other channels": ((X, W[:, :32], ONE), {}, r"values of shape \(3, 64\), got \(3, 32\)"),
    "other rows": ((X, W, ONE), {"x_scale": jnp.ones(3)}, r"x_scale of shape \(2,\), got \(3,\)"),
    "other groups": (
        (X, W4, ONE),
        {"zero": jnp.zeros((3, 2), jnp.int8)},
        r"zero of shape \(3, 1\), got \(3, 2\)",
    ),
    "short groups": (
        (X, W, jnp.ones((3, 4))),
        {},
        "64 channels in 4 groups; expected .* a multiple of 32",
    ),
    "ragged groups": ((X, W, jnp.ones((3, 3))), {}, "64 channels in 3 groups"),
    "no groups": ((X, W, jnp.ones((3, 0))), {}, "64 channels in 0 groups"),
    "odd channels": ((X[:, :40], W[:, :40], ONE), {}, "40 channels in 1 groups"),
    "int8 with zeros": (
        (X, W, ONE),
        {"zero": jnp.zeros((3, 1), jnp.int8)},
        "zero points are for int4",
    ),
    "a scale of floats": (
        (BF16, W, ONE),
        {"x_scale": jnp.ones(2)},
        "x_scale is for an int8 x, got .* bfloat16",
    ),
    "a block of 24": (
        (X, W, ONE),
        {"blocks": triton.Blocks(24, 64)},
        r"powers of two, at least 16, got \(24, 64\)",
    ),
    "a block of 8": (
        (X, W, ONE),
        {"blocks": triton.Blocks(64, 8)},
        r"powers of two, at least 16, got \(64, 8\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    args, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"triton.matmul: .*{message}"):
        triton.matmul(*args, **options, interpret=True)


def test_a_sum_that_may_overflow_is_refused():
    def shapes(groups):
        x, w, scale = ((1, 2**18), jnp.int8), ((1, 2**18), jnp.int8), ((1, groups), jnp.float32)
        return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (x, w, scale)]

    with pytest.raises(
        ValueError, match="groups of 262144 channels; int32 sums are exact up to 133144"
    ):
        jax.eval_shape(triton.matmul, *shapes(1))
    assert jax.eval_shape(triton.matmul, *shapes(2)).shape == (1, 1)
