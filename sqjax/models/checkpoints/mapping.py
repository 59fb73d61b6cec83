"""From a checkpoint's tensors to the parameter tree: all names and shapes are checked first.

Then the tensors are read one by one, so that memory holds the model and one tensor beside it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.kinds import Config, kind_of
from sqjax.models.checkpoints.names import Found, Shape, their_shape
from sqjax.models.checkpoints.problems import raise_problems
from sqjax.models.checkpoints.quantized.stored_weight import (
    Stored,
    fill,
    placed,
    room_for,
    split,
)
from sqjax.models.model import Params

#: Given a leaf's path and its shape, where its array is placed; None for the default device.
Placement = Callable[[str, Shape], Any]


def on_the_default_device(path: str, shape: Shape) -> None:
    """The placement of a leaf that nothing is said about."""


class Source(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
        name: where they come from, for error messages.
        shapes: {a tensor's name in the file: its shape}.
        read: gives the array of a tensor; of one that is quantized already, all of it.
    """

    name: str
    shapes: Mapping[str, Shape]
    read: Callable[[str], Stored]


def assemble(
    source: Source,
    family: Family,
    config: Config,
    dtype: DTypeLike,
    problems: Iterable[str] = (),
    placement: Placement = on_the_default_device,
) -> Params:
    """Builds the parameter tree of a model from named tensors.

    Args:
        source: the tensors.
        family: its table says which tensor fills which leaves.
        config: the model.
        dtype: the dtype of every leaf.
        problems: what the caller already found wrong.
        placement: where each leaf is placed.

    Raises:
        ValueError: one error with every problem: tensors that are unknown, missing, doubled or
            misshapen.
    """
    leaves = {}
    for path, array in read_leaves(source, family, config, dtype, problems):
        leaves[path] = placed(array, dtype, placement(path, array.shape))
    return unflatten_dict(leaves, sep="/")


def read_leaves(
    source: Source,
    family: Family,
    config: Config,
    dtype: DTypeLike,
    problems: Iterable[str] = (),
    wanted: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Stored]]:
    """(path, array) of every leaf, layer by layer, read when it is asked for.

    Arrays have the file's dtype; each is checked for numbers that `dtype` cannot hold. Of a leaf
    that is quantized already it is a `StoredWeight`. Tensors of which no leaf is `wanted` are not
    read; None: all are.
    """
    shapes = parameter_shapes(config, layers_in(source.shapes, config))
    matched, match_problems = _match(source, family, config, shapes)
    raise_problems(source.name, [*problems, *match_problems])
    partial: dict[str, Stored] = {}
    missing = _entries(matched.values(), shapes)
    for name in sorted(matched, key=lambda name: _order(matched[name])):
        found = matched[name]
        if wanted is not None and not any(map(wanted, found.paths)):
            continue
        theirs = source.read(name)
        of_leaves = [_entry_shape(shapes, found, p) for p in found.paths]
        if isinstance(theirs, np.ndarray):
            _check_range(source.name, name, theirs, dtype)
        parts = split(found.layout, config, theirs, of_leaves)
        for path, part in zip(found.paths, parts, strict=True):
            if found.entry is None:
                yield path, part
                continue
            if path not in partial:
                partial[path] = room_for(shapes[path][0], part)
            where = f"{source.name}: {name}"
            fill(partial[path], found.entry, part, where)
            missing[path] -= 1
            if missing[path] == 0:
                yield path, partial.pop(path)


def leaf_shapes(
    source: Source,
    family: Family,
    config: Config,
    problems: Iterable[str] = (),
) -> dict[str, Shape]:
    """{path: shape} of every leaf that `read_leaves` gives; nothing is read.

    Raises:
        ValueError: as `assemble`.
    """
    shapes = parameter_shapes(config, layers_in(source.shapes, config))
    _, match_problems = _match(source, family, config, shapes)
    raise_problems(source.name, [*problems, *match_problems])
    return shapes


def _entries(
    found: Iterable[Found], shapes: Mapping[str, Shape]
) -> dict[str, int]:
    """{path: number of entries} of the leaves that tensors fill entry by entry."""
    counts = {}
    for one in found:
        if one.entry is not None:
            for path in one.paths:
                counts[path] = shapes[path][0]
    return counts


