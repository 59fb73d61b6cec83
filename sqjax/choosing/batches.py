"""Batches as what a program needs of them: arguments, a kind that one program serves, a key."""

import zlib
from typing import Any

import jax
import numpy as np

from sqjax.program.trace import array_leaves, is_array


def arguments(batch: Any) -> tuple[Any, ...]:
    """The arguments of fn after params that a batch stands for."""
    return batch if isinstance(batch, tuple) else (batch,)


def kind_of(args: tuple[Any, ...]) -> Any:
    """What two batches have in common that one program serves: all but the values of arrays."""
    leaves, treedef = jax.tree.flatten(args)
    kinds = [(np.shape(x), str(x.dtype)) if is_array(x) else x for x in leaves]
    return treedef, tuple(kinds)


def checksum(args: tuple[Any, ...]) -> int:
    """A number of 32 bits made of a batch's values.

    What is drawn for a batch hangs on it, because another order of the batches should change
    nothing.
    """
    found = 0
    for x in array_leaves(args):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        found = zlib.crc32(np.ascontiguousarray(x).tobytes(), found)
    return found
