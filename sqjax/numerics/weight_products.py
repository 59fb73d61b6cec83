"""The products of activations with one quantized weight matrix, on plain arrays."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from sqjax.numerics.digits import three_digits
from sqjax.numerics.dots import LAST_AXES, LONGEST_CONTRACTION, narrow_dot
from sqjax.numerics.formats import (
    FORMATS,
    Format,
    FormatName,
    absmax_of_rows,
    range_of_rows,
    scale_from_absmax,
    shared_scale,
    to_differences,
    to_operand,
    zero_point_range,
)
from sqjax.numerics.group_products import in_groups, integer_sums
from sqjax.numerics.matrix import Matrix
from sqjax.numerics.straight_through import tangent_of

Activations = Literal[
    "per_token", "per_token_zero_point", "per_tensor", "static"
]
#: Up to so many rows, a product in groups is summed group by group; with more, the weight is
#: dequantized first.
FEW_ROWS = 16
#: Up to so many rows (in groups: `FEW_ROWS`) a float x is multiplied on a CPU digit by digit; with
#: more, a float copy of the weight pays.
DIGIT_ROWS = 32


class Recipe(NamedTuple):
    """How a product runs.

    Attributes:
        activations: how the activation is quantized; None: not at all.
        fmt: to which format; int4 with a zero point.
        group: the weight's group size, or None.
        kernel: "pallas": `sqjax.numerics.mosaic.matmul` multiplies, on GPUs; None: XLA alone.
    """

    activations: Activations | None = "per_token"
    fmt: FormatName = "int8"
    group: int | None = None
    kernel: Literal["pallas"] | None = None


@partial(jax.jit, static_argnames="recipe", inline=True)
def product(
    recipe: Recipe, x: Float[Array, "rows inner"], matrix: Matrix
) -> Float[Array, "rows outputs"]:
    """x @ W.T in float32, on the recipe's operands.

    Quantized activations: (q_x . q_w) * scale_x * scale_w, the sum in int32 (float32 for float8);
    in groups the sum of that over the groups. Weight-only: (x . q_w) * scale_w, the sum in float32.
    The derivative with respect to x is that of the float product with the dequantized weight
    (straight-through, Bengio et al. 2013).
    """
    return _product(recipe, x, matrix)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(
    recipe: Recipe, x: Float[Array, "rows inner"], matrix: Matrix
) -> Float[Array, "rows outputs"]:
    if recipe.kernel is None:
        return _by_xla(recipe, x, matrix)
    in_kernel = partial(_in_kernel, recipe)
    by_xla = partial(_by_xla, recipe)
    return lax.platform_dependent(x, matrix, cuda=in_kernel, default=by_xla)


def _in_kernel(
    recipe: Recipe, x: Float[Array, "rows inner"], matrix: Matrix
) -> Float[Array, "rows outputs"]:
    """`_by_xla` with a kernel for everything after x is quantized."""
    # Here, because it takes long to import, and few ask for it.
    from sqjax.numerics.mosaic import matmul

    multiply = partial(matmul, dtype=jnp.float32)
    if recipe.activations is None:
        rows = x.astype(jnp.bfloat16)
        out = multiply(rows, matrix.codes, matrix.scale, zero=matrix.zero)
        return _varying_as((x, matrix), out)
    q, x_scale = quantized_rows(
        x, recipe.activations, matrix.input_scale, FORMATS[recipe.fmt]
    )
    of_rows = jnp.broadcast_to(x_scale, (x.shape[0], 1))[:, 0]
    out = multiply(q, matrix.codes, matrix.scale, x_scale=of_rows)
    return _varying_as((x, matrix), out)


def _varying_as(operands: Any, out: Array) -> Array:
    """A kernel's result, said to differ from device to device where its operands do.

    In a `shard_map` a type says so, and that of a kernel's result does not by itself.
    """
    axes = {
        axis
        for operand in jax.tree.leaves(operands)
        for axis in jax.typeof(operand).manual_axis_type.varying
    }
    missing = axes - jax.typeof(out).manual_axis_type.varying
    return lax.pcast(out, tuple(missing), to="varying") if missing else out


def _by_xla(
    recipe: Recipe, x: Float[Array, "rows inner"], matrix: Matrix
) -> Float[Array, "rows outputs"]:
    if recipe.activations is None:
        return weight_only(x, matrix, recipe.group)
    q, x_scale = quantized_rows(
        x, recipe.activations, matrix.input_scale, FORMATS[recipe.fmt]
    )
    if recipe.group is not None and matrix.scale.shape[1] > 1:
        return in_groups(q, matrix, recipe.group) * x_scale
    sums = integer_sums(q, matrix, recipe.group)
    return sums.astype(jnp.float32) * x_scale * matrix.scale.T


@partial(_product.defjvp, symbolic_zeros=True)
def _straight_through(recipe, primals, tangents):
    """The derivative of the float product, also where the weight's scale varies (x @ (w * g))."""

    def in_float(x, scale):
        weight = matrix._replace(scale=scale).dequantized(recipe.group)
        return lax.dot_general(x.astype(jnp.float32), weight, LAST_AXES)

    (x, matrix), (dx, change) = primals, tangents
    tangent = tangent_of(in_float, (x, matrix.scale), (dx, change.scale))
    return _product(recipe, x, matrix), tangent


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def transposed_product(
    recipe: Recipe, x: Float[Array, "rows outputs"], matrix: Matrix
) -> Float[Array, "rows inner"]:
    """x @ W in float32, where `product` is x @ W.T.

    W is diag(scale) Q, so this is (x * scale) @ Q. Its operands are as narrow as those of
    `product`. x * scale has one scale for each row, computed at run time, whatever the recipe says,
    because a static one is that of the other product's activations. It has a zero point if those
    have one.

    Where x stays float, or W is in groups, or has more outputs than an int32 sum holds, W is
    dequantized. The derivative is that of `product`.
    """
    outputs, groups = matrix.scale.shape
    one_scale = groups == 1 and outputs <= LONGEST_CONTRACTION
    if recipe.activations is None or not one_scale:
        weight = matrix.dequantized(recipe.group).astype(x.dtype)
        return _times_rows(x, weight)
    # The scales belong to the axis that is summed over, so they must be there before rounding.
    scaled = x.astype(jnp.float32) * matrix.scale.T
    has_zero = recipe.activations == "per_token_zero_point"
    kind: Activations = "per_token_zero_point" if has_zero else "per_token"
    q, x_scale = quantized_rows(scaled, kind, None, FORMATS[recipe.fmt])
    sums = narrow_dot(q, matrix.integers(recipe.group), summed=0)
    return sums.astype(jnp.float32) * x_scale


