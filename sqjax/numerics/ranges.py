"""Histograms of |x|, and the range of |x| that a static scale shall cover.

That range is a percentile, or the one of least expected error.

One outlier stretches the absmax, and with it the step of all other values. A smaller range clips
the few values beyond it, and rounds the rest more finely.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from sqjax._serialized import serialized
from sqjax.numerics.formats import INT8, Format

#: How a static range is chosen: the absmax, the range of least squared error, or a percentile as a
#: fraction (0.9999).
Range = Literal["absmax", "mse"] | float

#: Bins divide every octave from 2^-32 to 2^32 into 16 of equal width, so a bin is 1/16 to 1/31 of
#: its values wide.
PARTS, FIRST_OCTAVE, OCTAVES = 16, -32, 64
BINS = PARTS * OCTAVES
_OCTAVES = 2.0 ** np.arange(FIRST_OCTAVE, FIRST_OCTAVE + OCTAVES)
#: Bin i holds EDGES[i] <= |x| < EDGES[i + 1]; the last one also what is larger. All are exact in
#: float32.
EDGES = np.append(
    np.outer(_OCTAVES, 1 + np.arange(PARTS) / PARTS), 2 * _OCTAVES[-1]
).astype(np.float32)

#: `mse_range` tries absmax * 2^(-j / 16) for 16 octaves: one outlier among n values of size 1 is
#: worth clipping to about 1 only if it is smaller than sqrt(n).
_SHRINKING = (2.0 ** (-np.arange(16 * PARTS) / PARTS)).astype(np.float32)


@serialized()
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Histogram:
    """How many |x| lie in each of a fixed set of bins (`EDGES`). Fixed memory: 8 KiB a matrix.

    The bins are the same for every histogram, so two of them merge by +, in any order, with no bin
    ever rescaled. What is smaller than 2^-32, zeros above all, is not counted: every format has a
    zero, so no range helps or harms it, and what padding, a ReLU or a router has zeroed does not
    move a percentile.

    Attributes:
        low: uint32, (*batch, BINS): the counts modulo 2^32.
        high: uint32, (*batch, BINS): the counts divided by 2^32. So counts are exact below 2^64.
        absmax: float32, (*batch,): the largest |x|.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.ranges import Histogram, percentile_range
        >>> both = Histogram.of(jnp.array([1.0, -2.0, 0.0])) + Histogram.of(jnp.array([100.0]))
        >>> int(both.low.sum()), float(both.absmax), float(percentile_range(both, 0.5))
        (3, 100.0, 2.125)
    """

    low: Any
    high: Any
    absmax: Any

    @classmethod
    def of(cls, x: Float[Array, "..."], batch: int = 0) -> "Histogram":
        """The histogram of one array of less than 2^32 elements.

        Its first `batch` axes keep histograms of their own.

        Examples:
            >>> import jax.numpy as jnp
            >>> from sqjax.numerics.ranges import BINS, Histogram
            >>> Histogram.of(jnp.ones((2, 5)), batch=1).low.shape == (2, BINS)
            True
        """
        magnitude = jnp.abs(x).astype(jnp.float32)
        absmax = magnitude.max(tuple(range(batch, x.ndim)), initial=0)
        return cls.counted(count(magnitude, batch), absmax)

    @classmethod
    def counted(
        cls,
        counts: UInt32[Array, "*batch bins"],
        absmax: Float[Array, "*batch"],
    ) -> "Histogram":
        """From counts below 2^32."""
        return cls(counts, jnp.zeros_like(counts), absmax)

    @classmethod
    def empty(cls, batch: tuple[int, ...] = ()) -> "Histogram":
        """Of no values; `batch` is the shape of its stack."""
        return cls.counted(
            jnp.zeros((*batch, BINS), jnp.uint32), jnp.zeros(batch, jnp.float32)
        )

    @partial(jax.jit, inline=True)
    def __add__(self, other: "Histogram") -> "Histogram":
        low = self.low + other.low
        carry = (low < other.low).astype(jnp.uint32)
        return Histogram(
            low,
            self.high + other.high + carry,
            jnp.maximum(self.absmax, other.absmax),
        )

    @property
    def counts(self) -> Float[Array, "*batch bins"]:
        """float32: exact below 2^24, else within one part in 2^24."""
        return self.high.astype(jnp.float32) * jnp.float32(
            2**32
        ) + self.low.astype(jnp.float32)


def count(
    magnitude: Float[Array, "..."], batch: int = 0
) -> UInt32[Array, "*batch bins"]:
    """How many |x| lie in each bin, for every index of the first `batch` axes.

    A float's bits, read as an integer, grow with it: its exponent and first 4 bits of mantissa are
    its bin. The counting is a scatter-add, about a nanosecond a value on two cores: 0.7 to 1.3 ms
    for a 512 x 1536 array.
    """
    counted = partial(_count, batch=batch)
    if any(entry is not None for entry in jax.typeof(magnitude).sharding.spec):
        # On a mesh with explicit axes a scatter-add must be told how its result is sharded.
        counted = jax.sharding.auto_axes(counted, out_sharding=PartitionSpec())
    return counted(magnitude)


def _count(
    magnitude: Float[Array, "..."], batch: int
) -> UInt32[Array, "*batch bins"]:
    """`count` of an array that is sharded as the compiler likes."""
    lead = magnitude.shape[:batch]
    stack, each = math.prod(lead), math.prod(magnitude.shape[batch:])
    # Each matrix has BINS + 1 counters in a row: one for bin -1, what is too small, and its bins.
    first = lax.broadcasted_iota(jnp.int32, (stack, each), 0) * (BINS + 1)
    counters = first + bin_of(magnitude.reshape(stack, each)) + 1
    chosen = jnp.zeros(stack * (BINS + 1), jnp.uint32).at[
        counters.reshape(stack * each)
    ]
    counts = chosen.add(jnp.uint32(1), mode="promise_in_bounds")
    return counts.reshape(*lead, BINS + 1)[..., 1:]


def bin_of(magnitude: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """The bin of each |x|; negative where it is smaller than all of them."""
    bits = lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32)
    mantissa = jnp.finfo(jnp.float32).nmant - PARTS.bit_length() + 1
    first = (FIRST_OCTAVE - jnp.finfo(jnp.float32).minexp + 1) * PARTS
    return jnp.clip((bits >> mantissa) - first, -1, BINS - 1)


def percentile_range(histogram: Histogram, p: float) -> Float[Array, "*batch"]:
    """The smallest edge of a bin below which lie at least p of the counted |x|; at most the absmax.

    So it is at most one bin (1/16) above the percentile of the values themselves. Zeros do not
    count (`Histogram`): of all values even more lie below. The share above an edge is summed in
    float32, from the largest values down. Range from percentiles: McKinstry et al. 2018, arXiv
    1809.04191; Wu et al. 2020, arXiv 2004.09602.

    Args:
        histogram: of |x|.
        p: a fraction in (0, 1]; 1 gives the absmax.

    Raises:
        ValueError: p is no such fraction.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.ranges import Histogram, percentile_range
        >>> float(percentile_range(Histogram.of(jnp.array([1.0] * 99 + [1000.0])), 0.99))
        1.0625
    """
    if not 0 < p <= 1:
        raise ValueError(
            f"percentile_range: expected a fraction in (0, 1], got {p}: 0.9999 is the 99.99th "
            "percentile"
        )
    return _reaching(histogram, np.float32(1 - p))


@jax.jit
def _reaching(
    histogram: Histogram, beyond_at_most: Any
) -> Float[Array, "*batch"]:
    """The smallest edge above which lies at most this share of the counted |x|."""
    counts = histogram.counts
    within = lax.cumsum(counts, axis=counts.ndim - 1, reverse=True)
    beyond = within - counts  # the share above each bin's upper edge
    enough = beyond <= beyond_at_most * within[..., :1]
    upper = jnp.asarray(np.append(EDGES[1:-1], np.float32(np.inf)))
    return jnp.minimum(upper[jnp.argmax(enough, axis=-1)], histogram.absmax)


@partial(jax.jit, static_argnames="fmt")
def mse_range(
    histogram: Histogram, fmt: Format = INT8
) -> Float[Array, "*batch"]:
    """The range t of least `expected_error` among absmax * 2^(-j / 16), j = 0 .. 255.

    The absmax is one of them. So by the histogram's account it never loses to absmax; among equals
    the largest is taken.
    Outliers count too: one among n values of size 1 is clipped far only if it is smaller than about
    sqrt(n). Ranges of least squared error: Sung et al. 2015, arXiv 1511.06488; Choukroun et al.
    2019, arXiv 1902.06822.

    Args:
        histogram: of |x|.
        fmt: the format that x is rounded to.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sqjax.numerics.ranges import Histogram, mse_range
        >>> x = jax.random.normal(jax.random.key(0), (20000,)).at[0].set(50.0)
        >>> 4.0 < float(mse_range(Histogram.of(x))) < 50.0
        True
    """
    absmax = _positive(histogram.absmax)
    tried = absmax.reshape(-1, 1) * jnp.asarray(_SHRINKING)[None, :]
    best = jnp.argmin(_errors(histogram, tried, fmt), axis=1, keepdims=True)
    chosen = jnp.take_along_axis(tried, best, axis=1).reshape(absmax.shape)
    return jnp.minimum(chosen, histogram.absmax)


def expected_error(
    histogram: Histogram, t: Float[Array, "*batch"], fmt: Format = INT8
) -> Float[Array, "*batch"]:
    """The mean of (x - Q(x))^2 over the counted x. Q rounds x to `fmt`, its range scaled to t.

    Let u = |x| bound / t, g_0 = 0 < g_1 < ... the magnitudes of the format, and g_r the nearest one
    to u; beyond the largest one that is clipping. Between g_(k-1) and g_k the squared error
    integrates to (g_k - g_(k-1))^3 / 12, so

        F(u) = integral from 0 to u of (v - g(v))^2 dv
             = sum over k <= r of (g_k - g_(k-1))^3 / 12 + (u - g_r)^3 / 3

    is exact for every u: small values that become 0, steps that grow (float8), and clipped values
    alike. Within a bin the values are taken to be spread evenly, so its mean is (F(b) - F(a)) / (b
    - a) in units of (t / bound)^2. The bin of the absmax ends there, and one of its values is
    known: the absmax itself. So a single outlier, alone in its bin, costs exactly what clipping it
    costs.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.ranges import Histogram, expected_error
        >>> float(expected_error(Histogram.of(jnp.array([3.0, 3.0])), jnp.float32(1.0)))
        4.0
    """
    return _errors(histogram, t.reshape(-1, 1), fmt).reshape(t.shape)


@partial(jax.jit, static_argnames="fmt")
def _errors(
    histogram: Histogram, ranges: Float[Array, "stack n"], fmt: Format
) -> Float[Array, "stack n"]:
    """`expected_error` of several ranges for each matrix.

    One matrix after the other, because its table of 256 ranges x 1024 bins takes a megabyte.
    """
    counts, absmax = (
        histogram.counts.reshape(-1, BINS),
        histogram.absmax.reshape(-1),
    )
    return lax.map(
        lambda one: _errors_of_one(one[0], one[1], one[2], fmt),
        (counts, absmax, ranges),
    )


def _errors_of_one(
    counts: Float[Array, "bins"],
    absmax: Float[Array, ""],
    ranges: Float[Array, "n"],
    fmt: Format,
) -> Float[Array, "n"]:
    """`expected_error` of several ranges for one matrix.

    One value, the absmax, is known: its error is counted by itself, and its bin has one value less.
    """
    largest = _positive(absmax)
    scale = ranges / fmt.bound
    u_max = largest / scale
    error_of_largest = (u_max - _nearest(u_max, fmt)[0]) ** 2
    is_bin_of_largest = jnp.arange(BINS) == bin_of(absmax)
    one = is_bin_of_largest.astype(jnp.float32)

    edges = jnp.minimum(jnp.asarray(EDGES), largest)
    u = edges[None, :] / scale[:, None]
    width, integral = jnp.diff(u), jnp.diff(_integral(u, fmt))
    mean = integral / jnp.where(width > 0, width, 1)
    # Where the bin of the absmax begins just below it, the difference of two integrals is noise.
    thin = width < u_max[:, None] * 2**-12
    mean = jnp.where(
        thin & is_bin_of_largest[None, :], error_of_largest[:, None], mean
    )

    others = jnp.maximum(counts - one, 0)
    total = (mean * others[None, :]).sum(1) + error_of_largest * one.sum()
    return scale**2 * total / jnp.maximum(counts.sum(), 1)


def _integral(u: Float[Array, "*s"], fmt: Format) -> Float[Array, "*s"]:
    """F(u) of `expected_error`."""
    g, before = _nearest(u, fmt)
    return before + (u - g) ** 3 / 3


def _nearest(
    u: Float[Array, "*s"], fmt: Format
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """(g_r, the sum over k <= r of (g_k - g_(k-1))^3 / 12) of `expected_error`."""
    grid = magnitudes(fmt)
    before = np.append(0, np.cumsum(np.diff(grid) ** 3 / 12))
    halfway = (grid[1:] + grid[:-1]) / 2
    r = jnp.searchsorted(jnp.asarray(halfway, jnp.float32), u)
    return jnp.asarray(grid, jnp.float32)[r], jnp.asarray(before, jnp.float32)[
        r
    ]


def magnitudes(fmt: Format) -> np.ndarray:
    """Every magnitude that a format can represent, from 0 up, in float64."""
    if not fmt.floating:
        return np.arange(fmt.bound + 1)
    without_sign = np.arange(128, dtype=np.uint8)
    values = without_sign.view(fmt.dtype).astype(np.float64)
    return values[values <= fmt.bound]


def _positive(absmax: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """absmax, and 1 where it is below all bins: nothing is counted there."""
    return jnp.where(absmax < EDGES[0], jnp.float32(1), absmax)


def is_range(how: Any) -> bool:
    """Whether `how` is a `Range`."""
    if isinstance(how, str):
        return how in ("absmax", "mse")
    return isinstance(how, float) and 0 < how <= 1


def find_range(
    histogram: Histogram, how: Range, fmt: Format = INT8
) -> Float[Array, "*batch"]:
    """The range that `how` says: `mse_range`, `percentile_range` or the absmax."""
    if how == "absmax":
        return histogram.absmax
    if how == "mse":
        return mse_range(histogram, fmt)
    return percentile_range(histogram, how)
