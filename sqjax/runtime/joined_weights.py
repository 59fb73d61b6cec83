"""Weights that the function concatenates: x @ [a, b] runs as [x @ a, x @ b].

So each piece keeps its own scheme, scales and smoothing, and a piece may be float.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax._shapes import other_axes
from sqjax.program.primitives import KEEP_JOINED
from sqjax.program.registry import Registry, Special, specials_among
from sqjax.program.subprograms import emit
from sqjax.runtime.kinds import JOINED, WEIGHTS, JoinedWeight, refuse_weight
from sqjax.runtime.weight_rules import WEIGHT_RULES
from sqjax.weights.quant_weight import QuantWeight

JOINED_RULES = Registry(WEIGHTS, JOINED)


@JOINED_RULES.register(("concatenate",), WEIGHTS)
def _concatenate(equation: JaxprEqn, *pieces: Any) -> Special | None:
    axis = equation.params["dimension"]
    leaves = specials_among(pieces)
    if not all(isinstance(leaf.value, QuantWeight) for leaf in leaves):
        return None
    return Special(leaves[0].path, JoinedWeight(pieces, axis))


@JOINED_RULES.register(KEEP_JOINED, JOINED)
def _of_each(equation: JaxprEqn, leaf: Special) -> Special:
    """A cast or a transpose, of each piece alone."""
    joined = leaf.value
    axis = joined.axis
    if equation.primitive.name == "transpose":
        axis = equation.params["permutation"].index(axis)
    pieces = tuple(map(partial(_alone, equation), joined.pieces))
    return Special(leaf.path, JoinedWeight(pieces, axis))


@JOINED_RULES.register(("dot_general",), JOINED)
def _dot(equation: JaxprEqn, lhs: Any, rhs: Any) -> Array | None:
    """The product with each piece, side by side where its outputs are in the result.

    Example: x of (tokens, 8) with [q, k] of (8, 4 + 2), along the axis 1: products of (tokens, 4)
    and (tokens, 2), along the axis 1 of the result.
    """
    (contracted, batch) = equation.params["dimension_numbers"]
    me = 0 if _is_joined(lhs) else 1
    leaf, other = (lhs, rhs)[me], (lhs, rhs)[1 - me]
    gone = (*contracted[me], *batch[me])
    if isinstance(other, Special) or leaf.value.axis in gone:
        return None
    free = other_axes(_rank(leaf), gone)
    before = len(batch[0])  # of its free axes, in the result
    if me == 1:
        before += jnp.ndim(lhs) - len(contracted[0]) - len(batch[0])
    products = []
    for piece in leaf.value.pieces:
        operands = (piece, other) if me == 0 else (other, piece)
        products.append(_alone(equation, *operands))
    return jnp.concatenate(products, before + free.index(leaf.value.axis))


def _is_joined(x: Any) -> bool:
    return isinstance(x, Special) and isinstance(x.value, JoinedWeight)


def _rank(leaf: Special) -> int:
    """How many axes the concatenated weight has: as many as each piece."""
    piece = leaf.value.pieces[0]
    return piece.value.ndim if isinstance(piece, Special) else jnp.ndim(piece)


def _alone(equation: JaxprEqn, *operands: Any) -> Any:
    """The equation on one piece: by its rule where that is quantized."""
    if not specials_among(operands):
        return emit(equation, *operands)[0]
    result = WEIGHT_RULES.rule(equation, operands).run(equation, *operands)
    return refuse_weight(equation, *operands) if result is None else result
