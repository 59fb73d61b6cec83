"""`save`: a parameter tree, quantized or not, as one file or a directory, bit for bit."""

import os
from collections.abc import Mapping
from itertools import filterfalse
from pathlib import Path
from typing import Any

from sqjax._arguments import expect
from sqjax._trees import PyTree
from sqjax.files.aside import directory_written_aside, written_aside
from sqjax.files.contents import Contents, contents_of
from sqjax.files.one_file import write_file
from sqjax.files.opening import check_path
from sqjax.files.shards import is_of_a_save, write_shards

#: As transformers shards by default.
SHARD = 5_000_000_000


def save(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    stats: Any = None,
    config: Mapping[str, Any] | None = None,
    graph: Any = None,
    max_shard_bytes: int = SHARD,
) -> None:
    """Writes a parameter tree to a safetensors file or to a directory; `load` gives it back.

    Bit for bit: int4 takes half a byte a weight; float8 and bfloat16, NaN and infinity are kept as
    they are. No pickle. Everything is checked before a byte is written. What is written stands
    beside `path` and is then renamed, because so a save that is already there stays whole until the
    new one is. Checksums of every array and of all that is said of them are in it, which `load`
    verifies.

    Args:
        path: "x.safetensors", or any name that ends in a dot and a word, is one file. Any other
            name ("qwen3-0.6b-int8") is a directory with an index, ``sqjax.json``, and shards. What
            is there already decides first. The directory that it is in must exist. A file that is
            there is replaced, and so is a directory that `save` wrote; either hands on its mode.
        tree: dicts (with keys that are all str or all int), lists, tuples and None, of jax or
            numpy arrays, `QuantWeight`s, `QTensor`s and `Stats`. An array that the tree holds twice
            is written twice. Of any other container that jax knows (an equinox module, a dataclass,
            a flax box) the children are written by their keys: `load` then needs a tree `like` it.
        stats: `Stats` to keep with the tree. `load_saved` gives them, and what follows.
        config: JSON by name to keep with it: {"alpha": 0.85}, say.
        graph: a `Graph` to keep with it, where it is no part of stats.
        max_shard_bytes: how large a shard of a directory may be; an array is never divided.

    Raises:
        ValueError: the file can not keep a node or a dtype; a weight is not valid; an array is
            deleted, traced, of a weak type, or in part on other hosts; two leaves have one path.
            Names the path in the tree. Or `path` is in no directory, is a device or FIFO, or a
            directory that holds other files, which would be lost.
        OSError: it can not be written: the disk is full, or the directory read-only. What was
            there stays, and nothing beside it.

    Examples:
        >>> import tempfile, jax.numpy as jnp, sqjax as sq
        >>> w = sq.QTensor.quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]), (0,))
        >>> params = {"w": w, "b": [jnp.zeros(2)]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.save(f"{folder}/params.safetensors", params)
        ...     same = sq.load(f"{folder}/params.safetensors")
        >>> same["w"].values.tolist(), same["w"].order == params["w"].order
        ([[127, 64], [-64, 127]], True)
    """
    check_path(path, "save(path, tree)")
    # Past links, because the renaming at the end would replace a link and not the file behind it.
    target = Path(os.path.realpath(path))
    try:
        # All of it before a byte is written.
        check_shard_size(max_shard_bytes)
        _check_target(target)
        contents = contents_of(tree, stats, config, graph)
        _write(target, contents, max_shard_bytes)
    except ValueError as error:
        raise ValueError(f"save: {path}: {error}") from error
    except OSError as error:
        raise told(error, f"save: {path}") from error


def check_shard_size(size: Any) -> None:
    """Raises ValueError for what is no size of a file."""
    fits = type(size) is int and size >= 1  # `isinstance` would take True for 1
    expect(fits, "max_shard_bytes", "a whole number of at least 1", size)


def told(error: OSError, what: str) -> OSError:
    """The error of the system, with the path that was to be written in place of one beside it."""
    text = f"{what}: {error.strerror or error}"
    # Of its own class, as PermissionError, where the system's number is known.
    return OSError(text) if error.errno is None else OSError(error.errno, text)


def _check_target(target: Path) -> None:
    """Raises ValueError unless a path is in a directory, and nothing else is lost with it."""
    expected = "a path in a directory that exists"
    parent = target.parent
    if not parent.is_dir():
        raise ValueError(f"expected {expected}; make {parent} first")
    # What is in a directory would go with it, because it is replaced as a whole.
    inside = os.listdir(target) if target.is_dir() else []
    others = list(filterfalse(is_of_a_save, inside))
    if others:
        raise ValueError(
            "expected a path that is free, or a directory that holds what save wrote and nothing "
            f"else, got one that holds {sorted(others)[:3]}; choose another path"
        )


def _write(target: Path, contents: Contents, max_shard_bytes: int) -> None:
    if _is_for_a_file(target):
        with written_aside(target) as aside:
            write_file(aside, contents)
        return
    with directory_written_aside(target) as new:
        write_shards(new, contents, max_shard_bytes)


def _is_for_a_file(target: Path) -> bool:
    """Whether one file is written: where one is, or by the name: x.safetensors, but not qwen2.5."""
    ends_in_a_word = target.suffix[1:2].isalpha()
    return not target.is_dir() if target.exists() else ends_in_a_word
