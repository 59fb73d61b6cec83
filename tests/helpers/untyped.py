"""Calls as users make them: while tests run, beartype refuses an argument of a wrong type before we can."""

import contextlib

from jaxtyping import config


@contextlib.contextmanager
def untyped():
    """No type of an argument is enforced inside."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
