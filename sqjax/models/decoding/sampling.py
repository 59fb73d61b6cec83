"""The next token from logits: the likeliest, or drawn from the likely ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How the next token is drawn; every field may be traced, so that a change of it compiles nothing anew.

    Attributes:
        temperature: the logits are divided by it.
        top_k: only the so many likeliest tokens are left; the size of the vocabulary for all.
        top_p: of those, only the fewest likeliest whose probabilities sum to at least this; 1 for all.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


def likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The token with the largest logit; the first of equals. Some token, where a logit is NaN.

    A maximum and then a search for it: XLA:CPU computes an argmax, which carries two numbers, many times slower.
    """
    last = logits.shape[-1] - 1
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(
        jnp.where(logits == largest, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1
    )


def sample(
    logits: Float[Array, "batch vocab"], how: Sampling, keys: Key[Array, " batch"]
) -> Int[Array, " batch"]:
    """A token for each row, drawn with the row's own key."""
    wide = logits.astype(
        jnp.float32
    )  # less the largest first: that is 0 however a compiler divides
    below = wide - jnp.max(wide, axis=-1, keepdims=True)
    temperature = jnp.maximum(how.temperature, jnp.finfo(jnp.float32).tiny)
    kept = restrict(below / temperature, how.top_k, how.top_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def restrict(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """The logits with -inf in place of those that top-k, and then top-p, leave out; equals stay or go together."""
    ones = jnp.ones_like(logits)
    lead = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    by_rank = jnp.where(lead >= _threshold(lead, ones, top_k.astype(jnp.float32)), lead, 0)
    target = top_p * jnp.sum(by_rank, axis=-1)
    likely = by_rank >= _threshold(by_rank, by_rank, target)
    return jnp.where((by_rank > 0) & (likely | (top_p >= 1)), logits, -jnp.inf)


def _threshold(values: Array, weights: Array, target: Array) -> Array:
    """The largest t for which the weights of values >= t sum to at least `target` in each row, (batch, 1); 0 if none.

    Values lie in [0, 1], where the bits of float32 as an integer are in the order of the numbers: 30 halvings of the
    range of integers find t exactly, which takes less time than sorting a vocabulary.
    """
    one = jnp.full(values.shape[:1], 0x3F800000, jnp.int32)

    def number(bits):
        return jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        enough = jnp.sum(jnp.where(values >= number(middle), weights, 0), axis=-1) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(one), one))
    return number(low)
