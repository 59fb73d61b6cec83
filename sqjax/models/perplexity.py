"""Perplexity: how well a language model predicts a text."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from sqjax.execution import quantized
from sqjax.models.model import Model, Params, TokenIds


def windows(ids: list[int] | np.ndarray, length: int, count: int | None = None) -> np.ndarray:
    """The first `count` windows of `length` tokens (all that fit, by default), (count, length) int32.

    Raises:
        ValueError: the text is too short.
    """
    ids = np.asarray(ids, np.int32)
    available = len(ids) // length
    count = available if count is None else count
    if count < 1 or count > available:
        raise ValueError(f"windows: expected 1 to {available} windows of {length} tokens in {len(ids)}, got {count}")
    return ids[: count * length].reshape(count, length)


def perplexity(
    model: Model, params: Params, tokens: TokenIds, *, progress: bool = False, description: str = "perplexity"
) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first.

    Args:
        model: a `Model`.
        params: its parameters, float or quantized.
        tokens: windows of text, (windows, length); each is read on its own.
        progress: whether to show a progress bar.
        description: what the bar says.

    Raises:
        ValueError: windows of fewer than two tokens, or the model returns NaN.
    """
    if tokens.shape[1] < 2:
        raise ValueError(f"perplexity: expected windows of at least 2 tokens, got {tokens.shape}")
    rows = tqdm(tokens, desc=description, unit="window", disable=not progress, leave=False)
    mean = float(np.mean([float(_mean_loss(model, params, jnp.asarray(row)[None])) for row in rows]))
    if not np.isfinite(mean):
        raise ValueError("perplexity: the model returned NaN or infinite logits; check its parameters")
    return float(np.exp(mean))


@partial(jax.jit, static_argnums=0)
def _mean_loss(model: Model, params: Params, ids: Int[Array, "batch tokens"]) -> Float[Array, ""]:
    logits = quantized(model.apply)(params, ids)[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)
