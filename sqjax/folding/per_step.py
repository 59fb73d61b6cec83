"""`Stack`: one scale vector for each step or device, where a group lives in a scan or a shard_map.

The body of a scan is searched once, and the labels found there hold at every step: what is lawful
for one s is lawful for another s at each step. So there may be as many scale vectors as steps, if

- every labelled variable lives in the body, because a value that two steps see has one scale; and
- every labelled leaf is another slice at each step, because an array can be scaled only once.

The same holds of the devices along a mesh axis of a shard_map, if every labelled leaf is sharded
along it, and no collective along it reads what is labelled (because it adds up or compares elements
of several devices, which then must have one scale).

Example: a scan over 3 layers computes (x @ a[i]) @ b[i] with 4 channels in between. In the body the
slice of a, of shape (inputs, 4), has the labels [[-1, -2, -3, -4]]. The stack has the size 4 and
3 steps, so the labels of a itself, of shape (3, inputs, 4), are

    [[[-1, -2, -3, -4]], [[-5, -6, -7, -8]], [[-9, -10, -11, -12]]]
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sqjax._shapes import entries_at, sizes_along
from sqjax.folding.labels import (
    Labels,
    channels_and_degrees,
    put_axes,
    take_axes,
)
from sqjax.folding.sites import Place
from sqjax.program.equations import Var
from sqjax.program.facts import Program
from sqjax.program.replication import REDUCING, reduced_axes
from sqjax.program.views import View


class Stack(NamedTuple):
    """How the scales of a group are stacked.

    Attributes:
        program: the program that the group was found in.
        scopes: the scans and mesh axes along which there is one scale vector each, outermost first.
        size: the number of scales in one such vector.
    """

    program: Program
    scopes: tuple[int, ...]
    size: int

    @classmethod
    def of(
        cls,
        program: Program,
        found: Mapping[Var, Labels],
        places: Sequence[Place],
    ) -> "Stack":
        """The stack of a group, given the labels that were found and the program's sites.

        A labelled site must be another slice or shard at each step too: a channel has one scale.
        """
        scopes = _scopes_of_all(program, found) - _reduced_over(program, found)
        for place in places:
            if place.activation in found:
                # The axes that scans run over are batch axes, and so among these.
                axes = place.site.channel_axes
                dividing = place.view.dividing.items()
                scopes &= {scope for scope, axis in dividing if axis in axes}
        # The scales of a vector are numbered from 1, so the largest label is how many there are.
        largest = []
        for labels in found.values():
            channels, _ = channels_and_degrees(labels)
            largest.append(channels.max())
        return cls(program, tuple(sorted(scopes)), int(max(largest)))

    @property
    def steps(self) -> tuple[int, ...]:
        """The number of steps of every scan, and of devices along every mesh axis."""
        return entries_at(self.program.lengths, self.scopes)

    def of_leaf(self, var: Var, labels: Labels) -> Labels:
        """The labels of a variable as those of its leaf, in the leaf's axes."""
        view = self.program.leaf_views[var]
        ndim = len(view.shape)
        places = enumerate(view.leaf_axes or ())
        axes = {i: axis for i, axis in places if axis is not None}
        own = take_axes(labels, list(axes))
        # In a shard_map the variable is one device's block, and every block carries these labels.
        spread = put_axes(own, list(axes.values()), ndim)
        whole = _repeated(spread, view.shape, view.full_shape)
        return self.along(whole, _strides(view, range(ndim)), view.full_shape)

    def of_site(self, place: Place, activation: Labels | None) -> Labels:
        """The labels of a site's channels, in the order of `Site.channels`.

        They are the opposite of the activation's: what the activation is divided by is what the
        site's weights are multiplied by. Without labels on the activation all are 0.
        """
        channels = place.site.channels
        labels = np.zeros(channels, int)
        if activation is None:
            return labels
        view, axes = place.view, place.site.channel_axes
        read_shape = sizes_along(
            self.program.shape(place.activation), place.axes
        )
        read = np.broadcast_to(-take_axes(activation, place.axes), read_shape)
        # Axes of the leaf that are seen at one index (a layer of a stack) come first, with size 1.
        block = place.block
        taken = len(view.taken)
        read = read.reshape((1,) * taken + block[taken:])
        own = _repeated(read, block, channels)
        stacked = self.along(own, _strides(view, axes), channels)
        labels[place.entry] = np.broadcast_to(stacked, channels)[place.entry]
        return labels

    def along(
        self,
        labels: Labels,
        where: Mapping[int, tuple[int, int]],
        shape: Sequence[int],
    ) -> Labels:
        """Other labels at every step and on every device: a label c at step i becomes c + i * size.

        Args:
            labels: of an array of this shape.
            where: {scan or mesh axis: (axis of the array, stride along it from one step or device
                to the next)}.
            shape: the array's.
        """
        # Steps of several scopes are counted like the digits of a number, the outermost first.
        step = np.zeros((1,) * labels.ndim, int)
        for scope, length in zip(self.scopes, self.steps, strict=True):
            axis, stride = where[scope]
            of_this_scope = np.arange(shape[axis]) // stride % length
            step = step * length + put_axes(of_this_scope, [axis], labels.ndim)
        # The scales of the steps before this one; a label that divides counts downwards.
        before = np.sign(labels) * self.size * step
        return np.where(labels == 0, 0, labels + before)


def _scopes_of_all(program: Program, found: Mapping[Var, Labels]) -> set[int]:
    """The scans and mesh axes around all labelled variables that slice or shard all labelled
    leaves.
    """
    around = map(set, entries_at(program.scopes, found))
    leaves = found.keys() & program.leaves.keys()
    dividing = [set(program.leaf_views[leaf].dividing) for leaf in leaves]
    return set.intersection(*around, *dividing)


def _reduced_over(program: Program, found: Mapping[Var, Labels]) -> set[int]:
    """The mesh axes along which a collective adds up or compares what is labelled."""
    scopes: set[int] = set()
    for equation in program.touching(*found):
        if equation.name in REDUCING:
            scopes |= reduced_axes(program, equation) or set()
    return scopes


def _strides(view: View, axes: Sequence[int]) -> dict[int, tuple[int, int]]:
    """{scan or mesh axis: (i, stride)}: it goes through the leaf's axis `axes[i]` in such
    strides.
    """
    where = {}
    for i, axis in enumerate(axes):
        for scope, stride in view.strides(axis).items():
            where[scope] = i, stride
    return where


def _repeated(
    labels: Labels, block: Sequence[int], whole: Sequence[int]
) -> Labels:
    """The labels of an array of which every block carries these.

    Example: [1, 2], of blocks of 2, in an array of 6 give [1, 2, 1, 2, 1, 2]; but [1], which holds
    all along the block, stays [1].
    """
    varies = np.greater(labels.shape, 1) & np.equal(labels.shape, block)
    blocks = np.floor_divide(whole, np.maximum(block, 1))
    return np.tile(labels, np.where(varies, blocks, 1))
