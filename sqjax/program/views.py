"""`View`: a leaf seen through transposes, slices, scans ...: which of its axes is where. `Joined`:
several of them, concatenated.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from sqjax._shapes import Shape, entries_at, from_front, runs, sizes_along
from sqjax.program.primitives import IDENTITIES, SCALINGS

#: The axis of a leaf that a piece, an index or a block is of.
_axis_of = attrgetter("axis")


class Piece(NamedTuple):
    """Evenly spaced indices along one axis of a leaf: all, or one factor of a split axis.

    Example: reshape((768, 512) -> (768, 8, 64)) splits axis 1 into heads and their channels. The
    heads are Piece(axis=1, stride=64, size=8), the channels Piece(axis=1, stride=1, size=64).

    Attributes:
        axis: the leaf's axis.
        stride: from one index to the next.
        size: how many indices.
        start: the first of them, where a slice has left others out.
    """

    axis: int
    stride: int
    size: int
    start: int = 0


class Taken(NamedTuple):
    """An axis of a leaf seen at one index: that of a scan's step, or a fixed one (no scan)."""

    axis: int
    scan: int | None
    at: int = 0

    @property
    def seen(self) -> slice | int:
        """What of the axis is seen in the end: a scan sees all of it, step by step."""
        return self.at if self.scan is None else slice(None)


class Block(NamedTuple):
    """A mesh axis that shards an axis of a leaf, one block for each of its devices."""

    mesh_axis: int
    devices: int
    axis: int


