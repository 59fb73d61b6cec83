"""Quantized trees as arguments of functions that jax.export writes to files: how their structure is written."""

import json
from dataclasses import fields
from typing import Any

import numpy as np
from jax import export

from sqjax.numerics.formats import FORMATS
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import Outliers, QuantWeight


def _static(cls: type) -> list[str]:
    """The fields that a pytree's structure holds, in the order in which jax has them."""
    return [f.name for f in fields(cls) if f.metadata.get("static")]


def _write_tensor(values: tuple[Any, ...]) -> bytes:
    named = dict(zip(_static(QTensor), values, strict=True))
    plain = {**named, "dtype": np.dtype(named["dtype"]).name, "fmt": named["fmt"].name}
    return json.dumps(plain).encode()


def _read_tensor(text: bytes) -> tuple[Any, ...]:
    plain = json.loads(text)
    named = {
        "order": tuple(plain["order"]),
        "dtype": np.dtype(plain["dtype"]),
        "fmt": FORMATS[plain["fmt"]],
    }
    return tuple({**plain, **named}[name] for name in _static(QTensor))


def _write_weight(values: tuple[Any, ...]) -> bytes:
    return json.dumps(dict(zip(_static(QuantWeight), values, strict=True))).encode()


def _read_weight(text: bytes) -> tuple[Any, ...]:
    plain = json.loads(text)
    return tuple(plain[name] for name in _static(QuantWeight))


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
export.register_namedtuple_serialization(Outliers, serialized_name="sqjax.Outliers")
