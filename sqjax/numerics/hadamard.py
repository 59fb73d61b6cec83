"""Hadamard matrices of any size: an outlier is spread over all channels.

For n = 2^k m channels, m odd, Q is H_(2^k) kron C_m, two symmetric orthogonal factors:

- H_1 = (1), H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2): Sylvester's Hadamard matrices, whose
  entries all are +-1 / sqrt(2^k).
- C_m[i, j] = (cos t + sin t) / sqrt(m), t = 2 pi i j / m: the matrix of Hartley's transform of m
  numbers (Bracewell 1983, https://doi.org/10.1364/JOSA.73.001832). C_1 = (1), C_2 = H_2.

So Q is symmetric and Q Q = 1. No entry is larger than sqrt(2 / n), so an outlier a in one channel
becomes n numbers of at most sqrt(2 / n) a, whose squares sum to a^2 as before (QuaRot, Ashkboos et
al. 2024, arXiv 2404.00456).
"""

import math

import numpy as np


def hadamard(size: int) -> np.ndarray:
    """Q of `size` channels, (size, size) float64: symmetric, and its own inverse.

    Examples:
        >>> from sqjax.numerics.hadamard import hadamard
        >>> (2 * hadamard(4)).astype(int).tolist()
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
        >>> hadamard(3).round(3).tolist()
        [[0.577, 0.577, 0.577], [0.577, 0.211, -0.789], [0.577, -0.789, 0.211]]
    """
    return _times_root(size) / math.sqrt(size)


def _times_root(size: int) -> np.ndarray:
    """sqrt(size) Q: +-1 for a power of two."""
    power, odd = _factors(size)
    matrix = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    # cos t + sin t of Hartley's transform, for the odd factor.
    angles = 2 * math.pi * np.outer(range(odd), range(odd)) / odd
    return np.kron(matrix, np.cos(angles) + np.sin(angles))


def _factors(size: int) -> tuple[int, int]:
    """(2^k, m) of 2^k m with m odd: 576 is 64 times 9."""
    power = size & -size  # the lowest bit that is set
    return power, size // power
