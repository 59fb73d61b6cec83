"""Strictness for every test: no silent dtype or rank promotion (a marker relaxes it for Hugging Face's classes).

The processor plays four devices, for the tests of sharding; everything else stays on the first.
"""

import gc
import os

import jax
import pytest

# Where the CUDA plug-in is installed (test_gpu.py compiles with it) jax, here and in the processes that tests start,
# must not look for a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 4)

# Nearly three quarters of the tests' time is compiling. XLA's own passes all run: what is int8 in the compiled program
# is what users get. LLVM's, after them, do not: with JAX_DISABLE_MOST_OPTIMIZATIONS=0 they do, and the tests take half
# as long again. jax 0.10 can do without the emitters that take most of the rest; newer ones are tested with theirs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
if jax.__version_info__ < (0, 11) and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

# What is compiled stays in memory: looking through it for garbage again and again takes a twentieth of the time.
gc.set_threshold(100_000, 20, 100)


@pytest.fixture(autouse=True)
def strict(request):
    """Silent int8 -> float promotion fails here instead of hiding in a result."""
    if request.node.get_closest_marker("huggingface"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
