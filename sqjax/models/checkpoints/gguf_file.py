"""The header of a GGUF file, read by us: nothing that it declares is believed before it is checked.

A file is the magic, a version, the numbers of tensors and of keys; then the keys with their values,
then a name, a shape, a type and an offset for every tensor; then, from the next multiple of the
alignment on, the tensors. All numbers are little-endian. A text is its length and its bytes, an
array the type of its elements, their number, and they themselves.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sqjax.files.opening import size_of

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY = "general.alignment"
#: No tensor of ggml has more axes, and no array of arrays is deeper here.
_MOST_AXES = 4
_DEEPEST = 4

_U32, _U64 = np.dtype("<u4"), np.dtype("<u8")
_BOOL, _TEXT, _ARRAY = 7, 8, 9
#: GGUF's number of a type -> how its values are stored. Texts and arrays have no such size.
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: _U32,
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: _U64,
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
#: The least bytes of a text, of an array, of a key with its value, and of a tensor's entry.
_TEXT_BYTES, _ARRAY_BYTES, _KEY_BYTES, _TENSOR_BYTES = 8, 12, 13, 24


class StoredTensor(NamedTuple):
    """A tensor as the header declares it.

    Attributes:
        name: GGUF's.
        shape: slowest axis first, as numpy has it: 96 rows of 64 are (96, 64).
        kind: the number of its type in ggml.
        offset: from the beginning of the data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Block(NamedTuple):
    """The unit in which a type is stored: so many elements in so many bytes."""

    elements: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What stands before the data.

    Attributes:
        metadata: the keys and their values.
        tensors: the tensors.
        data_start: where the data begin.
    """

    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    data_start: int


def read_header(file: BinaryIO, blocks: Mapping[int, Block]) -> Header:
    """The header of an opened file, checked against the file's length.

    Args:
        file: the file.
        blocks: for each number of a type how it is stored; the offsets of tensors of other types
            can be checked in part only.

    Raises:
        ValueError: it is no GGUF file, or a damaged one; says what is wrong, but not the file's
            name.
    """
    reader = _Reader(file)
    reader.check_version()
    tensor_count = reader.number(_U64, "the number of tensors")
    key_count = reader.number(_U64, "the number of keys")
    reader.check_room(key_count, _KEY_BYTES, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.text("a key")
        if key in metadata:
            raise ValueError(f"the key {key} twice")
        kind = reader.number(_U32, key)
        metadata[key] = reader.value(kind, key, _DEEPEST)
    reader.check_room(tensor_count, _TENSOR_BYTES, "tensors")
    tensors = tuple(reader.tensor() for _ in range(tensor_count))
    alignment = _alignment(metadata)
    data_start = -(-file.tell() // alignment) * alignment
    _check_offsets(tensors, alignment, size_of(file) - data_start, blocks)
    return Header(metadata, tensors, data_start)


def read_tensor(
    file: BinaryIO, header: Header, tensor: StoredTensor, block: Block
) -> np.ndarray:
    """The bytes of a tensor, one row of them for each row of the tensor, of type uint8."""
    *rows, length = tensor.shape
    row_bytes = length // block.elements * block.bytes
    file.seek(header.data_start + tensor.offset)
    raw = np.fromfile(file, np.uint8, math.prod(rows) * row_bytes)
    return raw.reshape(*rows, row_bytes)


class _Reader:
    """Reads values one after the other, each only once the file is known to be long enough."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = size_of(file)
        file.seek(0)

    def check_version(self) -> None:
        if self.bytes(4, "the magic") != _MAGIC:
            raise ValueError("another kind of file")
        version = self.number(_U32, "the version")
        if version % 2**16 == 0 and version > 0:
            raise ValueError(
                "a big-endian one, whose numbers would be read as garbage (convert it with "
                "gguf-convert-endian)"
            )
        if version not in _VERSIONS:
            raise ValueError(f"one of version {version}, not of {_VERSIONS}")

    def check_room(self, count: int, least: int, what: str) -> None:
        """Raises ValueError if the rest of the file is too short for so many things."""
        left = self._size - self._file.tell()
        if count * least > left:
            raise ValueError(f"{count} {what} declared in {left} bytes")

    def bytes(self, count: int, what: str) -> bytes:
        """The next bytes."""
        self.check_room(count, 1, f"bytes of {what}")
        return self._file.read(count)

    def number(self, dtype: np.dtype, what: str) -> Any:
        """The next number, as Python has it."""
        return np.frombuffer(self.bytes(dtype.itemsize, what), dtype)[0].item()

    def text(self, what: str) -> str:
        """The next text."""
        length = self.number(_U64, what)
        try:
            return self.bytes(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what}: {error}") from error

    def value(self, kind: int, what: str, deepest: int) -> Any:
        """The next value of a type: a number, a bool, a text or a list."""
        if kind == _TEXT:
            return self.text(what)
        if kind == _ARRAY and deepest > 0:
            return self._list(what, deepest)
        if kind == _BOOL:
            return self._bools(1, what)[0]
        if kind not in _NUMBERS:
            raise ValueError(f"{what}: a value of type {kind}")
        return self.number(_NUMBERS[kind], what)

    def _list(self, what: str, deepest: int) -> list[Any]:
        kind = self.number(_U32, what)
        count = self.number(_U64, what)
        if kind == _BOOL:
            return self._bools(count, what)
        if kind in _NUMBERS:
            dtype = _NUMBERS[kind]
            self.check_room(count, dtype.itemsize, f"numbers of {what}")
            raw = self.bytes(count * dtype.itemsize, what)
            return np.frombuffer(raw, dtype).tolist()
        least = _TEXT_BYTES if kind == _TEXT else _ARRAY_BYTES
        self.check_room(count, least, f"values of {what}")
        return [self.value(kind, what, deepest - 1) for _ in range(count)]

    def _bools(self, count: int, what: str) -> list[bool]:
        raw = self.bytes(count, what)
        if raw.strip(b"\0\1"):
            raise ValueError(f"{what}: a bool that is neither 0 nor 1")
        return [byte == 1 for byte in raw]

    def tensor(self) -> StoredTensor:
        """The next tensor's entry."""
        name = self.text("a tensor's name")
        axes = self.number(_U32, name)
        if not 1 <= axes <= _MOST_AXES:
            raise ValueError(f"{name}: a tensor of {axes} axes")
        # The file has the fastest axis first.
        sizes = [self.number(_U64, name) for _ in range(axes)]
        kind = self.number(_U32, name)
        offset = self.number(_U64, name)
        return StoredTensor(name, tuple(sizes[::-1]), kind, offset)


