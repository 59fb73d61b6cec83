"""Norms of weights, as in weight norm: g * v / norm(v) reads v as floats too.

Until they are summed up, or compared, these floats are a `MeasuredWeight` and no array. So nothing
else can read them: a product with v**2 is refused, and does not run in float without a word.
"""

from jax.extend.core import JaxprEqn
from jaxtyping import Array

from sqjax.program.primitives import POWERS, REDUCTIONS
from sqjax.program.registry import Registry, Special
from sqjax.program.subprograms import emit
from sqjax.runtime.kinds import MEASURED, SUMMED, WEIGHTS, MeasuredWeight
from sqjax.runtime.shared_rules import sharded_as_the_result

NORM_RULES = Registry(WEIGHTS, SUMMED, MEASURED)


@NORM_RULES.register(REDUCTIONS, MEASURED)
@sharded_as_the_result
def _of_floats(equation: JaxprEqn, *leaves: Special) -> Array:
    """What an equation makes of the floats that its operands stand for.

    The compiler fuses them into the sum, and the weight's own product stays one of codes.
    """
    floats = [leaf.value.dequantize() for leaf in leaves]
    return emit(equation, *floats)[0]


@NORM_RULES.register(POWERS, WEIGHTS)
@NORM_RULES.register(POWERS, SUMMED)
@NORM_RULES.register((*POWERS, "convert_element_type"), MEASURED)
def measure(equation: JaxprEqn, *leaves: Special) -> Special:
    """Powers or magnitudes of a weight; the product of a weight with itself."""
    first = leaves[0]
    return Special(first.path, MeasuredWeight(_of_floats(equation, *leaves)))
