"""The header of a safetensors file, read from the opened file and checked against its length.

A safetensors file is 8 bytes with the length of the header, the header as JSON, and the data. The
header is {name: {"dtype": ..., "shape": [...], "data_offsets": [first, last]}}, with text for text
under "__metadata__". For a float32 of shape (2, 3) alone the offsets are [0, 24].
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, BinaryIO, NamedTuple

from sqjax.files.arrays import STORED
from sqjax.files.opening import size_of

#: What the header says of each tensor.
_FIELDS = ("dtype", "shape", "data_offsets")
#: No header is longer, says the format.
_LONGEST = 100_000_000


class Entry(NamedTuple):
    """What a header says of one tensor.

    Attributes:
        dtype: safetensors' name of it.
        shape: of the tensor.
        first, last: its bytes are those from `first` to before `last` of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


class Header(NamedTuple):
    """A file's tensors, and its metadata."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(file: BinaryIO) -> Header:
    """The header of an opened file.

    Raises:
        ValueError: it is no whole safetensors file; says what is wrong, but not the file's name.
    """
    size = size_of(file)
    file.seek(0)
    # The format begins with this number: 64 bits, unsigned, the lowest byte first.
    length = int.from_bytes(file.read(8), "little")
    # Before the header is read, because a wrong length could ask for all memory.
    if size < 8 or length > min(size - 8, _LONGEST):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    text = file.read(length)
    declared = _json(text)
    # What fills the header up are spaces, says the format. JSON would take other blanks too.
    if not text.rstrip(b" ").endswith(b"}"):
        raise ValueError(
            "a header that is filled up by other bytes than spaces"
        )
    # The one name that is no tensor's, says the format.
    metadata = declared.pop("__metadata__", {})
    if not _is_text_by_text(metadata):
        raise ValueError(f"metadata that are not text by name: {metadata!r}")
    tensors = {}
    for name, entry in declared.items():
        tensors[name] = _entry(name, entry, 8 + length)
    _check_no_gaps(tensors, 8 + length, size)
    return Header(tensors, metadata)


def header_bytes(file: BinaryIO) -> bytes:
    """All bytes of an opened file before its data; `read_header` has found the file whole."""
    file.seek(0)
    length = file.read(8)
    return length + file.read(int.from_bytes(length, "little"))


def _json(text: bytes) -> dict[str, Any]:
    """The header as a dict; a name that comes twice is refused, because one would be lost."""
    try:
        declared = json.loads(text.decode(), object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("a header that is nested too deeply") from error
    if not isinstance(declared, dict):
        raise ValueError(f"a header that is a {type(declared).__name__}")
    return declared


def _without_twins(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a header in which a name comes twice")
    return found


def _is_text_by_text(x: Any) -> bool:
    return isinstance(x, dict) and set(map(type, x.values())) <= {str}


def is_size(x: Any) -> bool:
    """Whether this is a whole number of at least 0; `isinstance` would take True for 1."""
    return type(x) is int and x >= 0


def _are_sizes(x: Any) -> bool:
    return isinstance(x, list) and all(map(is_size, x))


def _entry(name: str, entry: Any, data_start: int) -> Entry:
    """One tensor of the header, whose shape and offsets must agree."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name}: an entry that is {entry!r}")
    fields: list[Any] = list(map(entry.get, _FIELDS))
    dtype, shape, offsets = fields
    if not (
        isinstance(dtype, str)
        and _are_sizes(shape)
        and _are_sizes(offsets)
        and len(offsets) == 2
    ):
        raise ValueError(
            f"{name}: dtype {dtype!r}, shape {shape!r}, offsets {offsets!r}"
        )
    first, last = offsets
    # Of a dtype that is not known here, as those of less than a byte, any length may be right.
    if dtype in STORED:
        needed = math.prod(shape) * STORED[dtype].itemsize
        if last - first != needed:
            raise ValueError(
                f"{name}: {last - first} bytes for {dtype} {tuple(shape)}, "
                f"which takes {needed}"
            )
    return Entry(dtype, tuple(shape), data_start + first, data_start + last)


def _check_no_gaps(
    tensors: Mapping[str, Entry], data_start: int, size: int
) -> None:
    """Raises ValueError unless the tensors fill the file, one after the other."""
    spans = sorted(map(attrgetter("first", "last"), tensors.values()))
    # The format allows no holes, because bytes that no tensor owns could be a file of another kind.
    # Example: two tensors of 8 bytes after a header that ends at 100 are (100, 108), (108, 116).
    edges = [(data_start, data_start), *spans, (size, size)]
    for (_, before), (after, _) in itertools.pairwise(edges):
        if before != after:
            raise ValueError(
                f"data that end at byte {before} where others begin at "
                f"{after}, in a file of {size}"
            )
