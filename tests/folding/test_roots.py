"""Where an activation is a square, what is before it carries the square root of the scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced import graph_of, normal

import sqjax as sq
from sqjax.folding import labels as lab
from sqjax.folding.apply import unfold

X = normal(6, 8)
PARAMS = {"up": normal(8, 12), "bias": normal(1, 12), "down": normal(12, 5) / 9}


def up(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"])


def twice(r):
    return r * r


SQUARES = {
    "power": lambda p, x: up(p, x) ** 2 @ p["down"],
    "square": lambda p, x: jnp.square(up(p, x)) @ p["down"],
    "product with itself": lambda p, x: twice(up(p, x)) @ p["down"],
    "fourth power": lambda p, x: up(p, x) ** 4 @ p["down"],
    "square of a square": lambda p, x: jnp.square(jnp.square(up(p, x))) @ p["down"],
}


@pytest.mark.parametrize("case", SQUARES)
@pytest.mark.slow
def test_the_leaves_before_a_square_carry_the_root(case):
    fn = SQUARES[case]
    degree = 4 if "fourth" in case or "of a" in case else 2
    stats = sq.calibrate(fn, PARAMS, [X])  # the proof, with powers of two, is among it
    [group] = stats.graph.groups
    assert (group.absorbers, group.size, group.degree) == (("bias", "up"), 12, degree)
    s = np.random.default_rng(0).uniform(0.5, 2, 12)
    folded = sq.fold(PARAMS, stats.graph, {"down": jnp.asarray(s, jnp.float32)})
    root = s[None] ** (1 / degree)
    np.testing.assert_allclose(folded["up"], PARAMS["up"] / root, rtol=1e-6)
    np.testing.assert_allclose(folded["bias"], PARAMS["bias"] / root, rtol=1e-6)
    np.testing.assert_allclose(folded["down"], PARAMS["down"] * s[:, None], rtol=1e-6)
    np.testing.assert_allclose(fn(folded, X), fn(PARAMS, X), rtol=1e-4, atol=1e-4)
    unfolded = unfold(folded, stats.graph, {"down": jnp.asarray(s, jnp.float32)})
    np.testing.assert_allclose(unfolded["up"], PARAMS["up"], rtol=1e-6)


@pytest.mark.slow
def test_rounded_scales_have_roots_that_are_powers_of_two():
    fn = SQUARES["square"]
    stats = sq.calibrate(fn, PARAMS, [X])
    s = sq.scales(PARAMS, stats, 0.3, round_scales="pow2")["down"]
    assert len(set(np.log2(s).tolist())) > 2
    np.testing.assert_array_equal(np.log2(s) % 2, 0)
    folded = sq.fold(PARAMS, stats.graph, {"down": s})
    run = jax.jit(fn)
    np.testing.assert_array_equal(run(folded, X), run(PARAMS, X))


@pytest.mark.slow
def test_in_a_scan_each_layer_has_roots_of_its_own():
    def fn(p, x):
        return jax.lax.scan(lambda x, p: (x + SQUARES["square"](p, x), None), x, p)[0]

    layers = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *[
            {
                "up": normal(8, 12, seed=n),
                "bias": normal(1, 12, seed=n),
                "down": normal(12, 8, seed=n) / 9,
            }
            for n in range(2)
        ],
    )
    stats = sq.calibrate(fn, layers, [X])
    [group] = stats.graph.groups
    assert (group.steps, group.size, group.degree) == ((2,), 24, 2)
    smoothed = sq.smooth(layers, stats, 0.5)
    assert not np.allclose(smoothed["down"], layers["down"])
    np.testing.assert_allclose(fn(smoothed, X), fn(layers, X), rtol=1e-3, atol=1e-4)


UNLAWFUL = {
    "the root is read too": lambda p, x: (r := up(p, x)) ** 2 @ p["down"] + r @ p["down"],
    "a sum with the root": lambda p, x: ((r := up(p, x)) ** 2 + r) @ p["down"],
    "a third power": lambda p, x: up(p, x) ** 3 @ p["down"],
    "an inverse": lambda p, x: (1 + up(p, x)) ** -2 @ p["down"],
}


@pytest.mark.parametrize("case", UNLAWFUL)
def test_a_scale_and_its_root_do_not_mix(case):
    assert not graph_of(UNLAWFUL[case], PARAMS, X).groups


def test_roots_and_powers_of_labels():
    labels = np.array([[0, 3, -1]])
    rooted = lab.root(labels, 2)
    channels, degrees = lab.channels_and_degrees(rooted)
    np.testing.assert_array_equal(channels, [[0, 3, 1]])
    np.testing.assert_array_equal(degrees, [[1, 2, 2]])
    np.testing.assert_array_equal(lab.power(rooted, 2), labels)
    assert lab.power(labels, 2) is None
    assert lab.root(lab.root(rooted, 4), 2) is None  # the 16th root
