"""`observe`: runs a program, and records what each of its sites sees."""

from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._warnings import warn
from sqjax.calibration.analysis import Analysis
from sqjax.calibration.measure import (
    NOTHING_MORE,
    Measurement,
    Probe,
    Wanted,
    measure,
)
from sqjax.calibration.site_layout import SiteLayout
from sqjax.calibration.tokens import Follower, Lost, counts, mark_inputs
from sqjax.folding.graph import Site
from sqjax.folding.labels import sizes_along
from sqjax.folding.sites import Place, sides_of
from sqjax.numerics.ranges import BINS, Histogram
from sqjax.numerics.samples import Sample
from sqjax.program.equations import Atom, Var
from sqjax.program.evaluate import evaluate
from sqjax.program.facts import Program
from sqjax.program.marks import Mark
from sqjax.program.replication import MeshAxes, varying


class Observation(NamedTuple):
    """What one site saw: a measurement in the shape of its channels."""

    absmax: Array
    abs_sum: Array
    tokens: Array
    reached: Array
    histogram: Histogram | None = None
    gram: Array | None = None
    sample: Sample | None = None


#: What is known of some tokens: of an activation's channels, or of a site's.
_Observed = TypeVar("_Observed", Measurement, Observation)


def combine(a: _Observed, b: _Observed) -> _Observed:
    """What is known of the tokens of both: the absmax by max, the rest by +."""
    largest = jnp.maximum(a.absmax, b.absmax)
    return type(a)(largest, *map(_plus, a[1:], b[1:]))


def _plus(a: Any, b: Any) -> Any:
    """The sum; None where one of them is not known."""
    return None if a is None or b is None else a + b


def observe(
    analysis: Analysis,
    leaves: Iterable[Any],
    inputs: Iterable[Any],
    mask: Array | None = None,
    wanted: Wanted = NOTHING_MORE,
) -> tuple[list[Any], dict[Site, Observation]]:
    """Runs a program on its leaves and inputs.

    Args:
        analysis: the program, and what is to be observed in it.
        leaves, inputs: the values of its leaves, and of its other inputs.
        mask: booleans of shape (batch, tokens): False for tokens that do not count. They are
            followed through the program (`sqjax.calibration.tokens`).
        wanted: what to keep of every site beside maxima and sums.

    Returns:
        The outputs of the program (flat), and an observation of every site and of the keys.
    """
    program, places = analysis.program, analysis.places
    differing = varying(program)
    if mask is not None:
        _check_mask(program, places, differing, mask)

    probes = _probes(analysis, wanted)
    measures: dict[Var, Callable[[Array], Any]] = {
        # Sorted, so that the compiled program does not hang on the order of a set.
        var: partial(_measure_all, probes=sorted(of_var))
        for var, of_var in probes.items()
    }
    for place in places:
        sizes = _sizes_of_experts(program, place)
        if sizes is not None:
            measures.setdefault(sizes, _whole)
    followed: dict[str, Any] = {}
    lost: dict[Var, str] = {}
    if mask is not None:
        for var, look in measures.items():
            measures[var] = partial(_look, var=var, look=look, lost=lost)
        marks = mark_inputs(program, mask)
        followed = {"marks": marks, "follow": Follower(program)}
    outputs, measured = evaluate(
        program, leaves, inputs, measures, together=_together, **followed
    )
    _warn_of_lost(places, lost)

    # Several matmuls may read one site: these are merged only once each is in the site's shape.
    seen_at: list[tuple[Place, Observation]] = []
    for place in places:
        measurement = measured[place.activation][
            _probe(analysis, place, wanted)
        ]
        along = differing.get(place.activation, frozenset())
        seen = _as_channels(program, place, measurement, along)
        sizes = _sizes_of_experts(program, place)
        if sizes is not None:
            reached = _of_experts(program, place, measured[sizes], along)
            seen = seen._replace(reached=reached)
        seen_at.append((place, seen))
    return outputs, _by_site(seen_at) | _of_keys(analysis, measured)


def _of_keys(
    analysis: Analysis, measured: Mapping[Var, Any]
) -> dict[Site, Observation]:
    """What the keys saw: found with the channels of their site, so nothing is rearranged."""
    observations = {}
    for key in analysis.keys:
        measurement = measured[key.activation][Probe(key.axes)]
        observations[key.site] = Observation(
            measurement.absmax,
            measurement.abs_sum,
            jnp.max(measurement.tokens),
            jnp.max(measurement.reached),
        )
    return observations


