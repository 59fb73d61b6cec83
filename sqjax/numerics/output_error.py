"""What an error of a weight costs the output of its matmul, on plain arrays.

Of a weight W that becomes W + D, the output X W changes by X D. With the Gram matrix G = X^T X of
calibration the squared change over all tokens is known exactly, and without the tokens:
|X D|^2 = trace(D^T G D).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

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


def group_errors(
    change: Float[Array, "features outputs"],
    gram: Float[Array, "features features"],
    group: int,
) -> Float[Array, "outputs groups"]:
    """`gram_error` of every group of channels by itself, as if the others had no error.

    So only the blocks along the diagonal of G are read. The last group may be shorter.

    Example: 10 features in groups of 4 give 3 groups, the last of 2 features.
    """
    features, outputs = change.shape
    missing = -features % group
    change = jnp.pad(change, ((0, missing), (0, 0)))
    gram = jnp.pad(gram, ((0, missing), (0, missing)))
    count = (features + missing) // group
    blocks = gram.reshape(count, group, count, group)
    own = blocks[jnp.arange(count), :, jnp.arange(count), :]
    by_group = change.reshape(count, group, outputs)
    passed = jnp.matmul(own, by_group, precision=EXACT)
    return jnp.maximum(jnp.sum(by_group * passed, axis=1), 0).T
