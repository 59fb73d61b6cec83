"""Checksums of a file that `save` writes: of every array, and of what the header says of the tree.

The metadata of a file hold, beside the tree:

    "sums": {"w/tensor/values": "9f86d081884c7d65", ...}, of each tensor's bytes in the file
    "seal": the sum of the layout's version, the tree and the sums

So a byte that changes anywhere is seen: in an array by its own sum, in the tree or in a sum by the
seal. What the header says of a tensor's dtype and shape must be what the tree says. Where in the
file it says that the tensor is, other bytes have another sum.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

#: Bytes of a sum: no accident gives the same one twice, and JSON stays short.
_BYTES = 16
_TREE, _SUMS, _SEAL, _VERSION = "tree", "sums", "seal", "sqjax"


def checksum(array: np.ndarray) -> str:
    """The BLAKE2b sum of an array's bytes, in row-major order, as text."""
    if array.dtype.byteorder == ">":
        # Files hold the lowest byte first.
        array = array.astype(array.dtype.newbyteorder("<"))
    # As plain bytes, because Python's buffers know no bfloat16.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.blake2b(data.data, digest_size=_BYTES).hexdigest()


def sealed(
    version: int, tree: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """The metadata of a file: its version, its tree, the sums of its tensors, and the seal."""
    sums = {name: checksum(array) for name, array in tensors.items()}
    metadata = {_VERSION: str(version), _TREE: tree, _SUMS: json.dumps(sums)}
    return {**metadata, _SEAL: seal_of(metadata)}


def seal_of(metadata: Mapping[str, str]) -> str:
    """The sum of the version, the tree and the sums."""
    # As JSON, because texts that follow one another would say nothing about where one ends.
    parts = [metadata.get(key) for key in (_VERSION, _TREE, _SUMS)]
    data = json.dumps(parts).encode()
    return hashlib.blake2b(data, digest_size=_BYTES).hexdigest()


def read_sums(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The sums of a file's tensors.

    Raises:
        ValueError: the seal is none of these metadata; does not name the file.
    """
    if metadata.get(_SEAL) != seal_of(metadata):
        raise ValueError(
            "expected a header with the checksum that it was saved with, got another one: the file "
            "was changed or damaged; copy it or save it again"
        )
    return json.loads(metadata[_SUMS])
