"""`save` and `load`: a parameter tree, quantized or not, as one safetensors file and back, bit for bit.

The file holds every array under its path in the tree, int4 two to a byte. Its metadata holds the version of this layout
("sqjax") and the tree as JSON ("tree"): see `sqjax.layout`.
"""

import contextlib
import json
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._trees import PyTree, map_named
from sqjax.files.tree_json import STORED, Stated, built, described, named

#: The layout that `save` writes and `load` reads.
VERSION = 1


def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes a parameter tree to one safetensors file; `load` gives it back bit for bit, dtype for dtype.

    Everything is checked before a byte is written, and the file is written beside `path` and then renamed: a file that
    is there stays whole until the new one is. int4 takes half a byte a weight; float8 and bfloat16 are kept as they
    are. No pickle. NaN and infinity are kept too.

    Args:
        path: of the file; its directory must exist. A file that is there is replaced.
        tree: dicts (with keys that are all str or all int), lists, tuples and None, of jax or numpy arrays,
            `QuantWeight`s and `QTensor`s. An array that the tree holds twice is written twice.

    Raises:
        ValueError: a node or a dtype that the file can not keep, a weight that is not valid, an array that is deleted,
            traced, of a weak type, or in part on other hosts; names its path in the tree. Two leaves have
            one path. `path` is a directory, or in none.

    Example:
        >>> import tempfile, jax.numpy as jnp, sqjax as sq
        >>> params = {"w": sq.QTensor.quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]), (0,)), "b": [jnp.zeros(2)]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.save(f"{folder}/params.safetensors", params)
        ...     same = sq.load(f"{folder}/params.safetensors")
        >>> same["w"].values.tolist(), same["w"].order == params["w"].order
        ([[127, 64], [-64, 127]], True)
    """
    from safetensors.numpy import save_file

    file = Path(os.path.realpath(path))
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(
            f"save: {path}: expected a file's path in a directory that exists; make {file.parent} first"
        )
    tensors: dict[str, np.ndarray] = {}
    try:
        tree_json = json.dumps(described("", tree, tensors))
    except ValueError as error:
        raise ValueError(f"save: {path}: {error}") from error
    with _written_aside(file) as aside:
        save_file(tensors, aside, {"sqjax": str(VERSION), "tree": tree_json})


def load(path: str | os.PathLike[str]) -> PyTree:
    """Reads the tree that `save` wrote: the same structure, so what was compiled for that tree runs on this one.

    The arrays are jax arrays on the default device, int4 weights as this backend holds them
    (`sqjax.numerics.formats.container`); `jax.device_put(tree, sq.shardings(tree, ...))` spreads them over a mesh. The file is
    checked before an array is read.

    Args:
        path: of a file that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, or cut short; not written by `save`, or by that of a newer sqjax; tensors
            that are missing, too many, or of another shape or dtype than the tree says; weights that are not valid; 64
            bits where jax has 32. Names the file, and the paths in the tree.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, sqjax as sq
        >>> fn, x = lambda p, x: x @ p["w"], jnp.array([[1.0, 16.0]])
        >>> params = {"w": jnp.ones((2, 3))}
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), sq.W4A16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.save(f"{folder}/params.safetensors", qparams)
        ...     same = sq.load(f"{folder}/params.safetensors")
        >>> jax.jit(sq.quantized(fn))(same, x).round(1).tolist()
        [[17.0, 17.0, 17.0]]
    """
    file = Path(path)
    try:
        header, start = _header(file)
        stated: dict[str, Stated] = {}
        abstract = built("", _tree_json(header.pop("__metadata__", {})), stated)
        _check_tensors(header, stated)
    except ValueError as error:
        raise ValueError(f"load: {file}: {error}") from error
    with file.open("rb") as opened:

        def read(name: str, leaf: Any) -> np.ndarray:
            return (
                stated[name]
                .read(opened, start + header[name]["data_offsets"][0])
                .astype(leaf.dtype, copy=False)
            )

        return jax.tree.map(jnp.asarray, map_named(read, abstract))


@contextlib.contextmanager
def _written_aside(file: Path) -> Iterator[Path]:
    """A path beside the file, renamed to it at the end; nothing stays there if anything fails."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("xb") as new:
            mode = stat.S_IMODE(os.fstat(new.fileno()).st_mode)
        yield aside
        aside.chmod(mode)  # safetensors makes files that nobody but their owner may read
        with aside.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """(the header, where the data begin) of a file that safetensors finds whole."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as opened:  # names a file that is not there
        try:
            with safe_open(file, framework="numpy"):
                length = int.from_bytes(opened.read(8), "little")
                return json.loads(opened.read(length)), 8 + length
        except (SafetensorError, RecursionError) as error:
            raise ValueError(
                f"expected a whole safetensors file, got {error}; copy it or save it again"
            ) from error


def _tree_json(metadata: Mapping[str, str]) -> Any:
    """The JSON of the tree, if the file is one that this version reads."""
    version = metadata.get("sqjax", "none")
    if not version.isdecimal() or "tree" not in metadata:
        raise ValueError(
            f"expected a file of sqjax.save, got metadata {sorted(metadata)[:5]}; read other safetensors files with "
            "safetensors.flax.load_file, models with sqjax.models.load"
        )
    if int(version) != VERSION:
        raise ValueError(f"expected layout version {VERSION}, got {version}; update sqjax")
    try:
        return json.loads(metadata["tree"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected the tree as JSON, got {error}; save it again") from error


def _check_tensors(header: Mapping[str, Any], stated: Mapping[str, Stated]) -> None:
    """Raises ValueError, naming the leaves, if the file's tensors are not what the tree says."""
    problems = [
        f"{named(name)}: a tensor that is not in the tree" for name in header if name not in stated
    ]
    for name, leaf in stated.items():
        dtype, shape = leaf.stored
        expected = f"{named(name)}: expected {dtype.name} {shape}"
        if name not in header:
            problems.append(f"{expected}, got none")
        elif STORED.get(header[name]["dtype"]) != dtype or tuple(header[name]["shape"]) != shape:
            problems.append(
                f"{expected}, got {header[name]['dtype']} {tuple(header[name]['shape'])}"
            )
        elif jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            problems.append(
                f"{expected}, which jax would cut to 32 bits; jax.config.update('jax_enable_x64', True)"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{'; '.join(problems[:5])}{more}; if the file was changed, save it again")
