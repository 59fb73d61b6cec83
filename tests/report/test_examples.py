"""The examples of `sqjax.report` and `sqjax.plots` give what they say."""

import doctest

import jax
import pytest

from sqjax import plots, report

FUNCTIONS = [
    *(plots.surface, plots.channels, plots.outliers, plots.errors, plots.alphas, plots.tradeoff),
    *(report.inspect, report.measure, report.html),
]


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_example_of_a_function_runs(function):
    name = function.__name__
    [test] = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert any(example.want for example in test.examples)
    said = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)