@partial(transposed_product.defjvp, symbolic_zeros=True)
def _transposed_straight_through(recipe, primals, tangents):
    """The derivative of the float product, as for `product`."""

    def in_float(x, scale):
        weight = matrix._replace(scale=scale).dequantized(recipe.group)
        return _times_rows(x.astype(jnp.float32), weight)

    (x, matrix), (dx, change) = primals, tangents
    tangent = tangent_of(in_float, (x, matrix.scale), (dx, change.scale))
    return transposed_product(recipe, x, matrix), tangent


def _times_rows(x: Array, weight: Array) -> Float[Array, "rows inner"]:
    """x @ W, the sums in float32."""
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


def quantized_rows(
    x: Float[Array, "rows inner"],
    activations: Activations,
    input_scale: Float[Array, "..."] | None,
    fmt: Format,
) -> tuple[Shaped[Array, "rows inner"], Float[Array, "..."]]:
    """(what a product multiplies of each row, its scale): x is about q * scale.

    With a zero point a row's range is [min, max], made to hold 0, in place of [-absmax, absmax]: q
    is code - zero, which int8 holds. So a product needs no correction for the zero points. The
    scale is (rows, 1), that of `activation_scale` or that of the range.

    Args:
        x: the rows.
        activations: how they are quantized.
        input_scale: of static ones, () or (rows, 1).
        fmt: to which format; with a zero point it is int4.

    Raises:
        ValueError: static activations without an `input_scale`.
    """
    if activations == "per_token_zero_point":
        scale, zero = zero_point_range(*range_of_rows(x))
        return to_differences(x, scale, zero), scale
    scale = activation_scale(x, activations, input_scale, fmt)
    return to_operand(x, scale, fmt), scale


