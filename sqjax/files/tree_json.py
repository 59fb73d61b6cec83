"""A parameter tree as JSON and named arrays, and back: the layout of the files of `save`.

A node of the JSON is null (None) or {kind: content}, where the kinds are

- "dict": [[key, node], ...]; "list" and "tuple": [node, ...];
- "array": [dtype, shape], the array itself being stored under its path in the tree;
- "class": [name of the class, {static field: JSON}, [[field, node], ...]], a class of sqjax such as
  `Stats`;
- "node": [name of the class, [[key, node], ...]], any other container that jax knows;
- "QTensor", "QuantWeight", "Outliers": {field: content}, where the content of a field that holds
  arrays is a node, and that of any other is the plain value.

For example {"w": [x]} with a float32 x of shape (2, 3), which is stored as "w/0", is

    {"dict": [["w", {"list": [{"array": ["float32", [2, 3]]}]}]]}
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from sqjax._serialized import (
    is_serialized,
    rebuilt,
    serialized_class,
    static_json,
)
from sqjax.files.arrays import (
    DTYPES,
    DeclaredArray,
    as_stored,
    check_savable,
    shown,
)
from sqjax.files.header import is_size
from sqjax.files.structure import (
    Children,
    children,
    class_name,
    is_container,
)
from sqjax.files.weight_checks import check_parts, check_values
from sqjax.numerics.formats import FORMATS, INT4, Format, container
from sqjax.numerics.weight_products import Activations
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight

#: The keys from the root of the tree to a node, as texts; the root's are ().
Keys = tuple[str, ...]
#: What stands for a tree that was not given, because None is a tree too.
NO_TREE = object()


def path_of(keys: Keys) -> str:
    """The path of a node, as `sqjax._trees.named_leaves` has it: ("a", "0") is "a/0"."""
    return "/".join(keys)


# The fields of our classes ------------------------------------------------------------------------


class Fields(NamedTuple):
    """The names of a class's fields.

    Attributes:
        nodes: those that hold arrays or other nodes.
        values: those that hold plain values, which a pytree keeps in its structure.
    """

    nodes: tuple[str, ...]
    values: tuple[str, ...]


FIELDS: dict[type, Fields] = {
    QTensor: Fields(
        nodes=("values", "scale", "zero", "group_scale"),
        values=("order", "dtype", "group", "fmt"),
    ),
    QuantWeight: Fields(
        nodes=("tensor", "input_scale", "smoothing", "outliers"),
        values=("activations", "contracted", "activation_format", "rotation"),
    ),
    Outliers: Fields(nodes=("channels", "weight"), values=()),
}


#: Fields that files of before do not have: None is not written, so that others stay as they were.
_LATER = ("rotation",)


class PlainValue(NamedTuple):
    """How a plain value is read from JSON: whether the JSON is one, and what it becomes."""

    is_valid: Callable[[Any], bool]
    decode: Callable[[Any], Any]


def _as_it_is(value: Any) -> Any:
    return value


def _is_positive(value: Any) -> bool:
    return (
        type(value) is int and value > 0
    )  # `isinstance` would take True for 1


def _is_size_or_none(value: Any) -> bool:
    return value is None or _is_positive(value)


def _is_list_of_axes(value: Any) -> bool:
    return type(value) is list and set(map(type, value)) <= {int}


def _is_name_among(names: Iterable[str | None]) -> Callable[[Any], bool]:
    """That a value is one of these names, where it may be of a type that has no hash."""
    names = list(names)
    return lambda value: value in names


_ACTIVATIONS = (None, *get_args(Activations))

#: {name of a field: its plain value}.
VALUES: dict[str, PlainValue] = {
    "order": PlainValue(_is_list_of_axes, tuple),
    "dtype": PlainValue(_is_name_among(DTYPES), DTYPES.__getitem__),
    "group": PlainValue(_is_size_or_none, _as_it_is),
    "fmt": PlainValue(_is_name_among(FORMATS), FORMATS.__getitem__),
    "activations": PlainValue(_is_name_among(_ACTIVATIONS), _as_it_is),
    "contracted": PlainValue(_is_positive, _as_it_is),
    "activation_format": PlainValue(_is_name_among(FORMATS), _as_it_is),
    "rotation": PlainValue(_is_size_or_none, _as_it_is),
}


def _decoded(keys: Keys, field: str, value: Any) -> Any:
    """A plain value, from JSON."""
    plain = VALUES[field]
    if not plain.is_valid(value):
        raise ValueError(
            f"{shown(path_of(keys))}: expected a known {field}, got {value!r}; "
            "quantize the float leaf again"
        )
    return plain.decode(value)


# Writing ------------------------------------------------------------------------------------------


def to_json(keys: Keys, node: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The JSON of the node at `keys`; every array below it is added to `tensors`, as stored.

    Raises:
        ValueError: the file can not keep a node, or a quantized weight is not valid; names its
            path.
    """
    if node is None:
        return None
    # By the exact type, because a subclass may hold more than its items, which would be lost.
    kind = _KIND_OF.get(type(node)) or _kind_of_others(node)
    return {kind: KINDS[kind].to_json(keys, node, tensors)}


