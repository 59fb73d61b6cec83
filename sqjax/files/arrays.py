"""One array of a file: which dtypes it can have, how int4 is stored, which arrays can be saved."""

import math
from operator import attrgetter
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._trees import is_concrete
from sqjax.numerics.formats import INT4
from sqjax.numerics.int4 import pack_int4, unpack_int4

#: safetensors' names of the dtypes that its files can hold.
STORED: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}
#: The dtypes that a tree may have, by numpy's names. int4 is stored as U8, because safetensors has
#: none.
DTYPES: dict[str, np.dtype] = {
    dtype.name: dtype for dtype in (*STORED.values(), INT4.dtype)
}


def shown(path: str) -> str:
    """A path in the tree, as errors show it: the path of the whole tree is empty."""
    return path or "(the tree itself)"


# The dtype and shape of an array ------------------------------------------------------------------


class DeclaredArray(NamedTuple):
    """What the JSON of a file says of one array: the dtype and shape that it has in the tree."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape with at least one axis: a scalar is a row of one."""
        return self.shape or (1,)

    @property
    def stored(self) -> "DeclaredArray":
        """The dtype and shape that it has in the file, which differ from the tree's for int4 only.

        Two int4 values share a byte, and every row begins with a new byte: int4 of shape (3, 7) is
        stored as uint8 of shape (3, 4).
        """
        if self.dtype != INT4.dtype:
            return self
        *lead, length = self.rows
        bytes_in_a_row = (length + 1) // 2
        return DeclaredArray(np.dtype(np.uint8), (*lead, bytes_in_a_row))

    def read_stored(self, file: BinaryIO, offset: int) -> np.ndarray:
        """The array as the file holds it, whose bytes begin at `offset` of the opened file."""
        dtype, shape = self.stored
        file.seek(offset)
        raw = np.fromfile(file, np.uint8, math.prod(shape) * dtype.itemsize)
        return raw.view(dtype).reshape(shape)

    def mapped(self, file: BinaryIO, offset: int) -> np.ndarray:
        """As `read_stored`, but the system reads the bytes when they are looked at.

        They are in no memory of this process once the array is gone.
        """
        dtype, shape = self.stored
        count = math.prod(shape) * dtype.itemsize
        # Nothing can not be mapped.
        if not count:
            return np.empty(shape, dtype)
        raw = np.asarray(np.memmap(file, np.uint8, "r", offset, (count,)))
        return raw.view(dtype).reshape(shape)

    def read(self, file: BinaryIO, offset: int) -> np.ndarray:
        """The array, whose bytes begin at `offset` of the opened file."""
        return self.unpacked(self.read_stored(file, offset))

    def unpacked(self, stored: np.ndarray) -> np.ndarray:
        """The array that the file holds as `stored`."""
        if self.dtype != INT4.dtype:
            return stored
        return unpack_int4(stored, length=self.rows[-1]).reshape(self.shape)


def as_stored(x: np.ndarray) -> np.ndarray:
    """An array as the file holds it: int4 two to a byte, anything else as it is."""
    if x.dtype != INT4.dtype:
        # Files hold the lowest byte first.
        is_swapped = x.dtype.byteorder == ">"
        return x.astype(x.dtype.newbyteorder("<")) if is_swapped else x
    # A scalar is stored as a row of one: `DeclaredArray.rows` reads it in the same way.
    return pack_int4(np.atleast_1d(x))


# Which arrays can be saved ------------------------------------------------------------------------
# Each check returns what is wrong with a leaf and what to do about it, or None. Their order
# matters, because the later ones ask for attributes that only what passed the earlier ones has.

#: What to do about a node that is no array, by the name of its class.
_REMEDIES = {
    "bool": "make it an array that has a dtype: jnp.asarray(x, jnp.float32)",
    "int": "make it an array that has a dtype: jnp.asarray(x, jnp.float32)",
    "float": "make it an array that has a dtype: jnp.asarray(x, jnp.float32)",
    "tuple": "save tuple(x)",
    "list": "save list(x)",
    "dict": "save dict(x)",
}


def _if_abstract(x: Any) -> str | None:
    if is_concrete(x):
        return None
    kind = type(x).__name__
    return f"expected an array of numbers, got {kind}; save outside jit and eval_shape"


def _if_no_array(x: Any) -> str | None:
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return None
    kind = type(x).__name__
    # By its bases, because a class of their own may be a dict or a tuple that jax does not know.
    names = map(attrgetter("__name__"), type(x).__mro__)
    remedies = filter(None, map(_REMEDIES.get, names))
    remedy = next(remedies, "keep what is no array elsewhere")
    return (
        "expected an array, dict, list, tuple, None, QuantWeight, QTensor, or a container "
        f"that jax knows, got {kind}; {remedy}"
    )


def _if_more_than_an_array(x: Any) -> str | None:
    """A subclass may hold more than numbers, which would be lost: a mask, for one."""
    if not isinstance(x, np.ndarray) or type(x) in (np.ndarray, np.memmap):
        return None
    kind = type(x).__name__
    return (
        f"expected a plain array, got {kind}, of which a file keeps the numbers alone; "
        "save x.filled(...) of a masked array, np.asarray(x) of others"
    )


def _if_deleted(x: Any) -> str | None:
    if isinstance(x, jax.Array) and x.is_deleted():
        return "the array is deleted (was it donated?); save before that"
    return None


def _if_unknown_dtype(x: Any) -> str | None:
    if x.dtype.name in DTYPES:
        return None
    known = ", ".join(DTYPES)
    return (
        f"expected a dtype among {known}, got {x.dtype.name}; "
        "cast it, or take it out of the tree"
    )


def _if_on_other_hosts(x: Any) -> str | None:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return (
            "parts of it are on other hosts; gather it first "
            "(jax.experimental.multihost_utils.process_allgather)"
        )
    return None


def _if_weak(x: Any) -> str | None:
    # A weak type would be lost in the file, and the loaded tree would then be compiled anew.
    if not getattr(x, "weak_type", False):
        return None
    dtype = x.dtype.name
    return f"its {dtype} is weak, which a file can not say; save x.astype(jnp.{dtype})"


_CHECKS = (
    _if_abstract,
    _if_no_array,
    _if_more_than_an_array,
    _if_deleted,
    _if_unknown_dtype,
    _if_on_other_hosts,
    _if_weak,
)


def check_savable(path: str, x: Any) -> None:
    """Raises ValueError, naming the path, if a leaf is no array that a file can hold."""
    for check in _CHECKS:
        problem = check(x)
        if problem is not None:
            raise ValueError(f"{shown(path)}: {problem}")
