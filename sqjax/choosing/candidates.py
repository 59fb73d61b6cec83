"""What smoothing scales cost: the error of every site's output, for many candidates of s.

A candidate is an s for each fold group. A site's error is that of its output under the real
quantizers, relative to the output itself:

    the mean over tokens x of |x W - Q(x / s) Q(s W)|^2 / |x W|^2

With quantized activations these are the sample of tokens in the statistics. Where activations stay
float the Gram matrix gives |X W - X Q(s W) / s|^2 / |X W|^2 of all tokens together, exactly: see
`sqjax.numerics.output_error`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from sqjax._shapes import other_axes
from sqjax._trees import PyTree
from sqjax.calibration.stats import Stats
from sqjax.choosing.matrices import in_matrix, stacked
from sqjax.folding.apply import leaves_by_path
from sqjax.folding.graph import Group, Site, paths_of
from sqjax.methods.quantization import Rules, site_schemes
from sqjax.numerics.formats import (
    Format,
    absmax,
    range_of_rows,
    scale_from_absmax,
    to_differences,
    to_format,
    zero_point_range,
)
from sqjax.numerics.output_error import EXACT, gram_error
from sqjax.numerics.ranges import Histogram, find_range
from sqjax.numerics.tails import (
    clipped_error,
    filled,
    growth,
    has_tail,
    largest_of_new_tokens,
)
from sqjax.weights.qtensor import dequantize
from sqjax.weights.quantize import named, quantize_weight
from sqjax.weights.schemes import Indices, PerToken, Scheme, Static

#: {fold group: candidates of its s, (candidates, group.size)}.
Candidates = Mapping[str, Array]
#: {site: how it is quantized}.
Schemes = Mapping[str, Scheme]
#: Candidates are tried so many at once that their arrays stay below this size.
CHUNK_BYTES = 64 * 2**20


class Seen(NamedTuple):
    """What calibration knows of a site's activation. Batch axes come first.

    Attributes:
        absmax: max |X_j|, (*batch, *channels).
        rows: the sample of tokens, (*batch, tokens, features), or None.
        gram: the Gram matrix, (*batch, features, features), or None.
        tokens: how many tokens there were, (*batch,).
    """

    absmax: Array
    rows: Array | None
    gram: Array | None
    tokens: Array


class Choice(NamedTuple):
    """Of every group the best of its candidates.

    Attributes:
        s: {group: its s}, ready for `fold`.
        chosen: {group: which candidate was taken}; for a stack one for each step, (steps,).
        errors: {group: the error of each candidate, the sum over its sites}: (candidates,), or
            (candidates, steps).
    """

    s: dict[str, Array]
    chosen: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]

    def values(self, tried: np.ndarray) -> dict[str, Any]:
        """{group: what stands in `tried` at its choice}: a number; for a stack an array."""
        return {
            name: tried[index] if np.ndim(index) else float(tried[index])
            for name, index in self.chosen.items()
        }


def searched_schemes(stats: Stats, rules: Rules, what: str) -> Schemes:
    """{site: its scheme}, of the matmuls' weights that the rules quantize.

    Raises:
        ValueError: as `quantize` for the rules; a scheme whose error does not hang on what is
            folded alone.
    """
    sites = paths_of(stats.graph.sites)
    schemes = site_schemes(stats.graph, rules)
    for path in sites:
        scheme = schemes.get(path)
        for field in ("smoothing", "outliers", "rotation"):
            if getattr(scheme, field, None) is not None:
                raise ValueError(
                    f"{what}: {path}: expected a scheme without {field}, because s is chosen for "
                    f"what is folded; search with scheme.replace({field}=None)"
                )
    return {path: schemes[path] for path in sites if path in schemes}


def searched_groups(
    stats: Stats,
    groups: str | Iterable[str],
    schemes: Schemes,
    what: str,
    *,
    weights_only: bool = False,
) -> tuple[Group, ...]:
    """The groups with a quantized site whose errors can be computed.

    Convolutions have neither sample nor Gram matrix, so a group with one of these is left out: it
    stays as it is.

    Raises:
        ValueError: the statistics lack what a site's error is computed from; names the site, and
            says how to calibrate.
    """
    kernels = {site.path for site in stats.graph.sites if site.kernel}
    chosen = []
    for group in stats.graph.select(groups):
        quantized = [path for path in group.paths if path in schemes]
        if not quantized or not kernels.isdisjoint(quantized):
            continue
        for path in quantized:
            option = _lacks(stats, path, schemes[path], weights_only)
            if option:
                raise ValueError(
                    f"{what}: {path}: expected statistics from which its error can be computed, "
                    f"got some without; call calibrate(..., {option})"
                )
        chosen.append(group)
    return tuple(chosen)


def _lacks(
    stats: Stats, path: str, scheme: Scheme, weights_only: bool
) -> str | None:
    """What calibration would have to be asked for, for this site's error to be known; or None."""
    if weights_only:
        return None if path in stats.gram else "gram=True"
    if scheme.quantizes_activation:
        return None if path in stats.sample else "sample=512"
    known = path in stats.gram or path in stats.sample
    return None if known else "gram=True"