def activation_scale(
    x: Float[Array, "rows inner"],
    activations: Activations,
    input_scale: Float[Array, "..."] | None,
    fmt: Format,
) -> Float[Array, "..."]:
    """The scale of each row, (rows, 1): absmax / bound of the row or of all rows, or `input_scale`.

    NaN for a row that holds NaN, because the integers that are made of it would be ordinary ones.

    Raises:
        ValueError: static activations without an `input_scale`.
    """
    if activations == "static":
        if input_scale is None:
            raise ValueError(
                "static activations need an input_scale: quantize with the statistics of calibrate"
            )
        return static_scale(x, input_scale)
    of_rows = absmax_of_rows(x)
    if activations == "per_tensor":
        shared = shared_scale(of_rows, fmt)
        return _nan_where(~jnp.isfinite(of_rows), shared)
    return scale_from_absmax(of_rows, fmt)


def static_scale(
    x: Float[Array, "rows inner"], scale: Float[Array, "..."]
) -> Float[Array, "rows 1"]:
    """A scale that is known, () or (rows, 1), for each row; see `_nan_where`."""
    return _nan_where(jnp.isnan(absmax_of_rows(x)), scale)


def count_beyond(
    x: Float[Array, "..."], scale: Float[Array, "..."], fmt: FormatName
) -> Float[Array, ""]:
    """How many |x| are larger than what a static scale covers, scale * bound; float32.

    The range's own rounding is no excess: a scale of absmax / 127 clips no absmax.
    """
    covered = scale * (FORMATS[fmt].bound * (1 + 2.0**-20))
    beyond = jnp.abs(x).astype(jnp.float32) > covered
    return jnp.sum(beyond, dtype=jnp.float32)


def _nan_where(lost: Bool[Array, "rows 1"], scale: Array) -> Array:
    """The scale of each row; on a CPU NaN for rows that are lost.

    Not on a GPU, because a product whose rows have scales that are computed is written to memory in
    float32 before it is scaled. There NaN is taken as 0.
    """
    said = lax.platform_dependent(
        lost,
        cpu=lambda lost: lost,
        # Of `lost`, because in a shard_map both must vary over the same devices.
        default=lambda lost: lost & False,
    )
    return jnp.where(said, jnp.nan, scale)


def weight_only(
    x: Float[Array, "rows inner"], matrix: Matrix, group: int | None
) -> Float[Array, "rows outputs"]:
    """x @ W.T for a float x, in the form that a platform's compiler makes a fast program of.

    On a CPU a few rows are multiplied digit by digit: see `_by_digits`.
    """
    few = DIGIT_ROWS if matrix.scale.shape[1] == 1 else FEW_ROWS
    if not _at_most(few, x.shape[0]) or jnp.issubdtype(
        matrix.codes.dtype, jnp.floating
    ):
        return _converted(x, matrix, group)
    on_cpu = partial(_by_digits, group=group)
    otherwise = partial(_converted, group=group)
    return lax.platform_dependent(x, matrix, cpu=on_cpu, default=otherwise)


def _at_most(limit: int, rows: Any) -> bool:
    """Whether there are so few rows. Not if their number is symbolic, as `jax.export` may have it.

    Then one program serves all numbers of rows, so it must be the one for many.
    """
    return isinstance(rows, int) and rows <= limit


def _converted(
    x: Array, matrix: Matrix, group: int | None
) -> Float[Array, "rows outputs"]:
    """x @ W.T, the codes converted to x's dtype in the product, scales after the sum.

    GPU compilers fuse the conversion, so that no float copy of the weight is written.

    In groups, a few rows are multiplied group by group; for one row (one loop, fused), for more
    than `FEW_ROWS`, or with a shorter last group, the weight is dequantized to x's dtype first.
    """

    def dot(x, w):
        return lax.dot_general(
            x, w.astype(x.dtype), LAST_AXES, preferred_element_type=jnp.float32
        )

    groups = matrix.scale.shape[1]
    if groups == 1:
        return dot(x, matrix.integers(group)) * matrix.scale.T
    some_rows = _at_most(FEW_ROWS, x.shape[0]) and x.shape[0] > 1
    if group is None or x.shape[1] % group or not some_rows:
        return dot(x, matrix.dequantized(group))
    codes = matrix.integers(group).reshape(-1, groups, group)
    sums = jax.vmap(dot, in_axes=1)(x.reshape(-1, groups, group), codes)
    return jnp.sum(sums * matrix.scale.T[:, None, :], axis=0)


