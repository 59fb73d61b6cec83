"""How likely a model finds given tokens: log-likelihoods, with or without a cache, and multiple choice by them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sqjax.models.decoding.generation import compute_dtype
from sqjax.models.decoding.prompts import check_tokens, encode_alone
from sqjax.models.model import Model, Params
from sqjax.models.slots import CacheFormat, cache_format
from sqjax.models.stacking import unstack_layers
from sqjax.runtime.quantized import quantized

#: Sequences are padded to a multiple of so many tokens, so that few shapes are compiled.
MULTIPLE = 64

#: The ids of a context and of the continuation whose likelihood is asked for.
Pair = tuple[Sequence[int], Sequence[int]]


class Likelihood(NamedTuple):
    """The sum of a continuation's log-probabilities, and whether each of its tokens is the likeliest at its place."""

    logprob: float
    greedy: bool


class Question(NamedTuple):
    """A text, the ways in which it may go on, and the number of the right one."""

    context: str
    choices: Sequence[str]
    answer: int


class Accuracy(NamedTuple):
    """The share of questions whose right choice has the largest log-likelihood.

    Attributes:
        acc: of the log-likelihood as it is.
        acc_norm: of the log-likelihood divided by the choice's number of characters.
        acc_bytes: of the log-likelihood divided by the choice's number of bytes in UTF-8.
        logprobs: the log-likelihoods of each question's choices.
    """

    acc: float
    acc_norm: float
    acc_bytes: float
    logprobs: list[list[float]]


@partial(jax.jit, static_argnames=("model", "cache", "chunk"))
def next_logprobs(
    model: Model,
    params: Params,
    inputs: Int[Array, "batch tokens"],
    targets: Int[Array, "batch tokens"],
    cache: CacheFormat | None = None,
    chunk: int | None = None,
    padding: Int[Array | np.ndarray, " batch"] | None = None,
) -> tuple[Float[Array, "batch tokens"], Bool[Array, "batch tokens"]]:
    """The log-probability of each target after the inputs up to it, and whether no other token is likelier.

    Args:
        model: a `Model`.
        params: its parameters, float or quantized.
        inputs: token ids.
        targets: the token that follows each.
        cache: None to read the inputs as they are; otherwise every key and value is read from a cache of this format,
            as in decoding ("teacher forcing").
        chunk: with a cache, how many tokens are written and read at once; it must divide their number. What is computed
            does not depend on it but for rounding, unless the format has scales of channels. None for all.
        padding: with a cache, how many of each row's first inputs are padding, which nothing looks at. None for none.

    Raises:
        ValueError: the chunk does not divide the number of tokens, these are more than ``config.max_length``, or there
            is a chunk or padding but no cache.
    """
    if cache is None:
        if chunk is not None or padding is not None:
            raise ValueError(
                'next_logprobs: a chunk and padding need a cache; give one ("float"), or leave them out'
            )
        return _chosen(quantized(model.apply)(params, inputs), targets)
    batch, tokens = inputs.shape
    size = tokens if chunk is None else chunk
    if size < 1 or tokens % size:
        raise ValueError(
            f"next_logprobs: expected a chunk that divides {tokens} tokens, got {size}"
        )
    slots = model.init_cache(batch, tokens, compute_dtype(params), cache, size)
    if padding is not None:
        slots = slots._replace(padding=jnp.asarray(padding, jnp.int32))
    read, params = quantized(model.read), unstack_layers(params)

    def piece(slots, pair):
        logits, slots = read(params, pair[0], slots)
        return slots, _chosen(logits, pair[1])

    pieces = [x.reshape(batch, -1, size).swapaxes(0, 1) for x in (inputs, targets)]
    _, (logprobs, greedy) = jax.lax.scan(piece, slots, tuple(pieces))
    return logprobs.swapaxes(0, 1).reshape(batch, tokens), greedy.swapaxes(0, 1).reshape(
        batch, tokens
    )


def _chosen(logits: Array, targets: Array) -> tuple[Array, Array]:
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= jnp.max(logits, axis=-1)


