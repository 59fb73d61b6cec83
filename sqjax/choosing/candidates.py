"""What smoothing scales cost: the error of every site's output, for many candidates of s.

A candidate is an s for each fold group. A site's error is that of its output under the real
quantizers, relative to the output itself:

    |X W - Q(X / s) Q(s W)|^2 / |X W|^2

With quantized activations, X is the sample of tokens in the statistics. Where activations stay
float the Gram matrix gives the same number of all tokens, exactly: see
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
from sqjax.folding.apply import leaves_by_path
from sqjax.folding.graph import Group, Site, paths_of
from sqjax.numerics.formats import absmax, scale_from_absmax, to_format
from sqjax.numerics.output_error import EXACT, gram_error
from sqjax.numerics.ranges import Histogram, find_range
from sqjax.numerics.tails import filled, growth, largest_of_new_tokens
from sqjax.weights.qtensor import dequantize
from sqjax.weights.quantize import named, quantize_weight
from sqjax.weights.schemes import Indices, PerToken, Scheme, Static

#: {fold group: candidates of its s, (candidates, group.size)}.
Candidates = Mapping[str, Array]
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
        index: {group: which candidate was taken}; for a stack one for each step, (steps,).
        errors: {group: the error of each candidate, the sum over its sites}: (candidates,), or
            (candidates, steps).
    """

    s: dict[str, Array]
    index: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]


def check_searchable(scheme: Scheme, what: str) -> None:
    """Raises ValueError for a scheme whose error does not hang on what is folded alone."""
    if isinstance(scheme.activation, Indices):
        raise ValueError(
            f"{what}: expected a scheme for matmuls, such as sqjax.W8A8, got {scheme!r}; "
            "embeddings that are looked up have no activation to smooth"
        )
    for field in ("smoothing", "outliers"):
        if getattr(scheme, field) is not None:
            raise ValueError(
                f"{what}: expected a scheme without {field}, because s is chosen for what is "
                f"folded; search with scheme.replace({field}=None)"
            )


def searched_groups(
    stats: Stats, groups: str | Iterable[str], scheme: Scheme, what: str
) -> tuple[Group, ...]:
    """The groups of which all sites have what a scheme's errors are computed from.

    Convolutions have neither, so a group with one of these is left out: it stays as it is.

    Raises:
        ValueError: there are none at all; says how to calibrate.
    """
    chosen = stats.graph.select(groups)
    known, option = set(stats.sample), "sample=512"
    if not scheme.quantizes_activation:
        known, option = known | set(stats.gram), "gram=True"
    if chosen and not known:
        raise ValueError(
            f"{what}: expected statistics from which errors can be computed, got some without; "
            f"call calibrate(..., {option})"
        )
    return tuple(group for group in chosen if known.issuperset(group.paths))


def choose(
    params: PyTree,
    stats: Stats,
    scheme: Scheme,
    candidates: Candidates,
) -> Choice:
    """Of every group the candidate of least error; of equal ones the first.

    Each group is judged by itself, all others as they are. Where s is stacked (layers of a scan),
    each step has its own choice. One program is compiled for each shape of site, not for each site.
    """
    leaves = leaves_by_path(params, stats.graph)
    sites = dict(
        zip(paths_of(stats.graph.sites), stats.graph.sites, strict=True)
    )
    groups = [g for g in stats.graph.groups if g.name in candidates]
    found = {}
    for group in groups:
        found[group.name] = _of_group(
            group, sites, leaves, stats, scheme, candidates[group.name]
        )
    errors = jax.device_get(found)
    s, index = {}, {}
    for group in groups:
        best = np.argmin(errors[group.name], axis=0)
        index[group.name] = best
        s[group.name] = _taken(candidates[group.name], best)
    return Choice(s, index, errors)


