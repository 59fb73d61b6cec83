"""Calibration: runs a function on example batches, and records what each of its matmuls saw."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array
from tqdm.auto import tqdm

from sqjax.folding import find_graph
from sqjax.graph import Graph, Site
from sqjax.interpreter import Leaf, Rules, Traced, array_leaves, emit, trace, walk
from sqjax.program import VIEWS, Program
from sqjax.smoothing import fold
from sqjax.statistics import Stats, expand, leaves_by_path, weight_absmax
from sqjax.trees import PyTree, check_finite, named_leaves


class Observation(NamedTuple):
    """What one site saw in one call: absmax and abs_sum per channel, and the number of tokens."""

    absmax: Array
    abs_sum: Array
    tokens: Array


class _Seen(NamedTuple):
    """A leaf's value at some point of the program; its axis i is the leaf's axis `axes[i]`."""

    array: Any
    axes: tuple[int, ...]


def observe(traced: Traced, leaves: Iterable[Any], inputs: Iterable[Any]) -> tuple[list[Any], dict[Site, Observation]]:
    """Runs a program; returns its outputs and an observation of every matmul of an activation with a leaf."""
    seen: dict[Site, Observation] = {}

    def plain(equation: JaxprEqn, *operands: Any) -> Any:
        return emit(equation, *(x.value.array if isinstance(x, Leaf) else x for x in operands))

    def view(equation: JaxprEqn, leaf: Leaf) -> Leaf:
        axes = VIEWS[equation.primitive.name](equation.params, leaf.value.axes)
        return Leaf(leaf.path, _Seen(emit(equation, leaf.value.array), axes))

    def dot(equation: JaxprEqn, *operands: Any) -> Any:
        contracting, batch = equation.params["dimension_numbers"]
        for leaf, x, w_axes, x_axes in zip(operands, operands[::-1], contracting, contracting[::-1], strict=True):
            if isinstance(leaf, Leaf) and not isinstance(x, Leaf) and not batch[0]:
                pairs = sorted((leaf.value.axes[a], b) for a, b in zip(w_axes, x_axes, strict=True))
                axes, own = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
                site, observation = Site(leaf.path, axes, tuple(x.shape[b] for b in own)), observe_activation(x, own)
                seen[site] = combine(seen[site], observation) if site in seen else observation
        return plain(equation, *operands)

    named = zip(traced.paths, leaves, strict=True)
    args = [Leaf(path, _Seen(x, tuple(range(jnp.ndim(x))))) for path, x in named]
    rules = Rules({**dict.fromkeys(VIEWS, view), "dot_general": dot}, plain)
    outputs = walk(traced.jaxpr.jaxpr, traced.jaxpr.consts, [*args, *inputs], rules)
    return [x.value.array if isinstance(x, Leaf) else x for x in outputs], seen


def observe_activation(x: Array, axes: tuple[int, ...]) -> Observation:
    """Statistics of the channels `axes` of an activation, over all its other axes."""
    magnitude = jnp.abs(jnp.moveaxis(x, axes, range(-len(axes), 0))).astype(jnp.float32)
    tokens = tuple(range(magnitude.ndim - len(axes)))
    seen = jnp.int32(np.prod([magnitude.shape[a] for a in tokens], dtype=int))
    return Observation(magnitude.max(tokens), magnitude.sum(tokens), seen)


def combine(a: Observation, b: Observation) -> Observation:
    """Observations merge by max and +."""
    return Observation(jnp.maximum(a.absmax, b.absmax), a.abs_sum + b.abs_sum, a.tokens + b.tokens)


def calibrate(fn: Callable[..., Any], params: PyTree, batches: Iterable[Any], *, progress: bool = False) -> Stats:
    """Finds what can be folded in `fn`, proves it, and records what every matmul sees in the batches.

    The proof: all groups are folded at once with random powers of two, which are exact in float32 and bfloat16, and
    `fn` must return the same bits on the first batch. A group that changes a bit is refused.

    Args:
        fn: a pure function fn(params, *batch): Flax linen's `apply`, a Hugging Face Flax model, any JAX function.
        params: its parameter tree of float arrays.
        batches: an iterable; a tuple is splatted into fn(params, *batch), anything else is one argument. Shapes may
            differ from batch to batch (each new shape compiles once).
        progress: whether to show a progress bar.

    Returns:
        `Stats`, whose `graph` says what was found: `print(stats.graph)`.

    Raises:
        ValueError: there are no batches; a batch does not fit `fn`; a parameter, a batch or an activation holds NaN or
            infinity; there is no matmul of an activation with a leaf.

    Example:
        >>> import jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> params = {"norm": jnp.ones(2), "w": jnp.ones((2, 3))}
        >>> stats = sq.calibrate(fn, params, [jnp.array([[1.0, 16.0]]), jnp.array([[-3.0, 0.5]])])
        >>> stats.absmax["w"].tolist()
        [3.0, 16.0]
    """
    check_finite(params, "parameter")
    recorder: Recorder | None = None
    for number, batch in enumerate(tqdm(batches, desc="calibrating", unit="batch", disable=not progress)):
        args = batch if isinstance(batch, tuple) else (batch,)
        check_finite(args, f"calibration batch {number}, input")
        recorder = recorder or Recorder(fn, params, proven_graph(fn, params, args))
        recorder.record(args, number)
    if recorder is None:
        raise ValueError("calibrate: batches is empty (an iterator that was used up?); at least one batch is needed")
    return recorder.stats()


def proven_graph(fn: Callable[..., Any], params: PyTree, args: tuple[Any, ...]) -> Graph:
    """The graph of fn(params, *args), found and proved."""
    traced, inputs = _trace(fn, params, args, 0)
    graph = find_graph(Program(traced), shared_arrays(params))
    if not graph.sites:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in graph.refused[:10])
        raise ValueError(
            f"calibrate: found no matmul of an activation with a leaf of params, so nothing to do{reasons}"
        )
    return prove(traced, params, inputs, graph)


class Recorder:
    """A calibration under way: running totals, and compiled programs by the shapes of a batch."""

    def __init__(self, fn: Callable[..., Any], params: PyTree, graph: Graph):
        self.fn, self.params, self.graph = fn, params, graph
        self.programs: dict[str, Callable[..., dict[str, Observation]]] = {}
        zeros = {site.path: jnp.zeros(site.channels, jnp.float32) for site in graph.sites}
        self.totals = {path: Observation(x, x, jnp.int32(0)) for path, x in zeros.items()}

    def record(self, args: tuple[Any, ...], number: int) -> None:
        """Adds what the sites see in one batch."""
        key = str(jax.tree.map(lambda x: jax.typeof(x) if isinstance(x, jax.Array | np.ndarray) else x, args))
        if key not in self.programs:
            traced, _ = _trace(self.fn, self.params, args, number)
            self.programs[key] = jax.jit(partial(self._add, traced, number))
        self.totals = self.programs[key](self.totals, jax.tree.leaves(self.params), array_leaves(args))

    def _add(self, traced: Traced, number: int, totals: dict[str, Observation], leaves: Any, inputs: Any):
        _, seen = observe(traced, leaves, inputs)
        if missing := [site.path for site in self.graph.sites if site not in seen]:
            raise ValueError(
                f"calibration batch {number}: {missing[0]} was in the first batch's program, not in this one's"
            )
        return {site.path: combine(totals[site.path], seen[site]) for site in self.graph.sites}

    def stats(self) -> Stats:
        """The totals as `Stats`."""
        check_finite({path: o.absmax for path, o in self.totals.items()}, "activation at")
        leaves = leaves_by_path(self.params, self.graph)
        return Stats(
            {path: o.absmax for path, o in self.totals.items()},
            {path: o.abs_sum for path, o in self.totals.items()},
            {path: o.tokens for path, o in self.totals.items()},
            {site.path: weight_absmax(site, leaves[site.path]) for site in self.graph.sites},
            {group.name: jnp.ones(group.size, jnp.float32) for group in self.graph.groups},
            self.graph,
        )


def _trace(fn: Callable[..., Any], params: PyTree, args: tuple[Any, ...], number: int) -> tuple[Traced, list[Any]]:
    try:
        return trace(fn, params, args, {})
    except Exception as error:
        shapes = jax.tree.map(lambda x: jnp.shape(x) if isinstance(x, jax.Array | np.ndarray) else x, args)
        raise ValueError(
            f"calibration batch {number}: fn(params, *batch) failed on inputs of shapes {shapes}; a batch is one "
            f"argument, or a tuple of fn's arguments after params. {type(error).__name__}: {error}"
        ) from error


def shared_arrays(params: PyTree) -> dict[str, str]:
    """{path: another path} of leaves that are one and the same array."""
    paths, leaves, _ = named_leaves(params)
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if (other := first.setdefault(id(leaf), path)) != path:
            shared[path], shared[other] = other, path
    return shared


def prove(traced: Traced, params: PyTree, inputs: list[Any], graph: Graph) -> Graph:
    """The graph without the groups that fail the proof; these are refused.

    One compiled program runs with s = 1 and with s drawn from 2^-3 .. 2^3, so that no order of summation differs:
    its outputs must agree bit for bit, and every site's absmax must be exactly the old one divided by s.

    Raises:
        ValueError: the groups that pass one by one fail together.
    """

    @jax.jit
    def run(params, s, inputs):
        outputs, seen = observe(traced, jax.tree.leaves(fold(params, graph, s)), inputs)
        scale = expand(s, graph)
        absmax = {site.path: seen[site].absmax * scale.get(site.path, 1.0) for site in graph.sites}
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
