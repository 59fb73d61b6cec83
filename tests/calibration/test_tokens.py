"""A padding mask follows its tokens wherever a program moves them; what counts is told by numpy."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sqjax as sq

BATCH, TOKENS, WIDTH, EXPERTS = 2, 6, 4, 3
RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
LEFT = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], bool)
X = jnp.asarray(np.where(LEFT[..., None], REAL, 1e3))
W = jnp.asarray(RNG.normal(size=(WIDTH, WIDTH)), jnp.float32)
STACK = jnp.asarray(RNG.normal(size=(EXPERTS, WIDTH, WIDTH)), jnp.float32)
EXPERT = jnp.asarray(RNG.integers(0, EXPERTS, (BATCH, TOKENS)))
TOKENS_THAT_COUNT = REAL[LEFT]


class Case(NamedTuple):
    """A program, its batch, and the rows of the site's activation that count."""

    fn: Any
    batch: Any = (X, EXPERT)
    rows: Any = TOKENS_THAT_COUNT
    params: Any = W
    mask: Any = LEFT


def time_major(w, x, _):
    return x.transpose(1, 0, 2) @ w


def time_major_in_a_row(w, x, _):
    return x.transpose(1, 0, 2).reshape(-1, WIDTH) @ w


def windows(w, x, _):
    return x.reshape(BATCH, 3, 2, WIDTH) @ w


def map_over_the_batch(w, x, _):
    return lax.map(lambda row: row @ w, x)


def scan_over_time(w, x, _):
    def step(h, now):
        h = jnp.tanh(h + now @ w)
        return h, h

    return lax.scan(step, jnp.zeros((BATCH, WIDTH)), x.transpose(1, 0, 2))[1]


def all_but_the_last(w, x, _):
    return x[:, :-1] @ w


def beside_a_class_token(w, x, _):
    return jnp.concatenate([jnp.zeros((BATCH, 1, WIDTH)), x], 1) @ w


def packed_rows(w, x, _):
    """Two examples in one row of 12, as packing makes it."""
    return jnp.concatenate([x[0], x[1]])[None] @ w


def sorted_by_expert(w, x, expert):
    rows, order = x.reshape(-1, WIDTH), jnp.argsort(expert.reshape(-1))
    return lax.ragged_dot(rows[order], w, jnp.bincount(expert.reshape(-1), length=EXPERTS))


