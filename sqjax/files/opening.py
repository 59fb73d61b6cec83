"""Opening a file to read it: an ordinary one, once, so that what was checked is what is read."""

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from sqjax._arguments import expect

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(mode: int) -> str | None:
    """What a path is, by the mode that `os.stat` gives, in words; None for an ordinary file."""
    return _KINDS.get(stat.S_IFMT(mode))


def check_path(path: Any, what: str) -> None:
    """Raises ValueError if this is no path: None, or a tree; `what` is what was called."""
    expect(isinstance(path, str | os.PathLike), what, "a path", path)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """The opened file. Whoever reads header and data from it reads them of one file.

    A path could be another file by the time that it is opened again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no path, or a directory, a FIFO, a device or a socket.
    """
    check_path(path, "a file to read")
    path = Path(path)
    _check_kind(path, path.stat().st_mode)
    # A FIFO that has come in the meantime would block until somebody writes to it.
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    file = os.fdopen(os.open(path, flags), "rb")
    _check_kind(path, os.fstat(file.fileno()).st_mode)
    return file


def size_of(file: BinaryIO) -> int:
    """The bytes of an opened file."""
    return os.fstat(file.fileno()).st_size


def _check_kind(path: Path, mode: int) -> None:
    kind = kind_of(mode)
    if kind is not None:
        raise ValueError(f"{path}: expected a file, got {kind}")
