"""What a convolution does to a quantized weight: where that is the kernel it runs on int8."""

from typing import Any

from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax.program.registry import Special
from sqjax.runtime.kinds import refuse_weight
from sqjax.runtime.shared_rules import sharded_as_the_result
from sqjax.weights.convolution import quantized_convolution


@sharded_as_the_result
def convolve(equation: JaxprEqn, image: Any, kernel: Any) -> Array:
    """By way of `quantized_convolution`: int8 x int8 -> int32, or as the weight's scheme has it.

    The weight must be the kernel.
    """
    if isinstance(image, Special):
        return refuse_weight(equation, image, kernel)
    out = quantized_convolution(
        image, kernel.value, equation.params, kernel.path
    )
    result: Any = equation.outvars[0].aval
    return out.astype(result.dtype)
