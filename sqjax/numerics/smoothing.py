"""The formula of the smoothing scales, on arrays."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

#: The authors' floor under max |W_j| and under s.
FLOOR = 1e-5


def smoothing_scales(x_absmax: Array, w_absmax: Array, alpha: Any) -> Array:
    """The formula on arrays: max(x^alpha / max(w, 1e-5)^(1 - alpha), 1e-5), and 1 where x is 0."""
    alive = x_absmax > 0
    x = jnp.where(alive, x_absmax, jnp.float32(1.0))
    w = jnp.maximum(w_absmax, jnp.float32(FLOOR))
    alpha = jnp.asarray(alpha, jnp.float32)
    s = jnp.maximum(x**alpha / w ** (1 - alpha), jnp.float32(FLOOR))
    return jnp.where(alive, s, jnp.float32(1.0))
