"""Text generation as one compiled program: a prefill in chunks, then a loop of one-token steps."""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sqjax.models.cache import KVCache, PrefixCache
from sqjax.models.decoding.prefixes import Prefix, cache_of
from sqjax.models.decoding.prompts import (
    Prompts,
    pad_left,
    prompt_rows,
    stop_ids,
)
from sqjax.models.decoding.sampling import (
    Sampling,
    likeliest,
    row_keys,
    sample,
)
from sqjax.models.decoding.sizes import program_sizes, share_a_scale
from sqjax.models.model import (
    Model,
    Params,
    TokenIds,
    cache_for,
    check_model,
    compute_dtype,
)
from sqjax.models.slots import CacheFormat, cache_format
from sqjax.models.stacking import unstack_layers
from sqjax.runtime.quantized import quantized

#: Called with a row's number and its new tokens; what is true ends that row.
Stream = Callable[[int, list[int]], object]


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: the new tokens of each row, the one that ended it included.
        stopped: for each row, whether a stop token (or the callback) ended it, rather than the
            number of steps.
        texts: the tokens as texts; None for a model without a tokenizer.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    texts: list[str] | None


class _State(NamedTuple):
    """The loop's carry: `token` is each row's latest, found but not yet read."""

    cache: KVCache
    token: Int[Array, " batch"]
    keys: Key[Array, " batch"]
    out: Int[Array, "batch steps"]
    counts: Int[Array, " batch"]
    stopped: Bool[Array, " batch"]
    finite: Bool[Array, " batch"]
    step: Int[Array, ""]


def generate(
    model: Model,
    params: Params,
    prompts: Prompts,
    steps: int,
    *,
    stop: SupportsIndex | str | Sequence[SupportsIndex | str] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: SupportsIndex | Sequence[int] = 0,
    cache: str | CacheFormat = "float",
    chunk: int | None = None,
    stream: Stream | None = None,
    stream_every: int = 1,
    prefix: Prefix | None = None,
) -> Generated:
    """Continues prompts by up to `steps` tokens each.

    The prefill is one compiled program and all steps are another, a loop that ends when every row
    has met a stop token. Both are compiled once for each model, batch size, `cache`, `chunk`,
    length of the prompts and number of steps, where lengths and steps are rounded up to a multiple
    of 64 (up to ``config.max_length``). Other sampling settings, and as many other stop tokens,
    compile nothing anew.

    Prompts are padded on the left to one rounded length, and no token attends to padding. So a
    batch gives what its rows give one by one, but for the rounding of sums, for schemes that give
    all activations one scale ("per_tensor": their prompts are padded to the longest one only), and
    for caches whose keys' channels are those of the first chunk.

    Args:
        model: a `Model`.
        params: its parameters, float or quantized in any scheme. Layers in one stack are taken
            apart before the loop, so that there are two copies of them until the call returns: see
            `unstack_layers`.
        prompts: a text, a sequence of token ids, or several of either.
        steps: the largest number of new tokens.
        stop: ids or texts of the tokens that end a row; None for the tokenizer's end of text, ()
            for none.
        temperature: 0 for the likeliest token every time; otherwise the logits are divided by it
            and a token is drawn.
        top_k: draw among the so many likeliest tokens only.
        top_p: of those, draw among the fewest likeliest whose probabilities sum to at least this.
        seed: of the draws. An int seeds all rows (row r with its own stream); a sequence seeds each
            row, so that a row draws the same tokens in any batch.
        cache: how keys and values are stored: "float", "int8", "e4m3", "int4" or a `CacheFormat`.
        chunk: read the prompts in pieces of so many tokens, which bounds the prefill's memory;
            None, or more than the prompts have, for all at once. Prompts whose lengths round up to
            the same multiple of it share one compiled program.
        stream: called as stream(row, tokens) with the new tokens of each row as they come. If it
            returns something true the row ends there.
        stream_every: the loop is left so often, in steps, to call `stream`.
        prefix: what `sqjax.models.prefix` made for the float form of these parameters: tokens that
            stand before every prompt and are not read again.

    Raises:
        ValueError: prompts or stop tokens that are not in the vocabulary, an empty prompt, more
            tokens than ``config.max_length``, settings that make no sense, or logits that are NaN
            or infinite.

    Examples:
        >>> import jax
        >>> from sqjax.models import LlamaConfig, Model, generate
        >>> model = Model(LlamaConfig(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> generated = generate(model, params, [[1, 2, 3], [4]], steps=5, cache="int8")
        >>> [len(row) for row in generated.tokens]
        [5, 5]
    """
    check_model(model, "generate")
    counts = {"top_k": top_k, "chunk": chunk}
    given = {name: n for name, n in counts.items() if n is not None}
    check_counts("generate", steps=steps, stream_every=stream_every, **given)
    rows = prompt_rows(model, prompts)
    ends = stop_ids(model, stop)
    how = _sampling(model, temperature, top_k, top_p)
    before = cache_of(model, prefix, "generate")
    _check_length(model, rows, steps, before)
    _check_stream(stream)
    kind = cache_format(cache)
    keys = row_keys(seed, len(rows))
    params = unstack_layers(params)
    sizes = program_sizes(
        max(map(len, rows)),
        steps,
        chunk,
        model.config.max_length,
        exact=share_a_scale(params),
    )
    ids, padding = pad_left(rows, sizes.tokens)
    state = _prefill(
        model,
        params,
        ids,
        padding,
        keys,
        how,
        ends,
        sizes.chunk,
        sizes.room,
        kind,
        before,
    )
    state = _continue(
        model, params, state, how, ends, stream, stream_every, steps, before
    )
    tokens = _new_tokens(state, np.zeros(len(rows), int))
    _check_finite(state)
    texts = (
        None
        if model.tokenizer is None
        else [model.tokenizer.decode(row) for row in tokens]
    )
    return Generated(tokens, np.asarray(state.stopped).tolist(), texts)


