"""Orthogonal matrices to rotate by: Hadamard matrices with random signs, random ones, Cayley's.

Those that are drawn are float64 arrays of numpy, made once on the host. `cayley` is differentiable,
and so is `keeping_ones` of an array of jax.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sqjax.numerics.hadamard import hadamard


def random_hadamard(
    size: int, rng: np.random.Generator
) -> Float[np.ndarray, "size size"]:
    """diag(signs) Q, with the Q of `hadamard` and a random sign for each row.

    Without the signs a vector of ones, and what is near it, would become one large number: Q's
    first column is constant. QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 3.

    Examples:
        >>> import numpy as np
        >>> from sqjax.numerics.orthogonal import random_hadamard
        >>> q = random_hadamard(12, np.random.default_rng(0))
        >>> np.allclose(q @ q.T, np.eye(12)), float(abs(q).max()) <= (2 / 12) ** 0.5
        (True, True)
    """
    signs = rng.choice([-1.0, 1.0], size)
    return signs[:, None] * hadamard(size)


def random_orthogonal(
    size: int, rng: np.random.Generator
) -> Float[np.ndarray, "size size"]:
    """A rotation or reflection drawn evenly among all of them.

    The Q of a normal matrix Q R, with R's diagonal made positive, because only then no direction is
    preferred (Mezzadri 2007, arXiv math-ph/0609050).
    """
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    return q * np.sign(np.diagonal(r))


def keeping_ones(
    inner: Float[Array | np.ndarray, "inner inner"],
) -> Float[Array | np.ndarray, "size size"]:
    """An orthogonal matrix of one size more, for which 1 Q = 1, that rotates all else by `inner`.

    P diag(1, inner) P, with the reflection P that exchanges the first axis and the direction of
    ones. For a space with a LayerNorm, whose mean must stay the mean. Differentiable:
    keeping_ones(cayley(free)) may be learned.

    Raises:
        ValueError: `inner` is not square.

    Examples:
        >>> import numpy as np
        >>> from sqjax.numerics.orthogonal import keeping_ones
        >>> keeping_ones(np.array([[-1.0]])).round(12).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    _check_square("keeping_ones", inner)
    size = len(inner) + 1
    # P = 1 - 2 v v^T / v.v for v = e1 - 1 / sqrt(size), which is 0 for no size above 1.
    v = np.full(size, -1 / math.sqrt(size))
    v[0] += 1
    reflection = np.eye(size) - 2 * np.outer(v, v) / (v @ v)
    if isinstance(inner, jax.Array):
        middle = jnp.eye(size, dtype=inner.dtype).at[1:, 1:].set(inner)
        p = jnp.asarray(reflection, inner.dtype)
        return jnp.einsum("ij,jk,kl->il", p, middle, p, precision="highest")
    of_numpy = np.eye(size)
    of_numpy[1:, 1:] = inner
    return reflection @ of_numpy @ reflection


def cayley(
    free: Float[Array, "size size"],
) -> Float[Array, "size size"]:
    """(1 - A) (1 + A)^-1 for A = free - free^T: orthogonal whatever `free` is, the identity for 0.

    Differentiable, so that gradients may look for a rotation: SpinQuant, Liu et al. 2024, arXiv
    2405.16406.

    Raises:
        ValueError: `free` is not square.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.orthogonal import cayley
        >>> cayley(jnp.array([[0.0, 1.0], [0.0, 0.0]])).round(6).tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """
    _check_square("cayley", free)
    skew = free - free.T
    one = jnp.eye(len(free), dtype=free.dtype)
    # Both factors commute, so the one that is inverted may stand first.
    return jnp.linalg.solve(one + skew, one - skew)


def _check_square(what: str, matrix: Any) -> None:
    shape = np.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"{what}: expected a square matrix, got {shape}")
