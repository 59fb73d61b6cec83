"""Rules of the search for what moves a window over images: convolutions, and pooling.

A convolution is a dot for each group of channels: its sum runs over the channels of a group, and
over the taps of the window, along which no label may vary. So its rule looks at labels with these
axes alone:

    x  (images, groups, channels of a group)
    w  (groups, outputs of a group, channels of a group)
    y  (images, groups, outputs of a group)
"""

from typing import NamedTuple

import numpy as np

from sqjax.folding.convolutions import Convolution, Layout
from sqjax.folding.labels import Labels, varies
from sqjax.folding.search import Closure, Refused
from sqjax.program.equations import Atom, Equation


class _Operand(NamedTuple):
    """An operand or the result: its variable, its axes, and the shape of its labels here."""

    var: Atom
    layout: Layout
    split: tuple[int, int, int]

    def core(self, c: Closure) -> Labels | None:
        """Its labels along the axes above; None where it has none (yet).

        Every tap meets every position (but at the edges), so along both all labels are tied.
        """
        labels = c[self.var]
        if labels is None:
            return None
        tied = c.tie_along(labels, self.layout.others)
        return self.layout.core(tied, self.split)

    def put(self, c: Closure, core: Labels) -> None:
        """Puts labels on it."""
        c.put(self.var, self.layout.labels(core, self.split))


def convolve(c: Closure, e: Equation) -> None:
    """Labels along channels meet their opposites in the kernel; those along outputs pass through.

    Example: y = conv(h, w) with 2 channels and 3 outputs, labels written without positions.

        h [[-1, -2]] varies along the channels, so w gets [[1, 2]] for each output, and y nothing
        y [[-1, -2, -3]] comes from h or from w: w [[-1], [-2], [-3]] for every channel, or h with
        all tied, [[-1]]
        depthwise, y [[-1, -2]] may come from h [[-1, -2]] too
    """
    if e.params["batch_group_count"] != 1:
        raise Refused(f"{e} has a batch_group_count")
    image, kernel, result = _operands(c, e)
    x, w = _passing(c, e, image, kernel, result)
    if x is not None:
        result.put(c, x)
    if w is not None:
        result.put(c, w.reshape(1, *w.shape[:2]))
    y = result.core(c)
    if y is not None:
        carry = x is not None, w is not None
        _carry_back(c, e, (image, kernel), y, carry)


def _passing(
    c: Closure,
    e: Equation,
    image: _Operand,
    kernel: _Operand,
    result: _Operand,
) -> tuple[Labels | None, Labels | None]:
    """The labels of the image and of the kernel that pass on to the result; the others meet their
    opposites in the other operand.
    """
    x, w = image.core(c), kernel.core(c)
    if x is not None and w is not None and _cancelled(x, w):
        return None, None
    if x is not None and _must_meet(c, image, kernel, x, result.core(c)):
        _meet_kernel(c, e, image, kernel, x)
        x = None
    if w is not None and varies(w, [2]):
        _meet_image(c, e, image, kernel, w)
        w = None
    return x, w


def _operands(c: Closure, e: Equation) -> tuple[_Operand, _Operand, _Operand]:
    """The image, the kernel and the result."""
    conv = Convolution.of(c.program, e)
    groups = conv.groups
    images = conv.image.shape[conv.image.first]
    inputs = conv.kernel.shape[conv.kernel.second]
    outputs = conv.kernel.shape[conv.kernel.first] // max(groups, 1)
    x, w = e.inputs
    return (
        _Operand(x, conv.image, (images, groups, inputs)),
        _Operand(w, conv.kernel, (groups, outputs, inputs)),
        _Operand(e.outputs[0], conv.result, (images, groups, outputs)),
    )


def _cancelled(x: Labels, w: Labels) -> bool:
    """Whether each channel's scale meets its inverse in the kernel."""
    alone = x.shape[0] == 1 and w.shape[1] == 1
    return alone and np.array_equal(x[0], -w[:, 0])


def _must_meet(
    c: Closure,
    image: _Operand,
    kernel: _Operand,
    x: Labels,
    y: Labels | None,
) -> bool:
    """Whether the image's labels must meet their opposites in the kernel.

    They must if a sum would mix channels. Labels that are the same all through a group could as
    well pass through; they end in the kernel if it is made of leaves, and the result has none.
    """
    if varies(x, [2]):
        return True
    of_leaves = c.program.is_of_leaves(kernel.var)
    of_channels = varies(x, [1]) or x.size == 1
    meets = of_leaves and not c.program.is_of_leaves(image.var)
    return meets and of_channels and y is None


def _meet_kernel(
    c: Closure, e: Equation, image: _Operand, kernel: _Operand, x: Labels
) -> None:
    """The channels' labels of an image end in their opposites in the kernel."""
    # Images of one batch meet the same kernel, so they must be scaled alike.
    if varies(x, [0]):
        raise Refused(f"{e} adds up its channels")
    c.check_may_meet(e, image.var, kernel.var)
    kernel.put(c, -x[0][:, None])


def _meet_image(
    c: Closure, e: Equation, image: _Operand, kernel: _Operand, w: Labels
) -> None:
    """The channels' labels of a kernel end in their opposites in the image."""
    # All outputs read the same image.
    if varies(w, [1]):
        raise Refused(f"{e} adds up its channels")
    c.check_may_meet(e, image.var, kernel.var)
    image.put(c, -w[:, 0][None])


def _carry_back(
    c: Closure,
    e: Equation,
    operands: tuple[_Operand, _Operand],
    y: Labels,
    carry: tuple[bool, bool],
) -> None:
    """Labels of the result are those of one operand: the one that carries some, or a choice."""
    image, kernel = operands
    if all(carry):  # s times s
        raise Refused(f"{e} multiplies two values of that scale")
    if carry[0]:
        image.put(c, _of_image(c, y))
    elif carry[1]:
        kernel.put(c, _of_kernel(c, y))
    else:
        # Each option ties channels in a copy, because only the one taken may tie them here.
        of_image, of_kernel = _of_image(c.copy(), y), _of_kernel(c.copy(), y)
        options = [
            (image.var, image.layout.labels(of_image, image.split)),
            (kernel.var, kernel.layout.labels(of_kernel, kernel.split)),
        ]
        c.choose(e, options)


def _of_image(c: Closure, y: Labels) -> Labels:
    """The result's labels as the image's: the outputs of a group are tied."""
    return c.tie_along(y, [2])


def _of_kernel(c: Closure, y: Labels) -> Labels:
    """The result's labels as the kernel's: the images are tied."""
    return c.tie_along(y, [0])[0][:, :, None]


def pool(c: Closure, e: Equation) -> None:
    """Sums and maxima under a window: labels that do not vary along its axes pass."""
    x, y = e.inputs[0], e.outputs[0]
    axes = pooled_axes(e)

    def forwards(labels: Labels) -> Labels:
        if varies(labels, axes):
            raise Refused(f"{e} mixes its positions")
        return labels

    c.carry(x, y, forwards)
    c.carry(y, x, lambda labels: c.tie_along(labels, axes))


def pooled_axes(e: Equation) -> list[int]:
    """The axes of a reduce_window along which it does anything."""
    found: list[int] = []
    for axis, size in enumerate(e.params["window_dimensions"]):
        every = {size, e.params["window_strides"][axis]}
        every.add(e.params["base_dilation"][axis])
        if every != {1} or any(e.params["padding"][axis]):
            found.append(axis)
    return found
