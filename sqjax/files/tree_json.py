"""A parameter tree as JSON and named arrays, and back: the layout of the files of `save`.

A node of the JSON is null (None) or {kind: content}, where the kinds are

- "dict": [[key, node], ...]; "list" and "tuple": [node, ...];
- "array": [dtype, shape], the array itself being stored under its path in the tree;
- "QTensor", "QuantWeight", "Outliers": {field: content}, where the content of a field that holds
  arrays is a node, and that of any other is the plain value.

For example {"w": [x]} with a float32 x of shape (2, 3), which is stored as "w/0", is

    {"dict": [["w", {"list": [{"array": ["float32", [2, 3]]}]}]]}
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.files.arrays import (
    DTYPES,
    DeclaredArray,
    as_stored,
    check_savable,
    shown,
)
from sqjax.numerics.formats import FORMATS, INT4, Format, container
from sqjax.numerics.weight_products import Activations
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight

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
        values=("activations", "contracted", "activation_format"),
    ),
    Outliers: Fields(nodes=("channels", "weight"), values=()),
}


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
    return type(value) is list and all(type(axis) is int for axis in value)


_ACTIVATIONS = (None, *get_args(Activations))

#: {name of a field: its plain value}.
VALUES: dict[str, PlainValue] = {
    "order": PlainValue(_is_list_of_axes, tuple),
    "dtype": PlainValue(DTYPES.__contains__, DTYPES.__getitem__),
    "group": PlainValue(_is_size_or_none, _as_it_is),
    "fmt": PlainValue(FORMATS.__contains__, FORMATS.__getitem__),
    "activations": PlainValue(_ACTIVATIONS.__contains__, _as_it_is),
    "contracted": PlainValue(_is_positive, _as_it_is),
    "activation_format": PlainValue(FORMATS.__contains__, _as_it_is),
}


def _decoded(path: str, field: str, value: Any) -> Any:
    """A plain value, from JSON."""
    plain = VALUES[field]
    if not plain.is_valid(value):
        raise ValueError(
            f"{shown(path)}: expected a known {field}, got {value!r}; quantize the float leaf again"
        )
    return plain.decode(value)


def _below(path: str, key: Any) -> str:
    """The path of a child, as `sqjax._trees.named_leaves` has it."""
    return f"{path}/{key}" if path else str(key)


# Writing ------------------------------------------------------------------------------------------


def to_json(path: str, node: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The JSON of the node at `path`; every array below it is added to `tensors`, as stored.

    Raises:
        ValueError: the file can not keep a node, or a quantized weight is not valid; names its
            path.
    """
    if node is None:
        return None
    # By the exact type, because a subclass may hold more than its items, which would be lost.
    kind = _KIND_OF.get(type(node), "array")
    return {kind: KINDS[kind].to_json(path, node, tensors)}


def _dict_to_json(
    path: str, node: dict[Any, Any], tensors: dict[str, np.ndarray]
) -> Any:
    types = {type(key) for key in node}
    if types not in (set(), {str}, {int}):
        raise ValueError(
            f"{shown(path)}: expected keys all str or all int, got {list(node)[:5]}; rename them"
        )
    # Pairs, because the keys of a JSON object are text: integers would not come back.
    return [
        [key, to_json(_below(path, key), x, tensors)] for key, x in node.items()
    ]


def _items_to_json(
    path: str, node: Sequence[Any], tensors: dict[str, np.ndarray]
) -> Any:
    return [to_json(_below(path, i), x, tensors) for i, x in enumerate(node)]


def _array_to_json(path: str, x: Any, tensors: dict[str, np.ndarray]) -> Any:
    check_savable(path, x)
    if path in tensors or path == "__metadata__":
        raise ValueError(
            f"{shown(path)}: two leaves have this path, or safetensors keeps it to itself; "
            "rename a key"
        )
    array = np.asarray(x, order="C")
    tensors[path] = as_stored(array)
    return [array.dtype.name, list(array.shape)]


def _tensor_to_json(
    path: str, tensor: QTensor, tensors: dict[str, np.ndarray]
) -> Any:
    values = _values_to_json(path, tensor)
    nodes = _nodes_to_json(path, _tensor_to_save(path, tensor), tensors)
    return {**nodes, **values}


