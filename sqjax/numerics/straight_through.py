"""The derivative of what rounds: that of the float function, because rounding's own is 0 almost
everywhere (straight-through, Bengio et al. 2013, arXiv 1308.3432).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array


def tangent_of(
    in_float: Callable[..., Array],
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> Array:
    """The tangent of `in_float` at the primals.

    It has no terms for arguments whose tangents are a `SymbolicZero`, because a product with zeros
    is computed as any other. Example: of x @ W.T with a W that does not vary it is dx @ W.T.

    Args:
        in_float: a function of these primals.
        primals: its arguments.
        tangents: one for each of them, as `custom_jvp.defjvp(..., symbolic_zeros=True)` gives them.
    """
    varying = [
        place
        for place, tangent in enumerate(tangents)
        if not isinstance(tangent, SymbolicZero)
    ]

    def of_varying(*values: Any) -> Array:
        arguments = dict(enumerate(primals))
        arguments.update(zip(varying, values, strict=True))
        return in_float(*arguments.values())

    values = [primals[place] for place in varying]
    changes = [tangents[place] for place in varying]
    _, tangent = jax.jvp(of_varying, values, changes)
    return tangent
