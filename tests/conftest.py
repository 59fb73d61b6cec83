"""Strictness for every test: no silent dtype or rank promotion (a marker relaxes it for Hugging Face's classes).

The processor plays four devices, for the tests of sharding; everything else stays on the first.
"""

import os

import jax
import pytest

# Where the CUDA plug-in is installed (test_gpu.py compiles with it) jax, here and in the processes that tests start,
# must not look for a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(autouse=True)
def strict(request):
    """Silent int8 -> float promotion fails here instead of hiding in a result."""
    if request.node.get_closest_marker("huggingface"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