def _weight_to_json(
    path: str, weight: QuantWeight, tensors: dict[str, np.ndarray]
) -> Any:
    values = _values_to_json(path, weight)
    nodes = _nodes_to_json(path, weight, tensors)
    _check_weight(path, weight)
    return {**nodes, **values}


def _nodes_to_json(
    path: str, node: Any, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    """{field: JSON} of the fields that hold arrays or other nodes."""
    found = {}
    for name in FIELDS[type(node)].nodes:
        found[name] = to_json(_below(path, name), getattr(node, name), tensors)
    return found


def _values_to_json(path: str, node: Any) -> dict[str, Any]:
    """{field: JSON} of the fields that hold plain values, if `load` will know them."""
    found = {}
    for name in FIELDS[type(node)].values:
        found[name] = _plain(getattr(node, name))
        _decoded(
            path, name, found[name]
        )  # raises if the value would not come back
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


def _tensor_to_save(path: str, tensor: QTensor) -> QTensor:
    """The tensor, checked, and int4 values as jnp.int4, also where they were stored as int8."""
    optional = [x for x in (tensor.zero, tensor.group_scale) if x is not None]
    for x in (tensor.values, tensor.scale, *optional):
        check_savable(path, x)
    tensor.check(shown(path))
    if tensor.fmt != INT4:
        return tensor
    values = np.asarray(tensor.values).astype(np.int8)
    # int8 can hold what a nibble can not, and packing would drop the upper bits silently.
    if np.any((values < -8) | (values > 7)):
        found = f"[{values.min()}, {values.max()}]"
        raise ValueError(
            f"{shown(path)}: int4 values must be in [-8, 7], got {found}; "
            "quantize the float leaf again"
        )
    return replace(tensor, values=values.astype(INT4.dtype))


# Reading ------------------------------------------------------------------------------------------


def from_json(path: str, node: Any, declared: dict[str, DeclaredArray]) -> Any:
    """The tree that a JSON describes, with a ShapeDtypeStruct for each array.

    Args:
        path: of the node in the tree.
        node: the JSON.
        declared: gets {path: what the JSON says} of every array. The ShapeDtypeStruct says what
            memory will hold, which may be int8 where the JSON says int4.

    Raises:
        ValueError: the JSON is not one that `to_json` writes, or a weight is not valid; names the
            path.
    """
    if node is None:
        return None
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(
            f"{shown(path)}: expected a node as {{kind: content}}, got {node!r}; save it again"
        )
    [(kind, content)] = node.items()
    # The content may be any JSON at all: where it is not what the kind asks for, taking it apart
    # fails with one of these errors.
    try:
        return KINDS[kind].from_json(path, content, declared)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{shown(path)}: the header does not describe a {kind} ({error!r}); save it again"
        ) from error


def _dict_from_json(
    path: str, content: Any, declared: dict[str, DeclaredArray]
) -> Any:
    return {
        key: from_json(_below(path, key), x, declared) for key, x in content
    }


def _list_from_json(
    path: str, content: Any, declared: dict[str, DeclaredArray]
) -> list[Any]:
    return [
        from_json(_below(path, i), x, declared) for i, x in enumerate(content)
    ]


def _tuple_from_json(
    path: str, content: Any, declared: dict[str, DeclaredArray]
) -> Any:
    return tuple(_list_from_json(path, content, declared))


def _array_from_json(
    path: str, content: Any, declared: dict[str, DeclaredArray]
) -> jax.ShapeDtypeStruct:
    dtype_name, sizes = content
    array = DeclaredArray(DTYPES[dtype_name], tuple(sizes))
    if path in declared:
        raise ValueError(
            f"{shown(path)}: two leaves have this path; save it again"
        )
    declared[path] = array
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _tensor_from_json(
    path: str, content: Any, declared: dict[str, DeclaredArray]
) -> QTensor:
    """The tensor, checked, with the dtype in which this backend holds its values.

    For example int8 for int4 on a CPU: see `sqjax.numerics.formats.container`.
    """
    tensor = QTensor(**_fields_from_json(path, QTensor, content, declared))
    values = tensor.values
    if values.dtype == tensor.fmt.dtype:
        held = jax.ShapeDtypeStruct(values.shape, container(tensor.fmt))
        tensor = replace(tensor, values=held)
    tensor.check(shown(path))
    return tensor


