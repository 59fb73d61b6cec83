"""The proof in a finite field judges rightly: what is lawful passes, and hundreds of wrong changes do not."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dags import Dag, evaluate, function
from mutations import PROGRAMS, wrong_labels
from random_programs import random_dag, random_image_dag
from real_models import first_layers, smollm2
from traced import graph_of, normal, spaces_of
from two_layers import (
    IDS,
    feed_forward,
    language_model,
    layer_norm,
    parameters,
    residual,
    rms,
    values,
)

import sqjax as sq
from sqjax.folding.graph import Graph, Group, LabelMap
from sqjax.folding.space import Along, Space
from sqjax.numerics.prime_field import (
    draw,
    embed,
    inverse,
    mul,
    sub,
    total,
)
from sqjax.program.trace import trace
from sqjax.proving.changes import moved, permutation, scaled
from sqjax.proving.proof import FieldTrial, input_values, leaf_values
from sqjax.proving.values import Field

# Two layers ---------------------------------------------------------------------------------------


def proved(fn, params, spaces, permutations=(), seed=0):
    graph = graph_of(fn, params, IDS)
    return sq.prove(
        fn, params, graph, IDS, spaces=spaces, permutations=permutations, trials=1, seed=seed
    )


@pytest.mark.parametrize(("norm", "biased"), [(rms, False), (layer_norm, True)])
def test_what_is_lawful_is_proved(norm, biased):
    fn, params = language_model(norm), parameters(biased)
    spaces = [residual(params, keeps_ones=biased), values("0"), values("1")]
    proof = proved(fn, params, spaces, [feed_forward("0"), feed_forward("1")])
    assert proof.holds, proof
    assert len(proof.held) == 9 + 3 + 2
    assert str(proof) == "14 of 14 changes proved"


def trial_of(fn, params, *inputs, spaces=(), seed=0):
    graph = graph_of(fn, params, *inputs)
    traced, arrays = trace(fn, params, inputs, {})
    rng = np.random.default_rng(seed)
    leaves = leaf_values(params, graph, spaces, ("random", "folded"), rng)
    return FieldTrial(traced, leaves, input_values(arrays, rng), seed), graph, rng


def without(space, path):
    return space._replace(leaves=tuple(x for x in space.leaves if x[0] != path))


#: What is wrong with it -> the space of the residual stream, changed so.
WRONG_SPACES = {
    "gains are not folded": lambda space: space._replace(gains=()),
    "a router is forgotten": lambda space: without(space, "1/router"),
    "it does not fit": lambda space: space._replace(
        leaves=(*without(space, "0/q").leaves, ("0/q", Along(0, 4)))
    ),
}


@pytest.mark.parametrize("how", WRONG_SPACES)
def test_a_wrong_space_is_refused(how):
    fn, params = language_model(rms), parameters()
    proof = proved(fn, params, [WRONG_SPACES[how](residual(params)), values()])
    assert [name for name, _ in proof.refused] == ["rotation of residual"]
    assert "rotation of 0/o" in proof.held


def test_layer_norm_refuses_a_rotation_that_moves_the_vector_of_ones():
    fn, params = language_model(layer_norm), parameters(biased=True)
    refused = ("rotation of residual", "it changes what the function returns")
    assert proved(fn, params, [residual(params)]).refused == (refused,)


@pytest.mark.parametrize("listed", [False, True])
def test_a_gain_between_a_block_and_the_residual_is_refused(listed):
    fn, params = language_model(rms), parameters(sandwich=True)
    space = residual(params)
    if listed:
        space = space._replace(gains=(*space.gains, "0/after", "1/after"))
    [(name, reason)] = proved(fn, params, [space]).refused
    assert name == "rotation of residual"
    assert ("no group folds the gain 0/after" in reason) == listed


def test_queries_and_keys_do_not_rotate_behind_positions():
    fn, params = language_model(rms), parameters()
    space = Space("queries", 4, (("0/q", Along(1, 4)), ("0/k", Along(1, 2))))
    assert not proved(fn, params, [space]).holds


@pytest.mark.parametrize(("norm", "lawful"), [(rms, False), (layer_norm, True)])
def test_rows_of_the_embedding_may_be_centred_before_layer_norm_alone(norm, lawful):
    """As two published methods do it before RMSNorm too."""
    params = {"embed": normal(7, 6), "gain": normal(6), "head": normal(6, 5)}
    fn = lambda p, ids: (norm(p["embed"][ids]) * p["gain"][None]) @ p["head"]
    trial, _, _ = trial_of(fn, params, IDS)
    rows = trial.leaves["embed"].residues
    mean = mul(total(rows, (1,), keepdims=True), inverse(np.uint32(6)))
    centred = {**trial.leaves, "embed": Field(sub(rows, mean))}
    assert trial.unchanged(centred) == lawful


# Spaces that are found ----------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "biased"), [(rms, False), (layer_norm, True)])
def test_the_spaces_that_the_search_finds_are_proved(norm, biased):
    fn, params = language_model(norm), parameters(biased)
    spaces = spaces_of(fn, params, IDS)
    assert len(spaces) == 3
    proof = proved(fn, params, spaces)
    assert proof.holds, proof


def test_gains_that_no_group_folds_must_be_ones():
    """Behind a block they can not move; if they are ones, or are drawn as ones, it is lawful."""
    fn, params = language_model(rms), parameters(sandwich=True)
    [stream, *_] = spaces = spaces_of(fn, params, IDS)
    graph = graph_of(fn, params, IDS)

    def holds(params, **options):
        return sq.prove(fn, params, graph, IDS, spaces=spaces, trials=1, **options).holds

    assert not holds(params)
    assert holds(params, gains="ones")
    ones = {path: jnp.ones_like(params[path]) for path in stream.gains}
    assert holds(params | ones, leaves="given")
    assert not holds(params, leaves="given")


def test_a_space_is_a_part_of_an_axis():
    """Queries, keys and values in one kernel: what stands before and behind stays what it is."""
    fn, params, inputs, [heads], _ = PROGRAMS["fused attention"]
    assert heads.leaves[0] == ("qkv", Along(1, 2, 1, start=12))
    assert spaces_of(fn, params, *inputs)[0].leaves == heads.leaves[::-1]
    kernel = Field(draw(np.random.default_rng(0), (6, 18)))
    after = moved({"qkv": kernel}, 3, heads.leaves[:1], lambda x: x[..., ::-1])["qkv"].residues
    order = [*range(12), 14, 13, 12, 17, 16, 15]
    assert np.array_equal(after, kernel.residues[:, order])


def test_orders_of_two_are_tried_and_all_orders_are_composed_of_two_trials():
    """An order that is none, or always the same circle, would let pass what it may not."""
    for size in (2, 3, 4, 7):
        pair = [permutation(Space("p", size, (("p", Along(0)),)), None, 5, k) for k in (0, 1)]
        leaves = {"p": Field(np.arange(size, dtype=np.uint32))}
        made = [tuple(p.make(leaves)["p"].residues.tolist()) for p in pair]
        assert tuple(range(size)) not in made
        reached, waiting = {tuple(range(size))}, [tuple(range(size))]
        while waiting:
            order = waiting.pop()
            new = {tuple(order[k] for k in by) for by in made} - reached
            reached |= new
            waiting += new
        assert len(reached) == math.factorial(size)


# Random programs ----------------------------------------------------------------------------------


def drawn(seed: int, number: int, draw: Callable[..., Dag]) -> Dag:
    return draw(np.random.default_rng([seed, number]).integers(0, 2**16, 200))


def folded_in_numpy(dag: Dag, graph: Graph, group: Group, s: np.ndarray) -> dict[str, np.ndarray]:
    """The leaves in float64 with one group folded in, in which no leaf carries a root."""
    leaves, offsets = dict(dag.leaves), dict(graph.offsets)
    for path, labels in group.leaves:
        factors = np.append(1.0, s)[abs(labels.array)] ** np.sign(labels.array)
        leaves[path] = (leaves[path] + offsets.get(path, 0.0)) * factors - offsets.get(path, 0.0)
    return leaves


def changes_in_numpy(dag: Dag, leaves: dict[str, np.ndarray]) -> bool:
    """Whether powers of two, which no sum rounds otherwise, change what is returned."""
    with np.errstate(all="ignore"):
        before, after = (evaluate(dag, x, dag.inputs)[-1].operands for x in (dag.leaves, leaves))
    return not all(map(same, before, after))


def same(a, b):
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f") for x, y in pairs)


@pytest.mark.parametrize(
    ("seed", "count", "draw"),
    [
        (0, 4, random_dag),
        pytest.param(3, 12, random_dag, marks=[pytest.mark.slow, pytest.mark.every_case]),
        pytest.param(7, 4, random_image_dag, marks=pytest.mark.slow),
    ],
)
def test_groups_of_random_programs_are_proved_and_their_mutations_refused(seed, count, draw):
    rights = wrongs = 0
    for number in range(count):
        dag = drawn(seed, number, draw)
        fn = function(dag)
        graph = graph_of(fn, dag.leaves, *dag.inputs)
        proof = sq.prove(fn, dag.leaves, graph, *dag.inputs, trials=1)
        assert proof.holds, f"{proof}\n{graph}\n{dag}"
        rights += len(proof.held)
        rng = np.random.default_rng(number)
        trials = [trial_of(fn, dag.leaves, *dag.inputs, seed=k)[0] for k in range(3)]
        for group in filter(lambda group: group.degree == 1, graph.groups):
            s = 2.0 ** (rng.integers(1, 4, group.size) * rng.choice([-1, 1], group.size))
            drawn_roots = rng.integers(2, 2**31 - 1, group.size, np.uint32)
            roots = mul(drawn_roots, drawn_roots)
            for wrong in wrong_labels(group, rng):
                if changes_in_numpy(dag, folded_in_numpy(dag, graph, wrong, s)):
                    after = [scaled(t.leaves, graph, wrong, roots) for t in trials]
                    passed = [t.unchanged(x) for t, x in zip(trials, after, strict=True)]
                    assert not all(passed), f"{wrong}\n{graph}\n{dag}"
                    wrongs += 1
    assert rights >= count
    assert wrongs >= 4 * count


# A real model -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layers", [pytest.param(30, marks=pytest.mark.every_case), 1])
def test_smollm2_is_proved_and_a_forgotten_leaf_is_found(layers):
    """With the spaces that the search finds; given gains are not ones, and the tied head takes none."""
    model, params = first_layers(*smollm2(), layers)
    few = {"embedding": params["model"]["embed_tokens"]["embedding"][:64]}
    params = {**params, "model": {**params["model"], "embed_tokens": few}}
    model = replace(model, config=replace(model.config, vocab_size=64))
    ids = IDS[None, :3]
    graph = graph_of(model.apply, params, ids)
    stream, *heads = spaces_of(model.apply, params, ids)
    assert [space.size for space in heads] == [64] * layers
    prove = functools.partial(sq.prove, model.apply, params)
    proof = prove(graph, ids, spaces=heads, trials=1, leaves="given")
    assert proof.holds, proof
    assert len(proof.held) == 5 * layers
    group = graph.groups[2]
    wrong = graph._replace(groups=(group._replace(leaves=group.leaves[1:]),))
    proof = prove(wrong, ids, spaces=[stream], trials=1, gains="ones")
    assert proof.held == (f"rotation of {stream.name}",)
    assert [name for name, _ in proof.refused] == [f"scales of {group.name}"]


# Arguments ----------------------------------------------------------------------------------------

FN = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
AB = {"a": normal(3, 4), "b": normal(4, 2)}
X = normal(5, 3)


def test_given_leaves_are_taken_as_they_are():
    """A bias of zeros may be scaled in any way: lawful for these leaves, not for all of them."""
    fn = lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]
    params = AB | {"bias": jnp.zeros(4)}
    graph = graph_of(fn, params, X)
    [group] = graph.groups
    forgotten = tuple((path, x) for path, x in group.leaves if path != "bias")
    wrong = graph._replace(groups=(group._replace(leaves=forgotten),))
    assert sq.prove(fn, params, wrong, X, leaves="given").holds
    assert not sq.prove(fn, params, wrong, X).holds
    assert sq.prove(fn, params, graph, X).holds


def test_shapes_are_enough_and_statistics_are_a_graph():
    stats = sq.calibrate(FN, AB, [X])
    shapes, x = jax.eval_shape(lambda *args: args, AB, X)
    assert sq.prove(FN, shapes, stats, x).held == ("scales of b",)


def test_scales_in_the_field_are_those_that_fold_writes():
    """What is proved of labels, roots and 1 + w among them, is what `sq.fold` does with them."""
    fn = lambda p, x: jnp.square(rms(x) * (1 + p["g"])[None] @ p["a"]) @ p["b"]
    eighths = {"a": (3, 4), "b": (4, 2), "g": (3,)}
    params = {k: jnp.round(8 * normal(*shape)) / 8 for k, shape in eighths.items()}
    graph = graph_of(fn, params, X)
    rng = np.random.default_rng(0)
    degrees = set()
    for group in graph.groups:
        roots = 2.0 ** rng.integers(-3, 4, group.size)
        scale = jnp.asarray(roots**group.degree, jnp.float32)
        one = {other.name: jnp.ones(other.size) for other in graph.groups}
        after = sq.fold(params, graph, one | {group.name: scale})
        leaves = {path: Field(embed(np.asarray(x))) for path, x in params.items()}
        in_the_field = scaled(leaves, graph, group, embed(roots))
        for path, x in after.items():
            assert np.array_equal(in_the_field[path].residues, embed(np.asarray(x)))
        degrees.add(group.degree)
    assert degrees == {1, 2}


def test_roots_of_scales_are_folded():
    fn = lambda p, x: jnp.square(x @ p["a"]) @ p["b"]
    graph = graph_of(fn, AB, X)
    assert graph.groups[0].degree == 2
    assert sq.prove(fn, AB, graph, X).holds


def test_half_precision_needs_no_exception():
    half = jax.tree.map(lambda x: x.astype(jnp.float16), AB)
    graph = graph_of(FN, half, X.astype(jnp.float16))
    assert sq.prove(FN, half, graph, X.astype(jnp.float16), leaves="given").holds


def test_one_seed_gives_one_proof_and_each_wrong_group_is_found():
    fn = lambda p, x: jnp.tanh(FN(p, x) @ p["c"]) @ p["d"] @ p["e"]
    params = AB | {"c": normal(2, 3), "d": normal(3, 4), "e": normal(4, 2)}
    graph = graph_of(fn, params, X)
    first, *others = graph.groups
    wrong = first._replace(leaves=first.leaves[:1])
    graph = graph._replace(groups=(*others, wrong))
    one, again = (sq.prove(fn, params, graph, X, seed=3) for _ in range(2))
    assert one == again
    assert [name for name, _ in one.refused] == ["scales of b"]
    assert "1 changes" not in str(one)
    assert "refused scales of b: it changes what the function returns" in str(one)


def test_arguments_that_do_not_fit_are_named():
    graph = graph_of(FN, AB, X)
    with pytest.raises(ValueError, match="expected a graph or statistics, got dict"):
        sq.prove(FN, AB, AB, X)
    with pytest.raises(ValueError, match="leaves=: expected random or given, got 'zeros'"):
        sq.prove(FN, AB, graph, X, leaves="zeros")
    with pytest.raises(ValueError, match="gains=: expected folded or ones, got 'zeros'"):
        sq.prove(FN, AB, graph, X, gains="zeros")
    for trials in (0, True, 1.5):
        with pytest.raises(ValueError, match="trials=: expected 1 or more"):
            sq.prove(FN, AB, graph, X, trials=trials)
    with pytest.raises(ValueError, match=r"prove: b: expected shape \(4, 2\)"):
        sq.prove(FN, AB | {"b": normal(4, 1)}, graph, X)
    with pytest.raises(ValueError, match="prove: b: expected the leaf"):
        sq.prove(lambda p, x: x @ p["a"], {"a": AB["a"]}, graph, X)
    shapes = jax.eval_shape(lambda: AB)
    with pytest.raises(ValueError, match=r"prove: a: expected an array, got the shape \(3, 4\)"):
        sq.prove(FN, shapes, graph, X, leaves="given")
    with pytest.raises(ValueError, match="prove: a: expected finite numbers, got infinity"):
        sq.prove(FN, AB | {"a": AB["a"].at[0, 0].set(jnp.inf)}, graph, X, leaves="given")
    ids = jax.ShapeDtypeStruct((5,), jnp.int32)
    with pytest.raises(ValueError, match="prove: input 0: expected an array, got the shape"):
        sq.prove(lambda p, ids: FN(p, p["a"].T[ids, :3]), AB, graph, ids)
    with pytest.raises(ValueError, match="of an empty batch nothing is shown"):
        sq.prove(FN, AB, graph, X[:0])
    misfit = Space("b", 5, (("a", Along(1)),))
    [(_, reason)] = sq.prove(FN, AB, graph, X, spaces=[misfit]).refused
    assert "a space of size 5 does not fit a of shape (3, 4) Along(axis=1" in reason


def test_labels_that_do_not_fit_are_refused_with_a_reason():
    graph = graph_of(FN, AB, X)
    [group] = graph.groups
    labels = dict(group.leaves)
    for wrong in (LabelMap.of(labels["a"].array.T), LabelMap.of(9 * labels["a"].array)):
        leaves = tuple((labels | {"a": wrong}).items())
        changed = graph._replace(groups=(group._replace(leaves=leaves),))
        [(_, reason)] = sq.prove(FN, AB, changed, X).refused
        assert "the labels of a, of shape" in reason
