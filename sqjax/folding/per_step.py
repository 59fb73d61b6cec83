"""`Stack`: one scale vector a step or a device, where a group lives in the body of a scan or of a shard_map.

What is lawful at every step of a scan for one s is lawful for another s at each step, if all that the group labels
lives in the body, and every leaf of it is a slice of its own. The same holds of the devices along a mesh axis, if every
labelled leaf is cut along it, and no collective along it reads what is labelled.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sqjax.folding import labels as lab
from sqjax.folding.labels import Labels
from sqjax.folding.sites import Place
from sqjax.program.build import Var
from sqjax.program.facts import Program
from sqjax.program.replication import REDUCING, reduced_axes


class Stack(NamedTuple):
    """The scans and mesh axes along which a group's scales are stacked, outermost first, and the scales a step."""

    program: Program
    scopes: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, program: Program, found: Mapping[Var, Labels], places: Sequence[Place]) -> "Stack":
        """Those around every labelled variable that hand out parts of every labelled leaf.

        But not the mesh axes that a collective on a labelled variable reduces over, nor the scans and mesh axes that
        do not hand out the channels of a labelled site: a channel has one scale.
        """
        shared = [set(program.scopes[v]) for v in found]
        shared += [_handed_out(program, v) for v in found if v in program.leaves]
        scopes = set.intersection(*shared)
        for equation in {
            id(e): e for v in found for e in program.touching(v) if e.name in REDUCING
        }.values():
            scopes -= reduced_axes(program, equation) or set()
        for place in places:
            if place.activation in found:
                scopes &= {*place.view.stacked, *(scope for scope, _, _ in place.view.blocks)}
                scopes -= {
                    scope for scope, _, a in place.view.blocks if a not in place.site.channel_axes
                }
        return cls(
            program,
            tuple(sorted(scopes)),
            max(int(np.abs(labels).max()) for labels in found.values()),
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """The number of steps of every scan, and of devices along every mesh axis."""
        return tuple(self.program.lengths[scope] for scope in self.scopes)

    def of_leaf(self, var: Var, labels: Labels) -> Labels:
        """The labels of a variable as those of its leaf, in the leaf's axes."""
        view = self.program.leaf_views[var]
        places = [(i, axis) for i, axis in enumerate(view.leaf_axes or ()) if axis is not None]
        own = lab.take_axes(labels, [i for i, _ in places])
        spread = lab.put_axes(own, [axis for _, axis in places], len(view.shape))
        where = {
            scope: (a, n) for a in range(len(view.shape)) for scope, n in view.strides(a).items()
        }
        return self.along(_repeated(spread, view.shape, view.full_shape), where, view.full_shape)

    def of_site(self, place: Place, activation: Labels | None) -> Labels:
        """The labels of a site's channels, in the order of `Site.channels`."""
        view, axes, channels = place.view, place.site.channel_axes, place.site.channels
        labels = np.zeros(channels, int)
        if activation is not None:
            shape = [self.program.shape(place.activation)[a] for a in place.axes]
            own, block = (
                np.broadcast_to(-lab.take_axes(activation, place.axes), shape),
                [view.shape[a] for a in axes],
            )
            own = own.reshape((1,) * len(view.taken) + tuple(block[len(view.taken) :]))
            where = {
                scope: (i, n) for i, a in enumerate(axes) for scope, n in view.strides(a).items()
            }
            spread = self.along(_repeated(own, block, channels), where, channels)
            labels[place.entry] = np.broadcast_to(spread, channels)[place.entry]
        return labels

    def along(
        self, labels: Labels, where: Mapping[int, tuple[int, int]], shape: Sequence[int]
    ) -> Labels:
        """Other labels at every step and on every device.

        Args:
            labels: of an array of this shape.
            where: {scan or mesh axis: (axis of the array, stride along it from one step or device to the next)}.
            shape: the array's.
        """
        step = np.zeros((1,) * labels.ndim, int)
        for scope, length in zip(self.scopes, self.steps, strict=True):
            axis, stride = where[scope]
            step = step * length + lab.put_axes(
                np.arange(shape[axis]) // stride % length, [axis], labels.ndim
            )
        return np.where(labels == 0, 0, labels + np.sign(labels) * self.size * step)


def _handed_out(program: Program, leaf: Var) -> set[int]:
    """The scans and mesh axes that hand out parts of a leaf."""
    view = program.leaf_views[leaf]
    return {*view.stacked, *(scope for scope, _, _ in view.blocks)}


def _repeated(labels: Labels, block: Sequence[int], whole: Sequence[int]) -> Labels:
    """The labels of an array of which every block carries these."""
    times = [
        n // m if size > 1 and size == m else 1
        for size, m, n in zip(labels.shape, block, whole, strict=True)
    ]
    return np.tile(labels, times) if math.prod(times) > 1 else labels
