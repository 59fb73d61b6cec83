"""`SiteLayout`: where the statistics of an activation go among the channels of its site.

The statistics of a site have the shape `Site.channels`: the leaf's batch axes (layers, experts),
then its contracted axes. What is measured of the activation has other axes. Because it is measured
at every step of a scan, and on every device of a shard_map, it has one axis for each scan and mesh
axis around the activation, outermost first; after these come the activation's own channel axes.

Example. A leaf w of shape (3, 8, 5) stacks the weights of 3 layers. A scan runs over the layers; in
its body a shard_map splits the 8 input channels over 2 devices:

    Site.channels   (3, 8)      layer, input channel
    measured        (3, 2, 4)   step of the scan, device, channel within the device's block

Channel axis 0 consists of one part, the steps. Channel axis 1 consists of two parts, the devices
and, within, the channels of a block. The parts of all channel axes, in order, are (3, 2, 4), so a
reshape from (3, 2, 4) to (3, 8) is all there is to do. The comments below vary this example.
"""

from collections.abc import Collection, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._shapes import sizes_along
from sqjax.folding.sites import Place
from sqjax.program.facts import Program


class Part(NamedTuple):
    """One factor of a channel axis.

    Attributes:
        axis: which channel axis.
        size: its length.
        scope: the scan over whose steps, or the mesh axis over whose devices, it runs; None for
            what remains: the channels within one step and one device's block.
        own: whether the activation has it as an axis of its own.
    """

    axis: int
    size: int
    scope: int | None = None
    own: bool = False


class SiteLayout(NamedTuple):
    """How to rearrange what was measured of an activation into the channels of a site.

    Attributes:
        channels: the shape to arrive at.
        parts: the factors of these channel axes, in order.
        measured: the parts that the measured arrays have, in the order of their axes once the
            others are reduced.
        reduced: the measured arrays' axes that are no part of a channel axis.
        same: those of `reduced` along which all devices hold the same activation.
        entry: the index of the channels that this matmul reads.
    """

    channels: tuple[int, ...]
    parts: tuple[Part, ...]
    measured: tuple[Part, ...]
    reduced: tuple[int, ...]
    same: tuple[int, ...]
    entry: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        program: Program,
        place: Place,
        differing: Collection[int],
        kept: int,
        *tail: int,
    ) -> "SiteLayout":
        """The layout for one matmul.

        Args:
            program: the program that the matmul is in.
            place: the matmul.
            differing: the mesh axes along which devices may hold different values of the
                activation.
            kept: how many of the site's channel axes the statistic has, the first ones: all of them
                for an absmax, only the batch axes for a histogram.
            tail: the sizes of further axes of the statistic: the bins of a histogram.
        """
        parts = tuple(_parts(program, place, kept, tail))
        part_of = {part.scope: part for part in parts}
        outer: list[Part] = []
        reduced: list[int] = []
        same: list[int] = []
        for axis, scope in enumerate(program.scopes[place.activation]):
            if scope in part_of:
                outer.append(part_of[scope])
                continue
            # The shard_map splits the tokens instead: measured is (3, 2, 8), and the devices are
            # part of no channel axis. That axis is reduced, because a channel's statistics are
            # those of all tokens. So is the axis of a scan that uses one weight at every step.
            reduced.append(axis)
            # Where both devices hold the same tokens, a sum over devices would count these twice.
            if scope in program.mesh_axes and scope not in differing:
                same.append(axis)

        own = filter(attrgetter("own"), parts)
        return cls(
            channels=(*place.site.channels[:kept], *tail),
            parts=parts,
            measured=(*outer, *own),
            reduced=tuple(reduced),
            same=tuple(same),
            entry=place.entry,
        )

    def largest(self, x: Array) -> Array:
        """The maximum over the steps and devices that are part of no channel axis."""
        return x.max(self.reduced, initial=0)

    def total(self, x: Array) -> Array:
        """The sum over them; devices that hold the same activation count once."""
        if self.same:
            one = jnp.max(x, axis=self.same, keepdims=True)
            if jnp.issubdtype(x.dtype, jnp.floating):
                # A CPU's vectorised maximum may pass over NaN, which a sum is there to keep.
                nan = jnp.isnan(x).any(self.same, keepdims=True)
                one = jnp.where(nan, jnp.float32(jnp.nan), one)
            x = one
        return x.sum(self.reduced)

    def arranged(self, x: Array) -> Array:
        """A reduced statistic as the site's channels; zeros for other matrices of its stack."""
        sizes = list(map(attrgetter("size"), self.parts))
        where = list(map(self.parts.index, self.measured))

        # A reshape before the matmul has split the leaf's channels into 2 heads of 4: measured is
        # (3, 2, 4) where there is no shard_map. The numbers are in order: it becomes (3, 8).
        x = x.reshape(sizes_along(sizes, where))

        # The shard_map is around the scan: measured is (2, 3, 4). It becomes (3, 2, 4).
        x = x.transpose(np.argsort(where))

        # The activation is made outside the scan and all layers read it (an encoder's output, in
        # the layers of a decoder): measured is (8,). It becomes (1, 8), then (3, 8).
        missing = set(range(len(sizes))).difference(where)
        x = jnp.expand_dims(x, tuple(missing))
        whole = jnp.broadcast_to(x, sizes).reshape(self.channels)

        # `x @ w[1]`, without a scan, reads one matrix of the stack: measured is (8,). Only entry 1
        # of (3, 8) has seen it. The matmuls that read the other matrices fill in theirs.
        picked = any(isinstance(index, int) for index in self.entry)
        if not picked:
            return whole
        zeros = jnp.zeros(self.channels, x.dtype)
        return zeros.at[self.entry].set(whole[self.entry])


def _parts(
    program: Program, place: Place, kept: int, tail: tuple[int, ...]
) -> Iterator[Part]:
    """The factors of the first `kept` channel axes, and of the axes in `tail`, in order."""
    view = place.view
    scanned = set(view.stacked.values())
    picked = set(map(attrgetter("axis"), view.fixed))
    for i, axis in enumerate(place.site.channel_axes[:kept]):
        for scope in view.strides(axis):  # the outermost first
            yield Part(i, program.lengths[scope], scope)
        # A scan takes one index at a time: within a step nothing remains.
        if axis not in scanned:
            yield Part(i, place.block[i], own=axis not in picked)
    for i, size in enumerate(tail, start=kept):
        yield Part(i, size, own=True)
