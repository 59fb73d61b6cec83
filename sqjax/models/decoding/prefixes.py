"""`prefix`: a few tokens before every text, whose keys and values are computed once, in float.

In many language models the first tokens of a text have activations that are hundreds of times
larger than all others. A scale that covers them leaves nothing for the rest. As a fixed prefix they
are never quantized, and no later token is like them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sqjax._arguments import expect
from sqjax._trees import check_finite, named_leaves
from sqjax.models.cache import PrefixCache
from sqjax.models.decoder import Block, CausalLM
from sqjax.models.decoding.prompts import check_tokens
from sqjax.models.fields import POSITIVE, SIZE, check
from sqjax.models.model import (
    Model,
    Params,
    TokenIds,
    check_ids,
    check_model,
    compute_dtype,
)
from sqjax.models.stacking import unstack_layers
from sqjax.weights.quant_weight import is_quantized

#: A token stands out if its largest activation is above so many times the median token's.
RATIO = 64.0
#: Of texts that are cut into pieces of so many tokens every piece's first token is looked at.
_PIECE = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """A few tokens that stand before every text, with their keys and values in float.

    `generate`, `perplexity` and `Model.apply` take it, and no token of it is read again. It belongs
    to one float tree: `fold`, `smooth` and `rotate` may change what keys and values must be, so for
    a changed tree make it again, of the float parameters, before these are quantized:

        smoothed = sq.fold(params, stats.graph, s)
        qparams = sq.quantize(smoothed, sq.fold_stats(stats, s), sq.W8A8_O3)
        sq.models.perplexity(model, qparams, windows, prefix=prefix.of(smoothed))

    Attributes:
        model: whose tokens they are.
        ids: the tokens, first to last.
        cache: their keys and values in every layer, which `Model.apply`, `decode` and `read` take.
    """

    model: Model = field(metadata={"static": True})
    ids: tuple[int, ...] = field(metadata={"static": True})
    cache: PrefixCache

    def of(self, params: Params) -> "Prefix":
        """The same tokens, with the keys and values that other float parameters give them.

        Raises:
            ValueError: a parameter is quantized already.
        """
        return _made(self.model, params, self.ids)

    def apply(
        self, params: Params, ids: TokenIds
    ) -> Float[Array, "batch tokens vocab"]:
        """The logits of ids that stand after the prefix: a function like `Model.apply`.

        It may be quantized, jitted and calibrated. Its keys and values are constants, so no scale
        of a value can be folded into what comes before: calibrate by `before` and `mask` for that.
        """
        return self.model.apply(params, ids, self.cache)

    def before(self, ids: TokenIds) -> Int[Array, "batch longer"]:
        """Ids with the prefix before every row: with the prefix (9, 8), [[1, 2]] is [[9, 8, 1, 2]].

        With `mask` they calibrate the model as it is when the prefix is in its cache:

            batches = [prefix.before(ids) for ids in batches]
            stats = sq.calibrate(model.apply, params, batches, mask=prefix.mask)
        """
        check_ids(ids)
        ids = jnp.asarray(ids)
        own = jnp.broadcast_to(
            jnp.asarray(self.ids, ids.dtype)[None], (len(ids), len(self.ids))
        )
        return jnp.concatenate([own, ids], axis=1)

    def mask(self, ids: TokenIds) -> Bool[Array, "batch longer"]:
        """Which tokens of what `before` gives are not the prefix's own."""
        is_text = np.arange(ids.shape[1]) >= len(self.ids)
        return jnp.broadcast_to(jnp.asarray(is_text)[None], ids.shape)


def prefix(
    model: Model,
    params: Params,
    batches: Iterable[Any] = (),
    *,
    ids: Sequence[int] | None = None,
    most: int = 4,
    ratio: float = RATIO,
) -> Prefix:
    """Chooses a prefix by its tokens' activations, and computes its keys and values in float.

    A token stands out if its largest activation is above `ratio` times that of the median token
    (`token_peaks`). The prefix has as many tokens as stand out in a text on average, rounded up:
    those that stand out most often after the first place, and last the token that opens a text (the
    tokenizer's; without one, that which stands out most often). Where the first token of a piece of
    the texts still stands out behind these, the most frequent tokens of the texts are put before
    them: in some models that token stands out behind a lone one, and not behind two that differ.

    Args:
        model: a `Model`.
        params: its float parameters.
        batches: token ids, (batch, tokens) each, as for `sqjax.calibrate`: texts as they come,
            without the prefix. Not needed with `ids`.
        ids: the tokens, where they are known.
        most: the largest number of tokens.
        ratio: from what on a token stands out.

    Raises:
        ValueError: no batches, no token that stands out, ids that are not in the vocabulary or as
            many as ``config.max_length``, parameters that are quantized or NaN, an encoder, or a
            model whose keys depend on how long a text becomes (LongRope).

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> prefix = sq.models.prefix(model, params, ids=[7, 5])
        >>> text = jnp.array([[1, 2, 3]])
        >>> whole = model.apply(params, prefix.before(text))  # 5 tokens
        >>> bool(jnp.allclose(prefix.apply(params, text), whole[:, 2:], atol=1e-5))
        True

    The choice is that of PrefixQuant (Chen et al. 2024, arXiv 2410.05265, section 4.1), which looks
    at the inputs of down_proj, where this one looks at what each block gives.

    Of a model whose theta grows with the text ("dynamic NTK") the prefix keeps the keys that it has
    alone, as a cache does that read it first.
    """
    check_model(model, "prefix")
    check("most", most, SIZE)
    check("ratio", ratio, POSITIVE)
    if model.config.keys_change_after is not None:
        raise ValueError(
            "prefix: expected a model whose keys stay as they are, got one with LongRope, whose "
            "keys depend on how long a text becomes; put the tokens into its texts"
        )
    if ids is None:
        _check_floats(params)
        texts = [_ids_of(batch) for batch in batches]
        ids = _chosen(model, params, texts, most, ratio)
        ids = _enough(model, params, texts, ids, most, ratio)
    return _made(model, params, check_prefix_ids(model, ids))


