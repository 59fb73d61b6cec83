"""`StoredWeight`: a quantized weight as a checkpoint holds it, on its way to a `QuantWeight`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from sqjax.models.checkpoints.kinds import Config
from sqjax.models.checkpoints.names import (
    AS_IS,
    COLUMNS_ONE_AFTER_ANOTHER,
    Layout,
    Shape,
)
from sqjax.numerics.formats import INT8, Format, FormatName, container
from sqjax.numerics.weight_products import Activations
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.sharding import explicit_shardings

#: The layouts of tensors that have their inputs first, as GPT-2's do. All others are of Linear
#: layers, and have their outputs first.
_INPUTS_FIRST = (AS_IS, COLUMNS_ONE_AFTER_ANOTHER)
#: How our kernels, (in, out), are stored: (out, in).
_ORDER = (-1, -2)


class Kind(NamedTuple):
    """How a weight is quantized, and the activations that meet it.

    Attributes:
        fmt: the format of the codes.
        group: how many neighbouring channels share a scale; None for all.
        activations: as in `QuantWeight`: None where they stay float.
        activation_format: their format.
    """

    fmt: Format = INT8
    group: int | None = None
    activations: Activations | None = None
    activation_format: FormatName = "int8"


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as numpy arrays, outputs first; experts may be stacked before those.

    Attributes:
        kind: how it is quantized.
        values: (*stack, out, in), int8 or float8: the file's codes.
        scale: (*stack, out, groups) float32, or (*stack, 1, 1) for the whole matrix.
        zero: int8 zero points of the scale's shape, or None.
        input_scale: (*stack,) float32, the scale of static activations; or None.
    """

    kind: Kind
    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    input_scale: np.ndarray | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the kernel that it is: (*stack, in, out)."""
        *stack, outputs, inputs = self.values.shape
        return (*stack, inputs, outputs)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that it has, by field."""
        fields = {
            "values": self.values,
            "scale": self.scale,
            "zero": self.zero,
            "input_scale": self.input_scale,
        }
        return {name: x for name, x in fields.items() if x is not None}

    def split(
        self, layout: Layout, config: Config, shapes: Sequence[Shape]
    ) -> list["StoredWeight"]:
        """The weights of the leaves of these shapes, which one tensor holds.

        Layouts move outputs and leave inputs where they are. So they serve scales and zero points
        too, whose groups stand where the inputs are. One scale for all outputs is that of each
        leaf.

        For queries, keys and values of 48, 16 and 16 outputs in 4 groups, codes of (80, 64) and
        scales of (80, 4) become (48, 64) and (48, 4), (16, 64) and (16, 4), and again these.
        """

        def parts_of(x: np.ndarray) -> list[np.ndarray]:
            if x.size == 1:
                return [x for _ in shapes]
            own = [(x.shape[1], shape[-1]) for shape in shapes]
            theirs = x.T if layout in _INPUTS_FIRST else x
            kernels = layout.split(config, theirs, own)
            return [np.ascontiguousarray(kernel.T) for kernel in kernels]

        by_field = {name: parts_of(x) for name, x in self.arrays().items()}
        found = []
        for own in zip(*by_field.values(), strict=True):
            found.append(self.holding(dict(zip(by_field, own, strict=True))))
        return found

    def holding(self, arrays: Mapping[str, Any]) -> "StoredWeight":
        """The weight with other arrays, by field."""
        return replace(self, **arrays)

    def weight(self, dtype: DTypeLike) -> QuantWeight:
        """The leaf, of numpy arrays; `dtype` is that of the float weight that it stands for."""
        kind = self.kind
        values = self.values.astype(container(kind.fmt), copy=False)
        tensor = QTensor(
            values,
            self.scale,
            _ORDER,
            jnp.dtype(dtype),
            zero=self.zero,
            group=kind.group,
            fmt=kind.fmt,
        )
        return QuantWeight(
            tensor,
            self.input_scale,
            None,
            kind.activations,
            activation_format=kind.activation_format,
        )


#: What a tensor of a checkpoint holds: floats, or a weight that is quantized already.
Stored = np.ndarray | StoredWeight


def split(
    layout: Layout,
    config: Config,
    theirs: Stored,
    shapes: Sequence[Shape],
) -> list:
    """What one tensor holds of the leaves of these shapes; see `StoredWeight.split`."""
    if isinstance(theirs, StoredWeight):
        return theirs.split(layout, config, shapes)
    return layout.split(config, theirs, shapes)


def placed(stored: Stored, dtype: DTypeLike, sharding: Any) -> Any:
    """The leaf of jax arrays, of a dtype or standing for it, placed as its float array is to be."""
    if not isinstance(stored, StoredWeight):
        return jax.device_put(stored.astype(dtype, copy=False), sharding)
    weight = stored.weight(dtype)
    if isinstance(sharding, NamedSharding):
        sharding = explicit_shardings(weight, sharding)
    return jax.device_put(weight, sharding)


# Stacks of entries: experts, whose tensors are apart in a checkpoint ------------------------------


def room_for(count: int, part: Stored) -> Stored:
    """A leaf of so many entries like this one, not filled yet."""

    def room(x: np.ndarray) -> np.ndarray:
        return np.empty((count, *x.shape), x.dtype)

    if not isinstance(part, StoredWeight):
        return room(part)
    rooms = {name: room(x) for name, x in part.arrays().items()}
    return part.holding(rooms)


def fill(stack: Stored, entry: int, part: Stored, where: str) -> None:
    """Fills one entry of a stack.

    Raises:
        ValueError: it is quantized in another way than the stack, or one of them is not; names
            `where`.
    """
    alike, came = _likeness(stack, 1), _likeness(part, 0)
    if alike != came:
        raise ValueError(
            f"{where}: expected all entries of a leaf quantized alike, got {alike} and {came}"
        )
    for whole, own in zip(_arrays(stack), _arrays(part), strict=True):
        whole[entry] = own


def _arrays(stored: Stored) -> Iterable[np.ndarray]:
    if isinstance(stored, StoredWeight):
        return stored.arrays().values()
    return [stored]


def _likeness(stored: Stored, first: int) -> list:
    """What the entries of a stack have in common, of which axis `first` is the first."""
    kind = stored.kind if isinstance(stored, StoredWeight) else "float"
    return [kind, *(x.shape[first:] for x in _arrays(stored))]


def inputs_first(layout: Layout) -> bool:
    """Whether tensors of a layout have their inputs first."""
    return layout in _INPUTS_FIRST


def shape_in_the_table(layout: Layout | None, shape: Shape) -> Shape:
    """The shape of a tensor as a family's table has it, of a weight with its outputs first."""
    return shape[::-1] if layout in _INPUTS_FIRST else shape
