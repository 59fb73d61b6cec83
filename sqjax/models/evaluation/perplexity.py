"""Perplexity: how well a language model predicts a text."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tqdm.auto import tqdm

from sqjax.models.cache import PrefixCache
from sqjax.models.decoding.prefixes import Prefix, cache_of
from sqjax.models.decoding.prompts import check_tokens
from sqjax.models.evaluation.scoring import next_logprobs
from sqjax.models.fields import SIZE
from sqjax.models.model import Model, Params, check_model
from sqjax.models.slots import CacheFormat, cache_format


def windows(
    ids: Sequence[int] | Int[Array | np.ndarray, " tokens"],
    length: int,
    count: int | None = None,
):
    """The first `count` windows of `length` tokens, by default all that fit; (count, length) int32.

    For example ids [1, 2, 3, 4, 5] with length 2 give [[1, 2], [3, 4]].

    Raises:
        ValueError: the text is too short, or the length is not positive.
    """
    ids = np.asarray(ids, np.int32)
    if not SIZE.holds(length):
        raise ValueError(
            f"windows: expected a length of at least 1, got {length}"
        )
    available = len(ids) // length
    count = available if count is None else count
    if count < 1 or count > available:
        raise ValueError(
            f"windows: expected 1 to {available} windows of {length} tokens in a text of "
            f"{len(ids)}, got {count}; give a longer text, or ask for fewer"
        )
    return ids[: count * length].reshape(count, length)


def perplexity(
    model: Model,
    params: Params,
    tokens: Sequence[int] | Int[Array | np.ndarray, "..."],
    length: int | None = None,
    *,
    cache: str | CacheFormat | None = None,
    chunk: int | None = None,
    prefix: Prefix | None = None,
    progress: bool = False,
    description: str = "perplexity",
) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first.

    Args:
        model: a `Model`.
        params: its parameters, float or quantized.
        tokens: windows of text, (windows, length), or the ids of a text; each window is read on its
            own.
        length: the tokens of a window, for the ids of a text; what is left over at the end is not
            read.
        cache: None, or the format of the cache ("float", "int8", "e4m3", "int4" or a `CacheFormat`)
            through which every key and value is read, as if the window were generated.
        chunk: with a cache, how many tokens are written and read at once, as in `next_logprobs`; it
            divides the length.
        prefix: what `sqjax.models.prefix` made for the float form of these parameters: tokens that
            stand before every window, and are not among those whose likelihood counts.
        progress: whether to show a progress bar.
        description: what the bar says.

    Raises:
        ValueError: no windows, windows of fewer than two tokens or of more than
            ``config.max_length``, ids without a length, ids that are not in the vocabulary, or the
            model returns NaN.

    Examples:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, perplexity
        >>> model = Model(LlamaConfig(32, 8, 16, 1, 2, 1, 4))
        >>> bool(perplexity(model, model.init(jax.random.key(0)), [1, 2, 3, 4, 5, 6], length=3) > 1)
        True
    """
    check_model(model, "perplexity")
    rows = _windows_of(model, tokens, length)
    kind = None if cache is None else cache_format(cache)
    before = cache_of(model, prefix, "perplexity")
    losses = []
    shown = tqdm(
        rows, desc=description, unit="window", disable=not progress, leave=False
    )
    for row in shown:
        ids = jnp.asarray(row, jnp.int32)[None]
        losses.append(_loss(model, params, ids, kind, chunk, before))
    mean = float(np.mean(losses))
    if not np.isfinite(mean):
        raise ValueError(
            "perplexity: the model returned NaN or infinite logits; check its parameters"
        )
    return float(np.exp(mean))


def _windows_of(
    model: Model,
    tokens: Sequence[int] | Int[Array | np.ndarray, "..."],
    length: int | None,
) -> np.ndarray:
    """The windows that `perplexity` reads, (windows, length), checked."""
    check_tokens(model, tokens, "perplexity")
    ids = np.asarray(tokens)
    expected_ndim = 2 if length is None else 1
    if ids.ndim != expected_ndim:
        raise ValueError(
            "perplexity: expected windows (windows, length), or ids and a length, got tokens of "
            f"shape {ids.shape} and length {length}"
        )
    rows = ids if length is None else windows(ids, length)
    if len(rows) < 1 or rows.shape[1] < 2:
        raise ValueError(
            f"perplexity: expected at least one window, of at least 2 tokens, got {rows.shape}"
        )
    return rows


def _loss(
    model: Model,
    params: Params,
    ids: Array,
    kind: CacheFormat | None,
    chunk: int | None,
    before: PrefixCache | None,
) -> float:
    """The mean negative log-likelihood of a window's tokens after its first."""
    # What follows each token; the last, which follows nothing, gets the first and is left out.
    targets = jnp.roll(ids, -1, axis=1)
    logprobs, _ = next_logprobs(
        model, params, ids, targets, kind, chunk, prefix=before
    )
    return -float(jnp.mean(logprobs[:, :-1]))