def _alignment(metadata: Mapping[str, Any]) -> int:
    """What the offsets are multiples of: 32 where the file does not say."""
    alignment = metadata.get(_ALIGNMENT_KEY, 32)
    if type(alignment) is not int or alignment < 1 or alignment > 2**20:
        raise ValueError(f"{_ALIGNMENT_KEY} = {alignment!r}")
    return alignment


def _check_offsets(
    tensors: tuple[StoredTensor, ...],
    alignment: int,
    data_bytes: int,
    blocks: Mapping[int, Block],
) -> None:
    """Raises ValueError if a tensor is misaligned, lies over another one, or leaves the file."""
    names = set(map(attrgetter("name"), tensors))
    if len(names) < len(tensors):
        raise ValueError("two tensors of one name")
    spans = []
    for tensor in tensors:
        if tensor.offset % alignment:
            raise ValueError(
                f"{tensor.name}: the offset {tensor.offset}, which is no multiple of {alignment}"
            )
        end = tensor.offset + _bytes_of(tensor, blocks)
        if end > data_bytes:
            raise ValueError(
                f"{tensor.name}: data up to byte {end} of {max(data_bytes, 0)}"
            )
        spans.append((tensor.offset, end, tensor.name))
    for (_, end, name), (first, _, other) in itertools.pairwise(sorted(spans)):
        if first < end:
            raise ValueError(f"{name} and {other}, whose data overlap")


def _bytes_of(tensor: StoredTensor, blocks: Mapping[int, Block]) -> int:
    """How many bytes a tensor takes; at least none, of a type that is not known."""
    block = blocks.get(tensor.kind)
    if block is None:
        return 0
    *rows, length = tensor.shape
    if length % block.elements:
        raise ValueError(
            f"{tensor.name}: rows of {length} in blocks of {block.elements}"
        )
    return math.prod(rows) * (length // block.elements) * block.bytes
