"""A thousand wrong foldings, and programs that a folding does not fit: none is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mutations import PROGRAMS, right_move, wrong_moves, wrong_scales
from traced import graph_of, normal, spaces_of
from unlawful_programs import UNLAWFUL

import sqjax as sq
from sqjax.folding.graph import Group, LabelMap
from sqjax.folding.space import Along, Space
from sqjax.numerics.prime_field import draw, mul
from sqjax.program.trace import trace
from sqjax.proving.changes import scaled
from sqjax.proving.proof import input_values, leaf_values
from sqjax.proving.running import run
from sqjax.proving.values import Field

#: How many single elements of each leaf of a group are made wrong.
ELEMENTS = 8
#: The mutations of all programs, none of which may pass.
AT_LEAST = 1000
counted: dict[str, int] = {}


def unchanged(fn, inputs, values, lanes):
    """For each of these leaves whether fn returns what it does of the first: one program for all."""
    stacked = {path: np.stack([lane[path].residues for lane in lanes]) for path in lanes[0]}
    shapes = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in stacked.items()}
    by_lane = lambda leaves, *inputs: jax.vmap(lambda one: fn(one, *inputs))(leaves)
    traced, _ = trace(by_lane, shapes, inputs, {})
    operands = [Field(stacked[path]) for path in traced.paths]
    [out] = run(traced.jaxpr, [*operands, *values], 0)
    return (out.residues == out.residues[:1]).all(tuple(range(1, out.residues.ndim)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_mutation_is_accepted(name):
    fn, params, inputs, spaces, permutations = PROGRAMS[name]
    graph = graph_of(fn, params, *inputs)
    rng = np.random.default_rng(0)
    both = (*spaces, *permutations)
    leaves = leaf_values(params, graph, both, ("random", "folded"), rng)
    rights, wrongs = [leaves], [*wrong_scales(graph, leaves, rng, ELEMENTS)]
    for group in graph.groups:
        drawn = draw(rng, (group.size,))
        rights.append(scaled(leaves, graph, group, mul(drawn, drawn)))
    for space in both:
        permuted = space in permutations
        rights.append(right_move(space, graph, leaves, rng, permuted))
        wrongs += wrong_moves(space, graph, leaves, rng, permuted)
    inputs_in_the_field = input_values(jax.tree.leaves(inputs), rng)
    same = unchanged(fn, inputs, inputs_in_the_field, [*rights, *wrongs])
    assert same[: len(rights)].all()
    assert not same[len(rights) :].any(), np.flatnonzero(same[len(rights) :])
    counted[name] = len(wrongs)


def test_these_were_a_thousand_and_fifty_programs():
    assert len(UNLAWFUL) > 50
    if counted.keys() == PROGRAMS.keys():
        assert sum(counted.values()) >= AT_LEAST, counted


# Programs -----------------------------------------------------------------------------------------

VECTOR = normal(1, 6, seed=5)


def mean(h, axis):
    return jnp.mean(h, axis, keepdims=True)


#: What stands between two kernels -> what it lets pass: (s)cales, (r)otations, (p)ermutations.
BETWEEN = {
    "nothing": (lambda h: h, "srp"),
    "a number": (lambda h: -3 * h / 7, "srp"),
    "bfloat16": (lambda h: h.astype(jnp.bfloat16).astype(jnp.float32), "srp"),
    "means of tokens": (lambda h: h - mean(h, 0), "srp"),
    "sums along tokens": (lambda h: jnp.cumsum(h, 0), "srp"),
    "tokens reversed": (lambda h: h[::-1], "srp"),
    "a weight for each token": (lambda h: h * jnp.tanh(jnp.arange(5.0))[:, None], "srp"),
    "a step": (lambda h: lax.scan(lambda c, row: (c + row, c), jnp.zeros(6), h)[1], "srp"),
    "a branch": (lambda h: lax.cond(h.shape[0] > 2, lambda h: h, lambda h: 2 * h, h), "srp"),
    "relu": (jax.nn.relu, "sp"),
    "abs": (jnp.abs, "sp"),
    "leaky relu": (jax.nn.leaky_relu, "sp"),
    "the largest of tokens": (lambda h: h - jnp.max(h, 0, keepdims=True), "sp"),
    "sorted along tokens": (lambda h: jnp.sort(h, 0), "sp"),
    "running maxima of tokens": (lambda h: lax.cummax(h, 0), "sp"),
    "ranks of tokens": (lambda h: h[jnp.argsort(h, 0)[0, 0]][None] + 0 * h, "s"),
    "a constant": (lambda h: h * VECTOR, "s"),
    "a rms norm": (lambda h: h * lax.rsqrt(mean(h * h, -1) + 1e-6), "rp"),
    "a length": (lambda h: h * jnp.exp(mean(h * h, -1)), "rp"),
    "the mean is taken away": (lambda h: h - mean(h, -1), "p"),
    "tanh": (jnp.tanh, "p"),
    "softmax": (jax.nn.softmax, "p"),
    "plus one": (lambda h: h + 1, "p"),
    "clip": (lambda h: jnp.clip(h, -1, 1), "p"),
    "float8": (lambda h: h.astype(jnp.float8_e5m2).astype(jnp.float32), "p"),
    "three bits": (lambda h: lax.reduce_precision(h, 8, 3), "p"),
    "integers": (lambda h: h.astype(jnp.int32).astype(jnp.float32), "p"),
    "the square": (jnp.square, "p"),
    "a high power": (lambda h: h ** (2**31 - 2), "p"),
    "the reciprocal": (lambda h: 1 / h, "p"),
    "the sign": (jnp.sign, "p"),
    "the largest channel": (lambda h: h - jnp.max(h, -1, keepdims=True), "p"),
    "one-hot": (lambda h: h == jnp.max(h, -1, keepdims=True), "p"),
    "what is finite": (lambda h: jnp.where(jnp.isfinite(h), h, jnp.tanh(h)), "srp"),
    "a constant is added": (lambda h: h + VECTOR, ""),
    "another order": (lambda h: h[:, ::-1], ""),
    "sorted": (lambda h: jnp.sort(h, -1), ""),
    "sums": (lambda h: jnp.cumsum(h, -1), ""),
    "one further": (lambda h: h + jnp.roll(h, 1, -1), ""),
    "half of the channels": (lambda h: h.at[:, 3:].set(0.0), "s"),
    "the best channel": (lambda h: h + VECTOR[0, jnp.argmax(h, -1)][:, None], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between_lets_pass_just_what_it_may(name):
    make, passes = BETWEEN[name]
    params = {"e": normal(6, 6), "w": normal(6, 6, seed=1)}
    fn = lambda p, x: make(x @ p["e"]).astype(jnp.float32) @ p["w"]
    x, channels = normal(5, 6), np.arange(1, 7)
    labels = {"e": -channels[None], "w": channels[:, None]}
    group = Group("w", 6, (), tuple((k, LabelMap.of(v)) for k, v in labels.items()), norm=False)
    graph = graph_of(fn, params, x)._replace(groups=(group,))
    space = Space("w", 6, (("e", Along(1)), ("w", Along(0))))
    proof = sq.prove(fn, params, graph, x, spaces=[space], permutations=[space])
    letters = {"scales of w": "s", "rotation of w": "r", "permutation of w": "p"}
    assert {letters[held] for held in proof.held} == {*passes}


@pytest.mark.parametrize("name", UNLAWFUL)
def test_unlawful_programs_are_refused_by_the_field_alone(name):
    """And what the search finds in the same program is proved."""
    fn, params, inputs, space = UNLAWFUL[name]
    found = spaces_of(fn, params, *inputs)
    graph = graph_of(fn, params, *inputs)._replace(groups=())
    proof = sq.prove(fn, params, graph, *inputs, spaces=[space], trials=1)
    reason = "it changes what the function returns"
    assert proof.refused == ((f"rotation of {space.name}", reason),)
    assert sq.prove(fn, params, graph, *inputs, spaces=found, trials=1, gains="ones").holds
