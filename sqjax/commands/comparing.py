"""The work of `sqjax compare`: two models on the same windows of text."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from sqjax.commands.model_argument import Opened
from sqjax.commands.options import Talk
from sqjax.commands.texts import TOKENS, Windows
from sqjax.models import Model
from sqjax.models.model import Params
from sqjax.runtime.quantized import quantized
from sqjax.weights.sizes import weight_bytes


class Compared(NamedTuple):
    """Two models on one text.

    Attributes:
        perplexity, other_perplexity: of each.
        loss_difference: the other's mean loss less the first's, in nats a token.
        standard_error: of that difference, from how it varies between windows; None for one window.
        same_token: the share of places where both find the same next token likeliest.
        kl: the mean divergence of the other's distribution from the first's, in nats.
        weight_bytes, other_weight_bytes: their sizes.
        windows, tokens: how much was read.
    """

    perplexity: float
    other_perplexity: float
    loss_difference: float
    standard_error: float | None
    same_token: float
    kl: float
    weight_bytes: int
    other_weight_bytes: int
    windows: int
    tokens: int


class _OfWindow(NamedTuple):
    """Means over a window's places that a token follows."""

    loss: Float[Array, ""]
    other_loss: Float[Array, ""]
    same: Float[Array, ""]
    kl: Float[Array, ""]


def shared_length(first: Opened, second: Opened, tokens: int | None) -> int:
    """The tokens of a window, as many as both models take."""
    # Windows of another length for each would be other texts, of another perplexity.
    lengths = [opened.model.config.max_length for opened in (first, second)]
    return min(TOKENS, *lengths) if tokens is None else tokens


def check_comparable(
    first: Opened, second: Opened, read: Windows, same: Windows
) -> None:
    """Raises ValueError if two models read a text as other tokens, or have other vocabularies."""
    vocabularies = [x.model.config.vocab_size for x in (first, second)]
    is_same = np.array_equal(read.ids, same.ids)
    if not is_same or len({*vocabularies}) > 1:
        raise ValueError(
            f"{second.name}: expected a model with the tokens of {first.name}, got another "
            f"tokenizer, of {vocabularies[1]} tokens beside {vocabularies[0]}; perplexities of "
            "such models say nothing of each other"
        )


def compared(
    first: Opened,
    second: Opened,
    ids: Int[np.ndarray, "windows tokens"],
    talk: Talk,
) -> Compared:
    """Reads all windows with both models."""
    models = first.model, second.model
    found = []
    shown = tqdm(
        ids,
        desc="comparing",
        unit="window",
        disable=not talk.progress,
        leave=False,
    )
    for window in shown:
        row = jnp.asarray(window, jnp.int32)[None]
        of_window = _of_window(*models, first.params, second.params, row)
        found.append(jax.device_get(of_window))
    # (windows, means) -> a row of all windows for each mean.
    means = _OfWindow(*np.asarray(found, np.float64).T)
    _check_finite(means)
    differences = means.other_loss - means.loss
    error = None
    if len(found) > 1:
        # Paired: a hard window is hard for both, so only the differences vary.
        error = float(differences.std(ddof=1) / math.sqrt(len(found)))
    return Compared(
        perplexity=float(np.exp(means.loss.mean())),
        other_perplexity=float(np.exp(means.other_loss.mean())),
        loss_difference=float(differences.mean()),
        standard_error=error,
        same_token=float(means.same.mean()),
        kl=float(means.kl.mean()),
        weight_bytes=weight_bytes(first.params),
        other_weight_bytes=weight_bytes(second.params),
        windows=len(ids),
        tokens=int(ids.size),
    )


def _check_finite(means: Any) -> None:
    """Raises ValueError where a mean is NaN or infinite."""
    if not np.isfinite(means).all():
        raise ValueError(
            "compare: a model returned NaN or infinite logits; check its parameters"
        )


@partial(jax.jit, static_argnums=(0, 1))
def _of_window(
    model: Model,
    other: Model,
    params: Params,
    other_params: Params,
    ids: Int[Array, "1 tokens"],
) -> _OfWindow:
    """Both models on one window; of the float32 logits only means leave the device."""
    logprobs = _logprobs(model, params, ids)
    others = _logprobs(other, other_params, ids)
    following = ids[0, 1:, None]
    loss = -jnp.take_along_axis(logprobs, following, axis=-1)
    other_loss = -jnp.take_along_axis(others, following, axis=-1)
    same = jnp.argmax(logprobs, -1) == jnp.argmax(others, -1)
    # A probability of 0 has a logarithm of -inf, and no part in the sum.
    probabilities = jnp.exp(logprobs)
    terms = jnp.where(probabilities > 0, probabilities * (logprobs - others), 0)
    kl = jnp.sum(terms, axis=-1)
    return _OfWindow(
        jnp.mean(loss),
        jnp.mean(other_loss),
        jnp.mean(same.astype(jnp.float32)),
        jnp.mean(kl),
    )


def _logprobs(
    model: Model, params: Params, ids: Int[Array, "1 tokens"]
) -> Float[Array, "places vocab"]:
    """The log-probabilities of what follows each token but the last, in float32."""
    logits = quantized(model.apply)(params, ids)[0, :-1]
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def text_of(found: Compared, name: str, other: str) -> str:
    """What was found, for people."""
    first, second = found.weight_bytes / 1e6, found.other_weight_bytes / 1e6
    error = found.standard_error
    spread = "" if error is None else f" +- {error:.4f} (standard error)"
    change = 100 * (found.other_perplexity / found.perplexity - 1)
    lines = [
        f"perplexity {found.perplexity:.3f}  {first:.0f} MB in memory  {name}",
        f"perplexity {found.other_perplexity:.3f}  {second:.0f} MB in memory  {other}",
        f"loss {found.loss_difference:+.4f}{spread} nats a token; perplexity {change:+.2f}%",
        f"same likeliest token {100 * found.same_token:.2f}%",
        f"KL divergence {found.kl:.5f} nats a token",
    ]
    return "\n".join(lines)
