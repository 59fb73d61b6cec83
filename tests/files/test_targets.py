"""Paths that are no ordinary files, files that change while they are read, what killed saves leave."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from untyped import untyped

import sqjax as sq
from sqjax.files import aside, one_file

posix = pytest.mark.skipif(os.name != "posix", reason="FIFOs, modes and locks are those of POSIX")
TREE = {"a": np.arange(4, dtype=np.float32)}


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@posix
def test_a_fifo_is_neither_read_nor_replaced(fifo):
    with pytest.raises(ValueError, match=r"load: .*fifo: .*expected a file, got a FIFO"):
        sq.load(fifo)
    with pytest.raises(ValueError, match=r"save: .*fifo: expected a file .*, got a FIFO"):
        sq.save(fifo, TREE)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert list(fifo.parent.iterdir()) == [fifo]


@posix
def test_a_device_is_neither_read_nor_replaced():
    with pytest.raises(ValueError, match=r"got a device, which would be replaced"):
        sq.save(os.devnull, TREE)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(ValueError, match=r"expected a file, got a device"):
        sq.load(os.devnull)


@pytest.mark.parametrize("path", [None, 5, ["x"]])
def test_what_is_no_path(path):
    for call in (lambda: sq.load(path), lambda: sq.save(path, TREE)):
        with untyped(), pytest.raises(ValueError, match=r"(save|load).*: expected a path, got"):
            call()


def test_a_directory_that_save_did_not_write(tmp_path):
    with pytest.raises(
        ValueError, match=r"load: .*expected a directory that sqjax.save wrote, got"
    ):
        sq.load(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no /proc")
def test_a_file_that_says_it_is_empty():
    with pytest.raises(
        ValueError, match=r"status: expected a whole safetensors file, got a header"
    ):
        sq.load("/proc/self/status")


@posix
def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path):
    file = tmp_path / "x.safetensors"
    sq.save(file, TREE)
    for mode in (0o600, 0o640):
        file.chmod(mode)
        sq.save(file, TREE)
        assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize("length", [246, 255])
def test_a_long_name(tmp_path, length):
    file = tmp_path / ("x" * length)
    sq.save(file, TREE)
    assert list(tmp_path.iterdir()) == [file]
    np.testing.assert_array_equal(sq.load(file)["a"], TREE["a"])


KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from sqjax.files.aside import written_aside
with written_aside(Path(sys.argv[1])) as aside:
    aside.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
@pytest.mark.slow
def test_what_a_killed_save_leaves_is_removed_by_the_next(tmp_path):
    file = tmp_path / "x.safetensors"
    code = [sys.executable, "-c", KILLED, str(file)]
    assert subprocess.run(code, check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    with aside.directory_beside(tmp_path) as in_use:
        sq.save(file, TREE)
        # What another save has in use stays.
        assert sorted(tmp_path.iterdir()) == sorted([file, in_use])
    assert list(tmp_path.iterdir()) == [file]


KILLED_IN_A_DIRECTORY = """
import os, signal, sys
from pathlib import Path
from sqjax.files.aside import directory_written_aside
with directory_written_aside(Path(sys.argv[1])) as new:
    (new / "a").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
@pytest.mark.slow
def test_a_directory_whose_writer_is_killed_stays_as_it_was(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "a").write_bytes(b"old")
    code = [sys.executable, "-c", KILLED_IN_A_DIRECTORY, str(directory)]
    assert subprocess.run(code, check=False).returncode == -9
    assert (directory / "a").read_bytes() == b"old"
    with aside.directory_written_aside(directory) as new:
        (new / "b").write_bytes(b"new")
        assert (directory / "a").read_bytes() == b"old"
    # The old one, and what the killed process left, are gone.
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in directory.iterdir()] == ["b"]


