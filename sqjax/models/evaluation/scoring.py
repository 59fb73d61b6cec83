"""How likely a model finds given tokens: log-likelihoods, and multiple choice by them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sqjax._shapes import entries_at
from sqjax.models.cache import PrefixCache
from sqjax.models.decoding.prefixes import Prefix, cache_of
from sqjax.models.decoding.prompts import (
    check_tokens,
    encode_alone,
    encode_open,
)
from sqjax.models.fields import SIZE, is_whole
from sqjax.models.model import Model, Params, check_model, compute_dtype
from sqjax.models.slots import CacheFormat, cache_format
from sqjax.models.stacking import unstack_layers
from sqjax.models.tokenizer import check_text
from sqjax.runtime.quantized import quantized

#: Sequences are padded to a multiple of so many tokens, so that few shapes are compiled.
MULTIPLE = 64

#: The ids of a context and of the continuation whose likelihood is asked for.
Pair = tuple[Sequence[int], Sequence[int]]


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        logprob: the sum of its tokens' log-probabilities.
        greedy: whether each of its tokens is the likeliest after those before it.
    """

    logprob: float
    greedy: bool


class Question(NamedTuple):
    """A text and how it may go on.

    Attributes:
        context: the text.
        choices: the texts that may follow.
        answer: the number of the right one among the choices, from 0.
    """

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
    prefix: PrefixCache | None = None,
) -> tuple[Float[Array, "batch tokens"], Bool[Array, "batch tokens"]]:
    """The log-probability of each target, and whether no other token is likelier.

    A target at position i is predicted from the inputs 0 to i.

    Args:
        model: a `Model`.
        params: its parameters, float or quantized.
        inputs: token ids.
        targets: the token that follows each.
        cache: None to read the inputs as they are; otherwise every key and value is read from a
            cache of this format, as in decoding ("teacher forcing").
        chunk: with a cache, how many tokens are written and read at once; it must divide their
            number. What is computed does not depend on it but for rounding, unless the format has
            scales of channels. None for all.
        padding: with a cache, how many of each row's first inputs are padding, to which no token
            attends. None for none.
        prefix: the keys and values of tokens that stand before every row; None for none.

    Raises:
        ValueError: the chunk does not divide the number of tokens, these are more than
            ``config.max_length``, or there is a chunk or padding but no cache.
    """
    if cache is None:
        if chunk is not None or padding is not None:
            raise ValueError(
                "next_logprobs: a chunk and padding need a cache; "
                'give one ("float"), or leave them out'
            )
        logits = quantized(model.apply)(params, inputs, prefix)
        return _score_targets(logits, targets)
    batch, tokens = inputs.shape
    size = tokens if chunk is None else chunk
    if size < 1 or tokens % size:
        raise ValueError(
            f"next_logprobs: expected a chunk that divides {tokens} tokens, got {size}"
        )
    slots = model.init_cache(batch, tokens, compute_dtype(params), cache, size)
    if padding is not None:
        slots = slots._replace(padding=jnp.asarray(padding, jnp.int32))
    read = quantized(model.read)
    params = unstack_layers(params)

    def read_piece(slots, piece):
        piece_inputs, piece_targets = piece
        logits, slots = read(params, piece_inputs, slots, prefix)
        return slots, _score_targets(logits, piece_targets)

    def split(x):
        # (batch, tokens) -> (pieces, batch, size), because a scan runs over the first axis.
        return x.reshape(batch, -1, size).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, tokens)

    pieces = split(inputs), split(targets)
    _, (logprobs, is_likeliest) = jax.lax.scan(read_piece, slots, pieces)
    return join(logprobs), join(is_likeliest)


