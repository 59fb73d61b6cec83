"""Warnings name the line of the user's program, however deep in the package they arise."""

import inspect

import jax.numpy as jnp
import pytest

import sqjax as sq


def test_a_warning_shows_the_line_that_called_the_package():
    params = {"gain": jnp.ones((1, 2)), "w": jnp.zeros((2, 3)), "v": jnp.ones((2, 3))}
    fn = lambda p, x: ((x * p["gain"]) @ p["w"], 0 * x @ p["v"])
    texts = "every activation was zero at v", "all weights are zero behind w"
    calibrate = inspect.unwrap(sq.calibrate)  # without the checks of types around it
    with pytest.warns(UserWarning, match="|".join(texts)) as warned:
        calibrate(fn, params, [jnp.ones((4, 2))])
    assert [one.filename for one in warned] == [__file__, __file__]
