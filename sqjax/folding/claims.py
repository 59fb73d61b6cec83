"""`Claim`: what labels say of one equation; and comparisons of labels, which the laws share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from sqjax.program.equations import Atom, Equation, Var
from sqjax.program.facts import Program

#: Of size 1 along an axis on which the labels do not vary, or of the variable's own size there.
Labels = np.ndarray


class Claim(NamedTuple):
    """What the labels claim of one equation: operands with the labels `xs` make results with the
    labels `ys`.
    """

    program: Program
    equation: Equation
    xs: list[Labels]
    ys: list[Labels]

    @classmethod
    def of(
        cls, program: Program, equation: Equation, labels: Mapping[Var, Labels]
    ) -> "Claim":
        """The claim of these labels; a variable without labels, or a literal, has the label 0."""

        def labels_of(atom: Atom) -> Labels:
            if isinstance(atom, Var) and atom in labels:
                return labels[atom]
            ndim = len(program.shape(atom))
            return np.zeros((1,) * ndim, int)

        xs = list(map(labels_of, equation.inputs))
        ys = list(map(labels_of, equation.outputs))
        return cls(program, equation, xs, ys)

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.equation.params

    def whole_xs(self) -> list[Labels]:
        """The operands' labels, written out at the operands' shapes."""
        shapes = map(self.program.shape, self.equation.inputs)
        return list(map(np.broadcast_to, self.xs, shapes))

    def whole_ys(self) -> list[Labels]:
        """The results' labels, written out at the results' shapes."""
        shapes = map(self.program.shape, self.equation.outputs)
        return list(map(np.broadcast_to, self.ys, shapes))

    def terms(
        self, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Labels]]:
        """(number, labels) of the operands that are not known to be zero: 0 times any scale is
        0.
        """
        for i in range(len(self.xs))[start:stop]:
            if not self.program.is_scale_free(self.equation.inputs[i]):
                yield i, self.xs[i]


Law = Callable[[Claim], bool]


# Label arrays, compared ---------------------------------------------------------------------------
# `np.broadcast_to` writes a label array out at its variable's shape, but stores nothing more: along
# an axis where the labels are repeated its stride is 0. NumPy's transposes, slices and flips keep
# such strides. So the laws of movements can be stated on whole arrays, as plain NumPy, and cost
# what the small ones cost.


def small(labels: Labels) -> Labels:
    """The labels with size 1 along every axis of stride 0, along which they are repeated."""
    return first_along(
        labels, np.flatnonzero(np.equal(labels.strides, 0)).tolist()
    )


def first_along(labels: Labels, axes: Iterable[int]) -> Labels:
    """The labels at the first index of each of these axes, which keep size 1."""
    index: list[Any] = [slice(None)] * labels.ndim
    for a in axes:
        index[a] = slice(0, 1)
    # So that the result is an array even where there is no axis.
    index.append(...)
    return labels[tuple(index)]


def are_equal(a: Labels, b: Labels) -> bool:
    """Equal element by element; a scalar stands beside any rank."""
    if a.ndim != b.ndim and 0 not in (a.ndim, b.ndim):
        return False
    return bool((small(a) == small(b)).all())


def is_constant(labels: Labels, axes: Iterable[int]) -> bool:
    """Whether the labels are the same all along each of these axes."""
    return are_equal(labels, first_along(labels, axes))


def all_equal(a: Iterable[Labels], b: Iterable[Labels]) -> bool:
    """Whether the arrays are equal one by one."""
    return all(map(are_equal, a, b))


def all_carry(terms: Iterable[tuple[int, Labels]], labels: Labels) -> bool:
    """Whether each of the (numbered) terms carries these labels."""
    return all_equal(dict(terms).values(), repeat(labels))


def other_axes(ndim: int, axes: Iterable[int]) -> tuple[int, ...]:
    """The axes of an array of this rank that are not among `axes`."""
    return tuple(sorted(set(range(ndim)) - set(axes)))


def beside(labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> Labels:
    """The labels, axis i at `axes[i]` (which ascend), repeated along all other axes of an array of
    this shape.
    """
    others = other_axes(len(shape), axes)
    return np.broadcast_to(np.expand_dims(labels, others), shape)


def product_of(a: Labels, b: Labels) -> Labels | None:
    """The labels of a product: at most one factor's scale stays, or two opposite ones cancel.

    Example: 0 and -2 give -2; 2 and -2 give 0; 1 and -2 are s[0] / s[1], for which there is no
    label: None.
    """
    a, b = np.broadcast_arrays(a, b)
    # Two labels of one sign would be s[0] s[1]; opposite ones of two channels s[0] / s[1].
    lawful = (a == 0) | (b == 0) | (a == -b)
    return np.asarray(a + b) if lawful.all() else None


def collapses_to(labels: Labels, axes: Sequence[int], result: Labels) -> bool:
    """Whether labels are the same all along some axes, which are of size 1 in the result's."""
    return is_constant(labels, axes) and are_equal(
        first_along(labels, axes), result
    )


def has_one_label(
    labels: Labels, axes: tuple[int, ...], result: Labels
) -> bool:
    """Whether labels are the same all along some axes, and without these axes are the result's."""
    return is_constant(labels, axes) and are_equal(
        first_along(labels, axes).squeeze(axes), result
    )
