"""What each primitive does to a quantized weight; a primitive without a rule is refused.

A rule is called as rule(equation, *operands), where the weight is a `Special` that holds a
`QuantWeight`. It returns an array, or a `Special` where the result is a quantized weight still;
None where it does not serve, and the weight is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax.program.known_values import holds_only, is_mask, number_in
from sqjax.program.primitives import COPIES, RESHARDINGS, RETYPINGS
from sqjax.program.registry import Registry, Special
from sqjax.runtime.convolution import convolve
from sqjax.runtime.embedding_rows import gathered, gathers_rows
from sqjax.runtime.kinds import WEIGHTS
from sqjax.runtime.norms import measure
from sqjax.runtime.shared_rules import (
    barrier,
    copy,
    on_either_side,
    pvary,
    sharded_as_the_result,
    slices_of,
)
from sqjax.runtime.weight_shapes import reshaped, sliced
from sqjax.weights.dot_general import (
    quantized_dot_general,
    quantized_ragged_dot,
)
from sqjax.weights.quant_weight import QuantWeight, is_quantized

WEIGHT_RULES = Registry(WEIGHTS)


def weight_leaves(paths: Sequence[str], params: Sequence[Any]) -> list[Any]:
    """The parameters as the rules take them: quantized weights as leaves with their paths.

    Codes and scales have no gradients, though float8 is a float to jax. What fn multiplies a weight
    with has one.
    """
    return [
        Special(path, lax.stop_gradient(x)) if is_quantized(x) else x
        for path, x in zip(paths, params, strict=True)
    ]


# Matmuls ------------------------------------------------------------------------------------------


@WEIGHT_RULES.register(("dot_general",), WEIGHTS)
@sharded_as_the_result
def _dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Array | None:
    """By way of `quantized_dot_general`: int8 x int8 -> int32, or as the weight's scheme has it.

    The weight may be on either side.
    """

    def product(x, leaf, dimensions):
        return quantized_dot_general(x, leaf.value, dimensions, leaf.path)

    return on_either_side(equation, lhs, rhs, product)


@WEIGHT_RULES.register(("ragged_dot_general",), WEIGHTS)
@sharded_as_the_result
def _ragged_dot(
    equation: JaxprEqn, lhs: Any, rhs: Any, group_sizes: Any
) -> Array | None:
    """Each row times one matrix of a stack, by way of `quantized_ragged_dot`."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    # As `lax.ragged_dot` has them: (rows, inner) by (stack, inner, outputs), split along the rows.
    sums_over_inner = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
    split_by_rows = tuple(numbers.lhs_ragged_dimensions) == (0,)
    if isinstance(lhs, Special) or not (sums_over_inner and split_by_rows):
        return None
    result: Any = equation.outvars[0].aval
    out = quantized_ragged_dot(lhs, rhs.value, group_sizes, rhs.path)
    return out.astype(result.dtype)


@WEIGHT_RULES.register(("gather",), WEIGHTS)
@sharded_as_the_result
def _gather(equation: JaxprEqn, leaf: Special, indices: Array) -> Array | None:
    """Rows of an embedding, by integer indices: these are never quantized."""
    # A matmul would check the weight; nothing else here does.
    leaf.value.tensor.check(leaf.path)
    if not gathers_rows(equation, leaf.value, indices):
        return None
    return gathered(equation, leaf.value, indices)


# Movements ----------------------------------------------------------------------------------------


@WEIGHT_RULES.register(("transpose",), WEIGHTS)
def _transpose(equation: JaxprEqn, leaf: Special) -> Special | None:
    # Only the order of the logical axes changes: the values stay as matrix units read them.
    tensor = leaf.value.tensor.transpose(equation.params["permutation"])
    return leaf.holding(replace(leaf.value, tensor=tensor))


@WEIGHT_RULES.register(("convert_element_type",), WEIGHTS)
def _convert(equation: JaxprEqn, leaf: Special) -> Special | None:
    """A cast to another float dtype changes what the weight stands for, and none of its arrays."""
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    tensor = replace(leaf.value.tensor, dtype=jnp.dtype(dtype))
    return leaf.holding(replace(leaf.value, tensor=tensor))


@WEIGHT_RULES.register(("slice",), WEIGHTS)
def _slice(equation: JaxprEqn, leaf: Special) -> Special | None:
    """Part of the outputs, or of a stack of matrices; never part of the contracted channels."""
    return leaf.holding(sliced(leaf.value, slices_of(equation)))


