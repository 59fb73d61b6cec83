"""The kinds of quantized values that a program may meet.

A quantized weight is a parameter: a `Special` that holds a `QuantWeight`. A quantized cache is an
array among the other arguments: a `Special` that holds a `QTensor`. Weights that the function has
concatenated are a `Special` that holds a `JoinedWeight`; one to which it has added an array is a
`Special` that holds a `SummedWeight`; powers of one, for its norm, a `MeasuredWeight`. Here stands
what becomes of these where they enter or leave a program, a loop or a shard_map. What each
primitive does to them is in `weight_rules`, `cache_rules`, `joined_weights`, `summed_weights` and
`norms`.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec
from jaxtyping import Array

from sqjax.program.registry import Kind, Special, specials_among
from sqjax.program.subprograms import shard_map_in, source_of
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.sharding import check_groups, check_rotation, weight_specs

# Weights ------------------------------------------------------------------------------------------


def refuse_weight(equation: JaxprEqn, *operands: Any) -> Any:
    """Raises ValueError: there is no rule for a quantized weight here."""
    leaf, *_ = specials_among(operands)
    raise ValueError(
        f"{leaf.path}: quantized, but `{equation.primitive.name}` at {source_of(equation)} has no "
        "rule for quantized values; keep this leaf in float with a rule of None: "
        f"quantize(params, stats, {{{leaf.path!r}: None, ...}})"
    )


def _weight_slices(equation: JaxprEqn, leaf: Special, length: int) -> Special:
    """A stack of matrices, over which a scan runs, with an entry for each step in every array.

    For example a stack (3, 16, 8) may have one scale for all its layers, stored as (1, 1, 1). A
    scan can not slice that, so it becomes (3, 1, 1).
    """
    tensor = leaf.value.tensor
    # The scan slices the first axis of every array, so the steps must be stored first.
    if tensor.axes[0] != 0 or tensor.scale.shape[0] == 0:
        return refuse_weight(equation, leaf)

    def for_each_step(scales: Array) -> Array:
        return jnp.broadcast_to(scales, (length, *scales.shape[1:]))

    tensor = tensor.map_scales(for_each_step)
    return Special(leaf.path, replace(leaf.value, tensor=tensor))


def _weight_specs(
    equation: JaxprEqn, leaf: Special, spec: PartitionSpec
) -> Special:
    """The PartitionSpecs of a weight's arrays in a shard_map, given that of the float leaf."""
    weight = leaf.value
    specs = weight_specs(weight, spec, leaf.path)
    along_channels = specs.tensor.values[weight.ndim - weight.contracted :]
    # Outlier channels are counted from the first channel of the whole leaf, not of a block.
    if weight.outliers is not None and any(along_channels):
        raise ValueError(
            f"{leaf.path}: has outlier channels, which need all of its channels on a device, but "
            f"the shard_map at {source_of(equation)} shards the channels by {spec}; shard the "
            "outputs, or give this site a scheme without outliers"
        )
    shards = shard_map_in(equation)
    sizes = {} if shards is None else shards.sizes
    check_groups(leaf.value, specs, sizes, leaf.path)
    check_rotation(leaf.value, specs, sizes, leaf.path)
    return Special(leaf.path, specs)


def _refuse_returned_weight(leaf: Special) -> Any:
    raise ValueError(
        f"{leaf.path}: fn returns this quantized leaf; keep it in float with a rule of None"
    )


WEIGHTS = Kind(
    QuantWeight,
    otherwise=refuse_weight,
    slices=_weight_slices,
    specs=_weight_specs,
    carry=refuse_weight,
    leave=_refuse_returned_weight,
)

# Concatenated weights -----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JoinedWeight:
    """Weights that the function has concatenated: each stays what it is, and is multiplied alone.

    Attributes:
        pieces: arrays, and leaves that hold quantized weights, in order.
        axis: the logical axis along which they are concatenated.
    """

    pieces: tuple[Any, ...]
    axis: int = field(metadata={"static": True})


def _refuse_slices(equation: JaxprEqn, leaf: Special, length: int) -> Any:
    return refuse_weight(equation, leaf)