def _taken(candidates: Array, best: np.ndarray) -> Array:
    """The chosen s, (size,): of a stack, the s of step i come from the candidate best[i]."""
    size = candidates.shape[1]
    which = np.repeat(best.reshape(-1), size // best.size)
    return candidates[which, np.arange(size)]


def _of_group(
    group: Group,
    sites: Mapping[str, Site],
    leaves: Mapping[str, Any],
    stats: Stats,
    scheme: Scheme,
    candidates: Array,
) -> Array:
    """The error of each candidate, summed over sites: (candidates,) or (candidates, steps)."""
    steps = math.prod(group.steps)
    total: Any = 0
    for path, labels in group.sites:
        site = sites[path]
        with named(path):
            of_matrices = site_errors(
                leaves[path],
                seen(stats, site, scheme),
                _of_channels(candidates, labels.array),
                site=site._replace(path=""),
                scheme=scheme,
            )
        where = _step_of(labels.array, len(site.batch), group.size // steps)
        total = total + _summed_by_step(of_matrices, where, steps)
    return total if group.steps else total[:, 0]


def seen(stats: Stats, site: Site, scheme: Scheme) -> Seen:
    """What a site's errors are computed from: the Gram matrix where activations stay float, if
    there is one; else the sample.
    """
    path = site.path
    gram = None if scheme.quantizes_activation else stats.gram.get(path)
    rows = stats.sample[path].rows if gram is None else None
    tokens = jnp.broadcast_to(
        stats.count[path], site.channels[: len(site.batch)]
    )
    return Seen(stats.absmax[path], rows, gram, tokens)


@jax.jit
def _of_channels(candidates: Array, labels: Array) -> Array:
    """s of each channel of a site: (candidates, *channels); 1 where a channel has none."""
    ones = jnp.ones((candidates.shape[0], 1), jnp.float32)
    return jnp.concatenate([ones, candidates], axis=1)[:, labels]


def _step_of(labels: np.ndarray, batch: int, size: int) -> np.ndarray:
    """Which step each matrix of a site belongs to; -1 if none of its channels has a scale.

    Example: at 2 steps of 4 scales, the labels [[1, 2, 3, 4], [5, 6, 7, 8]] of two matrices say
    (0, 1).
    """
    flat = labels.reshape(math.prod(labels.shape[:batch]), -1)
    return (flat.max(axis=1) + size - 1) // size - 1


@partial(jax.jit, static_argnames="steps")
def _summed_by_step(errors: Array, step_of: Array, steps: int) -> Array:
    """(candidates, matrices) as (candidates, steps). Matrices of no step (-1) are dropped."""
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
        float32, (candidates, matrices): |X W - Q(X / s) Q(s W)|^2 / |X W|^2; 0 where X W is 0.
    """
    batch = len(site.batch)
    stack = math.prod(site.channels[:batch])
    # Batch axes first and as one, because matrices are taken one after the other.
    leaf = jnp.moveaxis(leaf, site.batch, range(batch))
    kept = other_axes(leaf.ndim, range(batch))
    leaf = leaf.reshape(stack, *[leaf.shape[axis] for axis in kept])
    seen = jax.tree.map(lambda x: x.reshape(stack, *x.shape[batch:]), seen)
    s = s.reshape(s.shape[0], stack, *s.shape[1 + batch :]).swapaxes(0, 1)
    axes = _axes_in_matrix(site)

    def of_matrix(operands: tuple[Array, Seen, Array]) -> Array:
        weight, own, candidates = operands
        matrix = Matrix(weight, own, axes)
        chunk = max(1, CHUNK_BYTES // _bytes_of(matrix))
        error = partial(_error, matrix, scheme)
        return lax.map(error, candidates, batch_size=chunk)

    return lax.map(of_matrix, (leaf, seen, s)).T


def _axes_in_matrix(site: Site) -> tuple[int, ...]:
    """The contracted axes once the batch axes are gone.

    Example: those of a leaf (experts, in, heads, out) with batch (0,) and axes (1,) are (0,).
    """
    return tuple(
        axis - sum(taken < axis for taken in site.batch) for axis in site.axes
    )


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


def _error(matrix: Matrix, scheme: Scheme, s: Array) -> Array:
    """The relative error of one candidate, ()."""
    scaled = matrix.times(s)
    divided = matrix.seen.absmax / s
    weight = quantize_weight(scaled, matrix.axes, scheme, divided)
    got = matrix.flat(dequantize(weight.tensor))
    exact = matrix.flat(matrix.weight.astype(jnp.float32))
    seen, s = matrix.seen, s.reshape(-1)
    if seen.gram is not None:
        change = got / s[:, None] - exact
        noise = gram_error(change, seen.gram).sum()
        signal = gram_error(exact, seen.gram).sum()
    else:
        assert seen.rows is not None  # `searched_groups` has seen to it
        x = seen.rows / s[None, :]
        rounded = _as_quantized(x, divided.reshape(-1), seen, scheme)
        outputs = jnp.matmul(seen.rows, exact, precision=EXACT)
        change = jnp.matmul(rounded, got, precision=EXACT) - outputs
        noise, signal = jnp.sum(change**2), jnp.sum(outputs**2)
    return jnp.where(signal > 0, noise / jnp.where(signal > 0, signal, 1), 0)


def _as_quantized(
    x: Array, absmax_of_channels: Array, seen: Seen, scheme: Scheme
) -> Array:
    """The tokens as the scheme's quantizer gives them to a product, in float32."""
    how = scheme.activation
    if how is None or isinstance(how, Indices):
        return x
    if isinstance(how, PerToken):
        scale = scale_from_absmax(absmax(x, -1), how.fmt)
    elif isinstance(how, Static):
        covered = _static_range(x, jnp.max(absmax_of_channels), how)
        scale = scale_from_absmax(covered, how.fmt)
    else:
        assert seen.rows is not None
        largest = largest_of_new_tokens(
            absmax_of_channels,
            growth(seen.absmax.reshape(-1), seen.rows, seen.tokens),
            filled(seen.rows) / jnp.maximum(seen.tokens, 1).astype(jnp.float32),
        )
        scale = scale_from_absmax(largest, how.fmt)
    return to_format(x, scale, how.fmt).astype(jnp.float32) * scale


def _static_range(x: Array, largest: Array, how: Static) -> Array:
    """The range that a static scale covers: of the histogram of the sample and the largest |x|."""
    if how.range == "absmax":
        return largest
    histogram = replace(Histogram.of(x), absmax=largest)
    return find_range(histogram, how.range, how.fmt)