def _continue(
    model: Model,
    params: Params,
    state: _State,
    how: Sampling | None,
    ends: np.ndarray,
    stream: Stream | None,
    every: int,
    steps: int,
    before: PrefixCache | None,
) -> _State:
    """The loop; for a callback in pieces of `every` steps, after each of which it is told tokens.

    Every piece is the same compiled program, which is given the state and may reuse its memory,
    so that the cache is not copied.
    """
    if stream is None:
        until = jnp.int32(steps)
        return _advance(model, params, state, how, ends, until, before)
    told = np.zeros(len(state.out), int)
    while True:
        new_tokens = _new_tokens(state, told)
        told = np.array(state.counts)
        ended = []
        for row, tokens in enumerate(new_tokens):
            if tokens and stream(row, tokens):
                ended.append(row)
        if ended:
            stopped = state.stopped.at[jnp.asarray(ended)].set(True)
            state = state._replace(stopped=stopped)
        if int(state.step) >= steps or np.all(state.stopped):
            return state
        until = jnp.minimum(state.step + jnp.int32(every), jnp.int32(steps))
        state = _advance(model, params, state, how, ends, until, before)


def _new_tokens(state: _State, told: np.ndarray) -> list[list[int]]:
    """The tokens of each row that come after the first `told` of them."""
    counts = np.asarray(state.counts)
    new_tokens = []
    for row, first, last in zip(
        np.asarray(state.out), told, counts, strict=True
    ):
        new_tokens.append(row[first:last].tolist())
    return new_tokens


def _check_finite(state: _State) -> None:
    """Raises ValueError if a row met logits that are NaN or infinite."""
    finite = np.asarray(state.finite)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"generate: the logits of row {row} are NaN or infinite after "
            f"{int(state.counts[row])} new tokens; check the parameters and their scales"
        )


def check_counts(where: str, **counts: Any) -> None:
    """Raises ValueError, naming `where`, unless each of these is a whole number of at least 1."""
    for name, count in counts.items():
        is_number = hasattr(count, "__index__") and not isinstance(count, bool)
        if not is_number or operator.index(count) < 1:
            raise ValueError(
                f"{where}: expected {name} to be a whole number of at least 1, got {count!r}"
            )


