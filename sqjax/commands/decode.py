"""`sqjax bench decode`: what a quantized cache costs a model in accuracy, and gains in speed."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sqjax.commands.cells import text
from sqjax.commands.defaults import ALPHA, LENGTH, MODEL
from sqjax.commands.layouts_of_quality import caches
from sqjax.commands.layouts_of_speed import steps
from sqjax.commands.records import Row, as_dicts
from sqjax.commands.shared import (
    check_length,
    text_windows,
    where,
)
from sqjax.methods.quantization import smoothquant
from sqjax.models import load
from sqjax.models.cache import KVCache
from sqjax.models.decoding.sampling import likeliest
from sqjax.models.evaluation.perplexity import perplexity
from sqjax.models.model import Model, Params
from sqjax.models.slots import CACHE_FORMATS
from sqjax.report.timing import interleaved
from sqjax.runtime.quantized import quantized
from sqjax.weights.schemes import W8A8
from sqjax.weights.sizes import weight_bytes

#: The tokens in the cache while batch sizes are compared.
CONTEXT = 512
#: The format of the cache for each form of the weights whose steps are timed.
CACHE_OF = {"float32": "float", "W8A8": "int8"}


#: The tokens of a window of text that the W8A8 parameters are calibrated on, and how many.
CALIBRATION = (256, 4)


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        windows: windows of evaluation text.
        length: tokens of a window.
        steps: decode steps of one timing.
        repeats: timings of each variant, of which the median is taken.
        batches: batch sizes.
        contexts: numbers of tokens in the cache at batch 1.
        copied: megabytes of the copy that measures the memory's bandwidth.
    """

    windows: int = 8
    length: int = LENGTH
    steps: int = 16
    repeats: int = 7
    batches: tuple[int, ...] = (1, 16)
    contexts: tuple[int, ...] = (128, 512, 1024, 2048)
    copied: int = 256


QUICK = Size(windows=2, steps=8, repeats=5)


class Accuracy(NamedTuple):
    """Teacher-forced perplexity through a cache, a row of the record.

    Attributes:
        table: tells these rows from the record's others.
        weights: "float32" or "W8A8".
        cache: the name of its format, or "none" for no cache.
        perplexity: of the evaluation text.
        bytes_per_token: what the cache of one row takes for each token; 0 without one.
    """

    table: str
    weights: str
    cache: str
    perplexity: float
    bytes_per_token: float


class Speed(NamedTuple):
    """Decode steps at a batch size and a number of tokens in the cache, a row of the record.

    Attributes:
        table: tells these rows from the record's others.
        weights: "float32" or "W8A8".
        cache: the name of the cache's format.
        batch: the rows that decode together.
        context_tokens: the tokens in the cache of each.
        seconds_per_step: the median.
        floor_seconds_per_step: the bytes that a step must read over the bandwidth of a copy.
        copy_bytes_per_second: that bandwidth.
    """

    table: str
    weights: str
    cache: str
    batch: int
    context_tokens: int
    seconds_per_step: float
    floor_seconds_per_step: float
    copy_bytes_per_second: float


def run(
    name: str = MODEL, quick: bool = False, only: str | None = None
) -> list[Row]:
    """Prints both tables, or `only` "accuracy" or "speed", and returns the record's rows.

    Raises:
        ValueError: there is no such model, it has no tokenizer, or it takes too few tokens.
    """
    model, params = load(name)
    size = fitting(model, QUICK if quick else Size(), only)
    variants = {"float32": params, "W8A8": w8a8(model, params)}
    print(where(name), flush=True)
    rows: list[Row] = []
    if only != "speed":
        accuracies = as_dicts(accuracy(model, variants, size))
        print(f"\nperplexity through the cache\n{text(caches(accuracies))}")
        rows += accuracies
    if only != "accuracy":
        speeds = as_dicts(speed(model, variants, size))
        bandwidth = speeds[0]["copy_bytes_per_second"]
        print(f"\none step; a copy moves {bandwidth / 1e9:.1f} GB/s")
        print(text(steps(speeds)))
        rows += speeds
    return rows


def fitting(model: Model, size: Size, only: str | None = None) -> Size:
    """The size without contexts that are too long for the model, which are printed.

    A model of 1024 tokens can not step 16 times after 1024 of them. Everything that the tables need
    of the model is looked at here, before any of it is measured.

    Raises:
        ValueError: the model has no tokenizer, or takes too few tokens for what stays.
    """
    text_windows(model, "calibration", *CALIBRATION)
    check_length(model, CALIBRATION[0], "windows of text")
    if only != "speed":
        text_windows(model, "evaluation", size.length, size.windows)
        check_length(model, size.length, "windows of text")
    if only == "accuracy":
        return size
    check_length(model, CONTEXT + size.steps, "a context and its steps")
    most = model.config.max_length - size.steps
    contexts = tuple(c for c in size.contexts if c <= most)
    left_out = [c for c in size.contexts if c > most]
    if left_out:
        print(
            f"left out: contexts of {left_out} tokens, because the model takes "
            f"{model.config.max_length} with the {size.steps} steps"
        )
    return size._replace(contexts=contexts)


