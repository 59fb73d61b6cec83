"""The activation scales of SmoothQuant's authors: max |X_j| of every Linear, by its name.

{"model.layers.0.self_attn.q_proj": (hidden size,), ..., "lm_head": (hidden size,)}
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from sqjax._arguments import expect
from sqjax._names import near_misses
from sqjax.files.header import Entry, read_header
from sqjax.files.opening import open_file
from sqjax.models.checkpoints.families.known import FAMILIES
from sqjax.models.checkpoints.family import Family
from sqjax.models.checkpoints.huggingface import EMBEDDING, is_tied_head
from sqjax.models.checkpoints.kinds import Config
from sqjax.models.checkpoints.mapping import parameter_shapes
from sqjax.models.checkpoints.names import AS_IS, Found
from sqjax.models.checkpoints.quantized.modules import FLOATS, Tensor

_CONVERT = """pickles are never read, because they run code; write a .pt with torch once more:
import safetensors.torch, torch
scales = torch.load("scales.pt", map_location="cpu", weights_only=True)
safetensors.torch.save_file({k: v.contiguous() for k, v in scales.items()}, "scales.safetensors")"""


def read_act_scales(source: Any) -> dict[str, np.ndarray]:
    """{name of a module: max |X_j| of its inputs, float32}, of a safetensors file or a mapping.

    Raises:
        ValueError: it is neither; or an array is no vector of finite numbers of at least 0; names
            the file or the module.
    """
    arrays = source if isinstance(source, Mapping) else _in_file(source)
    return dict(map(_checked, arrays.items()))


def _in_file(source: Any) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file."""
    is_path = isinstance(source, str | os.PathLike)
    expected = "a safetensors file, or arrays by the names of modules"
    expect(is_path, "act_scales", expected, source)
    try:
        with open_file(source) as file:
            entries = read_header(file).tensors
            return {name: _read(file, x) for name, x in entries.items()}
    except ValueError as error:
        # What people have is a pickle most often.
        raise ValueError(
            f"{source}: expected a safetensors file, got {error}; {_CONVERT}"
        ) from error


def _read(file: BinaryIO, entry: Entry) -> np.ndarray:
    if entry.dtype not in FLOATS:
        raise ValueError(f"an array of {entry.dtype}")
    return Tensor(file, entry).read()


def _checked(named: tuple[Any, Any]) -> tuple[str, np.ndarray]:
    """(name, vector of ranges as float32) of a module."""
    name, x = named
    expect(isinstance(name, str), "act_scales", "names of modules", name)
    try:
        array = np.asarray(x)
    except ValueError as error:  # rows that are not of one length
        raise ValueError(f"{name}: expected a vector: {error}") from error
    is_vector = jnp.issubdtype(array.dtype, jnp.floating) and array.ndim == 1
    # NaN is not at least 0 either.
    if not is_vector or not np.all((array >= 0) & (array < np.inf)):
        raise ValueError(
            f"{name}: expected a vector of finite numbers of at least 0, one for each input "
            f"channel, got {array.dtype.name} of shape {array.shape}"
        )
    return name, array.astype(np.float32)


def leaves_of_modules(
    names: Iterable[str], config: Config, families: Sequence[Family] = ()
) -> dict[str, Found]:
    """{name of a module: the leaves that its weight fills}, by the table of a family.

    Args:
        names: as in the authors' files, without ".weight".
        config: of the model.
        families: where to look; none: all families that are known here.

    Raises:
        ValueError: no family has all of these names; says the nearest, and what is like them. Or
            several families have them, and for different leaves.
    """
    names = list(names)
    leaves = parameter_shapes(config, config.num_layers)
    tables = []
    for family in families or FAMILIES.values():
        if family.config_type is type(config):
            tables.append(_found(family, names, config, leaves))
    best = max(tables, key=len, default={})
    unknown = sorted(set(names) - best.keys())
    if unknown or not names:
        near = near_misses("".join(unknown[:1]), sorted(leaves))
        raise ValueError(
            f"act_scales: expected the names of a model's Linears, got {unknown[:5]}. Near misses: "
            f"{near}"
        )
    # Nothing says which of two families is meant, unless both mean the same.
    whole = [table for table in tables if table.keys() == best.keys()]
    expect(
        whole.count(best) == len(whole),
        "act_scales",
        "names of one family; pass families=[the model's], because several have these",
        names[0],
    )
    return best


def _found(
    family: Family,
    names: Iterable[str],
    config: Config,
    leaves: Mapping[str, Any],
) -> dict[str, Found]:
    """The leaves of the modules that one family's table has."""
    table = {}
    for name in names:
        weight = f"{name}.weight"
        found = family.find(weight, leaves)
        # A tied head has the embedding's numbers, and inputs of its own.
        if is_tied_head(weight, family, config):
            found = Found((EMBEDDING,), None, AS_IS)
        if found is not None:
            table[name] = found
    return table