def _refuse_weight_specs(
    equation: JaxprEqn, leaf: Special, spec: PartitionSpec
) -> Any:
    return refuse_weight(equation, leaf)


JOINED = Kind(
    JoinedWeight,
    otherwise=refuse_weight,
    slices=_refuse_slices,
    specs=_refuse_weight_specs,
    carry=refuse_weight,
    leave=_refuse_returned_weight,
)

# Weights to which something is added --------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SummedWeight:
    """A weight plus arrays of its shape, as LoRA's w + a @ b: each term is multiplied alone.

    Attributes:
        terms: a leaf that holds a quantized weight, and arrays, in any order.
    """

    terms: tuple[Any, ...]

    def map(
        self, of_weight: Callable[..., Any], of_array: Callable[..., Any]
    ) -> "SummedWeight":
        """The sum with each term changed by one of two functions."""
        changed = [
            of_weight(term) if isinstance(term, Special) else of_array(term)
            for term in self.terms
        ]
        return SummedWeight(tuple(changed))

    def dequantize(self) -> Array:
        """The float array that it stands for."""
        floats = self.map(lambda term: term.value.dequantize(), jnp.asarray)
        return functools.reduce(operator.add, floats.terms)


def _summed_slices(equation: JaxprEqn, leaf: Special, length: int) -> Special:
    """A scan runs over every term: a slice of the sum is the sum of the slices."""

    def of_weight(term: Special) -> Any:
        return _weight_slices(equation, term, length)

    return Special(leaf.path, leaf.value.map(of_weight, lambda term: term))


def _summed_specs(
    equation: JaxprEqn, leaf: Special, spec: PartitionSpec
) -> Special:
    """Every term is sharded as the sum is."""

    def of_weight(term: Special) -> Any:
        return _weight_specs(equation, term, spec)

    return Special(leaf.path, leaf.value.map(of_weight, lambda term: spec))


SUMMED = Kind(
    SummedWeight,
    otherwise=refuse_weight,
    slices=_summed_slices,
    specs=_summed_specs,
    carry=refuse_weight,
    leave=_refuse_returned_weight,
)

# Weights on the way to a norm ---------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeasuredWeight:
    """Powers or magnitudes of a weight's floats: only a sum or a maximum of them is an array.

    Attributes:
        floats: an array of the weight's shape.
    """

    floats: Any

    def dequantize(self) -> Array:
        """The float array itself."""
        return self.floats


MEASURED = Kind(
    MeasuredWeight,
    otherwise=refuse_weight,
    slices=_refuse_slices,
    specs=_refuse_weight_specs,
    carry=refuse_weight,
    leave=_refuse_returned_weight,
)

# Caches -------------------------------------------------------------------------------------------


def is_cache(x: Any) -> bool:
    """Whether this is a leaf that stands for a quantized argument."""
    return isinstance(x, Special) and isinstance(x.value, QTensor)


def refuse_cache(equation: JaxprEqn, *operands: Any) -> Any:
    """Raises ValueError: there is no rule for a quantized argument here."""
    leaves = specials_among(operands)
    weights = list(filterfalse(is_cache, leaves))
    if weights:
        return refuse_weight(equation, *weights)
    leaf = leaves[0]
    raise ValueError(
        f"{leaf.path}: a quantized argument, but `{equation.primitive.name}` at "
        f"{source_of(equation)} has no rule for quantized values; keep this array in float"
    )


def _cache_slices(equation: JaxprEqn, leaf: Special, length: int) -> Special:
    """A stack of caches, over which a scan runs, with a scale for each step."""
    scale = leaf.value.scale
    scale = jnp.broadcast_to(scale, (length, *scale.shape[1:]))
    return Special(leaf.path, replace(leaf.value, scale=scale))


def _refuse_specs(
    equation: JaxprEqn, leaf: Special, spec: PartitionSpec
) -> Any:
    return refuse_cache(equation, leaf)


def _stay_in_loop(equation: JaxprEqn, leaf: Special) -> Special:
    return leaf


def _stay(leaf: Special) -> Special:
    return leaf


CACHES = Kind(
    QTensor,
    otherwise=refuse_cache,
    slices=_cache_slices,
    specs=_refuse_specs,
    carry=_stay_in_loop,
    leave=_stay,
)
