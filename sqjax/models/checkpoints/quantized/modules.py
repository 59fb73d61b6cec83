"""The quantized modules of a checkpoint: which tensors belong together, and what they must be.

A float Linear layer is one tensor, ``q_proj.weight``. A quantized one is several: its codes, its
scales and what else its layout has, ``q_proj.qweight``, ``q_proj.scales``. They are put together
under the name of the float tensor, so that all else is as in a float checkpoint.
"""

from collections.abc import Callable, Collection, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from sqjax.files.arrays import STORED, DeclaredArray
from sqjax.files.header import Entry
from sqjax.models.checkpoints.names import Shape
from sqjax.models.checkpoints.quantized.stored_weight import StoredWeight

FLOATS = ("F64", "F32", "F16", "BF16")
#: As `sqjax.numerics.dots.LONGEST_CONTRACTION`, of codes that reach -128 where ours end at -127.
_MOST_INPUTS = (2**31 - 1) // (127 * 128)


class Tensor(NamedTuple):
    """A tensor of a checkpoint: the opened file that it is in, and what the header says of it."""

    file: BinaryIO
    entry: Entry

    def read(self) -> np.ndarray:
        """The array."""
        array = DeclaredArray(STORED[self.entry.dtype], self.entry.shape)
        return array.read(self.file, self.entry.first)


Tensors = Mapping[str, Tensor]
Arrays = Mapping[str, np.ndarray]


class Part(NamedTuple):
    """What one of a module's tensors must be.

    Attributes:
        shapes: {dtype as safetensors names it: the shapes that it may have}.
        required: whether the module must have it.

    One without shapes is a tensor that the module must not have.
    """

    shapes: Mapping[str, tuple[Shape, ...]]
    required: bool = True

    def problem(self, entry: Entry) -> str | None:
        """What is wrong with a tensor."""
        if not self.shapes:
            return f"expected no such tensor, got one of shape {entry.shape}"
        if entry.dtype not in self.shapes:
            return (
                f"expected a dtype of {tuple(self.shapes)}, got {entry.dtype}"
            )
        allowed = self.shapes[entry.dtype]
        if entry.shape not in allowed:
            words = " or ".join(map(str, allowed))
            return f"expected shape {words}, got {entry.shape}"
        return None


_NO_PART = Part({}, required=False)


class Format(NamedTuple):
    """How the tensors of one module hold its weight. Tensors go by the ends of their names.

    Attributes:
        shape_from: the tensors that tell the weight's shape.
        shape: (out, in) of the weight.
        parts: what each tensor must be, given that shape.
        decode: the weight, of arrays that are so. It raises ValueError that begins with a name.
    """

    shape_from: tuple[str, ...]
    shape: Callable[[Tensors], Shape]
    parts: Callable[[Shape], Mapping[str, Part]]
    decode: Callable[[Arrays, Shape], StoredWeight]


class Quantization(NamedTuple):
    """What a configuration says of the quantized modules of its checkpoint.

    Attributes:
        endings: the ends of names of tensors that only quantized modules have.
        format_of: the format of a module, given its name and the ends of its tensors' names; or
            in words what it should be instead.
        unused: the ends of names of tensors that say nothing that is needed here.
        zero_biases: whether modules without a bias may have one that is 0.
    """

    endings: frozenset[str]
    format_of: Callable[[str, Collection[str]], Format | str]
    unused: frozenset[str] = frozenset()
    zero_biases: bool = False


#: What the configuration of a float checkpoint says.
NOTHING = Quantization(frozenset(), lambda module, ends: "expected a float")


class Module(NamedTuple):
    """A quantized module.

    Attributes:
        name: as in the names of its tensors.
        tensors: its tensors.
        format: how they hold the weight.
        shape: (out, in).
    """

    name: str
    tensors: Tensors
    format: Format
    shape: Shape

    def read(self) -> StoredWeight:
        """The weight.

        Raises:
            ValueError: it is none that a leaf here can hold as it is; names the tensor.
        """
        arrays = {end: tensor.read() for end, tensor in self.tensors.items()}
        try:
            weight = self.format.decode(arrays, self.shape)
        except ValueError as error:
            raise ValueError(f"{self.name}.{error}") from error
        if not np.isfinite(weight.scale).all():
            raise ValueError(
                f"{self.name}: expected finite scales, got {weight.scale.max()}"
            )
        return weight


class Sorted(NamedTuple):
    """A checkpoint's tensors, of which those of quantized modules are put together.

    Attributes:
        modules: {the name that the float weight would have: the module}.
        others: all other tensors, under their names.
        problems: what is wrong with the modules.
    """

    modules: dict[str, Module]
    others: dict[str, Tensor]
    problems: list[str]


