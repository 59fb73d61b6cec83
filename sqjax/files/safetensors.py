"""`save` and `load`: a parameter tree, quantized or not, as one safetensors file, bit for bit.

The file holds every array under its path in the tree, int4 two to a byte. Its metadata holds the
version of this layout ("sqjax"), the tree as JSON ("tree"; see `sqjax.files.tree_json`) and the
checksums of all of it (`sqjax.files.checksums`).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._trees import PyTree, named_leaves
from sqjax.files.arrays import STORED, DeclaredArray, shown
from sqjax.files.aside import written_aside
from sqjax.files.checksums import checksum, read_sums, sealed
from sqjax.files.header import Entry, Header, read_header
from sqjax.files.opening import check_path, open_file
from sqjax.files.structure import check_like, is_quantized_leaf
from sqjax.files.tree_json import NO_TREE, from_json, to_json
from sqjax.files.weight_checks import check_values

#: The layout that `save` writes and `load` reads.
VERSION = 2
#: The layout before it, which `load` reads too: it had no checksums.
_WITHOUT_SUMS = 1
#: How many of a file's problems an error lists.
_PROBLEMS_SHOWN = 5


def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes a parameter tree to one safetensors file; `load` gives it back bit for bit.

    Everything is checked before a byte is written. The file is written beside `path` and then
    renamed, because so a file that is already there stays whole until the new one is. int4 takes
    half a byte a weight; float8 and bfloat16 are kept as they are. No pickle. NaN and infinity are
    kept too. The file holds a checksum of every array and of the tree, which `load` verifies.

    Args:
        path: of the file; its directory must exist. A file that is there is replaced, and hands on
            its mode.
        tree: dicts (with keys that are all str or all int), lists, tuples and None, of jax or
            numpy arrays, `QuantWeight`s and `QTensor`s. An array that the tree holds twice is
            written twice. Of any other container that jax knows (an equinox module, a dataclass, a
            flax box) the children are written by their keys: `load` then needs a tree `like` it.

    Raises:
        ValueError: the file can not keep a node or a dtype; a weight is not valid; an array is
            deleted, traced, of a weak type, or in part on other hosts; two leaves have one path.
            Names the path in the tree. Or `path` is a directory, or in none, or a device or FIFO.
        OSError: the file can not be written. One that was there stays.

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
    file = Path(os.path.realpath(path))
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(
            f"save: {path}: expected a file's path in a directory that exists; "
            f"make {file.parent} first"
        )
    tensors: dict[str, np.ndarray] = {}
    try:
        tree_json = json.dumps(to_json((), tree, tensors))
        with written_aside(file) as aside:
            metadata = sealed(VERSION, tree_json, tensors)
            _write(aside, tensors, metadata, path)
    except ValueError as error:
        raise ValueError(f"save: {path}: {error}") from error
    except RecursionError as error:
        raise ValueError(
            f"save: {path}: the tree is nested too deeply, or holds itself; make it flatter"
        ) from error


def _write(
    aside: Path,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str],
    path: str | os.PathLike[str],
) -> None:
    """Writes the file that will be renamed to `path`, which errors name."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, aside, metadata)
    except SafetensorError as error:
        # The library has a class of its own for a full disk, which a caller would not expect.
        raise OSError(f"save: {path}: {error}") from error


