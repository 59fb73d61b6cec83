"""Checksums of what `save` writes: of every array, and a seal of what is said of them.

The metadata of a file hold, beside the tree:

    "sums": {"w/tensor/values": "9f86d081884c7d65", ...}, of each tensor's bytes in the file
    "seal": the sum of the layout's version, the tree, the sums, and all else that stands there

So a byte that changes anywhere is seen: in an array by its own sum, in the tree or in a sum by the
seal. What the header says of a tensor's dtype and shape must be what the tree says. Where in the
file it says that the tensor is, other bytes have another sum. A directory has the same in its index
(`sqjax.files.shards`).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

#: Bytes of a sum: no accident gives the same one twice, and JSON stays short.
_BYTES = 16
SEAL, VERSION = "seal", "sqjax"
#: What was sealed before other parts than a tree could be saved, and is sealed without them.
_OF_A_TREE = (VERSION, "tree", "sums")


def sum_of(data: bytes | memoryview) -> str:
    """The BLAKE2b sum of some bytes, as text."""
    return hashlib.blake2b(data, digest_size=_BYTES).hexdigest()


def checksum(array: np.ndarray) -> str:
    """The sum of the bytes of an array, as it is stored, in row-major order."""
    # As plain bytes, because Python's buffers know no bfloat16.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return sum_of(data.data)


def seal_of(parts: Mapping[str, Any]) -> str:
    """The sum of all parts but the seal itself; of the layouts without others, of those they had.

    Args:
        parts: JSON by name, with the layout's version among them.
    """
    # As JSON, because texts that follow one another would say nothing about where one ends.
    if parts.get(VERSION) in ("1", "2"):
        sealed: list[Any] = [parts.get(key) for key in _OF_A_TREE]
    else:
        names = sorted(parts.keys() - {SEAL})
        sealed = [[name, parts[name]] for name in names]
    return sum_of(json.dumps(sealed).encode())


def check_seal(parts: Mapping[str, Any], what: str) -> None:
    """Raises ValueError, saying `what` they are of, unless the parts are those that were sealed."""
    if parts.get(SEAL) != seal_of(parts):
        raise ValueError(
            f"expected {what} with the checksum that it was saved with, got another one: the file "
            "was changed or damaged; copy it or save it again"
        )
