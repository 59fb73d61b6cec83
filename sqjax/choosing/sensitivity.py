"""How much the loss of a model grows by quantizing one site, predicted for every site at once.

Let y be the output of a site, and dy what a scheme adds to it. Around the float model, which is
near a minimum of its loss, the loss grows by dy^T H dy / 2. For the loss -log p(label) H is the
Fisher information of y: the mean of g g^T, where g is the gradient of log p(label) with respect to
y and the labels are drawn from the model's own predictions. So for every scheme

    predicted loss = 1 / (2 n) * sum of g^2 dy^2

over all elements of y, where n is how many predictions there are (tokens, say). The products of two
different elements are left out: over tokens and channels they have either sign, and would cost
noise. This is the score of NVIDIA's Model Optimizer (AutoQuantize) with its scale kept. One run
forward and back gives g for all sites; dy of every scheme comes from the same run, by multiplying
the float model's activations with the quantized weights too (`sqjax.methods.beside`).
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array
from tqdm.auto import tqdm

from sqjax._trees import PyTree, is_float, named_leaves
from sqjax.calibration.analysis import described
from sqjax.choosing.batches import arguments, checksum, kind_of
from sqjax.methods.beside import Beside, Meeting, leaves_beside
from sqjax.program.trace import array_leaves, trace
from sqjax.program.walk import run
from sqjax.weights.quant_weight import is_quantized

Loss = Callable[..., Any]


@dataclass(frozen=True)
class Sensitivity:
    """What each version of each site costs.

    Attributes:
        loss: {site: the predicted growth of the mean loss by each version, float64 (versions,)}.
        joined: the sites that one product reads together, because fn concatenates or adds them:
            each has an equal part of its cost.
    """

    loss: Mapping[str, np.ndarray]
    joined: tuple[tuple[str, ...], ...]


def sensitivity(
    fn: Callable[..., Any],
    params: PyTree,
    versions: Sequence[PyTree],
    batches: Iterable[Any],
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Sensitivity:
    """The predicted loss of every quantized leaf in every version, from one gradient a batch.

    Args:
        fn: fn(params, *batch), as for `calibrate`.
        params: the float tree.
        versions: quantized trees of it, all with the same leaves quantized.
        batches: an iterable of batches, as for `calibrate`.
        loss: loss(outputs, *batch), one number for every prediction; None: -log p of labels drawn
            from softmax(outputs).
        seed: of the labels.
        progress: whether to show a progress bar.

    Raises:
        ValueError: there are no batches; fn fails on one; its outputs, or its gradients, hold NaN
            or infinity; no output is a float array; the loss is no float array.
    """
    coded = [named_leaves(tree, is_leaf=is_quantized)[1] for tree in versions]
    sites = _quantized_paths(versions[0])
    joined: dict[tuple[str, ...], None] = {}
    totals = {path: np.zeros(len(versions)) for path in sites}
    predictions = 0
    key = jax.random.key(seed)
    with_loss = partial(_losses, fn, loss)
    floats = jax.tree.leaves(params)
    programs: dict[Any, Callable[..., Any]] = {}
    shown = tqdm(
        batches,
        desc="sensitivity",
        unit="batch",
        total=operator.length_hint(batches) or None,
        disable=not progress,
    )
    for number, batch in enumerate(shown):
        args = arguments(batch)
        kind = kind_of(args)
        if kind not in programs:
            programs[kind] = _program(
                with_loss, params, key, args, sites, len(versions), joined
            )
        # By its numbers and not by its place, because the order of batches shall not matter.
        own_key = jax.random.fold_in(key, np.uint32(checksum(args)))
        inputs = array_leaves((own_key, *args))
        found, count = jax.device_get(programs[kind](floats, coded, inputs))
        predictions += count
        for path, sums in found.items():
            totals[path] = totals[path] + np.asarray(sums, np.float64)
        _check_finite(found, number)
    if not predictions:
        raise ValueError(
            "choose_precision: batches is empty (an iterator that was used up?), or holds no "
            "prediction; at least one is needed"
        )
    means = {path: total / predictions / 2 for path, total in totals.items()}
    return Sensitivity(means, _of_several(joined))


def _of_several(
    products: Iterable[tuple[str, ...]],
) -> tuple[tuple[str, ...], ...]:
    """The products that read more than one leaf."""
    return tuple(paths for paths in products if len(paths) > 1)


def _quantized_paths(tree: PyTree) -> list[str]:
    """The paths of a tree's quantized leaves."""
    paths, leaves, _ = named_leaves(tree, is_leaf=is_quantized)
    pairs = zip(paths, leaves, strict=True)
    return [path for path, leaf in pairs if is_quantized(leaf)]


