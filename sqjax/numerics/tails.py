"""How large the next tokens will be, from how the largest values have grown so far.

A channel whose values have a heavy tail exceeds the absmax of calibration in every new batch. Where
each channel of X / s has the same absmax, as smoothing with alpha = 1 makes it, one of the many
channels does so nearly always, and the scale that a whole tensor shares is then not what
calibration saw, but 1.3 to 4 times that.

If the largest of T values grows like T^g, then the largest of n values of F channels, each of which
reached u_j in T tokens, is about (sum over j of u_j^(1/g) n / T)^g: the maximum of Frechet
distributions (Frechet 1927; Coles 2001, "An Introduction to Statistical Modeling of Extreme
Values", chapter 3). For g -> 0, or where one channel is far above the others, that is the largest
u_j.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

#: Growth below this is none, and the power 1 / g stays finite.
LEAST_GROWTH = 1e-3
#: The smallest power of a tail whose squares are averaged.
HEAVIEST = 2.5


def growth(
    absmax: Float[Array, "channels"],
    rows: Float[Array, "sampled channels"],
    tokens: ArrayLike,
) -> Float[Array, ""]:
    """g of T^g: how the channels' maxima grow from a sample of tokens to all of them.

    It is the mean over channels of log(absmax / absmax of the sample) / log(T / sampled).

    Args:
        absmax: max |X_j| over all tokens.
        rows: the sample; rows of zeros are none.
        tokens: T, how many tokens there were.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.tails import growth
        >>> rows = jnp.array([[1.0, 2.0], [-4.0, 1.0]])
        >>> float(growth(jnp.array([8.0, 4.0]), rows, 8))  # 2 tokens -> 8: twice as large
        0.5
    """
    sampled = jnp.max(jnp.abs(rows), axis=0, initial=0)
    # Dead channels, and those that no sampled token reached, tell nothing of growth.
    known = (sampled > 0) & (absmax > 0)
    ratio = jnp.where(known, absmax / jnp.where(known, sampled, 1), 1)
    count = jnp.sum(known, dtype=jnp.float32)
    mean = jnp.sum(jnp.log(ratio)) / jnp.maximum(count, 1)
    more = _more(rows, tokens)
    found = jnp.where(more > 1, mean / jnp.log(jnp.maximum(more, 1 + 1e-6)), 0)
    return jnp.clip(found, LEAST_GROWTH, 1)


def filled(rows: Float[Array, "sampled channels"]) -> Array:
    """How many rows of a sample are tokens, float32: those that are not all zeros."""
    return jnp.sum((rows != 0).any(axis=-1), dtype=jnp.float32)


def largest_of_new_tokens(
    absmax: Float[Array, "channels"], growth: Array, share: Array
) -> Float[Array, ""]:
    """The largest |x| to expect among new tokens, not below that of calibration.

    Args:
        absmax: of each channel in calibration.
        growth: g.
        share: how many new tokens there are, relative to those of calibration.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.tails import largest_of_new_tokens
        >>> alike, one = jnp.ones(16), jnp.ones(16).at[0].set(100.0)
        >>> float(largest_of_new_tokens(alike, jnp.float32(0.5), jnp.float32(0.25)))
        2.0
        >>> float(largest_of_new_tokens(one, jnp.float32(0.5), jnp.float32(0.25)))
        100.0
    """
    largest = jnp.max(absmax, initial=0)
    # Relative to the largest, because u^(1/g) alone would overflow.
    relative = absmax / jnp.where(largest > 0, largest, 1)
    together = jnp.sum(relative ** (1 / growth)) * share
    return largest * jnp.maximum(together, 1) ** growth


def clipped_error(
    absmax: Float[Array, "channels"],
    growth: Array,
    covered: Array,
    grows: Bool[Array, "channels"],
) -> Float[Array, "channels"]:
    """The squared error to expect of values beyond a range, in as many new tokens as calibration
    had.

    Channel j, which reached u_j once, is beyond c about (u_j / c)^p times, p = 1 / g. There it has
    the tail of a Pareto distribution, whose (|x| - c)^2 is 2 c^2 / ((p - 1)(p - 2)) on average.

    Args:
        absmax: u_j, of each channel in calibration.
        growth: g.
        covered: c, the range of the scale.
        grows: the channels with such a tail (`has_tail`); of others nothing is clipped.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.tails import clipped_error
        >>> u, all_of_them = jnp.array([2.0, 1.0]), jnp.array([True, True])
        >>> clipped_error(u, jnp.float32(0.25), jnp.float32(2.0), all_of_them).round(3).tolist()
        [1.3329999446868896, 0.08299999684095383]
    """
    # The square of a heavier tail than that has no mean: it is the largest value that counts.
    power = jnp.maximum(1 / growth, HEAVIEST)
    times = (absmax / jnp.where(covered > 0, covered, 1)) ** power
    lost = times * 2 * covered**2 / ((power - 1) * (power - 2))
    return jnp.where(grows, lost, 0)


def has_tail(
    absmax: Float[Array, "channels"],
    rows: Float[Array, "sampled channels"],
    tokens: ArrayLike,
    growth: Array,
) -> Bool[Array, "channels"]:
    """The channels whose absmax is the end of the tail that the sample shows.

    The others are above twice what that tail tells: some special token has reached it, such as the
    first of a text, on which attention rests. It comes in every text, and is always alike.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.tails import has_tail
        >>> rows = jnp.array([[1.0, 1.0], [1.0, 1.0]])
        >>> has_tail(jnp.array([2.0, 900.0]), rows, 8, jnp.float32(0.5)).tolist()
        [True, False]
    """
    sampled = jnp.max(jnp.abs(rows), axis=0, initial=0)
    return absmax <= 2 * sampled * _more(rows, tokens) ** growth


def _more(rows: Float[Array, "sampled channels"], tokens: ArrayLike) -> Array:
    """How many times as many tokens there are as in the sample; 1 or more."""
    all_of_them = jnp.asarray(tokens).astype(jnp.float32)
    return jnp.maximum(all_of_them / jnp.maximum(filled(rows), 1), 1)
