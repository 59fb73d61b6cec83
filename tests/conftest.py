"""Strictness for every test: no silent dtype or rank promotion (a marker relaxes it for Hugging Face's classes)."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict(request):
    """Silent int8 -> float promotion fails here instead of hiding in a result."""
    if request.node.get_closest_marker("huggingface"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
