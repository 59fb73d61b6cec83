"""Trees of any classes that jax knows as containers: their children, and how two trees differ.

A file can hold dicts, lists, tuples and our own classes. Of any other container (an equinox module,
a flax box, a dataclass) it holds the name of the class and the children by their keys. What else
such a container knows only a tree like it can tell, which `sqjax.load` takes as `like`.
"""

from typing import Any, NamedTuple

import jax

from sqjax._trees import PyTree, named_leaves
from sqjax.files.arrays import shown
from sqjax.weights.quant_weight import is_quantized_leaf

#: How many of the paths at which two trees differ an error lists.
_SHOWN = 5


class Children(NamedTuple):
    """The children of a container by key, in order, and what puts them together again."""

    by_key: dict[str, Any]
    treedef: jax.tree_util.PyTreeDef


def is_container(x: Any) -> bool:
    """Whether jax looks inside: so for dicts and lists, and for classes that are registered."""
    return not jax.tree_util.all_leaves([x])


def class_name(x: Any) -> str:
    """The name of a container's class, without its module: code may move."""
    return type(x).__qualname__


def children(x: Any) -> Children:
    """The children of a container. For {"a": 1, "b": [2]} they are {"a": 1, "b": [2]}.

    Raises:
        ValueError: two of them have one key.
    """

    def is_below(y: Any) -> bool:
        return y is not x

    # All that is not x itself counts as a leaf, so that this stops at the children.
    flat, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=is_below)
    by_key = {}
    for keys, child in flat:
        by_key[jax.tree_util.keystr(keys, simple=True, separator="/")] = child
    if len(by_key) < len(flat):
        raise ValueError(
            f"two children of this {class_name(x)} have one key; rename one"
        )
    return Children(by_key, treedef)


def check_like(found: PyTree, like: PyTree) -> None:
    """Raises ValueError, naming the paths, unless two trees have one structure.

    A quantized leaf stands for a float leaf of its shape and dtype too, because what a program has
    at hand before it loads is often the float tree.
    """
    paths, leaves, treedef = named_leaves(found, is_leaf=is_quantized_leaf)
    names, expected, structure = named_leaves(like, is_leaf=is_quantized_leaf)
    # The paths first, because the leaves are compared pair by pair below.
    _check_paths(paths, names)
    problems = []
    for path, leaf, other in zip(paths, leaves, expected, strict=True):
        if not _fits(leaf, other):
            problems.append(
                f"{shown(path)}: expected {_text(other)}, got {_text(leaf)}"
            )
    if not problems and not _is_same(treedef, structure):
        problems.append(f"expected the containers {structure}, got {treedef}")
    if problems:
        raise ValueError(
            "the file does not hold a tree like `like`: "
            f"{'; '.join(problems[:_SHOWN])}"
        )


def _check_paths(paths: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Raises ValueError unless the leaves of the file are those of `like`."""
    if paths == names:
        return
    missing = sorted(set(names).difference(paths))
    extra = sorted(set(paths).difference(names))
    raise ValueError(
        f"expected the leaves of `like`; the file lacks {missing[:_SHOWN]} and has "
        f"{extra[:_SHOWN]} beside them, so give the tree that was saved, or one like it"
    )


def _is_same(treedef: Any, other: Any) -> bool:
    return treedef == other


def _fits(leaf: Any, other: Any) -> bool:
    """Whether a leaf of the file can stand where `other` stands."""
    if not is_quantized_leaf(other):
        return _type(leaf) == _type(other)
    structure, expected = map(jax.tree.structure, (leaf, other))
    types = list(map(_type, jax.tree.leaves(leaf)))
    expected_types = list(map(_type, jax.tree.leaves(other)))
    return _is_same(structure, expected) and types == expected_types


def _type(x: Any) -> tuple[Any, Any]:
    shape = getattr(x, "shape", None)
    return (None if shape is None else tuple(shape), getattr(x, "dtype", None))


def _text(x: Any) -> str:
    if is_quantized_leaf(x) or not hasattr(x, "shape"):
        return repr(x)
    return f"{x.dtype.name} {tuple(x.shape)}"
