"""Label arrays move as data does: every entry against the jax primitive itself, on full arrays of labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from sqjax.folding import labels as lab

SIZES = st.sampled_from([1, 2, 3, 4])
SHAPES = st.lists(SIZES, min_size=1, max_size=4).map(tuple)


@st.composite
def labelled(draw, shapes=SHAPES):
    """(labels of size 1 where they do not vary, the shape they describe); zeros and negative labels occur."""
    shape = draw(shapes)
    varying = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    small = tuple(n if v else 1 for n, v in zip(shape, varying, strict=True))
    values = st.lists(st.integers(-3, 3), min_size=(size := int(np.prod(small))), max_size=size)
    return np.array(draw(values), np.int64).reshape(small), shape


def full(labels, shape):
    return np.broadcast_to(labels, shape)


def applied(function, *operands):
    """The result of `function`, which must be one equation, and that equation's primitive and parameters."""
    jaxpr = jax.make_jaxpr(function)(*operands)
    if not jaxpr.eqns:  # jax drops a reshape to the same shape
        assume(False)
    (equation,) = jaxpr.eqns
    outputs = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *operands)
    return equation.primitive.name, equation.params, [np.asarray(x) for x in outputs]


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
    "copy": lambda data, shape: lambda x: lax.copy_p.bind(x),
}


@pytest.mark.parametrize("name", MOVEMENTS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), drawn=labelled())
def test_moves_are_the_primitives(name, data, drawn):
    labels, shape = drawn
    x = full(labels, shape)
    primitive, params, (expected,) = applied(MOVEMENTS[name](data, shape), x)
    assert primitive == name
    moved = lab.MOVES[name](labels, params, shape, expected.shape)
    assert moved.ndim == expected.ndim
    np.testing.assert_array_equal(full(moved, expected.shape), expected)


def reversing(data, shape):
    axes = data.draw(st.sets(st.sampled_from(range(len(shape)))))
    return lambda x: lax.rev(x, tuple(axes))


def running(function):
    def draw(data, shape):
        axis, reverse = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.booleans())
        return lambda x: function(x, axis, reverse)

    return draw


def slicing_dynamically(data, shape):
    sizes = [data.draw(st.integers(1, n)) for n in shape]
    starts = [data.draw(st.integers(-1, n)) for n in shape]  # jax clamps them
    return lambda x: lax.dynamic_slice_p.bind(x, *map(np.int32, starts), slice_sizes=tuple(sizes))


def gathering(data, shape):
    """x[:, ids, :]: one axis is indexed, wherever the indices' axes go; out of range gives the fill value."""
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
    """take_along_axis: the indices differ along the first axis, which the gather runs along; all else is whole."""
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
@settings(max_examples=40, deadline=None)
@given(data=st.data(), drawn=labelled())
def test_a_primitive_of_scaled_numbers_is_its_result_scaled(name, data, drawn):
    """And labels are refused only if the result has no scale at each element."""
    labels, shape = drawn
    primitive, draw, may_refuse = SCALINGS[name]
    function = draw(data, shape)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got, params, (plain,) = applied(function, x)
    assert got == primitive
    moved = lab.MOVES[primitive](lab.compress(labels), params, shape, plain.shape)
    if moved is None:
        assert may_refuse
        assert lab.compress(labels).size > 1
    else:
        assert moved.ndim == plain.ndim
        expected = function(x * scaled(labels, shape))
        np.testing.assert_array_equal(plain * scaled(moved, plain.shape), expected)


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
        assert (lab.MOVES[name](labels, params, shape, y.shape) is None) == (axis in axes)


def test_every_move_has_a_test():
    placement = {
        "copy_p",
        "sharding_constraint",
        "name",
        "stop_gradient",
        "pvary",
        "reshard",
        "mesh_cast",
        "optimization_barrier",
    }  # these keep values and labels
    assert set(lab.MOVES) == set(MOVEMENTS) | placement | {
        primitive for primitive, _, _ in SCALINGS.values()
    }
    labels = np.array([[1, -2, 0]])
    for name in placement:
        np.testing.assert_array_equal(lab.MOVES[name](labels, {}, (4, 3), (4, 3)), labels)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), drawn=labelled())
def test_pad_is_the_primitive_and_unpad_its_inverse(data, drawn):
    labels, shape = drawn
    padding = [tuple(data.draw(st.integers(0, 2)) for _ in range(3)) for _ in shape]
    expected = np.asarray(lax.pad(full(labels, shape), np.int64(0), padding))
    padded = lab.pad(labels, padding, shape)
    np.testing.assert_array_equal(full(padded, expected.shape), expected)
    np.testing.assert_array_equal(
        full(lab.unpad(padded, padding, shape), shape), full(labels, shape)
    )
    other, _ = data.draw(
        labelled(st.just(expected.shape))
    )  # any labels of the result, the padding's too
    kept = tuple(
        slice(before, before + (n - 1) * (between + 1) + 1, between + 1)
        for n, (before, _, between) in zip(shape, padding, strict=True)
    )
    np.testing.assert_array_equal(
        full(lab.unpad(other, padding, shape), shape), full(other, expected.shape)[kept]
    )


