"""What `calibrate` says of a model, one array, a loader's pairs or a list in place of its arguments."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax as sq

PARAMS = {"w": jnp.ones((6, 3))}
X = jnp.ones((5, 6))


def fn(p, x):
    return x @ p["w"]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    ("function", "batches", "match"),
    [
        (Layer(), [X], r"got a model \(Layer\); pass lambda p, \*batch: model.apply\(p, \*batch\)"),
        (fn, X, r"got one, of shapes \(5, 6\).*did you mean \[batch\]"),
        (fn, {"x": X}, r"got one, of shapes \{'x': \(5, 6\)\}.*did you mean \[batch\]"),
        (fn, [(X, jnp.ones(5))], r"this tuple gives fn 2 of them; .*\(\(x,\) for x, y in loader\)"),
        (fn, [np.ones((5, 6)).tolist()], r"a list of 30 numbers is compiled.*np\.asarray"),
    ],
)
def test_wrong_arguments_are_told(function, batches, match):
    with pytest.raises(ValueError, match=match):
        sq.calibrate(function, PARAMS, batches)


def test_values_of_lists_are_not_printed():
    with pytest.raises(ValueError, match=r"failed on inputs of shapes \(\(5, 6\), \[3 numbers\]\)"):
        sq.calibrate(fn, PARAMS, [(X, [1, 2, 3])])
