"""`View`: which axes of a leaf are where, against an array of the leaf's own indices moved by the primitives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from sqjax._shapes import runs
from sqjax.program.evaluate import evaluate
from sqjax.program.facts import Program
from sqjax.program.trace import trace
from sqjax.program.views import VIEWS, Piece, View

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3).map(tuple)


def places(shape):
    """The leaf whose elements are their own flat index."""
    return np.arange(math.prod(shape)).reshape(shape)


def through(view, x, function):
    """The view and the array after `function`, whose every equation must have a rule."""
    jaxpr = jax.make_jaxpr(function)(x)
    for equation in jaxpr.eqns:
        old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        view = VIEWS[equation.primitive.name](view, equation.params, old, new)
        if view is None:
            return None, None
    return view, np.asarray(jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x)[0])


def check(view, moved):
    """Every element's place in the leaf is the one that the view's pieces say."""
    place = np.unravel_index(moved, view.shape)
    said = [np.zeros((1,) * moved.ndim, int) for _ in view.shape]
    reached = [set() for _ in view.shape]
    for axis, pieces in enumerate(view.axes):
        assert math.prod(p.size for p in pieces) == moved.shape[axis]
        digits = (
            np.unravel_index(np.arange(moved.shape[axis]), [p.size for p in pieces])
            if pieces
            else ()
        )
        for piece, digit in zip(pieces, digits, strict=True):
            along = (digit * piece.stride).reshape(
                [-1 if a == axis else 1 for a in range(moved.ndim)]
            )
            said[piece.axis] = said[piece.axis] + along
            reached[piece.axis].add(axis)
    for taken in view.fixed:
        said[taken.axis] = said[taken.axis] + taken.at
    for a in range(len(view.shape)):
        if (
            a in view.sliced
        ):  # what is left of it is not known, but that it lies along no other axis
            others = tuple(axis for axis in range(moved.ndim) if axis not in reached[a])
            assert (np.ptp(place[a], axis=others) == 0).all()
        else:
            np.testing.assert_array_equal(place[a], np.broadcast_to(said[a], moved.shape))


def whole(view, moved, axes):
    """The leaf's axes that run in their own order along `axes` of the array, whole; None if they do not."""
    first = moved.transpose(*axes, *(a for a in range(moved.ndim) if a not in axes))
    place = np.unravel_index(
        first.reshape(math.prod(first.shape[: len(axes)]), -1)[:, 0], view.shape
    )
    varying = [a for a, n in enumerate(view.shape) if n > 1 and np.ptp(place[a]) > 0]
    sizes = [view.shape[a] for a in varying]
    flat = np.ravel_multi_index([place[a] for a in varying], sizes) if varying else np.zeros(1, int)
    return varying if flat.tolist() == list(range(math.prod(sizes))) else None


def transposing(data, shape):
    permutation = data.draw(st.permutations(range(len(shape))))
    return lambda x: lax.transpose(x, permutation)


