"""Times of functions that take turns, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tqdm.auto import tqdm


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, description: str
) -> dict[str, float]:
    """{name: median seconds} of functions that are called in turn, after a first call each that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(repeats + 1), desc=description, unit="round", leave=False):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
