"""`sqjax bench speed`: how fast each scheme is beside float32, bfloat16 and qwix, in one process.

Every figure is the median of runs that take turns, so that a busy machine slows all rows alike.
Read the ratios.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from sqjax.calibration.calibrate import calibrate
from sqjax.commands.cells import text
from sqjax.commands.defaults import MODEL
from sqjax.commands.layouts_of_speed import LIKE_QWIX, QWIX, SECONDS, speeds
from sqjax.commands.records import Row
from sqjax.commands.shared import check_length
from sqjax.methods.quantization import quantize
from sqjax.models import LlamaConfig, Model, fuse, load
from sqjax.models.cache import KVCache
from sqjax.models.checkpoints.loading import check_source
from sqjax.models.decoder import CausalLM
from sqjax.report.machine import this_machine
from sqjax.report.timing import interleaved
from sqjax.runtime.quantized import quantized
from sqjax.weights import schemes

#: The presets that are measured, a row each.
PRESETS = {
    "W8A8_O1": schemes.W8A8_O1,
    "W8A8_O3": schemes.W8A8_O3,
    "W8A16": schemes.W8A16,
    "W4A16": schemes.W4A16,
    "W4A8": schemes.W4A8,
}
#: What the row says where qwix is missing, which is no error: the other rows stand.
INSTALL_QWIX = 'not installed: python -m pip install "sqjax[benchmark]"'
#: The ceiling of every int8 row: codes that are there already, and sums that nobody scales.
BARE = "bare int8 dot_general"
#: A random model for machines that should not download one.
LLAMA_SHAPED = "llama-shaped"
#: The widths of SmolLM2-135M, with eight of its thirty layers and a vocabulary like Llama's.
LLAMA_CONFIG = LlamaConfig(32000, 576, 1536, 8, 9, 3, 64)


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        prompts: the lengths of prompts, in tokens.
        slots: the tokens in the cache that a decode step reads.
        repeats: timings of each row, of which the median is taken.
        short: steps are short, so that so many are timed as one; of a matmul there are so many
            times as many timings.
        square: the inner and outer size of the square matmul.
        rows: the rows of activations that it multiplies.
        matvecs: (inner, outer) sizes of the weights that one row multiplies.
    """

    prompts: tuple[int, ...]
    slots: int
    repeats: int
    short: int
    square: int
    rows: tuple[int, ...]
    matvecs: tuple[tuple[int, int], ...]


FULL = Size(
    (64, 256, 512), 512, 7, 5, 2048, (512, 1), ((2048, 8192), (8192, 2048))
)
QUICK = Size((64, 256), 256, 3, 5, 2048, (512, 1), ((2048, 8192),))


class Variant(NamedTuple):
    """One form of a decoder.

    Attributes:
        decode: (params, ids, cache) -> (logits, cache).
        params: its parameters.
        dtype: that of its cache.
    """

    decode: Callable[[Any, Array, KVCache], tuple[Array, KVCache]]
    params: Any
    dtype: Any = jnp.float32


class MatmulVariant(NamedTuple):
    """One form of a matmul: a function of x that gives x @ w, and the dtype of x."""

    run: Callable[[Array], Array]
    dtype: Any = jnp.float32


def benchmark(
    size: Size = FULL, models: Sequence[str] = (MODEL, LLAMA_SHAPED)
) -> list[Row]:
    """Measures matmuls and whole models, prints a table of each and returns all rows.

    Args:
        size: how much.
        models: names or paths that `sqjax.models.load` takes, or "llama-shaped", a random model of
            8 layers.

    Raises:
        ValueError: there is no such model, or it takes too few tokens.
    """
    # Before anything is measured, because that takes minutes.
    for name in models:
        if name != LLAMA_SHAPED:
            check_source(name)
    device = f"on {jax.devices()[0].device_kind}"
    print(f"{this_machine()}, {device}, jax {jax.__version__}", flush=True)
    matmul = square_matmul(size)
    n = size.square
    _print_table(
        f"x @ w, K = N = {n}, against the int8 dot_general alone", matmul
    )
    matvec = matvecs(size)
    _print_table("x @ w for one row, against float32", matvec)
    rows = [*matmul, *matvec]
    for name in models:
        model, params = random_model() if name == LLAMA_SHAPED else load(name)
        of_model = whole_model(name, model, params, size)
        _print_table(f"{name}: a decoder, batch 1, against float32", of_model)
        rows += of_model
    return rows


def _print_table(title: str, rows: Sequence[Row]) -> None:
    table = text(speeds(rows))
    print(f"\n{title} (times as fast, milliseconds)\n{table}", flush=True)


