"""`sqjax demo`: a real language model from float to int8, with its accuracy and speed side by side."""

from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats
from sqjax.commands.timing import interleaved
from sqjax.folding.apply import fold
from sqjax.methods.quantization import quantize
from sqjax.methods.smoothing import fold_stats, scales
from sqjax.models import Model, greedy, load
from sqjax.models.evaluation.perplexity import perplexity, windows
from sqjax.runtime.quantized import quantized
from sqjax.weights.schemes import W8A8_O1, W8A8_O3, Scheme

PROMPT = "The capital of France is"
#: The tokens of a window of text.
LENGTH = 512
SCHEMES = {"O1 per-token": W8A8_O1, "O3 static": W8A8_O3}


class Size(NamedTuple):
    """How much the demo does: windows of calibration and of evaluation text, tokens to generate, timing repeats."""

    calibration: int
    evaluation: int
    generated: int
    repeats: int


FULL = Size(16, 24, 48, 5)
QUICK = Size(4, 3, 16, 3)


class Row(NamedTuple):
    """One line of the table."""

    name: str
    perplexity: float
    nbytes: int
    prefill: float
    decode: float


def demo(
    size: Size = FULL,
    alpha: float = 0.85,
    model_name: str = "smollm2-135m",
    float_head: bool = False,
) -> list[Row]:
    """Calibrates, smooths and quantizes a model, prints what that costs and gains, and returns the table's rows."""
    model, params = load(model_name)
    if model.tokenizer is None:
        raise ValueError(f"{model_name}: the demo needs a model with a tokenizer")
    print(f"{model_name} on {jax.devices()[0].platform}, jax {jax.__version__}", flush=True)
    text = {name: model.tokenizer.encode(shipped(name)) for name in ("calibration", "evaluation")}
    calibration = windows(text["calibration"], LENGTH, size.calibration)
    evaluation = windows(text["evaluation"], LENGTH, size.evaluation)

    stats = calibrate(model.apply, params, [row[None] for row in calibration], progress=True)
    norms = sum(g.norm for g in stats.graph.groups)
    print(
        f"{len(stats.graph.sites)} matmuls; {len(stats.graph.groups)} groups fold ({norms} into norms), bit for bit"
    )

    prompt = jnp.asarray([model.tokenizer.encode(PROMPT)], jnp.int32)
    best = {
        name: _variant(params, stats, alpha, "all", scheme, float_head)
        for name, scheme in SCHEMES.items()
    }
    speeds = measure_speed(model, {"float32": params, **best}, prompt, size)
    rows = [
        Row(
            "float32",
            _perplexity(model, params, evaluation, "float32"),
            _nbytes(params),
            *speeds["float32"],
        )
    ]
    for scheme_name, scheme in SCHEMES.items():
        for smoothing, groups in (
            ("unsmoothed", None),
            ("norms only", "norm"),
            ("all groups", "all"),
        ):
            name = f"W8A8 {scheme_name}, {smoothing}"
            variant = _variant(params, stats, alpha, groups, scheme, float_head)
            rows.append(
                Row(
                    name,
                    _perplexity(model, variant, evaluation, name),
                    _nbytes(variant),
                    *speeds[scheme_name],
                )
            )
    print_table(rows, size, alpha, float_head)
    for name, tree in {
        "float32": params,
        "W8A8 " + next(iter(best)): next(iter(best.values())),
    }.items():
        ids = np.asarray(greedy(model, tree, prompt, size.generated))[0]
        print(f"\n{name}: {PROMPT}{model.tokenizer.decode([int(i) for i in ids])}")
    return rows


def shipped(name: str) -> str:
    """A text that comes with the package."""
    return (resources.files("sqjax.commands") / "text" / f"{name}.txt").read_text(encoding="utf-8")


def _variant(
    params: Any,
    stats: Stats,
    alpha: float,
    groups: str | None,
    scheme: Scheme,
    float_head: bool = False,
) -> Any:
    s = {} if groups is None else scales(params, stats, alpha, groups=groups)
    return quantize(
        fold(params, stats.graph, s),
        fold_stats(stats, s),
        {"lm_head|embed": None, ".*": scheme} if float_head else scheme,
    )


def _perplexity(model: Model, params: Any, tokens: np.ndarray, name: str) -> float:
    return perplexity(model, params, tokens, progress=True, description=name)


def _nbytes(params: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(params))


def measure_speed(
    model: Model, variants: Mapping[str, Any], prompt: Array, size: Size
) -> dict[str, tuple[float, float]]:
    """{variant: (prefill, decode) tokens/s}, medians of interleaved runs.

    Prefill reads 256 tokens into a cache; decode is greedy generation after the demo's prompt, batch 1.
    """
    tokens = 256
    ids = jnp.asarray(np.arange(tokens)[None] + 1000, jnp.int32)
    cache = model.init_cache(1, tokens)
    read = jax.jit(quantized(model.decode))
    prefill = {name: (lambda tree=tree: read(tree, ids, cache)) for name, tree in variants.items()}
    decode = {
        name: (lambda tree=tree: greedy(model, tree, prompt, size.generated))
        for name, tree in variants.items()
    }
    prefill_seconds = interleaved(prefill, size.repeats, "prefill speed")
    decode_seconds = interleaved(decode, size.repeats, "decode speed")
    return {
        name: (tokens / prefill_seconds[name], size.generated / decode_seconds[name])
        for name in variants
    }


def print_table(rows: list[Row], size: Size, alpha: float, float_head: bool) -> None:
    """Prints the rows, speeds also as ratios to the first."""
    base = rows[0]
    what = "the head in float, every other matmul in int8" if float_head else "every matmul in int8"
    print(
        f"\nperplexity on {size.evaluation} x {LENGTH} tokens; smoothing with alpha {alpha}; {what}"
    )
    print(f"{'':32}{'perplexity':>12}{'MB':>8}{'prefill tok/s':>20}{'decode tok/s':>20}")
    for row in rows:
        prefill = f"{row.prefill:.0f} ({row.prefill / base.prefill:.2f}x)"
        decode = f"{row.decode:.1f} ({row.decode / base.decode:.2f}x)"
        print(
            f"{row.name:32}{row.perplexity:12.2f}{row.nbytes / 1e6:8.0f}{prefill:>20}{decode:>20}"
        )