@dataclass(frozen=True)
class View:
    """Where the axes of a leaf have gone.

    Example: the leaf (32, 768, 512), a stack of 32 matrices, inside a scan over it and after `.T`:
    the view has two axes, `axes == ((Piece(2, 1, 512),), (Piece(1, 1, 768),))`, and `taken ==
    (Taken(0, scan),)`.

    Attributes:
        path: the leaf's name.
        shape: the leaf's shape; in a shard_map that of the block of it that one device has.
        axes: for every axis of the view the pieces of the leaf's axes that it runs over (none: an
            axis of size 1).
        sliced: the leaf's axes that are not seen whole.
        taken: the leaf's axes that are seen at one index only, in the order in which they went.
        blocks: the mesh axes of shard_maps that shard the leaf; where several shard one axis, the
            major one first.
        scaled: whether this is a multiple of the leaf: 2 * w, w / sqrt(8) or -w, or the leaf times
            a gain or a mask.
        varying: along which of the leaf's axes that multiple varies: along 1 in w * g of (16, 12)
            and (1, 12).
        normed: whether that multiple is by a norm of the leaf itself, as in v / norm(v).
    """

    path: str
    shape: Shape
    axes: tuple[tuple[Piece, ...], ...]
    sliced: frozenset[int] = frozenset()
    taken: tuple[Taken, ...] = ()
    blocks: tuple[Block, ...] = ()
    scaled: bool = False
    varying: frozenset[int] = frozenset()
    normed: bool = False

    @classmethod
    def of(cls, path: str, shape: Shape) -> "View":
        """A leaf as it is."""
        whole = ((Piece(axis, 1, size),) for axis, size in enumerate(shape))
        return cls(path, shape, tuple(whole))

    @property
    def full_shape(self) -> Shape:
        """The leaf's shape, all devices' blocks together.

        Example: blocks of (2, 8) along a mesh axis of 4 devices that shards axis 0 are a leaf of
        (8, 8).
        """
        sizes = list(self.shape)
        for block in self.blocks:
            sizes[block.axis] *= block.devices
        return tuple(sizes)

    def strides(self, axis: int) -> dict[int, int]:
        """{scan or mesh axis: its stride} of those that divide an axis of the leaf, major first.

        Example: an axis of 12, sharded over 2 devices of mesh axis 1 and then over 3 of mesh axis
        2, has blocks of 2. From one device to the next these are 6 and 2 apart: {1: 6, 2: 2}.
        """
        # A scan over an axis moves on by one index a step, inside the block that a device has.
        found = [
            (scan, 1) for scan, taken in self.stacked.items() if taken == axis
        ]
        stride = self.shape[axis]
        # Neighbouring blocks are on neighbours of the minor axis.
        for block in reversed(self.blocks):
            if block.axis == axis:
                found.append((block.mesh_axis, stride))
                stride *= block.devices
        return dict(reversed(found))

    def whole_axes(self, axes: Iterable[int]) -> tuple[int, ...] | None:
        """The leaf's axes that these axes of the view run over, whole and in order; else None.

        Example: for (768, 512) reshaped to (768, 8, 64), axes [1, 2] are the leaf's axis (1,). Axis
        [1] alone is none, because it is only a part of it, and neither are [2, 1], because they mix
        its channels.
        """
        pieces = self.pieces(axes)
        leaf_axes = list(map(_axis_of, pieces))
        if leaf_axes != sorted(leaf_axes):
            return None
        for axis, own in groupby(pieces, key=_axis_of):
            if not self._is_whole(axis, list(own)):
                return None
        return tuple(dict.fromkeys(leaf_axes))

    def pieces(self, axes: Iterable[int]) -> list[Piece]:
        """The pieces of the leaf's axes that these axes of the view run over, in order."""
        return list(chain(*entries_at(self.axes, axes)))

    def _is_whole(self, axis: int, pieces: Sequence[Piece]) -> bool:
        """Whether these pieces, major first, are all of an axis of the leaf in its own order."""
        inside = 1  # the indices that the minor pieces run over: the stride of the next one
        for piece in reversed(pieces):
            if piece.stride != inside:
                return False
            inside *= piece.size
        # Example: an axis of 512 as the pieces (stride 64, size 8) and (stride 1, size 64):
        # `inside` is 1, then 64, then 512, which is all of it.
        return inside == self.shape[axis] and axis not in self.sliced

    def position_of(self, axis: int) -> tuple[int, int]:
        """Where an axis of the view begins in the leaf: sorts axes into the leaf's order."""
        # The stride is negated, because the major piece of an axis has the largest.
        starts = [(piece.axis, -piece.stride) for piece in self.axes[axis]]
        return min(starts, default=(-1, 0))

    def varying_as(self, shape: Shape) -> "View":
        """The view, multiplied with an array of this shape, which is broadcast along axes of 1."""
        longer = np.flatnonzero(np.greater(shape, 1)).tolist()
        along = map(_axis_of, self.pieces(longer))
        return replace(self, varying=self.varying.union(along))

    @property
    def leaf_axes(self) -> tuple[int | None, ...] | None:
        """The leaf's axis behind every axis of the view; None for an added axis of size 1.

        None in place of the tuple where an axis of the leaf is not seen whole, or where several are
        seen as one.

        Example: (1, 0) for a transposed matrix, (None, 0, 1) for `w[None]`.
        """
        if self.sliced or self.fixed:
            return None
        found: list[int | None] = []
        for a in range(len(self.axes)):
            whole = self.whole_axes([a])
            if whole is None or len(whole) > 1:
                return None
            found.append(whole[0] if whole else None)
        return tuple(found)

    def block(
        self, shards: Mapping[int, Sequence[tuple[int, int]]]
    ) -> "View | None":
        """One device's block of a view; None where what is sharded is no whole axis of the leaf.

        Example: the view of a whole leaf (12, 8) with {0: [(1, 2), (2, 3)]} is that of a block (2,
        8).

        Args:
            shards: {axis of the view: the (mesh axis, number of devices) that shard it, major
                first}.
        """
        new: list[Block] = []
        for axis, mesh_axes in shards.items():
            whole = self.whole_axes([axis])
            # Of an axis that a reshape has made, a block would be no block of the leaf.
            if whole is None or len(self.axes[axis]) != 1:
                return None
            [leaf_axis] = whole
            new += [
                Block(mesh_axis, devices, leaf_axis)
                for mesh_axis, devices in mesh_axes
            ]
        shape = list(self.shape)
        axes = list(self.axes)
        for block in new:
            # Where two mesh axes shard one axis, each divides what is left: 12, 6, 2.
            shape[block.axis] //= block.devices
            axes = [_one_part(pieces, block) for pieces in axes]
        blocks = (*self.blocks, *new)
        return replace(
            self, axes=tuple(axes), shape=tuple(shape), blocks=blocks
        )

    def slice_of_scan(self, scan: int) -> "View | None":
        """One step's slice of a view that a scan runs over (along its first axis)."""
        leaf_axes = self.leaf_axes
        if not leaf_axes or leaf_axes[0] is None:
            return None
        step = Taken(leaf_axes[0], scan)
        return replace(self, axes=self.axes[1:], taken=(*self.taken, step))

    @property
    def taken_axes(self) -> tuple[int, ...]:
        """The leaf's axes that are seen at one index only, in the order in which they went."""
        return tuple(map(_axis_of, self.taken))

    @property
    def stacked(self) -> dict[int, int]:
        """{scan: the leaf's axis that it runs over}, outermost first."""
        return {
            taken.scan: taken.axis
            for taken in self.taken
            if taken.scan is not None
        }

    @property
    def dividing(self) -> dict[int, int]:
        """{scan or mesh axis: the leaf's axis that it runs over, or shards}."""
        sharded = {block.mesh_axis: block.axis for block in self.blocks}
        return self.stacked | sharded

    @property
    def fixed(self) -> tuple[Taken, ...]:
        """The axes that are seen at a fixed index: which of a stack of matrices this is."""
        return tuple(taken for taken in self.taken if taken.scan is None)


