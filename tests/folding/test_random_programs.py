"""Random programs: every fold that is found changes no bit, and the certificate passes no false
one.

Programs come from the grammar in `random_programs`. Folds are judged in NumPy (`dags`), in float64,
from the graph's label maps alone: scales are powers of two, so a right fold changes no bit of the
outputs and a wrong one changes many.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dags import Dag, Step, evaluate, function
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_programs import numbers, random_dag, random_image_dag

import sqjax as sq
from sqjax.folding import groups as grouping
from sqjax.folding.certificate import certify
from sqjax.folding.find_graph import find_graph
from sqjax.folding.graph import Graph, Group
from sqjax.folding.groups import Survey
from sqjax.folding.labels import DEGREE
from sqjax.program.equations import Var
from sqjax.program.facts import Program
from sqjax.program.trace import trace

TAPE = 200


def drawn(seed: int, number: int, draw: Callable[..., Dag] = random_dag) -> Dag:
    return draw(np.random.default_rng([seed, number]).integers(0, 2**16, TAPE))


def program_of(dag: Dag) -> Program:
    return Program(trace(function(dag), dag.leaves, dag.inputs, {})[0])


def other_inputs(dag: Dag) -> list[np.ndarray]:
    """A second set of inputs: what one set hides behind a ReLU or a mask, the other may show."""
    x, ids = dag.inputs
    return [numbers(12, size=x.shape), 1 - ids]


# Folds in NumPy -----------------------------------------------------------------------------------


def powers_of_two(rng: np.random.Generator, size: int, degree: int = 1) -> np.ndarray:
    """One scale a channel, none of them 1, whose roots of this degree are powers of two as well."""
    return 2.0 ** (degree * rng.integers(1, 4, size) * rng.choice([-1, 1], size))


def rescaled(
    leaf: np.ndarray, labels: np.ndarray, s: np.ndarray, offset: float = 0.0
) -> np.ndarray:
    """The leaf times s[c] where its label is c + 1, divided by it where it is -(c + 1); by its d-th
    root where (d - 1) * DEGREE has been added to that.
    """
    magnitude = np.abs(labels)
    beyond_one = np.maximum(magnitude - 1, 0) // DEGREE
    factors = np.concatenate([[1.0], s])[magnitude - beyond_one * DEGREE]
    factors = factors ** (np.sign(labels) / (1.0 + beyond_one))
    return (offset + leaf) * factors - offset


def folded(
    dag: Dag, graph: Graph, s: Mapping[str, np.ndarray], groups: Iterable[Group] | None = None
) -> dict[str, np.ndarray]:
    """The leaves with the scales of all groups, or of these, folded in."""
    leaves, offsets = dict(dag.leaves), dict(graph.offsets)
    for group in graph.groups if groups is None else groups:
        for path, labels in group.leaves:
            leaves[path] = rescaled(
                leaves[path], labels.array, s[group.name], offsets.get(path, 0.0)
            )
    return leaves


def run(dag: Dag, leaves: Mapping[str, np.ndarray], inputs: Sequence[np.ndarray]) -> list[Step]:
    with np.errstate(all="ignore"):
        return evaluate(dag, leaves, inputs)


def same(a: object, b: object) -> bool:
    """Whether two values agree bit for bit."""
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f") for x, y in pairs)


def unchanged(dag: Dag, leaves: Mapping[str, np.ndarray]) -> bool:
    """Whether the program with these leaves returns what it returns with its own, on both
    inputs.
    """
    return all(
        all(map(same, run(dag, leaves, xs)[-1].operands, run(dag, dag.leaves, xs)[-1].operands))
        for xs in (dag.inputs, other_inputs(dag))
    )


def reached(dag: Dag, leaves: Mapping[str, np.ndarray]) -> set[str]:
    """The operations that a change of leaves reaches: those that read a value which it changes."""
    steps = zip(run(dag, leaves, dag.inputs), run(dag, dag.leaves, dag.inputs), strict=True)
    return {new.op for new, old in steps if not all(map(same, new.operands, old.operands))}


def check_sites(
    dag: Dag, graph: Graph, group: Group, leaves: Mapping[str, np.ndarray], s: np.ndarray
) -> None:
    """Fails unless what each site reads is divided by just the scales that the group's label map
    says.

    Statistics of the folded model are derived from these maps. Seen are matmuls of a leaf as it is,
    not of a view.
    """
    named, sites = (
        {id(x): path for path, x in dag.leaves.items()},
        {site.path: site for site in graph.sites},
    )
    runs = [
        run(dag, dag.leaves, dag.inputs),
        run(dag, leaves, dag.inputs),
        run(dag, dag.leaves, other_inputs(dag)),
    ]
    for old, new, other in zip(*runs, strict=True):
        for me in {"dot": (0, 1), "conv": (1,)}.get(old.op, ()):
            site = sites.get(named.get(id(old.operands[me]), ""))
            if site is None or same(old.operands[1 - me], other.operands[1 - me]):
                continue  # no site, or no activation
            if old.op == "dot":
                axes = [
                    axis for pair in old.params for axis in zip(pair[me], pair[1 - me], strict=True)
                ]
            else:  # the channels' axis of the image, whichever of the kernel's counts them
                axes = [(site.axes[0], old.params[0][0][1])]
            if not dict(axes).keys() >= {*site.batch, *site.axes}:
                continue  # the other product of a leaf that is w.T here: no place of its site
            factors = (
                np.concatenate([[1.0], s])[dict(group.sites)[site.path].array]
                if site.path in dict(group.sites)
                else 1.0
            )
            expected = old.operands[1 - me] / along(
                factors,
                [dict(axes)[a] for a in (*site.batch, *site.axes)],
                old.operands[1 - me].ndim,
            )
            assert same(new.operands[1 - me], expected), (
                f"the input of {site} has other scales: {group}\n{graph}\n{dag}"
            )


def along(factors: np.ndarray | float, axes: Sequence[int], ndim: int) -> np.ndarray | float:
    """An array as one of rank `ndim`, its axis i at `axes[i]`."""
    if np.ndim(factors) == 0:
        return factors
    spread = np.reshape(factors, np.shape(factors) + (1,) * (ndim - np.ndim(factors)))
    return np.moveaxis(spread, range(np.ndim(factors)), axes)


def check(dag: Dag, graph: Graph, rng: np.random.Generator) -> list[set[str]]:
    """Fails unless each group, and all of them at once, fold exactly; the operations that each
    group reaches.
    """
    s = {g.name: powers_of_two(rng, g.size, g.degree) for g in graph.groups}
    found = []
    for group in graph.groups:
        leaves = folded(dag, graph, s, [group])
        for path, labels in group.leaves:
            assert labels.array.any(), f"no label on {path} in {group}\n{dag}"
            assert not np.array_equal(leaves[path], dag.leaves[path]), (
                f"{path} stays as it was\n{dag}"
            )
        assert unchanged(dag, leaves), f"not exact: {group}\n{graph}\n{dag}"
        check_sites(dag, graph, group, leaves, s[group.name])
        found.append(reached(dag, leaves))
    names = [group.name for group in graph.groups]
    assert len(set(names)) == len(names), f"two groups of one site: {graph}\n{dag}"
    for group in graph.groups:
        assert any(group.name.split("[")[0] == path for path, _ in group.sites), (
            f"not named by a site: {graph}\n{dag}"
        )
    assert unchanged(dag, folded(dag, graph, s)), f"exact one by one, not together: {graph}\n{dag}"
    return found


# The bulk run -------------------------------------------------------------------------------------


def survey(seed: int, count: int, draw: Callable[..., Dag] = random_dag) -> Counter:
    """Checks `count` programs; how many groups and sites there were, and how many groups reached
    each operation.
    """
    tally: Counter = Counter()
    for number in range(count):
        dag = drawn(seed, number, draw)
        graph = find_graph(Survey.of(program_of(dag), {}))
        groups = check(dag, graph, np.random.default_rng([seed, number, 1]))
        tally.update(groups=len(groups), sites=len(graph.sites), refused=len(graph.refused))
        tally["absorbed by nothing"] += sum(not group.absorbers for group in graph.groups)
        tally.update(op for ops in groups for op in ops)
        tally.update(f"a program with {op}" for op in {node.op for node in dag.nodes})
    return tally


#: Operations that some group of 1200 programs must have reached: (operation, in how many groups at
#: least). Fewer programs reach a share of them.
REACHED = {
    "dot": 600,
    "broadcast": 250,
    "mul": 250,
    "slice": 200,
    "transpose": 150,
    "add": 100,
    "reshape": 80,
    "squeeze": 80,
    "scan": 60,
    "where": 50,
    "concatenate": 30,
    "pad": 25,
    "gather": 25,
    "gather, filled": 25,
    "expand": 25,
    "div": 20,
    "sub": 20,
    "neg": 20,
    "dynamic_slice": 20,
    "dynamic_update_slice": 20,
    "call": 20,
    "cumsum": 18,
    "gt": 15,
    "max": 15,
    "barrier": 15,
    "split": 15,
    "abs": 10,
    "rev": 10,
    "lt": 8,
    "cummax": 8,
    "relu": 6,
    "reduce_min": 4,
    "reduce_max": 5,
    "sum": 4,
    "bfloat16": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("programs", [100, pytest.param(1200, marks=pytest.mark.every_case)])
def test_every_fold_of_a_random_program_is_exact(programs):
    tally = survey(0, programs)
    assert tally["groups"] >= 0.8 * programs
    # An activation that is all padding, read through slices, is absorbed by nothing.
    assert tally["absorbed by nothing"] <= programs // 200
    # Half of an operation's share, because few programs scatter more.
    share = 1 if programs == 1200 else programs / 1200 / 2
    few = {op: tally[op] for op, least in REACHED.items() if tally[op] < int(share * least)}
    assert not few, f"groups reach these operations too seldom: {few} of {tally}"


@pytest.mark.slow
def test_every_fold_around_convolutions_is_exact():
    tally = survey(7, 24, random_image_dag)
    assert tally["groups"] >= 12
    assert tally["conv"] >= 12
    assert tally["pool"] >= 1


@pytest.mark.slow
@pytest.mark.every_case
def test_every_fold_around_many_convolutions_is_exact():
    tally = survey(8, 1000, random_image_dag)
    assert tally["conv"] >= 600
    assert tally["pool"] >= 40


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 2**16 - 1), max_size=TAPE))
@pytest.mark.slow
def test_every_fold_of_a_program_that_can_shrink_is_exact(tape):
    dag = random_dag(tape)
    check(dag, find_graph(Survey.of(program_of(dag), {})), np.random.default_rng(0))


# The oracle itself --------------------------------------------------------------------------------


@pytest.mark.slow
def test_numpy_and_jax_agree_on_the_programs():
    """In float64, up to rounding. A cast to bfloat16 or a comparison may tip over; such programs
    are few.
    """
    agree = 0
    draws = [random_dag] * 12 + [random_image_dag] * 6
    for number, draw in enumerate(draws):
        dag = drawn(1, number, draw)
        expected = run(dag, dag.leaves, dag.inputs)[-1].operands
        with jax.enable_x64(True):
            got = jax.jit(function(dag))(dag.leaves, *dag.inputs)
        got = got if isinstance(got, tuple) else (got,)
        assert [np.shape(x) for x in got] == [x.shape for x in expected]
        scale = max(
            np.abs(step.result).max()
            for step in run(dag, dag.leaves, dag.inputs)
            if is_number(step.result)
        )
        close = all(
            np.allclose(x, y, rtol=1e-9, atol=1e-12 * scale)
            for x, y in zip(got, expected, strict=True)
        )
        assert close, dag
        agree += close
    assert agree == len(draws)


def is_number(x: object) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.size > 0


@pytest.mark.slow
def test_a_wrong_fold_is_seen():
    """The oracle is not blind: with one leaf's labels forgotten, most folds are not exact."""
    wrong, seen = 0, 0
    for number in range(40):
        dag = drawn(2, number)
        graph = find_graph(Survey.of(program_of(dag), {}))
        for group in graph.groups:
            rng = np.random.default_rng(number)
            s = {group.name: powers_of_two(rng, group.size, group.degree)}
            for path, _ in group.leaves:
                leaves = folded(dag, graph, s, [group]) | {path: dag.leaves[path]}
                wrong += 1
                seen += not unchanged(dag, leaves)
    assert wrong > 30
    assert seen > 0.9 * wrong