def timed_rows(
    labels: Row, columns: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """A record's rows from {column: {row: seconds}}, each with the labels.

    For example labels {"table": "matvec"} and columns {"2048 to 8192": {"float32": 0.0018}} give
    [{"table": "matvec", "name": "float32", "2048 to 8192 seconds": 0.0018}].
    """
    rows: dict[str, dict[str, Any]] = {}
    for column, seconds in columns.items():
        for name, value in seconds.items():
            row = rows.setdefault(name, {**labels, "name": name})
            row[column + SECONDS] = value
    return list(rows.values())


# Whole models ---------------------------------------------------------------------------------


def whole_model(name: str, model: Model, params: Any, size: Size) -> list[Row]:
    """Prompts of several lengths read into an empty cache, and one step with a full one."""
    check_length(model, max(*size.prompts, size.slots), "prompts")
    variants, notes = model_variants(model, params)
    columns = {}
    for tokens in size.prompts:
        column = f"prefill {tokens}"
        runs = _prefills(model, variants, tokens)
        columns[column] = interleaved(runs, size.repeats, f"{name}, {column}")
    steps = {}
    for variant_name, variant in variants.items():
        cache = model.init_cache(1, size.slots, variant.dtype)
        steps[variant_name] = decode_steps(variant, cache, size)
    totals = interleaved(steps, size.repeats, f"{name}, decode")
    columns["decode"] = {
        row: total / size.short for row, total in totals.items()
    }
    labels = {"table": "model", "model": name}
    rows = timed_rows(labels, columns)
    for row, note in notes.items():
        rows.append({**labels, "name": row, "note": note})
    return rows


def model_variants(
    model: Model, params: Any
) -> tuple[dict[str, Variant], dict[str, str]]:
    """({row: the model in this form}, {row: why there is none})."""
    # What a user would deploy without quantization.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    variants = {
        "float32": Variant(model.decode, params),
        "bfloat16": Variant(model.decode, half, jnp.bfloat16),
    }
    # Any tokens do: the scales change what is computed, and not how long it takes.
    stats = calibrate(model.apply, params, [_ids(model, 64)])
    for name, scheme in PRESETS.items():
        plain = Variant(
            quantized(model.decode), quantize(params, stats, scheme)
        )
        variants[name] = plain
        fused = f"{name} fused"
        if fused in LIKE_QWIX:
            # q, k and v, and gate and up, as one matmul each.
            variants[fused] = plain._replace(params=fuse(plain.params))
    try:
        variants[QWIX] = qwix_variant(model, params)
    except ImportError:
        return variants, {QWIX: INSTALL_QWIX}
    return variants, {}


def qwix_variant(model: Model, params: Any) -> Variant:
    """The same Flax module by qwix's post-training quantization: int8 weights, int8 activations.

    qwix stores int8 only what a layer calls by its own name, so that a tied head would be
    quantized again in every call. It gets an untied copy, whose head is stored int8 as well.

    Raises:
        ImportError: qwix is not installed.
    """
    qwix: Any = import_module("qwix")
    if model.config.tie_embeddings:
        head = {"kernel": params["model"]["embed_tokens"]["embedding"].T}
        model = Model(replace(model.config, tie_embeddings=False))
        params = {**params, "lm_head": head}
    # Matmuls only, as in our own rows; the embedding table stays float in both.
    rule = qwix.QuantizationRule(
        op_names=("dot_general",), weight_qtype=jnp.int8, act_qtype=jnp.int8
    )
    module = qwix.quantize_model(
        CausalLM(model.config), qwix.PtqProvider([rule])
    )
    with _usual_promotion():
        ids = jnp.zeros((1, 1), jnp.int32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), ids)
        qparams = qwix.quantize_params(params, shapes["params"])

    def decode(params, ids, cache):
        with _usual_promotion():
            logits, grown = module.apply({"params": params}, ids, cache)
        return logits[:, -1], grown

    return Variant(decode, qparams)


