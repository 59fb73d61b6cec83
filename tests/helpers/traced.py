"""Arrays and traced programs for tests of folding."""

import jax.numpy as jnp
import numpy as np

from sqjax.calibration.analysis import shared_arrays
from sqjax.folding.find_graph import find_graph
from sqjax.folding.find_spaces import find_spaces
from sqjax.folding.groups import Survey
from sqjax.program.facts import Program
from sqjax.program.trace import trace


def normal(*shape, seed=0, dtype=jnp.float32):
    """Normal numbers of this shape, always the same."""
    drawn = np.random.default_rng([seed, *shape]).normal(size=shape)
    # Cast by numpy, because jax compiles a program for each shape.
    return jnp.asarray(np.asarray(drawn).astype(dtype))


def program_of(fn, params, *args):
    return Program(trace(fn, params, args, {})[0])


def graph_of(fn, params, *args):
    return find_graph(Survey.of(program_of(fn, params, *args), shared_arrays(params)))


def spaces_of(fn, params, *args):
    survey = Survey.of(program_of(fn, params, *args), shared_arrays(params))
    return find_spaces(survey).spaces
