"""What each primitive does to a quantized weight; a primitive without a rule is refused.

A rule is called as rule(equation, *operands), where the weight is a `Leaf` that holds a
`QuantWeight`. It returns an array, or a leaf where the result is a quantized weight still.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax.program.primitives import COPIES, RESHARDINGS
from sqjax.program.registry import Leaf
from sqjax.runtime.embedding_rows import gathered, gathers_rows
from sqjax.runtime.kinds import RULES, WEIGHTS, refuse_weight
from sqjax.runtime.shared_rules import (
    barrier,
    copy,
    on_either_side,
    pvary,
    sharded_as_the_result,
    slices_of,
)
from sqjax.runtime.weight_shapes import reshaped, sliced
from sqjax.weights.dot_general import quantized_dot_general, quantized_ragged_dot
from sqjax.weights.quant_weight import is_quantized


def weight_leaves(paths: Sequence[str], params: Sequence[Any]) -> list[Any]:
    """The parameters as the rules take them: quantized weights as leaves with their paths."""
    pairs = zip(paths, params, strict=True)
    return [Leaf(path, x) if is_quantized(x) else x for path, x in pairs]


# Matmuls ------------------------------------------------------------------------------------------


@RULES.register(("dot_general",), WEIGHTS)
@sharded_as_the_result
def _dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Array:
    """int8 x int8 -> int32 (or as the weight's scheme has it), with the weight on either side."""
    if isinstance(lhs, Leaf) and isinstance(rhs, Leaf):
        return refuse_weight(equation, lhs, rhs)

    def product(x, leaf, dimensions):
        return quantized_dot_general(x, leaf.value, dimensions, leaf.path)

    return on_either_side(equation, lhs, rhs, product)


@RULES.register(("ragged_dot_general",), WEIGHTS)
@sharded_as_the_result
def _ragged_dot(equation: JaxprEqn, lhs: Any, rhs: Any, group_sizes: Any) -> Array:
    """Rows that meet one matrix of a stack each, int8 x int8 -> int32."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    last_with_second = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
    ragged_rows = tuple(numbers.lhs_ragged_dimensions) == (0,)
    if isinstance(lhs, Leaf) or not last_with_second or not ragged_rows:
        return refuse_weight(equation, lhs, rhs, group_sizes)
    result: Any = equation.outvars[0].aval
    out = quantized_ragged_dot(lhs, rhs.value, group_sizes, rhs.path)
    return out.astype(result.dtype)


@RULES.register(("gather",), WEIGHTS)
@sharded_as_the_result
def _gather(equation: JaxprEqn, leaf: Any, indices: Any) -> Array:
    """Rows of an embedding."""
    if not isinstance(leaf, Leaf) or isinstance(indices, Leaf):
        return refuse_weight(equation, leaf, indices)
    leaf.value.tensor.check(leaf.path)
    if not gathers_rows(equation, leaf.value, indices):
        return refuse_weight(equation, leaf, indices)
    return gathered(equation, leaf.value, indices)


# Movements ----------------------------------------------------------------------------------------


@RULES.register(("transpose",), WEIGHTS)
def _transpose(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    tensor = leaf.value.tensor.transpose(equation.params["permutation"])
    return Leaf(leaf.path, replace(leaf.value, tensor=tensor))


@RULES.register(("convert_element_type",), WEIGHTS)
def _convert(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    """A cast to another float dtype changes what the weight stands for, and none of its arrays."""
    dtype = equation.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return refuse_weight(equation, leaf)
    tensor = replace(leaf.value.tensor, dtype=jnp.dtype(dtype))
    return Leaf(leaf.path, replace(leaf.value, tensor=tensor))


@RULES.register(("slice",), WEIGHTS)
def _slice(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    """Part of the outputs, or of a stack of matrices; never part of the contracted channels."""
    weight = sliced(leaf.value, slices_of(equation))
    return refuse_weight(equation, leaf) if weight is None else Leaf(leaf.path, weight)


@RULES.register(("reshape", "squeeze", "broadcast_in_dim"), WEIGHTS)
def _reshape(equation: JaxprEqn, leaf: Leaf) -> Leaf:
    """reshape, squeeze, and the broadcast_in_dim that only adds axes of size 1."""
    result: Any = equation.outvars[0].aval
    weight = None
    if _keeps_order(equation) and math.prod(result.shape) == math.prod(leaf.value.shape):
        weight = reshaped(leaf.value, result.shape)
    return refuse_weight(equation, leaf) if weight is None else Leaf(leaf.path, weight)


def _keeps_order(equation: JaxprEqn) -> bool:
    """Whether a reshape, squeeze or broadcast_in_dim has its elements in the operand's order."""
    if equation.primitive.name == "reshape":
        return equation.params["dimensions"] is None
    axes = list(equation.params.get("broadcast_dimensions", ()))
    return axes == sorted(axes)


RULES.register((*COPIES, *RESHARDINGS), WEIGHTS)(copy)
RULES.register(("optimization_barrier",), WEIGHTS)(barrier)
RULES.register(("pvary",), WEIGHTS)(pvary)
