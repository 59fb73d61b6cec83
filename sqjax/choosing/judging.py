"""The judge of `recommend`: what each recipe loses on held-out batches, beside the float model."""

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._arguments import expect
from sqjax._trees import PyTree, is_float
from sqjax.calibration.analysis import described
from sqjax.choosing.batches import arguments
from sqjax.choosing.divergence import divergence
from sqjax.methods.quantization import Rules
from sqjax.runtime.quantized import quantized
from sqjax.weights.sizes import weight_bytes

#: loss(outputs, float outputs, *batch) of one batch: a number, less is better.
Loss = Callable[..., Any]


class Tried(NamedTuple):
    """One recipe beside the float model.

    Attributes:
        name: of the recipe.
        nbytes: of all parameters, as a file or a GPU holds them.
        loss: its mean over the held-out batches.
        difference: how much more that is than the float model's.
        interval: half the width of the 95% interval of the difference, from how it varies between
            batches (paired: a hard batch is hard for both), by Student's t: few batches make it
            wide.
        rules: what `quantize` was given.
    """

    name: str
    nbytes: int
    loss: float
    difference: float
    interval: float
    rules: Rules


class Judge(NamedTuple):
    """The held-out batches, and what the float model gives for each.

    Attributes:
        measure: measure(tree, params, args) is the loss of one batch.
        params: the float ones.
        batches: each the arguments of fn after params.
        losses: of the float model, (batches,).
    """

    measure: Callable[..., Any]
    params: PyTree
    batches: list[tuple[Any, ...]]
    losses: np.ndarray

    @classmethod
    def of(
        cls,
        fn: Callable[..., Any],
        params: PyTree,
        batches: list[Any],
        loss: Loss | None,
    ) -> "Judge":
        """The judge of these batches, for which the float model's losses are computed."""
        args_of = list(map(arguments, batches))
        of_outputs = (
            divergence_of_trees if loss is None else _checked_loss(loss)
        )
        run = quantized(fn)

        @jax.jit
        def measure(tree, params, args):
            # The float outputs are computed anew, because those of all batches may not fit.
            return of_outputs(run(tree, *args), fn(params, *args), *args)

        # Complete but for its losses, which it can measure by now.
        made = cls(measure, params, args_of, np.zeros(0))
        return made._replace(losses=made.all(params))

    def all(self, tree: PyTree) -> np.ndarray:
        """The loss of every batch."""
        found = [
            float(self.measure(tree, self.params, args))
            for args in self.batches
        ]
        if not np.isfinite(found).all():
            raise ValueError(
                f"recommend: expected losses that are finite, got {found[:5]}; check loss= and "
                "the held-out batches"
            )
        return np.asarray(found)

    def tried(self, name: str, rules: Rules, tree: PyTree) -> Tried:
        """A recipe beside the float model."""
        losses = self.all(tree)
        differences = losses - self.losses
        # The standard error of the mean difference; ddof=1, because the mean is estimated too.
        error = float(differences.std(ddof=1)) / math.sqrt(len(losses))
        interval = _quantile(len(losses) - 1) * error
        mean, more = float(losses.mean()), float(differences.mean())
        return Tried(name, weight_bytes(tree), mean, more, interval, rules)


def _quantile(freedom: int) -> float:
    """Half the width of a 95% interval in standard errors: the 97.5% quantile of Student's t.

    For three degrees of freedom or more an expansion around the normal's 1.96, right to 1%
    (Abramowitz and Stegun 1964, 26.7.5).
    """
    few = {1: 12.706, 2: 4.303}
    if freedom in few:
        return few[freedom]
    return 1.96 + 2.372 / freedom + 2.823 / freedom**2 + 2.556 / freedom**3


def _checked_loss(loss: Any) -> Loss:
    """The loss, which says what is expected of it where its arguments or its value do not fit."""
    order = "a function loss(outputs, float_outputs, *batch)"
    expect(callable(loss), "recommend: loss=", order, loss)

    def checked(*args: Any) -> Any:
        try:
            inspect.signature(loss).bind(*args)
        except TypeError as error:
            raise ValueError(
                f"recommend: loss=: expected {order}, got one that does not take these "
                f"{len(args)} arguments: {error}"
            ) from error
        except ValueError:
            # What is not written in Python may have no signature.
            pass
        found = loss(*args)
        if not _is_scalar(found):
            raise ValueError(
                "recommend: loss=: expected a scalar, the loss of a batch, got "
                f"{described(found)}; take the mean, say"
            )
        return found

    return checked


def _is_scalar(x: Any) -> bool:
    """Whether it is a real number, or an array of one without axes."""
    if not hasattr(x, "dtype"):
        return isinstance(x, Real)
    is_real = is_float(x) or jnp.issubdtype(x.dtype, jnp.integer)
    return is_real and not x.shape


def divergence_of_trees(outputs: Any, float_outputs: Any, *_: Any) -> Array:
    """The sum over all float arrays of both outputs of `divergence`.

    Raises:
        ValueError: there is no float array, or one has no axis.
    """
    leaves = map(jax.tree.leaves, (float_outputs, outputs))
    pairs = zip(*leaves, strict=True)
    floats = [(wanted, got) for wanted, got in pairs if is_float(wanted)]
    if not floats or not all(wanted.ndim for wanted, _ in floats):
        raise ValueError(
            "recommend: expected outputs whose float arrays have a last axis of logits, got "
            f"{described(float_outputs)}; pass loss=, a function loss(outputs, float_outputs, "
            "*batch)"
        )
    found = [divergence(got, wanted) for wanted, got in floats]
    return jnp.sum(jnp.stack(found))
