"""What a search reads in place of all activations: a sample of the tokens, and the Gram matrix.

Both are of one size however many tokens there were, and those of two halves of the data merge.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from sqjax._serialized import serialized

#: Odd numbers that spread bits: those of the 32-bit finalizer of MurmurHash3, and 2^32 / golden
#: ratio.
_MIX = (0x85EBCA6B, 0xC2B2AE35)
_GOLDEN = 0x9E3779B9


@serialized()
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sample:
    """Tokens drawn at random from all that came by: those with the largest priorities.

    A token's priority is a hash of the seed, of its place in the array that it was in, and of all
    numbers of that array. So it is as good as random; but neither the order of the batches nor how
    they are merged changes which tokens are drawn, and the same data give the same bits.

    Attributes:
        rows: float32, (*batch, tokens, features): the largest priority first. A row that no token
            fills is zeros.
        priority: uint32, (*batch, tokens): 0 of rows that no token fills.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.samples import Sample
        >>> first = Sample.drawn(jnp.array([[1.0, 2.0], [3.0, 4.0]]), 3)
        >>> both = first + Sample.drawn(jnp.array([[5.0, 6.0]]), 3)
        >>> sorted(both.rows[:, 0].tolist()), first.priority[2].item()
        ([1.0, 3.0, 5.0], 0)
    """

    rows: Any
    priority: Any

    @classmethod
    def empty(
        cls, batch: tuple[int, ...], tokens: int, features: int
    ) -> "Sample":
        """Of no tokens."""
        rows = jnp.zeros((*batch, tokens, features), jnp.float32)
        return cls(rows, jnp.zeros((*batch, tokens), jnp.uint32))

    @classmethod
    def drawn(
        cls, x: Float[Array, "*batch rows features"], tokens: int, seed: int = 0
    ) -> "Sample":
        """So many tokens of one array. Rows of zeros, which say nothing, are none of them."""
        x = x.astype(jnp.float32)
        return cls._largest(x, _priorities(x, seed), tokens)

    @classmethod
    def _largest(cls, rows: Array, priority: Array, tokens: int) -> "Sample":
        missing = max(tokens - rows.shape[-2], 0)
        none = [(0, 0)] * (rows.ndim - 2)
        rows = jnp.pad(rows, [*none, (0, missing), (0, 0)])
        priority = jnp.pad(priority, [*none, (0, missing)])
        priority, chosen = lax.top_k(priority, tokens)
        rows = jnp.take_along_axis(rows, chosen[..., None], axis=-2)
        return cls(rows, priority)

    @partial(jax.jit, inline=True)
    def __add__(self, other: "Sample") -> "Sample":
        rows = jnp.concatenate([self.rows, other.rows], axis=-2)
        priority = jnp.concatenate([self.priority, other.priority], axis=-1)
        return self._largest(rows, priority, self.priority.shape[-1])

    def merged(self, axes: tuple[int, ...]) -> "Sample":
        """One sample of those along some of the batch axes.

        Example: samples of 5 tokens with 8 features at each of 3 steps, (3, 5, 8), are one of 5
        tokens, (5, 8), along axes (0,).
        """
        tokens = self.priority.shape[-1]
        places = tuple(range(-1 - len(axes), -1))
        rows = jnp.moveaxis(self.rows, axes, tuple(p - 1 for p in places))
        priority = jnp.moveaxis(self.priority, axes, places)
        kept = self.priority.ndim - 1 - len(axes)
        rows = rows.reshape(*rows.shape[:kept], -1, rows.shape[-1])
        priority = priority.reshape(*priority.shape[:kept], -1)
        return self._largest(rows, priority, tokens)


def gram_matrix(
    x: Float[Array, "*batch rows features"],
) -> Float[Array, "*batch features features"]:
    """X^T X, the sum of x x^T over all rows, in float32.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.samples import gram_matrix
        >>> gram_matrix(jnp.array([[1.0, 2.0], [0.0, 3.0]])).tolist()
        [[1.0, 2.0], [2.0, 13.0]]
    """
    x = x.astype(jnp.float32)
    return jnp.einsum(
        "...ri,...rj->...ij", x, x, precision=lax.Precision.HIGHEST
    )


def _priorities(
    x: Float[Array, "*batch rows features"], seed: int
) -> UInt32[Array, "*batch rows"]:
    """A number for each row, 1 or more; 0 for rows of zeros."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # Sums modulo 2^32 do not depend on their order, as float sums do.
    column = lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1)
    of_column = _mixed(column + jnp.uint32(1))
    of_row = jnp.sum(_mixed(bits ^ of_column), axis=-1, dtype=jnp.uint32)
    row = lax.broadcasted_iota(jnp.uint32, of_row.shape, of_row.ndim - 1)
    place = row * jnp.uint32(_GOLDEN)
    of_array = jnp.sum(
        _mixed(of_row + place), axis=-1, keepdims=True, dtype=jnp.uint32
    )
    of_seed = _mixed(jnp.uint32(seed) + jnp.uint32(1))
    priority = _mixed(_mixed(of_array ^ of_seed) + place)
    # Not 0, because that stands for no token.
    priority = jnp.maximum(priority, jnp.uint32(1))
    return jnp.where((x != 0).any(-1), priority, jnp.uint32(0))


def _mixed(x: Array) -> Array:
    """A hash of every element: a bijection of the 32-bit numbers that spreads their bits."""
    for factor, shift in zip((*_MIX, 1), (16, 13, 16), strict=True):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x
