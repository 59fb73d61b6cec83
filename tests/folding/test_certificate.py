"""The certificate against a search that is wrong. Its laws for movements are tested in
test_movements.
"""

import ast
import inspect
import re
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sqjax.folding import certificate, claims, convolution_laws, laws, moves
from sqjax.folding.find_graph import find_graph
from sqjax.folding.groups import Survey
from sqjax.folding.rules import RULES
from sqjax.program.facts import Program
from sqjax.program.primitives import IDENTITIES
from sqjax.program.trace import trace


def test_the_certificate_shares_no_code_with_the_search():
    imported = set()
    proof = (certificate, claims, convolution_laws, laws)
    for module in proof:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom):
                imported |= {(node.module, name.name) for name in node.names}
    of_this_room = {pair for pair in imported if pair[0].startswith("sqjax.folding")}
    # Of the search's own files only how a label is written.
    own = {module.__name__ for module in proof}
    elsewhere = {pair for pair in of_this_room if pair[0] not in own}
    assert elsewhere == {("sqjax.folding.labels", "DEGREE")}
    assert set(laws.LAWS) == set(RULES)


def every_movement(p, x):
    """An activation of four channels that goes through every movement on its way to a matmul."""
    h = x * p["gain"][None]
    h = lax.transpose(lax.reshape(h, (3, 2, 2)), (1, 2, 0))  # (2, 2, 3)
    h = lax.rev(lax.slice(h, (0, 0, 0), (2, 2, 2)), (1,))
    h = lax.squeeze(lax.broadcast_in_dim(h, (1, 2, 2, 2), (1, 2, 3)), (0,))
    h = lax.reshape(lax.transpose(h, (2, 0, 1)), (2, 4))
    h = jnp.tile(h, (2, 1))
    for part in (lax.real, lax.imag):
        h = part(lax.fft(h.astype(jnp.complex64).T, "FFT", (4,))).T
    h = lax.cummin(lax.cummax(lax.cumsum(h, 0), 0), 0)
    h = lax.dynamic_slice(h, (jnp.int32(x[0, 0] > 0), jnp.int32(0)), (1, 4))
    h = h[(x[:2, 0] > 0).astype(jnp.int32)]
    h = lax.reduce_precision(jnp.abs(-h), 8, 7)
    return h.astype(jnp.bfloat16).astype(jnp.float32) @ p["w"]


@pytest.fixture(scope="module")
def survey():
    params = {"gain": jnp.ones(4), "w": jnp.ones((4, 5))}
    return Survey.of(Program(trace(every_movement, params, (jnp.ones((3, 4)),), {})[0]), {})


def exchanged(labels, step):
    """Labels in which each of the four channels has become the next one (or with -1 the one
    before).
    """
    channels = (np.abs(labels) - 1 + step) % 4
    return np.where(labels == 0, 0, np.sign(labels) * (channels + 1))


def test_every_movement_of_the_search_is_certified(survey):
    assert [(g.size, g.absorbers) for g in find_graph(survey).groups] == [(4, ("gain",))]


@pytest.mark.parametrize("name", sorted(set(moves.MOVES) - set(IDENTITIES)))
@pytest.mark.slow
def test_a_wrong_movement_of_the_search_is_refused(survey, name):
    """Wrong both ways, so that the search is at one with itself: only the certificate can tell."""
    move, undo = moves.MOVES[name], moves.UNDO[name]

    def wrong_move(labels, *args):
        return exchanged(move(labels, *args), 1)

    def wrong_undo(labels, *args):
        return undo(exchanged(labels, -1), *args)

    with (
        mock.patch.dict(moves.MOVES, {name: wrong_move}),
        mock.patch.dict(moves.UNDO, {name: wrong_undo}),
    ):
        graph = find_graph(survey)
    assert not graph.groups
    assert re.search(rf"`{name}` at .* does not pass the scale on", dict(graph.refused)["w"])
