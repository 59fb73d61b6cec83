"""Number formats and their scales: the arithmetic of symmetric quantization on plain arrays."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

Granularity = Literal["per_channel", "per_tensor"]


class Format(NamedTuple):
    """A number format: its name, the dtype that stores it, and the largest magnitude it uses."""

    name: str
    dtype: np.dtype
    bound: float


#: Symmetric int8 in [-127, 127]: -128 is never used, so a sign change is always exact.
INT8 = Format("int8", np.dtype(np.int8), 127.0)

_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def scale_from_absmax(absmax: Float[Array, "*s"], fmt: Format = INT8) -> Float[Array, "*s"]:
    """scale = absmax / bound in float32; 1 where that is zero or subnormal (a dead channel)."""
    scale = absmax.astype(jnp.float32) / fmt.bound
    return jnp.where(scale < _SMALLEST_NORMAL, jnp.float32(1.0), scale)


def to_format(x: Float[Array, "*s"], scale: Float[Array, "..."], fmt: Format = INT8) -> Shaped[Array, "*s"]:
    """q = clip(round-half-even(x / scale), -bound, bound), stored as `fmt.dtype`.

    `scale` broadcasts against `x`. The division is done in float32, so |q * scale - x| <= scale / 2 (and a
    few units in the last place) wherever |x| <= bound * scale.
    """
    q = jnp.round(x.astype(jnp.float32) / scale)
    return jnp.clip(q, -fmt.bound, fmt.bound).astype(fmt.dtype)
