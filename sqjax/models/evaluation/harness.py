"""A model as lm-evaluation-harness takes it; `lm-eval` is imported only when it is asked for."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from sqjax.models.decoding.generation import generate
from sqjax.models.evaluation.scoring import Pair, encode_pair, loglikelihoods
from sqjax.models.model import Model, Params
from sqjax.models.slots import CacheFormat

#: How many new tokens a request gets that does not say how many.
NEW_TOKENS = 256


def harness_model(
    model: Model,
    params: Params,
    *,
    cache: str | CacheFormat | None = None,
    batch: int = 8,
) -> Any:
    """An `lm_eval.api.model.LM` that runs a model.

        lm = sqjax.models.harness_model(model, qparams, cache="int8")
        lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

    Args:
        model: a `Model` with a tokenizer.
        params: its parameters, float or quantized.
        cache: None, or the format of the cache through which everything is read.
        batch: how many requests are read at once.

    Raises:
        ImportError: `lm-eval` is not installed.
        ValueError: the model has no tokenizer, or it names no end of text.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError(
            "harness_model needs lm-evaluation-harness: pip install sqjax[eval]"
        ) from error
    if model.tokenizer is None or model.tokenizer.eos_id is None:
        raise ValueError(
            "harness_model: expected a model whose tokenizer names the end of a text, got none"
        )
    # The class is made here, because its base can be imported only where lm-eval is installed.
    adapter_class: Any = type(
        "SqjaxLM", (_Requests, LM), {"__doc__": harness_model.__doc__}
    )
    adapter = adapter_class()
    adapter.model = model
    adapter.params = params
    adapter.kind = cache
    adapter.batch = batch
    return adapter


class _Requests:
    """What the harness asks of a model; each request's `args` hold texts."""

    model: Any
    params: Any
    kind: Any
    batch: int

    def loglikelihood(
        self, requests: Sequence[Any]
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each (context, continuation), and whether it is the greedy one."""
        pairs: list[Pair] = [
            encode_pair(self.model, *request.args) for request in requests
        ]
        return list(map(tuple, self._score(pairs)))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each whole text.

        It follows an end of text, or what the tokenizer puts before every text.
        """
        all_pairs: list[Pair] = []
        counts = []  # how many pairs each text gives
        for request in requests:
            begin, ids = encode_pair(self.model, "", request.args[0])
            if not ids:
                raise ValueError(
                    f"loglikelihood_rolling: expected a text of at least one token, got "
                    f"{request.args[0]!r}"
                )
            pairs = rolling_pairs(ids, begin[-1], self.model.config.max_length)
            all_pairs += pairs
            counts.append(len(pairs))
        logprobs = list(map(attrgetter("logprob"), self._score(all_pairs)))
        totals = []
        for count in counts:
            totals.append(float(sum(logprobs[:count])))
            logprobs = logprobs[count:]
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A continuation of each (context, settings), up to the first of the settings' `until`."""
        return [self._generate(*request.args) for request in requests]

    def _score(self, pairs: list[Pair]):
        return loglikelihoods(
            self.model, self.params, pairs, cache=self.kind, batch=self.batch
        )

    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        """The continuation of one context, ended by any text of `until`."""
        until = settings.get("until") or []
        if isinstance(until, str):
            until = [until]
        # "" ends nothing, as in the harness's own models.
        until = list(filter(None, until))
        steps = int(settings.get("max_gen_toks", NEW_TOKENS))
        ids = _fitting(self.model, context, steps)
        new: list[int] = []

        def text_ends(_: int, tokens: list[int]) -> bool:
            new.extend(tokens)
            text = self.model.tokenizer.decode(new)
            return any(map(text.__contains__, until))

        generate(
            self.model,
            self.params,
            [ids],
            steps,
            cache="float" if self.kind is None else self.kind,
            chunk=64,  # contexts whose lengths round up to the same multiple share one program
            stream=text_ends,
            stream_every=8,
            **_sampling(settings),
        )
        return cut(self.model.tokenizer.decode(new), until)


def _fitting(model: Model, context: str, steps: int) -> list[int]:
    """The last tokens of a context, as many as leave room for new ones."""
    room = model.config.max_length - steps
    if room < 1:
        raise ValueError(
            f"generate_until: expected max_gen_toks below {model.config.max_length}, got {steps}"
        )
    before, after = encode_pair(model, context, "")
    return [*before, *after][-room:]


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A request's settings as arguments of `generate`; greedy unless it says do_sample."""
    if not settings.get("do_sample", False):
        return {}
    sampling = {"temperature": float(settings.get("temperature", 1.0))}
    for name in ("top_k", "top_p"):
        if settings.get(name):
            sampling[name] = settings[name]
    return sampling


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first occurrence of any of `until`, or all of it."""
    # What comes before an `end` that is not there is the whole text.
    before = [text.partition(end)[0] for end in until]
    return min(before, key=len, default=text)


def rolling_pairs(ids: Sequence[int], begin: int, length: int) -> list[Pair]:
    """A text as (context, continuation) pairs of at most `length` inputs; each token is asked once.

    The first `length` tokens follow `begin`. Every later pair has before its continuation as many
    tokens of the text as fit.

    Examples:
        >>> from sqjax.models.evaluation.harness import rolling_pairs
        >>> rolling_pairs([0, 1, 2, 3, 4, 5], begin=9, length=4)
        [([9], [0, 1, 2, 3]), ([1, 2, 3], [4, 5])]
    """
    ids = list(ids)
    pairs: list[Pair] = [([begin], ids[:length])] if ids else []
    for first in range(length, len(ids), length):
        last = min(first + length, len(ids))
        pairs.append((ids[last - length - 1 : first], ids[first:last]))
    return pairs