def _check_finite(found: Mapping[str, np.ndarray], number: int) -> None:
    """Raises ValueError where a batch's scores are not finite."""
    for path, sums in found.items():
        if not np.isfinite(sums).all():
            raise ValueError(
                f"choose_precision: batch {number}: the gradient at {path} holds NaN or infinity; "
                "check the batch and the loss"
            )


# Losses -------------------------------------------------------------------------------------------


def _losses(
    fn: Callable[..., Any],
    loss: Loss | None,
    params: PyTree,
    key: Array,
    *args: Any,
) -> Array:
    """One number for every prediction, (predictions,)."""
    outputs = fn(params, *args)
    if loss is None:
        return _sampled_losses(outputs, key)
    losses = loss(outputs, *args)
    if not is_float(losses):
        raise ValueError(
            "choose_precision: expected loss(outputs, *batch) to be a float array, one loss for "
            f"every prediction, got {described(losses)}"
        )
    return jnp.ravel(losses)


def _sampled_losses(outputs: Any, key: Array) -> Array:
    """-log p of labels that are drawn from the predictions p = softmax(outputs)."""
    losses = []
    for number, logits in enumerate(filter(is_float, jax.tree.leaves(outputs))):
        logits = logits.astype(jnp.float32)
        # Another key for each output, or two heads would draw labels alike.
        own = jax.random.fold_in(key, number)
        labels = jax.random.categorical(own, lax.stop_gradient(logits))
        logprobs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logprobs, labels[..., None], -1)
        losses.append(-jnp.ravel(chosen))
    if not losses:
        raise ValueError(
            "choose_precision: fn returns no float array whose last axis could be logits; pass a "
            "loss(outputs, *batch)"
        )
    return jnp.concatenate(losses)


# A program that scores ----------------------------------------------------------------------------


def _program(
    with_loss: Callable[..., Array],
    params: PyTree,
    key: Array,
    args: tuple[Any, ...],
    sites: Sequence[str],
    versions: int,
    joined: dict[tuple[str, ...], None],
) -> Callable[..., Any]:
    """(leaves, quantized leaves of every version, inputs) -> ({site: its sums}, predictions)."""
    try:
        traced, _ = trace(with_loss, params, (key, *args), {})
    except ValueError:
        raise  # it says what is wrong
    # Whatever fn raises: a TypeError of two arguments for one, a shape that does not fit, ...
    except Exception as error:
        raise ValueError(
            "choose_precision: fn(params, *batch), or the loss, failed on inputs of shapes "
            f"{described(args)}. {type(error).__name__}: {error}"
        ) from error
    probes = {path: jnp.zeros(versions, jnp.float32) for path in sites}

    @jax.jit
    def scores(floats, coded, inputs):
        leaves = leaves_beside(traced.paths, floats, coded)

        def total(probes):
            walk = _Scoring(probes, joined)
            [losses] = run(traced.jaxpr, [*leaves, *inputs], walk)
            return jnp.sum(losses)

        return jax.grad(total)(probes), traced.jaxpr.out_avals[0].size

    return scores


class _Scoring(Beside):
    """The walk that hangs a probe on every product: an input whose gradient is the score.

    A site that is read several times, or in every step of a scan, has one probe: gradients add up.
    `joined` is filled with the sites of each product.
    """

    def __init__(
        self,
        probes: Mapping[str, Array],
        joined: dict[tuple[str, ...], None],
    ):
        super().__init__()
        self._probes, self._joined = probes, joined

    def meeting(self, met: Meeting) -> Array:
        """The float result, through which the gradient comes back."""
        self._joined[met.paths] = None
        exact = met.exact.astype(jnp.float32)
        changes = [x.astype(jnp.float32) - exact for x in met.results]
        added = lax.stop_gradient(jnp.stack(changes))
        # Leaves that are joined before the product share its cost equally.
        part = 1 / len(met.paths)
        probe = sum(part * self._probes[path] for path in met.paths)
        return _probed(met.exact, added, probe)


@jax.custom_vjp
def _probed(y: Array, added: Array, probe: Array) -> Array:
    """y. The gradient of `probe` is no derivative, but the sums of g^2 added^2.

    Args:
        y: a product.
        added: (versions, *y.shape), what each version adds to it.
        probe: (versions,) zeros.
    """
    return y


def _probed_forward(
    y: Array, added: Array, probe: Array
) -> tuple[Array, Array]:
    """y, and what the way back needs."""
    return y, added


def _probed_back(added: Array, g: Array) -> tuple[Array, Array, Array]:
    """The gradient of y goes on as it is; the probe's "gradient" is the score of each version."""
    changes = g.astype(jnp.float32)[None] * added
    scores = jnp.sum(jnp.square(changes), axis=range(1, changes.ndim))
    return g, jnp.zeros_like(added), scores


_probed.defvjp(_probed_forward, _probed_back)
