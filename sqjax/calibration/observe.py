"""Observation: what each site of a program sees in one call."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.folding.attention_keys import Keys, find_keys
from sqjax.folding.graph import Site
from sqjax.folding.groups import Survey
from sqjax.folding.sites import Place, sides_of
from sqjax.numerics.ranges import BINS, Histogram, count
from sqjax.program.build import Var
from sqjax.program.evaluate import evaluate
from sqjax.program.facts import Program
from sqjax.program.replication import varying


class Observation(NamedTuple):
    """What one site saw in one call: absmax and abs_sum per channel, the number of tokens, and a histogram if asked."""

    absmax: Array
    abs_sum: Array
    tokens: Array
    histogram: Histogram | None = None


class Seen(NamedTuple):
    """What was seen of one activation: an `Observation` of some of its axes, and raw counts in the bins of |x|."""

    absmax: Array
    abs_sum: Array
    tokens: Array
    counts: Array | None = None


class Look(NamedTuple):
    """What to see of an activation: its channels are along `axes`; the first `batch` of them hold a matrix each."""

    axes: tuple[int, ...]
    batch: int = 0
    histogram: bool = False


class Watch(NamedTuple):
    """A program with what is to be observed in it: its sites, and the keys of attention where these are wanted."""

    program: Program
    places: list[Place]
    keys: list[Keys]

    @property
    def sites(self) -> frozenset[Site]:
        """What is observed."""
        return frozenset([*(p.site for p in self.places), *(k.site for k in self.keys)])


def watch(program: Program, shared: Mapping[str, str], attention: bool) -> Watch:
    """A program's sites, and its keys if `attention`."""
    survey = Survey.of(program, shared)
    return Watch(program, list(survey.places), find_keys(survey) if attention else [])


def observe(
    watched: Watch,
    leaves: Iterable[Any],
    inputs: Iterable[Any],
    mask: Array | None = None,
    histogram: bool = False,
) -> tuple[list[Any], dict[Site, Observation]]:
    """Runs a program; returns its outputs and an observation of every site, with a histogram if asked."""
    program, places, keys = watched
    looks: dict[Var, set[Look]] = {}
    for place in places:
        looks.setdefault(place.activation, set()).add(_look(program, place, histogram))
    for key in keys:
        looks.setdefault(key.activation, set()).add(Look(key.axes))

    def probe(var: Var) -> Callable[[Array], dict[Look, Seen]]:
        return lambda x: {look: observe_activation(x, look, mask) for look in sorted(looks[var])}

    differing = varying(program)
    if mask is not None:
        _check_mask(program, places, differing, mask)
    outputs, seen = evaluate(program, leaves, inputs, {v: probe(v) for v in looks})
    of_parts: dict[str, tuple[Site, Observation]] = {}
    for place in places:
        own = seen[place.activation][_look(program, place, histogram)]
        observation = _at_site(program, place, own, differing.get(place.activation, frozenset()))
        _, old = of_parts.get(place.name, (None, None))
        of_parts[place.name] = place.site, observation if old is None else combine(old, observation)
    observations: dict[Site, Observation] = {}
    for (
        site,
        observation,
    ) in of_parts.values():  # the matrices of a stack, each with tokens of its own
        tokens = jnp.maximum(
            observation.tokens, observations[site].tokens if site in observations else 0
        )
        whole = combine(observations[site], observation) if site in observations else observation
        observations[site] = whole._replace(tokens=tokens)
    for key in keys:
        absmax, abs_sum, tokens, _ = seen[key.activation][Look(key.axes)]
        observations[key.site] = Observation(absmax, abs_sum, jnp.max(tokens))
    return outputs, observations


def _look(program: Program, place: Place, histogram: bool) -> Look:
    return Look(place.axes, len(sides_of(program, place.equation)[0].batch), histogram)


def observe_activation(x: Array, look: Look, mask: Array | None = None) -> Seen:
    """Statistics of the channels of an activation, over all its other axes.

    A mask of shape (batch, tokens) picks the tokens that count, of an activation whose other axes begin with
    (batch, tokens) or are (batch * tokens,); an activation without these axes counts whole.
    """
    axes = look.axes
    magnitude = jnp.abs(jnp.moveaxis(x, axes, range(-len(axes), 0))).astype(jnp.float32)
    tokens = magnitude.shape[: magnitude.ndim - len(axes)]
    reduced = tuple(range(len(tokens)))
    number = jnp.int32(np.prod(tokens, dtype=int))
    if mask is not None and tokens[:1] == (mask.size,):
        mask = mask.reshape(mask.size)
    if mask is not None and tokens[: mask.ndim] == mask.shape:
        magnitude = jnp.where(
            mask.reshape(mask.shape + (1,) * (magnitude.ndim - mask.ndim)), magnitude, 0
        )
        number = jnp.sum(mask, dtype=jnp.int32) * jnp.int32(np.prod(tokens[mask.ndim :], dtype=int))
    counts = None
    if look.histogram:  # what the mask has zeroed is in no bin
        stacked = range(len(tokens), len(tokens) + look.batch)
        counts = count(jnp.moveaxis(magnitude, stacked, range(look.batch)), look.batch)
    return Seen(magnitude.max(reduced, initial=0), magnitude.sum(reduced), number, counts)


