"""The float tensors of a checkpoint that is written: joined of leaves, or taken over."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from sqjax.files.arrays import STORED
from sqjax.files.tensors import NewTensor
from sqjax.models.checkpoints.huggingface import (
    EMBEDDING,
    Checkpoint,
    is_tied_head,
)
from sqjax.models.checkpoints.names import AS_IS, Found, their_shape
from sqjax.models.checkpoints.quantized.modules import Tensor
from sqjax.models.checkpoints.writing.leaves import Leaf

#: What a float tensor is written as.
DTYPES = tuple(np.dtype(x) for x in (jnp.float32, jnp.bfloat16, jnp.float16))

Tensors = dict[str, NewTensor]


def float_tensor(
    checkpoint: Checkpoint,
    name: str,
    found: Found,
    leaves: Mapping[str, Leaf],
    dtype: np.dtype | None,
) -> NewTensor:
    """The tensor of that name, which holds float leaves.

    Raises:
        ValueError: the leaves have no dtype that is written, or several; names one.
    """
    own = [leaves[path] for path in found.paths]
    if dtype is None:
        dtype = _own_dtype(name, own)
    shapes = tuple(_of_entry(leaf.shape, found.entry) for leaf in own)
    shape = their_shape(checkpoint.config, found.layout, shapes)
    read = partial(_joined, checkpoint.config, found, own, dtype)
    return NewTensor(dtype, shape, read)


def taken_over(
    checkpoint: Checkpoint,
    leaves: Mapping[str, Leaf],
    dtype: np.dtype | None,
) -> Tensors:
    """The tensors that follow from the rest, or say nothing that the model here needs.

    A stored head that is tied is the embedding once more. All others, such as rotary angles and
    masks, are copied.
    """
    made = {}
    family, config = checkpoint.family, checkpoint.config
    embedding = Found((EMBEDDING,), None, AS_IS)
    for name, tensor in checkpoint.others.items():
        if is_tied_head(name, family, config):
            made[name] = float_tensor(
                checkpoint, name, embedding, leaves, dtype
            )
        else:
            made[name] = _copied(name, tensor)
    return made


def _copied(name: str, tensor: Tensor) -> NewTensor:
    entry = tensor.entry
    if entry.dtype not in STORED:
        raise ValueError(
            f"{name}: expected a dtype of {sorted(STORED)}, got {entry.dtype}; remove this tensor, "
            "which the model here does not read, from the source"
        )
    return NewTensor(STORED[entry.dtype], entry.shape, tensor.read)


def _own_dtype(name: str, leaves: Sequence[Leaf]) -> np.dtype:
    """The dtype of leaves that are written as one tensor."""
    dtypes = {leaf.dtype for leaf in leaves}
    if len(dtypes) == 1 and dtypes <= set(DTYPES):
        return leaves[0].dtype
    got = ", ".join(f"{leaf.origin} of {leaf.dtype.name}" for leaf in leaves)
    known = ", ".join(dtype.name for dtype in DTYPES)
    raise ValueError(
        f"{name}: expected leaves of one dtype among {known}, got {got}; pass dtype=jnp.float32"
    )


def _of_entry(array: Any, entry: int | None) -> Any:
    """What an entry of an array's first axis, or of its shape, is."""
    if entry is None:
        return array
    return array[1:] if isinstance(array, tuple) else array[entry]


def _joined(
    config: Any,
    found: Found,
    leaves: Sequence[Leaf],
    dtype: np.dtype,
) -> np.ndarray:
    """The array of a tensor."""
    parts = []
    for leaf in leaves:
        # Of numpy, because there a slice or a transpose is a view.
        array = _of_entry(np.asarray(leaf.read()), found.entry)
        parts.append(_narrowed(leaf.origin, array, dtype))
    return np.asarray(found.layout.join(config, parts))


def _narrowed(path: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another dtype, which must hold its numbers."""
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype, copy=False)
    bound = float(jnp.finfo(dtype).max)
    # No wider dtype than the new one has numbers that it can not hold.
    if float(jnp.finfo(array.dtype).max) <= bound:
        return narrow
    lost = np.isinf(narrow) & np.isfinite(array)
    if lost.any():
        largest = np.max(np.abs(array), where=lost, initial=0)
        raise ValueError(
            f"{path}: expected numbers up to {bound:.3g}, the range of {dtype.name}, got "
            f"{largest:.3g}; save it in a wider dtype, such as dtype=jnp.bfloat16"
        )
    return narrow
