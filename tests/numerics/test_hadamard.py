"""Block Hadamard transforms beside dense matrices in float64, written from Sylvester's and Hartley's definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax.numerics.hadamard import hadamard, rotated, rotated_gram

EPS = 2.0**-23
#: Powers of two, odd numbers, both; parts of one matmul and of several.
SIZES = (1, 2, 3, 8, 12, 45, 64, 192, 576)


def dense(size):
    """H kron C entry by entry: the sign counts common bits, the angle is 2 pi i j / m."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    i, j = np.indices((size, size))
    common = (i // odd) & (j // odd)
    signs = (-1.0) ** np.array([bin(n).count("1") for n in common.ravel()]).reshape(i.shape)
    angle = 2 * np.pi * ((i % odd) * (j % odd) % odd) / odd
    return signs * (np.cos(angle) + np.sin(angle)) / np.sqrt(size)


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_its_definition_symmetric_and_its_own_inverse(size):
    q = hadamard(size)
    np.testing.assert_allclose(q, dense(size), rtol=0, atol=1e-13)
    np.testing.assert_allclose(q, q.T, rtol=0, atol=1e-13)
    np.testing.assert_allclose(q @ q, np.eye(size), rtol=0, atol=1e-12)
    assert np.abs(q).max() <= np.sqrt(2 / size) * (1 + 1e-12) or size == 1


@pytest.mark.parametrize("block", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transform_is_the_product_with_the_matrix_of_each_block(block, dtype):
    x = jnp.asarray(np.random.default_rng(block).normal(size=(2, 3, 2 * block)), dtype)
    got = jax.jit(rotated, static_argnums=1)(x, block)
    exact = np.asarray(x, np.float64).reshape(2, 3, 2, block) @ dense(block)
    assert (got.dtype, got.shape) == (jnp.float32, x.shape)
    largest = np.abs(np.asarray(x, np.float64)).max()
    # A sum of b terms x / sqrt(b): half a unit a term at most, and the matrix' own rounding.
    allowed = 4 * EPS * np.sqrt(block) * largest
    assert np.abs(np.asarray(got, np.float64).reshape(exact.shape) - exact).max() <= allowed
    back = rotated(got, block)
    assert np.abs(np.asarray(back) - np.asarray(x, np.float64)).max() <= 2 * allowed


@pytest.mark.parametrize("block", [64, 576])
def test_in_bfloat16_it_is_off_by_a_rounding_of_each_number(block):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, block)), jnp.float32)
    got = np.asarray(jax.jit(lambda x: rotated(x, block, exact=False))(x), np.float64)
    exact = np.asarray(x, np.float64) @ dense(block)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    # Two roundings, of x and of an odd factor's matrix, of 2^-9 each at most.
    assert 2.0**-12 < error < 2.0**-9 * 1.5
    sizes = jnp.asarray(np.random.default_rng(0).integers(-16, 17, (4, 64)), jnp.float32)
    np.testing.assert_array_equal(rotated(sizes, 64, exact=False), rotated(sizes, 64))


def test_an_outlier_is_spread_over_its_block_alone():
    x = jnp.zeros((1, 1536)).at[0, 700].set(100.0)
    y = np.asarray(rotated(x, 512))[0]
    assert np.abs(y).max() < 100 * np.sqrt(2 / 512) + 1e-4
    np.testing.assert_array_equal(np.flatnonzero(y), np.arange(512, 1024))


def test_gradients_and_vmap_are_those_of_the_product():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 192)), jnp.float32)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 192)), jnp.float32)
    _, pull = jax.vjp(lambda x: jax.vmap(lambda rows: rotated(rows, 192))(x), x)
    np.testing.assert_allclose(pull(g)[0], np.asarray(g, np.float64) @ dense(192), atol=1e-5)


def test_a_gram_matrix_becomes_that_of_the_rotated_rows():
    x = np.random.default_rng(0).normal(size=(3, 20, 48))
    gram = x.swapaxes(1, 2) @ x
    y = x.reshape(3, 20, 2, 24) @ dense(24)
    y = y.reshape(3, 20, 48)
    got = rotated_gram(jnp.asarray(gram, jnp.float32), 24)
    np.testing.assert_allclose(got, y.swapaxes(1, 2) @ y, atol=1e-4)


def test_blocks_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(
        ValueError, match=r"^rotation: expected blocks that divide 10 channels, got 4"
    ):
        rotated(jnp.ones((2, 10)), 4)
