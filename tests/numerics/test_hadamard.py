"""Hadamard matrices beside their definition entry by entry in float64, written from Sylvester's and Hartley's definitions."""

import numpy as np
import pytest

from sqjax.numerics.hadamard import hadamard

#: Powers of two, odd numbers, both.
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
