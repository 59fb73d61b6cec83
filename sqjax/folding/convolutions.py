"""`Convolution`: what the axes of a `conv_general_dilated` are, and the site that its kernel is."""

from typing import NamedTuple

from sqjax._shapes import sizes_along
from sqjax.folding.graph import Kernel, Site
from sqjax.folding.labels import Labels, put_axes, reshape, take_axes
from sqjax.program.equations import Equation
from sqjax.program.facts import Program
from sqjax.program.views import View


class Layout(NamedTuple):
    """Where the axes of one array are: two of them that are looked at, and the others.

    Attributes:
        shape: the array's.
        first: the axis of images, or of a kernel's outputs.
        second: the axis of channels.
        others: the positions, or the window.
    """

    shape: tuple[int, ...]
    first: int
    second: int
    others: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], spec: tuple[int, ...]) -> "Layout":
        """The layout that a spec of `lax.ConvDimensionNumbers` describes."""
        return cls(shape, spec[0], spec[1], tuple(spec[2:]))

    def core(self, labels: Labels, split: tuple[int, int, int]) -> Labels:
        """Labels that do not vary along the others, as those of an array of just the first and
        second axis, reshaped to `split`.

        Example: labels [[[1, 2, 3, 4]]] of (1 image, 5 positions, 4 channels), in 2 groups: with
        `split` (1, 2, 2) they are [[[1, 2], [3, 4]]].
        """
        kept = self.first, self.second
        flat = take_axes(labels, kept)
        return reshape(flat, sizes_along(self.shape, kept), split)

    def labels(self, core: Labels, split: tuple[int, int, int]) -> Labels:
        """The inverse of `core`."""
        kept = self.first, self.second
        flat = reshape(core, split, sizes_along(self.shape, kept))
        return put_axes(flat, kept, len(self.shape))


class Convolution(NamedTuple):
    """A convolution: y[b, p, o] is the sum of x[b, p + k, i] * w[k, i, o] over taps and channels.

    Attributes:
        equation: the equation.
        image, kernel, result: where the axes of x, w and y are.
        groups: the channels and outputs are in so many groups, which do not mix.
    """

    equation: Equation
    image: Layout
    kernel: Layout
    result: Layout
    groups: int

    @classmethod
    def of(cls, program: Program, equation: Equation) -> "Convolution":
        """What an equation's parameters say."""
        numbers = equation.params["dimension_numbers"]
        x, w = map(program.shape, equation.inputs)
        [y] = map(program.shape, equation.outputs)
        return cls(
            equation,
            Layout.of(x, numbers.lhs_spec),
            Layout.of(w, numbers.rhs_spec),
            Layout.of(y, numbers.out_spec),
            equation.params["feature_group_count"],
        )

    @property
    def channels(self) -> int:
        """The image's axis of channels."""
        return self.image.second

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has one output, which reads no other: they are counted alike."""
        outputs = self.kernel.shape[self.kernel.first]
        return self.groups == outputs == self.image.shape[self.channels]

    def site(self, view: View) -> Site | str:
        """The site that the kernel is, or why it is none.

        Args:
            view: how the convolution sees the leaf.
        """
        if self.equation.params["batch_group_count"] != 1:
            return f"{self.equation} has a batch_group_count: it stays float"
        summed_axes = (self.kernel.second, *self.kernel.others)
        in_order = sorted(summed_axes, key=view.position_of)
        summed = view.whole_axes(in_order)
        counted = self.kernel.second
        if self.is_depthwise:
            counted = self.kernel.first
        channels = _axis(view, counted)
        if not summed or channels is None:
            return (
                f"{self.equation} is a convolution whose channels, or sums, are parts or mixtures "
                "of its axes: it stays float"
            )
        kernel = self._in_groups(summed, view)
        if isinstance(kernel, str):
            return kernel
        batch = view.taken_axes
        sizes = sizes_along(view.full_shape, (*batch, channels))
        every = (*sizes[:-1], sizes[-1] * kernel.groups)
        return Site(view.path, (channels,), every, batch, kernel)

    def _in_groups(self, summed: tuple[int, ...], view: View) -> Kernel | str:
        """What the leaf is as a kernel, or why it can be none."""
        if self.groups == 1 or self.is_depthwise:
            return Kernel(summed)
        outputs = _axis(view, self.kernel.first)
        # On every device the groups would be other ones.
        if outputs is None or view.blocks:
            return (
                f"{self.equation} is a convolution in groups whose outputs are no whole axis of "
                "it: it stays float"
            )
        return Kernel(summed, self.groups, outputs)


def _axis(view: View, axis: int) -> int | None:
    """The one leaf's axis that an axis of a view is, whole; None if it is none, or several."""
    whole = view.whole_axes([axis])
    return whole[0] if whole is not None and len(whole) == 1 else None
