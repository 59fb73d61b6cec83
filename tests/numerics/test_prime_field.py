"""Arithmetic modulo 2^31 - 1 beside Python's integers and fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from sqjax.numerics.prime_field import (
    PRIME,
    add,
    character,
    draw,
    embed,
    hashed,
    inverse,
    matmul,
    mul,
    neg,
    oracle,
    places,
    power,
    reflected,
    root,
    running_total,
    salt,
    sub,
    total,
)

EDGES = [0, 1, 2, PRIME - 1, PRIME - 2, 2**30, 2**16, 2**16 - 1]


def numbers(*shape, seed=0):
    """Random residues, the edges among them."""
    x = draw(np.random.default_rng(seed), shape)
    flat = x.reshape(-1)
    flat[: len(EDGES)] = EDGES[: flat.size]
    return x


def whole(x):
    """As Python's integers."""
    return x.astype(object)


def test_sums_and_products():
    x, y = numbers(100), numbers(100, seed=1)[::-1]
    every = [(add, whole(x) + whole(y)), (sub, whole(x) - whole(y)), (mul, whole(x) * whole(y))]
    for operation, expected in every:
        assert (operation(x, y) == expected % PRIME).all()
        assert operation(x, y).dtype == np.uint32
    assert (neg(x) == -whole(x) % PRIME).all()
    grid = x.reshape(4, 25)
    assert (total(grid, (1,)) == whole(grid).sum(1) % PRIME).all()
    assert (running_total(grid, 1) == whole(grid).cumsum(1) % PRIME).all()


def test_powers():
    x = numbers(60)
    for exponent in (0, 1, 2, 7, -3):
        expected = [pow(int(a), exponent, PRIME) if a or exponent >= 0 else 0 for a in x]
        assert power(x, exponent).tolist() == expected
    assert inverse(x).tolist() == [pow(int(a), PRIME - 2, PRIME) for a in x]
    by_euler = {0: 0, 1: 1, PRIME - 1: -1}
    assert character(x).tolist() == [by_euler[pow(int(a), (PRIME - 1) // 2, PRIME)] for a in x]


def test_the_character_is_a_sign_and_roots_multiply():
    x, y = numbers(60), numbers(60, seed=1)
    assert (character(neg(x)) == -character(x)).all()
    assert (character(mul(x, y)) == character(x) * character(y)).all()
    assert (root(mul(x, y)) == mul(root(x), root(y))).all()
    squares = mul(x, x)
    assert (mul(root(squares), root(squares)) == squares).all()
    assert (character(root(squares)) >= 0).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16])
def test_floats_are_embedded_exactly(dtype):
    x = np.random.default_rng(0).normal(size=50).astype(dtype)
    x[:6] = [0.0, 1.0, -1.0, np.finfo(np.float16).max, 6e-8, -0.0]
    expected = []
    for value in x.astype(np.float64).tolist():
        exact = Fraction(value)
        expected.append(exact.numerator * pow(exact.denominator, -1, PRIME) % PRIME)
    assert embed(x).tolist() == expected


def test_other_numbers_are_embedded():
    assert embed(np.array([np.inf, -np.inf, np.nan])).tolist() == [0, 0, 0]
    assert embed(np.array([-1, 5], np.int8)).tolist() == [PRIME - 1, 5]
    assert embed(np.array([True, False])).tolist() == [1, 0]
    assert embed(np.array([2**64 - 1], np.uint64)).tolist() == [(2**64 - 1) % PRIME]
    assert embed(np.array(5e-324)).tolist() == pow(2, -1074, PRIME)


@pytest.mark.parametrize(
    ("x", "y"),
    [((3, 5), (5, 2)), ((2, 3, 5), (2, 5, 9)), ((9, 4000), (4000, 1)), ((0, 3), (3, 2)), ((2, 0), (0, 3))],
)  # fmt: skip
def test_matmul(x, y):
    x, y = numbers(*x), numbers(*y, seed=1)
    assert (matmul(x, y) == np.matmul(whole(x), whole(y)) % PRIME).all()


def test_matmul_of_the_largest_numbers():
    """Sums of 2048 of the largest products are just below 2^53."""
    x = np.full((1, 5000), PRIME - 1, np.uint32)
    assert matmul(x, x.T).tolist() == [[5000]]


def test_oracles_are_functions_that_look_random():
    x = numbers(2000)
    assert (oracle(5, x, x[::-1]) == oracle(5, x, x[::-1])).all()
    for other in (oracle(6, x), oracle(5, add(x, np.uint32(1))), oracle(5, x, x)):
        assert (oracle(5, x) != other).all()
    assert salt("exp", 1) != salt("exp", 2)
    assert (hashed(0, x) >> np.uint64(63)).mean() == pytest.approx(0.5, abs=0.05)
    assert oracle(5, x).max() < PRIME


def test_places_are_an_order_that_passes_what_passes_sorting():
    x = numbers(50, 9)[5:]
    order = places(x, 3)
    s = mul(x[:1, :1], x[:1, :1])
    assert (places(mul(x, s), 3) == order).all()
    assert (places(add(x, x[:, :1]), 3) == order).all()
    assert (places(neg(x), 3) == -order).all()
    assert (places(x[:, ::-1], 3) == order[:, ::-1]).all()
    assert all(len(set(line)) == 9 for line in order.tolist())
    two = x[:, :2]
    assert ((places(two, 3)[:, 0] > places(two, 3)[:, 1]) == (character(sub(two[:, 0], two[:, 1])) > 0)).all()  # fmt: skip


def test_reflections_are_orthogonal():
    x, v = numbers(3, 5), numbers(5, seed=1)
    y = reflected(x, v)
    assert not np.array_equal(x, y)
    assert (matmul(y, y.T) == matmul(x, x.T)).all()
    assert (reflected(y, v) == x).all()
