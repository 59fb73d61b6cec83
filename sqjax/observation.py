"""Observation: what each site of a program sees in one call."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.evaluation import evaluate
from sqjax.graph import Site
from sqjax.grouping import Keys, Search, find_keys
from sqjax.program import Program, Var
from sqjax.sites import Place, find_heads, find_sites


class Observation(NamedTuple):
    """What one site saw in one call: absmax and abs_sum per channel, and the number of tokens."""

    absmax: Array
    abs_sum: Array
    tokens: Array


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
    places, _ = find_sites(program)
    keys = find_keys(Search(program, shared, places, find_heads(program, places))) if attention else []
    return Watch(program, places, keys)


def observe(
    watched: Watch, leaves: Iterable[Any], inputs: Iterable[Any], mask: Array | None = None
) -> tuple[list[Any], dict[Site, Observation]]:
    """Runs a program; returns its outputs and an observation of every site."""
    program, places, keys = watched
    axes: dict[Var, set[tuple[int, ...]]] = {}
    for activation, own in [*((p.activation, p.axes) for p in places), *((k.activation, k.axes) for k in keys)]:
        axes.setdefault(activation, set()).add(own)

    def probe(var: Var) -> Callable[[Array], dict[tuple[int, ...], Observation]]:
        return lambda x: {own: observe_activation(x, own, mask) for own in sorted(axes[var])}

    outputs, seen = evaluate(program, leaves, inputs, {v: probe(v) for v in axes})
    of_parts: dict[str, tuple[Site, Observation]] = {}
    for place in places:
        observation = _at_site(program, place, seen[place.activation][place.axes])
        _, old = of_parts.get(place.name, (None, None))
        of_parts[place.name] = place.site, observation if old is None else combine(old, observation)
    observations: dict[Site, Observation] = {}
    for site, observation in of_parts.values():  # the matrices of a stack, each with tokens of its own
        tokens = jnp.maximum(observation.tokens, observations[site].tokens if site in observations else 0)
        whole = combine(observations[site], observation) if site in observations else observation
        observations[site] = whole._replace(tokens=tokens)
    for key in keys:
        observation = seen[key.activation][key.axes]
        observations[key.site] = observation._replace(tokens=jnp.max(observation.tokens))
    return outputs, observations


def observe_activation(x: Array, axes: tuple[int, ...], mask: Array | None = None) -> Observation:
    """Statistics of the channels `axes` of an activation, over all its other axes.

    A mask of shape (batch, tokens) picks the tokens that count, of an activation whose other axes begin with
    (batch, tokens) or are (batch * tokens,); an activation without these axes counts whole.
    """
    magnitude = jnp.abs(jnp.moveaxis(x, axes, range(-len(axes), 0))).astype(jnp.float32)
    tokens = magnitude.shape[: magnitude.ndim - len(axes)]
    reduced = tuple(range(len(tokens)))
    count = jnp.int32(np.prod(tokens, dtype=int))
    if mask is not None and tokens[:1] == (mask.size,):
        mask = mask.reshape(mask.size)
    if mask is not None and tokens[: mask.ndim] == mask.shape:
        magnitude = jnp.where(mask.reshape(mask.shape + (1,) * (magnitude.ndim - mask.ndim)), magnitude, 0)
        count = jnp.sum(mask, dtype=jnp.int32) * jnp.int32(np.prod(tokens[mask.ndim :], dtype=int))
    return Observation(magnitude.max(reduced, initial=0), magnitude.sum(reduced), count)


def _at_site(program: Program, place: Place, seen: Observation) -> Observation:
    """What was seen of an activation, one entry for each step of the scans around it, as the site's channels.

    Scans that do not run over the leaf are reduced; those that do, but not around the activation, see the same.
    """
    around, over, taken = program.scopes[place.activation], place.view.stacked, place.view.taken
    reduced = tuple(i for i, scan in enumerate(around) if scan not in over)
    steps = [program.lengths[t.scan] if t.scan in around else 1 for t in taken]
    channels = place.site.channels

    def shaped(x: Array) -> Array:
        whole = jnp.broadcast_to(x.reshape(*steps, *channels[len(taken) :]), channels)
        return jnp.zeros(channels, x.dtype).at[place.entry].set(whole[place.entry]) if place.view.part else whole

    tokens = seen.tokens.sum(reduced)
    absmax = seen.absmax.max(reduced, initial=0)
    return Observation(shaped(absmax), shaped(seen.abs_sum.sum(reduced)), tokens.max(initial=0))


def combine(a: Observation, b: Observation) -> Observation:
    """Observations merge by max and +."""
    return Observation(jnp.maximum(a.absmax, b.absmax), a.abs_sum + b.abs_sum, a.tokens + b.tokens)
