"""Parts of graphs and of statistics: taken out, put together again, and what belongs together."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq
from sqjax.calibration.parts import joined_stats, part_of_stats
from sqjax.folding.parts import held_together, joined_graph, part_of_graph, straddling

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def layer():
    return {"norm": 1 + draw(4) ** 2, "up": draw(4, 6), "down": draw(6, 4), "bias": draw(4)}


def run(p, x):
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)) * p["norm"][None]
    # A softmax stands in the way of what reads it.
    return jax.nn.softmax(x @ p["up"]) @ p["down"] + p["bias"][None]


def fn(params, x):
    for i in "01":
        x = x + run(params["layers"][i], x)
    return x @ params["head"]


PARAMS = {"layers": {"0": layer(), "1": layer()}, "head": draw(4, 3)}
X = draw(5, 4)
PREFIXES = ("layers/0/", "layers/1/", "")


@pytest.fixture(scope="module")
def stats():
    return sq.calibrate(fn, PARAMS, [X], histogram=True)


def leaves_of(graph, prefix):
    """The leaves of one of `PREFIXES`; the last one's are those that are in no layer."""
    paths = [path for path, _ in graph.leaves]
    return [p for p in paths if p.startswith(prefix or "head")]


def assert_same(got, expected):
    assert set(got.graph.groups) == set(expected.graph.groups)
    assert set(got.graph.sites) == set(expected.graph.sites)
    assert dict(got.graph.refused) == dict(expected.graph.refused)
    assert dict(got.graph.ways) == dict(expected.graph.ways)
    got, expected = (replace(s, graph=expected.graph) for s in (got, expected))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(expected)))


@pytest.mark.slow
def test_a_part_is_what_calibrating_it_alone_gives(stats):
    part = part_of_stats(stats, leaves_of(stats.graph, "layers/0/"), "layers/0/")
    alone = sq.calibrate(run, PARAMS["layers"]["0"], [X], histogram=True)
    assert part.graph.sites == alone.graph.sites
    assert [g.sites for g in part.graph.groups] == [g.sites for g in alone.graph.groups]
    assert [g.leaves for g in part.graph.groups] == [g.leaves for g in alone.graph.groups]
    assert part.absmax.keys() == alone.absmax.keys()
    for path, absmax in part.absmax.items():
        np.testing.assert_allclose(absmax, alone.absmax[path], 1e-6)


@pytest.mark.slow
def test_parts_put_together_are_the_whole(stats):
    parts = [(p, part_of_stats(stats, leaves_of(stats.graph, p), p)) for p in PREFIXES]
    assert_same(joined_stats(stats.graph, parts), stats)
    joined = joined_graph(stats.graph.leaves, [(p, part.graph) for p, part in parts])
    assert joined.leaves == stats.graph.leaves
    assert set(joined.groups) == set(stats.graph.groups)


def test_what_is_done_with_a_part_is_what_is_done_with_the_whole(stats):
    prefix = "layers/1/"
    part = part_of_stats(stats, leaves_of(stats.graph, prefix), prefix)
    expected = sq.smooth(PARAMS, stats, 0.7)["layers"]["1"]
    got = sq.smooth(PARAMS["layers"]["1"], part, 0.7)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(expected)))


def two_norms(params, x):
    """The gain in a/ absorbs the scale of the weight in b/."""
    return jnp.abs(x) * params["a"]["gain"][None] @ params["b"]["w"] + params["c"][None]


STRADDLES = {"a": {"gain": 1 + draw(4) ** 2}, "b": {"w": draw(4, 3)}, "c": draw(3)}


def test_a_group_that_straddles_is_named_and_left_out():
    stats = sq.calibrate(two_norms, STRADDLES, [X])
    graph = stats.graph
    assert straddling(graph, [["a/gain"], ["b/w"], ["c"]]) == ["b/w"]
    assert straddling(graph, [["a/gain", "b/w"], ["c"]]) == []
    assert set(map(frozenset, held_together(graph))) == {
        frozenset(["a/gain", "b/w"]),
        frozenset("c"),
    }
    part = part_of_stats(stats, ["b/w"], "b/")
    assert part.graph.groups == ()
    assert part.folded == {}
    assert part.absmax.keys() == {"w"}
    parts = [("b/", part), ("", part_of_stats(stats, ["a/gain", "c"]))]
    joined = joined_stats(graph, parts)
    assert joined.graph.groups == ()
    assert dict(joined.graph.refused)["b/w"] == (
        "it does not fold in the program of its layer alone: its group is another there"
    )


def test_a_site_that_no_part_has_seen(stats):
    parts = [("", part_of_stats(stats, ["head"]))]
    with pytest.raises(ValueError, match=r"layers/0/.*: expected a layer that reads it"):
        joined_stats(stats.graph, parts)


def test_groups_that_share_a_leaf_are_held_together(stats):
    in_layer_0 = ("layers/0/norm", "layers/0/up")
    [together] = [paths for paths in held_together(stats.graph) if in_layer_0[0] in paths]
    assert set(together) == set(in_layer_0)


def test_names_of_matrices_of_a_stack_keep_their_numbers():
    def stacked(params, x):
        for i in range(2):
            x = jnp.tanh(x @ params["m"]["w"][i])
        return x

    graph = sq.calibrate(stacked, {"m": {"w": draw(2, 4, 4)}}, [X]).graph
    part = part_of_graph(graph, ["m/w"], "m/")
    assert [name for name, _ in part.refused] == ["w[0]", "w[1]"]
    assert [name for name, _ in graph.refused] == ["m/w[0]", "m/w[1]"]
