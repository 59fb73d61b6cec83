"""Warnings that name the user's line, however deep in this package they arise."""

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

#: What the names of this package's files begin with, and no other package's.
_HERE = f"{Path(__file__).parent}{os.sep}"


def warn(text: str) -> None:
    """A UserWarning at the line that called this package: `quantize(...)`, in a user's program."""
    warnings.warn(text, stacklevel=_level_of_the_caller(sys._getframe()))


def _level_of_the_caller(frame: FrameType | None) -> int:
    """How many calls up from `frame` the outermost function of this package was called; 1 is
    `frame` itself.

    The outermost, because jax, or a function of the user's, may stand in between.
    """
    level = outermost = 1
    while frame is not None:
        if frame.f_code.co_filename.startswith(_HERE):
            outermost = level
        frame, level = frame.f_back, level + 1
    return outermost + 1
