"""The divergence of a model's predictions from the float model's."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def divergence(outputs: Any, float_outputs: Any, *_: Any) -> Array:
    """The mean over all rows of KL(float || other), in nats, of softmaxes along the last axis.

    Args:
        outputs: logits, (..., classes).
        float_outputs: those of the float model; a logit of -inf is a class that cannot be.
    """
    wanted = jax.nn.log_softmax(float_outputs.astype(jnp.float32))
    got = jax.nn.log_softmax(outputs.astype(jnp.float32))
    possible = wanted > -jnp.inf
    # Both are replaced before they are subtracted, because -inf - -inf is NaN, and so would be the
    # gradient, even where the result is not taken.
    change = jnp.where(possible, wanted, 0) - jnp.where(possible, got, 0)
    return jnp.mean(jnp.sum(jnp.exp(wanted) * change, axis=-1))
