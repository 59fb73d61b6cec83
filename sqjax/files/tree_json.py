"""A parameter tree as JSON and named arrays, and back: the layout of the files of `sqjax.files`.

A node of the JSON is null (None) or {kind: content}, where the kinds are

- "dict": [[key, node], ...]; "list" and "tuple": [node, ...];
- "array": [dtype, shape], the array itself being stored under its path in the tree;
- "QTensor", "QuantWeight", "Outliers": {field: a node, or for the fields that are no arrays the value itself}.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sqjax._trees import is_concrete
from sqjax.numerics.formats import FORMATS, INT4, Format, container, pack_int4, unpack_int4
from sqjax.numerics.weight_products import Activations
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight

#: safetensors' names of the dtypes that its files can hold.
STORED: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in (
        *(
            ("BOOL", np.bool_),
            ("I8", np.int8),
            ("I16", np.int16),
            ("I32", np.int32),
            ("I64", np.int64),
        ),
        *(("U8", np.uint8), ("U16", np.uint16), ("U32", np.uint32), ("U64", np.uint64)),
        *(("F16", np.float16), ("BF16", jnp.bfloat16), ("F32", np.float32), ("F64", np.float64)),
        *(("F8_E4M3", jnp.float8_e4m3fn), ("F8_E5M2", jnp.float8_e5m2)),
    )
}
#: The dtypes a tree may have, by their own names; int4 is stored as U8.
DTYPES: dict[str, np.dtype] = {dtype.name: dtype for dtype in (*STORED.values(), INT4.dtype)}


class Node(NamedTuple):
    """The fields of one of sqjax's classes: those that hold arrays or other nodes, and those that are plain values."""

    kind: Any
    nodes: tuple[str, ...]
    values: tuple[str, ...]


NODES: dict[str, Node] = {
    node.kind.__name__: node
    for node in (
        Node(
            QTensor, ("values", "scale", "zero", "group_scale"), ("order", "dtype", "group", "fmt")
        ),
        Node(
            QuantWeight,
            ("tensor", "input_scale", "smoothing", "outliers"),
            ("activations", "contracted", "activation_format"),
        ),
        Node(Outliers, ("channels", "weight"), ()),
    )
}


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


#: The plain values of nodes: whether a JSON is one, and what it becomes.
VALUES: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    "order": (lambda v: type(v) is list and all(type(axis) is int for axis in v), tuple),
    "dtype": (DTYPES.__contains__, DTYPES.__getitem__),
    "group": (lambda v: v is None or _positive(v), lambda v: v),
    "fmt": (FORMATS.__contains__, FORMATS.__getitem__),
    "activations": ((None, *get_args(Activations)).__contains__, lambda v: v),
    "contracted": (_positive, lambda v: v),
    "activation_format": (FORMATS.__contains__, lambda v: v),
}
#: What to do about nodes that are not kept, by the names of their classes.
REMEDIES = {
    "FrozenDict": "save flax.core.unfreeze(tree)",
    "State": "save flax.nnx.to_pure_dict(state), or the params of sqjax.nnx.functional(module)",
    **dict.fromkeys(
        ("bool", "int", "float"), "make it an array that has a dtype: jnp.asarray(x, jnp.float32)"
    ),
}


