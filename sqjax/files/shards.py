"""A save as a directory: shards of tensors, and an index that says what belongs to it.

    sqjax.json                        the parts, the sums of all headers and arrays, and a seal
    sqjax-00001-of-00002.safetensors  some of the arrays, under their names
    sqjax-00002-of-00002.safetensors  the others

The index is one line of JSON (`sqjax.files.contents` has the parts):

    {"sqjax": 3, "tree": ..., "shards": {"sqjax-00001-of-00002.safetensors":
        {"header": SUM, "tensors": {"w": SUM, ...}}, ...}, "seal": SUM}

The seal is the sum of all else in the index, and the index has a sum of every byte of the shards.
So a shard of another save does not fit, whatever its name.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sqjax.files.checksums import (
    SEAL,
    check_seal,
    checksum,
    seal_of,
    sum_of,
)
from sqjax.files.contents import PARTS, VERSION, Contents, Opened, Place
from sqjax.files.header import Entry, header_bytes, read_header
from sqjax.files.opening import open_file
from sqjax.files.tensors import NewTensor, in_shards, write_tensors

#: The file that says what a directory holds.
INDEX = "sqjax.json"
_SHARD = re.compile(r"sqjax-\d{5,}-of-\d{5,}\.safetensors")
_REMEDY = "copy the whole directory or save it again"
#: How often a directory is opened that is saved anew meanwhile.
_TRIES = 10
#: How many names an error lists.
_SHOWN = 3


class Shard(NamedTuple):
    """What the index says of one shard.

    Attributes:
        file: its name.
        header: the sum of its header.
        tensors: {name of an array in it: its sum}.
    """

    file: str
    header: str
    tensors: dict[str, str]

    def problem(self, expected: str, got: str) -> ValueError:
        """The error that this shard is not what it must be, with the names of what it holds."""
        names = ", ".join(list(self.tensors)[:_SHOWN])
        more = ", ..." if len(self.tensors) > _SHOWN else ""
        return ValueError(
            f"{self.file}: expected {expected}, which holds {names}{more}, got {got}; {_REMEDY}"
        )


def is_of_a_save(name: str) -> bool:
    """Whether this is the name of a file that `write_shards` writes."""
    return name == INDEX or _SHARD.fullmatch(name) is not None


def is_saved(directory: Path) -> bool:
    """Whether a directory is one that `save` wrote, by the name of its index."""
    return (directory / INDEX).is_file()


# Writing ------------------------------------------------------------------------------------------


def write_shards(
    directory: Path, contents: Contents, max_shard_bytes: int
) -> None:
    """Writes a save to a directory, in which the names of its files are free.

    Args:
        directory: of a save that nobody reads yet.
        contents: what is written.
        max_shard_bytes: how large a shard may be; a tensor is never divided.

    Raises:
        OSError: a file can not be written.
    """
    tensors = {name: _new(x) for name, x in contents.tensors.items()}
    parted = in_shards(tensors, max_shard_bytes)
    shards = {}
    for number, part in enumerate(parted, 1):
        file = f"sqjax-{number:05}-of-{len(parted):05}.safetensors"
        write_tensors(directory / file, part, {})
        # Of what shall be there, because a disk may have written something else.
        sums = {name: checksum(contents.tensors[name]) for name in part}
        with (directory / file).open("rb") as written:
            header = sum_of(header_bytes(written))
        shards[file] = {"header": header, "tensors": sums}
    # Last, because it has the sums of all else.
    index = {"sqjax": VERSION, **contents.parts, "shards": shards}
    index[SEAL] = seal_of(index)
    (directory / INDEX).write_bytes(_text(index))


def _new(array: np.ndarray) -> NewTensor:
    return NewTensor(array.dtype, array.shape, partial(_itself, array))


def _itself(array: np.ndarray) -> np.ndarray:
    return array


def _text(index: Any) -> bytes:
    return json.dumps(index).encode()


# Reading ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened_directory(directory: Path) -> Iterator[Opened]:
    """A save that is a directory: its index and all headers are read and checked, no array yet.

    Raises:
        ValueError: `save` did not write it, or a newer version did; the index or a shard was
            changed, is missing, or is another save's; names the file.
    """
    with contextlib.ExitStack() as until_the_end:
        yield _opened_at_once(directory, until_the_end)


def _opened_at_once(
    directory: Path, until_the_end: contextlib.ExitStack
) -> Opened:
    """All files of one save, also while others are saved in its place."""
    index = _read_index(directory / INDEX)
    for _ in range(_TRIES):
        problem = None
        try:
            opened = _open_shards(directory, index, until_the_end)
        except ValueError as error:
            problem = error
        before, index = index, _read_index(directory / INDEX)
        # Else shards of one save were opened after the index of another.
        if index == before:
            break
    if problem is not None:
        raise problem
    return opened


def _open_shards(
    directory: Path,
    index: Mapping[str, Any],
    until_the_end: contextlib.ExitStack,
) -> Opened:
    """The opened shards of an index, closed at the end."""
    places: dict[str, Place] = {}
    sums: dict[str, str] = {}
    for shard in _shards_in(index):
        file, entries = _open_shard(directory, shard)
        until_the_end.enter_context(file)
        _check_names(shard, entries, sums)
        where = f"{shard.file}: "
        places |= {
            name: Place(file, entry, where) for name, entry in entries.items()
        }
        sums |= shard.tensors
    parts = {part: index[part] for part in PARTS if part in index}
    return Opened(parts, places, sums)


def _read_index(path: Path) -> dict[str, Any]:
    """The index, if it is the one that was saved."""
    try:
        with open_file(path) as file:
            text = file.read()
    except FileNotFoundError as error:
        raise ValueError(
            f"expected a directory that sqjax.save wrote, got one without {INDEX}; "
            "sqjax.models.load reads a model as others write it"
        ) from error
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{INDEX}: expected JSON, got {error}; {_REMEDY}"
        ) from error
    is_one = isinstance(index, dict) and type(index.get("sqjax")) is int
    if not is_one or "tree" not in index:
        raise ValueError(f"{INDEX}: expected an index of sqjax.save; {_REMEDY}")
    if index["sqjax"] > VERSION:
        raise ValueError(
            f"{INDEX}: expected layout version {VERSION}, got {index['sqjax']}; update sqjax"
        )
    # Before the seal's own words, because a blank that is another one changes no value.
    if _text(index) != text:
        raise ValueError(
            f"{INDEX}: expected the bytes that were saved, got others; {_REMEDY}"
        )
    check_seal(index, f"{INDEX}: an index")
    return index


def _shards_in(index: Mapping[str, Any]) -> list[Shard]:
    """What the index says of each shard.

    Raises:
        ValueError: a name could lead out of the directory, or it says something else than sums.
    """
    shards = index.get("shards")
    if not isinstance(shards, dict):
        raise ValueError(
            f"{INDEX}: expected shards by name, got {shards!r:.80}"
        )
    found = []
    for name, says in shards.items():
        # No other names, because one with folders in it could lead out of the directory.
        if _SHARD.fullmatch(name) is None:
            raise ValueError(
                f"{INDEX}: expected names such as sqjax-00001-of-00001.safetensors, got {name!r}; "
                f"{_REMEDY}"
            )
        try:
            found.append(Shard(name, says["header"], dict(says["tensors"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{INDEX}: {name}: expected its sums, got {says!r:.80}; {_REMEDY}"
            ) from error
    return found


def _open_shard(
    directory: Path, shard: Shard
) -> tuple[BinaryIO, dict[str, Entry]]:
    """The opened shard and its tensors, if its header is the one that was saved."""
    try:
        file = open_file(directory / shard.file)
    except FileNotFoundError as error:
        raise shard.problem("this shard", "none") from error
    try:
        header = read_header(file)
    except ValueError as error:
        file.close()
        raise shard.problem("a whole shard", str(error)) from error
    if sum_of(header_bytes(file)) != shard.header:
        file.close()
        raise shard.problem(
            "the shard with the checksum that it was saved with",
            "another one: it was changed, or is of another place or save",
        )
    return file, header.tensors


def _check_names(
    shard: Shard, entries: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Raises ValueError unless a shard holds what the index says, and nothing that another has."""
    twice = sorted(entries.keys() & before.keys())
    if entries.keys() != shard.tensors.keys() or twice:
        names = sorted(entries)[:_SHOWN]
        raise shard.problem("a shard", f"one that holds {names}, twice {twice}")