def loglikelihoods(
    model: Model,
    params: Params,
    pairs: Sequence[Pair],
    *,
    cache: str | CacheFormat | None = None,
    batch: int = 8,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    A context that is too long loses its first tokens. Sequences of about one length are read together, which changes
    nothing but the rounding of sums, unless a scheme gives all activations one scale ("per_tensor").

    Args:
        model: a `Model`.
        params: its parameters, float or quantized.
        pairs: (context ids, continuation ids); a context has at least one token, a continuation may be empty.
        cache: None, or the format of the cache through which everything is read, as in `next_logprobs`.
        batch: how many sequences are read at once.

    Raises:
        ValueError: ids that are not in the vocabulary, an empty context, a continuation that is longer than
            ``config.max_length``, a batch of less than 1, or logits that are NaN.

    Example:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, loglikelihoods
        >>> model = Model(LlamaConfig(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> [one] = loglikelihoods(model, params, [([1, 2], [3, 4])])
        >>> one.logprob < 0
        True
    """
    if batch < 1:
        raise ValueError(f"loglikelihoods: expected a batch of at least 1, got {batch}")
    kind = None if cache is None else cache_format(cache)
    rows = [_row(model, number, *pair) for number, pair in enumerate(pairs)]
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(rows)
    for chosen in _batches([len(row) - 1 for row, _ in rows], batch):
        ids, padding = _batch(
            [rows[i][0] for i in chosen], batch, model.config.max_length, kind is not None
        )
        scored = next_logprobs(
            model, params, ids[:, :-1], ids[:, 1:], kind, None, padding if kind else None
        )
        logprobs, greedy = map(np.asarray, scored)
        for place, i in enumerate(chosen):
            last = int(padding[place]) + len(rows[i][0]) - 1
            asked = slice(last - rows[i][1], last)
            total = float(logprobs[place, asked].sum(dtype=np.float64))
            if np.isnan(total):
                raise ValueError(
                    f"pairs[{i}]: the logits are NaN; check the parameters and their scales"
                )
            found[i] = Likelihood(total, bool(greedy[place, asked].all()))
    return found


def _row(
    model: Model, number: int, context: Sequence[int], continuation: Sequence[int]
) -> tuple[list[int], int]:
    """All tokens, cut on the left to what the model reads, and how many of them are asked for."""
    for name, ids in (("context", context), ("continuation", continuation)):
        check_tokens(model, ids, f"pairs[{number}], {name}")
    most = model.config.max_length
    if len(context) < 1 or len(continuation) > most:
        raise ValueError(
            f"pairs[{number}]: expected a context of at least one token and a continuation of at most {most} "
            f"(config.max_length), got {len(context)} and {len(continuation)}"
        )
    return [*context, *continuation][-(most + 1) :], len(continuation)


def _batch(
    rows: list[list[int]], size: int, most: int, cached: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array of `size` rows, and how many zeros stand before each.

    Zeros after a sequence change nothing that it is asked for, but would be among what scales of channels are made of;
    so through a cache they stand before it, as padding.
    """
    inputs = max(1, *(len(row) - 1 for row in rows))
    width = min(-(-inputs // MULTIPLE) * MULTIPLE, most)
    ids, padding = np.zeros((size, width + 1), np.int32), np.zeros(size, np.int32)
    for place, row in enumerate(rows):
        padding[place] = width + 1 - len(row) if cached else 0
        ids[place, padding[place] : padding[place] + len(row)] = row
    return ids, padding


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Numbers of sequences, so many at a time, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[first : first + size] for first in range(0, len(order), size)]


def encode_pair(model: Model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """A context and its continuation as ids, as lm-evaluation-harness does it.

    Both are encoded together and parted where the context alone would end; spaces at the end of the context are the
    continuation's. For an empty context stands what the tokenizer puts before every text, or else the end of text.

    Raises:
        ValueError: the model has no tokenizer, or it names no end of text for an empty context.
    """
    if model.tokenizer is None:
        raise ValueError(
            "scoring texts: the model has no tokenizer; call loglikelihoods with token ids"
        )
    if context == "":
        end = model.tokenizer.eos_id
        begin = model.tokenizer.encode("") or ([] if end is None else [end])
        if not begin:
            raise ValueError(
                "scoring texts: an empty context, and the tokenizer names no end of text to begin with"
            )
        return begin, encode_alone(model.tokenizer, continuation)
    kept = context.rstrip()
    together = model.tokenizer.encode(context + continuation)
    before = model.tokenizer.encode(kept)
    return before, together[len(before) :]


def multiple_choice(
    model: Model,
    params: Params,
    questions: Sequence[Question],
    *,
    cache: str | CacheFormat | None = None,
    batch: int = 8,
) -> Accuracy:
    """Answers questions by the log-likelihood of their choices; other arguments and errors as in `loglikelihoods`.

    A choice follows its context as it is. A space between the two counts as a character of the choice only if the
    choice begins with it: lm-evaluation-harness puts one there and does not count it.

    Raises:
        ValueError: also for no questions, a question of fewer than two choices, an empty choice, or an answer that is
            not among them.
    """
    for number, (_, choices, answer) in enumerate(questions):
        if len(choices) < 2 or not all(choices) or answer not in range(len(choices)):
            raise ValueError(
                f"questions[{number}]: expected at least two choices, none of them empty, and the number of the right "
                f"one, got {len(choices)} choices {list(choices)} and answer {answer}"
            )
    if not questions:
        raise ValueError("questions: expected at least one, got none")
    pairs = [
        encode_pair(model, question.context, choice)
        for question in questions
        for choice in question.choices
    ]
    found = iter(loglikelihoods(model, params, pairs, cache=cache, batch=batch))
    logprobs = [[next(found).logprob for _ in question.choices] for question in questions]

    def share(size) -> float:
        best = [
            int(
                np.argmax(
                    [
                        value / size(choice)
                        for value, choice in zip(row, question.choices, strict=True)
                    ]
                )
            )
            for row, question in zip(logprobs, questions, strict=True)
        ]
        return float(
            np.mean([got == question.answer for got, question in zip(best, questions, strict=True)])
        )

    return Accuracy(
        share(lambda _: 1), share(len), share(lambda choice: len(choice.encode())), logprobs
    )