class Layout(NamedTuple):
    """Where the entries of an activation's statistics go in those of the first channel axes of a site.

    Attributes:
        sizes: of the parts of these channel axes: scans and mesh axes by number, the rest of every axis by name.
        has: the parts that the activation's statistics have, as their axes are once the others are reduced.
        reduced: the axes of the scans and mesh axes that are no parts.
        once: those of `reduced` along which every device has seen the same.
        channels: the sizes of the channel axes.
        entry: which of the channels these are.
    """

    sizes: dict[Any, int]
    has: list[Any]
    reduced: tuple[int, ...]
    once: tuple[int, ...]
    channels: tuple[int, ...]
    entry: tuple[Any, ...]

    def total(self, x: Array) -> Array:
        """The sum over what is reduced."""
        return (
            jnp.max(x, axis=self.once, keepdims=True).sum(self.reduced)
            if self.once
            else x.sum(self.reduced)
        )

    def shaped(self, x: Array) -> Array:
        """Reduced statistics as the site's channels; zeros for other matrices of its stack."""
        own = [
            self.sizes[p] for p in self.has if isinstance(p, str)
        ]  # where a reshape has split or merged leaf axes
        x = x.reshape(*x.shape[: len(self.has) - len(own)], *own)
        x = x.transpose([self.has.index(part) for part in self.sizes if part in self.has])
        x = x.reshape([size if part in self.has else 1 for part, size in self.sizes.items()])
        whole = jnp.broadcast_to(x, list(self.sizes.values())).reshape(self.channels)
        if not any(isinstance(at, int) for at in self.entry):
            return whole
        return jnp.zeros(self.channels, x.dtype).at[self.entry].set(whole[self.entry])


def _layout(
    program: Program, place: Place, differing: frozenset[int], kept: int, *tail: int
) -> Layout:
    """The layout of the first `kept` channel axes, and then of one more axis of each size in `tail`.

    Scans that do not run over the leaf are reduced; those that do, but not around the activation, see the same. So are
    mesh axes that do not cut the leaf along its channels; where all devices along one hold the same activation (it is
    not in `differing`), that counts once.
    """
    around, view = program.scopes[place.activation], place.view
    sizes: dict[Any, int] = {}
    for i, axis in enumerate(place.site.channel_axes[:kept]):
        sizes |= {scope: program.lengths[scope] for scope in view.strides(axis)}
        sizes |= {f"axis {i}": view.shape[axis]} if axis not in view.stacked.values() else {}
    sizes |= {f"tail {i}": size for i, size in enumerate(tail)}
    fixed = [f"axis {i}" for i, taken in enumerate(view.taken) if taken.scan is None]
    reduced = tuple(i for i, scope in enumerate(around) if scope not in sizes)
    once = tuple(
        i for i in reduced if around[i] in program.mesh_axes and around[i] not in differing
    )
    has = [
        *(s for s in around if s in sizes),
        *(p for p in sizes if isinstance(p, str) and p not in fixed),
    ]
    return Layout(sizes, has, reduced, once, (*place.site.channels[:kept], *tail), place.entry)


def _at_site(program: Program, place: Place, seen: Seen, differing: frozenset[int]) -> Observation:
    """What was seen of an activation, one entry for each of the scans and mesh axes around it, as the site's channels.

    A histogram is one for each matrix of the site's stack.
    """
    site = place.site
    channels = _layout(program, place, differing, len(site.channels))
    absmax = channels.shaped(seen.absmax.max(channels.reduced, initial=0))
    abs_sum, tokens = (
        channels.shaped(channels.total(seen.abs_sum)),
        channels.total(seen.tokens).max(initial=0),
    )
    if seen.counts is None:
        return Observation(absmax, abs_sum, tokens)
    stack = _layout(program, place, differing, len(site.batch), BINS)
    counts = stack.shaped(stack.total(seen.counts))
    largest = jnp.max(absmax, axis=tuple(range(len(site.batch), absmax.ndim)))
    return Observation(absmax, abs_sum, tokens, Histogram.counted(counts, largest))


def _check_mask(
    program: Program, places: Iterable[Place], differing: Mapping[Var, frozenset[int]], mask: Array
) -> None:
    """Raises ValueError if a mask would have to be cut as a shard_map cuts the tokens."""
    for place in places:
        shape = program.shape(place.activation)
        tokens = tuple(n for a, n in enumerate(shape) if a not in place.axes)
        whole = tokens[: mask.ndim] == mask.shape or tokens[:1] == (mask.size,)
        if differing.get(place.activation) and not whole:
            raise ValueError(
                f"calibrate: the mask of shape {mask.shape} does not fit the activation {shape} that one device of a "
                f"shard_map has at {place.name}; calibrate without a mask, on batches without padding"
            )


def combine(a: Observation, b: Observation) -> Observation:
    """Observations merge by max and +."""
    histogram = None if a.histogram is None or b.histogram is None else a.histogram + b.histogram
    return Observation(
        jnp.maximum(a.absmax, b.absmax), a.abs_sum + b.abs_sum, a.tokens + b.tokens, histogram
    )
