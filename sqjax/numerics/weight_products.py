"""The products of activations with one quantized weight matrix, on plain arrays."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, Shaped

from sqjax.numerics.digits import three_digits
from sqjax.numerics.dots import LAST_AXES, LONGEST_CONTRACTION, narrow_dot
from sqjax.numerics.formats import (
    FORMATS,
    Format,
    FormatName,
    absmax_of_rows,
    scale_from_absmax,
    shared_scale,
    to_operand,
)
from sqjax.numerics.straight_through import tangent_of

Activations = Literal["per_token", "per_tensor", "static"]
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
        fmt: to which format.
        group: the weight's group size, or None.
        kernel: "pallas": `sqjax.numerics.mosaic.matmul` multiplies, on GPUs; None: XLA alone.
    """

    activations: Activations | None = "per_token"
    fmt: FormatName = "int8"
    group: int | None = None
    kernel: Literal["pallas"] | None = None


class Matrix(NamedTuple):
    """A weight matrix: the float one is codes * scale, outputs first.

    It is what products take. `sqjax.weights.qtensor.QTensor`, which users hold, is the same numbers
    with logical axes; `sqjax.weights.dot_general.matrices` makes one of the other.

    Attributes:
        codes: (outputs, inner), int8, int4 or float8: what a product multiplies.
        zero, group_scale: (outputs, groups) int8, or None: codes are (codes - zero) * group_scale.
        scale: (outputs, groups) float32; one group, unless the recipe has a group size.
        input_scale: () float32 of static activations, or None.
    """

    codes: Shaped[Array, "outputs inner"]
    zero: Int[Array, "outputs groups"] | None
    group_scale: Int[Array, "outputs groups"] | None
    scale: Float[Array, "outputs groups"]
    input_scale: Float[Array, ""] | None

    def integers(self, group: int | None) -> Array:
        """The codes with zero points and integer scales applied: int8, or float8."""
        length = self.codes.shape[1]
        whole_groups = (
            group is not None and length > group and length % group == 0
        )
        # Groups become an axis before all else: spread scales would divide by the group size in the
        # compiled loop over channels.
        by_group = whole_groups and self.zero is not None
        q = (
            self.codes.reshape(self.codes.shape[0], -1, group)
            if by_group
            else self.codes
        )

        def of_channels(scales: Array) -> Array:
            return (
                scales[:, :, None]
                if by_group
                else _spread(scales, group, length)
            )

        if self.zero is not None:
            q = q.astype(jnp.int8) - of_channels(self.zero)
        if self.group_scale is not None:
            q = q.astype(jnp.int8) * of_channels(self.group_scale)
        return q.reshape(self.codes.shape)

    def columns(self, number: Any, first: Any, length: int) -> "Matrix":
        """One group as a matrix: its number, its first channel, its length."""

        def part(x: Any, start: Any, size: int) -> Any:
            return (
                None
                if x is None
                else lax.dynamic_slice_in_dim(x, start, size, 1)
            )

        return Matrix(
            codes=part(self.codes, first, length),
            zero=part(self.zero, number, 1),
            group_scale=part(self.group_scale, number, 1),
            scale=part(self.scale, number, 1),
            input_scale=self.input_scale,
        )

    def dequantized(self, group: int | None) -> Float[Array, "outputs inner"]:
        """The float32 matrix."""
        scale = _spread(self.scale, group, self.codes.shape[1])
        return self.integers(group).astype(jnp.float32) * scale


def _spread(x: Array, group: int | None, length: int) -> Array:
    """Scales of groups, repeated for every channel: (7, 3) in groups of 4 becomes (7, 10).

    For whole groups this is a broadcast, which compilers fuse into what reads it.
    """
    if group is None or x.shape[1] == 1:
        return x
    return jnp.repeat(x, group, axis=1)[:, :length]


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
    fmt = FORMATS[recipe.fmt]
    x_scale = activation_scale(x, recipe.activations, matrix.input_scale, fmt)
    q = to_operand(x, x_scale, fmt)
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
    fmt = FORMATS[recipe.fmt]
    x_scale = activation_scale(x, recipe.activations, matrix.input_scale, fmt)
    q = to_operand(x, x_scale, fmt)
    if recipe.group is not None and matrix.scale.shape[1] > 1:
        return _in_groups(q, matrix, recipe.group) * x_scale
    sums = _integer_sums(q, matrix, recipe.group)
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
    because a static one is that of the other product's activations.

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
    fmt = FORMATS[recipe.fmt]
    x_scale = activation_scale(scaled, "per_token", None, fmt)
    q = to_operand(scaled, x_scale, fmt)
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