def token_peaks(
    model: Model,
    params: Params,
    ids: TokenIds,
    prefix: Prefix | None = None,
) -> Float[Array, "batch tokens"]:
    """How far each token's largest activation stands out: 1 for the median token.

    It is max|x| of what a block gives for the token, over the median of all tokens of the batch;
    and of all blocks the largest.

    Args:
        model: a `Model`.
        params: its float parameters.
        ids: texts.
        prefix: what stands before them; None for nothing.

    Raises:
        ValueError: what are no ids, quantized parameters, or a prefix of another model.

    Examples:
        >>> import jax, jax.numpy as jnp, sqjax as sq
        >>> model = sq.models.Model(sq.models.llama_config(32, 8, 16, 1, 2, 1, 4))
        >>> params = model.init(jax.random.key(0))
        >>> sq.models.token_peaks(model, params, jnp.array([[1, 2, 3]])).shape
        (1, 3)
    """
    check_model(model, "token_peaks")
    check_ids(ids)
    _check_floats(params)
    before = cache_of(model, prefix, "token_peaks")
    return _peaks(model, unstack_layers(params), jnp.asarray(ids), before)


def cache_of(model: Model, prefix: Any, what: str) -> PrefixCache | None:
    """The keys and values of a prefix, which must be this model's; None for None.

    Raises:
        ValueError: it is no `Prefix`, or another model's.
    """
    if prefix is None:
        return None
    expect(
        isinstance(prefix, Prefix),
        f"{what}: prefix=",
        "what sqjax.models.prefix returns",
        prefix,
    )
    # Whether the model keeps activations for a gradient says nothing of its keys and values.
    if prefix.model.config != model.config:
        raise ValueError(
            f"{what}: expected a prefix of this model, got another one's; make it with "
            "sqjax.models.prefix(model, params, ...)"
        )
    return prefix.cache


def _ids_of(batch: Any) -> Any:
    """The token ids of a batch: `calibrate` takes its inputs one by one, as tuples."""
    return batch[0] if isinstance(batch, tuple) else batch


def _enough(
    model: Model,
    params: Params,
    texts: list[Any],
    ids: list[int],
    most: int,
    ratio: float,
) -> list[int]:
    """A prefix with frequent tokens before it, as long as fewer texts then begin with a peak.

    Of texts of (2, 40) tokens the pieces are (4, 16): any token may be the first after a prefix.
    """
    pieces = [_pieces(np.asarray(text)) for text in texts]
    counts = Counter(token for piece in pieces for token in piece.flat)
    ordered = [int(token) for token, _ in counts.most_common()]
    frequent = [token for token in ordered if token not in ids]

    def peaks_behind(ids: list[int]) -> int:
        made = _made(model, params, check_prefix_ids(model, ids))
        of_pieces = (token_peaks(model, params, x, made) for x in pieces)
        return sum(int(jnp.sum(peaks[:, 0] > ratio)) for peaks in of_pieces)

    count = peaks_behind(ids)
    for token in frequent:
        if not count or len(ids) >= most:
            break
        longer = [token, *ids]
        fewer = peaks_behind(longer)
        # A token that stands out wherever it is does so behind any prefix.
        if fewer >= count:
            break
        ids, count = longer, fewer
    return ids


def _pieces(ids: np.ndarray) -> np.ndarray:
    """Texts cut into pieces of `_PIECE` tokens, without what is left over; shorter ones whole."""
    whole = ids.shape[1] // _PIECE * _PIECE
    return ids[:, :whole].reshape(-1, _PIECE) if whole else ids


