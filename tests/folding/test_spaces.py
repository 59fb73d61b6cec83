"""Spaces: those found are those that a reader finds, turning them changes no output, and the
certificate passes no other one.
"""

from collections import Counter
from functools import cache
from unittest import mock

import jax
import numpy as np
import pytest
from lawful_spaces import CASES
from space_members import accepted
from traced import program_of, shared_arrays
from turning import mutations, turned, written
from unlawful_spaces import UNLAWFUL

from sqjax.folding.find_spaces import find_spaces
from sqjax.folding.groups import Survey
from sqjax.folding.space_rules import SPACE_RULES
from sqjax.models import LlamaConfig, Model

EVERY = {**CASES, **UNLAWFUL}


@cache
def program(name):
    case = EVERY[name]
    with jax.numpy_rank_promotion("allow"):
        return program_of(case.fn, case.params, *case.inputs)


@cache
def found(name):
    return find_spaces(Survey.of(program(name), shared_arrays(EVERY[name].params)))


@pytest.mark.parametrize("name", CASES)
def test_those_found_are_those_that_a_reader_finds(name):
    assert sorted(map(written, found(name).spaces)) == sorted(CASES[name].spaces)


# Turned -------------------------------------------------------------------------------------------


@cache
def compiled():
    """All programs as one, which is compiled once."""

    def run(params, inputs):
        return {name: case.fn(params[name], *inputs[name]) for name, case in EVERY.items()}

    return jax.jit(run)


def outputs(changed, dtype):
    """The outputs of all programs, with changed parameters of some."""
    params = {name: changed.get(name, case.params) for name, case in EVERY.items()}
    inputs = {name: case.inputs for name, case in EVERY.items()}
    cast = lambda x: x.astype(dtype) if x.dtype == float else x
    with jax.enable_x64(dtype == "float64"), jax.numpy_rank_promotion("allow"):
        out = compiled()(jax.tree.map(cast, params), jax.tree.map(cast, inputs))
        return {name: jax.tree.map(np.asarray, y) for name, y in out.items()}


def distance(a, b):
    """The largest difference relative to the largest output; infinite where one is not finite."""
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(y)]) for y in (a, b))
    if not np.isfinite(b).all():
        return np.inf
    return np.abs(a - b).max() / np.abs(a).max()


@cache
def before(dtype):
    return outputs({}, dtype)


def distances(changed, dtype="float64"):
    after = outputs(changed, dtype)
    return {name: distance(before(dtype)[name], after[name]) for name in changed}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param("float32", 1e-5, marks=[pytest.mark.slow, pytest.mark.every_case]),
        ("float64", 1e-10),
    ],
)
def test_turning_them_changes_no_output(dtype, tolerance):
    changed = {name: turned(case.params, found(name).spaces) for name, case in CASES.items()}
    for name, far in distances(changed, dtype).items():
        assert far < tolerance, name
        same = jax.tree.map(np.array_equal, changed[name], CASES[name].params)
        assert not found(name).spaces or not all(jax.tree.leaves(same)), name


# Refused ------------------------------------------------------------------------------------------


def test_there_are_thirty_unlawful_ones_and_more():
    assert len(UNLAWFUL) >= 30


@pytest.mark.parametrize("name", UNLAWFUL)
def test_the_search_does_not_find_an_unlawful_space(name):
    [space] = UNLAWFUL[name].spaces
    ours = {(s.size, frozenset(s.leaves)) for s in map(written, found(name).spaces)}
    if (space.size, frozenset(space.leaves)) in ours:  # with other conditions then
        assert space not in map(written, found(name).spaces)


@pytest.mark.parametrize("name", UNLAWFUL)
def test_the_certificate_alone_refuses_it(name):
    [space] = UNLAWFUL[name].spaces
    assert not accepted(program(name), space)


def test_unlawful_spaces_would_change_the_outputs():
    changed = {name: turned(case.params, case.spaces) for name, case in UNLAWFUL.items()}
    for name, far in distances(changed).items():
        assert far > 1e-4, name


# Mutations ----------------------------------------------------------------------------------------


def test_the_certificate_passes_no_unlawful_mutation():
    """A few mutations are lawful: five of the six channels of a residual turn alone as well."""
    refused, passed = 0, []
    for name, case in CASES.items():
        for space in case.spaces:
            assert accepted(program(name), space)
            for mutant in {*mutations(space)} - {space}:
                if accepted(program(name), mutant):
                    passed.append((name, mutant))
                else:
                    refused += 1
    assert refused > 1000
    assert len(passed) < refused / 20
    for name, mutant in passed:
        [far] = distances({name: turned(CASES[name].params, [mutant])}).values()
        assert far < 1e-10, (name, mutant)


# Work ---------------------------------------------------------------------------------------------


def llama(layers):
    """A decoder of 8B's shapes, without a number."""
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    config = LlamaConfig(**sizes, **heads, num_layers=layers, tie_embeddings=False, max_length=64)
    return Model(config)


def visited(layers):
    """How many equations the searches visit, and the spaces that they find."""
    model = llama(layers)
    params = jax.eval_shape(model.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, 16), np.int32)
    survey = Survey.of(program_of(model.apply, params, ids), {})
    visits = Counter()

    def counted(name, rule):
        def counting(search, equation):
            visits[name] += 1
            rule(search, equation)

        return counting

    rules = {name: counted(name, rule) for name, rule in SPACE_RULES.items()}
    with mock.patch("sqjax.folding.find_spaces.SPACE_RULES", rules):
        spaces = find_spaces(survey).spaces
    return visits.total(), spaces


def test_the_work_is_linear_in_the_layers():
    (two, _), (four, spaces), (eight, _) = map(visited, (2, 4, 8))
    assert [space.size for space in spaces] == [4096, *[128] * 4]
    assert eight - four == 2 * (four - two)


@pytest.mark.slow
def test_a_model_of_32_layers_has_33_spaces():
    _, spaces = visited(32)
    assert [len(space.leaves) for space in spaces] == [226, *[2] * 32]