def _weight_from_json(
    path: str, content: Any, declared: dict[str, DeclaredArray]
) -> QuantWeight:
    weight = QuantWeight(
        **_fields_from_json(path, QuantWeight, content, declared)
    )
    _check_weight(path, weight)
    return weight


def _outliers_from_json(
    path: str, content: Any, declared: dict[str, DeclaredArray]
) -> Outliers:
    return Outliers(**_fields_from_json(path, Outliers, content, declared))


def _fields_from_json(
    path: str, cls: type, content: Any, declared: dict[str, DeclaredArray]
) -> dict[str, Any]:
    """{field: what it holds} of all fields of a class."""
    known = (*FIELDS[cls].nodes, *FIELDS[cls].values)
    unknown = sorted(set(content).difference(known))
    if unknown:
        raise ValueError(
            f"{shown(path)}: expected {known}, got also {unknown}; update sqjax"
        )
    found = {}
    for name in FIELDS[cls].nodes:
        found[name] = from_json(_below(path, name), content[name], declared)
    for name in FIELDS[cls].values:
        found[name] = _decoded(path, name, content[name])
    return found


# Both ---------------------------------------------------------------------------------------------


def _check_weight(path: str, weight: QuantWeight) -> None:
    """Raises ValueError, naming the path, if a weight's parts beside its tensor are not valid."""
    for find_problem in (_wrong_parts, _wrong_activations, _wrong_dtypes):
        problem = find_problem(weight)
        if problem is not None:
            raise ValueError(
                f"{shown(path)}: not a valid QuantWeight: {problem}; quantize the float leaf again"
            )


def _wrong_parts(weight: QuantWeight) -> str | None:
    tensor, outliers = weight.tensor, weight.outliers
    if not isinstance(tensor, QTensor) or not isinstance(
        outliers, Outliers | None
    ):
        return f"expected a QTensor and Outliers or None, got {tensor!r} and {outliers!r}"
    if weight.contracted > weight.ndim:
        return f"expected at most {weight.ndim} contracted axes, got {weight.contracted}"
    return None


def _wrong_activations(weight: QuantWeight) -> str | None:
    if weight.activations == "static" and weight.input_scale is None:
        return "static activations need an input_scale, got none"
    return None


def _wrong_dtypes(weight: QuantWeight) -> str | None:
    parts = [
        ("input_scale", weight.input_scale, jnp.float32),
        ("smoothing", weight.smoothing, jnp.float32),
    ]
    if weight.outliers is not None:
        parts.append(("channels", weight.outliers.channels, jnp.int32))
    for name, x, dtype in parts:
        if x is not None and getattr(x, "dtype", None) != dtype:
            return f"{name} must be {jnp.dtype(dtype).name}, got {x!r}"
    return None


class Kind(NamedTuple):
    """A kind of node: the class of its values, and how they are written and read."""

    cls: type | None
    to_json: Callable[[str, Any, dict[str, np.ndarray]], Any]
    from_json: Callable[[str, Any, dict[str, DeclaredArray]], Any]


#: {kind, as the JSON names it: how it is written and read}.
KINDS: dict[str, Kind] = {
    "dict": Kind(dict, _dict_to_json, _dict_from_json),
    "list": Kind(list, _items_to_json, _list_from_json),
    "tuple": Kind(tuple, _items_to_json, _tuple_from_json),
    # What is of no other kind is an array, or refused as one.
    "array": Kind(None, _array_to_json, _array_from_json),
    "QTensor": Kind(QTensor, _tensor_to_json, _tensor_from_json),
    "QuantWeight": Kind(QuantWeight, _weight_to_json, _weight_from_json),
    "Outliers": Kind(Outliers, _nodes_to_json, _outliers_from_json),
}
_KIND_OF = {kind.cls: name for name, kind in KINDS.items()}