@contextmanager
def _usual_promotion() -> Iterator[None]:
    """For code of others, which multiplies dtypes and ranks that differ."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def _prefills(
    model: Model, variants: Mapping[str, Variant], tokens: int
) -> dict[str, Callable[[], Any]]:
    """{row: a run that reads a prompt of so many tokens}."""
    ids = _ids(model, tokens)
    runs: dict[str, Callable[[], Any]] = {}
    for name, variant in variants.items():
        # As long as the prompt, so that no variant attends to empty slots.
        cache = model.init_cache(1, tokens, variant.dtype)
        runs[name] = partial(
            jax.jit(variant.decode), variant.params, ids, cache
        )
    return runs


def decode_steps(
    variant: Variant, cache: KVCache, size: Size
) -> Callable[[], Array]:
    """A run that reads one token into the last slot of a cache, several times in a row.

    As in a loop, the key/value cache is donated, so it is updated in place; and the processor's own
    caches hold what the step before left there.
    """
    token = jnp.zeros((1, 1), jnp.int32)
    held = [cache]  # a list, because a donated cache must not be read again
    decode = jax.jit(variant.decode, donate_argnums=2)

    def run():
        for _ in range(size.short):
            # One slot is free: the step writes into the last, and reads all of them.
            full = held.pop()._replace(length=jnp.int32(size.slots - 1))
            logits, grown = decode(variant.params, token, full)
            held.append(grown)
        return logits

    return run


def _ids(model: Model, tokens: int) -> Array:
    """A prompt of so many tokens, (1, tokens); what they are does not change how long it takes."""
    return jnp.asarray(
        np.arange(tokens)[None] % model.config.vocab_size, jnp.int32
    )


def random_model() -> tuple[Model, Any]:
    """The model "llama-shaped"."""
    model = Model(LLAMA_CONFIG)
    return model, jax.jit(model.init)(jax.random.key(0))


# Single matmuls -------------------------------------------------------------------------------


def square_matmul(size: Size) -> list[Row]:
    """A matmul in float and in each scheme, quantizing included, beside a bare int8 dot."""
    n = size.square
    # The most rows that are asked for; fewer are a slice of these.
    shape = max(size.rows), n
    activations = _random_int8(shape, seed=0)
    weight = jnp.resize(_random_int8(shape, seed=1), (n, n))
    # Both operands are contracted over their last axis.
    last_axes = (((1,), (1,)), ((), ()))
    dot = jax.jit(
        partial(
            lax.dot_general,
            dimension_numbers=last_axes,
            preferred_element_type=jnp.int32,
        )
    )
    variants = matmul_variants(n, n)
    columns = {}
    for m in size.rows:
        runs: dict[str, Callable[[], Any]] = {
            BARE: partial(dot, activations[:m], weight)
        }
        runs |= _matmul_runs(variants, m, n)
        columns[f"M = {m}"] = interleaved(
            runs, size.repeats * size.short, f"matmul, M = {m}"
        )
    return timed_rows({"table": "matmul"}, columns)


def _random_int8(shape: tuple[int, int], seed: int) -> Array:
    """Codes from -127 to 127."""
    return jax.random.randint(jax.random.key(seed), shape, -127, 128, jnp.int8)


def matvecs(size: Size) -> list[Row]:
    """One row times a large weight, where reading the weight is what takes time."""
    columns = {}
    for inner, outer in size.matvecs:
        column = f"{inner} to {outer}"
        runs = _matmul_runs(matmul_variants(inner, outer), 1, inner)
        columns[column] = interleaved(
            runs, size.repeats * size.short, f"matvec, {column}"
        )
    return timed_rows({"table": "matvec"}, columns)


def matmul_variants(inner: int, outer: int) -> dict[str, MatmulVariant]:
    """{row: x -> x @ w} for one (inner, outer) weight in float and in every preset."""
    # Outputs of about 1, as of an initialised layer.
    params = {
        "w": jax.random.normal(jax.random.key(2), (inner, outer)) * inner**-0.5
    }
    half = {"w": params["w"].astype(jnp.bfloat16)}
    stats = calibrate(_matmul, params, [jnp.asarray(_activation(4, inner))])
    # Parameters are arguments: closed over, they would be constants that XLA may fold.
    float_run = jax.jit(_matmul)
    quantized_run = jax.jit(quantized(_matmul))
    variants = {
        "float32": MatmulVariant(partial(float_run, params)),
        "bfloat16": MatmulVariant(partial(float_run, half), jnp.bfloat16),
    }
    for name, scheme in PRESETS.items():
        qparams = quantize(params, stats, scheme)
        variants[name] = MatmulVariant(partial(quantized_run, qparams))
    return variants


def _matmul_runs(
    variants: Mapping[str, MatmulVariant], rows: int, inner: int
) -> dict[str, Callable[[], Array]]:
    """{row: a run on an activation (rows, inner)}."""
    x = _activation(rows, inner)
    runs: dict[str, Callable[[], Array]] = {}
    for name, variant in variants.items():
        runs[name] = partial(variant.run, jnp.asarray(x, variant.dtype))
    return runs


def _matmul(params, x):
    return x @ params["w"]


def _activation(rows: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(
        (rows, channels), dtype=np.float32
    )
