"""The products of activations with one quantized weight matrix, on plain arrays."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from sqjax.numerics.digits import three_digits
from sqjax.numerics.dots import LAST_AXES, narrow_dot
from sqjax.numerics.formats import FORMATS, Format, FormatName, scale_from_absmax, to_format

Activations = Literal["per_token", "per_tensor", "static"]
#: Up to so many rows, a product in groups is summed group by group; with more, the weight is
#: dequantized first.
FEW_ROWS = 16
#: Up to so many rows (in groups: `FEW_ROWS`) a float x is multiplied on a CPU digit by digit; with
#: more, a float copy of the weight pays.
DIGIT_ROWS = 32


class Recipe(NamedTuple):
    """How the activation is quantized (`activations` None: not at all), to which format; the weight's group size."""

    activations: Activations | None = "per_token"
    fmt: FormatName = "int8"
    group: int | None = None


class Matrix(NamedTuple):
    """A weight matrix: the float one is codes * scale, outputs first.

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
        q, length = self.codes, self.codes.shape[1]
        whole = group is not None and length % group == 0 and length > group
        if (
            whole and self.zero is not None
        ):  # reshaped first of all, so that no loop divides by the group size
            q = q.reshape(q.shape[0], -1, group)
        for part, combine in ((self.zero, jnp.subtract), (self.group_scale, jnp.multiply)):
            if part is not None:
                q = combine(
                    q.astype(jnp.int8),
                    part[:, :, None] if q.ndim == 3 else _spread(part, group, length),
                )
        return q.reshape(-1, length)

    def columns(self, number: Any, first: Any, length: int) -> "Matrix":
        """One group as a matrix: its number, its first channel, its length."""

        def own(x: Any, first: Any, length: int) -> Any:
            return None if x is None else lax.dynamic_slice_in_dim(x, first, length, 1)

        scales = [own(x, number, 1) for x in (self.zero, self.group_scale, self.scale)]
        return Matrix(
            own(self.codes, first, length), scales[0], scales[1], scales[2], self.input_scale
        )

    def dequantized(self, group: int | None) -> Float[Array, "outputs inner"]:
        """The float32 matrix."""
        return self.integers(group).astype(jnp.float32) * _spread(
            self.scale, group, self.codes.shape[1]
        )


def _spread(x: Array, group: int | None, length: int) -> Array:
    """Scales of groups, repeated for every channel. Whole groups are a broadcast, which compilers fuse."""
    if group is None or x.shape[1] == 1:
        return x
    return jnp.repeat(x, group, axis=1)[:, :length]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def product(
    recipe: Recipe, x: Float[Array, "rows inner"], matrix: Matrix
) -> Float[Array, "rows outputs"]:
    """x @ W.T in float32, on the recipe's operands.

    Quantized activations: (q_x . q_w) * scale_x * scale_w, the sum in int32 (float32 for float8);
    in groups the sum of that over the groups. Weight-only: (x . q_w) * scale_w, the sum in float32.
    The derivative with respect to x is that of the float product with the dequantized weight
    (straight-through, Bengio et al. 2013).
    """
    if recipe.activations is None:
        return weight_only(x, matrix, recipe.group)
    fmt = FORMATS[recipe.fmt]
    x_scale = activation_scale(x, recipe.activations, matrix.input_scale, fmt)
    q = to_format(x, x_scale, fmt)
    if recipe.group is not None and matrix.scale.shape[1] > 1:
        return _in_groups(q, matrix, recipe.group) * x_scale
    return (
        narrow_dot(q, matrix.integers(recipe.group)).astype(jnp.float32) * x_scale * matrix.scale.T
    )


@product.defjvp
def _straight_through(recipe, primals, tangents):
    x, matrix = primals
    dx = tangents[0].astype(jnp.float32)
    return product(recipe, x, matrix), lax.dot_general(
        dx, matrix.dequantized(recipe.group), LAST_AXES
    )


def activation_scale(
    x: Float[Array, "rows inner"],
    activations: Activations,
    input_scale: Float[Array, ""] | None,
    fmt: Format,
) -> Float[Array, "..."]:
    """absmax / bound of each row (rows, 1), of the whole array (1, 1), or the given static scale (1, 1)."""
    if activations == "static":
        if input_scale is None:
            raise ValueError(
                "static activations need an input_scale: quantize with the statistics of calibrate"
            )
        return input_scale.reshape(1, 1)
    axis = 1 if activations == "per_token" else None
    return scale_from_absmax(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0), fmt)


def _in_groups(q: Array, matrix: Matrix, group: int) -> Float[Array, "rows outputs"]:
    """The sum over the groups of (q . codes) * scale."""
    groups, tail = divmod(q.shape[1], group)
    at_once, one_by_one = (partial(f, group=group, groups=groups) for f in (_at_once, _one_by_one))
    total = lax.platform_dependent(q, matrix, cpu=one_by_one, default=at_once)
    if not tail:
        return total
    last = matrix.columns(groups, groups * group, tail)
    return total + narrow_dot(q[:, -tail:], last.integers(None)).astype(jnp.float32) * last.scale.T


def _at_once(q: Array, matrix: Matrix, group: int, groups: int) -> Float[Array, "rows outputs"]:
    """All whole groups in one batched product."""
    codes = matrix.integers(group)
    split = [x[:, : groups * group].reshape(x.shape[0], groups, group) for x in (q, codes)]
    sums = jax.vmap(narrow_dot, in_axes=1)(*split)
    return jnp.sum(sums.astype(jnp.float32) * matrix.scale[:, :groups].T[:, None, :], axis=0)


def _one_by_one(q: Array, matrix: Matrix, group: int, groups: int) -> Float[Array, "rows outputs"]:
    """A loop over the whole groups: XLA:CPU would transpose all of the weight for a batched product."""

    def product_of(number, mine):
        own = matrix.columns(number, number * group, group)
        return narrow_dot(mine, own.integers(None)).astype(jnp.float32) * own.scale.T

    # It starts with a group, not with zeros: in a shard_map the sum differs from device to device,
    # as zeros do not.
    of_groups = q[:, : groups * group].reshape(q.shape[0], groups, group).swapaxes(0, 1)
    rest = jnp.arange(1, groups, dtype=jnp.int32), of_groups[1:]
    return lax.scan(
        lambda total, this: (total + product_of(*this), None), product_of(0, of_groups[0]), rest
    )[0]


def weight_only(
    x: Float[Array, "rows inner"], matrix: Matrix, group: int | None
) -> Float[Array, "rows outputs"]:
    """x @ W.T for a float x, in the form that a platform's compiler makes a fast program of."""
    few = DIGIT_ROWS if matrix.scale.shape[1] == 1 else FEW_ROWS
    if x.shape[0] > few or jnp.issubdtype(matrix.codes.dtype, jnp.floating):
        return _converted(x, matrix, group)
    on_cpu, otherwise = partial(_by_digits, group=group), partial(_converted, group=group)
    return lax.platform_dependent(x, matrix, cpu=on_cpu, default=otherwise)


