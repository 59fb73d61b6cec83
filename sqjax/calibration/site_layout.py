"""`SiteLayout`: where the statistics of an activation go among the channels of its site.

The statistics of a site have the shape `Site.channels`: the leaf's batch axes (layers, experts),
then its contracted axes. What is measured of the activation has other axes. Because it is measured
at every step of a scan, and on every device of a shard_map, it has one axis for each scan and mesh
axis around the activation, outermost first; after these come the activation's own channel axes.

The plain case. A leaf w of shape (3, 8, 5) stacks the weights of 3 layers. A scan runs over the
layers; in its body a shard_map splits the 8 input channels over 2 devices:

    Site.channels   (3, 8)      layer, input channel
    measured        (3, 2, 4)   step of the scan, device, channel within the device's block

Channel axis 0 consists of one part, the steps. Channel axis 1 consists of two parts, the devices
and, within, the channels of a block. The parts of all channel axes, in order, are (3, 2, 4), so a
reshape from (3, 2, 4) to (3, 8) is all there is to do.

What else can happen, each with an example:

- Another order. The shard_map is around the scan: measured is (2, 3, 4). A transpose mends that.
- An axis too many. The shard_map splits tokens instead of channels: measured is (3, 2, 8), and the
  devices are part of no channel axis. That axis is reduced: by max, or by sum, because each device
  has seen tokens of its own. So has each step of a scan that uses the same weights at every step.
  But where both devices hold the same tokens, a sum would count these twice: it takes one of them.
- An axis too few. The activation is made outside the scan, and all layers read it (the output of an
  encoder, in the layers of a decoder): measured is (8,). It is broadcast to the shape (3, 8).
- One matrix of a stack. `x @ w[1]` without a scan: measured is (8,). It goes to entry 1 of the
  shape (3, 8); the other entries are zero here, and other matmuls fill them in.
- Channels in another shape. A reshape has split the leaf's 8 channels into 2 heads of 4: measured
  is (3, 2, 4). The numbers are in the same order, so a reshape mends that, too.
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from sqjax.folding.sites import Place
from sqjax.program.facts import Program


class Part(NamedTuple):
    """One factor of a channel axis.

    Attributes:
        axis: which channel axis.
        size: its length.
        scope: the scan over whose steps, or the mesh axis over whose devices, it runs; None for
            what remains: the channels within one step and one device's block, which the activation
            has as an axis of its own.
    """

    axis: int
    size: int
    scope: int | None = None


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
        of_scope = {part.scope: part for part in parts if part.scope is not None}
        around = program.scopes[place.activation]
        reduced = [i for i, scope in enumerate(around) if scope not in of_scope]
        mesh = [i for i in reduced if around[i] in program.mesh_axes]
        same = [i for i in mesh if around[i] not in differing]

        fixed = [i for i, taken in enumerate(place.view.taken) if taken.scan is None]
        outer = [of_scope[scope] for scope in around if scope in of_scope]
        own = [part for part in parts if part.scope is None and part.axis not in fixed]
        return cls(
            channels=(*place.site.channels[:kept], *tail),
            parts=parts,
            measured=(*outer, *own),
            reduced=tuple(reduced),
            same=tuple(same),
            entry=place.entry,
        )

    def largest(self, x: Array) -> Array:
        """The maximum over the steps and devices that are no part of a channel axis."""
        return x.max(self.reduced, initial=0)

    def total(self, x: Array) -> Array:
        """The sum over them; devices that hold the same activation count once."""
        if self.same:
            x = jnp.max(x, axis=self.same, keepdims=True)
        return x.sum(self.reduced)

    def arranged(self, x: Array) -> Array:
        """A reduced statistic as the site's channels; zeros for other matrices of its stack."""
        own = [part.size for part in self.measured if part.scope is None]
        outer = x.shape[: len(self.measured) - len(own)]
        x = x.reshape(*outer, *own)

        present = [part for part in self.parts if part in self.measured]
        x = x.transpose([self.measured.index(part) for part in present])
        x = x.reshape([part.size if part in present else 1 for part in self.parts])
        x = jnp.broadcast_to(x, [part.size for part in self.parts])
        whole = x.reshape(self.channels)

        picked = any(isinstance(index, int) for index in self.entry)
        if not picked:
            return whole
        return jnp.zeros(self.channels, x.dtype).at[self.entry].set(whole[self.entry])


def _parts(program: Program, place: Place, kept: int, tail: tuple[int, ...]) -> Iterator[Part]:
    """The factors of the first `kept` channel axes, and of the axes in `tail`, in order."""
    view = place.view
    for i, axis in enumerate(place.site.channel_axes[:kept]):
        for scope in view.strides(axis):  # the outermost first
            yield Part(i, program.lengths[scope], scope)
        if axis not in view.stacked.values():  # a scan takes single indices: nothing remains
            yield Part(i, view.shape[axis])
    for i, size in enumerate(tail, start=kept):
        yield Part(i, size)
