"""A save as one safetensors file, which other programs can read too.

The file holds every array under its name. Its metadata hold the version of the layout ("sqjax"),
the parts as JSON (`sqjax.files.contents`) and the checksums of all of it (`sqjax.files.checksums`).
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sqjax.files.checksums import SEAL, check_seal, checksum, seal_of
from sqjax.files.contents import (
    OF_A_TREE,
    PARTS,
    VERSION,
    Contents,
    Opened,
    Place,
)
from sqjax.files.header import Header, read_header
from sqjax.files.opening import open_file

#: The layout before checksums, which is read too.
_WITHOUT_SUMS = 1
_SUMS = "sums"


def write_file(path: Path, contents: Contents) -> None:
    """Writes a save as one file.

    Raises:
        OSError: it can not be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # A tree alone is in the layout that older versions read.
    version = OF_A_TREE if contents.parts.keys() == {"tree"} else VERSION
    sums = {name: checksum(x) for name, x in contents.tensors.items()}
    texts = {name: json.dumps(x) for name, x in contents.parts.items()}
    metadata = {"sqjax": str(version), **texts, _SUMS: json.dumps(sums)}
    metadata[SEAL] = seal_of(metadata)
    try:
        save_file(contents.tensors, path, metadata)
    except SafetensorError as error:
        # The library has a class of its own for a full disk, which a caller would not expect.
        raise OSError(str(error)) from error


@contextlib.contextmanager
def opened_file(path: str | os.PathLike[str]) -> Iterator[Opened]:
    """A save that is one file, opened once: its header is read, and no array yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none that `save` wrote, or one of a newer version.
    """
    with open_file(path) as file:
        header = _header(file)
        parts, sums = _parts_in(header.metadata)
        places = {
            name: Place(file, entry) for name, entry in header.tensors.items()
        }
        yield Opened(parts, places, sums)


def _header(file: BinaryIO) -> Header:
    try:
        return read_header(file)
    except ValueError as error:
        raise ValueError(
            f"expected a whole safetensors file, got {error}; copy it or save it again"
        ) from error


def _parts_in(
    metadata: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The parts and the checksums, from the metadata of a file that this version reads.

    The checksums are None where the layout has none.
    """
    version = _version_of(metadata)
    # A seal says that the file was written with sums, whatever became of its version.
    if version > _WITHOUT_SUMS or SEAL in metadata:
        check_seal(metadata, "a header")
    texts = {x: text for x, text in metadata.items() if x in (*PARTS, _SUMS)}
    try:
        parts = {name: json.loads(text) for name, text in texts.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected the tree as JSON, got {error}; save it again"
        ) from error
    return parts, parts.pop(_SUMS, None)


def _version_of(metadata: Mapping[str, str]) -> int:
    """The layout's version, if it is one that is read here."""
    version = metadata.get("sqjax", "none")
    if not version.isdecimal() or "tree" not in metadata:
        found = sorted(metadata)[:5]
        raise ValueError(
            f"expected a file of sqjax.save, got metadata {found}; read other safetensors files "
            "with safetensors.flax.load_file, models with sqjax.models.load"
        )
    if int(version) > VERSION:
        raise ValueError(
            f"expected layout version {VERSION}, got {version}; update sqjax"
        )
    return int(version)
