"""Strictness for every test: no silent dtype or rank promotion (a marker relaxes it for Hugging Face's classes).

The processor plays four devices, for the tests of sharding; everything else stays on the first.
"""

import os
import tempfile

import jax
import pytest

# Where the CUDA plug-in is installed (test_gpu.py compiles with it) jax, here and in the processes that tests start,
# must not look for a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 4)
# Most of the time goes into compiling, and often the same program again: a new function for each test, one HLO for all.
# Each worker compiles a program once in a run; nothing is kept for the next run, or shared with another process.
PROGRAMS = tempfile.TemporaryDirectory(prefix="sqjax-programs-", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they would change the options of GPU programs


def pytest_unconfigure(config):
    PROGRAMS.cleanup()


@pytest.fixture(autouse=True)
def strict(request):
    """Silent int8 -> float promotion fails here instead of hiding in a result."""
    if request.node.get_closest_marker("huggingface"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
