"""`learn`: smoothing scales, weight clips and static input ranges, learned by gradients.

The quantized model is simulated in float (`sqjax.choosing.simulation`) and compared with the float
model's outputs; log s, the logs of the clips and those of the ranges follow the gradient of the
difference. This is the learnable equivalent transformation and the learnable weight clipping of
OmniQuant (Shao et al. 2023, arXiv 2308.13137), for the whole model at once and not block by block,
and with the range of static activations beside them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from sqjax._arguments import check_function, expect
from sqjax._trees import PyTree, check_finite, is_float, named_leaves
from sqjax.calibration.calibrate import check_batches
from sqjax.calibration.stats import Stats
from sqjax.choosing.batches import arguments, checksum, kind_of
from sqjax.choosing.divergence import divergence
from sqjax.choosing.simulation import applied, simulated
from sqjax.folding.apply import check_scales, leaves_by_path
from sqjax.folding.graph import Site, paths_of
from sqjax.methods.described import check_stats
from sqjax.methods.quantization import (
    Clips,
    Rules,
    check_clips,
    site_schemes,
)
from sqjax.methods.smoothing import fold_stats
from sqjax.program.trace import Traced, array_leaves, trace
from sqjax.weights.clipping import clip_of_ranges, ranges_of
from sqjax.weights.quant_weight import check_float
from sqjax.weights.quantize import named
from sqjax.weights.schemes import Scheme, Static

if TYPE_CHECKING:
    import optax

Loss = Literal["kl", "mse"] | Callable[..., Any]
#: "s", "clips" and "ranges", each {name: the logs of its numbers}.
Logs = dict[str, dict[str, Array]]

#: No clip makes a range smaller than this part of itself.
_LEAST = 0.05
#: By what part the loss of a state's best may differ when it is computed again.
_SAME_LOSS = 1e-3


class Losses(NamedTuple):
    """How the loss went.

    Attributes:
        train: of each step, on its batch.
        held_out: of each check, on the batches that were held out; the first is that of the start.
        best: of what was returned, on these.
    """

    train: np.ndarray
    held_out: np.ndarray
    best: float


@dataclass(frozen=True)
class Learned:
    """What was learned: the best of all checks on batches that were held out.

    Attributes:
        s: {group: s}, for `fold` and `fold_stats`.
        clips: {site: factors of its weights' ranges}, for `quantize`; empty if none were asked for.
        ranges: {site: its static input range, that of X / s}; empty without static schemes.
            `applied` puts them into the statistics.
        losses: how the loss went.
        state: a pytree of arrays from which `learn` goes on; `sqjax.save` writes it.
    """

    s: dict[str, Array]
    clips: dict[str, Array]
    ranges: dict[str, Array]
    losses: Losses
    state: dict[str, Any]

    def applied(self, params: PyTree, stats: Stats) -> tuple[PyTree, Stats]:
        """(the parameters with s folded in, their statistics with the learned input ranges).

        `quantize(*learned.applied(params, stats), rules, clips=learned.clips)` makes the quantized
        tree.

        Args:
            params: what `learn` was given.
            stats: what `learn` was given.
        """
        return applied(params, stats, self.s, self.ranges)


def learn(
    fn: Callable[..., Any],
    params: PyTree,
    stats: Stats,
    batches: Iterable[Any],
    rules: Rules,
    *,
    s: Mapping[str, Array] | None = None,
    clips: Clips | bool = False,
    loss: Loss = "kl",
    optimizer: "optax.GradientTransformation | None" = None,
    steps: int = 100,
    every: int = 10,
    patience: int | None = 5,
    state: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Learned:
    """Smoothing scales that make the quantized model most like the float one, by gradients.

    The whole model is simulated with folded, clipped and rounded weights and rounded activations,
    and the loss between its outputs and the float model's is minimized over

    - log s of every group, which starts from a given s, of `scales` or a search;
    - the log of every static input range, which starts from the absmax, if the scheme is static;
    - with clips, the log of the factor in (0, 1] of every weight range.

    Rounding has the gradient of the identity, scales have their own (straight-through and LSQ, see
    `sqjax.choosing.simulation`). OmniQuant (Shao et al. 2023, arXiv 2308.13137) learns the first
    and the last so, block by block.

    A quarter of the batches is held out. Every so many steps the loss on these is computed; what
    was best there is returned. The start and the identity (s = 1, nothing clipped) are among what
    is compared, so the result is never worse than these.

    Args:
        fn: fn(params, *batch), as for `calibrate`; reverse-mode differentiable.
        params: the calibrated tree.
        stats: its statistics.
        batches: a list of batches, each the work of one step: one or two sequences of some hundred
            tokens. As many as there are steps, because a few are learned by heart. Their order does
            not matter.
        rules: as for `quantize`; without smoothing and rotation at run time, and without
            outliers.
        s: where to start; None: from 1. Groups that are left out stay as they are.
        clips: True, or where to start, {site: factors}: learn clips too.
        loss: "kl", the Kullback-Leibler divergence of softmax(outputs) along the last axis; "mse",
            the mean square of the difference; or loss(outputs, float outputs, *batch), a scalar.
        optimizer: of optax; None: `optax.adam(0.01)`.
        steps: how many steps in all, those of `state` among them.
        every: how many steps from one check to the next. What is learned after the last check is in
            the state only.
        patience: stop after so many checks that were not better than the best; None: never.
        state: of an earlier call with the same arguments, to go on from: same bits as if it had not
            been interrupted.
        progress: whether to show a progress bar.

    Returns:
        `Learned`.

    Raises:
        ValueError: there are no batches; the rules quantize no site, or smooth at run time, or take
            ranges from histograms; a group of s, or a site of clips, is unknown or of another
            shape; clips are not in (0, 1]; steps, every or patience are too small; the state is of
            other arguments, or its best has another loss here than it had; the loss is NaN at the
            start; a convolution's or an expert's (`ragged_dot`) activation is to be quantized.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> fn = lambda p, x: (x * p["norm"]) @ p["w"]
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> params = {"norm": jnp.ones(8), "w": jax.random.normal(keys[0], (8, 4))}
        >>> batches = list(jax.random.normal(keys[1], (4, 256, 8)) * jnp.arange(1, 9.0) ** 2)
        >>> stats = sq.calibrate(fn, params, batches)
        >>> found = sq.learn(fn, params, stats, batches, sq.W8A8_O3, loss="mse", steps=20)
        >>> bool(found.losses.best < found.losses.held_out[0])
        True
        >>> folded, measured = found.applied(params, stats)
        >>> qparams = sq.quantize(folded, measured, sq.W8A8_O3, clips=found.clips)
    """
    check_function(fn, "learn", "(fn, params, stats, batches, rules)")
    check_stats(stats, "learn")
    check_batches(batches)
    _check_counts(steps, every, patience)
    check_float(params, "learn")
    check_finite(params, "parameter")
    schemes = _schemes(stats, rules)
    start = _start(params, stats, schemes, s, clips)
    identity = _identity(stats, schemes, start)
    training, held_out = _split(batches)
    if optimizer is None:
        import optax

        optimizer = optax.adam(0.01)
    problem = _Problem(fn, params, stats, schemes, loss, optimizer)
    run = _Run.begin(problem, start, identity, held_out)
    if state is not None:
        run = run.resumed(state, held_out)
    shown = tqdm(
        total=steps, initial=run.done, desc="learning", disable=not progress
    )
    with shown:
        while run.done < steps and not run.is_stopped(patience):
            run = run.step(training[run.done % len(training)])
            if run.done % every == 0:
                run = run.checked(held_out)
                shown.set_postfix(best=f"{run.best_loss:.4g}")
            shown.update()
    return run.learned()


def _check_counts(steps: int, every: int, patience: int | None) -> None:
    expect(steps >= 0, "learn: steps", "a number of 0 or more", steps)
    expect(every >= 1, "learn: every", "a number of 1 or more", every)
    fits = patience is None or patience >= 1
    expect(fits, "learn: patience", "a number of 1 or more, or None", patience)


# What is learned ----------------------------------------------------------------------------------


def _schemes(stats: Stats, rules: Rules) -> dict[str, Scheme]:
    """{leaf: its scheme}, of which all can be simulated."""
    schemes = site_schemes(stats.graph, rules)
    sites = set(paths_of(stats.graph.sites))
    if sites.isdisjoint(schemes):
        raise ValueError(
            "learn: expected rules that quantize a matmul's weight, got none"
        )
    for path, scheme in schemes.items():
        beside = (scheme.smoothing, scheme.outliers, scheme.rotation)
        if beside != (None, None, None) or scheme.needs_histogram:
            raise ValueError(
                f"learn: {path}: expected a scheme without smoothing or rotation at run time, "
                f"outliers and ranges from histograms, got {scheme!r}; s is learned here, and so "
                "are ranges"
            )
    return schemes


def _start(
    params: PyTree,
    stats: Stats,
    schemes: Mapping[str, Scheme],
    s: Mapping[str, Array] | None,
    clips: Clips | bool,
) -> Logs:
    """Where learning begins."""
    leaves = leaves_by_path(params, stats.graph)
    sites = [site for site in stats.graph.sites if site.path in schemes]
    if s is None:
        groups = stats.graph.select("all")
        s = {group.name: jnp.ones(group.size, jnp.float32) for group in groups}
    check_scales(stats.graph, s)
    ones = _ones(sites, leaves, schemes) if clips is True else {}
    at = ones
    if not isinstance(clips, bool):
        at = _given(clips, sites, leaves, schemes)
    ranges = _ranges(stats, sites, schemes, s)
    parts = {"s": s, "clips": at, "ranges": ranges}
    return {
        part: {
            name: jnp.log(jnp.asarray(x, jnp.float32)) for name, x in of.items()
        }
        for part, of in parts.items()
    }


def _ones(
    sites: Iterable[Site],
    leaves: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
) -> dict[str, Array]:
    """Clips of 1 for every matmul's weight."""
    clips = {}
    for site in sites:
        if site.kernel is None:
            shape = _ranges_shape(site, leaves[site.path], schemes[site.path])
            clips[site.path] = jnp.ones(shape, jnp.float32)
    return clips


def _given(
    clips: Clips,
    sites: Iterable[Site],
    leaves: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
) -> dict[str, Array]:
    """Clips to start from, checked, in the shape of the ranges."""
    by_path = {site.path: site for site in sites}
    check_clips(clips, {path: schemes[path] for path in by_path}, by_path)
    given = {}
    for path, clip in clips.items():
        shape = _ranges_shape(by_path[path], leaves[path], schemes[path])
        with named(path):
            given[path] = clip_of_ranges(jnp.asarray(clip), shape)
    return given


def _ranges(
    stats: Stats,
    sites: Iterable[Site],
    schemes: Mapping[str, Scheme],
    s: Mapping[str, Array],
) -> dict[str, Array]:
    """max |X / s| of every static site, one for each matrix of a stack."""
    absmax = fold_stats(stats, s).absmax
    ranges = {}
    for site in sites:
        if isinstance(schemes[site.path].activation, Static):
            largest = jnp.max(absmax[site.path], axis=site.feature_axes)
            # What no token has reached has no range; any number will do.
            ranges[site.path] = jnp.where(largest > 0, largest, 1.0)
    return ranges


def _ranges_shape(site: Site, leaf: Any, scheme: Scheme) -> tuple[int, ...]:
    def highest(leaf):
        return ranges_of(leaf, site.axes, scheme, site.batch)[2]

    return jax.eval_shape(highest, leaf).shape


def _identity(stats: Stats, schemes: Mapping[str, Scheme], start: Logs) -> Logs:
    """s = 1, and nothing clipped."""
    zeros = jax.tree.map(jnp.zeros_like, start)
    sites = [site for site in stats.graph.sites if site.path in schemes]
    ranges = _ranges(stats, sites, schemes, {})
    return {**zeros, "ranges": jax.tree.map(jnp.log, ranges)}


def _split(batches: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """(for training, held out): a quarter is held out, and one batch alone is both."""
    every = sorted(map(arguments, batches), key=checksum)
    if not every:
        raise ValueError(
            "learn: batches is empty (an iterator that was used up?); at least one is needed"
        )
    if len(every) == 1:
        return every, every
    kept = max(1, len(every) // 4)
    return every[kept:], every[:kept]


# Steps --------------------------------------------------------------------------------------------


def _numbers(logs: Logs) -> dict[str, dict[str, Array]]:
    return jax.tree.map(jnp.exp, logs)


def _projected(logs: Logs) -> Logs:
    """Clips stay in (0, 1]."""
    inside = partial(jnp.clip, min=float(np.log(_LEAST)), max=0.0)
    return {**logs, "clips": jax.tree.map(inside, logs["clips"])}


class _Problem:
    """The loss and its steps, compiled once for each kind of batch."""

    def __init__(
        self,
        fn: Callable[..., Any],
        params: PyTree,
        stats: Stats,
        schemes: Mapping[str, Scheme],
        loss: Loss,
        optimizer: "optax.GradientTransformation",
    ):
        known = loss in ("kl", "mse") or callable(loss)
        expect(known, "learn: loss", "'kl', 'mse' or a function", loss)
        self.optimizer = optimizer
        self._fn, self._params = fn, params
        # What is not read here would be folded in every step all the same.
        self._stats = replace(stats, gram={}, sample={}, histogram={})
        self._schemes, self._loss_of = schemes, loss
        self._programs: dict[Any, tuple[Any, Any]] = {}

    def step(
        self, logs: Logs, moments: Any, args: tuple[Any, ...]
    ) -> tuple[Logs, Any, Array]:
        """(logs, the optimizer's state, the loss before) after a step on one batch."""
        step, _ = self._compiled(args)
        return step(
            self._params, self._stats, logs, moments, array_leaves(args)
        )

    def loss(self, logs: Logs, batches: Sequence[tuple[Any, ...]]) -> float:
        """The mean loss over batches."""
        losses = []
        for args in batches:
            _, loss = self._compiled(args)
            inputs = array_leaves(args)
            losses.append(float(loss(self._params, self._stats, logs, inputs)))
        # As the state keeps it, so that what goes on from one compares the same numbers.
        return float(np.float32(np.mean(losses)))

    def _compiled(self, args: tuple[Any, ...]) -> tuple[Any, Any]:
        kind = kind_of(args)
        if kind not in self._programs:
            traced, _ = trace(self._fn, self._params, args, {})
            self._programs[kind] = self._program(traced, args)
        return self._programs[kind]

    def _program(
        self, traced: Traced, args: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        """(a step, the loss) of such batches."""

        def loss_of(logs, params, stats, inputs):
            leaves = jax.tree.leaves(params)
            exact = jax.core.eval_jaxpr(
                traced.jaxpr.jaxpr, traced.jaxpr.consts, *leaves, *inputs
            )
            wanted = jax.tree.unflatten(traced.treedef, exact)
            numbers = _numbers(logs)
            got = simulated(
                traced, params, stats, self._schemes, numbers, inputs
            )
            return self._difference(got, wanted, args, inputs)

        def step(params, stats, logs, moments, inputs):
            loss, slopes = jax.value_and_grad(loss_of)(
                logs, params, stats, inputs
            )
            # Optimizers count steps in integers, which they multiply with floats.
            with jax.numpy_dtype_promotion("standard"):
                changes, moments = self.optimizer.update(slopes, moments, logs)
            moved = jax.tree.map(jnp.add, logs, changes)
            return _projected(moved), moments, loss

        def loss(params, stats, logs, inputs):
            return loss_of(logs, params, stats, inputs)

        return jax.jit(step), jax.jit(loss)

    def _difference(
        self,
        got: PyTree,
        wanted: PyTree,
        args: tuple[Any, ...],
        inputs: Sequence[Any],
    ) -> Array:
        """The loss between the outputs of both models."""
        if callable(self._loss_of):
            return self._loss_of(got, wanted, *_filled(args, inputs))
        difference = divergence if self._loss_of == "kl" else _mean_square
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
        losses = [difference(x, y) for x, y in pairs if is_float(y)]
        if not losses:
            raise ValueError("learn: expected fn to return a float array")
        return sum(losses[1:], losses[0])


def _filled(args: tuple[Any, ...], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The batch's arguments with these arrays in the places of theirs."""
    rest = iter(inputs)
    flat, treedef = jax.tree.flatten(args)
    filled = [next(rest) if array_leaves(x) else x for x in flat]
    return jax.tree.unflatten(treedef, filled)


def _mean_square(got: Array, wanted: Array) -> Array:
    change = got.astype(jnp.float32) - wanted.astype(jnp.float32)
    return jnp.mean(jnp.square(change))


def _shapes_by_path(arrays: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    # By path, because a list may come back from a file as a tuple.
    paths, leaves, _ = named_leaves(arrays)
    return dict(zip(paths, map(np.shape, leaves), strict=True))


@dataclass(frozen=True)
class _Run:
    """Where learning is: what can be saved, and the problem.

    Attributes:
        problem: the loss and its steps.
        logs: what is learned.
        moments: the optimizer's state.
        best: the logs that were best on the batches held out.
        best_loss: their loss.
        train: the loss of each step so far.
        held_out: the loss of each check so far.
    """

    problem: _Problem
    logs: Logs
    moments: Any
    best: Logs
    best_loss: float
    train: tuple[float, ...]
    held_out: tuple[float, ...]

    @classmethod
    def begin(
        cls,
        problem: _Problem,
        start: Logs,
        identity: Logs,
        held_out: Sequence[Any],
    ) -> "_Run":
        """Before the first step: the better of the start and the identity is the best so far."""
        first = problem.loss(start, held_out)
        if not np.isfinite(first):
            raise ValueError(
                f"learn: the loss is {first} at the start; check the batches and s"
            )
        best, best_loss = start, first
        of_identity = problem.loss(identity, held_out)
        if of_identity < first:
            best, best_loss = identity, of_identity
        moments = problem.optimizer.init(start)
        return cls(problem, start, moments, best, best_loss, (), (first,))

    @property
    def done(self) -> int:
        """How many steps were made."""
        return len(self.train)

    def is_stopped(self, patience: int | None) -> bool:
        """Whether the last `patience` checks were not better than what was before them."""
        if patience is None or len(self.held_out) <= patience:
            return False
        before = self.held_out[:-patience]
        return min(self.held_out[-patience:]) >= min(before)

    def step(self, args: tuple[Any, ...]) -> "_Run":
        """One step on a batch."""
        logs, moments, loss = self.problem.step(self.logs, self.moments, args)
        return self._with(
            logs=logs, moments=moments, train=(*self.train, float(loss))
        )

    def checked(self, batches: Sequence[Any]) -> "_Run":
        """The loss on the batches held out; what is best so far is kept."""
        loss = self.problem.loss(self.logs, batches)
        run = self._with(held_out=(*self.held_out, loss))
        # NaN is no better than anything.
        if loss < self.best_loss:
            return run._with(best=self.logs, best_loss=loss)
        return run

    def _with(self, **changes: Any) -> "_Run":
        return _Run(**{**self.__dict__, **changes})

    def resumed(
        self, state: Mapping[str, Any], held_out: Sequence[Any]
    ) -> "_Run":
        """Where a state was left.

        Raises:
            ValueError: it is of other arguments.
        """
        mine = self._arrays()
        try:
            shapes = _shapes_by_path(dict(state["arrays"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "learn: expected the state of an earlier call, got something else"
            ) from error
        if shapes != _shapes_by_path(mine):
            raise ValueError(
                "learn: the state is of other arguments (other groups, clips, or another "
                "optimizer); pass those, or no state"
            )
        leaves = map(jnp.asarray, jax.tree.leaves(dict(state["arrays"])))
        arrays = jax.tree.unflatten(jax.tree.structure(mine), leaves)
        moments = jax.tree.unflatten(
            jax.tree.structure(self.moments), arrays["moments"]
        )
        losses = {
            name: tuple(np.asarray(state[name], np.float32).tolist())
            for name in ("train", "held_out")
        }
        best_loss = float(state["best_loss"])
        self._check_same_loss(arrays["best"], best_loss, held_out)
        return self._with(
            logs=arrays["logs"],
            moments=moments,
            best=arrays["best"],
            best_loss=best_loss,
            **losses,
        )

    def _check_same_loss(
        self, best: Logs, best_loss: float, held_out: Sequence[Any]
    ) -> None:
        """Raises ValueError where the best of a state has another loss here than it had there."""
        loss = self.problem.loss(best, held_out)
        # Another machine or another jax may round a little otherwise.
        if not math.isclose(loss, best_loss, rel_tol=_SAME_LOSS):
            raise ValueError(
                f"learn: the best of the state has a loss of {loss:.6g} here, and had "
                f"{best_loss:.6g}: it is of other arguments (another loss, other rules, parameters "
                "or batches); pass those, or no state"
            )

    def _arrays(self) -> dict[str, Any]:
        return {
            "logs": self.logs,
            "moments": jax.tree.leaves(self.moments),
            "best": self.best,
        }

    def learned(self) -> Learned:
        """The best so far, and the state to go on from."""
        found = _numbers(self.best)
        train = np.array(self.train, np.float32)
        held_out = np.array(self.held_out, np.float32)
        state = {
            "arrays": self._arrays(),
            "best_loss": np.float32(self.best_loss),
            "train": train,
            "held_out": held_out,
        }
        losses = Losses(train, held_out, self.best_loss)
        return Learned(
            found["s"], found["clips"], found["ranges"], losses, state
        )