def _kind_of_others(node: Any) -> str:
    if is_serialized(node):
        return "class"
    return "node" if is_container(node) else "array"


def _dict_to_json(
    keys: Keys, node: dict[Any, Any], tensors: dict[str, np.ndarray]
) -> Any:
    # jax sorts the keys of a dict, and text can not be compared with integers.
    types = set(map(type, node))
    of_one_type = types in (set(), {str}, {int})
    if not of_one_type or not all(map(_is_unicode, node)):
        raise ValueError(
            f"{shown(path_of(keys))}: expected keys all str or all int, got {list(node)[:5]}; "
            "rename them"
        )
    # Pairs, because the keys of a JSON object are text: integers would not come back.
    pairs = []
    for key, x in node.items():
        pairs.append([key, to_json((*keys, str(key)), x, tensors)])
    return pairs


def _is_unicode(key: str | int) -> bool:
    """Whether a key has a UTF-8 form: half of a surrogate pair has none."""
    return str(key).encode(errors="ignore").decode() == str(key)


def _items_to_json(
    keys: Keys, node: Sequence[Any], tensors: dict[str, np.ndarray]
) -> Any:
    return [to_json((*keys, str(i)), x, tensors) for i, x in enumerate(node)]


def _node_to_json(keys: Keys, node: Any, tensors: dict[str, np.ndarray]) -> Any:
    found = children(node).by_key.items()
    pairs = [[key, to_json((*keys, key), x, tensors)] for key, x in found]
    return [class_name(node), pairs]


def _ours_to_json(keys: Keys, node: Any, tensors: dict[str, np.ndarray]) -> Any:
    found = children(node).by_key.items()
    pairs = [[key, to_json((*keys, key), x, tensors)] for key, x in found]
    return [class_name(node), static_json(node), pairs]


def _array_to_json(keys: Keys, x: Any, tensors: dict[str, np.ndarray]) -> Any:
    path = path_of(keys)
    check_savable(path, x)
    if path in tensors or path == "__metadata__":
        raise ValueError(
            f"{shown(path)}: two leaves have this path, or safetensors keeps it to itself; "
            "rename a key"
        )
    # The format is row-major, whatever the order in memory is.
    array = np.asarray(x, order="C")
    tensors[path] = as_stored(array)
    # What the array is in the tree, because the file has int4 of (3, 7) as uint8 of (3, 4).
    return [array.dtype.name, list(array.shape)]


def _leaf_to_json(
    keys: Keys, leaf: QTensor | QuantWeight, tensors: dict[str, np.ndarray]
) -> Any:
    """A quantized leaf: its plain values, then its arrays, once both are found valid."""
    values = _values_to_json(keys, leaf)
    if isinstance(leaf, QTensor):
        leaf = _tensor_to_save(keys, leaf)
    nodes = _nodes_to_json(keys, leaf, tensors)
    if isinstance(leaf, QuantWeight):
        check_parts(path_of(keys), leaf)
        check_values(path_of(keys), jax.tree.map(np.asarray, leaf))
    return {**nodes, **values}