def two_experts_each(w, x, expert):
    both = jnp.stack([expert, (expert + 1) % EXPERTS], -1).reshape(-1)
    order = jnp.argsort(both)
    rows = x.reshape(-1, WIDTH)[order // 2]
    return lax.ragged_dot(rows, w, jnp.bincount(both, length=EXPERTS))


def dispatched_to_places(w, x, expert):
    """Switch's dispatch, (batch, expert, capacity = tokens)."""
    mine = jax.nn.one_hot(expert, EXPERTS, dtype=jnp.int32)
    place = jnp.cumsum(mine, 1) * mine - 1
    dispatch = jax.nn.one_hot(place, TOKENS)
    routed = jnp.einsum("btec,btd->becd", dispatch, x)
    return jnp.einsum("becd,edf->becf", routed, w)


def scattered_into_a_buffer(w, x, _):
    at = jnp.array([5, 0, 3, 1, 2, 4])
    return jnp.zeros((BATCH, 8, WIDTH)).at[:, at].set(x) @ w


def the_largest_tokens(w, x, _):
    """Each example's two tokens of the largest first channel among the real ones."""
    size = jnp.where(jnp.asarray(LEFT), x[..., 0], -jnp.inf)
    chosen = lax.top_k(size, 2)[1]
    return jnp.take_along_axis(x, chosen[..., None], 1) @ w


def rolled(w, x, _):
    return jnp.roll(x, 2, 1) @ w


def step_of_a_loop(w, x, _):
    at = jnp.int32(4)
    return lax.dynamic_slice_in_dim(x, at, 2, 1) @ w


LARGEST = np.concatenate(
    [
        REAL[b][np.argsort(-np.where(LEFT[b], REAL[b, :, 0], -np.inf), kind="stable")[:2]]
        for b in range(BATCH)
    ]
)
CASES = {
    "time major": Case(time_major),
    "time major in a row": Case(time_major_in_a_row),
    "windows": Case(windows),
    "map over the batch": Case(map_over_the_batch),
    "scan over time": Case(scan_over_time),
    "all but the last": Case(all_but_the_last, rows=REAL[:, :-1][LEFT[:, :-1]]),
    "beside a class token": Case(
        beside_a_class_token,
        rows=np.concatenate([TOKENS_THAT_COUNT, np.zeros((BATCH, WIDTH), np.float32)]),
    ),
    "packed rows": Case(packed_rows),
    "sorted by expert": Case(sorted_by_expert, params=STACK),
    "two experts each": Case(
        two_experts_each, params=STACK, rows=np.concatenate([TOKENS_THAT_COUNT] * 2)
    ),
    "scattered into a buffer": Case(
        scattered_into_a_buffer,
        rows=np.concatenate([TOKENS_THAT_COUNT, np.zeros((2 * BATCH, WIDTH), np.float32)]),
    ),
    "the largest tokens": Case(the_largest_tokens, rows=LARGEST),
    "rolled": Case(rolled),
    "step of a loop": Case(step_of_a_loop, rows=REAL[:, 4:][LEFT[:, 4:]]),
}


def calibrate(fn, params, batches, **kwargs):
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.filterwarnings("ignore", "calibrate: (no token|less than)")
        return sq.calibrate(fn, params, batches, **kwargs)


@pytest.fixture(scope="module")
def together():
    """All programs in one, each with a weight of its own, calibrated once."""

    def fn(p, x, expert):
        return [case.fn(p[name], x, expert) for name, case in CASES.items()]

    params = {name: case.params + 0 for name, case in CASES.items()}
    return calibrate(fn, params, [(X, EXPERT)], mask=lambda x, expert: LEFT)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_what_counts_are_the_real_tokens(together, name):
    rows = np.abs(CASES[name].rows)
    np.testing.assert_allclose(together.absmax[name], rows.max(0), rtol=1e-6)
    np.testing.assert_allclose(together.abs_sum[name], rows.sum(0), rtol=1e-5)
    assert int(together.count[name]) == len(rows)


@pytest.mark.slow
def test_places_of_experts_count_where_a_real_token_was_sent():
    stats = calibrate(dispatched_to_places_of, {"w": STACK}, [(X, EXPERT)], mask=of_left)
    for e in range(EXPERTS):
        sent = REAL[LEFT & (np.asarray(EXPERT) == e)]
        np.testing.assert_allclose(stats.absmax["w"][e], np.abs(sent).max(0), rtol=1e-6)
        np.testing.assert_allclose(stats.abs_sum["w"][e], np.abs(sent).sum(0), rtol=1e-5)
        assert int(stats.reached["w"][e]) == len(sent)


def dispatched_to_places_of(p, x, expert):
    return dispatched_to_places(p["w"], x, expert)


def of_left(x, expert):
    return LEFT


@pytest.mark.slow
def test_layers_of_a_scan_see_real_tokens():
    step = lambda h, w: (h + 0 * (h @ w), None)
    fn = lambda p, x: lax.scan(step, x, p["w"])[0]
    stats = calibrate(fn, {"w": jnp.stack([W, W])}, [X], mask=lambda x: LEFT)
    expected = np.abs(TOKENS_THAT_COUNT).max(0)
    np.testing.assert_allclose(stats.absmax["w"], [expected, expected], rtol=1e-6)


@pytest.mark.slow
def test_attention_keeps_the_mask_of_the_queries():
    """After attention and a residual connection the rows are those of the queries."""

    def fn(p, x, keys):
        scores = jnp.einsum("bqd,bkd->bqk", x @ p["q"], x @ p["k"])
        odds = jax.nn.softmax(jnp.where(keys[:, None], scores, -1e9), -1)
        h = x + odds @ (x @ p["v"])
        return h @ p["out"]

    params = {name: W + i for i, name in enumerate(("q", "k", "v", "out"))}
    stats = calibrate(fn, params, [(X, jnp.asarray(LEFT))], mask=lambda x, keys: LEFT)
    by_hand = np.asarray(fn(params | {"out": jnp.eye(WIDTH)}, jnp.asarray(X), jnp.asarray(LEFT)))[
        LEFT
    ]
    np.testing.assert_allclose(stats.absmax["out"], np.abs(by_hand).max(0), rtol=1e-5)
    assert int(stats.count["out"]) == LEFT.sum()


def test_where_the_mask_ends_a_warning_says_so():
    def fn(p, x):
        mixed = lax.conv_general_dilated(
            x, jnp.ones((3, WIDTH, WIDTH)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return mixed @ p["w"]

    with pytest.warns(UserWarning, match=r"mask could not be followed to w: `conv_general_dil"):
        stats = sq.calibrate(fn, {"w": W}, [X], mask=lambda x: LEFT)
    assert int(stats.count["w"]) == BATCH * TOKENS


def test_an_operand_that_was_followed_decides_for_one_that_was_not():
    def fn(p, x):
        kernel = jnp.ones((3, WIDTH, WIDTH))
        numbers = ("NWC", "WIO", "NWC")
        mixed = lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers)
        return (mixed + x) @ p["w"] + (x + mixed) @ p["other"]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "calibrate: the mask")
        stats = calibrate(fn, {"w": W, "other": W + 1}, [X], mask=lambda x: LEFT)
    assert int(stats.count["w"]) == int(stats.count["other"]) == LEFT.sum()


def test_a_mask_of_another_layout_than_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"mask of shape \(6, 2\) fits none of the inputs, of sha"):
        sq.calibrate(lambda p, x: x @ p["w"], {"w": W}, [X], mask=lambda x: LEFT.T)
