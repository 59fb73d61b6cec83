"""`sqjax decode`: what a quantized cache costs in accuracy and gains in speed, on a real model in one process."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sqjax.commands.demo import shipped
from sqjax.commands.timing import interleaved
from sqjax.methods.quantization import smoothquant
from sqjax.models.cache import KVCache
from sqjax.models.checkpoints.loading import load
from sqjax.models.decoding.sampling import likeliest
from sqjax.models.evaluation.perplexity import perplexity, windows
from sqjax.models.model import Model, Params
from sqjax.models.slots import CACHE_FORMATS
from sqjax.runtime.quantized import quantized
from sqjax.weights.schemes import W8A8

#: The smoothing strength of the W8A8 parameters, as in `sqjax demo`.
ALPHA = 0.85


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
    length: int = 512
    steps: int = 16
    repeats: int = 7
    batches: tuple[int, ...] = (1, 16)
    contexts: tuple[int, ...] = (128, 512, 1024, 2048)
    copied: int = 256


QUICK = Size(windows=2, steps=8, repeats=5)


class Accuracy(NamedTuple):
    """Teacher-forced perplexity through a cache (without one, for "none"), and the bytes of a token."""

    cache: str
    perplexity: float
    bytes_per_token: float


class Speed(NamedTuple):
    """Decode steps of a variant at a batch size and a number of tokens in the cache.

    Attributes:
        seconds: median time of a step.
        floor: the bytes a step must read over the bandwidth of a copy, in seconds.
    """

    name: str
    batch: int
    context: int
    seconds: float
    floor: float

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.batch / self.seconds


def run(name: str = "smollm2-135m", quick: bool = False, only: str | None = None) -> None:
    """Prints both tables, or `only` "accuracy" or "speed"."""
    size = QUICK if quick else Size()
    model, params = load(name)
    qparams = w8a8(model, params)
    print(f"{name} on {jax.devices()[0].platform}, jax {jax.__version__}", flush=True)
    if only != "speed":
        print_accuracy("float32", accuracy(model, params, size))
        print_accuracy("W8A8", accuracy(model, qparams, size))
    if only != "accuracy":
        print_speed(*speed(model, params, qparams, size))


def w8a8(model: Model, params: Params) -> Params:
    """Smoothed W8A8 parameters, calibrated on text that comes with the package."""
    tokens = windows(_text(model, "calibration"), 256, 4)
    return smoothquant(model.apply, params, [row[None] for row in tokens], ALPHA, W8A8)


def _text(model: Model, name: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("decode: expected a model with a tokenizer")
    return model.tokenizer.encode(shipped(name))


def accuracy(model: Model, params: Params, size: Size) -> list[Accuracy]:
    """Perplexity of the same windows without a cache and through each format, read 64 tokens at a time.

    So a format that takes its keys' channels from the first tokens sees 64 of them, not the window.
    """
    tokens = windows(_text(model, "evaluation"), size.length, size.windows)
    rows = [Accuracy("none", perplexity(model, params, tokens), 0.0)]
    for name, kind in CACHE_FORMATS.items():
        value = perplexity(model, params, tokens, cache=kind, chunk=64)
        rows.append(Accuracy(name, value, model.init_cache(1, 8, kind=kind).bytes_per_token))
    return rows


def speed(model: Model, params: Params, qparams: Params, size: Size) -> tuple[list[Speed], float]:
    """Decode of both variants at each batch size, then of each at each context; and the bandwidth in bytes a second."""
    variants = {"float32, float cache": (params, "float"), "W8A8, int8 cache": (qparams, "int8")}
    cases = [(batch, 512) for batch in size.batches] + [
        (1, context) for context in size.contexts if context != 512
    ]
    bandwidth, rows = copy_bandwidth(size.copied), []
    for batch, context in cases:
        runs, bytes_read = {}, {}
        for name, (tree, kind) in variants.items():
            cache = model.init_cache(batch, context + size.steps, kind=kind)
            bytes_read[name] = tree_bytes(tree) + batch * cache.capacity * cache.bytes_per_token
            runs[name] = _Decoder(model, tree, cache, context, size.steps)
        for name, seconds in interleaved(
            runs, size.repeats, f"batch {batch}, {context} tokens"
        ).items():
            rows.append(
                Speed(name, batch, context, seconds / size.steps, bytes_read[name] / bandwidth)
            )
    return rows, bandwidth


class _Decoder:
    """Called, it makes so many steps from a cache of `context` tokens; the cache is given on, not copied."""

    def __init__(self, model: Model, params: Params, cache: KVCache, context: int, steps: int):
        self.model, self.params, self.cache, self.context, self.steps = (
            model,
            params,
            cache,
            context,
            steps,
        )

    def __call__(self) -> Array:
        token = jnp.zeros(self.cache.padding.shape, jnp.int32)
        self.cache = self.cache._replace(length=jnp.int32(self.context))
        token, self.cache = _steps(self.model, self.params, token, self.cache, self.steps)
        return token


@partial(jax.jit, static_argnames=("model", "steps"), donate_argnames="cache")
def _steps(model: Model, params: Params, token: Int[Array, " batch"], cache: KVCache, steps: int):
    """Greedy steps."""
    decode = quantized(model.decode)

    def step(_, carry):
        logits, cache = decode(params, carry[0][:, None], carry[1])
        return likeliest(logits), cache

    return jax.lax.fori_loop(0, steps, step, (token, cache))


def tree_bytes(tree: Any) -> int:
    """The bytes of a tree's arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def copy_bandwidth(megabytes: int, repeats: int = 7) -> float:
    """Bytes read and written in a second by a compiled pass over an array that fits no cache, in place: the median."""
    held = [jnp.ones((megabytes * 2**18,), jnp.float32)]
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run() -> Array:
        held.append(add_one(held.pop()))
        return held[0]

    return 2 * held[0].nbytes / interleaved({"pass": run}, repeats, "copy")["pass"]


def print_accuracy(title: str, rows: Sequence[Accuracy]) -> None:
    """Perplexity, its change from that without a cache, and bytes."""
    print(
        f"\n{title}: perplexity through the cache\n{'cache':8}{'perplexity':>12}{'change':>10}{'bytes/token':>13}"
    )
    for row in rows:
        change = f"{100 * (row.perplexity / rows[0].perplexity - 1):+.2f}%"
        print(
            f"{row.cache:8}{row.perplexity:12.3f}{change:>10}{row.bytes_per_token:13.0f}",
            flush=True,
        )


def print_speed(rows: Sequence[Speed], bandwidth: float) -> None:
    """Tokens a second, the ratio to float32, the time of a step and what reading the memory alone would take."""
    print(f"\ndecode; a copy moves {bandwidth / 1e9:.1f} GB/s")
    print(
        f"{'':22}{'batch':>6}{'context':>9}{'tokens/s':>10}{'ratio':>8}{'ms/step':>9}{'floor ms':>10}"
    )
    base = {(row.batch, row.context): row for row in reversed(rows) if row.name == rows[0].name}
    for row in rows:
        ratio = f"{row.tokens_per_second / base[row.batch, row.context].tokens_per_second:.2f}x"
        numbers = f"{row.tokens_per_second:10.1f}{ratio:>8}{1e3 * row.seconds:9.2f}{1e3 * row.floor:10.2f}"
        print(f"{row.name:22}{row.batch:6}{row.context:9}{numbers}", flush=True)
