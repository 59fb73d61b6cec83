"""Products with a weight in groups of channels, which have scales, or zero points, of their own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, Shaped

from sqjax.numerics.dots import codes_first, narrow_dot
from sqjax.numerics.matrix import Matrix


def in_groups(
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
    """`in_groups` with a product for each group."""
    groups, tail = divmod(q.shape[1], group)
    on_cpu = partial(_one_by_one, group=group, groups=groups)
    otherwise = partial(_at_once, group=group, groups=groups)
    total = lax.platform_dependent(q, matrix, cpu=on_cpu, default=otherwise)
    if not tail:
        return total
    last = matrix.columns(groups, groups * group, tail)
    sums = narrow_dot(q[:, -tail:], last.integers(None))
    return total + sums.astype(jnp.float32) * last.scale.T


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


# A few rows on a CPU: one product for all groups --------------------------------------------------

#: One product has at most so many columns, one for each row and group.
_COLUMNS = 64


def _has_few_columns(q: Array, group: int) -> bool:
    """Whether there are so few int8 rows and groups that one product for all is faster."""
    rows, groups = q.shape[0], -(-q.shape[1] // group)
    some = groups > 1 and isinstance(rows, int) and rows > 0
    return q.dtype == jnp.int8 and some and rows * groups <= _COLUMNS


def integer_sums(
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
    """`in_groups` with one product for all groups."""
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
    sums = codes_first(flat, matrix.codes).reshape(-1, groups, rows)
    if matrix.zero is not None:
        total = codes_first(q, own)
        sums = sums - matrix.zero.astype(jnp.int32)[:, :, None] * total[None]
    if matrix.group_scale is not None:
        sums = sums * matrix.group_scale.astype(jnp.int32)[:, :, None]
    return sums
