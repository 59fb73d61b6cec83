"""`save` and `load`: a parameter tree, quantized or not, as one safetensors file, bit for bit.

The file holds every array under its path in the tree, int4 two to a byte. Its metadata holds the
version of this layout ("sqjax") and the tree as JSON ("tree"): see `sqjax.files.tree_json`.
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
from sqjax.files.arrays import STORED, DeclaredArray, shown
from sqjax.files.tree_json import from_json, to_json

#: The layout that `save` writes and `load` reads.
VERSION = 1
#: How many of a file's problems an error lists.
_PROBLEMS_SHOWN = 5


def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes a parameter tree to one safetensors file; `load` gives it back bit for bit.

    Everything is checked before a byte is written. The file is written beside `path` and then
    renamed, because so a file that is already there stays whole until the new one is. int4 takes
    half a byte a weight; float8 and bfloat16 are kept as they are. No pickle. NaN and infinity are
    kept too.

    Args:
        path: of the file; its directory must exist. A file that is there is replaced.
        tree: dicts (with keys that are all str or all int), lists, tuples and None, of jax or
            numpy arrays, `QuantWeight`s and `QTensor`s. An array that the tree holds twice is
            written twice.

    Raises:
        ValueError: the file can not keep a node or a dtype; a weight is not valid; an array is
            deleted, traced, of a weak type, or in part on other hosts; two leaves have one path.
            Names the path in the tree. Or `path` is a directory, or in none.

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
    from safetensors.numpy import save_file

    # Past links, because the renaming at the end would replace a link and not the file behind it.
    file = Path(os.path.realpath(path))
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(
            f"save: {path}: expected a file's path in a directory that exists; "
            f"make {file.parent} first"
        )
    tensors: dict[str, np.ndarray] = {}
    try:
        tree_json = json.dumps(to_json("", tree, tensors))
    except ValueError as error:
        raise ValueError(f"save: {path}: {error}") from error
    with _written_aside(file) as aside:
        save_file(tensors, aside, {"sqjax": str(VERSION), "tree": tree_json})


def load(path: str | os.PathLike[str]) -> PyTree:
    """Reads the tree that `save` wrote.

    The structure is the same, so what was compiled for that tree runs on this one. The arrays are
    jax arrays on the default device, int4 weights as this backend holds them
    (`sqjax.numerics.formats.container`); `jax.device_put(tree, sq.shardings(tree, ...))` spreads
    them over a mesh. The file is checked before an array is read.

    Args:
        path: of a file that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file; `save` did not write it, or that of a newer
            sqjax did; tensors are missing, too many, or of another shape or dtype than the tree
            says; a weight is not valid; an array has 64 bits where jax has 32. Names the file, and
            the paths in the tree.

    Examples:
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
    declared: dict[str, DeclaredArray] = {}
    try:
        header, data_start = _header(file)
        metadata = header.pop("__metadata__", {})
        abstract = from_json("", _tree_in(metadata), declared)
        _check_tensors(header, declared)
    except ValueError as error:
        raise ValueError(f"load: {file}: {error}") from error
    with file.open("rb") as opened:

        def read(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            offset = data_start + header[name]["data_offsets"][0]
            array = declared[name].read(opened, offset)
            return jnp.asarray(array.astype(leaf.dtype, copy=False))

        return map_named(read, abstract)


@contextlib.contextmanager
def _written_aside(file: Path) -> Iterator[Path]:
    """A path beside the file, renamed to it at the end; nothing stays there if anything fails."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with aside.open("xb") as new:
            usual_mode = stat.S_IMODE(os.fstat(new.fileno()).st_mode)
        yield aside
        aside.chmod(
            usual_mode
        )  # because safetensors makes files that only their owner may read
        with aside.open("rb+") as written:
            os.fsync(
                written.fileno()
            )  # before the renaming: a crash leaves the old file or the new
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """(the header, where the data begin) of a file that safetensors finds whole.

    A safetensors file is 8 bytes with the length of the header, the header as JSON, and the data.
    """
    from safetensors import SafetensorError, safe_open

    with file.open(
        "rb"
    ) as opened:  # first, because its error names a file that is not there
        try:
            with safe_open(
                file, framework="numpy"
            ):  # checks the file's length and its offsets
                length = int.from_bytes(opened.read(8), "little")
                return json.loads(opened.read(length)), 8 + length
        except (SafetensorError, RecursionError) as error:
            raise ValueError(
                f"expected a whole safetensors file, got {error}; copy it or save it again"
            ) from error


def _tree_in(metadata: Mapping[str, str]) -> Any:
    """The JSON of the tree, from the metadata of a file that this version reads."""
    version = metadata.get("sqjax", "none")
    if not version.isdecimal() or "tree" not in metadata:
        found = sorted(metadata)[:5]
        raise ValueError(
            f"expected a file of sqjax.save, got metadata {found}; read other safetensors files "
            "with safetensors.flax.load_file, models with sqjax.models.load"
        )
    if int(version) != VERSION:
        raise ValueError(
            f"expected layout version {VERSION}, got {version}; update sqjax"
        )
    try:
        return json.loads(metadata["tree"])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected the tree as JSON, got {error}; save it again"
        ) from error


def _check_tensors(
    header: Mapping[str, Any], declared: Mapping[str, DeclaredArray]
) -> None:
    """Raises ValueError, naming the leaves, if the file's tensors are not what the tree says.

    All problems are found before one is raised, because a file with one wrong tensor usually has
    more.
    """
    problems = []
    for name in header:
        if name not in declared:
            problems.append(f"{shown(name)}: a tensor that is not in the tree")
    for name, array in declared.items():
        problem = _tensor_problem(array, header.get(name))
        if problem is not None:
            problems.append(f"{shown(name)}: {problem}")
    if problems:
        first = "; ".join(problems[:_PROBLEMS_SHOWN])
        others = len(problems) - _PROBLEMS_SHOWN
        more = f"; and {others} more" if others > 0 else ""
        raise ValueError(
            f"{first}{more}; if the file was changed, save it again"
        )


def _tensor_problem(
    array: DeclaredArray, entry: Mapping[str, Any] | None
) -> str | None:
    """What is wrong with a tensor, given its entry in the header; None if nothing is."""
    dtype, shape = array.stored
    expected = f"expected {dtype.name} {shape}"
    if entry is None:
        return f"{expected}, got none"
    found_dtype, found_shape = entry["dtype"], tuple(entry["shape"])
    if STORED.get(found_dtype) != dtype or found_shape != shape:
        return f"{expected}, got {found_dtype} {found_shape}"
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        remedy = "jax.config.update('jax_enable_x64', True)"
        return f"{expected}, which jax would cut to 32 bits; {remedy}"
    return None
