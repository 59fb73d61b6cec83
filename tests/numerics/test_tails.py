"""How large new tokens are, beside many draws of new tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from sqjax.numerics.tails import clipped_error, growth, has_tail, largest_of_new_tokens

CHANNELS, TOKENS, SAMPLED = 400, 4000, 250


def pareto(rng, power, tokens):
    """|x| with P(|x| > t) = t^-power."""
    sizes = rng.uniform(size=(tokens, CHANNELS)) ** (-1 / power)
    return sizes * rng.choice([-1, 1], size=sizes.shape)


@pytest.mark.parametrize("power", [4.0, 8.0])
def test_what_new_tokens_are_like(power):
    rng = np.random.default_rng(0)
    x = pareto(rng, power, TOKENS)
    absmax = jnp.asarray(np.abs(x).max(0), jnp.float32)
    rows = jnp.asarray(x[:SAMPLED], jnp.float32)
    found = growth(absmax, rows, TOKENS)
    np.testing.assert_allclose(found, 1 / power, rtol=0.1)

    # With alpha = 1 every channel of calibration reached 1.
    ones = jnp.ones(CHANNELS)
    largest, lost = [], []
    for _ in range(20):
        new = np.abs(pareto(rng, power, TOKENS)) / np.asarray(absmax)[None]
        largest.append(new[:SAMPLED].max())
        lost.append(np.square(np.maximum(new - 1, 0)).sum() / CHANNELS)
    share = jnp.float32(SAMPLED / TOKENS)
    expected = largest_of_new_tokens(ones, found, share)
    np.testing.assert_allclose(expected, np.median(largest), rtol=0.3)
    expected = clipped_error(ones, found, jnp.float32(1.0), ones > 0).mean()
    # A mean of few and large values, of which the largest is known to have been one draw.
    assert 1 / 3 < expected / np.mean(lost) < 3


def test_one_channel_far_above_the_others_stays_the_largest():
    absmax = jnp.ones(CHANNELS).at[7].set(50.0)
    assert largest_of_new_tokens(absmax, jnp.float32(0.25), jnp.float32(0.1)) == 50
    rows = jnp.ones((10, CHANNELS))
    grows = has_tail(absmax, rows, 100, jnp.float32(0.25))
    assert grows.sum() == CHANNELS - 1
    assert not grows[7]
    assert clipped_error(absmax, jnp.float32(0.25), jnp.float32(50.0), grows)[7] == 0


def test_a_sample_of_all_tokens_tells_of_no_growth():
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(50, 8)), jnp.float32)
    found = growth(jnp.abs(rows).max(0), rows, 50)
    assert largest_of_new_tokens(jnp.ones(8), found, jnp.float32(1.0)) < 1.01
