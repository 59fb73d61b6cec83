"""Writing beside a file and then renaming: nobody ever sees half a file, and nothing stays behind.

What is written goes to a directory of its own beside the file, because libraries that write files
make temporary ones too. The directory holds a file that its process keeps locked. Where a process
was killed the lock is free, and the next one that writes there removes the directory.
"""

import contextlib
import ctypes
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sqjax.files.opening import kind_of

_PREFIX = ".sqjax-"
_FRESH = ".sqjax_new-"
_LOCK = "lock"
#: A directory has its lock a moment after it is made; without one it is left over after so long.
_SECONDS_TO_LOCK = 3600.0


@contextlib.contextmanager
def directory_beside(parent: Path) -> Iterator[Path]:
    """A directory in `parent` that is removed at the end.

    First what processes that were killed have left there is removed.
    """
    _remove_left_over(parent)
    made = Path(tempfile.mkdtemp(prefix=_FRESH, dir=parent))
    scratch = made
    with contextlib.ExitStack() as until_the_end:
        try:
            # Elsewhere a directory that holds an open file can not be renamed.
            if os.name == "posix":
                lock = until_the_end.enter_context((made / _LOCK).open("xb"))
                _locks(lock)
                # Under this name others look at it, and find it locked.
                scratch = made.rename(
                    parent / f"{_PREFIX}{uuid.uuid4().hex[:8]}"
                )
            yield scratch
        finally:
            _remove(scratch)


def _remove(scratch: Path) -> None:
    """Removes a directory, its lock last.

    Without a lock nobody would remove what is left of it, if this process is killed here.
    """
    with contextlib.suppress(OSError):
        for path in scratch.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def written_aside(file: Path) -> Iterator[Path]:
    """A path to write to, renamed to `file` at the end; nothing stays there if anything fails.

    A file that is replaced hands on its mode.

    Raises:
        ValueError: `file` is a device, a FIFO or a socket, which the renaming would replace.
    """
    mode = _mode_for(file)
    with directory_beside(file.parent) as scratch:
        aside = scratch / "written"
        yield aside
        if mode is None:
            mode = _usual_mode(scratch / "plain")
        aside.chmod(mode)
        with aside.open("rb+") as written:
            # Before the renaming: a crash leaves the old file or the new.
            os.fsync(written.fileno())
        # In one step, because both are in one file system: a reader finds the old file or the new.
        os.replace(aside, file)
        _sync(file.parent)


@contextlib.contextmanager
def directory_written_aside(directory: Path) -> Iterator[Path]:
    """A new directory to fill with files, renamed to `directory` at the end.

    A directory that is there is replaced as a whole, and hands on its mode. Where anything fails it
    stays as it was.
    """
    parent = directory.parent
    with directory_beside(parent) as scratch:
        new = scratch / "written"
        new.mkdir()
        yield new
        for path in (*new.rglob("*"), new):
            _sync(path)
        if directory.is_dir():
            new.chmod(stat.S_IMODE(directory.stat().st_mode))
        _put_in_place(new, directory)
        _sync(parent)


def _sync(path: Path) -> None:
    """Makes a file, or which files are in a directory, last through a crash."""
    is_directory = path.is_dir()
    # Elsewhere a directory can not be opened, and a file not synced that is opened to be read.
    if is_directory and os.name != "posix":
        return
    opened = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _put_in_place(new: Path, directory: Path) -> None:
    """Renames a directory to another, which may be there; what it held is then removed."""
    if not directory.exists():
        new.rename(directory)
    elif not _exchange(new, directory):
        # Not among what is left over, because nobody may remove it if we are killed in between.
        old = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:8]}")
        directory.rename(old)
        try:
            new.rename(directory)
        except OSError:
            old.rename(directory)
            raise
        shutil.rmtree(old, ignore_errors=True)


#: Of Linux's renameat2: paths are relative to the working directory; exchange both.
_HERE, _EXCHANGE = -100, 2


def _exchange(new: Path, old: Path) -> bool:
    """Exchanges two directories in one step; whether the system can do that."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    paths = os.fsencode(new), os.fsencode(old)
    return rename(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) == 0


def _mode_for(file: Path) -> int | None:
    """The mode of the file that is to be replaced; None where there is none."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return None
    kind = kind_of(mode)
    if kind is not None:
        raise ValueError(
            f"expected a file or a path that is free, got {kind}, which would be replaced"
        )
    return stat.S_IMODE(mode)


def _usual_mode(path: Path) -> int:
    """The mode of a new file, which the user's mask decides."""
    with path.open("xb") as new:
        return stat.S_IMODE(os.fstat(new.fileno()).st_mode)


def _locks(file: BinaryIO) -> bool:
    """Locks the file for this process; whether that could be done."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        # Another process has it, or the system or this file system knows no such locks.
        return False
    return True


def _remove_left_over(parent: Path) -> None:
    """Removes the directories of processes that were killed."""
    for scratch in parent.glob(f"{_PREFIX}*"):
        with (
            contextlib.suppress(OSError),
            (scratch / _LOCK).open("rb") as lock,
        ):
            if _locks(lock):
                _remove(scratch)
    for made in parent.glob(f"{_FRESH}*"):
        with contextlib.suppress(OSError):
            if time.time() - made.stat().st_mtime > _SECONDS_TO_LOCK:
                shutil.rmtree(made, ignore_errors=True)
