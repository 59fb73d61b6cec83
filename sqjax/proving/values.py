"""What a variable of a program holds while it runs in a prime field (see `running`)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn

from sqjax.numerics.prime_field import Residues, embed
from sqjax.program.subprograms import source_of


class Field(NamedTuple):
    """An array of floats of which every number is replaced by a residue.

    What depends on no leaf and no input of floats is no `Field` but an array as jax computes it:
    positions, masks, tables of a rotary embedding; and so are integers and booleans always.
    """

    residues: Residues


#: What a variable holds: a `Field`, or an array.
Value = Any

#: What a primitive makes of its operands, of which one is a `Field` at least. The number is the
#: salt of all oracles.
Rule = Callable[[JaxprEqn, Sequence[Value], int], Sequence[Value]]


def residues_of(value: Value) -> Residues:
    """The residues of a `Field`, or those that stand for an array."""
    if isinstance(value, Field):
        return value.residues
    return embed(np.asarray(value))


def factor_of(equation: JaxprEqn, value: Value) -> Residues:
    """The residues of an operand that others are multiplied by.

    Raises:
        ValueError: it is infinity, which stands as 0 elsewhere, and would hide the other factor.
    """
    if not isinstance(value, Field) and np.isinf(np.asarray(value)).any():
        raise unknown(equation, "one with infinity as a factor")
    return residues_of(value)


def unknown(equation: JaxprEqn, why: str = "") -> ValueError:
    """The error about a primitive, or a way to use it, that has no rule."""
    name, line = equation.primitive.name, source_of(equation)
    return ValueError(
        f"prove: `{name}` at {line}: expected a primitive that has a rule in a finite field, got "
        f"{why or 'one that has none'}; calibrate's own proof, by bits, knows all primitives"
    )
