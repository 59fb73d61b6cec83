"""Warnings name the line of the user's program, however deep in the package they arise."""

from pathlib import Path

import jax.numpy as jnp
import pytest

import sqjax as sq

PACKAGE = str(Path(sq.__file__).parent)


def calibrate(**options):
    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((2, 3))}
    fn = lambda p, x: (x @ p["w"], 0 * x @ p["v"])
    return sq.calibrate(fn, params, [jnp.ones((4, 2))], **options)


@pytest.mark.parametrize("text", ["every activation was zero at v", "less than 32 tokens reached"])
def test_a_warning_shows_the_line_that_called_the_package(text):
    with pytest.warns(UserWarning, match=text) as warned:
        calibrate()
    [one] = [w for w in warned if text in str(w.message)]
    # Here beartype stands between this file and the package, and is the caller.
    assert not one.filename.startswith(PACKAGE), one.filename
    assert one.filename == __file__ or one.filename.startswith("<@beartype(sqjax.calibration.cal")
