"""What `learn` makes small: the loss between the simulated quantized model and the float one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._arguments import expect
from sqjax._trees import PyTree, is_float
from sqjax.calibration.stats import Stats
from sqjax.choosing.batches import kind_of
from sqjax.choosing.divergence import divergence
from sqjax.choosing.learned_numbers import Logs, numbers_of, projected
from sqjax.choosing.simulation import simulated
from sqjax.program.trace import Traced, array_leaves, trace
from sqjax.weights.schemes import Scheme

if TYPE_CHECKING:
    import optax

Loss = Literal["kl", "mse"] | Callable[..., Any]


class Problem:
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
        """The step and the loss for batches like this one."""
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
            # Made anew in each step, because the float outputs of all batches may not fit.
            exact = jax.core.eval_jaxpr(
                traced.jaxpr.jaxpr, traced.jaxpr.consts, *leaves, *inputs
            )
            wanted = jax.tree.unflatten(traced.treedef, exact)
            numbers = numbers_of(logs)
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
            return projected(moved), moments, loss

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
        # An output of integers, such as the tokens chosen, says nothing that has a gradient.
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
    """The mean square of what quantizing changes."""
    change = got.astype(jnp.float32) - wanted.astype(jnp.float32)
    return jnp.mean(jnp.square(change))