def check_number(name: str, x: Any) -> None:
    """Raises ValueError unless this is one number."""
    if np.ndim(x) or np.asarray(x).dtype.kind not in "iuf":
        raise ValueError(f"generate: expected {name} to be a number, got {x!r}")


def _sampling(
    model: Model, temperature: float, top_k: int | None, top_p: float | None
) -> Sampling | None:
    """How tokens are drawn; None for greedy decoding."""
    check_number("temperature", temperature)
    if top_p is not None:
        check_number("top_p", top_p)
    if temperature < 0 or not np.isfinite(temperature):
        raise ValueError(
            f"generate: expected a temperature of at least 0, got {temperature}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"generate: expected top_p above 0 and at most 1, got {top_p}"
        )
    if temperature == 0:
        return None
    vocabulary = model.config.vocab_size
    kept = vocabulary if top_k is None else min(top_k, vocabulary)
    share = 1.0 if top_p is None else top_p
    return Sampling(
        jnp.float32(temperature), jnp.int32(kept), jnp.float32(share)
    )


def _check_length(
    model: Model,
    rows: list[np.ndarray],
    steps: int,
    before: PrefixCache | None,
) -> None:
    """Raises ValueError if the longest prompt and its new tokens are more than the model takes."""
    longest = max(map(len, rows))
    if before is not None:
        longest += before.tokens
    most = model.config.max_length
    if longest + steps > most:
        raise ValueError(
            f"generate: expected prompt and new tokens to be at most {most} (config.max_length), "
            f"got {longest} + {steps}; shorten the prompt or take fewer steps"
        )
    change = model.config.keys_change_after
    # The last new token is never read.
    if change is not None and longest <= change < longest + steps - 1:
        raise ValueError(
            f"generate: expected prompt and new tokens on one side of {change} tokens, where this "
            f"model's keys change (LongRope), got {longest} + {steps}; take at most "
            f"{change - longest + 1} steps, then go on with all tokens as the prompt"
        )


def _check_stream(stream: Any) -> None:
    """Raises ValueError if this is neither None nor a function."""
    if stream is not None and not callable(stream):
        raise ValueError(
            f"generate: expected stream to be a function, got {stream!r}"
        )


@partial(jax.jit, static_argnames=("model", "chunk", "steps", "kind"))
def _prefill(
    model,
    params,
    ids,
    padding,
    keys,
    how,
    ends,
    chunk: int,
    steps: int,
    kind: CacheFormat,
    before: PrefixCache | None,
) -> _State:
    """Reads the prompts, chunk by chunk, and finds the first new token of each.

    Three of its arguments: `ids` (batch, tokens), where `chunk` divides the tokens; `padding`, how
    many of each row's first tokens are none; `ends`, the ids of the stop tokens.
    """
    batch, tokens = ids.shape
    # Padding takes slots of the cache though it takes no positions, so there may be more slots than
    # the model's length. The last new token needs none, because it is never read.
    cache = cache_for(
        model.config,
        batch,
        tokens + steps - 1,
        compute_dtype(params),
        kind,
        chunk,
    )
    cache = cache._replace(padding=jnp.asarray(padding))
    decode = quantized(model.decode)

    def read(cache, piece):
        logits, cache = decode(params, piece, cache, before)
        return cache, logits

    if tokens == chunk:
        cache, logits = read(cache, ids)
    else:
        # (batch, pieces * chunk) -> (pieces, batch, chunk): a scan runs over the first axis.
        pieces = jnp.asarray(ids).reshape(batch, -1, chunk).swapaxes(0, 1)
        cache, logits_of_pieces = jax.lax.scan(read, cache, pieces)
        logits = logits_of_pieces[-1]
    zeros = jnp.zeros((batch,), jnp.int32)
    no_row = jnp.zeros((batch,), bool)
    state = _State(
        cache=cache,
        token=zeros,
        keys=keys,
        out=jnp.zeros((batch, steps), jnp.int32),
        counts=zeros,
        stopped=no_row,
        finite=~no_row,
        step=jnp.int32(0),
    )
    return _choose(state, logits, how, ends)


