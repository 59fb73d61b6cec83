"""Two int4 in a byte: the layout of files, and that of a key/value cache.

They differ because their readers do. A file is read once, by anyone, so neighbours share a byte, as
in other tools' files. A cache is read at every step, so the two halves of a vector share bytes:
unpacking them is two shifts and a concatenation, with no interleaving.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Shaped, UInt8

from sqjax.numerics.formats import INT4


def pack_int4(
    x: Shaped[Array | np.ndarray, "*lead n"],
) -> UInt8[np.ndarray, "*lead packed"]:
    """int4 as files hold it, two to a byte: element 2i in the low nibble, 2i + 1 in the high one.

    The last axis of odd length ends in a nibble of zero.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.int4 import pack_int4, unpack_int4
        >>> packed = pack_int4(jnp.array([1, -1, 7], jnp.int4))
        >>> packed.tolist(), unpack_int4(packed, 3).tolist()
        ([241, 7], [1, -1, 7])
    """
    nibbles = np.asarray(x).astype(np.int8).view(np.uint8) & 15
    if nibbles.shape[-1] % 2:
        padding = np.zeros((*nibbles.shape[:-1], 1), np.uint8)
        nibbles = np.concatenate([nibbles, padding], axis=-1)
    low, high = nibbles[..., ::2], nibbles[..., 1::2]
    return low | (high << 4)


def unpack_int4(
    packed: UInt8[np.ndarray, "*lead packed"], length: int
) -> Shaped[np.ndarray, "*lead n"]:
    """The int4 elements of `pack_int4`; `length` is that of the last axis.

    Raises:
        ValueError: `length` elements do not take so many bytes.
    """
    expected = (length + 1) // 2
    if packed.shape[-1] != expected:
        raise ValueError(
            f"unpack_int4: {length} elements take {expected} bytes, got {packed.shape[-1]}"
        )
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    nibbles = pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[
        ..., :length
    ]
    # A nibble of 8 to 15 stands for -8 to -1: flipping its top bit and taking 8 away does that.
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(INT4.dtype)


def pack_halves(codes: Shaped[Array, "*lead n"]) -> Int8[Array, "*lead half"]:
    """Two int4 in a byte: element i in the low nibble, element i + n / 2 in the high one.

    (1, -1, 7, 2) becomes the bytes 1 | 7 << 4 and 15 | 2 << 4.
    """
    low, high = jnp.split(codes.astype(jnp.int8), 2, axis=-1)
    return (low & 15) | (high << 4)


def unpack_halves(packed: Int8[Array, "*lead half"]) -> Int8[Array, "*lead n"]:
    """The codes of `pack_halves`, in int8: a right shift of int8 copies the sign bit."""
    low, high = (packed << 4) >> 4, packed >> 4
    return jnp.concatenate([low, high], axis=-1)
