"""The products of activations with one quantized weight matrix, on plain arrays."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from sqjax.formats import FORMATS, Format, FormatName, scale_from_absmax, to_format

Activations = Literal["per_token", "per_tensor", "static"]

#: The longest contraction whose int32 sum of products of two int8 in [-127, 127] cannot overflow.
LONGEST_CONTRACTION = (2**31 - 1) // 127**2
#: Up to so many rows, a product in groups is summed group by group; with more, the weight is dequantized first.
FEW_ROWS = 16
_LAST_AXES = (((1,), (1,)), ((), ()))


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
        q = self.codes
        if self.zero is not None:
            q = q.astype(jnp.int8) - _spread(self.zero, group, q.shape[1])
        if self.group_scale is not None:
            q = q.astype(jnp.int8) * _spread(self.group_scale, group, q.shape[1])
        return q

    def dequantized(self, group: int | None) -> Float[Array, "outputs inner"]:
        """The float32 matrix."""
        return self.integers(group).astype(jnp.float32) * _spread(self.scale, group, self.codes.shape[1])


def _spread(x: Array, group: int | None, length: int) -> Array:
    return x if group is None or x.shape[1] == 1 else jnp.repeat(x, group, axis=1)[:, :length]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def product(recipe: Recipe, x: Float[Array, "rows inner"], matrix: Matrix) -> Float[Array, "rows outputs"]:
    """x @ W.T in float32, on the recipe's operands.

    Quantized activations: (q_x . q_w) * scale_x * scale_w, the sum in int32 (float32 for float8); in groups the sum of
    that over the groups. Weight-only: (x . q_w) * scale_w, the sum in float32. The derivative with respect to x is
    that of the float product with the dequantized weight (straight-through, Bengio et al. 2013).
    """
    if recipe.activations is None:
        return weight_only(x, matrix, recipe.group)
    fmt = FORMATS[recipe.fmt]
    x_scale = activation_scale(x, recipe.activations, matrix.input_scale, fmt)
    q, codes = to_format(x, x_scale, fmt), matrix.integers(recipe.group)
    if matrix.scale.shape[1] == 1:
        return narrow_dot(q, codes).astype(jnp.float32) * x_scale * matrix.scale.T
    return _in_groups(q, codes, matrix.scale, recipe.group) * x_scale


@product.defjvp
def _straight_through(recipe, primals, tangents):
    x, matrix = primals
    dx = tangents[0].astype(jnp.float32)
    return product(recipe, x, matrix), lax.dot_general(dx, matrix.dequantized(recipe.group), _LAST_AXES)


def activation_scale(
    x: Float[Array, "rows inner"], activations: Activations, input_scale: Float[Array, ""] | None, fmt: Format
) -> Float[Array, "..."]:
    """absmax / bound of each row (rows, 1), of the whole array (1, 1), or the given static scale (1, 1)."""
    if activations == "static":
        if input_scale is None:
            raise ValueError("static activations need an input_scale: quantize with the statistics of calibrate")
        return input_scale.reshape(1, 1)
    axis = 1 if activations == "per_token" else None
    return scale_from_absmax(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0.0), fmt)


def narrow_dot(q: Shaped[Array, "rows inner"], codes: Shaped[Array, "outputs inner"]) -> Shaped[Array, "rows outputs"]:
    """int8 x int8 -> int32, or float8 x float8 -> float32; int4 codes become int8 first."""
    floating = jnp.issubdtype(q.dtype, jnp.floating)
    kind = jnp.float32 if floating else jnp.int32
    codes = codes if floating else codes.astype(jnp.int8)

    def dot(q, codes):
        return lax.dot_general(q, codes, _LAST_AXES, preferred_element_type=kind)

    def dot_of_two_rows(q, codes):
        return dot(jnp.pad(q, ((0, 1), (0, 0))), codes)[:1]

    if q.shape[0] != 1 or floating:
        return dot(q, codes)
    # XLA:CPU runs an int8 matrix-vector product without its vector units: two rows take less time than one.
    return lax.platform_dependent(q, codes, cpu=dot_of_two_rows, default=dot)


def _in_groups(q: Array, codes: Array, scale: Array, group: int | None) -> Float[Array, "rows outputs"]:
    """The sum over the groups of (q . codes) * scale."""
    whole, tail = _whole_groups(codes.shape[1], group)
    if tail:
        last = narrow_dot(q[:, whole:], codes[:, whole:]).astype(jnp.float32) * scale[:, -1:].T
        return _in_groups(q[:, :whole], codes[:, :whole], scale[:, :-1], group) + last
    groups = scale.shape[1]
    sums = jax.vmap(narrow_dot, in_axes=1)(q.reshape(-1, groups, group), codes.reshape(-1, groups, group))
    return jnp.sum(sums.astype(jnp.float32) * scale.T[:, None, :], axis=0)


def _whole_groups(inner: int, group: int | None) -> tuple[int, int]:
    """(channels in whole groups, channels in a last shorter one)."""
    tail = 0 if group is None else inner % group
    return inner - tail, tail


def weight_only(x: Float[Array, "rows inner"], matrix: Matrix, group: int | None) -> Float[Array, "rows outputs"]:
    """x @ W.T for a float x: the codes are converted in the product, scales come after the sum.

    In groups, a few rows are multiplied group by group; for one row (which compilers fuse into one loop), for more than
    `FEW_ROWS`, or with a shorter last group, the weight is dequantized to x's dtype first.
    """
    if x.shape[0] == 1:
        return lax.platform_dependent(
            x, matrix, cpu=partial(_one_row, group=group), default=partial(_converted, group=group)
        )
    return _converted(x, matrix, group)


def _converted(x: Array, matrix: Matrix, group: int | None) -> Float[Array, "rows outputs"]:
    def dot(x, w):
        return lax.dot_general(x, w.astype(x.dtype), _LAST_AXES, preferred_element_type=jnp.float32)

    groups = matrix.scale.shape[1]
    if groups == 1:
        return dot(x, matrix.integers(group)) * matrix.scale.T
    if not 1 < x.shape[0] <= FEW_ROWS or _whole_groups(x.shape[1], group)[1]:
        return dot(x, matrix.dequantized(group))
    codes = matrix.integers(group).reshape(-1, groups, group)
    sums = jax.vmap(dot, in_axes=1)(x.reshape(-1, groups, group), codes)
    return jnp.sum(sums * matrix.scale.T[:, None, :], axis=0)


def _one_row(x: Array, matrix: Matrix, group: int | None) -> Float[Array, "1 outputs"]:
    """A matrix-vector product as one loop over the narrow weight: XLA:CPU would write a float copy of it for a dot."""
    x, groups = x.astype(jnp.float32), matrix.scale.shape[1]
    if groups == 1:
        return jnp.sum(matrix.integers(group).astype(jnp.float32) * x, axis=1)[None] * matrix.scale.T
    if _whole_groups(x.shape[1], group)[1]:
        return jnp.sum(matrix.dequantized(group) * x, axis=1)[None]
    codes = matrix.integers(group).astype(jnp.float32).reshape(-1, groups, group)
    return jnp.sum(jnp.sum(codes * x.reshape(1, groups, group), axis=2) * matrix.scale, axis=1)[None]


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
    sums = _ragged(to_format(x, x_scale, fmt), codes if fmt.floating else codes.astype(jnp.int8), group_sizes, kind)
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
    return jnp.minimum(jnp.searchsorted(ends, jnp.arange(rows, dtype=ends.dtype), side="right").astype(jnp.int32), last)
