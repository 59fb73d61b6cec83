"""`Pooling`: one vector for a text, out of the hidden states of its tokens.

The formulas are those of the `sentence-transformers` package.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sqjax.models.fields import FLAG, What, check_fields

States = Float[Array, "batch tokens hidden"]
Real = Bool[Array, "batch tokens"]


def _first(x: States, real: Real) -> Array:
    """The state of the first token: of [CLS], in a text of BERT's."""
    first = jnp.argmax(real, axis=1)
    found = jnp.take_along_axis(x, first[:, None, None], axis=1)
    return found[:, 0]


def _largest(x: States, real: Real) -> Array:
    """The largest number of each channel."""
    counted = jnp.where(real[:, :, None], x, -jnp.inf)
    largest = jnp.max(counted, axis=1)
    # A row of padding alone has none.
    return jnp.where(jnp.isneginf(largest), 0, largest)


def _sum_and_count(x: States, real: Real) -> tuple[Array, Array]:
    counted = jnp.where(real[:, :, None], x, 0)
    count = jnp.sum(real, axis=1, keepdims=True)
    # A row of padding alone has a sum of 0, which stays 0.
    count = jnp.maximum(count, 1).astype(x.dtype)
    return jnp.sum(counted, axis=1), count


def _mean(x: States, real: Real) -> Array:
    """The mean over the tokens."""
    total, count = _sum_and_count(x, real)
    return total / count


def _mean_sqrt_len(x: States, real: Real) -> Array:
    """The sum over the tokens, divided by the square root of their number."""
    total, count = _sum_and_count(x, real)
    return total / jnp.sqrt(count)


_BY_NAME: Mapping[str, Callable[[States, Real], Array]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
}
#: The names of the ways to make one vector of many.
POOLINGS = tuple(_BY_NAME)


def _are_modes(x: object) -> bool:
    return isinstance(x, tuple) and len(x) > 0 and set(x) <= set(POOLINGS)


_MODES = What(f"a tuple of some of {POOLINGS}", _are_modes)


@dataclass(frozen=True)
class Pooling:
    """How the states of a text's tokens become one vector.

    Attributes:
        modes: of `POOLINGS`; the vectors of several stand one after the other.
        normalize: whether the result is divided by its length.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False

    def __post_init__(self):
        check_fields(self, {"modes": _MODES, "normalize": FLAG})


def pool(
    pooling: Pooling, x: States, mask: Real | None
) -> Float[Array, "batch channels"]:
    """The vector of each row, in the dtype of x and computed in float32.

    Args:
        pooling: how.
        x: the tokens' states.
        mask: which tokens count; None for all.
    """
    real = jnp.ones(x.shape[:2], bool) if mask is None else mask
    # In bfloat16 the sum of a hundred states would keep 8 bits.
    wide = x.astype(jnp.float32)
    vectors = [_BY_NAME[mode](wide, real) for mode in pooling.modes]
    joined = jnp.concatenate(vectors, axis=-1)
    if pooling.normalize:
        length = jnp.linalg.norm(joined, axis=-1, keepdims=True)
        joined = joined / jnp.maximum(length, 1e-12)
    return joined.astype(x.dtype)