class Joined(NamedTuple):
    """Leaves that the program has concatenated: views of them, along an axis of the result.

    Example: `concatenate([q, k], 1)` of leaves (8, 4) and (8, 2) has the axis 1 and two views.
    """

    axis: int
    views: tuple[View, ...]


def _one_part(pieces: tuple[Piece, ...], block: Block) -> tuple[Piece, ...]:
    """An axis of a view, after an axis of the leaf has been sharded."""
    if list(map(_axis_of, pieces)) != [block.axis]:
        return pieces
    [piece] = pieces
    return (piece._replace(size=piece.size // block.devices),)


def _transpose(view: View, params: dict, old: Shape, new: Shape) -> View:
    return replace(view, axes=entries_at(view.axes, params["permutation"]))


def _keep(view: View, params: dict, old: Shape, new: Shape) -> View:
    return view


def _multiple(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    """A product with a number, a gain or a mask, where that does not broadcast the leaf."""
    return replace(view, scaled=True) if old == new else None


def _squeeze(view: View, params: dict, old: Shape, new: Shape) -> View:
    """Axes of size 1 go. One that a slice has left of an axis is an index: w[3] is squeeze(w[3:4]).

    A slice of one entry has the stride 1 (see `_slice`), so pieces of another stride were split off
    by a reshape.
    """
    axes = list(view.axes)
    taken = list(view.taken)
    sliced = set(view.sliced)
    gone = from_front(params["dimensions"], len(old))
    for piece in view.pieces(gone):
        if piece.axis in view.sliced and piece.stride == 1:
            taken.append(Taken(piece.axis, None, piece.start))
            sliced.discard(piece.axis)
    # The last first, so that the others stay where they are.
    for a in sorted(gone, reverse=True):
        del axes[a]
    left = frozenset(sliced)
    return replace(view, axes=tuple(axes), taken=tuple(taken), sliced=left)


def _expand(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    """broadcast_in_dim where it only adds axes of size 1."""
    # More elements than before means that the leaf is repeated, so one number has several places.
    if math.prod(old) != math.prod(new):
        return None
    axes: list[tuple[Piece, ...]] = [()] * len(new)
    for a, to in enumerate(params["broadcast_dimensions"]):
        axes[to] = view.axes[a]
    return replace(view, axes=tuple(axes))


def _slice(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    """Part of whole axes: a slice through what a reshape has split or merged is no view.

    Example: w[2:8:3] of a leaf (9, 4) has the piece (axis 0, stride 3, size 2, start 2) as its
    first axis.
    """
    axes = list(view.axes)
    sliced = set(view.sliced)
    strides = params["strides"] or (1,) * len(old)
    for a, (before, after) in enumerate(zip(old, new, strict=True)):
        if before == after:
            continue
        if len(axes[a]) != 1:
            return None
        [piece] = axes[a]
        if (
            piece.size != view.shape[piece.axis]
            and piece.axis not in view.sliced
        ):
            return None
        # A slice of a slice counts in the first's strides: w[2:8:2][1:3] begins at 2 + 2 * 1.
        start = piece.start + piece.stride * params["start_indices"][a]
        # One entry alone has no stride: 1 will do.
        stride = piece.stride * strides[a] if after > 1 else 1
        axes[a] = (Piece(piece.axis, stride, after, start),)
        sliced.add(piece.axis)
    return replace(view, axes=tuple(axes), sliced=frozenset(sliced))


def _reshape(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    """Axes are split and merged; pieces that are too long for the new axes are split.

    Example: (768, 512) -> (768, 8, 64) has two runs of axes with equal products, 768 = 768 and 512
    = 8 * 64. The first stays; in the second the piece of 512 becomes two.
    """
    # `dimensions` is a transpose within lax.reshape. Of an array without elements all products are
    # 0, so no runs of axes can be told apart.
    if params.get("dimensions") is not None or 0 in old:
        return None
    axes: list[tuple[Piece, ...]] = []
    for sources, targets in runs(old, new):
        sizes = sizes_along(new, targets)
        if sizes_along(old, sources) == sizes:
            axes += entries_at(view.axes, sources)
            continue
        regrouped = _regroup(view, sources, sizes)
        if regrouped is None:
            return None
        axes += regrouped
    return replace(view, axes=tuple(axes))


def _regroup(
    view: View, axes: Sequence[int], sizes: Sequence[int]
) -> list[tuple[Piece, ...]] | None:
    """The pieces of these axes as axes of other sizes, in order; None if they do not fit.

    Examples, a piece by its size: [512] for the sizes (8, 64) is split in two. [6, 4] for (24,)
    becomes one axis of both. [6, 4] for (3, 8) splits the 6, whose rest of 2 goes with the 4. [4,
    9] does not fit (6, 6).
    """
    pieces = view.pieces(axes)
    # What a slice has left of an axis is not split further, because a piece has one start only.
    if view.sliced.intersection(map(_axis_of, pieces)):
        return None
    # Axes of size 1 hold no choice of index: old ones are left out, new ones get no piece.
    waiting = deque(piece for piece in pieces if piece.size > 1)
    regrouped: list[tuple[Piece, ...]] = []
    for size in sizes:
        own: list[Piece] = []
        missing = size
        while missing > 1:
            piece = waiting.popleft()
            if missing % piece.size == 0:  # all of it
                own.append(piece)
                missing //= piece.size
            elif piece.size % missing == 0:
                # Its major part; the rest is for the next axis.
                # [512] for (8, 64): the axis of 8 gets the stride 64, and a piece of 64 with the
                # stride 1 waits.
                rest = piece.size // missing
                own.append(Piece(piece.axis, piece.stride * rest, missing))
                waiting.appendleft(piece._replace(size=rest))
                missing = 1
            else:
                return None
        regrouped.append(tuple(own))
    return regrouped


ViewRule = Callable[[View, dict[str, Any], Shape, Shape], View | None]
#: The primitives that keep a leaf a leaf: (view, the equation's parameters, old shape, new shape)
#: -> view, or None where the result is no view of the leaf any more. An identity of several
#: operands is one for each of them.
VIEWS: dict[str, ViewRule] = {
    **dict.fromkeys(IDENTITIES, _keep),
    "transpose": _transpose,
    "convert_element_type": _keep,
    **dict.fromkeys(("neg", *SCALINGS), _multiple),
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "slice": _slice,
    "reshape": _reshape,
}
