"""Block Hadamard transforms: X Q spreads an outlier over all channels of its block.

For a block of b = 2^k m channels, m odd, Q is H_(2^k) kron C_m, two symmetric orthogonal factors:

- H_1 = (1), H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2): Sylvester's Hadamard matrices, whose
  entries all are +-1 / sqrt(2^k).
- C_m[i, j] = (cos t + sin t) / sqrt(m), t = 2 pi i j / m: the matrix of Hartley's transform of m
  numbers (Bracewell 1983, https://doi.org/10.1364/JOSA.73.001832). C_1 = (1), C_2 = H_2.

So Q is symmetric and Q Q = 1: the same transform leads back. No entry is larger than sqrt(2 / b),
so an outlier a in one channel becomes b numbers of at most sqrt(2 / b) a, whose squares sum to a^2
as before. That is what makes activations fit for few bits (QuaRot, Ashkboos et al. 2024, arXiv
2404.00456), since

    X W = (X Q) (Q W)

where Q W is stored, and X Q is computed when the program runs. Channels in several blocks are
transformed block by block: of 1536 channels in blocks of 64 no number meets those of another block.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

#: Up to so many channels are transformed by one small matmul. A longer block is cut into parts of
#: so many at most, whose sums and differences come first: one matmul of 1536 channels would take
#: eight times the products of eight matmuls of 192.
LARGEST_PART = 288


def hadamard(size: int) -> np.ndarray:
    """Q of a block of `size` channels, (size, size) float64: symmetric, and its own inverse.

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


@partial(jax.jit, static_argnames=("block", "exact"), inline=True)
def rotated(
    x: Float[Array, "*lead channels"], block: int, *, exact: bool = True
) -> Float[Array, "*lead channels"]:
    """X Q along the last axis, in blocks of so many channels; float32.

    Twice is the identity, up to rounding.

    Args:
        x: floats.
        block: how many channels a block has; it divides those of x.
        exact: whether all is computed in float32. If not, what enters the matmul is rounded to
            bfloat16, for which matrix units are several times as fast: an error of 2^-9 of each
            number at most, and so of 0.2% of the whole, where int8 rounds off 1% and int4 15%.

    Raises:
        ValueError: the block does not divide the channels.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.hadamard import rotated
        >>> x = jnp.array([0.0, 8.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
        >>> rotated(x, 4).tolist()
        [4.0, -4.0, 4.0, -4.0, 2.0, 0.0, 0.0, 0.0]
    """
    channels = x.shape[-1]
    if block < 1 or channels % block:
        raise ValueError(
            f"rotation: expected blocks that divide {channels} channels, got {block}"
        )
    return _in_float32(x, block) if exact else _in_bfloat16(x, block)


def _in_float32(x: Array, block: int) -> Array:
    return _transformed(x, block, jnp.float32, lax.Precision.HIGHEST)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _in_bfloat16(x: Array, block: int) -> Array:
    return _transformed(x, block, jnp.bfloat16, None)


@_in_bfloat16.defjvp
def _exact_derivative(block, primals, tangents):
    """The derivative is computed in float32, because what follows does not round it."""
    [x], [dx] = primals, tangents
    return _in_bfloat16(x, block), _in_float32(dx, block)


def _transformed(
    x: Array, block: int, dtype: DTypeLike, precision: lax.Precision | None
) -> Array:
    part = _part(block)
    summed = _between(x.astype(jnp.float32), block // part, part)
    # Without the root, because +-1 are exact in bfloat16.
    y = lax.dot_general(
        summed.reshape(-1, part).astype(dtype),
        jnp.asarray(_times_root(part), dtype),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return y.reshape(x.shape) * jnp.float32(1 / math.sqrt(block))


def _part(block: int) -> int:
    """The largest part of a block that one matmul transforms: an odd number times a power of two.

    Of 1536 = 512 * 3 channels it is 192; of 256 * 43 it is 172; an odd number is never divided.
    """
    power, part = _factors(block)
    while power > 1 and 2 * part <= LARGEST_PART:
        power, part = power // 2, 2 * part
    return part


def _between(x: Array, count: int, part: int) -> Array:
    """Each `count` parts, a power of two, times sqrt(count) H: sums and differences in log2 steps.

    For parts a, b, c, d: first a + c, b + d, a - c, b - d, and then the same of each two of these.
    """
    while count > 1:
        pairs = x.reshape(-1, 2, count // 2 * part)
        first, second = pairs[:, 0], pairs[:, 1]
        x = jnp.stack([first + second, first - second], axis=1)
        count //= 2
    return x


def rotated_gram(
    gram: Float[Array, "*lead channels channels"], block: int
) -> Float[Array, "*lead channels channels"]:
    """Q G Q: the Gram matrix of X Q, if G = X^T X is that of X.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.hadamard import rotated, rotated_gram
        >>> x = jnp.array([[3.0, 1.0], [1.0, 2.0]])
        >>> jnp.allclose(rotated_gram(x.T @ x, 2), rotated(x, 2).T @ rotated(x, 2)).item()
        True
    """
    # By Q along its rows, and then along its columns, because G is symmetric.
    half = rotated(gram, block)
    return rotated(half.swapaxes(-1, -2), block)
