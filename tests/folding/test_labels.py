"""Label arrays: every function on them beside NumPy, or the jax primitive itself, on full arrays of
labels.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from label_arrays import SHAPES, SIZES, applied, full, labelled

from sqjax.folding import labels as lab


@settings(max_examples=40, deadline=None)
@given(data=st.data(), drawn=labelled())
@pytest.mark.slow
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
@pytest.mark.slow
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
