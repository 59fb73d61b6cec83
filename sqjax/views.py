"""`View`: a parameter leaf seen through transposes, slices, scans, shard_maps ...: which of its axes is where."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """`size` places along an axis of a leaf, `stride` apart: all of it, or one factor of what a reshape has split."""

    axis: int
    stride: int
    size: int


@dataclass(frozen=True)
class View:
    """Where the axes of a leaf have gone.

    Attributes:
        path: the leaf's name.
        shape: the leaf's shape; in a shard_map that of the block of it that one device has.
        axes: for every axis of the view the pieces of the leaf's axes that it runs over (none: an axis of size 1).
        cut: the leaf's axes that are not seen whole.
        stacked: (scan, axis of the leaf) for every scan that hands out one index of that axis at a time.
        blocks: (mesh axis, its number of devices, axis of the leaf) for every mesh axis of a shard_map that cuts that
            axis into one block for each device; where several cut one axis, the major one first.
    """

    path: str
    shape: Shape
    axes: tuple[tuple[Piece, ...], ...]
    cut: frozenset[int] = frozenset()
    stacked: tuple[tuple[int, int], ...] = ()
    blocks: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, path: str, shape: Shape) -> "View":
        return cls(path, shape, tuple((Piece(a, 1, n),) for a, n in enumerate(shape)))

    @property
    def full_shape(self) -> Shape:
        """The leaf's shape, all devices' blocks together."""
        return tuple(n * math.prod(m for _, m, a in self.blocks if a == axis) for axis, n in enumerate(self.shape))

    def places(self, axis: int) -> list[tuple[int, int]]:
        """(scope, its stride) along an axis of the leaf, for every scan and mesh axis that hands out parts of it."""
        found, stride = [(scan, 1) for scan, a in self.stacked if a == axis], self.shape[axis]
        for scope, size, a in reversed(self.blocks):
            if a == axis:
                found.append((scope, stride))
                stride *= size
        return found[::-1]

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
    def permutation(self) -> tuple[int, ...] | None:
        """The leaf's axis behind every axis of the view, where each is seen whole and unsplit; else None."""
        found = [self.whole_axes([a]) for a in range(len(self.axes))]
        whole = not self.cut and all(f is not None and len(f) == 1 for f in found)
        return tuple(f[0] for f in found if f) if whole else None

    def block(self, cuts: Mapping[int, Sequence[tuple[int, int]]]) -> "View | None":
        """One device's block of a view: {axis of the view: the (mesh axis, number of devices) that cut it}."""
        if not cuts:
            return self
        if (permutation := self.permutation) is None:
            return None
        blocks = [(scope, size, permutation[a]) for a, found in cuts.items() for scope, size in found]
        parts = {a: math.prod(size for _, size, b in blocks if b == a) for a in range(len(self.shape))}
        axes = tuple(tuple(p._replace(size=p.size // parts[p.axis]) for p in pieces) for pieces in self.axes)
        shape = tuple(n // parts[a] for a, n in enumerate(self.shape))
        return replace(self, axes=axes, shape=shape, blocks=(*self.blocks, *blocks))

    def slice_of_scan(self, scan: int) -> "View | None":
        """One step's slice of a view that a scan runs over (along its first axis)."""
        if (permutation := self.permutation) is None:
            return None
        return replace(self, axes=self.axes[1:], stacked=(*self.stacked, (scan, permutation[0])))


def _transpose(view: View, params: dict, old: Shape, new: Shape) -> View:
    return replace(view, axes=tuple(view.axes[p] for p in params["permutation"]))


def _keep(view: View, params: dict, old: Shape, new: Shape) -> View:
    return view


def _squeeze(view: View, params: dict, old: Shape, new: Shape) -> View:
    gone = [a % len(old) for a in params["dimensions"]]
    return replace(view, axes=tuple(pieces for a, pieces in enumerate(view.axes) if a not in gone))


def _expand(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    """broadcast_in_dim where it only adds axes of size 1."""
    if math.prod(old) != math.prod(new):
        return None
    axes: list[tuple[Piece, ...]] = [()] * len(new)
    for a, to in enumerate(params["broadcast_dimensions"]):
        axes[to] = view.axes[a]
    return replace(view, axes=tuple(axes))


def _slice(view: View, params: dict, old: Shape, new: Shape) -> View | None:
    shorter = [a for a, (m, n) in enumerate(zip(old, new, strict=True)) if m != n]
    if any(len(view.axes[a]) != 1 for a in shorter):
        return None
    axes = [(p[0]._replace(size=new[a]),) if a in shorter else p for a, p in enumerate(view.axes)]
    return replace(view, axes=tuple(axes), cut=view.cut.union(view.axes[a][0].axis for a in shorter))


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
        dealt = None if view.cut.intersection(p.axis for p in pieces) else _deal(pieces, [new[a] for a in targets])
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


def runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes of two shapes that have equal products: [(axes of old, axes of new), ...]."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[i0:i])) != (b := math.prod(new[j0:j])):
            if a < b:
                i += 1
            else:
                j += 1
        found.append((list(range(i0, i)), list(range(j0, j))))
    return found


#: The primitives that keep a leaf a leaf: (view, the equation's parameters, old shape, new shape) -> view, or None
#: where the result is no view of the leaf any more.
VIEWS: dict[str, Callable[[View, dict[str, Any], Shape, Shape], View | None]] = {
    "transpose": _transpose,
    "convert_element_type": _keep,
    "copy": _keep,
    "copy_p": _keep,
    "stop_gradient": _keep,
    "name": _keep,
    "sharding_constraint": _keep,
    "reshard": _keep,
    "mesh_cast": _keep,
    "pvary": _keep,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "slice": _slice,
    "reshape": _reshape,
}