def _probes(analysis: Analysis, wanted: Wanted) -> dict[Var, set[Probe]]:
    """{activation: what to measure of it}: sites that share one mostly share the probe too."""
    probes: dict[Var, set[Probe]] = {}
    for place in analysis.places:
        probe = _probe(analysis, place, wanted)
        probes.setdefault(place.activation, set()).add(probe)
    for key in analysis.keys:
        probes.setdefault(key.activation, set()).add(Probe(key.axes))
    return probes


def _probe(analysis: Analysis, place: Place, wanted: Wanted) -> Probe:
    """What to measure of the activation of one matmul."""
    own = wanted_of(place.site, wanted, analysis.looked_up)
    return Probe(place.axes, place.batch, own)


def wanted_of(site: Site, wanted: Wanted, looked_up: Collection[str]) -> Wanted:
    """What is kept of one site."""
    # What a convolution multiplies is a window of pixels, and no row of this activation.
    if site.kernel is not None:
        return Wanted(histogram=wanted.histogram)
    # A Gram matrix says what errors cost the product. What they cost a look-up it does not know.
    if site.path in looked_up:
        return wanted._replace(gram=False)
    return wanted


def _measure_all(
    x: Array, counted: Array | None = None, *, probes: Sequence[Probe]
) -> dict[Probe, Measurement]:
    """All measurements of one activation."""
    return {probe: measure(x, probe, counted) for probe in probes}


def _together(a: Any, b: Any) -> Any:
    """What `_measure_all`, or `_whole`, has seen at two steps of a loop."""
    if not isinstance(a, dict):
        return a + b
    return {probe: combine(a[probe], b[probe]) for probe in a}


def _whole(x: Array, counted: Array | None = None) -> Array:
    """The array itself: of the sizes of experts every number is wanted."""
    return jnp.asarray(x)


def _look(
    x: Array, mark: Mark, *, var: Var, look: Callable[..., Any], lost: dict
) -> Any:
    """Looks at what counts of an activation; notes where that is not known any more."""
    if isinstance(mark, Lost):
        lost[var] = mark.reason
    return look(x, counts(x, mark))


def _warn_of_lost(places: Iterable[Place], lost: Mapping[Var, str]) -> None:
    """Warns of sites to which the mask could not be followed, once for each reason."""
    names: dict[str, list[str]] = {}
    for place in places:
        if place.activation in lost:
            names.setdefault(lost[place.activation], []).append(place.name)
    for reason, sites in names.items():
        warn(
            f"calibrate: the mask could not be followed to {', '.join(dict.fromkeys(sites))}: "
            f"{reason}; every token counts there, padding too"
        )


def experts_of(program: Program, place: Place) -> tuple[int, ...]:
    """(how many experts a ragged dot chooses among,); () for other matmuls."""
    if place.equation.name != "ragged_dot_general":
        return ()
    _, leaf = sides_of(program, place.equation)
    return sizes_along(program.shape(leaf.var), leaf.stack)


def _sizes_of_experts(program: Program, place: Place) -> Var | None:
    """The operand of a ragged dot that says how many rows each expert gets.

    None for other matmuls, and where it lives in another body than the activation.
    """
    if not experts_of(program, place):
        return None
    sizes = place.equation.inputs[2]
    if not isinstance(sizes, Var) or len(program.shape(sizes)) != 1:
        return None
    scopes = program.scopes
    return sizes if scopes[sizes] == scopes[place.activation] else None


def _of_experts(
    program: Program, place: Place, sizes: Array, differing: MeshAxes
) -> Array:
    """How many rows each expert of a ragged dot got: int32, (*batch, experts).

    Example: the sizes (3, 0, 5) of 8 rows and 3 experts, at each of 2 layers that a scan runs over,
    are measured as (2, 3), which is what is returned.
    """
    batch = len(place.site.batch)
    experts = sizes.shape[-1]
    layout = SiteLayout.of(program, place, differing, batch, experts)
    return layout.arranged(layout.total(sizes.astype(jnp.int32)))


def _fitted(mask: Array, token_shape: tuple[int, ...]) -> Array | None:
    """The mask in the shape of the first token axes; None where the activation has no such axes.

    Example: a mask of shape (2, 7) fits tokens of shape (2, 7), of (2, 7, 4 heads), and, as a mask
    of shape (14,), of (14,). It does not fit a pooled activation, whose tokens are (2,).
    """
    if token_shape[:1] == (mask.size,):
        mask = mask.reshape(mask.size)
    return mask if token_shape[: mask.ndim] == mask.shape else None


