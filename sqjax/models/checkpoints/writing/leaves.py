"""The leaves of a parameter tree as a checkpoint has them: layers apart, and kernels apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from sqjax._trees import is_float, named_leaves
from sqjax.files.arrays import check_savable
from sqjax.models.checkpoints.kinds import Config
from sqjax.models.checkpoints.mapping import parameter_shapes
from sqjax.models.checkpoints.names import Shape
from sqjax.models.stacking import layer_of
from sqjax.weights.quant_weight import is_quantized

_LAYERS = "model/layers/"
#: Between the names of kernels that are stored as one.
_FUSED = "+"


class Leaf(NamedTuple):
    """A leaf of the model with layers and kernels apart.

    Attributes:
        origin: the path of the leaf that it is in, in the tree that was given.
        shape: its own.
        dtype: its own; of a quantized leaf that of the float array that it stands for.
        quantized: whether it is quantized.
        read: gives it: an array, or a `QuantWeight`.
    """

    origin: str
    shape: Shape
    dtype: np.dtype
    quantized: bool
    read: Callable[[], Any]


def check_leaves(config: Config, params: Any) -> None:
    """Raises ValueError, naming leaves, unless a tree is one that a model can run.

    By names and shapes alone, so the leaves may be quantized, stacked and fused.
    """
    shapes = parameter_shapes(config, config.num_layers)
    leaves_apart(params, shapes, may_be_fused=True)


def leaves_apart(
    params: Any, shapes: Mapping[str, Shape], may_be_fused: bool = False
) -> dict[str, Leaf]:
    """{path: leaf} of a tree, of the leaves that a model of these shapes has.

    A stack of layers, (layers, in, out), is taken apart, and so are float kernels that `fuse` made
    one: each leaf is a slice, made when it is asked for.

    Args:
        params: the tree.
        shapes: {path: shape} of the model's leaves.
        may_be_fused: whether quantized kernels that `fuse` made one are taken. They can not be
            taken apart, so they are not to be read then.

    Raises:
        ValueError: listing leaves that are missing, that the model does not have, of another shape,
            or no arrays of floats.
    """
    found: dict[str, Leaf] = {}
    problems = []
    paths, leaves, _ = named_leaves(params, is_leaf=is_quantized)
    for path, x in zip(paths, leaves, strict=True):
        if not is_quantized(x):
            _check(path, x)
        whole = Leaf(
            path, x.shape, x.dtype, is_quantized(x), partial(_as_is, x)
        )
        for own, leaf in _unstacked(path, whole):
            if leaf.quantized and _FUSED in own and not may_be_fused:
                problems.append(
                    f"{path}: expected quantized kernels apart, got one that `fuse` made of "
                    "several; save the parameters from before `fuse`"
                )
            found.update(_unfused(own, leaf, shapes))
    # A fused leaf is missing under its own names too, which would say the same again.
    problems = problems or _differences(found, shapes)
    raise_all(problems)
    return found


def refuse_quantized(leaves: Mapping[str, Leaf], fix: str) -> None:
    """Raises ValueError, naming them, if some leaves are quantized; `fix` says what to do."""
    problems = [
        f"{leaf.origin}: expected a float leaf, got a quantized one; {fix}"
        for leaf in leaves.values()
        if leaf.quantized
    ]
    raise_all(problems)


def raise_all(problems: Sequence[str]) -> None:
    """Raises one ValueError with all problems, the first of many, if there are any."""
    if problems:
        unique = list(dict.fromkeys(problems))
        shown = "; ".join(unique[:10])
        more = len(unique) - 10
        raise ValueError(f"{shown}; and {more} more" if more > 0 else shown)


def _as_is(x: Any) -> Any:
    return x


def _check(path: str, x: Any) -> None:
    """Raises ValueError for what is no array of floats."""
    check_savable(path, x)
    if not is_float(x):
        raise ValueError(
            f"{path}: expected an array of floats, got {x.dtype.name}; quantize parameters with "
            "sqjax.quantize"
        )


def _unstacked(path: str, leaf: Leaf) -> Iterator[tuple[str, Leaf]]:
    """(path, leaf) of each layer, if the leaf is of a stack; or itself.

    "model/layers/mlp/up_proj/kernel" of shape (3, 8, 16) gives ".../0/mlp/up_proj/kernel", (8, 16),
    and two more.
    """
    inner = path.removeprefix(_LAYERS)
    first, _, _ = inner.partition("/")
    if inner == path or first.isdecimal() or not leaf.shape:
        yield path, leaf
        return
    # A slice is made when it is asked for, because all of them would be the model once more.
    for i in range(leaf.shape[0]):
        own = leaf._replace(
            shape=leaf.shape[1:], read=partial(layer_of, leaf.read(), i)
        )
        yield f"{_LAYERS}{i}/{inner}", own


def _unfused(
    path: str, leaf: Leaf, shapes: Mapping[str, Shape]
) -> dict[str, Leaf]:
    """{path: leaf} of the kernels that one holds side by side, or of itself.

    ".../gate_proj+up_proj/kernel" of shape (8, 32) is (8, 16) and (8, 16), by the model's shapes.
    """
    module, _, end = path.rpartition("/")
    parent, _, name = module.rpartition("/")
    paths = [f"{parent}/{part}/{end}" for part in name.split(_FUSED)]
    if len(paths) == 1 or not set(paths) <= shapes.keys():
        return {path: leaf}
    ends = list(accumulate(shapes[own][-1] for own in paths))
    if leaf.shape[-1:] != (ends[-1],):
        return {path: leaf}
    found = {}
    for own, first, last in zip(paths, [0, *ends], ends, strict=False):
        found[own] = leaf._replace(
            shape=(*leaf.shape[:-1], last - first),
            read=partial(_columns, leaf, first, last),
        )
    return found


def _columns(leaf: Leaf, first: int, last: int) -> np.ndarray:
    return np.asarray(leaf.read())[..., first:last]


def _differences(
    found: Mapping[str, Leaf], shapes: Mapping[str, Shape]
) -> list[str]:
    """One problem for each leaf that is missing, too many, or of another shape."""
    problems = []
    for path, shape in shapes.items():
        if path not in found:
            problems.append(
                f"{path}: expected a leaf of shape {shape}, got none; pass the whole tree that "
                "sqjax.models.load gave"
            )
        elif found[path].shape != shape:
            problems.append(
                f"{found[path].origin}: expected shape {shape} for {path}, got "
                f"{found[path].shape}; are these another model's?"
            )
    for path in found.keys() - shapes.keys():
        problems.append(
            f"{found[path].origin}: expected no such leaf, got one of shape {found[path].shape}; "
            "are these another model's?"
        )
    return sorted(problems)
