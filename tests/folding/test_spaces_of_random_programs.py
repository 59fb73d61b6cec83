"""Random programs: turning a space that is found changes no output, nor one that the certificate
passes of those that are claimed at random.

Programs come from the grammar in `random_programs`, and run in NumPy in float64 (`dags`).
"""

from unittest import mock

import dags
import numpy as np
import pytest
from random_programs import numbers, random_dag
from space_members import accepted
from traced import program_of
from turning import mutations, turned, written

from sqjax.folding.find_spaces import find_spaces
from sqjax.folding.groups import Survey
from sqjax.folding.space import Along, Space

#: In float64, because a rotation changes the order of sums, and rounding would show it.
EXACT = {"bfloat16": (lambda _, x: x, dags.OPERATIONS["bfloat16"][1])}


def claims(rng, dag, spaces):
    """Spaces with one thing changed, and some of the leaves with an axis of one size."""
    for space in map(written, spaces):
        mutants = sorted({*mutations(space)} - {space})
        yield from (mutants[i] for i in rng.integers(0, len(mutants), 6))
    axes = [(path, Along(i), n) for path, x in dag.leaves.items() for i, n in enumerate(x.shape)]
    for _ in range(6):
        size = axes[rng.integers(len(axes))][2] if axes else 1
        of_size = [(path, along) for path, along, n in axes if n == size]
        leaves = tuple(leaf for leaf in of_size if rng.random() < 0.6)
        gains = tuple(path for path in dag.leaves if rng.random() < 0.3)
        if size > 1 and leaves:
            yield Space("", size, leaves, gains, bool(rng.integers(2)))


def with_gains_of_ones(dag, program, space):
    """The leaves, of which those that must be ones are; c + w must be one in w's place."""
    offsets = {program.leaves[var]: constant for var, constant in program.offsets.items()}
    leaves = dict(dag.leaves)
    for path in space.gains:
        leaves[path] = np.full(leaves[path].shape, 1.0 - offsets.get(path, 0.0))
    return leaves


def returned(dag, leaves, inputs):
    with np.errstate(all="ignore"), mock.patch.dict(dags.OPERATIONS, EXACT):
        return [np.asarray(x, float) for x in dags.evaluate(dag, leaves, inputs)[-1].operands]


def check_unchanged(dag, program, space):
    leaves = with_gains_of_ones(dag, program, space)
    x, ids = dag.inputs
    for inputs in ([x, ids], [numbers(12, size=x.shape), 1 - ids]):
        pairs = zip(
            returned(dag, leaves, inputs),
            returned(dag, turned(leaves, [space]), inputs),
            strict=True,
        )
        for before, after in pairs:
            size = np.abs(before[np.isfinite(before)]).max(initial=1)
            np.testing.assert_allclose(after, before, rtol=0, atol=1e-9 * size, err_msg=str(space))


@pytest.mark.parametrize(
    "programs",
    [
        pytest.param(range(100, 4000), marks=[pytest.mark.slow, pytest.mark.every_case]),
        range(100),
    ],
    ids=["many", "some"],
)
def test_what_is_found_or_passes_changes_no_output(programs):
    found = passed = refused = 0
    for number in programs:
        rng = np.random.default_rng([5, number])
        dag = random_dag(rng.integers(0, 2**16, 200))
        if "sign" in {node.op for node in dag.nodes}:
            continue  # the sign of a sum that is zero is that of its rounding
        program = program_of(dags.function(dag), dag.leaves, *dag.inputs)
        spaces = find_spaces(Survey.of(program, {})).spaces
        found += len(spaces)
        passing = [claim for claim in claims(rng, dag, spaces) if accepted(program, claim)]
        passed += len(passing)
        refused += not passing
        for space in (*spaces, *passing):
            check_unchanged(dag, program, space)
    assert found > len(programs) / 3
    assert passed > len(programs) / 10
    assert refused > len(programs) / 3
