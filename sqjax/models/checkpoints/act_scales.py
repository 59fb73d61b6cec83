"""The activation scales of SmoothQuant's authors: max |X_j| of every Linear, by its name.

{"model.layers.0.self_attn.q_proj": (hidden size,), ..., "lm_head": (hidden size,)}
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sqjax._arguments import expect
from sqjax._names import near_misses
from sqjax.files.header import read_header
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
            the file and the module.
    """
    if isinstance(source, Mapping):
        return {name: _checked(name, x) for name, x in source.items()}
    is_path = isinstance(source, str | os.PathLike)
    expected = "a safetensors file, or arrays by the names of modules"
    expect(is_path, "act_scales", expected, source)
    try:
        with open_file(source) as file:
            entries = read_header(file).tensors
            return {
                name: _checked(name, _read(Tensor(file, entry)))
                for name, entry in entries.items()
            }
    except ValueError as error:
        raise ValueError(
            f"{source}: expected a safetensors file with a vector for every Linear: {error}; "
            f"{_CONVERT}"
        ) from error


def _read(tensor: Tensor) -> Any:
    known = tensor.entry.dtype in FLOATS
    return tensor.read() if known else tensor.entry.dtype


def _checked(name: str, x: Any) -> np.ndarray:
    """A vector of ranges, as float32."""
    is_array = hasattr(x, "shape") and hasattr(x, "dtype")
    array = np.asarray(x, np.float32) if is_array else np.zeros(())
    if array.ndim != 1 or not np.all(np.isfinite(array) & (array >= 0)):
        got = f"an array of shape {array.shape}" if is_array else repr(x)
        raise ValueError(
            f"{name}: expected a vector of finite numbers of at least 0, one for each input "
            f"channel, got {got}"
        )
    return array


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
    among = families or FAMILIES.values()
    found: dict[str, Found] = {}
    unknown = names
    for family in among:
        if family.config_type is not type(config):
            continue
        own = {name: _find(family, name, config, leaves) for name in names}
        known = {name: x for name, x in own.items() if x is not None}
        if len(known) == len(names) and not unknown and known != found:
            raise ValueError(
                "act_scales: several families have these names, for different leaves; pass "
                "families=[the model's]"
            )
        if len(known) > len(found):
            found = known
            unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"act_scales: expected the names of a model's Linears, got {unknown[:5]}. Near misses: "
            f"{near_misses(''.join(unknown[:1]), sorted(leaves))}"
        )
    return found


def _find(
    family: Family, name: str, config: Config, leaves: Mapping[str, Any]
) -> Found | None:
    """The leaves of a module by one family's table. A tied head's is the embedding."""
    weight = f"{name}.weight"
    if is_tied_head(weight, family, config):
        return Found((EMBEDDING,), None, AS_IS)
    return family.find(weight, leaves)