def _converted(x: Array, matrix: Matrix, group: int | None) -> Float[Array, "rows outputs"]:
    """The codes are converted in the product, scales come after the sum: GPU compilers fuse the conversion.

    In groups, a few rows are multiplied group by group; for one row (one loop, fused), for more
    than `FEW_ROWS`, or with a shorter last group, the weight is dequantized to x's dtype first.
    """

    def dot(x, w):
        return lax.dot_general(x, w.astype(x.dtype), LAST_AXES, preferred_element_type=jnp.float32)

    groups = matrix.scale.shape[1]
    if groups == 1:
        return dot(x, matrix.integers(group)) * matrix.scale.T
    if group is None or x.shape[1] % group or not 1 < x.shape[0] <= FEW_ROWS:
        return dot(x, matrix.dequantized(group))
    codes = matrix.integers(group).reshape(-1, groups, group)
    sums = jax.vmap(dot, in_axes=1)(x.reshape(-1, groups, group), codes)
    return jnp.sum(sums * matrix.scale.T[:, None, :], axis=0)


def _by_digits(x: Array, matrix: Matrix, group: int | None) -> Float[Array, "rows outputs"]:
    """x as three int8 digits to the base 254, each multiplied in int8: x = s (q1 + q2 / 254 + q3 / 254^2).

    What is left out is at most s / (2 * 254^2), 2^-24 of the row's absmax: less than float32
    rounds. XLA:CPU would write a float copy of the whole weight for a float product.
    """
    q, scales = three_digits(x)
    if group is not None and matrix.scale.shape[1] > 1:
        sums = _in_groups(q, matrix, group)
    else:
        sums = narrow_dot(q, matrix.integers(group)).astype(jnp.float32) * matrix.scale.T
    return jnp.sum((sums * scales).reshape(3, x.shape[0], sums.shape[1]), axis=0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def ragged_product(
    recipe: Recipe, x: Float[Array, "rows inner"], stack: Matrix, group_sizes: Int[Array, " stack"]
) -> Float[Array, "rows outputs"]:
    """As `product`, with the matrix of a stack (a `Matrix` of arrays with that axis first) that each row's group has.

    Quantized activations need weights per channel.
    """
    row = _group_of_row(group_sizes, x.shape[0])
    if stack.scale.shape[2] > 1:
        return _ragged(x, _dequantized(recipe, stack).astype(x.dtype), group_sizes, jnp.float32)
    codes = jax.vmap(partial(Matrix.integers, group=recipe.group))(stack)
    if recipe.activations is None:
        return _ragged(x, codes.astype(x.dtype), group_sizes, jnp.float32) * stack.scale[row, :, 0]
    fmt = FORMATS[recipe.fmt]
    if recipe.activations == "static" and stack.input_scale is not None:
        x_scale = stack.input_scale[row][:, None]
    else:
        x_scale = activation_scale(x, recipe.activations, stack.input_scale, fmt)
    kind = jnp.float32 if fmt.floating else jnp.int32
    sums = _ragged(
        to_format(x, x_scale, fmt),
        codes if fmt.floating else codes.astype(jnp.int8),
        group_sizes,
        kind,
    )
    return sums.astype(jnp.float32) * x_scale * stack.scale[row, :, 0]


@ragged_product.defjvp
def _ragged_straight_through(recipe, primals, tangents):
    _, stack, group_sizes = primals
    weight, dx = _dequantized(recipe, stack), tangents[0].astype(jnp.float32)
    return ragged_product(recipe, *primals), _ragged(dx, weight, group_sizes, None)


def _dequantized(recipe: Recipe, stack: Any) -> Float[Array, "stack outputs inner"]:
    return jax.vmap(partial(Matrix.dequantized, group=recipe.group))(stack)


def _ragged(x: Array, values: Array, group_sizes: Array, dtype: Any) -> Array:
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    return lax.ragged_dot_general(x, values, group_sizes, numbers, preferred_element_type=dtype)


def _group_of_row(group_sizes: Array, rows: int) -> Array:
    """Which group each row belongs to: the first whose end lies beyond it."""
    ends = jnp.cumsum(group_sizes)
    last = jnp.int32(group_sizes.shape[0] - 1)
    return jnp.minimum(
        jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right").astype(jnp.int32),
        last,
    )