def choose(
    params: PyTree,
    stats: Stats,
    schemes: Schemes,
    candidates: Candidates,
    *,
    weights_only: bool = False,
) -> Choice:
    """Of every group the candidate of least error; of equal ones the first.

    With `weights_only` the activations are taken to stay float, and the Gram matrix is read.

    Each group is judged by itself, all others as they are. Where s is stacked (layers of a scan),
    each step has its own choice. One program is compiled for each shape of site, not for each site.
    """
    leaves = leaves_by_path(params, stats.graph)
    sites = {site.path: site for site in stats.graph.sites}
    judged = _Judged(leaves, sites, stats, schemes, weights_only)
    groups = [g for g in stats.graph.groups if g.name in candidates]
    found = {
        group.name: _of_group(group, judged, candidates[group.name])
        for group in groups
    }
    # All at once, because each transfer waits for the device.
    errors = jax.device_get(found)
    s, index = {}, {}
    for group in groups:
        # The first of equal ones: no smoothing, where nothing is better.
        best = np.argmin(errors[group.name], axis=0)
        index[group.name] = best
        s[group.name] = _taken(candidates[group.name], best)
    return Choice(s, index, errors)


def _taken(candidates: Array, best: np.ndarray) -> Array:
    """The chosen s, (size,): of a stack, the s of step i come from the candidate best[i]."""
    # A group lists its scales step by step, so each choice holds for as many in a row.
    size = candidates.shape[1]
    which = np.repeat(best.reshape(-1), size // best.size)
    return candidates[which, np.arange(size)]


class _Judged(NamedTuple):
    """What candidates are judged by, of the whole model."""

    leaves: Mapping[str, Any]
    sites: Mapping[str, Site]
    stats: Stats
    schemes: Schemes
    weights_only: bool


def _of_group(group: Group, judged: _Judged, candidates: Array) -> Array:
    """The error of each candidate, summed over sites: (candidates,) or (candidates, steps)."""
    steps = math.prod(group.steps)
    total = jnp.zeros((candidates.shape[0], steps), jnp.float32)
    for path, labels in group.sites:
        if path not in judged.schemes:
            continue
        site, scheme = judged.sites[path], judged.schemes[path]
        by_gram = judged.weights_only or not scheme.quantizes_activation
        with named(path):
            of_matrices = site_errors(
                judged.leaves[path],
                seen(judged.stats, site, by_gram),
                _of_channels(candidates, labels.array),
                site=site._replace(path=""),
                scheme=scheme,
            )
        where = _step_of(labels.array, len(site.batch), group.size // steps)
        total = total + _summed_by_step(of_matrices, where, steps)
    return total if group.steps else total[:, 0]


def seen(stats: Stats, site: Site, by_gram: bool) -> Seen:
    """What a site's errors are computed from: the Gram matrix if it will do and is there, else the
    sample.
    """
    path = site.path
    gram = stats.gram.get(path) if by_gram else None
    rows = stats.sample[path].rows if gram is None else None
    stack = site.channels[: len(site.batch)]
    tokens = jnp.broadcast_to(stats.count[path], stack)
    return Seen(stats.absmax[path], rows, gram, tokens)


@jax.jit
def _of_channels(candidates: Array, labels: Array) -> Array:
    """s of each channel of a site: (candidates, *channels); 1 where a channel has none."""
    # Labels count scales from 1, so a column of ones in front stands for no scale.
    ones = jnp.ones((candidates.shape[0], 1), jnp.float32)
    return jnp.concatenate([ones, candidates], axis=1)[:, labels]


def _step_of(labels: np.ndarray, batch: int, size: int) -> np.ndarray:
    """Which step each matrix of a site belongs to; -1 if none of its channels has a scale.

    Example: at 2 steps of 4 scales, the labels [[1, 2, 3, 4], [5, 6, 7, 8]] of two matrices say
    (0, 1).
    """
    # Step i has the labels i size + 1 to (i + 1) size; the largest of a matrix tells.
    flat = labels.reshape(math.prod(labels.shape[:batch]), -1)
    return (flat.max(axis=1) + size - 1) // size - 1


@partial(jax.jit, static_argnames="steps")
def _summed_by_step(errors: Array, step_of: Array, steps: int) -> Array:
    """(candidates, matrices) as (candidates, steps). Matrices of no step (-1) are dropped."""
    # Into a column more, which is cut off.
    into = jnp.where(step_of < 0, steps, step_of)
    summed = jnp.zeros((errors.shape[0], steps + 1), jnp.float32)
    return summed.at[:, into].add(errors)[:, :steps]


@partial(jax.jit, static_argnames=("site", "scheme"))
def site_errors(
    leaf: Array, seen: Seen, s: Array, *, site: Site, scheme: Scheme
) -> Array:
    """The relative error of a site's output for each candidate and matrix of its stack.

    Args:
        leaf: the weight, float.
        seen: what is known of its activation.
        s: (candidates, *channels).
        site: where its axes are; without its path, because it is a key of compiled programs.
        scheme: how it is quantized.

    Returns:
        float32, (candidates, matrices): the mean over tokens of |x W - Q(x / s) Q(s W)|^2 /
            |x W|^2; with a Gram matrix, which knows no single tokens, the ratio of sums over all
            tokens; 0 where X W is 0.
    """
    batch = len(site.batch)
    stack = math.prod(site.channels[:batch])
    leaf = stacked(leaf, site)
    seen = jax.tree.map(lambda x: x.reshape(stack, *x.shape[batch:]), seen)
    # Matrix by matrix, and for each candidate by candidate: all at once would not fit.
    s = s.reshape(s.shape[0], stack, *s.shape[1 + batch :]).swapaxes(0, 1)
    axes = in_matrix(site)

    def of_matrix(operands: tuple[Array, Seen, Array]) -> Array:
        weight, own, candidates = operands
        matrix = Matrix(weight, own, axes)
        chunk = max(1, CHUNK_BYTES // _bytes_of(matrix))
        error = partial(_error, matrix, _float_output(matrix), scheme)
        return lax.map(error, candidates, batch_size=chunk)

    return lax.map(of_matrix, (leaf, seen, s)).T


class Matrix(NamedTuple):
    """One matrix of a site: its weight, what is known of its activation, its contracted axes."""

    weight: Array
    seen: Seen
    axes: tuple[int, ...]

    def flat(self, x: Array) -> Array:
        """An array of the weight's shape as (features, outputs)."""
        outer = other_axes(x.ndim, self.axes)
        features = math.prod(x.shape[axis] for axis in self.axes)
        return x.transpose(*self.axes, *outer).reshape(features, -1)

    def times(self, s: Array) -> Array:
        """s W, in float32, for an s of the contracted axes."""
        # s has the contracted axes; they are moved to where the weight has them.
        spread = s.reshape(s.shape + (1,) * (self.weight.ndim - s.ndim))
        spread = jnp.moveaxis(spread, range(s.ndim), self.axes)
        return self.weight.astype(jnp.float32) * spread


def _bytes_of(matrix: Matrix) -> int:
    """About how much memory one candidate takes: some copies of the weight, and of the outputs."""
    size = matrix.weight.size
    rows = matrix.seen.rows
    if rows is not None:
        tokens, features = rows.shape
        size += 2 * rows.size + 2 * tokens * (matrix.weight.size // features)
    return 4 * 3 * max(size, 1)


class FloatOutput(NamedTuple):
    """What candidates are compared with: the weight as (features, outputs), X W of the sampled
    tokens (None with a Gram matrix), and |X W|^2.
    """

    weight: Array
    outputs: Array | None
    size: Array


def _float_output(matrix: Matrix) -> FloatOutput:
    """Computed once for a matrix, because it is the same for all candidates."""
    weight = matrix.flat(matrix.weight.astype(jnp.float32))
    gram, rows = matrix.seen.gram, matrix.seen.rows
    if gram is not None:
        return FloatOutput(weight, None, gram_error(weight, gram).sum())
    assert rows is not None  # `searched_groups` has seen to it
    outputs = jnp.matmul(rows, weight, precision=EXACT)
    return FloatOutput(weight, outputs, jnp.sum(outputs**2))


def _error(
    matrix: Matrix, exact: FloatOutput, scheme: Scheme, s: Array
) -> Array:
    """The relative error of one candidate, ()."""
    divided = matrix.seen.absmax / s
    weight = quantize_weight(matrix.times(s), matrix.axes, scheme, divided)
    got = matrix.flat(dequantize(weight.tensor))
    seen, s = matrix.seen, s.reshape(-1)
    if seen.gram is not None:
        # Activations stay float, so dividing X by s is as good as dividing the weight's rows.
        change = got / s[:, None] - exact.weight
        noise = gram_error(change, seen.gram).sum()
        return jnp.where(exact.size > 0, noise / _or_one(exact.size), 0)
    assert seen.rows is not None
    assert exact.outputs is not None
    x = seen.rows / s[None, :]
    rounded, clipped = _as_quantized(x, divided.reshape(-1), seen, scheme)
    change = jnp.matmul(rounded, got, precision=EXACT) - exact.outputs
    lost = jnp.sum(clipped[:, None] * got**2) / _or_one(exact.size)
    return _mean_of_tokens(change, exact.outputs) + lost


def _mean_of_tokens(change: Array, outputs: Array) -> Array:
    """The mean over tokens of |change|^2 / |output|^2; tokens without any output are none.

    Each by itself, because a norm comes after most outputs: a token of small outputs matters as
    much as one of large ones.
    """
    of_token = jnp.sum(outputs**2, axis=1)
    alive = of_token > 0
    relative = jnp.sum(change**2, axis=1) / _or_one(of_token)
    count = jnp.sum(alive, dtype=jnp.float32)
    return jnp.sum(jnp.where(alive, relative, 0)) / _or_one(count)


def _or_one(x: Array) -> Array:
    """A divisor: 1 where it would be 0, and the quotient is not looked at."""
    return jnp.where(x > 0, x, 1)


def _as_quantized(
    x: Array, absmax_of_channels: Array, seen: Seen, scheme: Scheme
) -> tuple[Array, Array]:
    """The tokens as the scheme's quantizer gives them to a product, in float32; and for each
    channel the squared error to expect besides, where a static scale clips new tokens.
    """
    how = scheme.activation
    none = jnp.zeros(x.shape[1], jnp.float32)
    if how is None or isinstance(how, Indices):
        return x, none
    if isinstance(how, PerToken) and how.zero_point:
        scale, zero = zero_point_range(*range_of_rows(x))
        codes = to_differences(x, scale, zero)
        return codes.astype(jnp.float32) * scale, none
    if isinstance(how, PerToken):
        scale = scale_from_absmax(absmax(x, -1), how.fmt)
        return _to_and_from(x, scale, how.fmt), none
    assert seen.rows is not None
    unscaled = seen.absmax.reshape(-1)
    grown = growth(unscaled, seen.rows, seen.tokens)
    tokens = jnp.maximum(seen.tokens, 1).astype(jnp.float32)
    share = filled(seen.rows) / tokens
    if isinstance(how, Static):
        covered = _static_range(x, jnp.max(absmax_of_channels), how)
        grows = has_tail(unscaled, seen.rows, seen.tokens, grown)
        lost = clipped_error(absmax_of_channels, grown, covered, grows)
        scale = scale_from_absmax(covered, how.fmt)
        return _to_and_from(x, scale, how.fmt), share * lost
    largest = largest_of_new_tokens(absmax_of_channels, grown, share)
    scale = scale_from_absmax(largest, how.fmt)
    return _to_and_from(x, scale, how.fmt), none


def _to_and_from(x: Array, scale: Array, fmt: Format) -> Array:
    """x rounded to a format's codes, and back in float."""
    return to_format(x, scale, fmt).astype(jnp.float32) * scale


def _static_range(x: Array, largest: Array, how: Static) -> Array:
    """The range that a static scale covers: of the histogram of the sample and the largest |x|."""
    if how.range == "absmax":
        return largest
    histogram = replace(Histogram.of(x), absmax=largest)
    return find_range(histogram, how.range, how.fmt)