def sort_out(stored: Tensors, quantization: Quantization) -> Sorted:
    """Puts the tensors of each quantized module together, and checks what headers say of them."""
    found = Sorted({}, {}, [])
    of_modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, _, end = name.rpartition(".")
        if end in quantization.endings:
            of_modules.setdefault(module, {})[end] = tensor
        elif end not in quantization.unused:
            found.others[name] = tensor
    for module, tensors in of_modules.items():
        weight = f"{module}.weight"
        if weight in found.others:
            tensors["weight"] = found.others.pop(weight)
        format_ = quantization.format_of(module, tensors)
        if isinstance(format_, str):
            found.problems.append(f"{weight}: {format_}")
            continue
        shape, problems = _checked(module, tensors, format_)
        found.problems.extend(problems)
        if shape is not None:
            found.modules[weight] = Module(module, tensors, format_, shape)
    return found


def _checked(
    module: str, tensors: Tensors, format_: Format
) -> tuple[Shape | None, list[str]]:
    """(the shape of a module's weight, what is wrong with its tensors)."""
    absent = sorted(set(format_.shape_from) - set(tensors))
    if absent:
        beside = sorted(set(tensors) - set(format_.shape_from))
        return None, [
            f"{module}.{absent[0]}: expected this tensor beside {beside}, got none"
        ]
    try:
        shape = format_.shape(tensors)
        _check_length(shape[1])
    except ValueError as error:
        return None, [f"{module}.{error}"]
    return shape, _wrong_parts(module, tensors, format_.parts(shape))


def _check_length(inputs: int) -> None:
    """Raises ValueError for a matmul whose int32 sums could overflow: codes may be -128 here."""
    if inputs > _MOST_INPUTS:
        raise ValueError(
            f"weight: expected at most {_MOST_INPUTS} inputs, which an int32 sum holds, got "
            f"{inputs}"
        )


def _wrong_parts(
    module: str, tensors: Tensors, parts: Mapping[str, Part]
) -> list[str]:
    """One problem for each tensor that is missing, or not what it must be."""
    problems = []
    for end, tensor in tensors.items():
        problem = parts.get(end, _NO_PART).problem(tensor.entry)
        if problem is not None:
            problems.append(f"{module}.{end}: {problem}")
    required = {end for end, part in parts.items() if part.required}
    for end in sorted(required - set(tensors)):
        problems.append(f"{module}.{end}: expected a tensor, got none")
    return problems


# What layouts have in common ----------------------------------------------------------------------


def matrix_shape(tensors: Tensors, end: str) -> Shape:
    """The shape of a tensor of rank 2.

    Raises:
        ValueError: its rank is another.
    """
    shape = tensors[end].entry.shape
    if len(shape) != 2:
        raise ValueError(f"{end}: expected rank 2, got shape {shape}")
    return shape


def scales(*shapes: Shape) -> Part:
    """A tensor of scales; not in float64, which float32 does not hold."""
    return Part(dict.fromkeys(("F32", "F16", "BF16"), shapes))


def words(*shapes: Shape, required: bool = True) -> Part:
    """A tensor of 32-bit words."""
    return Part({"I32": shapes}, required)


def group_count(group: int | None, inputs: int) -> int:
    """How many groups the input channels of an output have; the last one may be shorter."""
    return 1 if group is None else -(-inputs // group)


def several_groups(group: int | None, inputs: int) -> int | None:
    """The group size of a leaf: None where all channels are one group."""
    return group if group_count(group, inputs) > 1 else None


def in_float32(x: np.ndarray) -> np.ndarray:
    """Scales as leaves have them: in float32, which all narrower floats are exactly."""
    return np.ascontiguousarray(x, np.float32)


def check_zero_points(end: str, zero: np.ndarray, bits: int) -> None:
    """Raises ValueError for zero points of 8 bits, of which leaves here have none.

    A zero point is relative to the middle of the codes: 128 of the codes 0 to 255 is 0.
    """
    if bits == 8 and zero.any():
        raise ValueError(
            f"{end}: expected zero points in the middle of the codes, because int8 weights here "
            f"have none of their own, got one that is {zero[zero != 0][0]} away from it; use a "
            "symmetric checkpoint, or one of 4 bits"
        )


def check_groups(end: str, of_channels: np.ndarray, group: int) -> None:
    """Raises ValueError unless neighbouring channels are the groups, in their order.

    Such groups of 2 are 0, 0, 1, 1, ...
    """
    usual = np.arange(len(of_channels)) // group
    if (of_channels == usual).all():
        return
    first = int(np.argmax(of_channels != usual))
    raise ValueError(
        f"{end}: expected groups of {group} neighbouring channels, in their order, because a leaf "
        f"here has no others; got channel {first} in group {of_channels[first]}: the channels were "
        "put in the order of their activations (desc_act, actorder 'group'); use a checkpoint "
        "without that"
    )
