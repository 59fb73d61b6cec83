"""Marks of values, as they go through loops and branches: a loop carries arrays of one shape."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: What is known of a value's elements beside the value: an array that broadcasts against it, None
#: for nothing, or a pytree without arrays.
Mark = Any


def of_any(marks: Sequence[Mark]) -> Mark:
    """The mark of what one of several branches makes: `Lost` if one of theirs is, else an array's
    shape and dtype, to which all of them broadcast.
    """
    arrays = [mark for mark in marks if has_shape(mark)]
    for mark in marks:
        if mark is not None and not has_shape(mark):
            return mark
    if not arrays:
        return None
    shape = np.broadcast_shapes(*(mark.shape for mark in arrays))
    return jax.ShapeDtypeStruct(shape, arrays[0].dtype)


def array_or_none(mark: Mark) -> Mark:
    """A mark that can go round in a loop, or None: a loop carries arrays only."""
    return mark if has_shape(mark) else None


def kept_shape(before: Mark, made: Mark) -> Mark:
    """A carried mark after a step, in the shape that it had before; None if it is no array."""
    if not has_shape(before):
        return None
    made = made if has_shape(made) else jnp.zeros_like(before)
    return jnp.broadcast_to(made, before.shape)


def has_shape(mark: Mark) -> bool:
    """Whether a mark is an array, or the type of one."""
    return hasattr(mark, "shape")


def is_whole(mark: Mark, sharded: Mapping[int, Any]) -> bool:
    """Whether all devices hold one mark: it does not differ along the axes that are sharded."""
    return all(mark.shape[axis] == 1 for axis in sharded)


def joined(kept: Mark, static: Mark) -> Mark:
    """A mark inside a loop: the array that goes round, or what is no array and stays as it was."""
    return static if kept is None and not has_shape(static) else kept


def grown(before: Mark, after: Mark) -> Mark:
    """A mark that holds for both: in a shape that both broadcast to."""
    if not has_shape(after):
        return after if before is None else before
    if not has_shape(before):
        return jnp.zeros(after.shape, after.dtype)
    shape = np.broadcast_shapes(before.shape, after.shape)
    return jnp.broadcast_to(before, shape)


def same_kind(a: Mark, b: Mark) -> bool:
    """Whether one loop could carry both."""
    if has_shape(a) and has_shape(b):
        return a.shape == b.shape
    return type(a) is type(b)
