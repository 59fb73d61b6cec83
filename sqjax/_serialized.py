"""Our classes of pytrees as files hold them: `sqjax.save`, `jax.export` and `flax.serialization`.

All write the arrays of a tree themselves. `save` and `jax.export` ask for the static fields of our
classes as JSON; flax takes them from the tree that is restored into.
"""

import base64
import json
import sys
import zlib
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
#: The most bytes that the labels of one leaf may have: a billion elements, of 4 bytes each.
_LARGEST = 2**32
#: {class that `serialized` decorates: what its static fields are made of, by name}.
_PARTS: dict[type, dict[str, type]] = {}


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
        _PARTS[cls] = known
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


def exported(
    **ways: tuple[Callable[[Any], Any], Callable[[Any], Any]],
) -> Callable[[Class], Class]:
    """A decorator: makes a dataclass that is a pytree known to `jax.export`, and to flax.

    jax writes the arrays itself; the static fields are written as JSON, by name. The class itself
    carries this, so that it holds whichever module of sqjax was imported first.

    Args:
        ways: {static field that is no JSON: (what makes JSON of it, what reads that)}.
    """

    def add(cls: Class) -> Class:
        def write(values: tuple[Any, ...]) -> bytes:
            named = dict(zip(_static_names(cls), values, strict=True))
            for name, (plain, _) in ways.items():
                named[name] = plain(named[name])
            return json.dumps(named).encode()

        def read(text: bytes) -> tuple[Any, ...]:
            named = json.loads(text)
            for name, (_, known) in ways.items():
                named[name] = known(named[name])
            # A field that is younger than the text is None.
            return tuple(named.get(name) for name in _static_names(cls))

        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"sqjax.{cls.__name__}",
            serialize_auxdata=write,
            deserialize_auxdata=read,
        )
        return known_to_flax(cls)

    return add


def is_serialized(x: Any) -> bool:
    """Whether this is of a class that `serialized` decorates."""
    return type(x) in _PARTS


def serialized_class(name: str) -> type:
    """The class of this name that `serialized` decorates.

    Raises:
        ValueError: there is none; it may be in a module that is not loaded.
    """
    for cls in _PARTS:
        if cls.__name__ == name:
            return cls
    raise ValueError(
        f"expected a class of sqjax, got {name!r}; `import sqjax.models` first, or update sqjax"
    )


def static_json(x: Any) -> dict[str, Any]:
    """{field: JSON} of the static fields of a value of such a class."""
    return {name: _plain(getattr(x, name)) for name in _static_names(type(x))}


def rebuilt(cls: type, static: dict[str, Any], dynamic: dict[str, Any]) -> Any:
    """A value of such a class, of the JSON of its static fields and of its other fields.

    Raises:
        ValueError: the fields are not the class's.
    """
    if list(static) != _static_names(cls):
        raise ValueError(
            f"{cls.__name__}: expected {_static_names(cls)}, got {list(static)}; update sqjax"
        )
    read = {name: _read(x, _PARTS[cls]) for name, x in static.items()}
    return cls(**read, **dynamic)


def value_json(x: Any) -> Any:
    """The JSON of a value that static fields are made of, such as the `Graph` of statistics."""
    return _plain(x)


def read_value(value: Any) -> Any:
    """What `value_json` has written.

    Raises:
        ValueError: it has not written this.
    """
    known: dict[str, type] = {}
    for parts in _PARTS.values():
        known |= parts
    try:
        return _read(value, known)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"expected a value of a class of sqjax, got {error!r}; save it again"
        ) from error


def _static_names(cls: Any) -> list[str]:
    return [field.name for field in fields(cls) if field.metadata.get("static")]


def _plain(value: Any) -> Any:
    """A static value as JSON: tuples as lists; dtypes, bytes and `parts` as objects that say so."""
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if isinstance(value, bytes):
        # Labels of channels: of a large model they would be many megabytes, and nearly all alike.
        return {"zlib": base64.b64encode(zlib.compress(value)).decode()}
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
    if "zlib" in value:
        return _unpacked(base64.b64decode(value["zlib"]))
    if "bytes" in value:  # as versions before wrote them
        return bytes.fromhex(value["bytes"])
    return known[value["class"]](*_read(value["fields"], known))


def _unpacked(data: bytes) -> bytes:
    """Bytes that were compressed."""
    reader = zlib.decompressobj()
    try:
        # Not without a bound, because a few bytes could be made to fill all memory.
        found = reader.decompress(data, _LARGEST)
    except zlib.error as error:
        raise ValueError(f"labels that are damaged ({error})") from error
    if not reader.eof:
        raise ValueError(f"labels that are damaged, or above {_LARGEST} bytes")
    return found


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