def _score_targets(logits: Array, targets: Array) -> tuple[Array, Array]:
    """The log-probability of each target, and whether no logit is larger than its own."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return logprobs, chosen >= jnp.max(logits, axis=-1)


def loglikelihoods(
    model: Model,
    params: Params,
    pairs: Sequence[Pair],
    *,
    cache: str | CacheFormat | None = None,
    batch: int = 8,
    prefix: Prefix | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    A context that is too long loses its first tokens. Sequences of about one length are read
    together, which changes nothing but the rounding of sums, unless a scheme gives all activations
    one scale ("per_tensor").

    Args:
        model: a `Model`.
        params: its parameters, float or quantized.
        pairs: (context ids, continuation ids), of at least one token each.
        cache: None, or the format of the cache through which everything is read, as in
            `next_logprobs`.
        batch: how many sequences are read at once.
        prefix: what `sqjax.models.prefix` made for the float form of these parameters: tokens that
            stand before every context, and leave it so much less room.

    Raises:
        ValueError: ids that are not in the vocabulary, an empty context, a continuation that is
            empty (its likelihood of 1 would say nothing) or longer than ``config.max_length``, a
            batch of less than 1, or logits that are NaN.

    Examples:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, loglikelihoods
        >>> model = Model(LlamaConfig(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> [one] = loglikelihoods(model, params, [([1, 2], [3, 4])])
        >>> one.logprob < 0
        True
    """
    check_model(model, "loglikelihoods")
    if not SIZE.holds(batch):
        raise ValueError(
            f"loglikelihoods: expected a batch of at least 1, got {batch}"
        )
    kind = None if cache is None else cache_format(cache)
    before = cache_of(model, prefix, "loglikelihoods")
    most = _room(model, before)
    asked = [
        _asked(model, number, pair, most) for number, pair in enumerate(pairs)
    ]
    likelihoods: dict[int, Likelihood] = {}
    for numbers in _batches([len(sequence) for sequence, _ in asked], batch):
        together = [asked[number][0] for number in numbers]
        logprobs, is_likeliest, padding = _read(
            model, params, together, batch, kind, before
        )
        for row, number in enumerate(numbers):
            # The token at position i of a sequence is the target at i - 1.
            sequence, count = asked[number]
            end = int(padding[row]) + len(sequence) - 1
            span = slice(end - count, end)
            likelihoods[number] = _likelihood(
                number, logprobs[row, span], is_likeliest[row, span]
            )
    return list(entries_at(likelihoods, range(len(asked))))


