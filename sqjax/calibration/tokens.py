"""Which tokens an activation's elements come from: a padding mask, followed through a program.

`calibrate(mask=...)` says of the inputs which of their tokens are padding. Deep in the program the
same tokens stand elsewhere: in other axes, in one row, sorted by expert, in windows. So the mask is
followed from the inputs on, as a *mark* beside every value: int8, one number an element,

    NOTHING  no token has flowed in: a constant, a leaf, an empty place of an expert's buffer,
    REAL     tokens that count,
    PADDING  padding.

A mark has size 1 along the axes along which it does not vary. Example: x of shape (2, 7, 16) with a
mask of shape (2, 7) has a mark of shape (2, 7, 1). Three rules make most of the table below:

- What moves elements (transpose, gather, sort, scatter ...) moves their marks in the same way.
- What computes an element from those at its place marks it by the largest of their marks: a score
  of a real query with a padded key is padding.
- What sums over elements (reductions, matmuls) gives REAL where something real was summed: a mean
  over the tokens of an example counts.

Where a primitive is not known the mark is `Lost`, and the sites behind it count every token. Beside
an operand that has a mask, one whose mark is `Lost` says nothing: x + conv(x) has the mark of x.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sqjax.calibration.token_rules import (
    PADDING,
    REAL,
    RULES,
    Call,
    is_boolean,
)
from sqjax.program.equations import Equation, Var
from sqjax.program.facts import Program
from sqjax.program.marks import Mark
from sqjax.program.primitives import IDENTITIES, REDUCTIONS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lost:
    """The mark of what is made of tokens in a way that is not followed; `reason` says where."""

    reason: str = field(metadata={"static": True})


def mark_inputs(program: Program, mask: Array) -> dict[Var, Array]:
    """Marks of the inputs whose axes begin with the mask's, or that hold its tokens in one row.

    Example: a mask of shape (2, 7) marks token ids (2, 7), embeddings (2, 7, 16) and rows (14, 16).

    Raises:
        ValueError: there is no such input.
    """
    codes = jnp.where(mask, jnp.int8(REAL), jnp.int8(PADDING))
    marks = {}
    shapes = []
    for var in program.inputs:
        if var in program.leaves:
            continue
        shape = program.shape(var)
        shapes.append(shape)
        of_input = codes
        # Else the tokens may be in one row, as for a model without a batch axis: (14, 16) for (2,
        # 7).
        if shape[: mask.ndim] != mask.shape:
            if shape[:1] != (mask.size,):
                continue
            of_input = codes.reshape(mask.size)
        ones = (1,) * (len(shape) - of_input.ndim)
        marks[var] = of_input.reshape(of_input.shape + ones)
    if not marks:
        raise ValueError(
            f"calibrate: the mask of shape {mask.shape} fits none of the inputs, of shapes "
            f"{shapes}: expected the first axes of one of them, as they are in the batch (time "
            "first, where the batch is), because tokens are followed from the inputs on"
        )
    return marks


def counts(x: Array, mark: Mark) -> Array | None:
    """Which elements of an activation count: booleans that broadcast against it; None for all."""
    return None if not _is_array(mark) else mark != PADDING


def _is_array(mark: Mark) -> bool:
    return hasattr(mark, "shape")


class Follower:
    """How marks pass through the equations of one program: the `Follow` of `evaluate`."""

    def __init__(self, program: Program):
        self._program = program
        self._sparse = _sparse(program)

    def __call__(
        self,
        equation: Equation,
        operands: Sequence[Any],
        results: Sequence[Any],
        marks: Sequence[Mark],
    ) -> Sequence[Mark]:
        """The marks of an equation's results."""
        outputs = equation.outputs
        if not any(map(_is_array, marks)):
            # No operand has a mask: Lost if one of them is, else None.
            first = next(filter(None, marks), None)
            return [first] * len(outputs)
        call = Call(self._program, self._sparse, equation, operands, results)
        rule = RULES.get(equation.name)
        # An operand that was followed decides for one that is Lost, because after a residual
        # connection around what is not known the tokens are still those of the connection.
        known = [m if _is_array(m) else None for m in marks]
        made = None if rule is None else rule(call, known)
        if made is None:
            lost_here = Lost(f"{equation} is not followed")
            return [lost_here] * len(outputs)
        return made


def _sparse(program: Program) -> frozenset[Var]:
    """Variables that choose: 0 where a token is not meant, as one-hot rows and masks are."""
    sparse: set[Var] = set()
    for equation in program.equations:
        given = [
            v in sparse or is_boolean(program, v) for v in equation.variables
        ]
        # A product is 0 where one factor is, but a matmul only where both choose: a one-hot row
        # times activations is a sum of these, and says nothing of which tokens are meant.
        chosen = {
            "mul": any(given),
            "dot_general": len(given) == 2 and all(given),
            "select_n": any(map(program.is_zero, equation.inputs[1:])),
        }
        passes = equation.name in _PASS_ZEROS and any(given[:1])
        if chosen.get(equation.name, passes):
            sparse.update(equation.outputs)
    return frozenset(sparse)


_PASS_ZEROS = {
    *IDENTITIES,
    *REDUCTIONS,
    "convert_element_type",
    "transpose",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "slice",
}
