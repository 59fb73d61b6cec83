"""How compressed-tensors says that modules are quantized: the groups of its configuration."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sqjax._warnings import warn
from sqjax.models.checkpoints.names import Shape
from sqjax.models.checkpoints.quantized.keys import (
    PATTERNS,
    group_size,
    only,
)
from sqjax.models.checkpoints.quantized.modules import group_count
from sqjax.models.checkpoints.quantized.stored_weight import Kind
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.fields import FLAG, SIZE, What, one_of
from sqjax.numerics.formats import E4M3, INT4, INT8, FormatName
from sqjax.numerics.weight_products import Activations

_PACKED = "pack-quantized"
FORMATS = (
    _PACKED,
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)


#: {type of weights: how many bits a code may have}, and what such codes are.
_BITS = {"int": (4, 8), "float": (8,)}
_NUMBERS = {("int", 4): INT4, ("int", 8): INT8, ("float", 8): E4M3}
#: What `actorder` is where the channels' order is stored.
_ORDERS = ("group", "dynamic", "true")
#: {strategy of activations: what a leaf calls it}, the usual one first: of dynamic ones, of static.
_DYNAMIC: dict[str, Activations] = {
    "token": "per_token",
    "tensor": "per_tensor",
}
_STATIC: dict[str, Activations] = {"tensor": "static"}
_GROUP = "group"


class Blocks(NamedTuple):
    """Which of a weight's elements share a scale: blocks of so many outputs and inputs.

    None stands for all. A scale for each output is (1, None), one in groups of 16 is (1, 16).
    """

    outputs: int | None
    inputs: int | None

    def scales(self, shape: Shape) -> Shape:
        """The shape of the scales of a weight (out, in)."""
        outputs, inputs = shape
        rows = group_count(self.outputs, outputs)
        return rows, group_count(self.inputs, inputs)

    def by_output(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """Scales or zero points, (out, groups), or (1, 1): a block's repeated for its outputs.

        In blocks of 128 outputs the scales (3, 2) of 300 outputs become (300, 2).
        """
        x = x.reshape(self.scales(shape))
        if self.outputs in (None, 1):
            return x
        return np.repeat(x, self.outputs, axis=0)[: shape[0]]


class Scheme(NamedTuple):
    """How the modules of one of a configuration's groups are quantized.

    Attributes:
        targets: the modules: names, "re:" and a regular expression, or "Linear".
        packed: whether their codes are packed; None where the configuration does not say.
        kind: the format of codes and activations; its group is of no meaning yet.
        symmetric: whether there are no zero points.
        blocks: what shares a scale.
        ordered: whether groups may be of channels that are no neighbours; a tensor says so.
    """

    targets: Sequence[str]
    packed: bool | None
    kind: Kind
    symmetric: bool
    blocks: Blocks
    ordered: bool

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.kind.fmt == INT4 else 8


def read_scheme(settings: Settings, usual: str | None) -> Scheme:
    """One group of the configuration."""
    targets = settings("targets", PATTERNS)
    stated = settings("format", one_of(*FORMATS), usual)
    packed = None if stated in (None, "mixed-precision") else stated == _PACKED
    settings("output_activations", only(), None)
    weights = settings.within("weights")
    kind = weights("type", one_of("int", "float"), "int")
    bits = weights("num_bits", only(*_BITS[kind]), 8)
    weights("dynamic", only(False), False)
    activations, format_ = _read_activations(settings, kind)
    return Scheme(
        targets or [],
        packed,
        Kind(_NUMBERS[kind, bits], None, activations, format_),
        weights("symmetric", FLAG, True),
        _read_blocks(weights),
        str(weights.values.get("actorder")).lower() in _ORDERS,
    )


def _are_two_sizes(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(SIZE.holds, x))


#: What a block is.
TWO_SIZES = What("two sizes of at least 1, outputs and inputs", _are_two_sizes)


def _read_blocks(weights: Settings) -> Blocks:
    """What shares a scale."""
    group = group_size(weights, "group_size", default=-1)
    # Older files have the size alone.
    stated = str(weights.values.get("group_size"))
    usual = {"None": "tensor", "-1": "channel"}.get(stated, "group")
    simple = {
        "tensor": Blocks(None, None),
        "channel": Blocks(1, None),
        "group": Blocks(1, group),
    }
    strategy = weights("strategy", one_of(*simple, "block"), usual)
    if strategy in simple:
        return simple[strategy]
    return Blocks(*weights("block_structure", TWO_SIZES, [1, 1]))


def warn_of_groups() -> None:
    """Warns that activations in groups of channels are read as activations by token."""
    warn(
        "quantization_config: activations have one scale for each token here, and not one for "
        "each group of its channels: results are a little coarser"
    )


def _read_activations(
    scheme: Settings, kind: str
) -> tuple[Activations | None, FormatName]:
    """How the activations are quantized that meet weights of a kind, and to which format."""
    if scheme.values.get("input_activations") is None:
        return None, "int8"
    settings = scheme.within("input_activations")
    settings("num_bits", only(8), 8)
    settings("type", one_of(kind), kind)
    no_zero_points = "activations have no zero points here"
    settings("symmetric", only(True, why=no_zero_points), True)
    dynamic = settings("dynamic", FLAG, False)
    strategies = _DYNAMIC if dynamic else _STATIC
    usual = next(iter(strategies))
    # What comes with float8 weights in blocks.
    in_groups = settings.values.get("strategy") == _GROUP
    if kind == "float" and dynamic and in_groups:
        strategies = {**strategies, _GROUP: "per_token"}
        settings.skip("group_size")
        warn_of_groups()
    strategy = settings("strategy", one_of(*strategies), usual)
    return strategies[strategy], "e4m3" if kind == "float" else "int8"
