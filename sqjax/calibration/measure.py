"""`measure`: what is kept of one activation, and `Wanted`: what shall be kept."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.numerics.ranges import count
from sqjax.numerics.samples import Sample, gram_matrix


class Wanted(NamedTuple):
    """What calibration shall keep beside maxima and sums.

    Attributes:
        histogram: whether a histogram of |x|.
        gram: whether the Gram matrix X^T X.
        sample: of how many tokens the sample is; 0: there is none.
        seed: of the sample.
    """

    histogram: bool = False
    gram: bool = False
    sample: int = 0
    seed: int = 0


#: Maxima and sums alone.
NOTHING_MORE = Wanted()


class Probe(NamedTuple):
    """What to measure of an activation.

    Attributes:
        axes: the axes that hold its channels; all others hold tokens.
        batch: how many of `axes`, the first ones, hold a matrix each (experts): a histogram, a Gram
            matrix and a sample are kept for each of these.
        wanted: which of them.
    """

    axes: tuple[int, ...]
    batch: int = 0
    wanted: Wanted = NOTHING_MORE


class Measurement(NamedTuple):
    """What was measured of an activation.

    Of one in the body of a scan or a shard_map, every array has one more leading axis for each scan
    and mesh axis around it.

    Attributes:
        absmax: max |x| over the tokens, float32, the shape of the probe's axes.
        abs_sum: sum |x| over the tokens, the same shape.
        tokens: how many tokens there were, int32.
        reached: how many tokens were not all zeros, for each matrix, int32, (*batch,).
        counts: how many |x| lie in each bin of a `Histogram`, uint32, (*batch, BINS); None unless
            asked for.
        gram: X^T X, float32, (*batch, features, features), all features as one axis; or None.
        sample: a `Sample`, or None.
    """

    absmax: Array
    abs_sum: Array
    tokens: Array
    reached: Array
    counts: Array | None = None
    gram: Array | None = None
    sample: Any = None


def measure(
    x: Array, probe: Probe, counted: Array | None = None
) -> Measurement:
    """Statistics of the channels of an activation, over all its other axes.

    `counted` says which elements count, where not all do: booleans that broadcast against x.

    Example: x of shape (batch 2, tokens 7, channels 16) with Probe(axes=(2,)) gives an absmax of
    shape (16,), and tokens = 14. With booleans of shape (2, 7, 1) tokens is the number of True.
    """
    axes = probe.axes
    channels_last = jnp.moveaxis(x, axes, range(-len(axes), 0))
    token_axes = tuple(range(channels_last.ndim - len(axes)))
    token_shape = channels_last.shape[: len(token_axes)]
    # Not a Python int, because that would be another type than the sum of a mask.
    tokens = jnp.int32(np.prod(token_shape, dtype=int))

    if counted is not None:
        fitted = jnp.moveaxis(counted, axes, range(-len(axes), 0))
        channels_last = jnp.where(fitted, channels_last, 0)
        of_rows = fitted.any(range(len(token_shape), channels_last.ndim))
        # One boolean may stand for several rows: the heads of a token, say.
        rows = np.prod(token_shape, dtype=int) // max(of_rows.size, 1)
        tokens = jnp.sum(of_rows, dtype=jnp.int32) * jnp.int32(rows)
    magnitude = jnp.abs(channels_last).astype(jnp.float32)

    # The zeros that the mask has written reach nothing, and are in no bin: they need no care here.
    matrices = range(len(token_axes), len(token_axes) + probe.batch)
    features = tuple(range(matrices.stop, magnitude.ndim))
    is_reached = (magnitude > 0).any(features)
    reached = is_reached.sum(token_axes, dtype=jnp.int32)

    counts = None
    if probe.wanted.histogram:
        matrices_first = jnp.moveaxis(magnitude, matrices, range(probe.batch))
        counts = count(matrices_first, probe.batch)
    seen = Measurement(
        magnitude.max(token_axes, initial=0),
        magnitude.sum(token_axes),
        tokens,
        reached,
        counts,
    )
    return _with_rows(seen, channels_last, probe)


def _with_rows(
    seen: Measurement, channels_last: Array, probe: Probe
) -> Measurement:
    """The measurement with what is made of whole rows: the Gram matrix, and the sample."""
    wanted = probe.wanted
    if not wanted.gram and not wanted.sample:
        return seen
    # (tokens, matrices, features) -> (*matrices, rows, all features)
    first = channels_last.ndim - len(probe.axes)
    stack = channels_last.shape[first : first + probe.batch]
    flat = channels_last.reshape(-1, *stack, _features(channels_last, probe))
    rows = jnp.moveaxis(flat, 0, -2)
    if wanted.gram:
        seen = seen._replace(gram=gram_matrix(rows))
    if wanted.sample:
        drawn = Sample.drawn(rows, wanted.sample, wanted.seed)
        seen = seen._replace(sample=drawn)
    return seen


def _features(channels_last: Array, probe: Probe) -> int:
    """How many numbers a token has for one matrix."""
    contracted = len(probe.axes) - probe.batch
    sizes = channels_last.shape[channels_last.ndim - contracted :]
    return int(np.prod(sizes, dtype=int))
