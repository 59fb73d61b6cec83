"""The integer matmul that every quantized product ends in, and its int32 bound."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from sqjax.numerics.formats import INT4

#: The longest contraction whose int32 sum of products of two int8 in [-127, 127] cannot overflow.
LONGEST_CONTRACTION = (2**31 - 1) // 127**2
LAST_AXES = (((1,), (1,)), ((), ()))


def narrow_dot(
    q: Shaped[Array, "rows inner"], codes: Shaped[Array, "outputs inner"]
) -> Shaped[Array, "rows outputs"]:
    """int8 x int8 -> int32, or float8 x float8 -> float32; int4 codes become int8 first."""
    floating = jnp.issubdtype(q.dtype, jnp.floating)
    kind = jnp.float32 if floating else jnp.int32

    def dot(q, codes):
        codes = codes if floating else codes.astype(jnp.int8)
        return lax.dot_general(q, codes, LAST_AXES, preferred_element_type=kind)

    def dot_of_two_rows(q, codes):
        return dot(jnp.concatenate([q, q]), codes)[:1]

    def dot_in_int32(q, codes):
        return lax.dot_general(q.astype(jnp.int32), codes.astype(jnp.int32), LAST_AXES)

    if q.shape[0] != 1 or floating:
        return dot(q, codes)
    # XLA:CPU runs an int8 matrix-vector product without its vector units: two rows take less time than one. XLA:GPU
    # does not compile one of int4 by way of int8 for sm_80.
    on_gpu = dot_in_int32 if codes.dtype == INT4.dtype else dot
    return lax.platform_dependent(q, codes, cpu=dot_of_two_rows, cuda=on_gpu, default=dot)
