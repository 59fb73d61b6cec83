"""`load` and `load_saved`: what `save` wrote, verified and put where it shall be."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import islice, starmap
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec, Sharding

from sqjax._trees import PyTree, named_leaves
from sqjax.files.arrays import DeclaredArray, shown
from sqjax.files.checksums import checksum
from sqjax.files.contents import (
    Opened,
    Saved,
    check_tensors,
    described,
    name_in_stats,
)
from sqjax.files.one_file import opened_file
from sqjax.files.opening import check_path
from sqjax.files.shards import opened_directory
from sqjax.files.structure import check_like
from sqjax.files.tree_json import NO_TREE
from sqjax.files.weight_checks import check_values
from sqjax.weights.quant_weight import is_quantized_leaf

#: A tree of shardings, one for all, or what makes a tree of them of the tree of shapes.
Shardings = Any


def load(
    path: str | os.PathLike[str],
    like: PyTree = NO_TREE,
    *,
    shardings: Shardings = None,
) -> PyTree:
    """Reads the tree that `save` wrote.

    The structure is the same, so what was compiled for that tree runs on this one. The arrays are
    jax arrays, int4 weights as this backend holds them (`sqjax.numerics.formats.container`). Files
    are opened once, and all that they say is checked before an array is read. Each leaf is mapped
    into memory, verified, and placed before the next: memory holds the tree and one leaf beside it.
    A byte that has changed is refused, by the checksums that `save` wrote.

    Args:
        path: of a file or directory that `save` wrote.
        like: a tree of the structure of the saved one, of arrays or of `jax.ShapeDtypeStruct`s:
            the containers of the result are those of `like`, and every leaf must have the shape and
            dtype that its leaf has there. Needed where the tree has containers that are no dict,
            list, tuple or None. A float leaf stands for a quantized one of its shape too.
        shardings: where the arrays are placed: a tree of `jax.sharding.Sharding`s (None: the
            default device) such as `sq.shardings` gives; one for all arrays; or a function that
            makes such a tree of the saved tree's shapes: ``lambda shapes: sq.shardings(shapes,
            of_float)``. Each device is given its own part of a leaf, and no more.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file, or no file at all; `save` did not write it, or
            that of a newer sqjax did; a checksum is not that of the array; a shard is missing, or
            of another save; tensors are missing, too many, or of another shape or dtype than the
            tree says; a weight is not valid, or has scales or codes that no quantizer gives; an
            array has 64 bits where jax has 32; the tree is not like `like`; a sharding does not fit
            its leaf. Names the file, and the paths in the tree.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, sqjax as sq
        >>> fn, x = lambda p, x: x @ p["w"], jnp.array([[1.0, 16.0]])
        >>> params = {"w": jnp.ones((2, 3))}
        >>> qparams = sq.quantize(params, sq.calibrate(fn, params, [x]), sq.W4A16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.save(f"{folder}/params", qparams)
        ...     same = sq.load(f"{folder}/params")
        >>> jax.jit(sq.quantized(fn))(same, x).round(1).tolist()
        [[17.0, 17.0, 17.0]]
    """
    return _loaded("load", path, like, shardings).params


def load_saved(
    path: str | os.PathLike[str],
    like: PyTree = NO_TREE,
    *,
    shardings: Shardings = None,
) -> Saved:
    """As `load`, with what was saved beside the tree.

    Args:
        path: as for `load`.
        like: as for `load`.
        shardings: of the tree, as for `load`. Statistics are on the default device.

    Returns:
        (params, stats, config, graph), by these names. What was not saved is None.

    Raises:
        FileNotFoundError: as `load`.
        ValueError: as `load`.

    Examples:
        >>> import tempfile, jax.numpy as jnp, sqjax as sq
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sq.save(f"{folder}/w8", {"w": jnp.ones(2)}, config={"alpha": 0.85})
        ...     saved = sq.load_saved(f"{folder}/w8")
        >>> saved.config, saved.stats is None, saved.params["w"].shape
        ({'alpha': 0.85}, True, (2,))
    """
    return _loaded("load_saved", path, like, shardings)


def saved_config(directory: Path) -> dict[str, Any]:
    """What was saved as `config` in a directory, of which no array is read; {} where nothing was.

    Raises:
        ValueError: as `load`, of what the index and the headers say.
    """
    try:
        with opened_directory(directory) as opened:
            return opened.parts.get("config", {})
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _loaded(what: str, path: Any, like: PyTree, shardings: Shardings) -> Saved:
    check_path(path, f"{what}(path)")
    try:
        with _opened(path) as opened:
            saved, declared = described(opened.parts, like)
            check_tensors(opened.places, declared)
            if like is not NO_TREE:
                check_like(saved.params, like)
            where = _where(saved.params, shardings)
            # Nothing but arrays is left to read, each of which is verified.
            of_tree = _Reader(opened, declared, str, where)
            of_stats = _Reader(opened, declared, name_in_stats, {})
            params, stats = of_tree(saved.params), of_stats(saved.stats)
            return saved._replace(params=params, stats=stats)
    except ValueError as error:
        raise ValueError(f"{what}: {path}: {error}") from error


def _opened(
    path: str | os.PathLike[str],
) -> AbstractContextManager[Opened]:
    is_directory = Path(path).is_dir()
    return opened_directory(Path(path)) if is_directory else opened_file(path)


class _Reader:
    """Reads the arrays of a tree, leaf by leaf."""

    def __init__(
        self,
        opened: Opened,
        declared: Mapping[str, DeclaredArray],
        name_of: Callable[[str], str],
        where: Mapping[str, Any],
    ):
        """`name_of` gives the name under which the array of a path is stored."""
        self._opened, self._declared = opened, declared
        self._name_of, self._where = name_of, where

    def __call__(self, abstract: PyTree) -> PyTree:
        """The tree with its arrays; a quantized leaf has several, which are checked together."""
        names, structs, _ = named_leaves(abstract)
        arrays = zip(names, structs, strict=True)
        paths, leaves, treedef = named_leaves(
            abstract, is_leaf=is_quantized_leaf
        )
        found = []
        for path, leaf in zip(paths, leaves, strict=True):
            structure = jax.tree.structure(leaf)
            # The arrays of a tree stand in the order of its leaves.
            own = list(islice(arrays, len(jax.tree.leaves(leaf))))
            found.append(self._leaf(path, structure, own))
        return jax.tree_util.tree_unflatten(treedef, found)

    def _leaf(self, path: str, structure: Any, own: list[Any]) -> Any:
        """A leaf of these (path, shape and dtype), verified and placed."""
        read = list(starmap(self._read, own))
        leaf = jax.tree.unflatten(structure, read)
        if is_quantized_leaf(leaf):
            check_values(path, leaf)
        # Copies on devices, so that what is mapped can go before the next leaf is read.
        placed = []
        for (name, _), array in zip(own, read, strict=True):
            placed.append(_placed(name, array, self._where.get(name)))
        return jax.tree.unflatten(structure, placed)

    def _read(self, path: str, struct: Any) -> np.ndarray:
        """An array, which may still be mapped."""
        name = self._name_of(path)
        place, declared = self._opened.places[name], self._declared[name]
        stored = declared.mapped(place.file, place.entry.first)
        sums = self._opened.sums
        if sums is not None and checksum(stored) != sums.get(name):
            raise ValueError(
                f"{place.shard}{shown(name)}: expected an array with the checksum that it was "
                "saved with, got another one: the file was changed or damaged; copy it or save it "
                "again"
            )
        # The struct says what memory holds: int8 for the file's int4, on a CPU.
        return declared.unpacked(stored).astype(struct.dtype, copy=False)


# Where arrays are placed --------------------------------------------------------------------------


def _is_sharding(x: Any) -> bool:
    return isinstance(x, Sharding | PartitionSpec | None)


def _where(abstract: PyTree, shardings: Shardings) -> dict[str, Any]:
    """{path of an array: its sharding, or None}.

    Raises:
        ValueError: the shardings are not those of this tree; names the leaves.
    """
    names, _, _ = named_leaves(abstract)
    if callable(shardings):
        shardings = shardings(abstract)
    where = dict.fromkeys(names, shardings)
    if not _is_sharding(shardings):
        given, found, _ = named_leaves(shardings, is_leaf=_is_sharding)
        where = dict(zip(given, found, strict=True))
        _check_names(names, where)
    for name in names:
        _check_sharding(name, where[name])
    return where


def _check_names(names: Iterable[str], where: Mapping[str, Any]) -> None:
    """Raises ValueError unless there is a sharding for every array, and no other."""
    missing = sorted(set(names) - where.keys())
    # None stands for a part that a weight does not have, too.
    given = {name for name in where if where[name] is not None}
    extra = sorted(given.difference(names))
    if missing or extra:
        raise ValueError(
            "shardings: expected one for every array of the tree, as sq.shardings gives them; "
            f"there are none for {missing[:5]}, and too many for {extra[:5]}"
        )


def _check_sharding(path: str, sharding: Any) -> None:
    if not isinstance(sharding, Sharding | None):
        raise ValueError(
            f"shardings: {shown(path)}: expected a Sharding or None, got {sharding!r}; a spec "
            "names no devices: NamedSharding(mesh, spec)"
        )


def _placed(path: str, array: np.ndarray, sharding: Sharding | None) -> Any:
    """The jax array. Always of a copy, because what is mapped would follow a file that changes."""
    if sharding is None:
        return jax.device_put(np.array(array))
    try:
        return jax.make_array_from_callback(
            array.shape, sharding, lambda part: np.array(array[part])
        )
    except ValueError as error:
        raise ValueError(f"shardings: {shown(path)}: {error}") from error
