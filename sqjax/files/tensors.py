"""Writes a safetensors file tensor by tensor, so that memory holds one tensor beside the model."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sqjax.files.arrays import STORED

#: {dtype: safetensors' name of it}.
NAMES = {dtype: name for name, dtype in STORED.items()}
#: The header's length is a multiple of it, as where these files come from.
_ALIGNED = 8


class NewTensor(NamedTuple):
    """A tensor that will be written.

    Attributes:
        dtype: of the tensor.
        shape: of the tensor.
        read: gives its array, when its turn has come.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, tensors: Mapping[str, NewTensor], metadata: Mapping[str, str]
) -> None:
    """Writes a new safetensors file.

    Args:
        path: of the file, which must not be there yet.
        tensors: by name. Each is read, written and dropped before the next.
        metadata: text by name.

    Raises:
        ValueError: an array is of another dtype or shape than was said; names the tensor.
        OSError: the file can not be written.
    """
    # Wide dtypes first, because then every tensor begins at a multiple of its own size.
    names = sorted(
        tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)
    )
    header: dict = {"__metadata__": dict(metadata)}
    first = 0
    for name in names:
        tensor = tensors[name]
        last = first + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (first, last),
        }
        first = last
    text = json.dumps(header).encode()
    # With spaces, because the format allows these at the end of the JSON.
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(_bytes_of(name, tensors[name]))


def _bytes_of(name: str, tensor: NewTensor) -> memoryview:
    """The bytes of a tensor's array, which must be what the header says."""
    array = np.ascontiguousarray(tensor.read())
    expected = tensor.dtype.name, tensor.shape
    # ascontiguousarray makes a row of one of a scalar.
    got = array.dtype.name, array.shape if tensor.shape else ()
    if got != expected:
        raise ValueError(f"{name}: expected {expected}, got {got}")
    return array.reshape(-1).view(np.uint8).data


def in_shards(
    tensors: Mapping[str, NewTensor], max_shard_bytes: int
) -> list[dict[str, NewTensor]]:
    """The tensors in their order, in parts of so many bytes, or of one tensor that is larger.

    Tensors of 4, 4 and 9 bytes are two parts of at most 8: the first two, and the last.
    """
    shards: list[dict[str, NewTensor]] = [{}]
    # A tensor larger than a shard is one alone, because tensors are not divided.
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.nbytes > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.nbytes
    return shards
