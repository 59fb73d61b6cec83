"""The integer matmul of rows with a weight, that of two activations, and their int32 bound.

Other integer products stand where their operands are made: of experts in `weight_products`, of a
few rows in groups in `group_products`, of kernels in `convolution`, on GPUs in `triton` and
`mosaic`, with a quantized cache in `sqjax.runtime.cache_rules` and `sqjax.models.attention`.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, Shaped

from sqjax._shapes import entries_at, other_axes, sizes_along
from sqjax.numerics.formats import (
    INT4,
    absmax,
    scale_from_absmax,
    shared_scale,
    to_format,
)

#: The longest contraction whose int32 sum of products of two int8 in [-127, 127] cannot overflow.
LONGEST_CONTRACTION = (2**31 - 1) // 127**2

#: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)), as `lax.dot_general` takes them.
DimensionNumbers = tuple[tuple[Any, Any], tuple[Any, Any]]
#: Both operands are contracted along their last axis: x (rows, inner) with W (outputs, inner).
LAST_AXES = (((1,), (1,)), ((), ()))


def narrow_dot(
    q: Shaped[Array, "rows inner"],
    codes: Shaped[Array, "first last"],
    summed: int = 1,
) -> Shaped[Array, "rows outputs"]:
    """q @ codes.T: int8 x int8 -> int32, or float8 x float8 -> float32.

    With summed=0, the axis of the codes that is summed over, it is q @ codes, and the codes need no
    transpose before.

    int4 codes become int8 first, because no platform multiplies int8 with int4. A few rows have
    programs of their own on a CPU: see `_of_few_rows`. A single row has one on an NVIDIA GPU: int4
    codes are multiplied in int32, because XLA:GPU does not compile such a product by way of int8
    for sm_80.
    """
    dimensions = (((1,), (summed,)), ((), ()))
    if jnp.issubdtype(q.dtype, jnp.floating):
        return lax.dot_general(
            q, codes, dimensions, preferred_element_type=jnp.float32
        )

    def dot(q, codes):
        codes = codes.astype(jnp.int8)
        return lax.dot_general(
            q, codes, dimensions, preferred_element_type=jnp.int32
        )

    def dot_in_int32(q, codes):
        return lax.dot_general(
            q.astype(jnp.int32), codes.astype(jnp.int32), dimensions
        )

    rows = q.shape[0]
    # A symbolic number of rows, as `jax.export` may have it, may be large.
    if not isinstance(rows, int) or not 1 <= rows <= _FEW_ROWS:
        return dot(q, codes)
    on_gpu = dot_in_int32 if rows == 1 and codes.dtype == INT4.dtype else dot
    on_cpu = partial(_of_few_rows, summed=summed)
    return lax.platform_dependent(
        q, codes, cpu=on_cpu, cuda=on_gpu, default=dot
    )


#: Up to so many rows XLA:CPU multiplies faster with the weight as the first operand.
_FEW_ROWS = 8
#: It computes as many rows in the time of one.
_AT_ONCE = 4


def _of_few_rows(
    q: Int8[Array, "rows inner"],
    codes: Shaped[Array, "first last"],
    summed: int,
) -> Int32[Array, "rows outputs"]:
    """`narrow_dot` for XLA:CPU, the weight as the first operand.

    A single row is computed several times, because XLA:CPU runs an int8 matrix-vector product
    without its vector units.
    """
    rows = q.shape[0]
    q = jnp.pad(q, ((0, max(_AT_ONCE - rows, 0)), (0, 0)))
    return codes_first(q, codes, summed)[:, :rows].T


def codes_first(
    q: Int8[Array, "rows inner"],
    codes: Shaped[Array, "first last"],
    summed: int = 1,
) -> Int32[Array, "outputs rows"]:
    """codes @ q.T, which for a few rows XLA:CPU computes faster than q @ codes.T.

    Because it packs the second operand anew for every product, which takes longer than the product
    of a few rows itself. The barrier keeps XLA from exchanging the operands again.
    """
    dimensions = (((summed,), (1,)), ((), ()))
    sums = lax.dot_general(
        codes.astype(jnp.int8), q, dimensions, preferred_element_type=jnp.int32
    )
    return lax.optimization_barrier(sums)


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
    (l_axes, r_axes), batch = dimensions
    # The dimensions of the same product with its sides exchanged.
    mirrored = (r_axes, l_axes), batch[::-1]
    l_codes, l_scale = _quantized(
        _only_read(lhs, rhs, dimensions), l_axes, granularity
    )
    r_codes, r_scale = _quantized(
        _only_read(rhs, lhs, mirrored), r_axes, granularity
    )
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
    of_rows = absmax(x, tuple(contracted))
    scales = {"per_token": scale_from_absmax, "per_tensor": shared_scale}
    finite = jnp.isfinite(of_rows)
    scale = jnp.where(finite, scales[granularity](of_rows), jnp.nan)
    return to_format(x, scale), scale


def _only_read(x: Array, other: Array, dimensions: DimensionNumbers) -> Array:
    """x with 0 in place of what meets nothing but zeros in `other`; NaN stays.

    The product stays as it was. But the values of padding tokens, whose weights are all 0, do not
    make the others' scale coarser.
    """
    (_, axes), (_, batch) = dimensions
    free = other_axes(other.ndim, axes, batch)
    read = jnp.any(jnp.abs(other) > 0, axis=free, keepdims=True)
    read = beside_lhs(read, x.ndim, dimensions)
    return jnp.where(read | jnp.isnan(x), x, jnp.zeros((), x.dtype))


def beside_lhs(of_rhs: Array, rank: int, dimensions: DimensionNumbers) -> Array:
    """Numbers of rhs in a shape that broadcasts against lhs, each axis where lhs has its partner.

    For values v: (batch, slots, heads, 16) with scales (batch, slots, heads, 1), and as lhs the
    weights (batch, heads, queries, slots) of "bhqk,bkhd->bhqd", the scales become (batch, heads, 1,
    slots).

    Args:
        of_rhs: of rhs's rank, and of size 1 along its free axes.
        rank: of lhs.
        dimensions: of the product of lhs and rhs.
    """
    (l_axes, r_axes), (l_batch, r_batch) = dimensions
    of_lhs = (*l_axes, *l_batch)
    partner = dict(zip(of_lhs, (*r_axes, *r_batch), strict=True))
    in_order_of_lhs = entries_at(partner, sorted(partner))
    free = other_axes(of_rhs.ndim, r_axes, r_batch)
    moved = of_rhs.transpose(*in_order_of_lhs, *free)
    moved = moved.reshape(moved.shape[: len(in_order_of_lhs)])
    return jnp.expand_dims(moved, other_axes(rank, of_lhs))


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
    # The result has the batch axes, then the free ones of lhs, then those of rhs.
    l_ones = (1,) * (of_lhs.ndim - batch)
    r_ones = (1,) * (of_rhs.ndim - batch)
    return [
        of_lhs.reshape(*of_lhs.shape, *r_ones),
        of_rhs.reshape(*of_rhs.shape[:batch], *l_ones, *of_rhs.shape[batch:]),
    ]


def _batch_first(scale: Array, batch: Any, contracted: Any) -> Array:
    """A scale with the batch axes first, then the free ones, without the contracted ones."""
    free = other_axes(scale.ndim, batch, contracted)
    kept = [*batch, *free]
    moved = scale.transpose(*kept, *contracted)
    return moved.reshape(sizes_along(scale.shape, kept))
