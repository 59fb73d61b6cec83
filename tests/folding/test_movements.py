"""Primitives that move data, beside jax: what the search makes of their labels (`MOVES`), and the
certificate's laws.

Both are compared with the primitive itself, on full arrays of labels, or on numbers scaled as the
labels say.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from label_arrays import SIZES, applied, full, labelled

from sqjax.folding import moves
from sqjax.folding.claims import Claim
from sqjax.folding.labels import compress
from sqjax.folding.laws import LAWS
from sqjax.program.equations import Equation, Var
from sqjax.program.primitives import IDENTITIES


def permuting_reshape(x):
    return lax.reshape(x, (x.size,), dimensions=tuple(range(x.ndim))[::-1])


def transposing(data, shape):
    permutation = data.draw(st.permutations(range(len(shape))))
    return lambda x: lax.transpose(x, permutation)


def reshaping(data, shape):
    new = data.draw(st.sampled_from(factorings(int(np.prod(shape)))))
    return lambda x: lax.reshape(x, new)


def squeezing(data, shape):
    ones = [a for a, n in enumerate(shape) if n == 1]
    assume(ones)
    axes = data.draw(st.sets(st.sampled_from(ones), min_size=1))
    return lambda x: lax.squeeze(x, tuple(axes))


def broadcasting(data, shape):
    rank = data.draw(st.integers(len(shape), len(shape) + 2))
    axes = sorted(data.draw(st.permutations(range(rank)))[: len(shape)])
    target = [data.draw(SIZES) for _ in range(rank)]
    for axis, size in zip(axes, shape, strict=True):
        target[axis] = size if size > 1 else target[axis]
    return lambda x: lax.broadcast_in_dim(x, tuple(target), axes)


def slicing(data, shape):
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    limit = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)]
    strides = data.draw(st.sampled_from([None, [data.draw(st.integers(1, 3)) for _ in shape]]))
    return lambda x: lax.slice_p.bind(
        x,
        start_indices=tuple(start),
        limit_indices=tuple(limit),
        strides=None if strides is None else tuple(strides),
    )


def tiling(data, shape):
    reps = tuple(data.draw(st.integers(1, 3)) for _ in shape)
    return lambda x: lax.tile(x, reps)


def factorings(size):
    """Every shape of up to four axes with `size` elements, axes of size 1 among them."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    shapes = {()} if size == 1 else set()
    shapes |= {(size,)} | {(a, size // a) for a in divisors}
    shapes |= {(a, b, size // a // b) for a in divisors for b in divisors if size % (a * b) == 0}
    shapes |= {(a, 1, b, size // a // b) for a in divisors for b in divisors if size % (a * b) == 0}
    return sorted(shapes)


MOVEMENTS = {
    "transpose": transposing,
    "reshape": reshaping,
    "squeeze": squeezing,
    "broadcast_in_dim": broadcasting,
    "slice": slicing,
    "convert_element_type": lambda data, shape: lambda x: lax.convert_element_type(x, jnp.float32),
    "tile": tiling,
    "copy": lambda data, shape: lambda x: lax.copy_p.bind(x),
}


class Shapes:
    """What a law asks of a program: here the variables 0, 1 ... are floats of these shapes."""

    def __init__(self, *shapes):
        self.shapes = shapes

    def shape(self, var):
        return self.shapes[var]

    def is_scalable(self, var):
        return True


def holds(primitive, params, before, after, labels, moved):
    """Whether a movement's law lets an operand of this shape with these labels give such a
    result.
    """
    equation = Equation(primitive, (Var(0),), (Var(1),), None, params)
    return LAWS[primitive](Claim(Shapes(before, after), equation, [labels], [moved]))


def changed(data, labels):
    """The label array with one element changed."""
    wrong = labels.copy()
    place = tuple(data.draw(st.integers(0, n - 1)) for n in labels.shape)
    wrong[place] += data.draw(st.sampled_from([1, -1, 7]))
    return wrong


@pytest.mark.parametrize("name", MOVEMENTS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), drawn=labelled())
@pytest.mark.slow
def test_moves_and_laws_are_the_primitives(name, data, drawn):
    """And no law holds for other labels of the result than those that the primitive gives."""
    labels, shape = drawn
    primitive, params, (expected,) = applied(MOVEMENTS[name](data, shape), full(labels, shape))
    assert primitive == name
    moved = moves.MOVES[name](labels, params, shape, expected.shape)
    assert moved.ndim == expected.ndim
    np.testing.assert_array_equal(full(moved, expected.shape), expected)
    assert holds(name, params, shape, expected.shape, labels, moved)
    assert holds(name, params, shape, expected.shape, labels, expected)
    assert not holds(name, params, shape, expected.shape, labels, changed(data, expected))


def reversing(data, shape):
    axes = data.draw(st.sets(st.sampled_from(range(len(shape)))))
    return lambda x: lax.rev(x, tuple(axes))


def running(function):
    def draw(data, shape):
        axis, reverse = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.booleans())
        return lambda x: function(x, axis, reverse)

    return draw


def transforming(data, shape):
    count = data.draw(st.integers(1, min(len(shape), 3)))
    kind = {"fft_type": lax.FftType.RFFT, "fft_lengths": shape[-count:]}
    return lambda x: lax.fft_p.bind(x, **kind)


def slicing_dynamically(data, shape):
    sizes = [data.draw(st.integers(1, n)) for n in shape]
    starts = [data.draw(st.integers(-1, n)) for n in shape]  # jax clamps them
    return lambda x: lax.dynamic_slice_p.bind(x, *map(np.int32, starts), slice_sizes=tuple(sizes))


def gathering(data, shape):
    """x[:, ids, :]: one axis is indexed, wherever the indices' axes go; out of range gives the fill
    value.
    """
    axis = data.draw(st.integers(0, len(shape) - 1))
    ids = np.array(
        data.draw(st.lists(st.integers(0, shape[axis]), min_size=1, max_size=3)), np.int32
    )[:, None]
    first = data.draw(st.sampled_from([0, axis, len(shape) - 1]))
    fill = data.draw(st.sampled_from([None, 0.0, np.nan]))
    numbers = lax.GatherDimensionNumbers(
        tuple(a for a in range(len(shape)) if a != first), (axis,), (axis,)
    )
    window = tuple(1 if a == axis else n for a, n in enumerate(shape))
    return lambda x: lax.gather(x, ids, numbers, window, mode="fill", fill_value=fill)


def gathering_in_batch(data, shape):
    """take_along_axis: the indices differ along the first axis, which the gather runs along; all
    else is whole.
    """
    assume(len(shape) > 1)
    ids = np.array([[data.draw(st.integers(0, shape[1] - 1))] for _ in range(shape[0])], np.int32)
    numbers = lax.GatherDimensionNumbers(tuple(range(1, len(shape) - 1)), (1,), (1,), (0,), (0,))
    return lambda x: lax.gather(x, ids, numbers, (1, 1, *shape[2:]))


#: The numbers of a gather x[:, i] of an array of three axes.
THE_SECOND = lax.GatherDimensionNumbers((0, 2), (1,), (1,))
SCALINGS = {  # name: (the primitive, how to draw it, whether it may refuse labels that vary)
    "rev": ("rev", reversing, False),
    "cumsum": ("cumsum", running(lax.cumsum), True),
    "cummax": ("cummax", running(lax.cummax), True),
    "cummin": ("cummin", running(lax.cummin), True),
    "fft": ("fft", transforming, True),
    "dynamic_slice": ("dynamic_slice", slicing_dynamically, True),
    "gather": ("gather", gathering, True),
    "gather in a batch": ("gather", gathering_in_batch, True),
    "neg": ("neg", lambda data, shape: jnp.negative, False),
    "abs": ("abs", lambda data, shape: jnp.abs, False),
    "reduce_precision": (
        "reduce_precision",
        lambda data, shape: lambda x: lax.reduce_precision(x, 8, 7),
        False,
    ),
}


def scaled(labels, shape):
    """What each element is multiplied with: 4^channel or its inverse."""
    return np.where(full(labels, shape) == 0, 1, 4.0 ** (np.sign(labels) * np.abs(labels))).astype(
        np.float32
    )


@pytest.mark.parametrize("name", SCALINGS)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), drawn=labelled())
@pytest.mark.slow
def test_a_primitive_of_scaled_numbers_is_its_result_scaled(name, data, drawn):
    """And labels are refused only if the result has no scale at each element."""
    labels, shape = drawn
    primitive, draw, may_refuse = SCALINGS[name]
    function = draw(data, shape)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got, params, (plain,) = applied(function, x)
    assert got == primitive
    moved = moves.MOVES[primitive](compress(labels), params, shape, plain.shape)
    if moved is None:
        assert may_refuse
        assert compress(labels).size > 1
        ones = np.ones(plain.shape, int)
        assert not holds(primitive, params, shape, plain.shape, labels, ones)
    else:
        assert moved.ndim == plain.ndim
        expected = function(x * scaled(labels, shape))
        np.testing.assert_array_equal(plain * scaled(moved, plain.shape), expected)
        assert holds(primitive, params, shape, plain.shape, labels, moved)
        wrong = changed(data, full(moved, plain.shape))
        assert not holds(primitive, params, shape, plain.shape, labels, wrong)


@pytest.mark.parametrize(
    ("name", "function", "axes"),
    [
        ("cumsum", lambda x: lax.cumsum(x, 1), [1]),
        ("cummax", lambda x: lax.cummax(x, 1), [1]),
        ("cummin", lambda x: lax.cummin(x, 1), [1]),
        (
            "dynamic_slice",
            lambda x: lax.dynamic_slice_p.bind(x, *map(np.int32, (0, 1, 0)), slice_sizes=(2, 2, 4)),
            [1],
        ),
        (
            "gather",
            lambda x: lax.gather(x, np.array([[1], [0]], np.int32), THE_SECOND, (2, 1, 4)),
            [1],
        ),
        (
            "gather",
            lambda x: lax.gather(x, np.array([[1], [0]], np.int32), THE_SECOND, (2, 1, 3)),
            [1, 2],
        ),
        (
            "gather",
            lambda x: lax.gather(
                x, np.array([[1]], np.int32), THE_SECOND, (2, 1, 4), mode="fill", fill_value=5
            ),
            [0, 1, 2],
        ),
    ],
)
def test_labels_are_refused_along_just_these_axes(name, function, axes):
    shape = (2, 3, 4)
    primitive, params, (y,) = applied(function, np.ones(shape, np.float32))
    assert primitive == name
    for axis, size in enumerate(shape):
        labels = np.arange(1, size + 1).reshape([size if a == axis else 1 for a in range(3)])
        assert (moves.MOVES[name](labels, params, shape, y.shape) is None) == (axis in axes)


def test_every_move_has_a_test():
    placement = {"real", "imag", *IDENTITIES}  # these keep values and labels
    assert set(moves.MOVES) == set(MOVEMENTS) | placement | {
        primitive for primitive, _, _ in SCALINGS.values()
    }
    labels = np.array([[1, -2, 0]])
    for name in placement:
        np.testing.assert_array_equal(moves.MOVES[name](labels, {}, (4, 3), (4, 3)), labels)


def test_a_reshape_that_permutes():
    labels = np.array([[1], [2], [0]])
    x = full(labels, (3, 2))
    name, params, (expected,) = applied(permuting_reshape, x)
    assert name == "reshape"
    np.testing.assert_array_equal(moves.MOVES["reshape"](labels, params, (3, 2), (6,)), expected)
