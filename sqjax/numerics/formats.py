"""Number formats and their scales: the arithmetic of quantization on plain arrays."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, Shaped

#: How many elements share a scale: an output's, all, or so many consecutive channels of an output
#: (a group size).
Granularity = Literal["per_channel", "per_tensor"] | int
FormatName = Literal["int8", "int4", "e4m3", "e5m2"]


class Format(NamedTuple):
    """A number format: its name, the dtype that stores it, and the largest magnitude it uses."""

    name: str
    dtype: np.dtype
    bound: float

    @property
    def floating(self) -> bool:
        """Whether its steps grow with the magnitude, as those of float8 do."""
        return jnp.issubdtype(self.dtype, jnp.floating)


#: Symmetric int8 in [-127, 127]: -128 is never made here, so a sign change is always exact. Weights
#: that other tools have quantized may hold it.
INT8 = Format("int8", np.dtype(np.int8), 127.0)
#: Symmetric int4 in [-7, 7]; with a zero point all of [-8, 7]. Two to a byte in the memory of a GPU
#: or TPU, one in a CPU's (see `container`).
INT4 = Format("int4", np.dtype(jnp.int4), 7.0)
#: float8 with 4 bits of exponent, 3 of mantissa, no infinity (Micikevicius et al. 2022, arXiv
#: 2209.05433).
E4M3 = Format("e4m3", np.dtype(jnp.float8_e4m3fn), 448.0)
#: float8 with 5 bits of exponent and 2 of mantissa.
E5M2 = Format("e5m2", np.dtype(jnp.float8_e5m2), 57344.0)
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (INT8, INT4, E4M3, E5M2)}


def container(fmt: Format) -> np.dtype:
    """The dtype in which arrays of a format are made on this process's backend.

    It is the format's own, but on a CPU int8 for int4.

    There an element of jnp.int4 takes a byte too, but is read without the vector units.
    """
    return (
        INT8.dtype
        if fmt == INT4 and jax.default_backend() == "cpu"
        else fmt.dtype
    )


def absmax(
    x: Shaped[Array, "..."], axis: int | Sequence[int] | None
) -> Float[Array, "..."]:
    """max |x| along some axes (None: all), which stay with size 1; NaN where one of them is NaN.

    Not jnp.max of floats, because XLA:CPU's maximum loses NaN where it is computed in vectors
    (https://github.com/openxla/xla/issues/21461). Without their signs, floats are in the order of
    their bits, infinity above all numbers and NaN above infinity, so the bits are compared.
    """
    return _largest(_without_sign(x), axis)


#: So many channels and more are compared by halves on a CPU, down to at most so many.
_MANY, _FEW = 256, 32


def absmax_of_rows(
    x: Shaped[Array, "*lead channels"],
) -> Float[Array, "*lead 1"]:
    """`absmax` along the last axis; on a CPU by halves."""
    return _largest_of_rows(_without_sign(x))


def range_of_rows(
    x: Shaped[Array, "*lead channels"],
) -> tuple[Float[Array, "*lead 1"], Float[Array, "*lead 1"]]:
    """(min, max) of 0 and the last axis; where that holds NaN, one of the two is NaN.

    As integers the bits of numbers above 0 are in the order of the numbers, and those of numbers
    below 0 are less than 0. So the largest are max(x, 0), and without its sign min(x, 0) is that of
    -x. A NaN is the largest in one of both, by its sign.
    """
    bits = _bits(x)
    low = _largest_of_rows(bits ^ _SIGN)
    return -low, _largest_of_rows(bits)


def _largest_of_rows(
    bits: Int32[Array, "*lead channels"],
) -> Float[Array, "*lead 1"]:
    """`_largest` along the last axis; on a CPU by halves.

    Because XLA:CPU compares the elements of a row one after the other, but two arrays by vectors.
    """
    channels = bits.shape[-1]
    along_rows = partial(_largest, axis=-1)
    # Halves of channels that devices share would have to move.
    is_split = jax.typeof(bits).sharding.spec[-1] is not None
    # Symbolic where `jax.export` leaves a size open.
    if is_split or not isinstance(channels, int) or channels < _MANY:
        return along_rows(bits)
    return lax.platform_dependent(bits, cpu=_by_halves, default=along_rows)


def _by_halves(
    bits: Int32[Array, "*lead channels"],
) -> Float[Array, "*lead 1"]:
    """The larger ones of both halves of a row, then of both of their halves.

    Of an odd number the halves share an element, which changes no maximum: 5 are 3 and 3.
    """
    while bits.shape[-1] > _FEW:
        half = -(-bits.shape[-1] // 2)
        bits = jnp.maximum(bits[..., :half], bits[..., -half:])
    return _largest(bits, -1)


def _largest(
    bits: Int32[Array, "..."], axis: int | Sequence[int] | None
) -> Float[Array, "..."]:
    """The float whose bits are the largest integer along some axes (None: all), and 0 at least."""
    largest = jnp.max(bits, axis=axis, keepdims=True, initial=0)
    return lax.bitcast_convert_type(largest, jnp.float32)


#: The bit of a float32's sign.
_SIGN = np.int32(-(2**31))


def _bits(x: Shaped[Array, "*s"]) -> Int32[Array, "*s"]:
    """The bits of x in float32."""
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _without_sign(x: Shaped[Array, "*s"]) -> Int32[Array, "*s"]:
    """The bits of |x| in float32, whose order as integers is that of |x|, and NaN the largest."""
    return _bits(x) & ~_SIGN


_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
#: The codes of int4 with a zero point: 16 of them.
LOWEST, HIGHEST = -8.0, 7.0


def scale_from_absmax(
    absmax: Float[Array, "*s"], fmt: Format = INT8
) -> Float[Array, "*s"]:
    """scale = absmax / bound in float32; 1 where that is zero or subnormal (a dead channel)."""
    return _alive(absmax.astype(jnp.float32) / fmt.bound)


def shared_scale(
    absmax_of_rows: Float[Array, "*s"], fmt: Format = INT8
) -> Float[Array, ""]:
    """One scale for all rows, (), from the largest of their absmaxes that are finite.

    A row that holds NaN or infinity does not touch the others, because it may be one that nobody
    reads: that of a padding token which attends to nothing.
    """
    finite = jnp.isfinite(absmax_of_rows)
    largest = jnp.max(jnp.where(finite, absmax_of_rows, 0.0), initial=0.0)
    return scale_from_absmax(largest, fmt)


def _alive(scale: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.where(scale < _SMALLEST_NORMAL, jnp.float32(1.0), scale)


def to_format(
    x: Float[Array, "*s"], scale: Float[Array, "..."], fmt: Format = INT8
) -> Shaped[Array, "*s"]:
    """q = clip(round-half-even(x / scale), -bound, bound), stored in the format's `container`.

    `scale` broadcasts against `x`. The division is done in float32, so |q * scale - x| <= scale / 2
    for integers, and <= max(|x| 2^-(m + 1), scale 2^(e - m - 1)) for a float8 of m mantissa bits
    whose smallest exponent is e (and a few units in the last place), wherever |x| <= bound * scale.
    """
    q = x.astype(jnp.float32) / scale
    q = q if fmt.floating else jnp.round(q)
    return jnp.clip(q, -fmt.bound, fmt.bound).astype(container(fmt))


def to_operand(
    x: Float[Array, "*s"], scale: Float[Array, "..."], fmt: Format
) -> Shaped[Array, "*s"]:
    """`to_format` in the dtype that products multiply: int8 for int4 too.

    Because no platform multiplies int4 with int8, and few int4 with int4.
    """
    q = to_format(x, scale, fmt)
    return q if fmt.floating else q.astype(INT8.dtype)


def zero_point_range(
    low: Float[Array, "*s"], high: Float[Array, "*s"]
) -> tuple[Float[Array, "*s"], Int8[Array, "*s"]]:
    """(scale, zero) of int4 with a zero point, for numbers in [low, high].

    scale = (high - low) / 15, zero = round(-low / scale) - 8.

    The range is made to hold 0, which is so represented exactly: by the code `zero`, in [-8, 7].
    """
    low, high = (
        jnp.minimum(low.astype(jnp.float32), 0),
        jnp.maximum(high.astype(jnp.float32), 0),
    )
    scale = _alive((high - low) / (HIGHEST - LOWEST))
    return scale, (jnp.round(-low / scale) + LOWEST).astype(jnp.int8)


def to_codes(
    x: Float[Array, "*s"], scale: Float[Array, "..."], zero: Int8[Array, "..."]
) -> Shaped[Array, "*s"]:
    """q = clip(round(x / scale) + zero, -8, 7): then (q - zero) * scale is x within scale / 2."""
    q = jnp.round(x.astype(jnp.float32) / scale) + zero.astype(jnp.float32)
    return jnp.clip(q, LOWEST, HIGHEST).astype(container(INT4))


def to_differences(
    x: Float[Array, "*s"], scale: Float[Array, "..."], zero: Int8[Array, "..."]
) -> Int8[Array, "*s"]:
    """q - zero of `to_codes`, the integer that a product multiplies: x is that times the scale.

    It is in [-15, 15], because q and zero are in [-8, 7]; so int8 holds it.
    """
    zero = zero.astype(jnp.float32)
    q = jnp.round(x.astype(jnp.float32) / scale)
    return jnp.clip(q, LOWEST - zero, HIGHEST - zero).astype(INT8.dtype)