@WEIGHT_RULES.register(("reshape", "squeeze", "broadcast_in_dim"), WEIGHTS)
def _reshape(equation: JaxprEqn, leaf: Special) -> Special | None:
    """reshape, squeeze, and the broadcast_in_dim that only adds axes of size 1."""
    result: Any = equation.outvars[0].aval
    repeats = math.prod(result.shape) != math.prod(leaf.value.shape)
    if repeats or not _keeps_order(equation):
        return None
    return leaf.holding(reshaped(leaf.value, result.shape))


def _keeps_order(equation: JaxprEqn) -> bool:
    """Whether a reshape, squeeze or broadcast_in_dim has its elements in the operand's order."""
    if equation.primitive.name == "reshape":
        return equation.params["dimensions"] is None
    axes = list(equation.params.get("broadcast_dimensions", ()))
    return axes == sorted(axes)


# Multiples: what the outputs are multiplied with belongs to the weight's scale. Masks: a zero is a
# code ---------------------------------------------------------------------------------------------


@WEIGHT_RULES.register(("neg",), WEIGHTS)
def _negate(equation: JaxprEqn, leaf: Special) -> Special:
    return Special(leaf.path, leaf.value.times(-1.0))


@WEIGHT_RULES.register(("mul",), WEIGHTS, asks=True)
def _multiply(
    equation: JaxprEqn, lhs: Any, rhs: Any, *, known: Sequence[Any]
) -> Any:
    """A weight times a number, a number for each output, or a mask, on either side; its square.

    None where the weight is broadcast.
    """
    if lhs is rhs:
        return measure(equation, lhs, rhs)
    leaf, other, values = lhs, rhs, known[1]
    if not isinstance(lhs, Special):
        leaf, other, values = rhs, lhs, known[0]
    if _repeats(equation, leaf):
        return None
    weight = leaf.value
    factor = _factor(weight, other, values)
    if factor is not None:
        return leaf.holding(weight.times(factor))
    return leaf.holding(weight.where(other != 0) if is_mask(values) else None)


@WEIGHT_RULES.register(("select_n",), WEIGHTS, asks=True)
def _select(
    equation: JaxprEqn, which: Any, *cases: Any, known: Sequence[Any]
) -> Any:
    """A weight where an array says so, and zeros elsewhere."""
    are_zeros = [holds_only(values, 0) for values in known[1:]]
    if isinstance(which, Special) or are_zeros.count(False) > 1:
        return None
    number = are_zeros.index(False)
    leaf = cases[number]
    mask = which == jnp.asarray(number, jnp.result_type(which))
    return leaf.holding(leaf.value.where(mask))


@WEIGHT_RULES.register(("div",), WEIGHTS, asks=True)
def _divide(
    equation: JaxprEqn, weight: Any, divisor: Any, *, known: Sequence[Any]
) -> Any:
    """A weight divided by a number, or one for each output; nothing is divided by a weight."""
    factor = None
    if isinstance(weight, Special):
        factor = _factor(weight.value, divisor, known[1])
    if factor is None or _repeats(equation, weight):
        return None
    return weight.holding(weight.value.times(1 / factor))


def _repeats(equation: JaxprEqn, leaf: Special) -> bool:
    """Whether the weight is broadcast: the result has another shape."""
    result: Any = equation.outvars[0].aval
    return result.shape != leaf.value.shape


def _factor(weight: QuantWeight, x: Any, values: Any) -> Any:
    """The number that an operand is or is filled with, or one for each output; else None.

    Example: of a weight (in, out) = (16, 12) a factor of shape (1, 12) is one for each output. One
    of (16, 1) is none, because the channels are summed before the scale is multiplied.
    """
    number = number_in(values)
    if number is not None:
        return jnp.reshape(number, ())
    if isinstance(x, Special):
        return None
    if jnp.size(x) == 1:
        return jnp.reshape(x, ())
    of_channels = weight.tensor.as_stored(jnp.shape(x))[-weight.contracted :]
    return x if math.prod(of_channels) == 1 else None


# The rest -----------------------------------------------------------------------------------------
# Barriers take several values at once, some of them no leaves, so they are no copies of one.

WEIGHT_RULES.register(("conv_general_dilated",), WEIGHTS)(convolve)
WEIGHT_RULES.register((*COPIES, *RESHARDINGS), WEIGHTS)(copy)
WEIGHT_RULES.register(("optimization_barrier",), WEIGHTS)(barrier)
WEIGHT_RULES.register(RETYPINGS, WEIGHTS)(pvary)
