"""Label arrays for tests: drawn by hypothesis, written out, and moved by one jax primitive."""

import jax
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

SIZES = st.sampled_from([1, 2, 3, 4])
SHAPES = st.lists(SIZES, min_size=1, max_size=4).map(tuple)


@st.composite
def labelled(draw, shapes=SHAPES):
    """(labels of size 1 where they do not vary, the shape they describe); zeros and negative labels
    occur.
    """
    shape = draw(shapes)
    varying = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    small = tuple(n if v else 1 for n, v in zip(shape, varying, strict=True))
    values = st.lists(st.integers(-3, 3), min_size=(size := int(np.prod(small))), max_size=size)
    return np.array(draw(values), np.int64).reshape(small), shape


def full(labels, shape):
    return np.broadcast_to(labels, shape)


def applied(function, *operands):
    """The result of `function`, which must be one equation, and that equation's primitive and
    parameters.
    """
    jaxpr = jax.make_jaxpr(function)(*operands)
    if not jaxpr.eqns:  # jax drops a reshape to the same shape
        assume(False)
    (equation,) = jaxpr.eqns
    outputs = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *operands)
    return equation.primitive.name, equation.params, [np.asarray(x) for x in outputs]
