"""Times of functions that take turns, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tqdm.auto import tqdm


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    description: str,
    progress: bool = True,
) -> dict[str, float]:
    """{name: median seconds of a call}, from rounds in which every function is called once.

    One round more than `repeats` is run: the first is not counted, because first calls compile.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rounds = range(repeats + 1)
    shown = tqdm(
        rounds, description, unit="round", leave=False, disable=not progress
    )
    for number in shown:
        for name, run in runs.items():
            start = time.perf_counter()
            # Because jax returns before the result is there.
            jax.block_until_ready(run())
            elapsed = time.perf_counter() - start
            if number > 0:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}