def w8a8(model: Model, params: Params) -> Params:
    """Smoothed W8A8 parameters, calibrated on text that comes with the package."""
    windows = text_windows(model, "calibration", *CALIBRATION)
    batches = list(windows[:, None])  # of one row each
    return smoothquant(model.apply, params, batches, ALPHA, W8A8)


def accuracy(
    model: Model, variants: Mapping[str, Params], size: Size
) -> list[Accuracy]:
    """Perplexity of the same windows without a cache and through each format, for all variants.

    The cache is written and read 64 tokens at a time, so that a format which takes its keys'
    channels from the first tokens sees 64 of them, and not the whole window.
    """
    tokens = text_windows(model, "evaluation", size.length, size.windows)
    rows = []
    for weights, tree in variants.items():
        # The baseline: what the model gives with no cache at all.
        plain = perplexity(model, tree, tokens)
        rows.append(Accuracy("caches", weights, "none", plain, 0.0))
        for name, kind in CACHE_FORMATS.items():
            through_cache = perplexity(
                model, tree, tokens, cache=kind, chunk=64
            )
            nbytes = model.init_cache(1, 8, kind=kind).bytes_per_token
            rows.append(
                Accuracy("caches", weights, name, through_cache, nbytes)
            )
    return rows


def speed(
    model: Model, variants: Mapping[str, Params], size: Size
) -> list[Speed]:
    """Decode of all variants at each batch size, then at each context with batch 1."""
    # One thing changes at a time: first the batch, then the context.
    cases = [(batch, CONTEXT) for batch in size.batches]
    cases += [(1, context) for context in size.contexts if context != CONTEXT]
    # The same machine at the same hour, because both are shared with others.
    bandwidth = memory_bandwidth(size.copied)
    rows = []
    for batch, context in cases:
        decoders = {}
        bytes_read = {}
        for weights, tree in variants.items():
            kind = CACHE_OF[weights]
            cache = model.init_cache(batch, context + size.steps, kind=kind)
            # Empty slots are read too: their scores are masked after the product.
            bytes_of_cache = batch * cache.capacity * cache.bytes_per_token
            bytes_read[weights] = weight_bytes(tree) + bytes_of_cache
            decoders[weights] = _Decoder(
                model, tree, cache, context, size.steps
            )
        description = f"batch {batch}, {context} tokens"
        for weights, seconds in interleaved(
            decoders, size.repeats, description
        ).items():
            row = Speed(
                table="steps",
                weights=weights,
                cache=CACHE_OF[weights],
                batch=batch,
                context_tokens=context,
                seconds_per_step=seconds / size.steps,
                floor_seconds_per_step=bytes_read[weights] / bandwidth,
                copy_bytes_per_second=bandwidth,
            )
            rows.append(row)
    return rows


class _Decoder:
    """A run of some decode steps, each call from a cache that holds `context` tokens.

    The cache is donated to every call and comes back from it, because a copy of it in each call
    would be timed as well.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        cache: KVCache,
        context: int,
        steps: int,
    ):
        self.model = model
        self.params = params
        self.cache = cache
        self.context = context
        self.steps = steps

    def __call__(self) -> Array:
        token = jnp.zeros(self.cache.padding.shape, jnp.int32)
        cache = self.cache._replace(length=jnp.int32(self.context))
        token, self.cache = _steps(
            self.model, self.params, token, cache, self.steps
        )
        return token


@partial(jax.jit, static_argnames=("model", "steps"), donate_argnames="cache")
def _steps(
    model: Model,
    params: Params,
    token: Int[Array, " batch"],
    cache: KVCache,
    steps: int,
) -> tuple[Int[Array, " batch"], KVCache]:
    """Greedy steps: the last token, and the cache with one more token for each step."""
    decode = quantized(model.decode)

    def step(_, carry):
        token, cache = carry
        logits, cache = decode(params, token[:, None], cache)
        return likeliest(logits), cache

    return jax.lax.fori_loop(0, steps, step, (token, cache))


def memory_bandwidth(megabytes: int, repeats: int = 7) -> float:
    """How many bytes of memory the machine reads and writes in a second.

    Measured by a compiled function that adds 1 to an array in place; the median of the repeats. The
    array is larger than the processor's caches, as a model's weights are.
    """
    floats = megabytes * 2**20 // 4  # of four bytes each
    held = [jnp.ones((floats,), jnp.float32)]
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run() -> Array:
        held.append(add_one(held.pop()))
        return held[0]

    seconds = interleaved({"pass": run}, repeats, "copy")["pass"]
    # Every byte is read once and written once.
    return 2 * held[0].nbytes / seconds
