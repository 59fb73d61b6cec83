"""Warnings name the line of the user's program, however deep in the package they arise."""

from pathlib import Path

import jax.numpy as jnp
import pytest

import sqjax as sq

PACKAGE = str(Path(sq.__file__).parent)


def test_a_warning_shows_the_line_that_called_the_package():
    params = {"gain": jnp.ones((1, 2)), "w": jnp.zeros((2, 3)), "v": jnp.ones((2, 3))}
    fn = lambda p, x: ((x * p["gain"]) @ p["w"], 0 * x @ p["v"])
    texts = "every activation was zero at v", "all weights are zero behind w"
    with pytest.warns(UserWarning, match="|".join(texts)) as warned:
        sq.calibrate(fn, params, [jnp.ones((4, 2))])
    assert len(warned) == 2
    for one in warned:
        # In this session beartype stands between this file and the package, and is the caller.
        checked = one.filename.startswith("<@beartype(sqjax.calibration.calibrate.calibrate)")
        assert checked or one.filename == __file__, one.filename
        assert not one.filename.startswith(PACKAGE)
