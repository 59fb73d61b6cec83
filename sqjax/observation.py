"""Observation: what each site of a program sees in one call."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.devices import varying
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

    differing = varying(program)
    if mask is not None:
        _check_mask(program, places, differing, mask)
    outputs, seen = evaluate(program, leaves, inputs, {v: probe(v) for v in axes})
    of_parts: dict[str, tuple[Site, Observation]] = {}
    for place in places:
        own = seen[place.activation][place.axes]
        observation = _at_site(program, place, own, differing.get(place.activation, frozenset()))
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


def _at_site(program: Program, place: Place, seen: Observation, differing: frozenset[int]) -> Observation:
    """What was seen of an activation, one entry for each of the scans and mesh axes around it, as the site's channels.

    Scans that do not run over the leaf are reduced; those that do, but not around the activation, see the same. So are
    mesh axes that do not cut the leaf along its channels; where all devices along one hold the same activation (it is
    not in `differing`), that counts once.
    """
    around, view, channels = program.scopes[place.activation], place.view, place.site.channels
    sizes: dict[Any, int] = {}  # of the channels' parts: scans and mesh axes by number, the rest of every axis by name
    for i, axis in enumerate(place.site.channel_axes):
        sizes |= {scope: program.lengths[scope] for scope in view.strides(axis)}
        sizes |= {f"axis {i}": view.shape[axis]} if axis not in view.stacked.values() else {}
    fixed = [f"axis {i}" for i, taken in enumerate(view.taken) if taken.scan is None]
    reduced = tuple(i for i, scope in enumerate(around) if scope not in sizes)
    once = tuple(i for i in reduced if around[i] in program.mesh_axes and around[i] not in differing)
    has = [*(s for s in around if s in sizes), *(p for p in sizes if isinstance(p, str) and p not in fixed)]

    own = [sizes[part] for part in has if isinstance(part, str)]  # where a reshape has split or merged leaf axes

    def shaped(x: Array) -> Array:
        x = x.reshape(*x.shape[: len(has) - len(own)], *own)
        x = x.transpose([has.index(part) for part in sizes if part in has])
        x = x.reshape([size if part in has else 1 for part, size in sizes.items()])
        whole = jnp.broadcast_to(x, list(sizes.values())).reshape(channels)
        return jnp.zeros(channels, x.dtype).at[place.entry].set(whole[place.entry]) if view.part else whole

    def total(x: Array) -> Array:
        return jnp.max(x, axis=once, keepdims=True).sum(reduced) if once else x.sum(reduced)

    absmax = seen.absmax.max(reduced, initial=0)
    return Observation(shaped(absmax), shaped(total(seen.abs_sum)), total(seen.tokens).max(initial=0))


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
    return Observation(jnp.maximum(a.absmax, b.absmax), a.abs_sum + b.abs_sum, a.tokens + b.tokens)