def _as_channels(
    program: Program,
    place: Place,
    measurement: Measurement,
    differing: MeshAxes,
) -> Observation:
    """A measurement of an activation as the observation of the site that one matmul reads."""
    site = place.site
    layout = SiteLayout.of(program, place, differing, len(site.channels))
    absmax = layout.arranged(layout.largest(measurement.absmax))
    abs_sum = layout.arranged(layout.total(measurement.abs_sum))
    tokens = layout.total(measurement.tokens).max(initial=0)
    # There is one number for each matrix of the site's stack: its channel axes are the batch axes.
    each = SiteLayout.of(program, place, differing, len(site.batch))
    reached = each.arranged(each.total(measurement.reached))
    # A ragged dot says itself how many rows each expert gets; else all may be for each of them.
    if experts := experts_of(program, place):
        spread = reached.reshape((*reached.shape, 1))
        reached = jnp.broadcast_to(spread, reached.shape + experts)
    seen = Observation(absmax, abs_sum, tokens, reached)
    if measurement.counts is not None:
        stack = SiteLayout.of(program, place, differing, len(site.batch), BINS)
        counts = stack.arranged(stack.total(measurement.counts))
        largest = jnp.max(absmax, axis=site.feature_axes)
        seen = seen._replace(histogram=Histogram.counted(counts, largest))
    return _with_rows(program, place, measurement, differing, seen)


def _with_rows(
    program: Program,
    place: Place,
    measurement: Measurement,
    differing: MeshAxes,
    seen: Observation,
) -> Observation:
    """An observation with the Gram matrix and the sample, where they were measured."""
    if measurement.gram is None and measurement.sample is None:
        return seen
    _check_whole_rows(place)
    batch = len(place.site.batch)
    if measurement.gram is not None:
        *_, features = measurement.gram.shape
        layout = SiteLayout.of(
            program, place, differing, batch, features, features
        )
        gram = layout.arranged(layout.total(measurement.gram))
        seen = seen._replace(gram=gram)
    if measurement.sample is not None:
        sample = measurement.sample
        *_, tokens, features = sample.rows.shape
        layout = SiteLayout.of(program, place, differing, batch, tokens)
        # Devices that hold the same activation have drawn the same tokens: one of them is enough.
        for axis in layout.same:
            sample = jax.tree.map(
                partial(
                    jax.lax.slice_in_dim,
                    start_index=0,
                    limit_index=1,
                    axis=axis,
                ),
                sample,
            )
        sample = sample.merged(layout.reduced)
        of_rows = SiteLayout.of(
            program, place, differing, batch, tokens, features
        )
        arranged = Sample(
            of_rows.arranged(sample.rows), layout.arranged(sample.priority)
        )
        seen = seen._replace(sample=arranged)
    return seen


def _check_whole_rows(place: Place) -> None:
    """Raises ValueError where a device, or a step of a scan, holds a part of each row only."""
    site = place.site
    whole = sizes_along(site.channels, site.feature_axes)
    if place.block[len(site.batch) :] != whole:
        raise ValueError(
            f"{place.name}: calibrate(..., gram=True) and sample= need whole rows of the "
            f"activation, {whole} features, got {place.block[len(site.batch) :]} on one device "
            "or at one step; calibrate a program that is not split along them"
        )


def _by_site(
    seen_at: Iterable[tuple[Place, Observation]],
) -> dict[Site, Observation]:
    """One observation for every site, of the matmuls that read it.

    Tokens add up over matmuls that read one matrix, because each reads tokens of its own. They do
    not over the matrices of a stack: all layers see the same tokens, and of experts that see
    different ones the largest number stands.
    """
    by_matrix: dict[str, tuple[Site, Observation]] = {}
    for place, observation in seen_at:
        # A name tells the matrices of one stack apart: "layers/kernel[3]".
        if place.name in by_matrix:
            _, before = by_matrix[place.name]
            observation = combine(before, observation)
        by_matrix[place.name] = place.site, observation

    by_site: dict[Site, Observation] = {}
    for site, observation in by_matrix.values():
        if site in by_site:
            before = by_site[site]
            # Each is zero in the other's entries, so max and + only fill in the stack.
            both = combine(before, observation)
            observation = both._replace(
                tokens=jnp.maximum(observation.tokens, before.tokens)
            )
        by_site[site] = observation
    return by_site


def _check_mask(
    program: Program,
    places: Iterable[Place],
    differing: Mapping[Atom, MeshAxes],
    mask: Array,
) -> None:
    """Raises ValueError if a shard_map has split the tokens: a mask is not split likewise."""
    for place in places:
        # Where every device holds all tokens, the mask masks them all.
        if not differing.get(place.activation):
            continue
        shape = program.shape(place.activation)
        token_shape = tuple(np.delete(shape, place.axes).tolist())
        if _fitted(mask, token_shape) is None:
            raise ValueError(
                f"calibrate: the mask of shape {mask.shape} does not fit the activation {shape} "
                f"that one device of a shard_map has at {place.name}; "
                "calibrate without a mask, on batches without padding"
            )
