"""Hugging Face's Flax classes, which transformers 5 has no more."""

import pytest


def flax_transformers():
    """The package; skips the test, or the module that calls it, where it has no Flax classes."""
    found = pytest.importorskip("transformers")
    if not hasattr(found, "FlaxPreTrainedModel"):
        pytest.skip("transformers 5 has no Flax classes", allow_module_level=True)
    return found
