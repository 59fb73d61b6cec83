"""What a save holds: a tree, and what came along with it, as JSON and named arrays.

    {"tree": JSON of the tree, "stats": JSON of the statistics, "config": JSON, "graph": JSON}

The last three are there only if they were given. How trees become JSON says
`sqjax.files.tree_json`. Arrays have their paths in the tree as names, those of the statistics
"__stats__/absmax/..." and so on. One file holds all of it, or a directory.
"""

import json
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from sqjax._arguments import check_mapping, expect
from sqjax._serialized import read_value, serialized_class, value_json
from sqjax._trees import PyTree
from sqjax.files.arrays import STORED, DeclaredArray, shown
from sqjax.files.header import Entry
from sqjax.files.tree_json import NO_TREE, from_json, to_json

#: The layout that is written where more than a tree is saved, or a directory.
VERSION = 3
#: The layout of one tree in one file, which is still written for that: older versions read it.
OF_A_TREE = 2
#: The parts that a save can have.
PARTS = ("tree", "stats", "config", "graph")
_STATS = ("__stats__",)
#: How many of a file's problems an error lists.
_PROBLEMS_SHOWN = 5


class Saved(NamedTuple):
    """What one save holds.

    Attributes:
        params: the tree.
        stats: the `Stats` that were saved with it, or None.
        config: the JSON by name that was saved with it, or None.
        graph: the `Graph` that was saved with it, or None.
    """

    params: PyTree
    stats: Any = None
    config: dict[str, Any] | None = None
    graph: Any = None


class Contents(NamedTuple):
    """What is written.

    Attributes:
        parts: {part: its JSON}, of those that there are.
        tensors: all arrays by name, as they are stored.
    """

    parts: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Place(NamedTuple):
    """Where an array is stored.

    Attributes:
        file: the opened file.
        entry: what the file's header says of it.
        shard: what stands before its name in errors: "sqjax-00001-of-00002.safetensors: ".
    """

    file: BinaryIO
    entry: Entry
    shard: str = ""


class Opened(NamedTuple):
    """A save that is opened, of which no array is read yet.

    Attributes:
        parts: {part: its JSON}.
        places: {name of an array: where it is stored}.
        sums: {name: checksum}; None in a layout that had none.
    """

    parts: Mapping[str, Any]
    places: Mapping[str, Place]
    sums: Mapping[str, str] | None


class Described(NamedTuple):
    """What the JSON of a save says.

    Attributes:
        saved: all of it, with a `jax.ShapeDtypeStruct` for every array.
        declared: {name: the dtype and shape that the array has in the tree}.
    """

    saved: Saved
    declared: dict[str, DeclaredArray]


def contents_of(
    tree: PyTree, stats: Any = None, config: Any = None, graph: Any = None
) -> Contents:
    """What is written of a tree, and of what comes along.

    Raises:
        ValueError: some of it can not be kept; names the path, or the argument.
    """
    tensors: dict[str, np.ndarray] = {}
    try:
        parts = {"tree": to_json((), tree, tensors)}
    except RecursionError as error:
        raise ValueError(
            "the tree is nested too deeply, or holds itself; make it flatter"
        ) from error
    if stats is not None:
        expected = "the Stats that sqjax.calibrate gives"
        # By its name, because this room knows no calibration.
        fits = isinstance(stats, serialized_class("Stats"))
        expect(fits, "stats", expected, stats)
        parts["stats"] = to_json(_STATS, stats, tensors)
    if config is not None:
        parts["config"] = _checked_config(config)
    if graph is not None:
        expected = "a Graph, such as stats.graph"
        expect(type(graph).__name__ == "Graph", "graph", expected, graph)
        parts["graph"] = value_json(graph)
    return Contents(parts, tensors)


def _checked_config(config: Any) -> dict[str, Any]:
    """The configuration, if JSON gives back what it is."""
    check_mapping(config, "config", "JSON by name, as {'alpha': 0.5}")
    given = dict(config)
    try:
        # Without NaN, because only Python's JSON has it.
        read = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"config: expected what JSON can hold (texts, finite numbers, lists, dicts): {error}"
        ) from error
    # JSON makes a list of a tuple, and a text of a number that is a key.
    if read != given:
        raise ValueError(
            f"config: expected no tuples, and keys that are texts, got {given!r:.200}"
        )
    return read


def described(parts: Mapping[str, Any], like: PyTree = NO_TREE) -> Described:
    """What the JSON of a save says; `like` as `sqjax.load` takes it.

    Raises:
        ValueError: it is none that `contents_of` gives; names the path.
    """
    declared: dict[str, DeclaredArray] = {}
    params = from_json((), parts["tree"], declared, like)
    stats = from_json(_STATS, parts.get("stats"), declared)
    graph = parts.get("graph")
    if graph is not None:
        graph = read_value(graph)
    return Described(Saved(params, stats, parts.get("config"), graph), declared)


def name_in_stats(path: str) -> str:
    """The name under which an array of the statistics is stored."""
    return "/".join((*_STATS, path))


def check_tensors(
    places: Mapping[str, Place], declared: Mapping[str, DeclaredArray]
) -> None:
    """Raises ValueError, naming the leaves, if the tensors are not what the tree says.

    All problems are found before one is raised, because a file with one wrong tensor usually has
    more.
    """
    problems = []
    for name, place in places.items():
        if name not in declared:
            problems.append(
                f"{place.shard}{shown(name)}: a tensor that is not in the tree"
            )
    for name, array in declared.items():
        problem = _tensor_problem(array, places.get(name))
        if problem is not None:
            problems.append(f"{shown(name)}: {problem}")
    if problems:
        first = "; ".join(problems[:_PROBLEMS_SHOWN])
        others = len(problems) - _PROBLEMS_SHOWN
        more = f"; and {others} more" if others > 0 else ""
        raise ValueError(
            f"{first}{more}; if the file was changed, save it again"
        )


def _tensor_problem(array: DeclaredArray, place: Place | None) -> str | None:
    """What is wrong with a tensor, given where it is stored; None if nothing is."""
    dtype, shape = array.stored
    expected = f"expected {dtype.name} {shape}"
    if place is None:
        return f"{expected}, got none"
    entry = place.entry
    if STORED.get(entry.dtype) != dtype or entry.shape != shape:
        return f"{expected}, got {entry.dtype} {entry.shape}"
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        remedy = "jax.config.update('jax_enable_x64', True)"
        return f"{expected}, which jax would cut to 32 bits; {remedy}"
    return None