class Stated(NamedTuple):
    """What the tree says of one array: its dtype and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def stored(self) -> "Stated":
        """The dtype and shape that it has in the file."""
        if self.dtype != INT4.dtype:
            return self
        *rows, last = self.shape or (1,)
        return Stated(np.dtype(np.uint8), (*rows, (last + 1) // 2))

    def read(self, opened: BinaryIO, offset: int) -> np.ndarray:
        """The array, whose bytes begin at an offset."""
        dtype, shape = self.stored
        opened.seek(offset)
        x = (
            np.fromfile(opened, np.uint8, math.prod(shape) * dtype.itemsize)
            .view(dtype)
            .reshape(shape)
        )
        if self.dtype == dtype:
            return x
        return (
            unpack_int4(x, (self.shape or (1,))[-1]).reshape(self.shape)
            if x.size
            else np.empty(self.shape, dtype)
        )


# Writing -------------------------------------------------------------------------------------------------------------


def described(where: str, node: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The JSON of a node; its arrays are put among `tensors` as the file has them."""
    if node is None:
        return None
    kind = type(node).__name__
    if type(node) is dict:
        if {type(key) for key in node} not in (set(), {str}, {int}):
            raise ValueError(
                f"{named(where)}: expected keys all str or all int, got {list(node)[:5]}; rename them"
            )
        return {kind: [[key, described(_below(where, key), x, tensors)] for key, x in node.items()]}
    if type(node) in (list, tuple):
        return {kind: [described(_below(where, i), x, tensors) for i, x in enumerate(node)]}
    if kind in NODES and type(node) is NODES[kind].kind:
        values = {name: _json(where, name, getattr(node, name)) for name in NODES[kind].values}
        node = _checked_tensor(where, node, concrete=True) if isinstance(node, QTensor) else node
        children = {
            name: described(_below(where, name), getattr(node, name), tensors)
            for name in NODES[kind].nodes
        }
        _check_weight(where, node)
        return {kind: children | values}
    if problem := _array_problem(node):
        raise ValueError(f"{named(where)}: {problem}")
    if where in tensors or where == "__metadata__":
        raise ValueError(
            f"{named(where)}: two leaves have this path, or safetensors keeps it to itself; rename a key"
        )
    x = np.asarray(node, order="C")
    tensors[where] = pack_int4(x.reshape(x.shape or (1,))) if x.dtype == INT4.dtype else x
    return {"array": [x.dtype.name, list(x.shape)]}


def _array_problem(x: Any) -> str | None:
    """Why a leaf can not be written, and what to do about it."""
    if not is_concrete(x):
        return (
            f"expected an array of numbers, got {type(x).__name__}; save outside jit and eval_shape"
        )
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        kind = type(x).__name__
        remedy = "save x._asdict()" if hasattr(x, "_asdict") else "keep what is no array elsewhere"
        remedy = "save dict(tree)" if isinstance(x, dict) else remedy
        return (
            "expected an array, dict, list, tuple, None, QuantWeight or QTensor, "
            f"got {kind}; {REMEDIES.get(kind, remedy)}"
        )
    if isinstance(x, jax.Array) and x.is_deleted():
        return "the array is deleted (was it donated?); save before that"
    if x.dtype.name not in DTYPES:
        return f"expected a dtype among {', '.join(DTYPES)}, got {x.dtype.name}; cast it, or take it out of the tree"
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return "parts of it are on other hosts; gather it first (jax.experimental.multihost_utils.process_allgather)"
    if getattr(x, "weak_type", False):
        return f"its {x.dtype.name} is weak, which a file can not say; save x.astype(jnp.{x.dtype.name})"
    return None


def _json(where: str, name: str, value: Any) -> Any:
    """A plain value as JSON, if `load` will know it."""
    if isinstance(value, np.dtype | Format):
        value = value.name if value in (*DTYPES.values(), *FORMATS.values()) else repr(value)
    value = list(value) if isinstance(value, tuple) else value
    _value(where, name, value)
    return value


def named(where: str) -> str:
    """A path, for errors."""
    return where or "(the tree itself)"


def _below(where: str, key: Any) -> str:
    """The path of a child, as `sqjax._trees.named_leaves` has it."""
    return f"{where}/{key}" if where else str(key)


# Reading -------------------------------------------------------------------------------------------------------------


def built(where: str, node: Any, stated: dict[str, Stated]) -> Any:
    """The tree of a JSON, with ShapeDtypeStructs of what memory will hold; `stated` gets what the JSON says of each."""
    if node is None:
        return None
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(
            f"{named(where)}: expected a node as {{kind: content}}, got {node!r}; save it again"
        )
    [(kind, content)] = node.items()
    try:
        if kind == "dict":
            return {key: built(_below(where, key), x, stated) for key, x in content}
        if kind in ("list", "tuple"):
            found = [built(_below(where, i), x, stated) for i, x in enumerate(content)]
            return found if kind == "list" else tuple(found)
        if kind == "array":
            dtype, shape = content
            return _built_array(where, DTYPES[dtype], tuple(shape), stated)
        return _built_node(where, NODES[kind], content, stated)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{named(where)}: the header does not describe a {kind} ({error!r}); save it again"
        ) from error