@posix
def test_the_lock_is_removed_last(tmp_path, monkeypatch):
    """A process that is killed while it removes its directory leaves one that the next removes."""
    remove, seen = shutil.rmtree, {}

    def rmtree(path, **how):
        seen[path] = sorted(inner.name for inner in path.iterdir())
        remove(path, **how)

    monkeypatch.setattr("sqjax.files.aside.shutil.rmtree", rmtree)
    with aside.directory_beside(tmp_path) as scratch:
        (scratch / "file").write_bytes(b"x")
        (scratch / "folder").mkdir()
        (scratch / "folder" / "file").write_bytes(b"x")
    assert seen == {scratch / "folder": ["file"], scratch: ["lock"]}
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_os_error_with_the_path(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    sq.save(tmp_path / "x.safetensors", TREE)
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match=r"save: .*x.safetensors: .*No space left on device"):
        sq.save(tmp_path / "x.safetensors", {"a": jnp.zeros(2)})
    np.testing.assert_array_equal(sq.load(tmp_path / "x.safetensors")["a"], TREE["a"])


def test_header_and_data_are_those_of_one_file(tmp_path, monkeypatch):
    """Between the header and the data another layout is saved over the file."""
    file, old = tmp_path / "x.safetensors", {"a": jnp.arange(300.0), "b": jnp.ones((5, 5))}
    sq.save(file, old)
    read = one_file.read_header

    def and_then_replaced(opened):
        header = read(opened)
        sq.save(file, {"b": np.full((5, 5), 7.0, np.float32), "c": np.full(900, 7.0, np.float32)})
        return header

    monkeypatch.setattr(one_file, "read_header", and_then_replaced)
    found = sq.load(file)
    np.testing.assert_array_equal(found["a"], old["a"])
    np.testing.assert_array_equal(found["b"], old["b"])


# Headers --------------------------------------------------------------------------------------------


def with_header(change, data=b"\0" * 16):
    """A file of one float32 tensor of shape (2, 2), its header changed."""
    header = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with tempfile.NamedTemporaryFile(suffix=".safetensors", delete=False) as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
    return file.name


HEADERS = {
    "no dict": (lambda h: b"[]", "a header that is a list"),
    "no json": (lambda h: b"{", "Expecting property name"),
    "no utf-8": (lambda h: b'{"\xff": 1}', "utf-8"),
    "nested": (lambda h: b"[" * 100_000, "nested too deeply"),
    "name twice": (lambda h: b'{"a": 1, "a": 2}', "a name comes twice"),
    "entry": (lambda h: {"a": 3}, "a: an entry that is 3"),
    "dtype": (lambda h: h["a"].update(dtype=3), "a: dtype 3"),
    "float shape": (lambda h: h["a"].update(shape=[2.0, 2]), r"a: .*shape \[2.0, 2\]"),
    "negative shape": (lambda h: h["a"].update(shape=[-2, -2]), r"a: .*shape \[-2, -2\]"),
    "bool shape": (lambda h: h["a"].update(shape=[True, 4]), r"a: .*shape \[True, 4\]"),
    "other shape": (lambda h: h["a"].update(shape=[2, 3]), "a: 16 bytes .* which takes 24"),
    "one offset": (lambda h: h["a"].update(data_offsets=[0]), r"a: .*offsets \[0\]"),
    "huge": (lambda h: h["a"].update(shape=[2**62, 2**62]), "which takes"),
    "backwards": (lambda h: h["a"].update(shape=[], data_offsets=[16, 20]), "where others begin"),
    "overlap": (lambda h: h | {"b": h["a"]}, "data that end at byte .* where others begin"),
    "metadata": (lambda h: h | {"__metadata__": {"sqjax": 1}}, "metadata that are not text"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_none(case):
    change, message = HEADERS[case]
    file = with_header(change)
    expected = f"load: {re.escape(file)}: expected a whole safetensors file, got .*{message}"
    with pytest.raises(ValueError, match=expected):
        sq.load(file)
    os.unlink(file)


def test_a_header_that_asks_for_all_memory(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((2**50).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"a header of 1125899906842624 bytes in a file of 10"):
        sq.load(tmp_path / "x.safetensors")