@pytest.mark.slow
def test_a_search_without_its_certificate_is_caught():
    """The programs are hard enough: the search alone finds folds that are not exact, and the oracle
    sees them.
    """
    caught = 0
    with mock.patch.object(grouping, "certify", return_value=None):
        for number in range(200):
            if caught == 3:
                break
            dag = drawn(5, number)
            try:
                check(
                    dag, find_graph(Survey.of(program_of(dag), {})), np.random.default_rng(number)
                )
            except AssertionError:
                caught += 1
    assert caught == 3


@pytest.mark.slow
def test_fold_does_the_same_as_numpy():
    """Powers of two, and 1 + w for multiples of 1/64, are exact in float32 too."""
    compared = 0
    for number in range(8):
        dag = drawn(3, number)
        graph = find_graph(Survey.of(program_of(dag), {}))
        if not graph.groups:
            continue
        rngs = [np.random.default_rng(number) for _ in graph.groups]
        drawn_for = zip(graph.groups, rngs, strict=True)
        s = {g.name: powers_of_two(rng, g.size, g.degree) for g, rng in drawn_for}
        leaves = {path: jnp.asarray(x, jnp.float32) for path, x in dag.leaves.items()}
        got = sq.fold(leaves, graph, {name: jnp.asarray(x, jnp.float32) for name, x in s.items()})
        for path, x in folded(dag, graph, s).items():
            np.testing.assert_array_equal(got[path], x)
        compared += 1
    assert compared > 3