def test_a_reshape_that_permutes():
    labels = np.array([[1], [2], [0]])
    x = full(labels, (3, 2))
    name, params, (expected,) = applied(permuting_reshape, x)
    assert name == "reshape"
    np.testing.assert_array_equal(lab.MOVES["reshape"](labels, params, (3, 2), (6,)), expected)


@pytest.mark.parametrize(
    ("labels", "old", "new", "size"),
    [
        (np.array([[[1, 2, 3, 4]]]), (5, 7, 4), (35, 4), (1, 4)),  # merging axes without labels
        (np.array([[1, 2, 3, 4]]), (6, 4), (2, 3, 4), (1, 1, 4)),  # splitting one
        (
            np.array([[1, 2, 3, 4]]),
            (6, 4),
            (6, 2, 2),
            (1, 2, 2),
        ),  # splitting the channels into heads
        (np.array([[[1, 2], [3, 4]]]), (6, 2, 2), (6, 4), (1, 4)),  # merging heads
        (np.array([[[1], [2]]]), (6, 2, 3), (6, 6), (1, 6)),  # one label a head, written out
        (np.array([[1, 1]]), (3, 2), (6,), (1,)),  # labels that do not vary
        (np.array([[1, 2]]), (1, 2), (2, 1, 1), (2, 1, 1)),
        (
            np.array([[[1, 2, 3, 4]]]),
            (10**6, 1000, 4),
            (10**9, 4),
            (1, 4),
        ),  # never written out where constant
    ],
)
def test_reshape_stays_small(labels, old, new, size):
    moved = lab.reshape(labels, old, new)
    assert moved.shape == size
    if np.prod(old) < 1e6:
        np.testing.assert_array_equal(full(moved, new), full(labels, old).reshape(new))


@pytest.mark.parametrize(
    ("old", "new"), [((0, 4), (0,)), ((4, 0), (0,)), ((0,), (3, 0)), ((2, 0), (0, 2, 5))]
)
def test_reshape_of_nothing_ends(old, new):
    assert lab.reshape(np.ones((1,) * len(old), int), old, new).shape == (1,) * len(new)


@settings(max_examples=30, deadline=None)
@given(drawn=labelled(), repeats=st.lists(st.booleans(), min_size=4, max_size=4))
def test_compress_keeps_the_meaning(drawn, repeats):
    labels, shape = drawn
    some = [n if r else k for n, k, r in zip(shape, labels.shape, repeats, strict=False)]
    small = lab.compress(np.broadcast_to(labels, some))
    np.testing.assert_array_equal(full(small, shape), full(labels, shape))
    for axis, size in enumerate(small.shape):  # and nothing is left to compress
        assert size == 1 or (small != np.take(small, [0], axis)).any()


@settings(max_examples=30, deadline=None)
@given(data=st.data(), drawn=labelled())
def test_split_is_the_primitive(data, drawn):
    labels, shape = drawn
    axis = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[axis]), max_size=2)) | {shape[axis]})
    sizes = tuple(np.diff([0, *cuts]).tolist())
    _, params, expected = applied(lambda x: lax.split(x, sizes, axis), full(labels, shape))
    pieces = lab.split(labels, params["axis"], params["sizes"])
    assert len(pieces) == len(expected)
    for piece, part in zip(pieces, expected, strict=True):
        np.testing.assert_array_equal(full(piece, part.shape), part)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), shape=SHAPES)
def test_concatenate_is_the_primitive(data, shape):
    axis = data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    parts = [data.draw(labelled(st.just((*shape[:axis], n, *shape[axis + 1 :])))) for n in sizes]
    expected = np.asarray(lax.concatenate([jnp.asarray(full(*part)) for part in parts], axis))
    joined = lab.concatenate([labels for labels, _ in parts], axis, sizes)
    np.testing.assert_array_equal(full(joined, expected.shape), expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), drawn=labelled())
def test_axes_taken_and_put_back(data, drawn):
    labels, shape = drawn
    axes = [a for a, n in enumerate(labels.shape) if n > 1]
    axes += data.draw(st.lists(st.sampled_from(range(len(shape)))))
    axes = data.draw(st.permutations(sorted(set(axes))))
    taken = lab.take_axes(labels, axes)
    np.testing.assert_array_equal(
        full(taken, [shape[a] for a in axes]),
        full(labels, shape)[
            tuple(slice(None) if a in axes else 0 for a in range(len(shape)))
        ].transpose(np.argsort(np.argsort(axes)) if axes else ()),
    )
    np.testing.assert_array_equal(lab.put_axes(taken, axes, len(shape)), labels)


@pytest.mark.parametrize(
    ("axes", "expected"), [((0,), False), ((1,), True), ((0, 1), True), ((), False), ((2,), False)]
)
def test_varies(axes, expected):
    assert lab.varies(np.array([[[1], [2]]]), axes) is expected
