"""Calibration: runs a function on example batches, and records what each of its matmuls saw."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from sqjax._trees import PyTree, check_arrays, check_finite, named_leaves
from sqjax.calibration.observe import Observation, Watch, combine, observe, watch
from sqjax.calibration.proof import prove
from sqjax.calibration.stats import Stats, weight_absmax
from sqjax.folding.apply import leaves_by_path
from sqjax.folding.attention_keys import find_keys
from sqjax.folding.find_graph import find_graph
from sqjax.folding.graph import Graph, Group, Site
from sqjax.folding.groups import Survey
from sqjax.numerics.ranges import Histogram
from sqjax.program.facts import Program
from sqjax.program.trace import array_leaves, trace

Fn = Callable[..., Any]


def calibrate(
    fn: Fn | Sequence[Fn],
    params: PyTree,
    batches: Iterable[Any],
    *,
    mask: Callable[..., Any] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    attention: bool = False,
    histogram: bool = False,
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
        histogram: whether to record a histogram of |X| at every site too, for static schemes with a `range`. It takes
            8 KiB of memory for each matrix, however many batches there are, and about as long as the other statistics;
            exact while one batch has less than 2^32 activations at a site.
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
    check_arrays(params)
    check_finite(params, "parameter")
    functions, streams = ([fn], [batches]) if callable(fn) else (list(fn), list(batches))
    if len(functions) != len(streams):
        raise ValueError(
            f"calibrate: {len(functions)} functions, but {len(streams)} iterables of batches"
        )
    opened = [_open(stream) for stream in streams]
    search = Find(functions, params, [first for first, _ in opened], groups or {}, attention)
    recorder = Recorder(search, search.proven(), mask, histogram)
    for which, (_, stream) in enumerate(opened):
        for number, batch in enumerate(
            tqdm(stream, desc="calibrating", unit="batch", disable=not progress)
        ):
            recorder.record(which, _args(batch, number), number)
    return recorder.stats()


def _open(batches: Iterable[Any]) -> tuple[tuple[Any, ...], Iterable[Any]]:
    """(the arguments of the first batch, all batches)."""
    stream = iter(batches)
    for first in stream:
        return _args(first, 0), itertools.chain([first], stream)
    raise ValueError(
        "calibrate: batches is empty (an iterator that was used up?); at least one batch is needed"
    )


def _args(batch: Any, number: int) -> tuple[Any, ...]:
    args = batch if isinstance(batch, tuple) else (batch,)
    check_finite(args, f"calibration batch {number}, input")
    return args


class Find(NamedTuple):
    """The search for what can be folded in functions that share parameters, on one batch for each."""

    functions: Sequence[Fn]
    params: PyTree
    batches: Sequence[tuple[Any, ...]]
    stated: Mapping[str, Sequence[str]]
    attention: bool

    def program(self, which: int, args: tuple[Any, ...], number: int) -> tuple[Program, list[Any]]:
        """One function as a program, and its inputs."""
        return _program(self.functions[which], self.params, args, number)

    def together(
        self, which: int = 0, args: tuple[Any, ...] | None = None
    ) -> tuple[Program, list[Any]]:
        """All functions as one program, on their first batches; one of them may be given another."""
        batches = list(self.batches)
        batches[which] = batches[which] if args is None else args
        if len(self.functions) == 1:
            return self.program(0, batches[0], 0)

        def every(params, *batches):
            return [fn(params, *args) for fn, args in zip(self.functions, batches, strict=True)]

        return _program(every, self.params, batches, 0)

    def graph(self, program: Program) -> Graph:
        """What the search finds."""
        survey = Survey.of(program, shared_arrays(self.params))
        return find_graph(survey, find_keys(survey) if self.attention else [], self.stated)

    def watch(self, program: Program) -> Watch:
        """What is to be observed."""
        return watch(program, shared_arrays(self.params), self.attention)

    def proven(self) -> Graph:
        """The graph of all functions, found and proved."""
        program, inputs = self.together()
        graph = self.graph(program)
        if not graph.sites and not graph.tables:
            reasons = "".join(f"\n  {path}: {reason}" for path, reason in graph.refused[:10])
            raise ValueError(
                f"calibrate: found no matmul of an activation with a leaf of params, so nothing to do{reasons}"
            )
        return prove(self.watch(program), self.params, inputs, graph)


class Recorder:
    """A calibration under way: running totals, and compiled programs by the shapes of a batch."""

    def __init__(
        self, search: Find, graph: Graph, mask: Callable[..., Any] | None, histogram: bool
    ):
        self.search, self.graph, self.mask, self.histogram = search, graph, mask, histogram
        self.programs: dict[Any, Callable[..., dict[str, Observation]]] = {}
        self.expected: dict[int, frozenset[Site]] = {}
        self.known = frozenset((*graph.sites, *graph.keys))
        zeros = {site.path: jnp.zeros(site.channels, jnp.float32) for site in sorted(self.known)}
        empty = (
            {s.path: Histogram.empty(s.channels[: len(s.batch)]) for s in graph.sites}
            if histogram
            else {}
        )
        self.totals = {
            path: Observation(x, x, jnp.int32(0), empty.get(path)) for path, x in zeros.items()
        }

    def record(self, which: int, args: tuple[Any, ...], number: int) -> None:
        """Adds what the sites see in one batch of one of the functions."""
        key = (
            which,
            str(
                jax.tree.map(
                    lambda x: jax.typeof(x) if isinstance(x, jax.Array | np.ndarray) else x, args
                )
            ),
        )
        if key not in self.programs:
            self.programs[key] = self._compile(which, args, number)
        mask = None if self.mask is None else jnp.asarray(self.mask(*args), bool)
        leaves = jax.tree.leaves(self.search.params)
        self.totals = self.programs[key](self.totals, leaves, array_leaves(args), mask)

    def _compile(
        self, which: int, args: tuple[Any, ...], number: int
    ) -> Callable[..., dict[str, Observation]]:
        """The function for batches of these shapes; what does not fold there is not folded."""
        watched = self.search.watch(self.search.program(which, args, number)[0])
        first = self.expected.setdefault(which, watched.sites & self.known)
        if missing := sorted(site.path for site in first - watched.sites):
            raise ValueError(
                f"calibration batch {number}: {missing[0]} was in the first batch's program, not in this one's"
            )
        if number:
            self.graph = common(
                self.graph, self.search.graph(self.search.together(which, args)[0]), number
            )
        return jax.jit(partial(self._add, watched))

    def _add(
        self, watched: Watch, totals: dict[str, Observation], leaves: Any, inputs: Any, mask: Any
    ):
        _, seen = observe(watched, leaves, inputs, mask, self.histogram)
        found = {
            site.path: combine(totals[site.path], o)
            for site, o in seen.items()
            if site in self.known
        }
        return totals | found

    def stats(self) -> Stats:
        """The totals as `Stats`."""
        check_finite({path: o.absmax for path, o in self.totals.items()}, "activation at")
        leaves = leaves_by_path(self.search.params, self.graph)
        stats = Stats(
            {path: o.absmax for path, o in self.totals.items()},
            {path: o.abs_sum for path, o in self.totals.items()},
            {path: o.tokens for path, o in self.totals.items()},
            {site.path: weight_absmax(site, leaves[site.path]) for site in self.graph.sites},
            {group.name: jnp.ones(group.size, jnp.float32) for group in self.graph.groups},
            self.graph,
            {path: o.histogram for path, o in self.totals.items() if o.histogram is not None},
        )
        if unreached := stats.unreached:
            named = ", ".join(f"{path}{list(entries)}" for path, entries in unreached.items())
            warnings.warn(
                f"calibrate: no token reached {named}; these keep s = 1 there", stacklevel=3
            )
        return stats


def common(graph: Graph, other: Graph, number: int) -> Graph:
    """The graph without the groups that another batch's program does not have; these are refused."""

    def absorbed(group: Group, offsets: dict[str, float]) -> Any:
        """What a group does to the parameters and the statistics."""
        return group.sites, group.leaves, tuple(offsets.get(path) for path, _ in group.leaves)

    there = {absorbed(g, dict(other.offsets)) for g in other.groups}
    kept = tuple(g for g in graph.groups if absorbed(g, dict(graph.offsets)) in there)
    reasons = dict(other.refused)
    lost = [
        (
            path,
            f"it does not fold in the program of batch {number}: {reasons.get(path, 'its group is another there')}",
        )
        for g in graph.groups
        if g not in kept
        for path, _ in g.sites
    ]
    keys = tuple(k for k in graph.keys if k.path in {g.name for g in kept})
    return graph._replace(groups=kept, refused=(*graph.refused, *lost), keys=keys)


def _program(fn: Fn, params: PyTree, args: Sequence[Any], number: int) -> tuple[Program, list[Any]]:
    try:
        traced, inputs = trace(fn, params, tuple(args), {})
    except Exception as error:
        shapes = jax.tree.map(
            lambda x: jnp.shape(x) if isinstance(x, jax.Array | np.ndarray) else x, args
        )
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
