"""Rules that quantized weights and quantized caches share, and steps of their rules."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import AxisType
from jaxtyping import Array

from sqjax.numerics.dots import DimensionNumbers
from sqjax.program.registry import Special
from sqjax.program.subprograms import emit


def copy(equation: JaxprEqn, leaf: Special) -> Special:
    """The leaf itself: the equation changes no number, shape or dtype."""
    return leaf


def barrier(equation: JaxprEqn, *operands: Any) -> list[Any]:
    """An optimization_barrier: it stands before the arrays of quantized values too."""
    return list(lax.optimization_barrier(operands))


def slices_of(equation: JaxprEqn) -> list[slice]:
    """What a `slice` equation takes of each axis: [slice(1, 2, 1), slice(0, 8, 1)] of w[1:2]."""
    starts, limits = (
        equation.params["start_indices"],
        equation.params["limit_indices"],
    )
    strides = equation.params["strides"] or (1,) * len(starts)
    return [
        slice(*bounds) for bounds in zip(starts, limits, strides, strict=True)
    ]


def pvary(equation: JaxprEqn, leaf: Special) -> Special:
    """The same values on every device of a shard_map, whose type now says that they may differ."""
    return jax.tree.map(lambda x: emit(equation, x)[0], leaf)


def sharded_as_the_result(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, run where the compiler shards arrays as it likes; its result as the equation says.

    This is for meshes with explicit axes. There every step of the rule would have to say how its
    result is sharded, because the types of arrays say so, and an int8 matmul has many steps.
    """

    @functools.wraps(rule)
    def run(equation, *operands):
        result: Any = equation.outvars[0].aval
        if AxisType.Explicit not in result.sharding.mesh.axis_types:
            return rule(equation, *operands)
        of_arrays = functools.partial(rule, equation)
        return jax.sharding.auto_axes(of_arrays, out_sharding=result.sharding)(
            *operands
        )

    return run


def on_either_side(
    equation: JaxprEqn,
    lhs: Any,
    rhs: Any,
    product: Callable[[Array, Special, DimensionNumbers], Array | None],
) -> Array | None:
    """A `dot_general` of an array and a leaf, whichever side the leaf is on.

    `product(array, leaf, dimension_numbers)` is asked for the product with the leaf on the right.
    Where the equation has the leaf on the left, the axes of that product are put in its order: the
    result of a `dot_general` has the batch axes, then the free axes of its left operand, then those
    of its right one. So for w @ x with w: (out, in) and x: (in, tokens) the product is (tokens,
    out) and the result (out, tokens).

    None where both are leaves, or `product` gives None.
    """
    if isinstance(lhs, Special) and isinstance(rhs, Special):
        return None
    (l_axes, r_axes), (l_batch, r_batch) = equation.params["dimension_numbers"]
    if isinstance(rhs, Special):
        out = product(lhs, rhs, ((l_axes, r_axes), (l_batch, r_batch)))
    else:
        out = product(rhs, lhs, ((r_axes, l_axes), (r_batch, l_batch)))
    if out is None:
        return None
    if isinstance(lhs, Special):
        # From (batch, free of rhs, free of lhs) to (batch, free of lhs, free of rhs).
        batch = len(l_batch)
        free = lhs.value.ndim - len(l_axes) - batch
        out = jnp.moveaxis(out, range(-free, 0), range(batch, batch + free))
    result: Any = equation.outvars[0].aval
    return out.astype(result.dtype)
