"""How far `learn` has come: its steps, its checks, and the state from which it can go on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._trees import named_leaves
from sqjax.choosing.learned_numbers import Logs
from sqjax.choosing.learning_loss import Problem

#: By what part the loss of a state's best may differ when it is computed again.
_SAME_LOSS = 1e-3


def _shapes_by_path(arrays: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{path: shape}."""
    # By path, because a list may come back from a file as a tuple.
    paths, leaves, _ = named_leaves(arrays)
    return dict(zip(paths, map(np.shape, leaves), strict=True))


@dataclass(frozen=True)
class Run:
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

    problem: Problem
    logs: Logs
    moments: Any
    best: Logs
    best_loss: float
    train: tuple[float, ...]
    held_out: tuple[float, ...]

    @classmethod
    def begin(
        cls,
        problem: Problem,
        start: Logs,
        identity: Logs,
        held_out: Sequence[Any],
    ) -> "Run":
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
        # held_out[0] is the start, so there is always one to compare with.
        return min(self.held_out[-patience:]) >= min(before)

    def step(self, args: tuple[Any, ...]) -> "Run":
        """One step on a batch."""
        logs, moments, loss = self.problem.step(self.logs, self.moments, args)
        return self._with(
            logs=logs, moments=moments, train=(*self.train, float(loss))
        )

    def checked(self, batches: Sequence[Any]) -> "Run":
        """The loss on the batches held out; what is best so far is kept."""
        loss = self.problem.loss(self.logs, batches)
        run = self._with(held_out=(*self.held_out, loss))
        # NaN is no better than anything.
        if loss < self.best_loss:
            return run._with(best=self.logs, best_loss=loss)
        return run

    def _with(self, **changes: Any) -> "Run":
        return Run(**{**self.__dict__, **changes})

    def resumed(
        self, state: Mapping[str, Any], held_out: Sequence[Any]
    ) -> "Run":
        """Where a state was left.

        Raises:
            ValueError: it is of other arguments.
        """
        mine = self._arrays()
        try:
            shapes = _shapes_by_path(dict(state["arrays"]))
            best_loss = float(state["best_loss"])
            losses = {
                name: tuple(np.asarray(state[name], np.float32).tolist())
                for name in ("train", "held_out")
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "learn: expected the state of an earlier call, got something else"
            ) from error
        if shapes != _shapes_by_path(mine):
            raise ValueError(
                "learn: the state is of other arguments (other groups, clips, or another "
                "optimizer); pass those, or no state"
            )
        # The containers come from this run, the numbers from the state: see `_shapes_by_path`.
        leaves = map(jnp.asarray, jax.tree.leaves(dict(state["arrays"])))
        arrays = jax.tree.unflatten(jax.tree.structure(mine), leaves)
        moments = jax.tree.unflatten(
            jax.tree.structure(self.moments), arrays["moments"]
        )
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
        """What a state keeps besides the losses."""
        return {
            # A list, because a file need not know the types that optax keeps them in.
            "logs": self.logs,
            "moments": jax.tree.leaves(self.moments),
            "best": self.best,
        }

    def state(self) -> dict[str, Any]:
        """A pytree of arrays, from which `resumed` goes on."""
        return {
            "arrays": self._arrays(),
            "best_loss": np.float32(self.best_loss),
            "train": np.array(self.train, np.float32),
            "held_out": np.array(self.held_out, np.float32),
        }