def _choose(
    state: _State,
    logits: Float[Array, "batch vocab"],
    how: Sampling | None,
    ends: Array,
) -> _State:
    """The state with the next token of each unfinished row.

    A row ends with one of `ends`, which is still counted, or at logits that are not finite, which
    give it no token.
    """
    # The largest logit is NaN or infinite where any is NaN or +inf; -inf alone is no fault.
    row_is_finite = jnp.isfinite(jnp.max(logits, axis=-1))
    finite = state.finite & (state.stopped | row_is_finite)
    if how is None:
        token = likeliest(logits)
    else:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(
            state.keys, state.step
        )
        token = sample(logits, how, step_keys)
    over = state.stopped | ~finite
    token = jnp.where(over, 0, token)
    is_end = jnp.any(token[:, None] == ends[None, :], axis=1)
    column = token[:, None]
    return state._replace(
        token=token,
        out=jax.lax.dynamic_update_slice_in_dim(
            state.out, column, state.step, axis=1
        ),
        counts=state.counts + (~over).astype(jnp.int32),
        stopped=over | is_end,
        finite=finite,
        step=state.step + 1,
    )


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def _advance(
    model,
    params,
    state: _State,
    how: Sampling | None,
    ends,
    until,
    before: PrefixCache | None,
) -> _State:
    """Steps until there are `until` (or as many as there is room for), or every row has ended."""
    decode = quantized(model.decode)
    last = jnp.minimum(until, state.out.shape[1])

    def unfinished(state: _State):
        return (state.step < last) & ~jnp.all(state.stopped)

    def step(state: _State) -> _State:
        read = params, state.token[:, None], state.cache, before
        logits, cache = decode(*read)
        return _choose(state._replace(cache=cache), logits, how, ends)

    return jax.lax.while_loop(unfinished, step, state)


@partial(jax.jit, static_argnames=("model", "steps", "cache"))
def greedy(
    model: Model,
    params: Params,
    prompt_ids: TokenIds,
    steps: int,
    cache: str | CacheFormat = "float",
    prefix: Prefix | None = None,
) -> Int[Array, "batch steps"]:
    """The ``steps`` tokens that follow each prompt when the likeliest token is taken every time.

    A pure function on arrays, compiled once for each model, number of steps and shape of the
    prompt; `generate` does more. It does not stop at the end of a text: drop what follows
    ``model.tokenizer.eos_id`` in the answer.

    Args:
        model: a `Model`.
        params: its parameters, float or quantized by `sqjax.quantize`; a stack of layers is taken
            apart as in `generate`.
        prompt_ids: prompts of one length, without padding.
        steps: how many tokens to generate.
        cache: how keys and values are stored, as in `generate`.
        prefix: as in `generate`.

    Raises:
        ValueError: if the prompt is empty, ``steps`` is less than 1, or both together are more than
            ``config.max_length``, with a prefix together with its tokens.
    """
    check_model(model, "greedy")
    before = cache_of(model, prefix, "greedy")
    batch, tokens = prompt_ids.shape
    if tokens < 1 or steps < 1:
        raise ValueError(
            f"greedy: expected at least one prompt token and one step, got {tokens} tokens and "
            f"{steps} steps"
        )
    decode = quantized(model.decode)
    params = unstack_layers(params)
    slots = model.init_cache(
        batch, tokens + steps, compute_dtype(params), cache, chunk=tokens
    )
    logits, slots = decode(params, prompt_ids, slots, before)

    def step(carry, _):
        token, slots = carry
        logits, slots = decode(params, token[:, None], slots, before)
        return (likeliest(logits), slots), token

    first = likeliest(logits)
    (last, _), earlier = jax.lax.scan(step, (first, slots), length=steps - 1)
    return jnp.concatenate([earlier.T, last[:, None]], axis=1)
