"""The next token from logits: the likeliest, or drawn from the likely ones."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How the next token is drawn; every field is traced, so that a change compiles nothing anew.

    Attributes:
        temperature: the logits are divided by it.
        top_k: only the so many likeliest tokens are left; the size of the vocabulary for all.
        top_p: of those, only the fewest likeliest whose probabilities sum to at least this; 1 for
            all.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


def row_keys(seed: Any, rows: int) -> Key[Array, " batch"]:
    """A random key for each row: from one seed and the row's number, or from the row's own seed."""
    several = list(seed) if np.ndim(seed) else [seed]
    for one in several:
        # Numbers of 32 bits are what jax makes keys of.
        if not hasattr(one, "__index__") or not -(2**31) <= one < 2**32:
            raise ValueError(
                f"generate: expected seeds to be whole numbers of 32 bits, got {one!r}; take "
                "seed % 2**32"
            )
    if np.ndim(seed) == 0:
        key = jax.random.key(operator.index(seed))
        numbers = jnp.arange(rows, dtype=jnp.uint32)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    if len(several) != rows:
        raise ValueError(
            f"generate: expected one seed, or one for each of {rows} prompts, got {len(several)}"
        )
    return jnp.stack([jax.random.key(operator.index(s)) for s in several])


def likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The token with the largest logit; the first of equals. Some token, where a logit is NaN.

    A maximum and then a search for it, because XLA:CPU computes an argmax, which carries two
    numbers, many times slower.
    """
    last = logits.shape[-1] - 1
    largest = jnp.max(logits, axis=-1, keepdims=True)
    tokens = jnp.arange(last + 1, dtype=jnp.int32)
    # `last` where the logit is not the largest, so that the minimum is the first that is.
    return jnp.min(jnp.where(logits == largest, tokens, last), axis=-1)


def sample(
    logits: Float[Array, "batch vocab"],
    how: Sampling,
    keys: Key[Array, " batch"],
) -> Int[Array, " batch"]:
    """A token for each row, drawn with the row's own key."""
    wide = logits.astype(jnp.float32)
    # The largest is subtracted before the division, because 0 stays 0 whatever it is divided by:
    # for tiny temperatures the likeliest token keeps a finite logit.
    below = wide - jnp.max(wide, axis=-1, keepdims=True)
    temperature = jnp.maximum(how.temperature, jnp.finfo(jnp.float32).tiny)
    kept = restrict(below / temperature, how.top_k, how.top_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def restrict(
    logits: Float[Array, "batch vocab"],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Float[Array, "batch vocab"]:
    """The logits with -inf in place of those that top-k, and then top-p, leave out.

    Tokens of equal logits stay or go together. For example logits log([0.5, 0.3, 0.1, 0.1]) with
    top_k = 4 and top_p = 0.75 keep the first two, because 0.5 < 0.75 <= 0.5 + 0.3.
    """
    # Probabilities up to a factor, from 0 to 1: the likeliest token has 1.
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    ones = jnp.ones_like(logits)
    least_of_top_k = _threshold(weights, ones, top_k.astype(jnp.float32))
    in_top_k = jnp.where(weights >= least_of_top_k, weights, 0)
    target = top_p * jnp.sum(in_top_k, axis=-1)
    in_top_p = in_top_k >= _threshold(in_top_k, in_top_k, target)
    # With top_p = 1 everything stays, also what rounding of the sums would leave out.
    kept = (in_top_k > 0) & (in_top_p | (top_p >= 1))
    return jnp.where(kept, logits, -jnp.inf)


def _threshold(values: Array, weights: Array, target: Array) -> Array:
    """The largest t for which the weights of values >= t sum to at least `target` in each row.

    The result is (batch, 1); 0 where there is no such t. For example values [1, 0.5, 0.2] of
    weight 1 each with target 2 give 0.5.

    Values lie in [0, 1], where the bits of float32 as an integer are in the order of the numbers:
    about 30 halvings of the range of integers find t exactly, which takes less time than sorting a
    vocabulary.
    """
    bits_of_one = jnp.full(values.shape[:1], 0x3F800000, jnp.int32)

    def number(bits):
        return jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        heavy = jnp.where(values >= number(middle), weights, 0)
        enough = jnp.sum(heavy, axis=-1) >= target
        return jnp.where(enough, middle, low), jnp.where(
            enough, high, middle - 1
        )

    range_of_bits = jnp.zeros_like(bits_of_one), bits_of_one
    low, _ = jax.lax.fori_loop(0, 31, halve, range_of_bits)
    return number(low)
