"""Calibration: runs a function on example batches, and records what each of its matmuls saw."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from sqjax.devices import varying
from sqjax.evaluation import evaluate
from sqjax.graph import Graph, Site
from sqjax.grouping import Keys, Search, find_graph, find_keys
from sqjax.interpreter import array_leaves, trace
from sqjax.program import Program, Var
from sqjax.sites import Place, find_heads, find_sites
from sqjax.smoothing import fold
from sqjax.statistics import Stats, expand, leaves_by_path, weight_absmax
from sqjax.trees import PyTree, check_finite, map_named, named_leaves

Fn = Callable[..., Any]


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
    differing = varying(program)
    observations: dict[Site, Observation] = {}
    for place in places:
        own = seen[place.activation][place.axes]
        observation = _at_site(program, place, own, differing.get(place.activation, frozenset()))
        old = observations.get(place.site)
        observations[place.site] = observation if old is None else combine(old, observation)
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
    return Observation(magnitude.max(reduced), magnitude.sum(reduced), count)


def _at_site(program: Program, place: Place, seen: Observation, differing: frozenset[int]) -> Observation:
    """What was seen of an activation, one entry for each step of the scans around it, as the site's channels.

    Scans that do not run over the leaf are reduced; those that do, but not around the activation, see the same. So are
    mesh axes that do not cut the leaf along its channels; where all devices along one hold the same activation (it is
    not in `differing`), that counts once.
    """
    around, view = program.scopes[place.activation], place.view
    sizes: dict[Any, int] = {}  # of the channels' parts: scans and mesh axes by their numbers, blocks by name
    for i, axis in enumerate(place.site.channel_axes):
        sizes |= {scope: program.lengths[scope] for scope, _ in view.places(axis)}
        sizes |= {f"block {i}": view.shape[axis]} if i >= len(view.stacked) else {}
    reduced = tuple(i for i, scope in enumerate(around) if scope not in sizes)
    once = tuple(i for i in reduced if around[i] in program.mesh_axes and around[i] not in differing)
    seen_as = [*(scope for scope in around if scope in sizes), *(part for part in sizes if isinstance(part, str))]

    def shaped(x: Array) -> Array:
        x = x.transpose([seen_as.index(part) for part in sizes if part in seen_as])
        x = x.reshape([size if part in seen_as else 1 for part, size in sizes.items()])
        return jnp.broadcast_to(x, list(sizes.values())).reshape(place.site.channels)

    def total(x: Array) -> Array:
        return jnp.max(x, axis=once, keepdims=True).sum(reduced)

    return Observation(shaped(seen.absmax.max(reduced)), shaped(total(seen.abs_sum)), total(seen.tokens).max())


def combine(a: Observation, b: Observation) -> Observation:
    """Observations merge by max and +."""
    return Observation(jnp.maximum(a.absmax, b.absmax), a.abs_sum + b.abs_sum, a.tokens + b.tokens)


def calibrate(
    fn: Fn | Sequence[Fn],
    params: PyTree,
    batches: Iterable[Any],
    *,
    mask: Callable[..., Any] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    attention: bool = False,
    progress: bool = False,
) -> Stats:
    """Finds what can be folded in `fn`, proves it, and records what every matmul sees in the batches.

    The proof: all groups are folded at once with random powers of two, which are exact in float32 and bfloat16, and
    `fn` must return the same bits on the first batch. A group that changes a bit is refused.

    Args:
        fn: a pure function fn(params, *batch): Flax linen's `apply`, a Hugging Face Flax model, any JAX function. Or
            several functions that share the parameters (an encoder and a decoder, a prefill and a step): only what
            folds in all of them is folded.
        params: its parameter tree of float arrays.
        batches: an iterable; a tuple is splatted into fn(params, *batch), anything else is one argument. Shapes may
            differ from batch to batch (each new shape compiles once). For several functions: one iterable for each.
        mask: mask(*batch) gives booleans of shape (batch, tokens), or of the tokens' shape: False for padding, whose
            activations do not count. An activation without these axes (a pooled one) counts whole.
        groups: {a site's path: the paths of the leaves that shall absorb its scale}: groups stated by hand, where the
            search would choose others. They pass the same certificate and proof. The rest is found as always.
        attention: whether to look for scales between keys and queries too, for `scales(..., attention=0.5)`.
        progress: whether to show a progress bar.

    Returns:
        `Stats`, whose `graph` says what was found: `print(stats.graph)`.

    Raises:
        ValueError: there are no batches; a batch does not fit `fn`; a parameter, a batch or an activation holds NaN or
            infinity; there is no matmul of an activation with a leaf; a stated group does not hold.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]]), jnp.array([[-3.0, 0.5]])])
        >>> stats.absmax["w"].tolist()
        [3.0, 16.0]
    """
    check_finite(params, "parameter")
    functions, streams = ([fn], [batches]) if callable(fn) else (list(fn), list(batches))
    if len(functions) != len(streams):
        raise ValueError(f"calibrate: {len(functions)} functions, but {len(streams)} iterables of batches")
    opened = [_open(stream) for stream in streams]
    graph = proven_graph(functions, params, [first for first, _ in opened], groups, attention)
    recorder = Recorder(params, graph, mask)
    for function, (_, stream) in zip(functions, opened, strict=True):
        expected = None
        for number, batch in enumerate(tqdm(stream, desc="calibrating", unit="batch", disable=not progress)):
            args = _args(batch, number)
            expected = recorder.record(function, args, number, expected)
    return recorder.stats()


def _open(batches: Iterable[Any]) -> tuple[tuple[Any, ...], Iterable[Any]]:
    """(the arguments of the first batch, all batches)."""
    stream = iter(batches)
    for first in stream:
        return _args(first, 0), itertools.chain([first], stream)
    raise ValueError("calibrate: batches is empty (an iterator that was used up?); at least one batch is needed")


def _args(batch: Any, number: int) -> tuple[Any, ...]:
    args = batch if isinstance(batch, tuple) else (batch,)
    check_finite(args, f"calibration batch {number}, input")
    return args


def proven_graph(
    functions: Sequence[Fn],
    params: PyTree,
    batches: Sequence[tuple[Any, ...]],
    stated: Mapping[str, Sequence[str]] | None = None,
    attention: bool = False,
) -> Graph:
    """The graph of functions that share parameters, found and proved on one batch for each."""

    def together(params, *batches):
        return [fn(params, *args) for fn, args in zip(functions, batches, strict=True)]

    several = len(functions) > 1
    program, inputs = _program(together if several else functions[0], params, batches if several else batches[0], 0)
    shared = shared_arrays(params)
    graph = find_graph(program, shared, stated, attention)
    if not graph.sites:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in graph.refused[:10])
        raise ValueError(
            f"calibrate: found no matmul of an activation with a leaf of params, so nothing to do{reasons}"
        )
    return prove(watch(program, shared, attention), params, inputs, graph)


class Recorder:
    """A calibration under way: running totals, and compiled programs by the shapes of a batch."""

    def __init__(self, params: PyTree, graph: Graph, mask: Callable[..., Any] | None):
        self.params, self.graph, self.mask = params, graph, mask
        self.programs: dict[Any, tuple[frozenset[Site], Callable[..., dict[str, Observation]]]] = {}
        self.known = frozenset((*graph.sites, *graph.keys))
        zeros = {site.path: jnp.zeros(site.channels, jnp.float32) for site in sorted(self.known)}
        self.totals = {path: Observation(x, x, jnp.int32(0)) for path, x in zeros.items()}

    def record(self, fn: Fn, args: tuple[Any, ...], number: int, expected: frozenset[Site] | None) -> frozenset[Site]:
        """Adds what the sites see in one batch; returns those sites, which every batch of a function must have."""
        key = id(fn), str(jax.tree.map(lambda x: jax.typeof(x) if isinstance(x, jax.Array | np.ndarray) else x, args))
        if key not in self.programs:
            program, _ = _program(fn, self.params, args, number)
            watched = watch(program, shared_arrays(self.params), bool(self.graph.keys))
            self.programs[key] = watched.sites & self.known, jax.jit(partial(self._add, watched))
        sites, add = self.programs[key]
        if missing := sorted(site.path for site in (expected or sites) - sites):
            raise ValueError(
                f"calibration batch {number}: {missing[0]} was in the first batch's program, not in this one's"
            )
        mask = None if self.mask is None else jnp.asarray(self.mask(*args), bool)
        self.totals = add(self.totals, jax.tree.leaves(self.params), array_leaves(args), mask)
        return sites

    def _add(self, watched: Watch, totals: dict[str, Observation], leaves: Any, inputs: Any, mask: Any):
        _, seen = observe(watched, leaves, inputs, mask)
        found = {site.path: combine(totals[site.path], o) for site, o in seen.items() if site in self.known}
        return totals | found

    def stats(self) -> Stats:
        """The totals as `Stats`."""
        check_finite({path: o.absmax for path, o in self.totals.items()}, "activation at")
        leaves = leaves_by_path(self.params, self.graph)
        stats = Stats(
            {path: o.absmax for path, o in self.totals.items()},
            {path: o.abs_sum for path, o in self.totals.items()},
            {path: o.tokens for path, o in self.totals.items()},
            {site.path: weight_absmax(site, leaves[site.path]) for site in self.graph.sites},
            {group.name: jnp.ones(group.size, jnp.float32) for group in self.graph.groups},
            self.graph,
        )
        if unreached := stats.unreached:
            named = ", ".join(f"{path}{list(entries)}" for path, entries in unreached.items())
            warnings.warn(f"calibrate: no token reached {named}; these keep s = 1 there", stacklevel=3)
        return stats


def _program(fn: Fn, params: PyTree, args: Sequence[Any], number: int) -> tuple[Program, list[Any]]:
    try:
        traced, inputs = trace(fn, params, tuple(args), {})
    except Exception as error:
        shapes = jax.tree.map(lambda x: jnp.shape(x) if isinstance(x, jax.Array | np.ndarray) else x, args)
        raise ValueError(
            f"calibration batch {number}: fn(params, *batch) failed on inputs of shapes {shapes}; a batch is one "
            f"argument, or a tuple of fn's arguments after params. {type(error).__name__}: {error}"
        ) from error
    return Program(traced), inputs


def shared_arrays(params: PyTree) -> dict[str, str]:
    """{path: another path} of leaves that are one and the same array."""
    paths, leaves, _ = named_leaves(params)
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if (other := first.setdefault(id(leaf), path)) != path:
            shared[path], shared[other] = other, path
    return shared


def prove(watched: Watch, params: PyTree, inputs: list[Any], graph: Graph) -> Graph:
    """The graph without the groups that fail the proof; these are refused.

    One compiled program runs with s = 1 and with s drawn from 2^-3 .. 2^3, so that no order of summation differs:
    its outputs must agree bit for bit, and every site's absmax must be exactly the old one divided by s. Leaves w that
    are read as c + w are rounded first, in both, so that this sum can be scaled exactly.

    Raises:
        ValueError: the groups that pass one by one fail together.
    """

    offsets = dict(graph.offsets)

    def rounded(params):
        def coarse(path, leaf):
            return leaf if path not in offsets else jnp.round((offsets[path] + leaf) * 256) / 256 - offsets[path]

        return map_named(coarse, params)

    @jax.jit
    def run(params, s, inputs):
        outputs, seen = observe(watched, jax.tree.leaves(fold(rounded(params), graph, s)), inputs)
        scale = expand(s, graph)
        absmax = {site.path: seen[site].absmax * scale.get(site.path, 1.0) for site in (*graph.sites, *graph.keys)}
        return outputs, absmax

    ones = {g.name: jnp.ones(g.size, jnp.float32) for g in graph.groups}
    draw = np.random.default_rng(0)
    powers = {g.name: jnp.asarray(2.0 ** draw.integers(-3, 4, g.size), jnp.float32) for g in graph.groups}
    expected = jax.device_get(run(params, ones, inputs))

    def passes(names: Iterable[str]) -> bool:
        got = jax.device_get(run(params, ones | {name: powers[name] for name in names}, inputs))
        return all(jax.tree.leaves(jax.tree.map(partial(np.array_equal, equal_nan=True), got, expected)))

    if passes(powers):
        return graph
    sound = [g for g in graph.groups if passes([g.name])]
    if not passes([g.name for g in sound]):
        raise ValueError(
            "calibrate: groups that fold exactly one by one do not fold together; please report this program"
        )
    failed = [path for g in graph.groups if g not in sound for path, _ in g.sites]
    reason = "folding it with powers of two changed a bit of fn's output"
    return graph._replace(groups=tuple(sound), refused=(*graph.refused, *((path, reason) for path in failed)))
