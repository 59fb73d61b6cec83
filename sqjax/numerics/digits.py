"""Float rows as int8 digits to the base 254: so float activations meet int8 codes in int8 products.

A row x with the scale s = absmax / 127 is s (q1 + q2 / 254 + q3 / 254^2 + ...), every q in [-127,
127]. The base is 254 because what rounding to q1 leaves is at most half a step, and 127 of its
254ths are just that. Each digit is multiplied on its own, and the sums are added in float.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from sqjax.numerics.formats import absmax_of_rows, scale_from_absmax, to_format

#: How many times less a digit counts than the one before.
BASE = 254.0


def two_digits(
    rows: Float[Array, "*lead rows n"],
) -> tuple[Int8[Array, "*lead rows2 n"], Float[Array, "*lead rows 1"]]:
    """Rows as scale * (high + low / 254), off by at most scale / 508.

    The row (1, 0.003) has the scale 1/127, the high digits (127, 0) and the low digits (0, 97):
    97 / 254 / 127 = 0.003007. By the high digits alone 0.003 would be 0.

    Returns:
        (digits, scale): all rows of high digits, then all rows of low ones; a scale for each row.
    """
    scale = scale_from_absmax(absmax_of_rows(rows))
    high = to_format(rows, scale)
    remainder = rows / scale - high.astype(jnp.float32)
    low = to_format(remainder, jnp.float32(1 / BASE))
    return jnp.concatenate([high, low], axis=-2), scale


def three_digits(
    x: Float[Array, "rows n"],
) -> tuple[Int8[Array, "rows3 n"], Float[Array, "rows3 1"]]:
    """Rows as the sum of three digits, each times a scale of its own: s, s / 254, s / 254^2.

    What is left out is at most s / (2 * 254^2), 2^-24 of the row's absmax: less than float32
    rounds. What a digit leaves is taken from x itself, not from x / s as in `two_digits`, because
    at the third digit the rounding of that division would count.

    Returns:
        (digits, scales): all rows of first digits, then all of second, then all of third ones.
    """
    scale = scale_from_absmax(absmax_of_rows(x))
    rest = x.astype(jnp.float32)
    digits, scales = [], []
    for _ in range(3):
        digit = to_format(rest, scale)
        rest = rest - digit.astype(jnp.float32) * scale
        digits.append(digit)
        scales.append(scale)
        scale = scale / BASE
    return jnp.concatenate(digits), jnp.concatenate(scales)