def _nodes_to_json(
    keys: Keys, node: Any, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    """{field: JSON} of the fields that hold arrays or other nodes."""
    found = {}
    for name in FIELDS[type(node)].nodes:
        found[name] = to_json((*keys, name), getattr(node, name), tensors)
    return found


def _values_to_json(keys: Keys, node: Any) -> dict[str, Any]:
    """{field: JSON} of the fields that hold plain values, if `load` will know them."""
    found = {}
    for name in FIELDS[type(node)].values:
        value = _plain(getattr(node, name))
        # Raises if the value would not come back.
        _decoded(keys, name, value)
        if value is not None or name not in _LATER:
            found[name] = value
    return found


def _plain(value: Any) -> Any:
    """A plain value as JSON has it: dtypes and formats by name, tuples as lists."""
    if isinstance(value, np.dtype | Format):
        known = value in DTYPES.values() or value in FORMATS.values()
        return (
            value.name if known else repr(value)
        )  # an unknown one is shown by the error
    if isinstance(value, tuple):
        return list(value)
    return value


def _tensor_to_save(keys: Keys, tensor: QTensor) -> QTensor:
    """The tensor, checked, and int4 values as jnp.int4, also where they were stored as int8."""
    path = path_of(keys)
    optional = [x for x in (tensor.zero, tensor.group_scale) if x is not None]
    for x in (tensor.values, tensor.scale, *optional):
        check_savable(path, x)
    tensor.check(shown(path))
    check_parts(path, tensor)
    check_values(path, jax.tree.map(np.asarray, tensor))
    if tensor.fmt != INT4:
        return tensor
    values = np.asarray(tensor.values).astype(np.int8)
    return replace(tensor, values=values.astype(INT4.dtype))


# Reading ------------------------------------------------------------------------------------------


def from_json(
    keys: Keys,
    node: Any,
    declared: dict[str, DeclaredArray],
    like: Any = NO_TREE,
) -> Any:
    """The tree that a JSON describes, with a ShapeDtypeStruct for each array.

    Args:
        keys: of the node in the tree.
        node: the JSON.
        declared: gets {path: what the JSON says} of every array. The ShapeDtypeStruct says what
            memory will hold, which may be int8 where the JSON says int4.
        like: the node at this place in a tree of the same structure, which tells what JSON can
            not; or `NO_TREE`.

    Raises:
        ValueError: the JSON is not one that `to_json` writes, a weight is not valid, or a container
            is of a class that only `like` could tell; names the path.
    """
    if node is None:
        return None
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(
            f"{shown(path_of(keys))}: expected a node as {{kind: content}}, got {node!r}; "
            "save it again"
        )
    [(kind, content)] = node.items()
    # The content may be any JSON at all: where it is not what the kind asks for, taking it apart
    # fails with one of these errors.
    try:
        return KINDS[kind].from_json(keys, content, declared, like)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{shown(path_of(keys))}: the header does not describe a {kind} ({error!r}); "
            "save it again"
        ) from error


def _children_of(like: Any) -> Children:
    """The children of a node of `like`; none where it is no container, or there is no such node."""
    if like is not NO_TREE and is_container(like):
        return children(like)
    return Children({}, jax.tree.structure(None))


def _children_from_json(
    keys: Keys,
    pairs: Iterable[Any],
    declared: dict[str, DeclaredArray],
    like: Any,
) -> dict[Any, Any]:
    """{key: child} of [key, JSON] pairs; each is given the child of `like` that has its key."""
    of_like = _children_of(like).by_key
    found = {}
    for key, x in pairs:
        if not isinstance(key, str | int):
            raise TypeError(f"expected a key, got {key!r}")
        below = (*keys, str(key))
        same = of_like.get(str(key), NO_TREE)
        found[key] = from_json(below, x, declared, same)
    return found


def _dict_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> Any:
    return _children_from_json(keys, content, declared, like)


def _list_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> list[Any]:
    if not isinstance(content, list):
        raise TypeError(f"expected a list, got {content!r}")
    pairs = enumerate(content)
    return list(_children_from_json(keys, pairs, declared, like).values())


def _tuple_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> Any:
    return tuple(_list_from_json(keys, content, declared, like))


