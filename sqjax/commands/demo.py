"""`sqjax demo`: a real language model from float to int8, with its accuracy and speed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats
from sqjax.commands import layouts_of_quality as layouts
from sqjax.commands.cells import text
from sqjax.commands.defaults import ALPHA, LENGTH, MODEL
from sqjax.commands.records import as_dicts
from sqjax.commands.shared import (
    NO_TOKENIZER,
    check_alpha,
    check_length,
    text_windows,
    where,
)
from sqjax.folding.apply import fold
from sqjax.methods.quantization import quantize
from sqjax.methods.smoothing import fold_stats, scales
from sqjax.models import Model, greedy, load
from sqjax.models.evaluation.perplexity import perplexity
from sqjax.report.timing import interleaved
from sqjax.runtime.quantized import quantized
from sqjax.weights.schemes import W8A8_O1, W8A8_O3, Scheme
from sqjax.weights.sizes import weight_bytes

PROMPT = "The capital of France is"
#: The tokens of the prompt whose reading is timed.
PREFILL = 256
SCHEMES = {"O1 per-token": W8A8_O1, "O3 static": W8A8_O3}
#: What is smoothed: {name: the argument `groups` of `scales`, or None for nothing}.
SMOOTHINGS = {"unsmoothed": None, "norms only": "norm", "all groups": "all"}


class Size(NamedTuple):
    """How much the demo does.

    Attributes:
        calibration: windows of calibration text.
        evaluation: windows of evaluation text.
        generated: tokens to generate.
        repeats: timings of each variant, of which the median is taken.
    """

    calibration: int
    evaluation: int
    generated: int
    repeats: int


FULL = Size(16, 24, 48, 5)
QUICK = Size(4, 3, 16, 3)


class Row(NamedTuple):
    """One line of the table, and one row of the record: names end in their unit."""

    name: str
    perplexity: float
    weight_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def demo(
    size: Size = FULL,
    alpha: float = ALPHA,
    model_name: str = MODEL,
    float_head: bool = False,
) -> list[Row]:
    """Calibrates, smooths and quantizes a model, and prints what that costs and gains.

    Args:
        size: how much is done.
        alpha: the smoothing strength, from 0 to 1.
        model_name: what `sqjax.models.load` takes.
        float_head: whether lm_head stays float, as in the authors' code.

    Returns:
        The table's rows, float32 first.

    Raises:
        ValueError: alpha is out of range, there is no such model, it has no tokenizer, or it takes
            too few tokens.
    """
    check_alpha(alpha)
    model, params = load(model_name)
    _check_model(model, size)
    calibration = text_windows(model, "calibration", LENGTH, size.calibration)
    evaluation = text_windows(model, "evaluation", LENGTH, size.evaluation)
    print(where(model_name), flush=True)
    stats = calibrate(
        model.apply, params, list(calibration[:, None]), progress=True
    )
    print(_what_folds(stats))

    def variant(scheme: Scheme, groups: str | None) -> Any:
        return quantized_variant(
            params, stats, alpha, groups, scheme, float_head
        )

    def row(name: str, tree: Any, speed: tuple[float, float]) -> Row:
        value = perplexity(
            model, tree, evaluation, progress=True, description=name
        )
        return Row(name, value, weight_bytes(tree), *speed)

    # Speed does not depend on the smoothing, so it is measured once for each scheme.
    smoothed = {
        name: variant(scheme, "all") for name, scheme in SCHEMES.items()
    }
    speeds = measure_speed(model, {"float32": params, **smoothed}, size)

    rows = [row("float32", params, speeds["float32"])]
    for scheme_name, scheme in SCHEMES.items():
        for smoothing, groups in SMOOTHINGS.items():
            name = f"W8A8 {scheme_name}, {smoothing}"
            rows.append(row(name, variant(scheme, groups), speeds[scheme_name]))

    print(_table(rows, size, alpha, float_head))
    print_continuation("float32", model, params, size.generated)
    print_continuation(
        "W8A8 O1 per-token", model, smoothed["O1 per-token"], size.generated
    )
    return rows


def _check_model(model: Model, size: Size) -> None:
    """Raises ValueError for a model that some part of the demo can not run."""
    if model.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    check_length(model, LENGTH, "windows of text")
    check_length(model, PREFILL, "a prompt")
    answer = len(model.tokenizer.encode(PROMPT)) + size.generated
    check_length(model, answer, "a prompt and its continuation")


def _what_folds(stats: Stats) -> str:
    """How many matmuls there are, and how many fold groups."""
    graph = stats.graph
    norms = sum(group.norm for group in graph.groups)
    return (
        f"{len(graph.sites)} matmuls; {len(graph.groups)} groups fold ({norms} into norms), "
        "bit for bit"
    )


def quantized_variant(
    params: Any,
    stats: Stats,
    alpha: float,
    groups: str | None,
    scheme: Scheme,
    float_head: bool = False,
) -> Any:
    """The parameters with some fold groups smoothed (none of them for None), then quantized."""
    smoothing_scales = (
        {} if groups is None else scales(params, stats, alpha, groups=groups)
    )
    smoothed = fold(params, stats.graph, smoothing_scales)
    # Static schemes need statistics of the parameters that are quantized: the smoothed ones.
    smoothed_stats = fold_stats(stats, smoothing_scales)
    rules = {"lm_head|embed": None, ".*": scheme} if float_head else scheme
    return quantize(smoothed, smoothed_stats, rules)


def measure_speed(
    model: Model, variants: Mapping[str, Any], size: Size
) -> dict[str, tuple[float, float]]:
    """{variant: (prefill, decode) tokens a second}, medians of runs that take turns.

    Prefill reads 256 tokens into a cache; decode is greedy generation after the demo's prompt,
    batch 1.
    """
    numbers = (np.arange(PREFILL) + 1000) % model.config.vocab_size
    ids = jnp.asarray(numbers[None], jnp.int32)
    prompt = _prompt_ids(model)
    cache = model.init_cache(1, PREFILL)
    read = jax.jit(quantized(model.decode))
    prefill_runs = {}
    decode_runs = {}
    for name, tree in variants.items():
        prefill_runs[name] = lambda tree=tree: read(tree, ids, cache)
        decode_runs[name] = lambda tree=tree: greedy(
            model, tree, prompt, size.generated
        )
    prefill_seconds = interleaved(prefill_runs, size.repeats, "prefill speed")
    decode_seconds = interleaved(decode_runs, size.repeats, "decode speed")
    speeds = {}
    for name in variants:
        prefill_speed = PREFILL / prefill_seconds[name]
        speeds[name] = (prefill_speed, size.generated / decode_seconds[name])
    return speeds


def _prompt_ids(model: Model) -> Array:
    """The ids of the demo's prompt, (1, tokens)."""
    assert model.tokenizer is not None  # `_check_model` has seen to it
    return jnp.asarray([model.tokenizer.encode(PROMPT)], jnp.int32)


def print_continuation(
    name: str, model: Model, params: Any, tokens: int
) -> None:
    """Prints how a variant continues the prompt, so that a reader sees that it still writes."""
    assert model.tokenizer is not None
    ids = np.asarray(greedy(model, params, _prompt_ids(model), tokens))[0]
    print(f"\n{name}: {PROMPT}{model.tokenizer.decode(ids)}")


def _table(rows: list[Row], size: Size, alpha: float, float_head: bool) -> str:
    """The table and a line that says what was done to get it."""
    what = (
        "the head in float, every other matmul in int8"
        if float_head
        else "every matmul in int8"
    )
    tokens = f"perplexity on {size.evaluation} x {LENGTH} tokens"
    table = layouts.demo(as_dicts(rows))
    return f"\n{tokens}; smoothing with alpha {alpha}; {what}\n{text(table)}"