def _order(found: Found) -> tuple:
    """Layers by number, each whole before the next; entries of one leaf together."""
    path = found.paths[0]
    numbers = [int(part) for part in path.split("/") if part.isdecimal()]
    return numbers or [-1], path, found.entry or 0


def _entry_shape(shapes: Mapping[str, Shape], found: Found, path: str) -> Shape:
    """The shape of what a tensor fills of a leaf: all of it, or one entry of its first axis."""
    return shapes[path] if found.entry is None else shapes[path][1:]


def _check_range(
    source: str, name: str, array: np.ndarray, dtype: DTypeLike
) -> None:
    """Raises ValueError if a number would become infinite in the dtype that is asked for."""
    bound = float(jnp.finfo(dtype).max)
    if float(jnp.finfo(array.dtype).max) <= bound:
        return
    largest = np.max(np.abs(array), where=np.isfinite(array), initial=0)
    if largest > bound:
        raise ValueError(
            f"{source}: {name}: expected numbers up to {bound:.3g}, the range of "
            f"{jnp.dtype(dtype).name}, got {largest:.3g}; load it in a wider dtype"
        )


def _match(
    source: Source,
    family: Family,
    config: Config,
    shapes: Mapping[str, Shape],
) -> tuple[dict[str, Found], list[str]]:
    """({the tensor's own name: what it fills}, problems).

    Nothing is read: the shapes in the files' headers are compared with the model's.
    """
    layers = layers_in(source.shapes, config)
    matched: dict[str, Found] = {}
    filled: dict[tuple[str, int | None], str] = {}
    problems = []
    if config.num_layers > layers:
        problems.append(
            f"expected the tensors of {config.num_layers} layers, got those of {layers}"
        )
    for name, shape in source.shapes.items():
        found = family.find(name, shapes)
        if found is None or not _entry_is_there(shapes, found):
            problems.append(
                f"{name}: expected no such tensor, got one of shape {shape}"
            )
            continue
        for path in found.paths:
            other = filled.setdefault((path, found.entry), name)
            if other != name:
                problems.append(
                    f"{name}: expected one tensor for {path}, got {other} too"
                )
        matched[name] = found
        of_leaves = [_entry_shape(shapes, found, p) for p in found.paths]
        expected = their_shape(config, found.layout, tuple(of_leaves))
        if shape != expected:
            problems.append(f"{name}: expected shape {expected}, got {shape}")
    return matched, problems + _missing(shapes, matched.values(), filled)


def _entry_is_there(shapes: Mapping[str, Shape], found: Found) -> bool:
    """Whether the leaf has the entry that a tensor fills."""
    return found.entry is None or found.entry < shapes[found.paths[0]][0]


def _missing(
    shapes: Mapping[str, Shape],
    found: Iterable[Found],
    filled: Mapping[tuple[str, int | None], str],
) -> list[str]:
    """One problem for each leaf that no tensor fills, or not all of its entries."""
    expected = Counter(dict.fromkeys(shapes, 1) | _entries(found, shapes))
    # A difference of counters keeps what is above 0.
    missing = expected - Counter(path for path, _ in filled)
    return [
        f"{path}: expected a tensor for it, got none"
        for path in sorted(missing)
    ]


#: Where a tensor's name says which layer it is of.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blk|blocks)\.(\d+)\.")


def layers_in(names: Iterable[str], config: Config) -> int:
    """How many of the model's layers the names of tensors speak of."""
    found = set()
    for name in names:
        match = _LAYER.search(name)
        if match:
            found.add(match[1])
    # Of as many layers as there are, because any number may be declared.
    return min(config.num_layers, len(found))


def parameter_shapes(config: Config, layers: int) -> dict[str, Shape]:
    """{path: shape} of every parameter of a model of so many layers.

    For a hidden size of 64 and two heads of 16, layers/0/self_attn/q_proj/kernel is (64, 32).
    """
    kind = kind_of(config)
    shapes: dict[str, Shape] = {}
    for number in range(layers):
        of_one = _of_one_layer(kind.layer(config, number))
        for path, shape in of_one.items():
            own = path.replace("layers/0/", f"layers/{number}/")
            shapes[own] = shape
    return shapes


@lru_cache(maxsize=64)
def _of_one_layer(config: Config) -> dict[str, Shape]:
    """{path: shape} of every parameter of a model of one layer."""
    params = jax.eval_shape(lambda: kind_of(config).init(config))
    leaves = flatten_dict(params, sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}