def activation_scale(
    x: Float[Array, "rows inner"],
    activations: Activations,
    input_scale: Float[Array, ""] | None,
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


def _in_groups(
    q: Array, matrix: Matrix, group: int
) -> Float[Array, "rows outputs"]:
    """The sum over the groups of (q . codes) * scale; a shorter last group is added by itself."""
    if not _has_few_columns(q, group):
        return _group_by_group(q, matrix, group)
    on_cpu = partial(_scaled_by_blocks, group=group)
    otherwise = partial(_group_by_group, group=group)
    return lax.platform_dependent(q, matrix, cpu=on_cpu, default=otherwise)


def _group_by_group(
    q: Array, matrix: Matrix, group: int
) -> Float[Array, "rows outputs"]:
    """`_in_groups` with a product for each group."""
    groups, tail = divmod(q.shape[1], group)
    on_cpu = partial(_one_by_one, group=group, groups=groups)
    otherwise = partial(_at_once, group=group, groups=groups)
    total = lax.platform_dependent(q, matrix, cpu=on_cpu, default=otherwise)
    if not tail:
        return total
    last = matrix.columns(groups, groups * group, tail)
    sums = narrow_dot(q[:, -tail:], last.integers(None))
    return total + sums.astype(jnp.float32) * last.scale.T


# A few rows on a CPU: one product for all groups --------------------------------------------------

#: One product has at most so many columns, one for each row and group.
_COLUMNS = 64


def _has_few_columns(q: Array, group: int) -> bool:
    """Whether there are so few int8 rows and groups that one product for all is faster."""
    rows, groups = q.shape[0], -(-q.shape[1] // group)
    some = groups > 1 and isinstance(rows, int) and rows > 0
    return q.dtype == jnp.int8 and some and rows * groups <= _COLUMNS


def _integer_sums(
    q: Shaped[Array, "rows inner"], matrix: Matrix, group: int | None
) -> Shaped[Array, "rows outputs"]:
    """q @ integers.T, where all groups share a scale for each output; int32, float32 for float8.

    On a CPU the integers of a few rows' weights are not made: see `_by_blocks`.
    """
    plain = matrix.zero is None and matrix.group_scale is None
    if group is None or plain or not _has_few_columns(q, group):
        return narrow_dot(q, matrix.integers(group))

    def on_cpu(q: Array, matrix: Matrix) -> Array:
        return jnp.sum(_by_blocks(q, matrix, group), axis=1).T

    def otherwise(q: Array, matrix: Matrix) -> Array:
        return narrow_dot(q, matrix.integers(group))

    return lax.platform_dependent(q, matrix, cpu=on_cpu, default=otherwise)


def _scaled_by_blocks(
    q: Int8[Array, "rows inner"], matrix: Matrix, group: int
) -> Float[Array, "rows outputs"]:
    """`_in_groups` with one product for all groups."""
    sums = _by_blocks(q, matrix, group).astype(jnp.float32)
    return jnp.sum(sums * matrix.scale[:, :, None], axis=1).T


def _by_blocks(
    q: Int8[Array, "rows inner"], matrix: Matrix, group: int
) -> Int32[Array, "outputs groups rows"]:
    """The sum of each group, with zero points and integer scales applied, by one product.

    Its second operand has a column for each row and group, which is zero outside of the group. The
    codes, which are large, are read once, as they are stored.

    Example: q of 1 row (1, 2, 3, 4) in groups of 2 is ((1, 2, 0, 0), (0, 0, 3, 4)).
    """
    rows, inner = q.shape
    groups = -(-inner // group)
    of_channel = jnp.arange(inner, dtype=jnp.int32) // group
    number = jnp.arange(groups, dtype=jnp.int32)
    own = number[:, None] == of_channel[None]
    blocks = jnp.where(own[:, None], q[None], jnp.int8(0))
    flat = blocks.reshape(groups * rows, inner)
    sums = lax.dot_general(
        matrix.codes.astype(jnp.int8),
        flat,
        LAST_AXES,
        preferred_element_type=jnp.int32,
    )
    # XLA would exchange the operands, and pack the codes anew: see `narrow_dot`.
    sums = lax.optimization_barrier(sums).reshape(-1, groups, rows)
    if matrix.zero is not None:
        total = lax.dot_general(
            own.astype(jnp.int8),
            q,
            LAST_AXES,
            preferred_element_type=jnp.int32,
        )
        sums = sums - matrix.zero.astype(jnp.int32)[:, :, None] * total[None]
    if matrix.group_scale is not None:
        sums = sums * matrix.group_scale.astype(jnp.int32)[:, :, None]
    return sums


def _at_once(
    q: Array, matrix: Matrix, group: int, groups: int
) -> Float[Array, "rows outputs"]:
    """All whole groups in one batched product."""

    def by_group(x):
        return x[:, : groups * group].reshape(x.shape[0], groups, group)

    codes = by_group(matrix.integers(group))
    sums = jax.vmap(narrow_dot, in_axes=1)(by_group(q), codes)
    scale = matrix.scale[:, :groups].T[:, None, :]
    return jnp.sum(sums.astype(jnp.float32) * scale, axis=0)


def _one_by_one(
    q: Array, matrix: Matrix, group: int, groups: int
) -> Float[Array, "rows outputs"]:
    """A loop over the whole groups, for CPUs.

    Not `_at_once`, because XLA:CPU would transpose all of the weight for a batched product.
    """

    def product_of(number, mine):
        own = matrix.columns(number, number * group, group)
        sums = narrow_dot(mine, own.integers(None))
        return sums.astype(jnp.float32) * own.scale.T

    def add(total, numbered):
        return total + product_of(*numbered), None

    of_groups = (
        q[:, : groups * group].reshape(q.shape[0], groups, group).swapaxes(0, 1)
    )
    # The sum starts with a group, not with zeros, because in a shard_map it differs from device to
    # device, and zeros do not: the loop's carry would change its type.
    first = product_of(0, of_groups[0])
    rest = jnp.arange(1, groups, dtype=jnp.int32), of_groups[1:]
    total, _ = lax.scan(add, first, rest)
    return total


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
        sums = _in_groups(q, matrix, group)
    else:
        sums = _integer_sums(q, matrix, group).astype(jnp.float32)
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
    if recipe.activations == "static" and stack.input_scale is not None:
        x_scale = static_scale(x, stack.input_scale[row][:, None])
    else:
        x_scale = activation_scale(
            x, recipe.activations, stack.input_scale, fmt
        )
    q = to_operand(x, x_scale, fmt)
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
