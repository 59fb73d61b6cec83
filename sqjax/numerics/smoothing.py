"""The formula of the smoothing scales s, on arrays.

A smoothing scale moves the size of a channel from the activation to the weight: (X / s)(s W) = X W.
It is none of the quantizer's scales, which say what one step of an integer is worth.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

#: The authors' floor under max |W_j|, and under s: no division by 0, and no s that erases a
#: channel.
FLOOR = 1e-5


#: Below this part of the median channel's range a channel was not seen alive.
NEXT_TO_NOTHING = 1 / 64


@partial(jax.jit, static_argnames="batch", inline=True)
def believable(x_absmax: Array, batch: int) -> Array:
    """Ranges of channels; what is next to nothing is taken to be the median channel's.

    Say that calibration saw a channel at 1e-6 where the others are at 1. Taken at its word it gets
    an s of 0.001. On the day that it is 1 it is 1000 after the division by s, and all other
    channels of that token round to 0. With the s of the median channel it is 1. Nothing is lost
    where it stays small. Ranges above 1/64 of the median stay as they are, and so does 0.

    Args:
        x_absmax: max |X_j|, float32: batch axes, then those of the channels.
        batch: how many batch axes there are: each matrix has its own median.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.smoothing import believable
        >>> believable(jnp.array([64.0, 2.0, 64.0, 1e-6, 0.0]), 0).tolist()
        [64.0, 2.0, 64.0, 2.0, 0.0]
    """
    flat = x_absmax.reshape(*x_absmax.shape[:batch], -1)
    if not flat.size:
        return x_absmax
    alive = flat > 0
    ascending = jnp.sort(jnp.where(alive, flat, jnp.inf), axis=-1)
    # Of an even number of channels the smaller one of the two in the middle.
    middle = jnp.maximum(alive.sum(-1, keepdims=True) - 1, 0) // 2
    median = jnp.take_along_axis(ascending, middle, axis=-1)
    too_small = alive & (flat < median * jnp.float32(NEXT_TO_NOTHING))
    return jnp.where(too_small, median, flat).reshape(x_absmax.shape)


@partial(jax.jit, inline=True)
def smoothing_scales(x_absmax: Array, w_absmax: Array, alpha: Any) -> Array:
    """s_j = max |X_j|^alpha / max |W_j|^(1 - alpha), elementwise: float32, the arguments' shape.

    In full: max(x^alpha / max(w, 1e-5)^(1 - alpha), 1e-5), and 1 where x is 0, because nothing is
    known of a channel that calibration never saw alive.

    Args:
        x_absmax: max |X_j|, float32.
        w_absmax: max |W_j|, float32.
        alpha: a number from 0 to 1, or a tracer of one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.smoothing import smoothing_scales
        >>> smoothing_scales(jnp.array([16.0, 0.0]), jnp.array([4.0, 4.0]), 0.5).tolist()
        [2.0, 1.0]
    """
    alive = x_absmax > 0
    # The 1 in dead channels also keeps their gradients finite: 0^alpha has none.
    x = jnp.where(alive, x_absmax, jnp.float32(1.0))
    w = jnp.maximum(w_absmax, jnp.float32(FLOOR))
    alpha = jnp.asarray(alpha, jnp.float32)
    s = jnp.maximum(x**alpha / w ** (1 - alpha), jnp.float32(FLOOR))
    return jnp.where(alive, s, jnp.float32(1.0))
