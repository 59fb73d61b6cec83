"""Strictness for every test: no silent dtype or rank promotion (a marker relaxes it for Hugging Face's classes).

The processor plays four devices, for the tests of sharding; everything else stays on the first.
"""

import gc
import os
from pathlib import Path

import jax
import pytest

# Where the CUDA plug-in is installed (test_gpu.py compiles with it) jax, here and in the processes that tests start,
# must not look for a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 4)

# Nearly three quarters of the tests' time is compiling, so most of what works on machine code is left out: LLVM's
# optimizations, which come after XLA's passes; and on jax 0.10 the fusion emitters, without which XLA fuses a little
# otherwise (newer ones can not leave them out). So a test of compiled text sees on jax 0.10 nearly what users get.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 leaves nothing out.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update(
    "jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
)
# One piece of machine code a program: cutting it for several threads costs more than they save where it is so small.
flags = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11) and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

# What is compiled stays in memory: looking through it for garbage again and again takes a twentieth of the time.
gc.set_threshold(100_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption(
        "--every-case",
        action="store_true",
        help="also every case of long tables (each scheme times each shape, ...)",
    )


def pytest_configure(config):
    """What one run compiles the next one finds in pytest's cache, and takes a third of the time.

    An entry belongs to a program, a jax and a machine, so none is ever stale. `--cache-clear` removes them. The
    processes that tests start share it.
    """
    if not hasattr(config, "cache"):
        return  # -p no:cacheprovider
    settings = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ.setdefault(name.upper(), str(value))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--every-case"):
        return
    every, others = [], []
    for item in items:
        (every if item.get_closest_marker("every_case") else others).append(item)
    spare = {*every, *all_but_the_last_case(others)}
    config.hook.pytest_deselected(items=[item for item in items if item in spare])
    items[:] = [item for item in items if item not in spare]


def all_but_the_last_case(items):
    """Of each test that is slow as a whole the cases before the last one, unless `each_case` marks it."""
    cases = {}
    for item in items:
        own = {mark.name for mark in item.iter_markers()}
        whole = {mark.name for mark in getattr(item.obj, "pytestmark", [])}
        if "slow" in whole and "each_case" not in own:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [case for of_one in cases.values() for case in of_one[:-1]]


@pytest.fixture(autouse=True, scope="module")
def forget():
    """After a file, what was compiled is given back if there is much of it.

    Each program takes memory maps, of which Linux gives a process 65,530: without this a whole run takes many
    gigabytes and ends in a segmentation fault. A program takes about 20 maps and 0.8 MB, and a file has hundreds of
    programs at most. What is given back has to be traced and read anew by the next file that needs it, and looking
    for garbage takes a second, so not after every file.
    """
    yield
    if memory_maps() > 35_000:
        jax.clear_caches()
        gc.collect()


def memory_maps():
    """How many this process has; many where that can not be read."""
    try:
        return len(Path("/proc/self/maps").read_text().splitlines())
    except OSError:
        return 10**6


@pytest.fixture(autouse=True)
def strict(request):
    """Silent int8 -> float promotion fails here instead of hiding in a result."""
    if request.node.get_closest_marker("huggingface"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