def _by_digits(
    x: Array, matrix: Matrix, group: int | None
) -> Float[Array, "rows outputs"]:
    """x as three int8 digits to the base 254, each multiplied in int8: see `three_digits`.

    For CPUs, because XLA:CPU would write a float copy of the whole weight for a float product.
    """
    q, scales = three_digits(x)
    if group is not None and matrix.scale.shape[1] > 1:
        sums = in_groups(q, matrix, group)
    else:
        sums = integer_sums(q, matrix, group).astype(jnp.float32)
        sums = sums * matrix.scale.T
    by_digit = (sums * scales).reshape(3, x.shape[0], sums.shape[1])
    return jnp.sum(by_digit, axis=0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def ragged_product(
    recipe: Recipe,
    x: Float[Array, "rows inner"],
    stack: Matrix,
    group_sizes: Int[Array, " stack"],
) -> Float[Array, "rows outputs"]:
    """As `product`, with a matrix of a stack for each row: that of the group which the row is in.

    Quantized activations need weights per channel.

    Args:
        recipe: how the product runs.
        x: the rows, group after group.
        stack: a `Matrix` of arrays with an axis for the stack before the others.
        group_sizes: how many rows meet each matrix.
    """
    if stack.scale.shape[2] > 1:
        weight = _dequantized(recipe, stack).astype(x.dtype)
        return _ragged(x, weight, group_sizes, jnp.float32)
    # The scale of each row is that of its own matrix.
    row = _group_of_row(group_sizes, x.shape[0])
    scale = stack.scale[row, :, 0]
    codes = jax.vmap(partial(Matrix.integers, group=recipe.group))(stack)
    if recipe.activations is None:
        return (
            _ragged(x, codes.astype(x.dtype), group_sizes, jnp.float32) * scale
        )
    fmt = FORMATS[recipe.fmt]
    of_matrix = stack.input_scale
    of_row = None if of_matrix is None else of_matrix[row][:, None]
    q, x_scale = quantized_rows(x, recipe.activations, of_row, fmt)
    if fmt.floating:
        sums = _ragged(q, codes, group_sizes, jnp.float32)
    else:
        sums = _ragged(q, codes.astype(jnp.int8), group_sizes, jnp.int32)
    return sums.astype(jnp.float32) * x_scale * scale


@partial(ragged_product.defjvp, symbolic_zeros=True)
def _ragged_straight_through(recipe, primals, tangents):
    """The derivative of the float product, as for `product`."""

    def in_float(x, scale):
        weights = _dequantized(recipe, stack._replace(scale=scale))
        return _ragged(x.astype(jnp.float32), weights, group_sizes, None)

    x, stack, group_sizes = primals
    dx, change, _ = tangents
    tangent = tangent_of(in_float, (x, stack.scale), (dx, change.scale))
    return ragged_product(recipe, *primals), tangent


def _dequantized(
    recipe: Recipe, stack: Any
) -> Float[Array, "stack outputs inner"]:
    """The float32 matrices of a stack."""
    return jax.vmap(partial(Matrix.dequantized, group=recipe.group))(stack)


def _ragged(x: Array, values: Array, group_sizes: Array, dtype: Any) -> Array:
    """Each row of x times its own matrix of `values` (stack, outputs, inner), transposed."""
    contracted_last = (((1,), (2,)), ((), ()))
    numbers = lax.RaggedDotDimensionNumbers(contracted_last, (0,), (0,))
    return lax.ragged_dot_general(
        x, values, group_sizes, numbers, preferred_element_type=dtype
    )


def _group_of_row(group_sizes: Array, rows: int) -> Array:
    """Which group each row belongs to: the first whose end lies beyond it.

    For group sizes (2, 0, 1) and 4 rows: 0, 0, 2, 2. Rows beyond all groups count to the last one.
    """
    ends = jnp.cumsum(group_sizes)
    numbers = jnp.arange(rows, dtype=ends.dtype)
    group = jnp.searchsorted(ends, numbers, side="right").astype(jnp.int32)
    return jnp.minimum(group, jnp.int32(group_sizes.shape[0] - 1))