def load(path: str | os.PathLike[str], like: PyTree = NO_TREE) -> PyTree:
    """Reads the tree that `save` wrote.

    The structure is the same, so what was compiled for that tree runs on this one. The arrays are
    jax arrays on the default device, int4 weights as this backend holds them
    (`sqjax.numerics.formats.container`); `jax.device_put(tree, sq.shardings(tree, ...))` spreads
    them over a mesh. The file is opened once, and checked before an array is read. A byte of it
    that has changed is refused, by the checksums that `save` wrote.

    Args:
        path: of a file that `save` wrote.
        like: a tree of the structure of the saved one, of arrays or of `jax.ShapeDtypeStruct`s:
            the containers of the result are those of `like`, and every leaf must have the shape and
            dtype that its leaf has there. Needed where the tree has containers that are no dict,
            list, tuple or None. A float leaf stands for a quantized one of its shape too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file, or no file at all; `save` did not write it, or
            that of a newer sqjax did; a checksum is not that of the array; tensors are missing, too
            many, or of another shape or dtype than the tree says; a weight is not valid, or has
            scales or codes that no quantizer gives; an array has 64 bits where jax has 32; the tree
            is not like `like`. Names the file, and the paths in the tree.

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
    check_path(path, "load(path)")
    file = path
    declared: dict[str, DeclaredArray] = {}
    try:
        with open_file(file) as opened:
            header = _header(opened)
            tree_json, sums = _tree_in(header.metadata)
            abstract = from_json((), tree_json, declared, like)
            _check_tensors(header.tensors, declared)
            if like is not NO_TREE:
                check_like(abstract, like)
            return _read(opened, header, declared, abstract, sums)
    except ValueError as error:
        raise ValueError(f"load: {file}: {error}") from error


def _read(
    opened: BinaryIO,
    header: Header,
    declared: Mapping[str, DeclaredArray],
    abstract: PyTree,
    sums: Mapping[str, Any] | None,
) -> PyTree:
    """The tree with its arrays, leaf by leaf: a quantized leaf has several, checked together."""
    names, structs, _ = named_leaves(abstract)
    arrays = iter(zip(names, structs, strict=True))

    def read_next() -> np.ndarray:
        name, struct = next(arrays)
        stored = declared[name].read_stored(opened, header.tensors[name].first)
        if sums is not None:
            _check_sum(name, stored, sums)
        array = declared[name].unpacked(stored)
        # The struct says what memory holds: int8 for the file's int4, on a CPU.
        return array.astype(struct.dtype, copy=False)

    paths, leaves, treedef = named_leaves(abstract, is_leaf=is_quantized_leaf)
    found = []
    for path, leaf in zip(paths, leaves, strict=True):
        leaf = jax.tree.map(lambda _: read_next(), leaf)
        if is_quantized_leaf(leaf):
            check_values(path, leaf)
        found.append(jax.tree.map(jnp.asarray, leaf))
    return jax.tree_util.tree_unflatten(treedef, found)


def _header(opened: BinaryIO) -> Header:
    try:
        return read_header(opened)
    except ValueError as error:
        raise ValueError(
            f"expected a whole safetensors file, got {error}; copy it or save it again"
        ) from error


def _check_sum(name: str, stored: np.ndarray, sums: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the leaf, if an array is not the one that was saved."""
    if checksum(stored) != sums.get(name):
        raise ValueError(
            f"{shown(name)}: expected an array with the checksum that it was saved with, got "
            "another one: the file was changed or damaged; copy it or save it again"
        )


def _tree_in(
    metadata: Mapping[str, str],
) -> tuple[Any, dict[str, Any] | None]:
    """The JSON of the tree and the checksums, from the metadata of a file that this version reads.

    The checksums are None where the layout has none.
    """
    version = metadata.get("sqjax", "none")
    if not version.isdecimal() or "tree" not in metadata:
        found = sorted(metadata)[:5]
        raise ValueError(
            f"expected a file of sqjax.save, got metadata {found}; read other safetensors files "
            "with safetensors.flax.load_file, models with sqjax.models.load"
        )
    # A seal says that the file was written with sums, whatever became of its version.
    is_old = int(version) == _WITHOUT_SUMS and "seal" not in metadata
    if int(version) > VERSION:
        raise ValueError(
            f"expected layout version {VERSION}, got {version}; update sqjax"
        )
    sums = None if is_old else read_sums(metadata)
    try:
        return json.loads(metadata["tree"]), sums
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected the tree as JSON, got {error}; save it again"
        ) from error


def _check_tensors(
    header: Mapping[str, Entry], declared: Mapping[str, DeclaredArray]
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


def _tensor_problem(array: DeclaredArray, entry: Entry | None) -> str | None:
    """What is wrong with a tensor, given its entry in the header; None if nothing is."""
    dtype, shape = array.stored
    expected = f"expected {dtype.name} {shape}"
    if entry is None:
        return f"{expected}, got none"
    if STORED.get(entry.dtype) != dtype or entry.shape != shape:
        return f"{expected}, got {entry.dtype} {entry.shape}"
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        remedy = "jax.config.update('jax_enable_x64', True)"
        return f"{expected}, which jax would cut to 32 bits; {remedy}"
    return None