# The certificate under attack ---------------------------------------------------------------------


class Certified(NamedTuple):
    """Labels that the certificate has passed."""

    dag: Dag
    program: Program
    labels: dict


def certified(dag: Dag) -> list[Certified]:
    """What the search handed to the certificate, and was passed."""
    program, passed = program_of(dag), []

    def record(program, labels):
        problem = certify(program, labels)
        if problem is None:
            passed.append(Certified(dag, program, dict(labels)))
        return problem

    with mock.patch.object(grouping, "certify", record):
        find_graph(Survey.of(program, {}))
    return passed


def mutated(
    labels: np.ndarray, shape: Sequence[int], rng: np.random.Generator
) -> dict[str, np.ndarray | None]:
    """Label arrays that differ from the one given, by what was done to them."""
    channels = np.unique(np.abs(labels[labels != 0]))
    found: dict[str, np.ndarray | None] = {"dropped": None, "signs flipped": np.asarray(-labels)}
    if len(channels) > 1:
        a, b = rng.choice(channels, 2, replace=False)
        swap = np.arange(channels.max() + 1)
        swap[[a, b]] = b, a
        found["two channels swapped"] = np.asarray(np.sign(labels) * swap[np.abs(labels)])
        found["two channels tied"] = np.where(np.abs(labels) == a, np.sign(labels) * b, labels)
    one = np.broadcast_to(labels, shape).copy()
    place = tuple(rng.integers(0, n) for n in shape)
    one[place] = 0 if one[place] else rng.choice(channels)
    found["one element changed"] = one
    return found