def reshaping(data, shape):
    size = math.prod(shape)
    first = data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
    second = data.draw(
        st.sampled_from([d for d in range(1, size // first + 1) if size // first % d == 0])
    )
    return lambda x: lax.reshape(x, (first, second, size // first // second))


def squeezing(data, shape):
    ones = [a for a, n in enumerate(shape) if n == 1]
    return lambda x: lax.squeeze(x, ones)


def expanding(data, shape):
    axis = data.draw(st.integers(0, len(shape)))
    return lambda x: lax.broadcast_in_dim(
        x, (*shape[:axis], 1, *shape[axis:]), [a for a in range(len(shape) + 1) if a != axis]
    )


def slicing(data, shape):
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis] - 1))
    stride = data.draw(st.integers(1, 2))
    return lambda x: lax.slice_in_dim(x, start, shape[axis], stride, axis)


def casting(data, shape):
    return lambda x: lax.stop_gradient(lax.convert_element_type(x, jnp.float32)).astype(jnp.int32)


STEPS = [transposing, transposing, reshaping, reshaping, squeezing, expanding, slicing, casting]


@settings(max_examples=20, deadline=None)
@given(data=st.data(), shape=SHAPES)
@pytest.mark.slow
def test_a_view_says_where_every_element_comes_from(data, shape):
    view, moved = View.of("w", shape), places(shape)
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4)):
        assume(moved.ndim > 0 or step is not slicing)
        after = through(view, moved, step(data, moved.shape))
        assume(after[0] is not None)
        view, moved = after
        check(view, moved)
    axes = data.draw(
        st.permutations(range(moved.ndim)).map(lambda axes: axes[: len(axes) // 2 + 1])
    )
    found = view.whole_axes(axes)
    if found is not None:
        assert [a for a in found if shape[a] > 1] == whole(view, moved, axes)
    if view.leaf_axes is not None:
        permutation = [a for a in view.leaf_axes if a is not None]
        squeezed = [a for a in range(len(shape)) if a not in permutation]  # of size 1
        np.testing.assert_array_equal(
            moved, places(shape).transpose(*permutation, *squeezed).reshape(moved.shape)
        )


WHOLE = {  # a function of a leaf, the leaf's shape, axes of the result, the leaf's axes that they run over
    "as it is": (lambda w: w, (2, 3, 4), [1, 2], (1, 2)),
    "out of order": (lambda w: w, (2, 3, 4), [2, 1], None),
    "transposed": (lambda w: w.transpose(2, 0, 1), (2, 3, 4), [1, 2], (0, 1)),
    "heads split": (lambda w: w.reshape(6, 2, 4), (6, 8), [1, 2], (1,)),
    "one half of a split axis": (lambda w: w.reshape(6, 2, 4), (6, 8), [2], None),
    "its other half": (lambda w: w.reshape(6, 2, 4), (6, 8), [1], None),
    "halves out of order": (lambda w: w.reshape(6, 2, 4), (6, 8), [2, 1], None),
    "heads merged": (lambda w: w.reshape(6, 8), (6, 2, 4), [1], (1, 2)),
    "split in three, transposed, merged again": (
        lambda w: w.reshape(2, 3, 4, 5).transpose(3, 0, 1, 2).reshape(5, 24),
        (24, 5),
        [1],
        (0,),
    ),
    "mixed up": (
        lambda w: w.reshape(2, 3, 4, 5).transpose(1, 0, 2, 3).reshape(24, 5),
        (24, 5),
        [0],
        None,
    ),
    "across two axes": (lambda w: w.reshape(3, 8), (6, 4), [1], None),
    "ones come and go": (
        lambda w: w[None, :, None].squeeze(0).reshape(1, 6, 1, 4),
        (6, 4),
        [1],
        (0,),
    ),
    "a slice": (lambda w: w[:4], (6, 4), [0], None),
    "beside a slice": (lambda w: w[:4], (6, 4), [1], (1,)),
    "an index": (lambda w: lax.index_in_dim(w, 1, 0, keepdims=False).T, (3, 6, 4), [0], (2,)),
    "cast": (lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), (6, 4), [0], (0,)),
    "nothing": (lambda w: w, (6, 4), [], ()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_axes(name):
    function, shape, axes, expected = WHOLE[name]
    program = Program(trace(lambda w: function(w["w"]) + 0.0, {"w": jnp.ones(shape)}, (), {})[0])
    (result,) = (e.inputs[0] for e in program.equations if e.outputs[0] == program.results[0])
    assert program.views[result].path == "w"
    assert program.views[result].whole_axes(axes) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w.reshape(4, 9),  # 6 x 6 dealt out as 4 x 9: neither divides the other
        lambda w: lax.reshape(w, (36,), dimensions=(1, 0)),
        lambda w: w[:4].reshape(24),  # a slice that a reshape would mix with another axis
        lambda w: jnp.broadcast_to(w, (2, 6, 6)),
        lambda w: w.astype(jnp.int32),
        jnp.abs,
    ],
)
def test_what_is_no_view(function):
    program = Program(trace(lambda w: function(w["w"]), {"w": jnp.ones((6, 6))}, (), {})[0])
    assert program.results[0] not in program.views
    assert program.inputs[0] in program.views


def test_a_slice_through_pieces_is_refused():
    merged = View("w", (2, 3), ((Piece(0, 1, 2), Piece(1, 1, 3)),))
    params = {"start_indices": (0,), "limit_indices": (4,), "strides": None}
    assert VIEWS["slice"](merged, params, (6,), (4,)) is None
    kept = VIEWS["slice"](merged, params | {"limit_indices": (6,)}, (6,), (6,))
    assert kept == merged


def scanned(p, x):
    def outer(x, both):
        def inner(x, w):
            return x + w.T.sum(), w.T

        return lax.scan(inner, x, both)

    stack = jnp.moveaxis(p["w"].astype(jnp.bfloat16).astype(jnp.float32), (2, 0), (0, 1))
    return lax.scan(outer, x, stack)


@pytest.mark.parametrize("reverse", [False, True])
def test_slices_of_scans_are_the_leaf_at_each_step(reverse):
    """The value of every view, at every step, is the leaf transposed: (axes scanned over, the view's axes)."""

    def fn(p, x):
        y = lax.scan(lambda c, w: (c + w.T.sum(), None), x, p["v"].T, reverse=reverse)[0]
        return scanned(p, y)

    params, x = (
        {
            "v": jnp.asarray(places((3, 2)), jnp.float32),
            "w": jnp.asarray(places((3, 4, 2, 5)), jnp.float32),
        },
        0.0,
    )
    program = Program(trace(fn, params, (jnp.float32(x),), {})[0])
    views = {v: view for v, view in program.views.items() if view.leaf_axes is not None}
    _, seen = evaluate(
        program, jax.tree.leaves(params), [jnp.float32(x)], dict.fromkeys(views, lambda x: x)
    )
    stacked = [view.stacked for view in views.values()]
    assert {len(s) for s in stacked} == {0, 1, 2}
    for v, view in views.items():
        if v in seen:
            expected = np.asarray(params[view.path]).transpose(
                *view.stacked.values(), *view.leaf_axes
            )
            np.testing.assert_array_equal(
                seen[v], expected
            )  # step i is entry i, whatever the order
    assert {len(views[v].stacked) for v in seen} == {0, 1, 2}


def test_a_scan_over_parts_of_a_leaf_gives_no_view():
    program = Program(
        trace(
            lambda p, x: lax.scan(lambda c, w: (c + w, None), x, p["w"][1:]),
            {"w": jnp.ones(3)},
            (jnp.ones(()),),
            {},
        )[0]
    )
    assert not any(view.stacked for view in program.views.values())


def test_blocks_of_views():
    view = View.of("w", (12, 8)).block({0: [(1, 2), (2, 3)], 1: [(3, 4)]})
    assert (view.shape, view.full_shape) == ((2, 2), (12, 8))
    assert (view.strides(0), view.strides(1)) == ({1: 6, 2: 2}, {3: 2})
    assert view.slice_of_scan(4).strides(0) == {1: 6, 2: 2, 4: 1}


def test_what_a_reshape_has_made_has_no_blocks():
    w = View.of("w", (4, 6))
    merged = VIEWS["reshape"](w, {"dimensions": None}, (4, 6), (24,))
    split = VIEWS["reshape"](w, {"dimensions": None}, (4, 6), (2, 2, 6))
    assert merged.block({0: [(1, 2)]}) is None
    assert split.block({0: [(1, 2)]}) is None
    assert split.block({2: [(1, 2)]}).shape == (4, 3)
    assert merged.slice_of_scan(1) is None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((6, 4), (6, 4), [([0], [0]), ([1], [1])]),
        ((6, 4), (24,), [([0, 1], [0])]),
        ((24,), (6, 4), [([0], [0, 1])]),
        ((2, 6, 4), (2, 3, 2, 4), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((4, 9), (6, 6), [([0, 1], [0, 1])]),
    ],
)
def test_runs_are_the_shortest_with_equal_products(old, new, expected):
    assert runs(old, new) == expected
    assert runs(new, old) == [(b, a) for a, b in expected]
