"""The integer matmuls that every quantized product ends in, and their int32 bound."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Shaped

from sqjax.numerics.formats import INT4, scale_from_absmax, to_format

#: The longest contraction whose int32 sum of products of two int8 in [-127, 127] cannot overflow.
LONGEST_CONTRACTION = (2**31 - 1) // 127**2

#: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)), as `lax.dot_general` takes them.
DimensionNumbers = tuple[tuple[Any, Any], tuple[Any, Any]]
#: Both operands are contracted along their last axis: x (rows, inner) with W (outputs, inner).
LAST_AXES = (((1,), (1,)), ((), ()))


def narrow_dot(
    q: Shaped[Array, "rows inner"], codes: Shaped[Array, "outputs inner"]
) -> Shaped[Array, "rows outputs"]:
    """q @ codes.T: int8 x int8 -> int32, or float8 x float8 -> float32.

    int4 codes become int8 first, because no platform multiplies int8 with int4. A single row has
    programs of its own: on a CPU it is computed twice, because XLA:CPU runs an int8 matrix-vector
    product without its vector units, and two rows take less time than one; on an NVIDIA GPU int4
    codes are multiplied in int32, because XLA:GPU does not compile such a product by way of int8
    for sm_80.
    """
    floating = jnp.issubdtype(q.dtype, jnp.floating)
    kind = jnp.float32 if floating else jnp.int32

    def dot(q, codes):
        codes = codes if floating else codes.astype(jnp.int8)
        return lax.dot_general(q, codes, LAST_AXES, preferred_element_type=kind)

    def dot_of_two_rows(q, codes):
        return dot(jnp.concatenate([q, q]), codes)[:1]

    def dot_in_int32(q, codes):
        return lax.dot_general(
            q.astype(jnp.int32), codes.astype(jnp.int32), LAST_AXES
        )

    if q.shape[0] != 1 or floating:
        return dot(q, codes)
    on_gpu = dot_in_int32 if codes.dtype == INT4.dtype else dot
    return lax.platform_dependent(
        q, codes, cpu=dot_of_two_rows, cuda=on_gpu, default=dot
    )


# Products of two activations ----------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def int8_dot(
    dimensions: DimensionNumbers,
    granularity: Literal["per_token", "per_tensor"],
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
) -> Float[Array, "..."]:
    """`lax.dot_general` of two float arrays, both quantized here; the result is float32.

    out = (q_l . q_r) * scale_l * scale_r, the sum in int32. The derivative is that of the float
    product (straight-through, Bengio et al. 2013).

    Args:
        dimensions: as `lax.dot_general` takes them.
        granularity: "per_token": a scale for every index of the axes that are not summed over;
            "per_tensor": one for each operand.
        lhs, rhs: float arrays. Their contraction must be no longer than `LONGEST_CONTRACTION`.
    """
    (l_axes, r_axes), _ = dimensions
    l_codes, l_scale = _quantized(lhs, l_axes, granularity)
    r_codes, r_scale = _quantized(rhs, r_axes, granularity)
    sums = lax.dot_general(
        l_codes, r_codes, dimensions, preferred_element_type=jnp.int32
    )
    of_lhs, of_rhs = aligned(l_scale, r_scale, dimensions)
    return sums.astype(jnp.float32) * of_lhs * of_rhs


@int8_dot.defjvp
def _straight_through(dimensions, granularity, primals, tangents):
    """The derivative of the float product, because that of rounding is 0 almost everywhere."""

    def dot(x, y):
        return lax.dot_general(
            x.astype(jnp.float32), y.astype(jnp.float32), dimensions
        )

    (lhs, rhs), (dl, dr) = primals, tangents
    return int8_dot(dimensions, granularity, lhs, rhs), dot(dl, rhs) + dot(
        lhs, dr
    )


def _quantized(
    x: Float[Array, "*s"], contracted: Any, granularity: str
) -> tuple[Int8[Array, "*s"], Float[Array, "..."]]:
    """(int8 codes, scales of size 1 along the contracted axes)."""
    shared = tuple(contracted) if granularity == "per_token" else None
    absmax = jnp.max(jnp.abs(x), axis=shared, keepdims=True, initial=0.0)
    scale = scale_from_absmax(absmax)
    kept = [
        1 if axis in contracted else size for axis, size in enumerate(x.shape)
    ]
    return to_format(x, scale), jnp.broadcast_to(scale, kept)


def aligned(
    lhs_scale: Array, rhs_scale: Array, dimensions: DimensionNumbers
) -> list[Array]:
    """Scales of two operands in shapes that broadcast against the result of their `dot_general`.

    A scale has the rank of its operand, and size 1 along the contracted axes. For q k^T, "bqd,bkd->
    bqk", scales of shapes (b, q, 1) and (b, k, 1) become (b, q, 1) and (b, 1, k).
    """
    (l_contracted, r_contracted), (l_batch, r_batch) = dimensions
    of_lhs = _batch_first(lhs_scale, l_batch, l_contracted)
    of_rhs = _batch_first(rhs_scale, r_batch, r_contracted)
    batch = len(l_batch)
    l_ones = (1,) * (of_lhs.ndim - batch)
    r_ones = (1,) * (of_rhs.ndim - batch)
    return [
        of_lhs.reshape(*of_lhs.shape, *r_ones),
        of_rhs.reshape(*of_rhs.shape[:batch], *l_ones, *of_rhs.shape[batch:]),
    ]


def _batch_first(scale: Array, batch: Any, contracted: Any) -> Array:
    """A scale with the batch axes first, then the free ones, without the contracted ones."""
    free = [a for a in range(scale.ndim) if a not in (*batch, *contracted)]
    kept = [*batch, *free]
    moved = scale.transpose(*kept, *contracted)
    return moved.reshape([scale.shape[a] for a in kept])
