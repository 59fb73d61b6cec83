"""Our classes of pytrees as others write them: `jax.export` and `flax.serialization`.

Both write the arrays of a tree themselves. `jax.export` asks for the static fields of our classes
as bytes (here JSON); flax takes them from the tree that is restored into.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from jax import export

Class = TypeVar("Class", bound=type)

#: The dataclasses that are pytrees of ours: what flax is told of.
_CLASSES: list[type] = []


def known_to_flax(cls: Class) -> Class:
    """A decorator: `flax.serialization` writes and restores this dataclass field by field."""
    _CLASSES.append(cls)
    if "flax" in sys.modules:
        tell_flax()
    return cls


def serialized(*parts: type) -> Callable[[Class], Class]:
    """A decorator: makes a dataclass that is a pytree known to `jax.export`, and to flax.

    Args:
        parts: the NamedTuples and dataclasses that its static fields are made of.
    """
    known = {part.__name__: part for part in parts}

    def add(cls: Class) -> Class:
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"sqjax.{cls.__name__}",
            serialize_auxdata=lambda values: json.dumps(
                _plain(values)
            ).encode(),
            deserialize_auxdata=lambda text: _read(json.loads(text), known),
        )
        return known_to_flax(cls)

    return add


def _plain(value: Any) -> Any:
    """A static value as JSON: tuples as lists; dtypes, bytes and `parts` as objects that say so."""
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if is_dataclass(value):
        own = [_plain(getattr(value, field.name)) for field in fields(value)]
        return {"class": type(value).__name__, "fields": own}
    if not isinstance(value, tuple):
        return value
    items = list(map(_plain, value))
    if hasattr(value, "_fields"):
        return {"class": type(value).__name__, "fields": items}
    return items


def _read(value: Any, known: dict[str, type]) -> Any:
    """What `_plain` has written; the only classes made are the `known` ones."""
    if isinstance(value, list):
        return tuple(_read(item, known) for item in value)
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return np.dtype(value["dtype"])
    if "bytes" in value:
        return bytes.fromhex(value["bytes"])
    return known[value["class"]](*_read(value["fields"], known))


def tell_flax() -> None:
    """Makes our classes known to `flax.serialization`, which is imported here only."""
    from flax import serialization

    def state(tree: Any) -> dict[str, Any]:
        dynamic = _dynamic(tree)
        return {n: serialization.to_state_dict(x) for n, x in dynamic.items()}

    def restored(tree: Any, state: dict[str, Any]) -> Any:
        found = {}
        for name, x in _dynamic(tree).items():
            found[name] = serialization.from_state_dict(x, state[name])
        return replace(tree, **found)

    for cls in _CLASSES:
        serialization.register_serialization_state(
            cls, state, restored, override=True
        )


def _dynamic(tree: Any) -> dict[str, Any]:
    """{field: value} of the fields of a dataclass that hold arrays."""
    own = [field for field in fields(tree) if not field.metadata.get("static")]
    names = list(map(attrgetter("name"), own))
    values = zip(names, map(partial(getattr, tree), names), strict=True)
    return {name: value for name, value in values if value is not None}
