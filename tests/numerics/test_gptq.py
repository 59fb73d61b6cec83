"""GPTQ on plain arrays, beside the paper's loop in float64: by G's inverse, column by column."""

import jax.numpy as jnp
import numpy as np
import pytest

from sqjax.numerics.formats import E4M3
from sqjax.numerics.gptq import Grid, gptq_rounded

OUTPUTS, FEATURES, SIZE = 24, 50, 16
GROUP = np.arange(FEATURES) // SIZE


def problem(seed=0, tokens=200):
    """(weight, gram, step, usual numbers) of int4 in groups: correlated channels of unlike sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, FEATURES)) @ rng.normal(size=(FEATURES, FEATURES))
    x = mixed * np.exp(rng.normal(size=FEATURES))
    weight = rng.normal(size=(OUTPUTS, FEATURES)).astype(np.float32)
    step = np.stack(
        [np.abs(weight[:, g == GROUP]).max(1) / 7 for g in range(GROUP.max() + 1)], 1
    ).astype(np.float32)
    usual = np.clip(np.round(weight / step[:, GROUP]), -7, 7)
    return weight, (x.T @ x).astype(np.float32), step, usual


def rounded(weight, gram, step, usual, *args, bound=7, **options):
    grid = Grid(jnp.array(step), jnp.full(step.shape, -bound), jnp.full(step.shape, bound))
    grid = Grid(*(x.astype(jnp.float32) for x in grid))
    arrays = (jnp.array(x, jnp.float32) for x in (weight, gram, usual))
    return np.asarray(gptq_rounded(*arrays, grid, jnp.array(GROUP), *args, **options))


def errors(numbers, weight, gram, step):
    """trace(E G E^T) of every output, in float64."""
    e = weight.astype(np.float64) - step[..., GROUP].astype(np.float64) * numbers
    return np.einsum("...of,...fg,...og->...o", e, gram.astype(np.float64), e)


def published(weight, gram, step, damping, order):
    """Algorithm 1 of arXiv 2210.17323 with static groups, in float64 and without blocks."""
    w, h, group = weight.astype(np.float64)[:, order], gram.astype(np.float64), GROUP[order]
    h = h[np.ix_(order, order)] + damping * np.diag(gram).mean() * np.eye(FEATURES)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    numbers = np.zeros_like(w)
    for j in range(FEATURES):
        scale = step[:, group[j]].astype(np.float64)
        numbers[:, j] = np.clip(np.round(w[:, j] / scale), -7, 7)
        error = (w[:, j] - scale * numbers[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return numbers[:, np.argsort(order)]


@pytest.mark.parametrize("act_order", [False, True])
def test_it_chooses_what_the_published_loop_chooses(act_order):
    weight, gram, step, usual = problem()
    order = np.argsort(-np.diag(gram)) if act_order else np.arange(FEATURES)
    expected = published(weight, gram, step, 0.01, order)
    found = rounded(weight, gram, step, usual, 0.01, act_order=act_order)
    # float32 may take the other side of a tie, and all columns after it then differ.
    assert np.mean(found != expected) < 0.02
    total = errors(found, weight, gram, step).sum()
    assert total == pytest.approx(errors(expected, weight, gram, step).sum(), rel=1e-3)
    assert total < 0.7 * errors(usual, weight, gram, step).sum()


def test_blocks_change_nothing():
    weight, gram, step, usual = problem()
    whole = rounded(weight, gram, step, usual, blocks=(1,))
    parts = rounded(weight, gram, step, usual, blocks=(14, 7, 1))
    assert np.mean(whole != parts) < 0.02


@pytest.mark.parametrize("tokens", [3, 40, 200])
@pytest.mark.parametrize("damping", [0.0, 0.01, 10.0])
def test_no_output_is_worse_than_with_the_usual_numbers(tokens, damping):
    weight, gram, step, usual = problem(tokens, tokens)
    before = errors(usual, weight, gram, step)
    found = errors(rounded(weight, gram, step, usual, damping), weight, gram, step)
    # float32 sums of a Gram matrix of a few tokens cancel to about 1e-6 of its largest entries.
    slack = 1e-5 * np.trace(gram) * np.square(step).max()
    assert (found <= before + slack).all()
    assert found.sum() < before.sum()


def test_channels_without_tokens_are_rounded_as_usual():
    weight, gram, step, usual = problem()
    dead = np.arange(0, FEATURES, 5)
    gram[dead] = gram[:, dead] = 0
    found = rounded(weight, gram, step, usual)
    np.testing.assert_array_equal(found[:, dead], usual[:, dead])
    assert (found != usual).any()
    nothing = rounded(weight, 0 * gram, step, usual)
    np.testing.assert_array_equal(nothing, usual)


def test_a_stack_is_its_matrices_one_by_one():
    alone = [problem(seed) for seed in range(3)]
    together = rounded(*map(np.stack, zip(*alone, strict=True)))
    for one, found in zip(alone, together, strict=True):
        np.testing.assert_array_equal(found, rounded(*one))


def test_floats_of_eight_bits():
    weight, gram, step, _ = problem()
    step = step * 7 / 448
    ratio = jnp.array(weight / step[:, GROUP])
    usual = np.asarray(ratio.astype(E4M3.dtype).astype(jnp.float32))
    found = rounded(weight, gram, step, usual, fmt=E4M3, bound=448)
    again = jnp.array(found).astype(E4M3.dtype).astype(jnp.float32)
    np.testing.assert_array_equal(found, np.asarray(again))
    before = errors(usual, weight, gram, step).sum()
    assert errors(found, weight, gram, step).sum() < before / 2
