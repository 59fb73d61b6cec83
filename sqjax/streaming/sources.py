"""Where the parameters of a model come from, a part at a time: a checkpoint's files, or a tree."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from sqjax._arguments import check_mapping
from sqjax._trees import named_leaves
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.huggingface import open_checkpoint
from sqjax.models.checkpoints.mapping import leaf_shapes, read_leaves
from sqjax.models.checkpoints.quantized.stored_weight import placed
from sqjax.models.config import DecoderConfig
from sqjax.models.decoder import HEAD
from sqjax.models.model import check_model
from sqjax.models.stacking import check_layers

LAYERS = "model/layers/"


class Parts(NamedTuple):
    """The parameters of a model, read part by part.

    Attributes:
        config: of the model.
        shapes: the whole tree, of `jax.ShapeDtypeStruct`s.
        embedding: reads the tree of the parameters that the embedding needs.
        head: reads the tree of those that the final norm and the head need.
        layers: reads (number, tree) of each layer in turn. Drop a tree before you ask for the next.
    """

    config: DecoderConfig
    shapes: Any
    embedding: Callable[[], Any]
    head: Callable[[], Any]
    layers: Callable[[], Iterator[tuple[int, Any]]]


def layer_prefix(layer: int) -> str:
    """What the paths of a layer's leaves begin with."""
    return f"{LAYERS}{layer}/"


def layer_of_path(path: str) -> int | None:
    """The number of the layer that a leaf is in; None if it is in none."""
    if not path.startswith(LAYERS):
        return None
    number, _, _ = path.removeprefix(LAYERS).partition("/")
    return int(number)


def _is_of_embedding(path: str) -> bool:
    """Whether the embedding needs a parameter: all that neither a layer nor the head has."""
    return layer_of_path(path) is None and not path.startswith(HEAD)


def _is_of_head(config: DecoderConfig, path: str) -> bool:
    """Whether the head needs a parameter; a tied one needs the embedding too."""
    # A tied head reads what the embedding does: all that is in no layer.
    tied = config.tie_embeddings and layer_of_path(path) is None
    return tied or path.startswith(HEAD)


def _is_of_layer(path: str) -> bool:
    return layer_of_path(path) is not None


def checkpoint_directory(path: Any, what: str) -> Path:
    """The directory of a checkpoint.

    Raises:
        ValueError: it is none; `what` was called with it.
    """
    if not isinstance(path, str | os.PathLike) or not os.path.isdir(path):
        raise ValueError(
            f"{what}: expected a directory with config.json and safetensors files, got {path!r}; "
            "of any other model load the parameters, and call calibrate, smooth and quantize; "
            "nothing is downloaded by its Hugging Face id: pass the directory that "
            "huggingface_hub.snapshot_download(id) returns"
        )
    return Path(path)


def float_leaf(path: str, stored: Any, dtype: DTypeLike, sharding: Any) -> Any:
    """A leaf that was read, as a jax array.

    Raises:
        ValueError: it is quantized already.
    """
    if not isinstance(stored, np.ndarray):
        raise ValueError(
            f"{path}: expected floats, got a weight that is quantized already; "
            "sqjax.models.load(directory) loads it as it is"
        )
    return placed(stored, dtype, sharding)


@contextlib.contextmanager
def opened_parts(
    source: Any, dtype: DTypeLike, families: Sequence[Family]
) -> Iterator[Parts]:
    """The parts of a checkpoint's directory, or of (model, params).

    Raises:
        ValueError: it is neither, or the checkpoint or the parameters are not as they must be.
    """
    if isinstance(source, tuple) and len(source) == 2:
        yield _parts_of_tree(*source)
        return
    directory = checkpoint_directory(source, "calibrate_layers")
    with open_checkpoint(directory, families) as found:
        arguments = found.source, found.family, found.config
        shapes = leaf_shapes(*arguments, found.problems)

        def read(wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
            leaves = read_leaves(*arguments, dtype, (), wanted)
            for path, stored in leaves:
                yield path, float_leaf(path, stored, dtype, None)

        def tree(wanted: Callable[[str], bool]) -> Any:
            return unflatten_dict(dict(read(wanted)), sep="/")

        def layers() -> Iterator[tuple[int, Any]]:
            # No name for a layer here: the name would hold it while the next one is read.
            for number, leaves in itertools.groupby(
                read(_is_of_layer), _number
            ):
                yield number, _layer_tree(number, leaves)

        abstract = abstract_tree(shapes, dtype)
        # First, because what follows takes long.
        found.check_redundant()
        yield Parts(
            found.config,
            abstract,
            partial(tree, _is_of_embedding),
            partial(tree, partial(_is_of_head, found.config)),
            layers,
        )


def _layer_tree(number: int, leaves: Iterable[tuple[str, Any]]) -> Any:
    """The tree of one layer, with the paths that its leaves have within it."""
    prefix = layer_prefix(number)
    flat = {path.removeprefix(prefix): x for path, x in leaves}
    return unflatten_dict(flat, sep="/")


def _number(leaf: tuple[str, Any]) -> int:
    """The layer that a (path, leaf) is of."""
    number = layer_of_path(leaf[0])
    assert number is not None  # only leaves of layers are asked for
    return number


def abstract_tree(
    shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike
) -> Any:
    """The tree of leaves of these shapes, without numbers."""
    leaves = {
        path: jax.ShapeDtypeStruct(shape, dtype)
        for path, shape in shapes.items()
    }
    return unflatten_dict(leaves, sep="/")


def _parts_of_tree(model: Any, params: Any) -> Parts:
    """The parts of a tree that is in memory already: one that is memory-mapped, say."""
    check_model(model, "calibrate_layers")
    check_mapping(params, "calibrate_layers", "the parameters of a Model")
    of_layers = params["model"]["layers"]
    if check_layers(of_layers, model.config.num_layers):
        raise ValueError(
            "calibrate_layers: expected layers apart, got one stack of them; take it apart with "
            "sqjax.models.unstack_layers(params)"
        )

    def tree(wanted: Callable[[str], bool]) -> Any:
        leaves = flatten_dict(params, sep="/")
        kept = {path: x for path, x in leaves.items() if wanted(path)}
        return unflatten_dict(kept, sep="/")

    def layers() -> Iterator[tuple[int, Any]]:
        for number in range(model.config.num_layers):
            yield number, of_layers[str(number)]

    return Parts(
        model.config,
        _abstract(params),
        partial(tree, _is_of_embedding),
        partial(tree, partial(_is_of_head, model.config)),
        layers,
    )


def _abstract(params: Any) -> Any:
    """The tree without numbers. What is one array at two places stays one object."""
    _, leaves, treedef = named_leaves(params)
    known: dict[int, Any] = {}
    for leaf in leaves:
        known.setdefault(id(leaf), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.tree.unflatten(treedef, [known[id(leaf)] for leaf in leaves])
