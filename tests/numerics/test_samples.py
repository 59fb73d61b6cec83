"""Samples of tokens and Gram matrices, beside numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax.numerics.samples import Sample, gram_matrix

TOKENS, FEATURES = 40, 6


def rows(seed, tokens=TOKENS, *stack):
    return np.random.default_rng(seed).normal(size=(*stack, tokens, FEATURES)).astype(np.float32)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_sample_holds_rows_of_the_data_each_once():
    x = rows(0)
    sample = Sample.drawn(jnp.asarray(x), 16)
    found = [int(np.flatnonzero((x == row).all(-1))[0]) for row in np.asarray(sample.rows)]
    assert len(set(found)) == 16
    assert (np.diff(np.asarray(sample.priority, np.int64)) <= 0).all()


def test_batches_in_another_order_give_the_same_bits():
    parts = [Sample.drawn(jnp.asarray(rows(seed)), 16) for seed in range(3)]
    one = parts[0] + parts[1] + parts[2]
    same(one, parts[2] + (parts[1] + parts[0]))
    # And it is the best 16 of all: those of no part alone.
    priorities = np.concatenate([part.priority for part in parts])
    np.testing.assert_array_equal(one.priority, np.sort(priorities)[::-1][:16])


def test_the_seed_says_which():
    x = jnp.asarray(rows(1))
    same(Sample.drawn(x, 8, seed=3), Sample.drawn(x, 8, seed=3))
    other = Sample.drawn(x, 8, seed=4)
    assert (np.asarray(other.rows) != np.asarray(Sample.drawn(x, 8, seed=3).rows)).any()


def test_every_token_is_drawn_about_as_often():
    x = np.tile(np.arange(1, 21, dtype=np.float32)[:, None], (1, 2))
    draw = jax.jit(lambda x, seed: Sample.drawn(x, 5, 0).rows[:, 0] + 0 * seed)
    counts = np.zeros(21)
    for extra in range(400):  # another last row is another array, whose tokens are drawn anew
        drawn = draw(np.concatenate([x, [[100.0, extra + 1]]]).astype(np.float32), 0)
        for value in np.asarray(drawn):
            counts[int(min(value, 0 if value >= 100 else value))] += 1
    # Binomial of 400 and 5 / 21: the standard deviation is 8.5.
    assert abs(counts[1:] - 400 * 5 / 21).max() < 4.5 * 8.6


def test_rows_of_zeros_are_no_tokens_and_places_stay_empty():
    x = rows(2, 10)
    x[3:] = 0
    sample = Sample.drawn(jnp.asarray(x), 12)
    assert (np.asarray(sample.priority) > 0).tolist() == [True] * 3 + [False] * 9
    assert not np.asarray(sample.rows)[3:].any()


@pytest.mark.parametrize("stack", [(), (3,)])
def test_a_gram_matrix(stack):
    x = rows(4, TOKENS, *stack)
    exact = np.einsum("...ri,...rj->...ij", x.astype(float), x.astype(float))
    # Each term is rounded once, and each of 40 sums.
    bound = TOKENS * 2**-24 * np.einsum("...ri,...rj->...ij", abs(x), abs(x))
    assert (abs(gram_matrix(jnp.asarray(x)) - exact) <= bound + 1e-30).all()


def test_samples_along_an_axis_are_one():
    x = rows(5, TOKENS, 3)
    each = Sample.drawn(jnp.asarray(x), 8)
    parts = [jax.tree.map(lambda a, i=i: a[i], each) for i in range(3)]
    same(each.merged((0,)), parts[0] + parts[1] + parts[2])