def _built_node(where: str, node: Node, content: Any, stated: dict[str, Stated]) -> Any:
    if unknown := sorted(set(content).difference(node.nodes, node.values)):
        raise ValueError(
            f"{named(where)}: expected {(*node.nodes, *node.values)}, got also {unknown}; update sqjax"
        )
    children = {name: built(_below(where, name), content[name], stated) for name in node.nodes}
    values = {name: _value(where, name, content[name]) for name in node.values}
    made = node.kind(**children, **values)
    _check_weight(where, made)
    return _checked_tensor(where, made, concrete=False) if isinstance(made, QTensor) else made


def _built_array(
    where: str, dtype: np.dtype, shape: tuple[int, ...], stated: dict[str, Stated]
) -> jax.ShapeDtypeStruct:
    if where in stated:
        raise ValueError(f"{named(where)}: two leaves have this path; save it again")
    stated[where] = Stated(dtype, shape)
    return jax.ShapeDtypeStruct(shape, dtype)


def _value(where: str, name: str, value: Any) -> Any:
    """A plain value, from JSON."""
    known, decode = VALUES[name]
    if not known(value):
        raise ValueError(
            f"{named(where)}: expected a known {name}, got {value!r}; quantize the float leaf again"
        )
    return decode(value)


# Both ----------------------------------------------------------------------------------------------------------------


def _checked_tensor(where: str, q: QTensor, concrete: bool) -> QTensor:
    """A tensor whose invariants hold, int4 values as the file (concrete) or this backend's memory has them."""
    arrays = [q.values, q.scale, *(x for x in (q.zero, q.group_scale) if x is not None)]
    if concrete and (problems := [problem for x in arrays if (problem := _array_problem(x))]):
        raise ValueError(f"{named(where)}: {problems[0]}")
    if not concrete and q.values.dtype == q.fmt.dtype:
        q = replace(q, values=jax.ShapeDtypeStruct(q.values.shape, container(q.fmt)))
    q.check(named(where))
    return _in_nibbles(where, q) if concrete and q.fmt == INT4 else q


def _in_nibbles(where: str, q: QTensor) -> QTensor:
    """int4 values as int4, wherever they were stored."""
    values = np.asarray(q.values).astype(np.int8)
    if values.size and not -8 <= values.min() <= values.max() <= 7:
        found = f"[{values.min()}, {values.max()}]"
        raise ValueError(
            f"{named(where)}: int4 values must be in [-8, 7], got {found}; quantize the float leaf again"
        )
    return replace(q, values=values.astype(INT4.dtype))


def _check_weight(where: str, node: Any) -> None:
    """Raises ValueError if a `QuantWeight` is not a valid one beside its tensor."""
    if isinstance(node, QuantWeight) and (problem := _weight_problem(node)):
        raise ValueError(
            f"{named(where)}: not a valid QuantWeight: {problem}; quantize the float leaf again"
        )


def _weight_problem(weight: QuantWeight) -> str | None:
    """What is wrong with the parts of a weight beside its tensor."""
    if not isinstance(weight.tensor, QTensor) or not isinstance(weight.outliers, Outliers | None):
        return f"expected a QTensor and Outliers or None, got {weight.tensor!r} and {weight.outliers!r}"
    if weight.contracted > weight.ndim:
        return f"expected at most {weight.ndim} contracted axes, got {weight.contracted}"
    if weight.activations == "static" and weight.input_scale is None:
        return "static activations need an input_scale, got none"
    outliers = weight.outliers or Outliers(None, None)
    parts = {"input_scale": jnp.float32, "smoothing": jnp.float32}
    found = [(name, getattr(weight, name), dtype) for name, dtype in parts.items()]
    for name, x, dtype in (*found, ("channels", outliers.channels, jnp.int32)):
        if x is not None and getattr(x, "dtype", None) != dtype:
            return f"{name} must be {jnp.dtype(dtype).name}, got {x!r}"
    return None
