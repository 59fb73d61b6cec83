"""GPTQ: weights rounded so that each column's error is made up for by the columns after it.

The output error of a weight W (outputs, F), rounded to V, over tokens x is trace(E G E^T), with
E = W - V and the Gram matrix G = sum of x x^T. Every output is a problem of its own. With
G = U D U^T, U upper triangular with ones on its diagonal, an output's error is

    sum over columns j of D_j (E_j + sum over i < j of E_i U_ij)^2,

so that from the first column to the last, V_j is what is nearest to W_j + sum E_i U_ij. This is
what Frantar et al. 2022 (GPTQ, arXiv 2210.17323) do with the Cholesky factor of G's inverse, as
Chee et al. 2023 (QuIP, arXiv 2307.13304, theorem 6) showed; without an inverse less is lost in
float32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sqjax.numerics.formats import INT8, Format, to_format
from sqjax.numerics.output_error import EXACT, gram_error

#: So many columns are rounded before the columns outside of these learn of their errors; among
#: these again so many.
BLOCKS = 128, 16, 1


class Grid(NamedTuple):
    """The values that a weight may have: step * n, for the numbers n of a format in [low, high].

    Attributes:
        step: float32 (*stack, outputs, groups), above 0.
        low, high: float32, of the same shape: -8 - zero and 7 - zero, say, for codes of int4 with a
            zero point.
    """

    step: Float[Array, "*stack outputs groups"]
    low: Float[Array, "*stack outputs groups"]
    high: Float[Array, "*stack outputs groups"]


@partial(jax.jit, static_argnames=("act_order", "blocks", "fmt"))
def gptq_rounded(
    weight: Float[Array, "*stack outputs features"],
    gram: Float[Array, "*stack features features"],
    usual: Float[Array, "*stack outputs features"],
    grid: Grid,
    group: Int[Array, " features"],
    damping: float | Array = 0.01,
    *,
    act_order: bool = True,
    blocks: tuple[int, ...] = BLOCKS,
    fmt: Format = INT8,
) -> Float[Array, "*stack outputs features"]:
    """The numbers n of a grid with which step * n does what the weight does.

    Args:
        weight: float, one matrix or a stack.
        gram: the sum of x x^T over the tokens x that each matrix meets.
        usual: the n of rounding every weight by itself.
        grid: what the weight may become.
        group: the group of each column: its place along the grid's last axis.
        damping: this share of the mean of G's diagonal is added to the diagonal, because directions
            that were hardly seen are not to be relied on.
        act_order: whether the columns of large activations come first, when most columns are left
            to make up for their errors; else they come in their own order.
        blocks: how many columns are rounded between two products with all others, and between two
            products among these, down to 1; they change the speed alone.
        fmt: the format of n: integers, or floats of 8 bits.

    Returns:
        n, float32. No output's trace(E G E^T) is larger than that of the usual n.

    Examples:
        >>> import jax.numpy as jnp
        >>> w, gram = jnp.array([[0.4, 0.4]]), jnp.array([[2.0, 1.9], [1.9, 2.0]])
        >>> one, usual = jnp.ones((1, 1)), jnp.zeros((1, 2))
        >>> gptq_rounded(w, gram, usual, Grid(one, -7 * one, 7 * one), jnp.array([0, 0])).tolist()
        [[0.0, 1.0]]
    """
    stack = weight.ndim - 2
    matrices = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[stack:]), (weight, gram, usual, grid)
    )

    def one(matrix: tuple[Array, Array, Array, Grid]) -> Array:
        weight, gram, usual, grid = matrix
        problem = _Problem.of(weight, gram, grid, group, act_order, blocks, fmt)
        return problem.solved(usual, damping)

    # One after another, because a single matrix keeps all processors busy.
    return lax.map(one, matrices).reshape(weight.shape)


class _Choice(NamedTuple):
    """The numbers that were chosen, and what the weight has beyond them: (F, outputs) each."""

    numbers: Array
    error: Array


class _Columns(NamedTuple):
    """Some columns of a matrix, as rows, because they are read one after another.

    Attributes:
        weight: (columns, outputs).
        group: (columns,), the group of each.
    """

    weight: Array
    group: Array


class _Problem(NamedTuple):
    """One matrix with its columns in the order in which they are rounded.

    Attributes:
        order: (F,), the column that each of these was.
        features: how many columns the matrix has; F is a multiple of the largest block.
        columns: all of them.
        gram: (F, F).
        grid: of (groups, outputs).
        blocks: how many columns are rounded between two products with others, down to 1.
        fmt: the format of the numbers.
    """

    order: Array
    features: int
    columns: _Columns
    gram: Array
    grid: Grid
    blocks: tuple[int, ...]
    fmt: Format

    @classmethod
    def of(
        cls,
        weight: Array,
        gram: Array,
        grid: Grid,
        group: Array,
        act_order: bool,
        blocks: tuple[int, ...],
        fmt: Format,
    ) -> "_Problem":
        """The problem of a matrix (outputs, features)."""
        features = weight.shape[1]
        # Columns of zeros fill the last block up: they take no error, and give none.
        more = -features % blocks[0]
        gram = jnp.pad(gram.astype(jnp.float32), [(0, more)] * 2)
        rows = jnp.pad(weight.astype(jnp.float32).T, [(0, more), (0, 0)])
        group = jnp.pad(group, (0, more))
        order = jnp.arange(features + more)
        if act_order:
            # The diagonal holds |x_j|^2; the columns that were padded, with 0, come last.
            order = jnp.argsort(-jnp.diagonal(gram))
        return cls(
            order,
            features,
            _Columns(rows[order], group[order]),
            gram[order][:, order],
            Grid(*(x.T for x in grid)),
            blocks,
            fmt,
        )

    def solved(self, usual: Array, damping: float | Array) -> Array:
        """The numbers, (outputs, features): the usual ones where no others are better."""
        # So many columns fill the last block up.
        more = len(self.order) - self.features
        numbers = jnp.pad(usual.T, [(0, more), (0, 0)])[self.order]
        steps = self.grid.step[self.columns.group]
        weight = self.columns.weight
        usual_choice = _Choice(numbers, weight - steps * numbers)

        # To round each alone is kept where damping, or a greedy order, has made things worse.
        compensated = self._pass(
            self.columns,
            weight,
            _unit_upper(self.gram, damping),
            self.blocks,
        )
        best = self._better(usual_choice, compensated)
        return best.numbers[jnp.argsort(self.order)][: self.features].T

    def _better(self, a: _Choice, b: _Choice) -> _Choice:
        """For every output the choice of the smaller error; a where they are equal."""
        of_a, of_b = (gram_error(x.error, self.gram) for x in (a, b))
        is_b = (of_b < of_a)[None]
        return jax.tree.map(partial(jnp.where, is_b), b, a)

    def _pass(
        self,
        columns: _Columns,
        target: Array,
        feedback: Array,
        blocks: tuple[int, ...],
    ) -> _Choice:
        """Column after column set to what is nearest to its target and what is fed back to it.

        In blocks of blocks of columns, because many columns learn best of the errors of many by one
        product of matrices.

        Args:
            columns: n of them.
            target: W and what the columns before these feed back, (n, outputs).
            feedback: (n, n), from these columns to those after them: zeros but above its diagonal.
            blocks: the sizes of the blocks, from the largest down to 1; () for a single column.
        """
        if not blocks:
            return self._nearest(target, columns)
        size, *smaller = blocks

        def one_block(error: Array, start: Array) -> tuple[Array, _Choice]:
            def own(x: Array, axis: int = 0) -> Array:
                return lax.dynamic_slice_in_dim(x, start, size, axis)

            # Errors of blocks to come are still 0, so all rows may be multiplied.
            to_block = own(feedback, 1)
            fed_back = jnp.matmul(to_block.T, error, precision=EXACT)
            chosen = self._pass(
                _Columns(*map(own, columns)),
                own(target) + fed_back,
                own(to_block),
                tuple(smaller),
            )
            error = lax.dynamic_update_slice_in_dim(
                error, chosen.error, start, 0
            )
            return error, chosen

        starts = jnp.arange(0, len(target), size)
        _, chosen = lax.scan(one_block, jnp.zeros_like(target), starts)
        return jax.tree.map(lambda x: x.reshape(target.shape), chosen)

    def _nearest(self, target: Array, columns: _Columns) -> _Choice:
        """What is nearest to the targets of some columns, (columns, outputs)."""
        step, low, high = (of_group[columns.group] for of_group in self.grid)
        numbers = target / step
        if self.fmt.floating:
            narrow = to_format(numbers, jnp.float32(1), self.fmt)
            numbers = narrow.astype(jnp.float32)
        else:
            numbers = jnp.round(numbers)
        numbers = jnp.clip(numbers, low, high)
        return _Choice(numbers, columns.weight - step * numbers)


@jax.jit
def corrected_weight(
    weight: Float[Array, "outputs features"],
    gram: Float[Array, "features features"],
    cross: Float[Array, "features features"],
    damping: float | Array = 0.01,
) -> Float[Array, "outputs features"]:
    """The weight that does to the activations Y of a quantized model what W does to X.

    V of least |X W^T - Y V^T|^2 + damping |V - W|^2, which is W + W (C - G)^T (G + damping)^-1 with
    G = Y^T Y and C = Y^T X. For every other V the first term is larger by trace(E G E^T), with E =
    V's difference to the least one: so GPTQ goes on from there (GPTAQ, Li et al. 2025, arXiv
    2504.02692, which makes up for the same error column by column).

    Args:
        weight: W.
        gram: G, of the activations that the quantized layers before give.
        cross: C, of these and of the activations that the float layers before give.
        damping: a share of the mean of G's diagonal.

    Examples:
        >>> import jax.numpy as jnp
        >>> w, gram = jnp.array([[3.0, 1.0]]), jnp.diag(jnp.array([4.0, 1.0]))
        >>> corrected_weight(w, gram, gram / 2, 0.0).tolist()  # Y is twice X
        [[1.5, 0.5]]
    """
    diagonal = jnp.diagonal(gram)
    damped = _or_one(diagonal) + damping * jnp.mean(diagonal)
    full = jnp.fill_diagonal(gram, damped, inplace=False)
    # What (C - G) W^T says is missing; solved by Cholesky, because G is symmetric and above 0.
    missing = jnp.matmul(cross - gram, weight.T, precision=EXACT)
    factor = jax.scipy.linalg.cho_factor(full)
    correction = jax.scipy.linalg.cho_solve(factor, missing).T
    # Where rounding leaves G no positive numbers, nothing is known of the correction.
    return weight + jnp.where(jnp.isfinite(correction).all(), correction, 0)


def _unit_upper(gram: Array, damping: float | Array) -> Array:
    """U of G = U D U^T without its diagonal of ones, G being damped.

    Where rounding leaves G no positive numbers, it is damped ten times more.
    """
    diagonal = jnp.diagonal(gram)
    alive = jnp.sum(diagonal > 0, dtype=jnp.float32)
    mean = jnp.sum(diagonal) / jnp.maximum(alive, 1)

    def lower(share: Array) -> Array:
        # A channel that was never seen takes no part: any number on the diagonal will do.
        damped = _or_one(diagonal) + share * mean
        full = jnp.fill_diagonal(gram, damped, inplace=False)
        # From the last column to the first, because Cholesky's L is a lower triangle.
        return jnp.linalg.cholesky(full[::-1, ::-1], symmetrize_input=False)

    def failed(state: tuple[Array, Array]) -> Array:
        share, factor = state
        return (share < 1e3) & ~jnp.isfinite(factor).all()

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        share = jnp.maximum(10 * state[0], 1e-6)
        return share, lower(share)

    share = jnp.asarray(damping, jnp.float32)
    _, factor = lax.while_loop(failed, again, (share, lower(share)))
    upper = factor[::-1, ::-1]
    return jnp.triu(upper / jnp.diagonal(upper)[None], 1)


def _or_one(diagonal: Array) -> Array:
    """A diagonal above 0: 1 for channels that were never seen."""
    return jnp.where(diagonal > 0, diagonal, jnp.float32(1))
