"""`sqjax bench schemes`: a real language model's perplexity in every scheme, smoothed and not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats
from sqjax.commands import layouts_of_quality as layouts
from sqjax.commands.cells import text
from sqjax.commands.defaults import ALPHA, LENGTH, MODEL
from sqjax.commands.demo import Size
from sqjax.commands.records import as_dicts
from sqjax.commands.shared import (
    check_alpha,
    check_length,
    text_windows,
    where,
)
from sqjax.methods.quantization import quantize
from sqjax.methods.smoothing import smooth
from sqjax.models import Model, load
from sqjax.models.cache import PrefixCache
from sqjax.models.evaluation.perplexity import perplexity
from sqjax.models.model import Params, TokenIds
from sqjax.runtime.int8_attention import int8_attention
from sqjax.weights import schemes
from sqjax.weights.schemes import PerToken, Scheme, Static
from sqjax.weights.sizes import weight_bytes

SCHEMES: dict[str, Scheme] = {
    "W8A8 O1 per-token": schemes.W8A8_O1,
    "W8A8 O2 per-tensor": schemes.W8A8_O2,
    "W8A8 O3 static": schemes.W8A8_O3,
    "W8A8 O3 static, range mse": Scheme(activation=Static(range="mse")),
    "W8A8 O3 static, range 0.9999": Scheme(activation=Static(range=0.9999)),
    "W8A8 O3 static, rotated": schemes.W8A8_O3_ROTATED,
    "W8A8 O1, outliers > 6 in float": schemes.W8A8_OUTLIERS,
    "FP8 e4m3": schemes.FP8,
    "FP8 e5m2": schemes.FP8_E5M2,
    "W8A16": schemes.W8A16,
    "W4A16 g128": schemes.W4A16,
    "W4A16 g64": schemes.W4A16_G64,
    "W4A8 g128, two levels": schemes.W4A8,
    "W4A4 g128": schemes.W4A4,
    "W4A4 g128, rotated": schemes.W4A4_ROTATED,
    "W4A4 g128, rotated, zero points": schemes.W4A4_ROTATED.replace(
        activation=PerToken(format="int4", zero_point=True)
    ),
}
#: Tokens of a site that are kept: the static range of rotated activations is theirs.
_SAMPLE = 512

#: Makes the parameters of a variant from parameters and their own statistics.
Make = Callable[[Any, Stats], Any]


class Row(NamedTuple):
    """One line of the table, and one row of the record: names end in their unit."""

    name: str
    unsmoothed_perplexity: float
    smoothed_perplexity: float
    weight_bytes: int


@dataclass(frozen=True)
class Int8Attention(Model):
    """The same model with both batched matmuls of its attention on int8."""

    def apply(
        self,
        params: Params,
        ids: TokenIds,
        prefix: PrefixCache | None = None,
    ) -> Float[Array, "batch tokens vocab"]:
        """As `Model.apply`."""
        return int8_attention(super().apply)(params, ids, prefix)


def compare(
    size: Size, alpha: float = ALPHA, model_name: str = MODEL
) -> list[Row]:
    """Evaluates every scheme, prints each as it is measured, then the table; returns its rows.

    Args:
        size: how much text; its other fields are not used.
        alpha: the smoothing strength, from 0 to 1.
        model_name: what `sqjax.models.load` takes.

    Raises:
        ValueError: alpha is out of range, there is no such model, it has no tokenizer, or it takes
            too few tokens.
    """
    check_alpha(alpha)
    model, params = load(model_name)
    check_length(model, LENGTH, "windows of text")
    windows = text_windows(model, "calibration", LENGTH, size.calibration)
    batches = list(windows[:, None])  # of one row each
    evaluation = text_windows(model, "evaluation", LENGTH, size.evaluation)
    print(where(model_name), flush=True)

    measured = partial(
        calibrate, model.apply, histogram=True, sample=_SAMPLE, progress=True
    )
    stats = measured(params, batches)
    smoothed = smooth(params, stats, alpha)
    # Measured anew, because the ranges "mse" and 0.9999 need histograms, and a histogram of X says
    # nothing about X / s.
    smoothed_stats = measured(smoothed, batches)

    def measure(name: str, model: Model, make: Make) -> Row:
        unsmoothed_tree = make(params, stats)
        smoothed_tree = make(smoothed, smoothed_stats)
        unsmoothed_value = perplexity(
            model, unsmoothed_tree, evaluation, progress=True, description=name
        )
        smoothed_value = perplexity(
            model, smoothed_tree, evaluation, progress=True, description=name
        )
        row = Row(
            name,
            unsmoothed_value,
            smoothed_value,
            weight_bytes(unsmoothed_tree),
        )
        print(
            f"{name}: {unsmoothed_value:.2f}, smoothed {smoothed_value:.2f}",
            flush=True,
        )
        return row

    rows = [measure("float32", model, lambda tree, _: tree)]
    for name, scheme in SCHEMES.items():
        rows.append(measure(name, model, partial(quantize, scheme=scheme)))
    of_attention = Int8Attention(model.config, model.tokenizer)
    in_w8a8 = partial(quantize, scheme=schemes.W8A8_O1)
    rows.append(measure("W8A8 O1, int8 attention", of_attention, in_w8a8))

    tokens = f"perplexity on {size.evaluation} x {LENGTH} tokens"
    table = layouts.schemes(as_dicts(rows))
    print(f"\n{tokens}; smoothed: all groups, alpha {alpha}\n{text(table)}")
    return rows
