"""How compressed-tensors says that modules are quantized: the groups of its configuration."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqjax.models.checkpoints.names import Shape
from sqjax.models.checkpoints.quantized.keys import (
    PATTERNS,
    group_size,
    one_number_of,
    only,
)
from sqjax.models.checkpoints.quantized.modules import group_count
from sqjax.models.checkpoints.quantized.stored_weight import Kind
from sqjax.models.checkpoints.settings import Settings
from sqjax.models.fields import FLAG, SIZE, What, one_of
from sqjax.numerics.formats import E4M3, INT4, INT8
from sqjax.numerics.weight_products import Activations

_PACKED = "pack-quantized"
FORMATS = (
    _PACKED,
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)


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


class Scheme(NamedTuple):
    """How the modules of one of a configuration's groups are quantized.

    Attributes:
        targets: the modules: names, "re:" and a regular expression, or "Linear".
        packed: whether their codes are packed; None where the configuration does not say.
        kind: the format of codes and activations; its group is of no meaning yet.
        symmetric: whether there are no zero points.
        blocks: what shares a scale.
    """

    targets: Sequence[str]
    packed: bool | None
    kind: Kind
    symmetric: bool
    blocks: Blocks

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
    floating = weights("type", one_of("int", "float"), "int") == "float"
    sizes = (8,) if floating else (4, 8)
    bits = weights("num_bits", one_number_of(*sizes), 8)
    weights("dynamic", only(False), False)
    fmt = INT4 if bits == 4 else INT8
    activations = None
    if settings.values.get("input_activations") is not None:
        inputs = settings.within("input_activations")
        activations = _read_activations(inputs, floating)
    return Scheme(
        targets or [],
        packed,
        Kind(
            E4M3 if floating else fmt,
            None,
            activations,
            "e4m3" if floating and activations else "int8",
        ),
        weights("symmetric", FLAG, True),
        _read_blocks(weights),
    )


def _are_two_sizes(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(SIZE.holds, x))


_TWO_SIZES = What("two sizes of at least 1, outputs and inputs", _are_two_sizes)


def _read_blocks(weights: Settings) -> Blocks:
    """What shares a scale."""
    group = group_size(weights, "group_size", default=-1)
    usual = "tensor" if group is None else "group"
    if weights.values.get("group_size") == -1:
        usual = "channel"
    strategies = one_of("tensor", "channel", "group", "block")
    match weights("strategy", strategies, usual):
        case "tensor":
            return Blocks(None, None)
        case "channel":
            return Blocks(1, None)
        case "group":
            return Blocks(1, group)
    sizes = weights("block_structure", _TWO_SIZES)
    return Blocks(*(sizes or (None, None)))


def _read_activations(settings: Settings, floating: bool) -> Activations | None:
    """How activations are quantized."""
    settings("num_bits", one_number_of(8), 8)
    kind = "float" if floating else "int"
    settings("type", one_of(kind), kind)
    no_zero_points = "activations have no zero points here"
    settings("symmetric", only(True, why=no_zero_points), True)
    if not settings("dynamic", FLAG, False):
        settings("strategy", one_of("tensor"), "tensor")
        return "static"
    by_name: dict[str, Activations] = {
        "token": "per_token",
        "tensor": "per_tensor",
    }
    return by_name.get(settings("strategy", one_of(*by_name), "token"))
