"""Arithmetic modulo the prime p = 2^31 - 1, on numpy arrays: exact, where floats round.

A *residue* is a number of 0 .. p - 1, and stands for all numbers that differ from it by a multiple
of p. Sums, products and quotients of residues are residues, so what a program computes of floats by
such steps it can compute of residues, without rounding, and so in any order. (They are kept as
uint32, because that is half the memory of uint64; products are taken in uint64.)

What floats have and residues have not is an order. In its place is the *character*: +1 for squares
other than 0, -1 for what is no square, 0 for 0. The character of a product is the product of the
characters, as it is for signs; and because p = 3 mod 4, the character of -x is the opposite of that
of x. So squares count as positive, and a positive multiple of x has the sign of x.

What is neither arithmetic nor a sign (exp, tanh ...) is an *oracle*: a random number, the same one
for the same residue. Nothing is known of an oracle but that equal arguments give equal results, so
what is equal with oracles in it is equal with any functions in their place.

Source: the identity test of Schwartz (1980) and Zippel (1979): two different polynomials of degree
d are equal at a random point with a probability of d / p at most.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

#: A Mersenne prime: 2^31 is 1 modulo p, so the bits above the 31st are added to those below.
PRIME = 2**31 - 1

#: A uint32 array of numbers below PRIME.
Residues = np.ndarray

#: The same, or one such number, into which numpy makes what it computes of arrays of rank 0.
Numbers = Any

_P64 = np.uint64(PRIME)
_P32 = np.uint32(PRIME)
_BITS = np.uint64(31)


def _reduced(x: Numbers) -> Residues:
    """uint64 numbers below 2^63, modulo p."""
    x = (x & _P64) + (x >> _BITS)  # below 2^33
    x = (x & _P64) + (x >> _BITS)  # at most p + 4
    return np.asarray(x - _P64 * (x >= _P64)).astype(np.uint32)


def _once(x: Numbers) -> Residues:
    """uint32 numbers below 2 p, modulo p."""
    return np.asarray(x - _P32 * (x >= _P32))


def embed(x: np.ndarray) -> Residues:
    """Floats, integers or booleans as residues: a float m 2^e is m 2^e modulo p, exactly.

    Infinity and NaN become 0, the only residue that stays what it is, as they do, when it is
    multiplied by a positive number.

    Examples:
        >>> import numpy as np
        >>> from sqjax.numerics.prime_field import embed, mul
        >>> mul(embed(np.array([0.75, -1.0])), embed(np.array([4, 4]))).tolist()
        [3, 2147483643]
    """
    x = np.asarray(x)
    if x.dtype == np.uint64:
        return np.asarray(x % _P64).astype(np.uint32)
    if x.dtype.kind in "biu":
        return np.asarray(np.mod(x.astype(np.int64), PRIME)).astype(np.uint32)
    wide = x.astype(np.float64)
    finite = np.where(np.isfinite(wide), wide, 0.0)
    mantissa, exponent = np.frexp(finite)
    # A mantissa of 53 bits is an integer; and 2^31 = 1, so that 2^e is 2^(e mod 31).
    digits = np.mod(np.ldexp(mantissa, 53).astype(np.int64), PRIME)
    shift = np.mod(exponent.astype(np.int64) - 53, 31)
    return _reduced(digits.astype(np.uint64) << shift.astype(np.uint64))


def draw(rng: np.random.Generator, shape: Sequence[int]) -> Residues:
    """Random residues."""
    return np.asarray(rng.integers(0, PRIME, tuple(shape), np.uint32))


def add(x: Numbers, y: Numbers) -> Residues:
    """x + y."""
    return _once(np.asarray(x + y))  # below 2^32


def neg(x: Numbers) -> Residues:
    """-x."""
    return _once(np.asarray(_P32 - x))


def sub(x: Numbers, y: Numbers) -> Residues:
    """x - y."""
    return add(x, neg(y))


def mul(x: Numbers, y: Numbers) -> Residues:
    """x y."""
    return _reduced(np.multiply(x, y, dtype=np.uint64))


def power(x: Numbers, exponent: int) -> Residues:
    """x^exponent; of a negative exponent that of 1 / x."""
    if exponent < 0:
        return power(inverse(x), -exponent)
    result: Numbers = np.ones_like(x)
    for bit in f"{exponent:b}":
        result = mul(result, result)
        if bit == "1":
            result = mul(result, x)
    return np.asarray(result)


def _all_ones(x: Numbers, bits: int) -> Numbers:
    """x^(2^bits - 1), whose exponent is so many ones in binary: half of them, shifted, and the
    other half. As `_squared` of numbers, and in numbers, that may be p + 4.
    """
    if bits == 1:
        return x
    half = _all_ones(x, bits // 2)
    joined = _squared(half, bits // 2, half)
    return _squared(joined, 1, x) if bits % 2 else joined


def _squared(x: Numbers, times: int, factor: Numbers | None = None) -> Numbers:
    """x^(2^times), times a factor if there is one, of uint64 numbers of at most p + 4.

    In one piece, and with results of at most p + 4 too, because most of the time goes here.
    """
    squares: list[Numbers | None] = [None] * times
    for other in [*squares, *([] if factor is None else [factor])]:
        x = x * (x if other is None else other)  # below 2^63
        x = (x & _P64) + (x >> _BITS)
        x = (x & _P64) + (x >> _BITS)
    return x


def inverse(x: Numbers) -> Residues:
    """1 / x, which is x^(p - 2); 0 for 0, as of infinity, which 0 stands for too."""
    wide = np.asarray(x).astype(np.uint64)
    # p - 2 = 4 (2^29 - 1) + 1
    return _reduced(_squared(_all_ones(wide, 29), 2, wide))


def root(x: Numbers) -> Residues:
    """The square root of a square that is a square itself: x^((p + 1) / 4).

    Of what is no square it is the root of -x. In each case the root of a product is the product of
    the roots.
    """
    return _reduced(_squared(np.asarray(x).astype(np.uint64), 29))


def character(x: Numbers) -> np.ndarray:
    """+1 for a square, -1 for what is none, 0 for 0 (int8): x^((p - 1) / 2), by Euler."""
    symbol = _reduced(_all_ones(np.asarray(x).astype(np.uint64), 30))
    return np.asarray((symbol == 1).astype(np.int8) - (symbol > 1))


def total(x: Residues, axes: Iterable[int], keepdims: bool = False) -> Residues:
    """The sum along some axes."""
    # Below 2^63 for up to 2^32 terms.
    sums = np.sum(x, tuple(axes), np.uint64, keepdims=keepdims)
    return _reduced(np.asarray(sums))


def running_total(x: Residues, axis: int) -> Residues:
    """The sums of the first 1, 2, ... elements along an axis."""
    return _reduced(np.cumsum(x, axis, np.uint64))


#: One factor is cut into limbs of 11 bits; the other has 31 bits: so a product is below 2^42, and
#: the sum of 2^11 of them below 2^53. These are integers that float64 holds exactly.
_LIMB = 11
_TERMS = 2**11
#: How many elements of a factor are held in float64 at once: 128 MiB.
_BLOCK = 2**24


def matmul(x: Residues, y: Residues) -> Residues:
    """x @ y of (..., rows, n) and (..., n, columns), exactly, by matmuls of float64.

    Examples:
        >>> import numpy as np
        >>> from sqjax.numerics.prime_field import PRIME, matmul
        >>> minus_one = np.full((1, 3), PRIME - 1, np.uint32)
        >>> matmul(minus_one, minus_one.T).tolist()
        [[3]]
    """
    if x.size > y.size:  # the smaller factor is cut, because that is less work
        return matmul(y.swapaxes(-1, -2), x.swapaxes(-1, -2)).swapaxes(-1, -2)
    columns, terms = y.shape[-1], max(1, y.shape[-2])
    width = max(1, _BLOCK // max(1, y.size // max(1, columns)))
    blocks = []
    for first in range(0, max(1, columns), width):
        block = y[..., first : first + width]
        parts = [
            _short_matmul(x[..., k : k + _TERMS], block[..., k : k + _TERMS, :])
            for k in range(0, terms, _TERMS)
        ]
        blocks.append(total(np.stack(parts), (0,)))
    return np.concatenate(blocks, -1) if len(blocks) > 1 else blocks[0]


def _short_matmul(x: Residues, y: Residues) -> Residues:
    """x @ y of at most _TERMS terms."""
    mask = np.uint32(2**_LIMB - 1)
    limbs = [x & mask, (x >> _LIMB) & mask, x >> (2 * _LIMB)]
    stacked = np.concatenate(limbs, -2).astype(np.float64)
    exact = np.matmul(stacked, y.astype(np.float64)).astype(np.uint64)
    rows = x.shape[-2]
    low, middle, high = (
        exact[..., k * rows : (k + 1) * rows, :] for k in range(3)
    )
    return _reduced(low + _shifted(middle, _LIMB) + _shifted(high, 2 * _LIMB))


def _shifted(x: np.ndarray, bits: int) -> np.ndarray:
    """2^bits x, made less than 2^53."""
    return _reduced(x).astype(np.uint64) << np.uint64(bits)


def salt(*names: object) -> int:
    """64 bits that stand for some names: other names, other oracles."""
    text = repr(names).encode()
    return int.from_bytes(
        hashlib.blake2b(text, digest_size=8).digest(), "little"
    )


def hashed(salt: int, *arguments: Numbers) -> np.ndarray:
    """64 random bits for each element, the same ones for equal arguments and salt."""
    state = np.asarray(np.uint64(salt))
    with np.errstate(over="ignore"):  # modulo 2^64
        for x in arguments:
            state = _mixed(state ^ x)
    return np.asarray(state)


def _mixed(z: Numbers) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def oracle(salt: int, *arguments: Numbers) -> Residues:
    """A random residue for each element, the same one for equal arguments and salt."""
    return _reduced(hashed(salt, *arguments) >> np.uint64(2))


def places(lines: Residues, salt: int) -> np.ndarray:
    """A number for every element of each line (the last axis), by which a line can be sorted.

    In place of the order of floats, which residues have not. Like that order it is the same after
    the line is multiplied by a positive number, after one number is added to all of it, and it
    moves with the elements when these change places; after a multiplication by -1 it is reversed.
    Equal elements have equal numbers, and of two elements alone the larger is x where x - y counts
    as positive.
    """
    count = np.uint32(lines.shape[-1])
    last = (lines.ndim - 1,)
    apart = sub(mul(lines, count), total(lines, last, keepdims=True))
    squares = mul(apart, apart)
    spread = total(squares, last, keepdims=True)
    share = hashed(salt, mul(squares, inverse(spread)))
    sizes = (share >> np.uint64(2)).astype(np.int64) + 1
    return np.asarray(character(apart) * sizes)


def reflected(x: Residues, mirror: Residues) -> Residues:
    """Every vector along the last axis, mirrored: x - 2 (x . v) v / (v . v) of the mirror v.

    An orthogonal map; v . v must not be 0. Where the sum of v is 0 it keeps the vector of ones.
    """
    column = mirror[:, None]
    length = matmul(mirror[None], column)
    step = mul(mul(mirror[None], inverse(length)), np.uint32(2))
    rows = x.reshape(-1, x.shape[-1])
    height = max(1, 2**16 // max(1, x.shape[-1]))  # what a cache holds
    made = np.empty(rows.shape, np.uint32)
    for k in range(0, len(rows), height):
        block = rows[k : k + height]
        made[k : k + height] = sub(block, mul(matmul(block, column), step))
    return made.reshape(x.shape)