def _read(
    model: Model,
    params: Params,
    together: list[list[int]],
    batch: int,
    kind: CacheFormat | None,
    before: PrefixCache | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `next_logprobs` says of some sequences, and how many zeros stand before each."""
    is_cached = kind is not None
    ids, padding = _batch(together, batch, _room(model, before), is_cached)
    scored = next_logprobs(
        model,
        params,
        ids[:, :-1],
        ids[:, 1:],
        kind,
        padding=padding if is_cached else None,
        prefix=before,
    )
    logprobs, is_likeliest = map(np.asarray, scored)
    return logprobs, is_likeliest, padding


def _likelihood(
    number: int, logprobs: np.ndarray, is_likeliest: np.ndarray
) -> Likelihood:
    """The likelihood of the tokens that a pair asks for."""
    total = float(logprobs.sum(dtype=np.float64))
    if np.isnan(total):
        raise ValueError(
            f"pairs[{number}]: the logits are NaN; check the parameters and their scales"
        )
    return Likelihood(total, bool(is_likeliest.all()))


def _room(model: Model, before: PrefixCache | None) -> int:
    """How many tokens the model reads at once, after a prefix."""
    taken = 0 if before is None else before.tokens
    return model.config.max_length - taken


def _asked(
    model: Model, number: int, pair: Pair, most: int
) -> tuple[list[int], int]:
    """(context and continuation in one, how many tokens at its end are asked for).

    It is shortened on the left to one token more than the `most` that the model reads at once,
    because the last one is a target only.
    """
    where = f"pairs[{number}]"
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(
            f"{where}: expected (context ids, continuation ids), got {pair!r}"
        )
    context, continuation = pair
    for name, ids in (("context", context), ("continuation", continuation)):
        if np.ndim(ids) != 1:
            raise ValueError(
                f"{where}, {name}: expected a flat sequence of token ids, got {ids!r}"
            )
        check_tokens(model, ids, f"{where}, {name}")
    if len(context) < 1 or not 1 <= len(continuation) <= most:
        raise ValueError(
            f"{where}: expected a context of at least one token and a continuation of at "
            f"least one and at most {most} (config.max_length), got {len(context)} and "
            f"{len(continuation)}; a prefix takes room, and a text that merges into the token "
            "before it leaves none"
        )
    sequence = [*context, *continuation][-(most + 1) :]
    return sequence, len(continuation)


def _batch(
    rows: list[list[int]], size: int, most: int, cached: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as one array of `size` rows, and how many zeros stand before each.

    Zeros after a sequence change nothing that it is asked for. Through a cache they stand before
    it, as padding, because a format with scales of channels would make these from the zeros too.
    For example the rows [5, 6, 7] and [8] become, if the array is 4 wide, [[5, 6, 7, 0],
    [8, 0, 0, 0]] without a cache and [[0, 5, 6, 7], [0, 0, 0, 8]] with one.
    """
    longest = max(map(len, rows))
    inputs = max(
        1, longest - 1
    )  # the last token of a sequence is a target only
    width = min(-(-inputs // MULTIPLE) * MULTIPLE, most)
    ids = np.zeros((size, width + 1), np.int32)
    padding = np.zeros(size, np.int32)
    for number, row in enumerate(rows):
        first = width + 1 - len(row) if cached else 0
        padding[number] = first
        ids[number, first : first + len(row)] = row
    return ids, padding


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Numbers of sequences, `size` at a time, longest first: a batch is of about one length."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[first : first + size] for first in range(0, len(order), size)]


def encode_pair(
    model: Model, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """A context and its continuation as ids, as lm-evaluation-harness does it.

    Both are encoded as one text; the continuation's ids are those after as many as the context
    alone has. Spaces that end the context count as the continuation's. An empty context is replaced
    by the tokenizer's opening token, or else by its end of text.

    Raises:
        ValueError: the model has no tokenizer, or it names no end of text for an empty context.
    """
    if model.tokenizer is None:
        raise ValueError(
            "scoring texts: the model has no tokenizer; call loglikelihoods with token ids"
        )
    check_text(context, "scoring texts, context")
    check_text(continuation, "scoring texts, continuation")
    if context == "":
        end = model.tokenizer.eos_id
        begin = encode_open(model.tokenizer, "") or (
            [] if end is None else [end]
        )
        if not begin:
            raise ValueError(
                "scoring texts: the context is empty, and the tokenizer names no end of text to "
                "put in its place; give a context"
            )
        return begin, encode_alone(model.tokenizer, continuation)
    kept = context.rstrip()
    # A text that goes on has no token of its end.
    together = encode_open(model.tokenizer, context + continuation)
    before = encode_open(model.tokenizer, kept)
    return before, together[len(before) :]


def multiple_choice(
    model: Model,
    params: Params,
    questions: Sequence[Question],
    *,
    cache: str | CacheFormat | None = None,
    batch: int = 8,
    prefix: Prefix | None = None,
) -> Accuracy:
    """Answers questions by the log-likelihood of their choices.

    Other arguments and errors are as in `loglikelihoods`. A choice follows its context as it is. A
    space between the two counts as a character of the choice only if the choice begins with it:
    lm-evaluation-harness puts one there and does not count it.

    Raises:
        ValueError: also for no questions, a question of fewer than two choices, an empty choice, or
            an answer that is not among them; a choice that merges into its context.
    """
    check_model(model, "multiple_choice")
    questions = list(questions)
    for number, question in enumerate(questions):
        _check_question(number, question)
    if not questions:
        raise ValueError("questions: expected at least one, got none")
    pairs = []
    for number, question in enumerate(questions):
        for choice in question.choices:
            pair = encode_pair(model, question.context, choice)
            _check_scored(number, choice, pair)
            pairs.append(pair)
    likelihoods = iter(
        loglikelihoods(
            model, params, pairs, cache=cache, batch=batch, prefix=prefix
        )
    )
    logprobs = [
        [next(likelihoods).logprob for _ in question.choices]
        for question in questions
    ]
    return Accuracy(
        acc=_share_right(questions, logprobs, lambda choice: 1),
        acc_norm=_share_right(questions, logprobs, len),
        acc_bytes=_share_right(
            questions, logprobs, lambda choice: len(choice.encode())
        ),
        logprobs=logprobs,
    )


def _check_scored(
    number: int, choice: str, pair: tuple[list[int], list[int]]
) -> None:
    """Raises ValueError for a choice of which no token is left to be scored."""
    _, continuation = pair
    if not continuation:
        raise ValueError(
            f"questions[{number}]: the choice {choice!r} merges into the last token of its "
            "context, so that no token is left to be scored; let the choice begin with a whole "
            "word (the end of the context moved into every choice)"
        )


def _check_question(number: int, question: Question) -> None:
    """Raises ValueError for a question that can not be answered."""
    where = f"questions[{number}]"
    if not isinstance(question, Question):
        raise ValueError(
            f"{where}: expected a Question(context, choices, answer), got {question!r}"
        )
    context, choices, answer = question
    # A text is a sequence of texts too: each of its letters would be a choice.
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise ValueError(
            f"{where}: expected several texts as choices, got {choices!r}"
        )
    check_text(context, f"{where}, context")
    for choice in choices:
        check_text(choice, f"{where}, choices")
    is_among = is_whole(answer) and answer in range(len(choices))
    if len(choices) < 2 or not all(choices) or not is_among:
        raise ValueError(
            f"{where}: expected at least two choices, none of them empty, and the "
            f"number of the right one, got {len(choices)} choices {list(choices)} and answer "
            f"{answer}"
        )


def _share_right(
    questions: Sequence[Question],
    logprobs: Sequence[Sequence[float]],
    size_of: Callable[[str], int],
) -> float:
    """The share of questions whose right choice has the largest log-likelihood for its size."""
    is_right = []
    for question, of_choices in zip(questions, logprobs, strict=True):
        sizes = list(map(size_of, question.choices))
        values = [
            logprob / size
            for logprob, size in zip(of_choices, sizes, strict=True)
        ]
        is_right.append(int(np.argmax(values)) == question.answer)
    return float(np.mean(is_right))
