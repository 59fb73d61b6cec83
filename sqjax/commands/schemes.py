"""`sqjax schemes`: what every scheme does to a real language model's perplexity, with and without smoothing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from sqjax.calibration.calibrate import calibrate
from sqjax.calibration.stats import Stats
from sqjax.commands.demo import LENGTH, Size, shipped
from sqjax.methods.quantization import quantize
from sqjax.methods.smoothing import smooth
from sqjax.models import Model, load
from sqjax.models.evaluation.perplexity import perplexity, windows
from sqjax.models.model import Params, TokenIds
from sqjax.runtime.int8_attention import int8_attention
from sqjax.weights import schemes
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.schemes import Scheme, Static

SCHEMES: dict[str, Scheme] = {
    "W8A8 O1 per-token": schemes.W8A8_O1,
    "W8A8 O2 per-tensor": schemes.W8A8_O2,
    "W8A8 O3 static": schemes.W8A8_O3,
    "W8A8 O3 static, range mse": Scheme(activation=Static(range="mse")),
    "W8A8 O3 static, range 0.9999": Scheme(activation=Static(range=0.9999)),
    "W8A8 O1, outliers > 6 in float": schemes.W8A8_OUTLIERS,
    "FP8 e4m3": schemes.FP8,
    "FP8 e5m2": schemes.FP8_E5M2,
    "W8A16": schemes.W8A16,
    "W4A16 g128": schemes.W4A16,
    "W4A16 g64": schemes.W4A16_G64,
    "W4A8 g128, two levels": schemes.W4A8,
}


class Row(NamedTuple):
    """One line of the table: perplexities of the unsmoothed and the smoothed model, and the bytes of its weights."""

    name: str
    unsmoothed: float
    smoothed: float
    nbytes: int


@dataclass(frozen=True)
class Int8Attention(Model):
    """The same model with both batched matmuls of its attention on int8."""

    def apply(self, params: Params, ids: TokenIds) -> Float[Array, "batch tokens vocab"]:
        return int8_attention(super().apply)(params, ids)


def compare(size: Size, alpha: float = 0.85, model_name: str = "smollm2-135m") -> list[Row]:
    """Evaluates every scheme, prints the table and returns its rows."""
    model, params = load(model_name)
    if model.tokenizer is None:
        raise ValueError(f"{model_name}: a comparison needs a model with a tokenizer")
    print(f"{model_name} on {jax.devices()[0].platform}, jax {jax.__version__}", flush=True)
    text = {name: model.tokenizer.encode(shipped(name)) for name in ("calibration", "evaluation")}
    batches = [row[None] for row in windows(text["calibration"], LENGTH, size.calibration)]
    evaluation = windows(text["evaluation"], LENGTH, size.evaluation)

    def measure(name: str, model: Model, make: Callable[[Any, Stats], Any]) -> Row:
        trees = [make(*variant) for variant in variants]
        plain, smoothed = (
            perplexity(model, tree, evaluation, progress=True, description=name) for tree in trees
        )
        row = Row(name, plain, smoothed, weight_bytes(trees[0]))
        print(
            f"{row.name:34}{row.unsmoothed:12.2f}{row.smoothed:12.2f}{row.nbytes / 1e6:8.0f}",
            flush=True,
        )
        return row

    stats = calibrate(model.apply, params, batches, histogram=True, progress=True)
    smoothed = smooth(params, stats, alpha)
    variants = [
        (params, stats),
        (smoothed, calibrate(model.apply, smoothed, batches, histogram=True, progress=True)),
    ]
    print(
        f"\nperplexity on {size.evaluation} x {LENGTH} tokens; smoothed: all groups, alpha {alpha}"
    )
    print(f"{'every matmul with a weight':34}{'unsmoothed':>12}{'smoothed':>12}{'MB':>8}")
    rows = [measure("float32", model, lambda tree, stats: tree)]
    for name, scheme in SCHEMES.items():
        rows.append(measure(name, model, partial(quantize, scheme=scheme)))
    of_attention = Int8Attention(model.config, model.tokenizer)
    name = "W8A8 O1, int8 attention"
    rows.append(measure(name, of_attention, partial(quantize, scheme=schemes.W8A8_O1)))
    return rows


def weight_bytes(tree: Any) -> int:
    """Bytes of a tree as a file or a GPU holds it, int4 two to a byte."""

    def of(leaf: Any) -> int:
        if not isinstance(leaf, QuantWeight):
            return int(np.asarray(leaf).nbytes)
        others = (leaf.input_scale, leaf.smoothing, leaf.outliers)
        return leaf.tensor.nbytes + sum(x.nbytes for x in jax.tree.leaves(others))

    return sum(
        map(of, jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantWeight | QTensor)))
    )
