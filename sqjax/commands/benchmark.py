"""`sqjax benchmark`: how fast each scheme is beside float32, bfloat16 and qwix, in one process on this machine.

Every figure is the median of runs that take turns, so that a busy machine slows all rows alike. Read the ratios.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from sqjax.calibration.calibrate import calibrate
from sqjax.commands.timing import interleaved
from sqjax.methods.quantization import quantize
from sqjax.models import LlamaConfig, Model, fuse, load
from sqjax.models.cache import KVCache
from sqjax.models.llama import Llama
from sqjax.runtime.quantized import quantized
from sqjax.weights import schemes

#: Presets of `sqjax.schemes` by name, a row each; a name that this version lacks is left out.
PRESETS = ("W8A8_O1", "W8A8_O3", "W8A16", "W4A16", "W4A8")
#: Those that quantize what the qwix row quantizes.
LIKE_QWIX = ("W8A8_O1", "W8A8_O3", "W8A8_O1 fused", "W8A8_O3 fused")
QWIX = "qwix int8"
INSTALL_QWIX = 'not installed: python -m pip install "sqjax[benchmark]"'
BARE = "bare int8 dot_general"
LLAMA_SHAPED = LlamaConfig(32000, 576, 1536, 8, 9, 3, 64)


class Size(NamedTuple):
    """How much is measured: prompt lengths, slots of the cache that a step reads, timing repeats, matmul sizes.

    A decode step and a matmul are short: a matmul is timed `repeats * short` times, `short` steps are timed as one.
    """

    prompts: tuple[int, ...]
    slots: int
    repeats: int
    short: int
    square: int
    rows: tuple[int, ...]
    matvecs: tuple[tuple[int, int], ...]


FULL = Size((64, 256, 512), 512, 7, 5, 2048, (512, 1), ((2048, 8192), (8192, 2048)))
QUICK = Size((64, 256), 256, 3, 5, 2048, (512, 1), ((2048, 8192),))


class Table(NamedTuple):
    """{row: {column: seconds}}, and the row that ratios are to. A row may be a note on why it is missing."""

    title: str
    base: str
    rows: dict[str, dict[str, float] | str]

    def ratio(self, row: str, column: str) -> float:
        """How many times as fast as the base this row is."""
        return self.seconds(self.base, column) / self.seconds(row, column)

    def seconds(self, row: str, column: str) -> float:
        """The median time of a row."""
        figures = self.rows[row]
        if isinstance(figures, str):
            raise ValueError(f"{self.title}: {row} was not measured: {figures}")
        return figures[column]


class Variant(NamedTuple):
    """One form of a decoder: decode(params, ids, cache) -> (logits, cache), and the dtype of its cache."""

    decode: Callable[[Any, Array, KVCache], tuple[Array, KVCache]]
    params: Any
    dtype: Any = jnp.float32


def benchmark(
    size: Size = FULL, models: Sequence[str] = ("smollm2-135m", "llama-shaped")
) -> list[Table]:
    """Measures matmuls and whole models, prints a table each and returns them.

    Args:
        size: how much.
        models: names or paths that `sqjax.models.load` takes; "llama-shaped" is a random model of 8 layers.
    """
    print(machine(), flush=True)
    tables = []
    for table in _measured(size, models):
        print("\n" + text(table), flush=True)
        tables.append(table)
    return tables


def _measured(size: Size, models: Sequence[str]) -> Iterator[Table]:
    yield square_matmul(size)
    yield matvecs(size)
    for name in models:
        model, params = _random_model() if name == "llama-shaped" else load(name)
        yield whole_model(name, model, params, size)


def machine() -> str:
    """The processor, its cores and the integer units that matter here, the device and the versions, on one line."""
    model, flags = platform.processor() or platform.machine(), ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
        model += "".join(
            f", {key} {fields[key]}" for key in ("cpu family", "model") if key in fields
        )
    units = [
        name
        for name in ("avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
        if name in flags.split()
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    return f"{model}, {cores} cores ({', '.join(units) or 'no known integer units'}), {_device()}, {versions}"


def _device() -> str:
    return f"on {jax.devices()[0].device_kind}"


def presets() -> dict[str, schemes.Scheme]:
    """{name: scheme} of the presets that this version of sqjax has."""
    return {name: getattr(schemes, name) for name in PRESETS if hasattr(schemes, name)}


def whole_model(name: str, model: Model, params: Any, size: Size) -> Table:
    """Reading prompts of several lengths into an empty cache, and one step of batch 1 with a full one."""
    variants, notes = model_variants(model, params)
    columns = {f"prefill {n}": _prefills(model, variants, n) for n in size.prompts}
    seconds = {c: interleaved(runs, size.repeats, f"{name}, {c}") for c, runs in columns.items()}
    steps = _steps(model, variants, size)
    decoding = interleaved(steps, size.repeats, f"{name}, decode")
    seconds["decode"] = {v: total / size.short for v, total in decoding.items()}
    rows: dict[str, dict[str, float] | str] = {
        v: {c: seconds[c][v] for c in seconds} for v in variants
    }
    rows.update(notes)
    return Table(f"{name}: a decoder, batch 1, against float32", "float32", rows)


def model_variants(model: Model, params: Any) -> tuple[dict[str, Variant], dict[str, str]]:
    """({row: the model in this form}, {row: why there is none})."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = {
        "float32": Variant(model.decode, params),
        "bfloat16": Variant(model.decode, half, jnp.bfloat16),
    }
    stats = calibrate(model.apply, params, [_ids(model, 64)])
    for name, scheme in presets().items():
        found[name] = Variant(quantized(model.decode), quantize(params, stats, scheme))
        if (fused := f"{name} fused") in LIKE_QWIX:  # q/k/v, and gate/up, as one matmul each
            found[fused] = found[name]._replace(params=fuse(found[name].params))
    try:
        found[QWIX] = qwix_variant(model, params)
    except ImportError:
        return found, {QWIX: INSTALL_QWIX}
    return found, {}


