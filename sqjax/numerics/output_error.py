"""What an error of a weight costs the output of its matmul, on plain arrays.

Of a weight W that becomes W + D, the output X W changes by X D. With the Gram matrix G = X^T X of
calibration the squared change over all tokens is known exactly, and without the tokens:
|X D|^2 = trace(D^T G D).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

#: The products of a search are compared with each other, so they are made in full float32.
EXACT = lax.Precision.HIGHEST


def gram_error(
    change: Float[Array, "features outputs"],
    gram: Float[Array, "features features"],
) -> Float[Array, "outputs"]:
    """|X D|^2 of every output, from G = X^T X: the diagonal of D^T G D. Not below 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.output_error import gram_error
        >>> x, change = jnp.array([[1.0, 2.0], [0.0, 3.0]]), jnp.array([[1.0], [-1.0]])
        >>> gram_error(change, x.T @ x).tolist()  # the outputs are -1 and -3
        [10.0]
    """
    passed = jnp.matmul(gram, change, precision=EXACT)
    return jnp.maximum(jnp.sum(change * passed, axis=0), 0)


def best_changes(
    changes: Float[Array, "options features outputs"],
    gram: Float[Array, "features features"],
    group: int,
    sweeps: int = 2,
) -> Int[Array, "outputs groups"]:
    """For every output and group of channels the option with which |X D|^2 is least.

    Coordinate descent from option 0. One group after the other takes its best option, given those
    that the other groups of the output have:

        d^T G_gg d + 2 d^T (G D)_g, with (G D)_g without the group's own part.

    So |X D|^2 never grows, and the whole Gram matrix counts, not only its blocks. The last group
    may be shorter.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax.numerics.output_error import best_changes
        >>> changes = jnp.array([[[1.0], [1.0]], [[0.9], [-1.0]]])  # 2 options, 2 features
        >>> best_changes(changes, jnp.ones((2, 2)), group=1).tolist()  # 1 - 1 = 0 is least
        [[0, 1]]
    """
    options, features, outputs = changes.shape
    missing = -features % group
    changes = jnp.pad(changes, ((0, 0), (0, missing), (0, 0)))
    gram = jnp.pad(gram, ((0, missing), (0, missing)))
    count = (features + missing) // group
    by_group = changes.reshape(options, count, group, outputs)
    rows = gram.reshape(count, group, -1)

    def improve(total: Array, at: Array) -> tuple[Array, Array]:
        """Takes the best option for one group; `total` is D."""
        tried = lax.dynamic_index_in_dim(by_group, at, 1, keepdims=False)
        own_rows = lax.dynamic_index_in_dim(rows, at, 0, keepdims=False)
        first = at * group
        block = lax.dynamic_slice_in_dim(own_rows, first, group, 1)
        now = lax.dynamic_slice_in_dim(total, first, group, 0)
        passed = jnp.matmul(own_rows, total, precision=EXACT)
        # (G D)_g without the group's own part; then d^T (G_gg d + 2 of that) for every option d.
        others = passed - jnp.matmul(block, now, precision=EXACT)
        through = jnp.matmul(block[None], tried, precision=EXACT)
        costs = jnp.sum(tried * (through + 2 * others[None]), axis=1)
        best = jnp.argmin(costs, axis=0)
        taken = jnp.take_along_axis(tried, best[None, None], axis=0)[0]
        total = lax.dynamic_update_slice_in_dim(total, taken, first, 0)
        return total, best

    order = jnp.tile(jnp.arange(count), sweeps)
    _, chosen = lax.scan(improve, changes[0], order)
    return chosen[-count:].T  # of the last sweep