def _node_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> Any:
    """A container of another class, put together as the one of `like` is."""
    name, pairs = content
    known = _children_of(like)
    found = _children_from_json(keys, pairs, declared, like)
    came, is_same = "no `like`", False
    if like is not NO_TREE:
        came = f"{class_name(like)} with {list(known.by_key)}"
        is_same = class_name(like) == name
    if not is_same or list(found) != list(known.by_key):
        raise ValueError(
            f"{shown(path_of(keys))}: it is a {name} with the children {list(found)}, which a "
            "file can not make: say load(path, like=tree), with the tree that was saved or one of "
            f"its structure; got {came}"
        )
    return jax.tree_util.tree_unflatten(known.treedef, list(found.values()))


def _ours_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> Any:
    name, static, pairs = content
    cls = serialized_class(name)
    found = _children_from_json(keys, pairs, declared, NO_TREE)
    return rebuilt(cls, static, found)


def _array_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> jax.ShapeDtypeStruct:
    dtype_name, sizes = content
    if not isinstance(sizes, list) or not all(map(is_size, sizes)):
        raise TypeError(f"expected the shape of an array, got {sizes!r}")
    array = DeclaredArray(DTYPES[dtype_name], tuple(sizes))
    path = path_of(keys)
    if path in declared:
        raise ValueError(
            f"{shown(path)}: two leaves have this path; save it again"
        )
    declared[path] = array
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _tensor_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> QTensor:
    """The tensor, checked, with the dtype in which this backend holds its values.

    For example int8 for int4 on a CPU: see `sqjax.numerics.formats.container`.
    """
    tensor = QTensor(**_fields_from_json(keys, QTensor, content, declared))
    values = tensor.values
    if values.dtype == tensor.fmt.dtype:
        held = jax.ShapeDtypeStruct(values.shape, container(tensor.fmt))
        tensor = replace(tensor, values=held)
    tensor.check(shown(path_of(keys)))
    check_parts(path_of(keys), tensor)
    return tensor


def _weight_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> QuantWeight:
    weight = QuantWeight(
        **_fields_from_json(keys, QuantWeight, content, declared)
    )
    check_parts(path_of(keys), weight)
    return weight


def _outliers_from_json(
    keys: Keys, content: Any, declared: dict[str, DeclaredArray], like: Any
) -> Outliers:
    return Outliers(**_fields_from_json(keys, Outliers, content, declared))


def _fields_from_json(
    keys: Keys, cls: type, content: Any, declared: dict[str, DeclaredArray]
) -> dict[str, Any]:
    """{field: what it holds} of all fields of a class."""
    known = (*FIELDS[cls].nodes, *FIELDS[cls].values)
    unknown = sorted(set(content).difference(known))
    if unknown:
        raise ValueError(
            f"{shown(path_of(keys))}: expected {known}, got also {unknown}; update sqjax"
        )
    found = {}
    for name in FIELDS[cls].nodes:
        found[name] = from_json((*keys, name), content[name], declared)
    for name in FIELDS[cls].values:
        value = content.get(name) if name in _LATER else content[name]
        found[name] = _decoded(keys, name, value)
    return found


# Both ---------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of node: the class of its values, and how they are written and read."""

    cls: type | None
    to_json: Callable[[Keys, Any, dict[str, np.ndarray]], Any]
    from_json: Callable[[Keys, Any, dict[str, DeclaredArray], Any], Any]


#: {kind, as the JSON names it: how it is written and read}.
KINDS: dict[str, Kind] = {
    "dict": Kind(dict, _dict_to_json, _dict_from_json),
    "list": Kind(list, _items_to_json, _list_from_json),
    "tuple": Kind(tuple, _items_to_json, _tuple_from_json),
    # What jax does not look into is an array, or refused as one.
    "array": Kind(None, _array_to_json, _array_from_json),
    "class": Kind(None, _ours_to_json, _ours_from_json),
    "node": Kind(None, _node_to_json, _node_from_json),
    "QTensor": Kind(QTensor, _leaf_to_json, _tensor_from_json),
    "QuantWeight": Kind(QuantWeight, _leaf_to_json, _weight_from_json),
    "Outliers": Kind(Outliers, _nodes_to_json, _outliers_from_json),
}
_KIND_OF = {kind.cls: name for name, kind in KINDS.items() if kind.cls}
