"""Codes out of the 32-bit words in which checkpoints pack them. Numpy alone, no names."""

import numpy as np
from jaxtyping import Int32, Shaped, UInt8

#: How many bits a packed code may have.
PACKED_BITS = (4, 8)
#: AutoAWQ's nibbles, the lowest first: nibble 1 of a word is output 2 of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def per_word(bits: int) -> int:
    """How many codes a word holds."""
    return 32 // bits


def unpack(
    words: Int32[np.ndarray, "*lead words"], bits: int
) -> UInt8[np.ndarray, "*lead codes"]:
    """The codes of each row of words, those in a word's lowest bits first.

    Examples:
        >>> import numpy as np
        >>> from sqjax.models.checkpoints.quantized.unpacking import unpack
        >>> unpack(np.array([[0x76543210]], np.int32), 4).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
        >>> unpack(np.array([[0x04030201]], np.int32), 8).tolist()
        [[1, 2, 3, 4]]
    """
    in_a_row = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return in_a_row
    pairs = np.stack([in_a_row & 15, in_a_row >> 4], axis=-1)
    return pairs.reshape(*words.shape[:-1], -1)


def centred(
    codes: UInt8[np.ndarray, "*shape"], bits: int
) -> Shaped[np.ndarray, "*shape"]:
    """Codes from 0 on as int8 around 0: with 4 bits 0 to 15 become -8 to 7."""
    # The difference is one modulo 256, and int8 reads that with its sign.
    return (codes - np.uint8(2 ** (bits - 1))).view(np.int8)


def in_order_of_outputs(
    codes: UInt8[np.ndarray, "rows outputs"],
) -> UInt8[np.ndarray, "rows outputs"]:
    """AutoAWQ's codes of 4 bits, which stand in another order in each word, by output."""
    places = np.argsort(_AWQ_ORDER)
    by_word = codes.reshape(codes.shape[0], -1, len(_AWQ_ORDER))
    return by_word[..., places].reshape(codes.shape)


def with_one_more(
    words: Int32[np.ndarray, "*shape"], bits: int
) -> Int32[np.ndarray, "*shape"]:
    """Words of which each code is one larger: GPTQ stores zero points less 1.

    1 is added to all codes of a word at once, as 0x11111111 with 4 bits. It was taken away so, by
    the tools that write these files. A zero point of 0 borrowed from the next code then, and gives
    back what it borrowed here: 0x50 was stored as 0x3f.

    Examples:
        >>> import numpy as np
        >>> from sqjax.models.checkpoints.quantized.unpacking import with_one_more
        >>> hex(with_one_more(np.array([0x3F], np.int32), 4)[0] & 0xFF)
        '0x50'
    """
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return (words.view(np.uint32) + np.uint32(ones)).view(np.int32)


def pack(
    codes: Shaped[np.ndarray, "*lead codes"], bits: int
) -> Int32[np.ndarray, "*lead words"]:
    """Codes around 0 in words, the inverse of `unpack` and `centred`; a last word is filled with 0.

    Examples:
        >>> import numpy as np
        >>> from sqjax.models.checkpoints.quantized.unpacking import pack
        >>> hex(pack(np.arange(-8, 0, dtype=np.int8)[None], 4)[0, 0])
        '0x76543210'
    """
    *lead, length = codes.shape
    padding = [(0, 0)] * len(lead) + [(0, -length % per_word(bits))]
    # As in `centred`, the sum is one modulo 256.
    from_zero = codes.astype(np.int8).view(np.uint8) + np.uint8(2 ** (bits - 1))
    filled = np.pad(from_zero, padding)
    if bits == 4:
        pairs = filled.reshape(*lead, -1, 2)
        filled = pairs[..., 0] | (pairs[..., 1] << 4)
    return np.ascontiguousarray(filled).view("<i4").astype(np.int32, copy=False)