def qwix_variant(model: Model, params: Any) -> Variant:
    """The same Flax module by way of qwix's post-training quantization: int8 weights, int8 activations a token.

    qwix stores int8 only what a layer calls by its own name, so a tied head would be quantized again in every call.
    It gets an untied copy, whose head is stored int8 as well.

    Raises:
        ImportError: qwix is not installed.
    """
    qwix: Any = import_module("qwix")
    if model.config.tie_embeddings:
        head = {"kernel": params["model"]["embed_tokens"]["embedding"].T}
        model, params = (
            Model(replace(model.config, tie_embeddings=False)),
            {**params, "lm_head": head},
        )
    rule = qwix.QuantizationRule(
        op_names=("dot_general",), weight_qtype=jnp.int8, act_qtype=jnp.int8
    )
    module = qwix.quantize_model(Llama(model.config), qwix.PtqProvider([rule]))
    with _usual_promotion():
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
            "params"
        ]
        qparams = qwix.quantize_params(params, shapes)

    def decode(params, ids, cache):
        with _usual_promotion():
            logits, grown = module.apply({"params": params}, ids, cache)
        return logits[:, -1], grown

    return Variant(decode, qparams)


@contextmanager
def _usual_promotion() -> Iterator[None]:
    """For code that multiplies dtypes and ranks that differ."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _prefills(
    model: Model, variants: Mapping[str, Variant], tokens: int
) -> dict[str, Callable[[], Any]]:
    ids = _ids(model, tokens)
    return {
        name: partial(jax.jit(v.decode), v.params, ids, model.init_cache(1, tokens, v.dtype))
        for name, v in variants.items()
    }


def _steps(
    model: Model, variants: Mapping[str, Variant], size: Size
) -> dict[str, Callable[[], Any]]:
    return {
        name: _step(v, model.init_cache(1, size.slots, v.dtype), size)
        for name, v in variants.items()
    }


def _step(variant: Variant, cache: KVCache, size: Size) -> Callable[[], Array]:
    """A function that reads one token into the last slot of a cache, several times one after the other.

    As in a loop, the cache is updated in place, and the caches of the processor hold what the last step left there.
    """
    token, held = jnp.zeros((1, 1), jnp.int32), [cache]
    decode = jax.jit(variant.decode, donate_argnums=2)

    def run():
        for _ in range(size.short):
            logits, grown = decode(
                variant.params, token, held.pop()._replace(length=jnp.int32(size.slots - 1))
            )
            held.append(grown)
        return logits

    return run


def _ids(model: Model, tokens: int) -> Array:
    return jnp.asarray(np.arange(tokens)[None] % model.config.vocab_size, jnp.int32)


def _random_model() -> tuple[Model, Any]:
    model = Model(LLAMA_SHAPED)
    return model, jax.jit(model.init)(jax.random.key(0))


def square_matmul(size: Size) -> Table:
    """One W8A8 matmul with its quantize and dequantize, beside the int8 `dot_general` alone, and float."""
    n = size.square
    q, values = (
        jax.random.randint(jax.random.key(i), (max(size.rows), n), -127, 128, jnp.int8)
        for i in (0, 1)
    )
    values = jnp.resize(values, (n, n))
    dot = jax.jit(
        partial(lax.dot_general, dimension_numbers=_LAST_AXES, preferred_element_type=jnp.int32)
    )
    rows: dict[str, dict[str, float] | str] = {}
    variants = matmul_variants(n, n)
    for m in size.rows:
        runs = {BARE: partial(dot, q[:m], values)}
        runs |= {
            name: partial(run, jnp.asarray(_activation(m, n), dtype))
            for name, (run, dtype) in variants.items()
        }
        for name, seconds in interleaved(
            runs, size.repeats * size.short, f"matmul, M = {m}"
        ).items():
            rows[name] = {**_figures(rows.get(name)), f"M = {m}": seconds}
    return Table(f"x @ w, K = N = {n}, against the int8 dot_general alone", BARE, rows)


def matvecs(size: Size) -> Table:
    """One row times a large weight, which weight-only schemes are for: reading the weight is what takes time."""
    rows: dict[str, dict[str, float] | str] = {}
    for inner, outer in size.matvecs:
        variants = matmul_variants(inner, outer)
        x = _activation(1, inner)
        runs = {
            name: partial(run, jnp.asarray(x, dtype)) for name, (run, dtype) in variants.items()
        }
        for name, seconds in interleaved(
            runs, size.repeats * size.short, f"matvec, {inner} to {outer}"
        ).items():
            rows[name] = {**_figures(rows.get(name)), f"{inner} to {outer}": seconds}
    return Table("x @ w for one row, against float32", "float32", rows)


def _figures(row: dict[str, float] | str | None) -> dict[str, float]:
    return row if isinstance(row, dict) else {}


_LAST_AXES = (((1,), (1,)), ((), ()))


def matmul_variants(inner: int, outer: int) -> dict[str, tuple[Callable[[Array], Array], Any]]:
    """{row: (x -> x @ w, the dtype of x)} for one (inner, outer) weight in float and in every preset."""
    params = {"w": jax.random.normal(jax.random.key(2), (inner, outer)) * inner**-0.5}
    half = {"w": params["w"].astype(jnp.bfloat16)}
    stats = calibrate(_matmul, params, [jnp.asarray(_activation(4, inner))])
    float_run, run = jax.jit(_matmul), jax.jit(quantized(_matmul))
    found: dict[str, tuple[Callable[[Array], Array], Any]] = {
        "float32": (partial(float_run, params), jnp.float32),
        "bfloat16": (partial(float_run, half), jnp.bfloat16),
    }
    return found | {
        name: (partial(run, quantize(params, stats, scheme)), jnp.float32)
        for name, scheme in presets().items()
    }


def _matmul(params, x):
    return x @ params["w"]


def _activation(rows: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, channels), dtype=np.float32)


def text(table: Table) -> str:
    """The table as lines: each figure as a ratio of speeds to the base row's, and its time."""
    columns = list(_figures(table.rows[table.base]))
    lines = [f"{table.title} (times as fast, milliseconds)"]
    lines.append(f"{'':24}" + "".join(f"{c:>20}" for c in columns))
    for name, row in table.rows.items():
        cells = (
            row
            if isinstance(row, str)
            else "".join(_cell(table, name, column) for column in columns)
        )
        lines.append(f"{name:24}" + ("  " if isinstance(row, str) else "") + cells)
    for name in filter(LIKE_QWIX.__contains__, table.rows):
        if isinstance(table.rows.get(QWIX), dict):
            against = (table.seconds(QWIX, c) / table.seconds(name, c) for c in columns)
            lines.append(f"{name + ' to qwix':24}" + "".join(f"{f'{r:.2f}x':>20}" for r in against))
    return "\n".join(lines)


def _cell(table: Table, row: str, column: str) -> str:
    return f"{f'{table.ratio(row, column):.2f}x ({table.seconds(row, column) * 1e3:.2f})':>20}"
