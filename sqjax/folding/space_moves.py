"""Where a space lies after its array was moved, and where it lay before.

`MOVED[name](along, size, params, old, new)` says where the operand's space lies in the result, and
`UNDONE` where the result's lies in the operand: an `Along`, or None where the primitive has no part
in it (a slice of other channels).

Example: heads of 64 channels in a reshape from (5, 576) to (5, 9, 64).

    Along(1, before=9, after=1) of the operand is Along(2) of the result, and back.
    Along(1) of size 576 is split by it: `Split` says into what, so that the search tries again.
"""

import math
from collections.abc import Callable, Sequence

from sqjax._shapes import Shape
from sqjax.folding.search import Refused
from sqjax.folding.space import Along
from sqjax.program.primitives import IDENTITIES

Move = Callable[[Along, int, dict, Shape, Shape], Along | None]
#: (before, size, after) of smaller spaces within one.
Parts = tuple[tuple[int, int, int], ...]


class Split(Refused):
    """A reshape cuts the channels of a space: what is left are matrices that act on a part.

    Attributes:
        parts: the smaller spaces to try, within the one that was split.
    """

    def __init__(self, parts: Parts, *reasons: str):
        super().__init__(*reasons)
        self.parts = parts


def _same(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    return along


def _transposed(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    return along.at(params["permutation"].index(along.axis))


def _untransposed(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    return along.at(params["permutation"][along.axis])


def _reshaped(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    """The axis of the new shape in which the channels are.

    In row-major order the array is (outer, size, inner), and stays so. Of the new axis they must
    take a factor, or the whole.
    """
    if params.get("dimensions") is not None:
        raise Refused("a reshape with dimensions moves it")
    if not along.is_whole(size, old):
        return _beside_a_kept_axis(along, old, new)
    outer = math.prod(old[: along.axis]) * along.before
    return _with_outer(along, size, outer, new)


def _unreshaped(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    return _reshaped(along, size, params, new, old)


def _beside_a_kept_axis(along: Along, old: Shape, new: Shape) -> Along:
    """A part of an axis stays that where the reshape keeps the axis."""
    before = math.prod(old[: along.axis])
    for axis, length in enumerate(new):
        is_kept = length == old[along.axis]
        if is_kept and math.prod(new[:axis]) == before:
            return along.at(axis)
    raise Refused("a reshape cuts an axis of which it is a part")


def _with_outer(along: Along, size: int, outer: int, new: Shape) -> Along:
    """The channels as an axis of the new shape, or a factor of one, given their outer size."""
    passed = 1
    for axis, length in enumerate(new):
        # The axis in which the flat index of the outer ones ends and that of the channels begins.
        begins = passed <= outer < passed * length
        if begins and outer % passed == 0:
            before = outer // passed
            after, rest = divmod(length, before * size)
            if not rest and after:
                return Along(axis, before, after)
        if begins:
            raise _split(size, outer, passed, new[axis:])
        passed *= length
    raise Refused("a reshape leaves no axis for it")


def _split(size: int, outer: int, passed: int, rest: Shape) -> Split:
    """What is left of a space that the axes `rest`, after `passed` elements, cut.

    Example: 576 channels that become the axes (9, 64) are 9 x 64: a matrix may act on the 64, or on
    the 9.
    """
    parts: Parts = ()
    first = outer // passed if outer % passed == 0 else 0
    if first and rest[0] % first == 0:
        major = rest[0] // first
        if 1 < major < size and size % major == 0:
            parts = ((major, size // major, 1), (1, major, size // major))
    return Split(
        parts, f"a reshape cuts its {size} channels into axes of {list(rest)}"
    )


def _squeezed(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    dropped = [axis % len(old) for axis in params["dimensions"]]
    return along.at(along.axis - sum(d < along.axis for d in dropped))


def _unsqueezed(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    dropped = [axis % len(old) for axis in params["dimensions"]]
    kept = [axis for axis in range(len(old)) if axis not in dropped]
    return along.at(kept[along.axis])


def _broadcast(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    return along.at(params["broadcast_dimensions"][along.axis])


def _unbroadcast(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    axes = tuple(params["broadcast_dimensions"])
    if along.axis not in axes or old[axes.index(along.axis)] == 1:
        raise Refused("it is one number, repeated")
    return along.at(axes.index(along.axis))


def _sliced(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along | None:
    """A slice of other axes, or one that takes all of its channels, or none of them."""
    axis = along.axis
    begin, end = params["start_indices"][axis], params["limit_indices"][axis]
    last = along.start + along.length(size)
    if end <= along.start or last <= begin:
        return None
    stride = (params["strides"] or (1,) * len(old))[axis]
    if stride != 1 or along.start < begin or last > end:
        raise Refused("a slice takes some of its channels only")
    return along.at(axis, along.start - begin)


def _unsliced(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    axis = along.axis
    stride = (params["strides"] or (1,) * len(old))[axis]
    if stride != 1:
        raise Refused("a slice takes every other of its channels")
    return along.at(axis, along.start + params["start_indices"][axis])


def _off(key: str) -> Move:
    """Of a primitive that works along some axes: the space must lie along another one."""

    def move(
        along: Along, size: int, params: dict, old: Shape, new: Shape
    ) -> Along:
        worked = params[key]
        axes = worked if isinstance(worked, Sequence) else [worked]
        if along.axis in [axis % len(old) for axis in axes]:
            raise Refused("it works along its channels")
        return along

    return move


def _resized(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    """A slice that starts who knows where: of other axes."""
    if old[along.axis] != new[along.axis]:
        raise Refused("it takes some of its channels only")
    return along


def _picked(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    """Rows looked up: the axes that are taken whole."""
    whole = _taken_whole(params, old)
    if along.axis not in whole or not _fills_with_zeros(params):
        raise Refused("its channels are picked by an index")
    return along.at(whole[along.axis])


def _unpicked(
    along: Along, size: int, params: dict, old: Shape, new: Shape
) -> Along:
    back = {to: axis for axis, to in _taken_whole(params, old).items()}
    if along.axis not in back or not _fills_with_zeros(params):
        raise Refused("its channels are picked by an index")
    return along.at(back[along.axis])


def _fills_with_zeros(params: dict) -> bool:
    """Whether what stands in place of a row out of range is zeros, or NaN, which stay that."""
    fill = params["fill_value"]
    return fill in (None, 0) or fill != fill


def _taken_whole(params: dict, shape: Shape) -> dict[int, int]:
    """{axis of the operand: axis of the result} of the axes that a gather takes whole."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [axis for axis in range(len(shape)) if axis not in dropped]
    return {
        axis: to
        for axis, to in zip(windows, numbers.offset_dims, strict=True)
        if sizes[axis] == shape[axis]
    }


#: Every number becomes its negative, or is rounded to another type.
_KEEPING = (*IDENTITIES, "neg", "convert_element_type", "reduce_precision")
MOVED: dict[str, Move] = {
    **dict.fromkeys(_KEEPING, _same),
    "transpose": _transposed,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "slice": _sliced,
    "rev": _off("dimensions"),
    "cumsum": _off("axis"),
    "dynamic_slice": _resized,
    "gather": _picked,
}
UNDONE: dict[str, Move] = {
    **dict.fromkeys(_KEEPING, _same),
    "transpose": _untransposed,
    "reshape": _unreshaped,
    "squeeze": _unsqueezed,
    "broadcast_in_dim": _unbroadcast,
    "slice": _unsliced,
    "rev": _off("dimensions"),
    "cumsum": _off("axis"),
    "dynamic_slice": _resized,
    "gather": _unpicked,
}
