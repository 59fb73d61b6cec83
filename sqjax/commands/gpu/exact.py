"""Products in which nothing is rounded: their results must be numpy's integers, bit for bit.

Weights and activations are integers times powers of two, and what shares a scale holds the largest
number of its format, so that the quantizer's scale is exactly that power. All sums stay below 2^24,
so that float32 holds them too.

Example: an output with the weights [254, -4] has absmax 254 = 127 * 2, so the scale 2 and the codes
[127, -2]. A token [127, 3] has the scale 1. The result is 254 * 127 - 4 * 3 = 32246, exactly.
"""

from typing import Any

import numpy as np

from sqjax.commands.gpu.weights import some_outputs
from sqjax.weights import schemes
from sqjax.weights.qtensor import FIRST_LEVEL, QTensor
from sqjax.weights.schemes import (
    Float8,
    Int4,
    Int8,
    PerTensor,
    Scheme,
    Static,
)

#: Every format with every granularity of weights and of activations.
SCHEMES = {
    "W8A8_O1": schemes.W8A8_O1,
    "W8A8_O2": schemes.W8A8_O2,
    "W8A8_O3": schemes.W8A8_O3,
    "int8 in groups": Scheme(weight=Int8(group_size=64)),
    "int8 per tensor": Scheme(weight=Int8(per_tensor=True)),
    "W8A16": schemes.W8A16,
    "int4": Scheme(weight=Int4()),
    "int4 in groups": Scheme(weight=Int4(group_size=64)),
    "int4 per tensor, static": Scheme(
        weight=Int4(per_tensor=True), activation=Static()
    ),
    "W4A16": schemes.W4A16,
    "W4A8": schemes.W4A8,
    "FP8": schemes.FP8,
    "FP8_E5M2": schemes.FP8_E5M2,
    "FP8 in blocks": schemes.FP8.replace(weight=Float8(block_size=64)),
    "FP8 per tensor, static": Scheme(
        weight=Float8(per_tensor=True), activation=Static(format="e4m3")
    ),
    "FP8 per tensor, dynamic": Scheme(
        weight=Float8(per_tensor=True), activation=PerTensor(format="e4m3")
    ),
    "FP8 weights": Scheme(weight=Float8(), activation=None),
}
#: A Hopper GPU adds float8 products with 13 bits behind the largest of them; integers have no such
#: bound.
FLOAT8_ERROR = 1e-3
#: The activation's channel that holds its largest number; the weights' stand in the channels 0, 32,
#: 64, ... so that groups of any size have one.
_LARGEST_AT = 1
_EVERY = 32
#: The smallest and the largest weight of a group with a zero point: 15 steps of 1 between them.
_ZERO_POINT_RANGE = -3, 12


def operands(
    scheme: Scheme, rows: int, inputs: int, outputs: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """An activation (rows, inputs) and a weight (inputs, outputs) for this scheme, float32."""
    rng = np.random.default_rng(seed)
    is_integer = scheme.quantizes_activation and not scheme.weight.fmt.floating
    # Small where a format has few digits, or sums are of floats.
    most = 127 if is_integer else 4
    x = rng.integers(-most, most + 1, (rows, inputs))
    x[:, _LARGEST_AT] = 127
    how: Any = scheme.activation
    if how is not None:
        x[:, _LARGEST_AT] = how.fmt.bound
    return x.astype(np.float32), _weight(rng, scheme, inputs, outputs)


def _weight(
    rng: np.random.Generator, scheme: Scheme, inputs: int, outputs: int
) -> np.ndarray:
    """Integers times a power of two for each output, if outputs have scales of their own."""
    how: Any = scheme.weight
    low, largest = -4, how.fmt.bound
    if isinstance(how, Int8):
        low = -127
    if isinstance(how, Int4) and how.two_level:
        low, largest = -100, FIRST_LEVEL.bound
    elif isinstance(how, Int4) and how.zero_point:
        low, largest = _ZERO_POINT_RANGE
    w = rng.integers(low, min(-low, largest) + 1, (inputs, outputs))
    w[::_EVERY] = largest
    w[2::_EVERY] = low
    one_scale = how.per_tensor or getattr(how, "block_size", None)
    power = 0 if one_scale else np.arange(outputs) % 3 - 1
    return (w * 2.0**power).astype(np.float32)


def expected(x: np.ndarray, tensor: QTensor) -> np.ndarray:
    """The product with the numbers that a tensor stores, (rows, outputs) in float64."""
    weight = some_outputs(tensor, tensor.values.shape[0])
    return x.astype(np.float64) @ weight.T