class _Found(NamedTuple):
    """Which tokens stand out in some texts.

    Attributes:
        texts: how many these are.
        first, later: how often each token stood out in the first place, and after it.
    """

    texts: int
    first: Counter
    later: Counter


def _chosen(
    model: Model,
    params: Params,
    batches: Iterable[Any],
    most: int,
    ratio: float,
) -> list[int]:
    """The tokens of a prefix, by those that stand out in some texts."""
    found = _found(model, params, batches, ratio)
    everywhere = found.first + found.later
    if not everywhere:
        raise ValueError(
            f"prefix: expected tokens whose activations are above ratio = {ratio} times the median "
            "token's, got none: this model needs no prefix; give ids= to have one"
        )
    # As many tokens as stand out in a text, on average: so many places the model rests on.
    count = min(most, math.ceil(everywhere.total() / found.texts))
    opening = None
    if model.tokenizer is not None:
        begin, end = model.tokenizer.bos_id, model.tokenizer.eos_id
        # Models without a token that begins a text are trained on texts that follow an end.
        opening = end if begin is None else begin
    if opening is None:
        [(opening, _)] = everywhere.most_common(1)
    others = [token for token, _ in found.later.most_common()]
    frequent = [token for token in others if token != opening]
    # The opening token comes last, because what follows it is read as a text of its own.
    return [*frequent[: count - 1], opening]


def _found(
    model: Model, params: Params, batches: Iterable[Any], ratio: float
) -> _Found:
    """Which tokens stand out in batches of texts."""
    found = _Found(0, Counter(), Counter())
    for ids in batches:
        peaks = np.asarray(token_peaks(model, params, ids))
        if not np.all(np.isfinite(peaks)):
            raise ValueError(
                "prefix: the activations are NaN or infinite; check the parameters"
            )
        stands_out = peaks > ratio
        tokens = np.asarray(ids)
        found.first.update(tokens[:, :1][stands_out[:, :1]].tolist())
        found.later.update(tokens[:, 1:][stands_out[:, 1:]].tolist())
        found = found._replace(texts=found.texts + len(tokens))
    if found.texts == 0:
        raise ValueError(
            "prefix: expected batches of token ids to choose its tokens by, got none; give some, "
            "or the tokens themselves: ids="
        )
    return found


def check_prefix_ids(model: Model, ids: Any) -> tuple[int, ...]:
    """The tokens of a prefix, which the model knows and has room for."""
    check_tokens(model, ids, "prefix: ids")
    flat = np.asarray(ids)
    most = model.config.max_length
    if flat.ndim != 1 or not 0 < len(flat) < most:
        raise ValueError(
            f"prefix: ids: expected at least one token in a flat sequence, and less than {most} "
            f"(config.max_length), which leave room for a text, got ids of shape {flat.shape}"
        )
    return tuple(flat.tolist())


def _check_floats(params: Params) -> None:
    """Raises ValueError, naming the leaf, for a tree that is quantized already."""
    names, leaves, _ = named_leaves(params, is_leaf=is_quantized)
    for name, leaf in zip(names, leaves, strict=True):
        if is_quantized(leaf):
            raise ValueError(
                f"prefix: {name}: expected a float array, because the prefix stays float, got a "
                "quantized weight; give the parameters that sqjax.quantize was given"
            )


def _made(model: Model, params: Params, ids: tuple[int, ...]) -> Prefix:
    """The prefix of these tokens, for float parameters."""
    _check_floats(params)
    check_finite(params, "parameter")
    return Prefix(model, ids, _computed(model, params, ids))


@partial(jax.jit, static_argnames=("model", "ids"))
def _computed(
    model: Model, params: Params, ids: tuple[int, ...]
) -> PrefixCache:
    """The keys and values of some tokens, as a float cache holds them after these."""
    empty = model.init_cache(1, len(ids), compute_dtype(params))
    _, cache = model.decode(params, jnp.asarray([ids], jnp.int32), empty)
    keys = tuple(slots.codes[0] for slots in cache.keys)
    values = tuple(slots.codes[0] for slots in cache.values)
    return PrefixCache(keys, values)


@partial(jax.jit, static_argnames="model")
def _peaks(
    model: Model, params: Params, ids: Array, before: PrefixCache | None
) -> Float[Array, "batch tokens"]:
    """`token_peaks` of parameters whose layers are apart, which flax captures by name."""
    _, seen = CausalLM(model.config).apply(
        {"params": params},
        ids,
        prefix=before,
        capture_intermediates=lambda module, _: isinstance(module, Block),
        mutable=["intermediates"],
    )
    outstanding = []
    for layer in seen["intermediates"]["model"]["layers"].values():
        # Flax keeps what each call gave: of one call (x, cache).
        [(x, _)] = layer["__call__"]
        largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
        outstanding.append(largest / jnp.median(largest))
    return jnp.max(jnp.stack(outstanding), axis=0)
