"""`learn`: smoothing scales, weight clips and static input ranges, learned by gradients.

The quantized model is simulated in float (`sqjax.choosing.simulation`) and compared with the float
model's outputs; log s, the logs of the clips and those of the ranges follow the gradient of the
difference. This is the learnable equivalent transformation and the learnable weight clipping of
OmniQuant (Shao et al. 2023, arXiv 2308.13137), for the whole model at once and not block by block,
and with the range of static activations beside them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from sqjax._arguments import check_function, expect
from sqjax._trees import PyTree, check_finite
from sqjax.calibration.calibrate import check_batches
from sqjax.calibration.stats import Stats
from sqjax.choosing.batches import arguments, checksum
from sqjax.choosing.learned_numbers import (
    identity_of,
    learned_schemes,
    numbers_of,
    start_of,
)
from sqjax.choosing.learning_loss import Loss, Problem
from sqjax.choosing.learning_run import Run
from sqjax.choosing.simulation import applied
from sqjax.methods.described import check_known, check_stats
from sqjax.methods.quantization import Clips, Rules
from sqjax.weights.quant_weight import check_float

if TYPE_CHECKING:
    import optax


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
    check_known(params, stats, "learn")
    check_batches(batches)
    _check_counts(steps, every, patience)
    check_float(params, "learn")
    check_finite(params, "parameter")
    schemes = learned_schemes(stats, rules)
    start = start_of(params, stats, schemes, s, clips)
    identity = identity_of(stats, schemes, start)
    training, held_out = _split(batches)
    if optimizer is None:
        import optax

        optimizer = optax.adam(0.01)
    problem = Problem(fn, params, stats, schemes, loss, optimizer)
    run = Run.begin(problem, start, identity, held_out)
    if state is not None:
        run = run.resumed(state, held_out)
    shown = tqdm(
        total=steps, initial=run.done, desc="learning", disable=not progress
    )
    with shown:
        while run.done < steps and not run.is_stopped(patience):
            # Round and round: after the last batch comes the first again.
            run = run.step(training[run.done % len(training)])
            if run.done % every == 0:
                run = run.checked(held_out)
                shown.set_postfix(best=f"{run.best_loss:.4g}")
            shown.update()
    return _learned(run)


def _check_counts(steps: int, every: int, patience: int | None) -> None:
    """Raises ValueError for numbers of steps that make no sense."""
    expect(steps >= 0, "learn: steps", "a number of 0 or more", steps)
    expect(every >= 1, "learn: every", "a number of 1 or more", every)
    fits = patience is None or patience >= 1
    expect(fits, "learn: patience", "a number of 1 or more, or None", patience)


def _split(batches: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """(for training, held out): a quarter is held out, and one batch alone is both."""
    # In an order that hangs on the values alone, so that the caller's order changes nothing.
    every = sorted(map(arguments, batches), key=checksum)
    if not every:
        raise ValueError(
            "learn: batches is empty (an iterator that was used up?); at least one is needed"
        )
    if len(every) == 1:
        return every, every
    kept = max(1, len(every) // 4)
    return every[kept:], every[:kept]


def _learned(run: Run) -> Learned:
    """The best so far, and the state to go on from."""
    found = numbers_of(run.best)
    state = run.state()
    losses = Losses(state["train"], state["held_out"], run.best_loss)
    return Learned(found["s"], found["clips"], found["ranges"], losses, state)
