"""`View`: a parameter leaf seen through transposes, slices, scans, shard_maps ...: which of its axes is where."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqjax._shapes import runs
from sqjax.program.primitives import IDENTITIES

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """`size` places along an axis of a leaf, `stride` apart: all of it, or one factor of what a reshape has split.

    `start` is the first of them, where a slice has cut others off.
    """

    axis: int
    stride: int
    size: int
    start: int = 0


class Taken(NamedTuple):
    """An axis of a leaf at one index: the steps of a scan one after the other, or a fixed one (scan is None)."""

    axis: int
    scan: int | None
    at: int = 0


@dataclass(frozen=True)
class View:
    """Where the axes of a leaf have gone.

    Attributes:
        path: the leaf's name.
        shape: the leaf's shape; in a shard_map that of the block of it that one device has.
        axes: for every axis of the view the pieces of the leaf's axes that it runs over (none: an axis of size 1).
        cut: the leaf's axes that are not seen whole.
        taken: the leaf's axes that are seen at one index only, in the order in which they went.
        blocks: (mesh axis, its number of devices, axis of the leaf) for every mesh axis of a shard_map that cuts that
            axis into one block for each device; where several cut one axis, the major one first.
    """

    path: str
    shape: Shape
    axes: tuple[tuple[Piece, ...], ...]
    cut: frozenset[int] = frozenset()
    taken: tuple[Taken, ...] = ()
    blocks: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, path: str, shape: Shape) -> "View":
        return cls(path, shape, tuple((Piece(a, 1, n),) for a, n in enumerate(shape)))

    @property
    def full_shape(self) -> Shape:
        """The leaf's shape, all devices' blocks together."""
        return tuple(
            n * math.prod(m for _, m, a in self.blocks if a == axis)
            for axis, n in enumerate(self.shape)
        )

    def strides(self, axis: int) -> dict[int, int]:
        """{scope: its stride} along an axis of the leaf of which scans and mesh axes hand out parts, major first."""
        found, stride = (
            [(scan, 1) for scan, a in self.stacked.items() if a == axis],
            self.shape[axis],
        )
        for scope, size, a in reversed(self.blocks):
            if a == axis:
                found.append((scope, stride))
                stride *= size
        return dict(found[::-1])

    def whole_axes(self, axes: Iterable[int]) -> tuple[int, ...] | None:
        """The leaf's axes that these axes of the view run over, whole and in order; None if that is not so."""
        pieces = [piece for a in axes for piece in self.axes[a]]
        found = tuple(dict.fromkeys(p.axis for p in pieces))
        for axis in found:
            inside = 1
            for piece in reversed([p for p in pieces if p.axis == axis]):
                if piece.stride != inside:
                    return None
                inside *= piece.size
            if inside != self.shape[axis] or axis in self.cut:
                return None
        in_order = [p.axis for p in pieces] == sorted(p.axis for p in pieces)
        return found if in_order else None

    def place_of(self, axis: int) -> tuple[int, int]:
        """Where an axis of the view begins in the leaf: what sorts the view's axes into the leaf's order."""
        return min(((p.axis, -p.stride) for p in self.axes[axis]), default=(-1, 0))

    @property
    def places(self) -> tuple[int | None, ...] | None:
        """The leaf's axis behind every axis of the view (None: an axis of size 1 that is none of the leaf's).

        None where an axis of the leaf is not seen whole, or where several are seen as one.
        """
        found = [self.whole_axes([a]) for a in range(len(self.axes))]
        whole = not self.cut and not self.part and all(f is not None and len(f) <= 1 for f in found)
        return tuple(f[0] if f else None for f in found) if whole else None

    def block(self, cuts: Mapping[int, Sequence[tuple[int, int]]]) -> "View | None":
        """One device's block of a view: {axis of the view: the (mesh axis, number of devices) that cut it}."""
        blocks: list[tuple[int, int, int]] = []
        for axis, found in cuts.items():
            whole = self.whole_axes([axis])
            if whole is None or len(whole) != 1 or len(self.axes[axis]) != 1:
                return None
            blocks += [(scope, size, whole[0]) for scope, size in found]
        parts = {
            a: math.prod(size for _, size, b in blocks if b == a) for a in range(len(self.shape))
        }
        axes = tuple(
            tuple(p._replace(size=p.size // parts[p.axis]) for p in pieces) for pieces in self.axes
        )
        shape = tuple(n // parts[a] for a, n in enumerate(self.shape))
        return replace(self, axes=axes, shape=shape, blocks=(*self.blocks, *blocks))

    def slice_of_scan(self, scan: int) -> "View | None":
        """One step's slice of a view that a scan runs over (along its first axis)."""
        if (places := self.places) is None or (axis := places[0]) is None:
            return None
        return replace(self, axes=self.axes[1:], taken=(*self.taken, Taken(axis, scan)))

    @property
    def stacked(self) -> dict[int, int]:
        """{scan: the leaf's axis that it runs over}, outermost first."""
        return {taken.scan: taken.axis for taken in self.taken if taken.scan is not None}

    @property
    def part(self) -> tuple[Taken, ...]:
        """The axes that are seen at a fixed index: which of a stack of matrices this is."""
        return tuple(taken for taken in self.taken if taken.scan is None)


def _transpose(view: View, params: dict, old: Shape, new: Shape) -> View:
    return replace(view, axes=tuple(view.axes[p] for p in params["permutation"]))


def _keep(view: View, params: dict, old: Shape, new: Shape) -> View:
    return view


def _squeeze(view: View, params: dict, old: Shape, new: Shape) -> View:
    gone = [a % len(old) for a in params["dimensions"]]
    picked = [p for a in gone for p in view.axes[a] if p.axis in view.cut and p.stride == 1]
    return replace(
        view,
        axes=tuple(pieces for a, pieces in enumerate(view.axes) if a not in gone),
        cut=view.cut.difference(p.axis for p in picked),
        taken=(*view.taken, *(Taken(p.axis, None, p.start) for p in picked)),
    )


def _expand(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    """broadcast_in_dim where it only adds axes of size 1."""
    if math.prod(old) != math.prod(new):
        return None
    axes: list[tuple[Piece, ...]] = [()] * len(new)
    for a, to in enumerate(params["broadcast_dimensions"]):
        axes[to] = view.axes[a]
    return replace(view, axes=tuple(axes))


def _slice(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    """Part of whole axes: a slice through what a reshape has split or merged is no view."""
    shorter = [a for a, (m, n) in enumerate(zip(old, new, strict=True)) if m != n]
    axes = list(view.axes)
    for a in shorter:
        if len(axes[a]) != 1 or (
            axes[a][0].axis not in view.cut and axes[a][0].size != view.shape[axes[a][0].axis]
        ):
            return None
        piece, step = axes[a][0], (params["strides"] or (1,) * len(old))[a]
        start = piece.start + piece.stride * params["start_indices"][a]
        axes[a] = (Piece(piece.axis, piece.stride * step if new[a] > 1 else 1, new[a], start),)
    return replace(view, axes=tuple(axes), cut=view.cut.union(axes[a][0].axis for a in shorter))


def _reshape(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    """Runs of axes with equal products: their pieces are dealt out to the new axes, split where they are too long."""
    if params.get("dimensions") is not None or 0 in old:
        return None
    axes: list[tuple[Piece, ...]] = []
    for sources, targets in runs(old, new):
        if [old[a] for a in sources] == [new[a] for a in targets]:
            axes += [view.axes[a] for a in sources]
            continue
        pieces = [piece for a in sources for piece in view.axes[a]]
        dealt = (
            None
            if view.cut.intersection(p.axis for p in pieces)
            else _deal(pieces, [new[a] for a in targets])
        )
        if dealt is None:
            return None
        axes += dealt
    return replace(view, axes=tuple(axes))


def _deal(pieces: list[Piece], sizes: Sequence[int]) -> list[tuple[Piece, ...]] | None:
    """The pieces for axes of these sizes, in order; None if they do not fit."""
    waiting = [p for p in pieces if p.size > 1]
    dealt: list[tuple[Piece, ...]] = []
    for size in sizes:
        mine: list[Piece] = []
        while size > 1:
            piece = waiting.pop(0)
            if size % piece.size == 0:
                mine.append(piece)
                size //= piece.size
            elif piece.size % size == 0:
                rest = piece.size // size
                mine.append(Piece(piece.axis, piece.stride * rest, size))
                waiting.insert(0, piece._replace(size=rest))
                size = 1
            else:
                return None
        dealt.append(tuple(mine))
    return dealt


#: The primitives that keep a leaf a leaf: (view, the equation's parameters, old shape, new shape) -> view, or None
#: where the result is no view of the leaf any more.
VIEWS: dict[str, Callable[[View, dict[str, Any], Shape, Shape], View | None]] = {
    **dict.fromkeys(IDENTITIES, _keep),
    "transpose": _transpose,
    "convert_element_type": _keep,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "slice": _slice,
    "reshape": _reshape,
}
