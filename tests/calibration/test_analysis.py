"""`Analysis` is made once for each function and set of shapes: counted."""

from collections import Counter

import jax.numpy as jnp
import pytest
from tiny_llama import random_ids, random_params

import sqjax as sq
from sqjax.calibration import analysis
from sqjax.calibration.analysis import shapes_of, shared_arrays
from sqjax.folding import groups
from sqjax.models import LlamaConfig, Model


@pytest.fixture
def counts(monkeypatch):
    """How often the sites and the keys of a program were searched for."""
    counts = Counter()

    def count(module, name):
        original = getattr(module, name)

        def counted(*args):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(module, name, counted)

    count(groups, "find_sites")
    count(analysis, "find_keys")
    return counts


def calls_of(fn, counts, name="fn"):
    """The function, and counts[name] how often Python ran it: once a trace."""

    def counted(params, *args):
        counts[name] += 1
        return fn(params, *args)

    return counted


def watched(batches, counts):
    """The batches; and a copy of the counts as they stood when each was asked for."""
    seen = []

    def stream():
        for batch in batches:
            seen.append(dict(counts))
            yield batch
        seen.append(dict(counts))

    return stream(), seen


@pytest.mark.slow
def test_one_trace_and_one_search_for_each_shape(counts):
    """With keys of attention; batches of one shape cost nothing more."""
    model = Model(LlamaConfig(61, 12, 10, 1, 4, 2, 4))
    batches = [random_ids(1, 4), random_ids(1, 4, seed=2), random_ids(1, 3), random_ids(1, 3)]
    stream, seen = watched(batches, counts)
    fn = calls_of(model.apply, counts)
    stats = sq.calibrate(fn, random_params(model), stream, attention=True)
    assert len(stats.graph.keys) == 1
    once = {"fn": 1, "find_sites": 1, "find_keys": 1}
    twice = {"fn": 2, "find_sites": 2, "find_keys": 2}
    assert seen == [{}, once, once, twice, twice]


PARAMS = {"gain": jnp.ones(4), "w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}


def first(p, x):
    return ((x * p["gain"][None]) @ p["w"]) @ p["v"]


@pytest.mark.slow
def test_keys_are_searched_for_only_when_asked(counts):
    sq.calibrate(calls_of(first, counts), PARAMS, [jnp.ones((2, 4))])
    assert counts == {"fn": 1, "find_sites": 1}


@pytest.mark.slow
def test_a_group_that_does_not_fold_at_another_shape_is_dropped(counts):
    def sometimes(p, x):
        return first(p, x) * (1 if len(x) == 2 else p["gain"].sum())

    batches = [jnp.ones((2, 4)), jnp.ones((5, 4)), jnp.ones((2, 4))]
    stats = sq.calibrate(calls_of(sometimes, counts), PARAMS, batches)
    assert counts == {"fn": 2, "find_sites": 2}
    assert [group.name for group in stats.graph.groups] == ["v"]
    assert "does not fold in the program of batch 1: " in dict(stats.graph.refused)["w"]
    assert int(stats.count["w"]) == 9


@pytest.mark.slow
def test_several_functions_are_traced_together_and_each_alone(counts):
    other = calls_of(lambda p, x: x @ p["v"], counts, "other")
    batches = [[jnp.ones((2, 4))] * 2, [jnp.ones((2, 3)), jnp.ones((1, 3))]]
    sq.calibrate([calls_of(first, counts), other], PARAMS, batches)
    # Together on the first batches, and again for the new shape of `other`; alone on each shape.
    assert counts == {"fn": 3, "other": 4, "find_sites": 5}


def test_static_arguments_are_part_of_the_shapes():
    x = jnp.ones((2, 5))
    assert shapes_of((x, True)) == shapes_of((2 * x, True))
    others = [(x, False), (x.T, True), (x.astype(jnp.int32), True), ({"x": x}, True)]
    assert shapes_of((x, True)) not in map(shapes_of, others)


def test_leaves_that_are_one_array():
    x, y = jnp.ones(2), jnp.ones(2)
    assert shared_arrays({"a": x, "b": y, "c": {"d": x}}) == {"a": "c/d", "c/d": "a"}
