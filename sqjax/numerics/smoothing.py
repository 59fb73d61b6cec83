"""The formula of the smoothing scales s, on arrays.

A smoothing scale moves the size of a channel from the activation to the weight: (X / s)(s W) = X W.
It is none of the quantizer's scales, which say what one step of an integer is worth.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

#: The authors' floor under max |W_j|, and under s: no division by 0, and no s that erases a
#: channel.
FLOOR = 1e-5


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
