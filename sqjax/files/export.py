"""Quantized trees as arguments of functions that `jax.export` writes to files.

jax writes the arrays of a pytree itself. The structure (the static fields of our classes) it asks
for as bytes, and importing this module tells it how these are written.
"""

import json
from dataclasses import fields
from typing import Any

import numpy as np
from jax import export

from sqjax.numerics.formats import FORMATS
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight


def _static_fields(cls: type) -> list[str]:
    """The fields that a pytree's structure holds, in the order in which jax gives their values."""
    return [field.name for field in fields(cls) if field.metadata.get("static")]


def _write_tensor(values: tuple[Any, ...]) -> bytes:
    named = dict(zip(_static_fields(QTensor), values, strict=True))
    named["dtype"] = np.dtype(named["dtype"]).name
    named["fmt"] = named["fmt"].name
    return json.dumps(named).encode()


def _read_tensor(text: bytes) -> tuple[Any, ...]:
    named = json.loads(text)
    named["order"] = tuple(named["order"])
    named["dtype"] = np.dtype(named["dtype"])
    named["fmt"] = FORMATS[named["fmt"]]
    return tuple(named[name] for name in _static_fields(QTensor))


def _write_weight(values: tuple[Any, ...]) -> bytes:
    named = dict(zip(_static_fields(QuantWeight), values, strict=True))
    return json.dumps(named).encode()


def _read_weight(text: bytes) -> tuple[Any, ...]:
    named = json.loads(text)
    return tuple(named[name] for name in _static_fields(QuantWeight))


export.register_pytree_node_serialization(
    QTensor,
    serialized_name="sqjax.QTensor",
    serialize_auxdata=_write_tensor,
    deserialize_auxdata=_read_tensor,
)
export.register_pytree_node_serialization(
    QuantWeight,
    serialized_name="sqjax.QuantWeight",
    serialize_auxdata=_write_weight,
    deserialize_auxdata=_read_weight,
)
export.register_namedtuple_serialization(
    Outliers, serialized_name="sqjax.Outliers"
)