def leaves_of(case: Certified, labels: Mapping) -> dict[str, np.ndarray] | None:
    """The leaves folded by labels; None where a leaf's variable is not simply that leaf (a layer of
    it, 1 + it).
    """
    paths = case.program.leaves
    touched = {v: paths[v] for v in {*labels, *case.labels} if v in paths}
    if any(sum(p == path for p in paths.values()) > 1 for path in touched.values()):
        return None
    size = max(int((np.abs(x) % DEGREE).max()) for x in (*labels.values(), *case.labels.values()))
    s = powers_of_two(np.random.default_rng(size), size, degree=8)
    changed = {
        path: rescaled(case.dag.leaves[path], labels[v], s)
        for v, path in touched.items()
        if v in labels
    }
    return {**case.dag.leaves, **changed}


def attack(case: Certified, rng: np.random.Generator) -> Counter:
    """How often the certificate refused a mutation of one variable's labels; fails if it passes a
    wrong one.
    """
    tally: Counter = Counter()
    if leaves_of(case, case.labels) is None:
        return tally
    variables = sorted(case.labels)
    leaves = [v for v in variables if v in case.program.leaves]
    some = rng.choice(variables, min(3, len(variables)), replace=False)
    for var in {*leaves, *map(Var, some.tolist())}:
        for how, array in mutated(case.labels[var], case.program.shape(var), rng).items():
            labels = {v: x for v, x in case.labels.items() if v != var} | (
                {} if array is None else {var: array}
            )
            refused = certify(case.program, labels) is not None
            exact = labels and unchanged(case.dag, leaves_of(case, labels))
            assert refused or exact, (
                f"{how} at {var}, of {case.program.leaves}: {case.labels[var]}\n{case.dag}"
            )
            tally[how, "refused" if refused else "passed"] += 1
            tally["wrong"] += not exact
    return tally


@pytest.mark.slow
@pytest.mark.parametrize("programs", [10, pytest.param(100, marks=pytest.mark.every_case)])
def test_the_certificate_refuses_mutated_labels(programs):
    tally: Counter = Counter()
    for number in range(programs):
        for case in certified(drawn(4, number)):
            tally += attack(case, np.random.default_rng([4, number]))
    assert tally["wrong"] > 2 * programs, tally
    for how in (
        "dropped",
        "signs flipped",
        "two channels swapped",
        "two channels tied",
        "one element changed",
    ):
        assert tally[how, "refused"] > programs // 2, tally
        assert tally[how, "refused"] > 20 * tally[how, "passed"], tally
