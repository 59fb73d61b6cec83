"""Times of calls: by a clock around them, and from a profile the kernels' own.

A call that is waited for shows the host too, which takes about 0.1 ms to launch one program; with a
few rows a GPU computes faster than that. So kernels are timed by the profiler's device trace.
"""

import itertools
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sqjax.commands.gpu.notes import Notes, on_gpu

#: One timed call; its argument is the call's number, for what takes turns.
Call = Callable[[int], Any]
#: Runs are told apart in one trace by idle gaps of so many seconds.
GAP = 0.03
#: Programs that are compiled at once.
AT_ONCE = 12


class Kernel(NamedTuple):
    """A kernel of one call.

    Attributes:
        name: as the profiler has it.
        launches: in one call.
        microseconds: of all of them.
    """

    name: str
    launches: float
    microseconds: float


class Event(NamedTuple):
    """Something that ran on the device, in microseconds."""

    start: float
    length: float
    name: str


def compiled(
    jobs: Mapping[str, tuple[Any, tuple[Any, ...]]], notes: Notes
) -> dict[str, Any]:
    """{name: program} of {name: (jitted, arguments)}; those that fail are noted.

    All are awaited, because one that is still being tuned would run beside what is timed.
    """
    programs, pending = {}, {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, (run, arguments) in jobs.items():
            try:
                pending[name] = pool.submit(run.lower(*arguments).compile)
            except Exception as error:
                notes.failed(name, error)
        for name, future in pending.items():
            try:
                programs[name] = future.result()
            except Exception as error:
                notes.failed(name, error)
    return programs


def alone(call: Call, repeats: int) -> float:
    """Median seconds of calls that are waited for one by one; the first is not counted."""
    seconds = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call(number))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def queued(call: Call, repeats: int) -> float:
    """Mean seconds of calls that are launched without waiting."""
    jax.block_until_ready(call(0))
    start = time.perf_counter()
    jax.block_until_ready([call(number) for number in range(repeats)])
    return (time.perf_counter() - start) / repeats


def kernels(calls: Mapping[str, Call], repeats: int) -> dict[str, list[Kernel]]:
    """{name: its kernels, the longest first} of calls that have run before, in one trace."""
    runs = runs_of(_trace(calls, repeats))
    if len(runs) == len(calls):
        return {
            name: _summed(events, repeats)
            for name, events in zip(calls, runs, strict=True)
        }
    if len(calls) == 1 or not on_gpu():
        # On a CPU pauses tell nothing apart: the figures of a tiny run mean nothing anyway.
        whole = list(itertools.chain.from_iterable(runs))
        return {name: _summed(whole, repeats) for name in calls}
    return {
        name: kernels({name: call}, repeats)[name]
        for name, call in calls.items()
    }


def _trace(calls: Mapping[str, Call], repeats: int) -> list[Event]:
    """What the device did while each call ran so many times, by start."""
    folder = tempfile.mkdtemp()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1 if on_gpu() else 2
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        for call in calls.values():
            time.sleep(GAP)
            jax.block_until_ready([call(number) for number in range(repeats)])
    finally:
        time.sleep(GAP)
        jax.profiler.stop_trace()
    try:
        return sorted(_events(Path(folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _events(folder: Path) -> Iterator[Event]:
    """The kernels and copies of a trace: on a GPU those of its streams."""
    plane_name = "/device:GPU" if on_gpu() else "/host:CPU"
    in_name = "Stream" if on_gpu() else "tf_"
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith(plane_name):
                continue
            for line in plane.lines:
                if in_name in line.name:
                    for event in line.events:
                        yield Event(
                            event.start_ns / 1e3,
                            event.duration_ns / 1e3,
                            event.name,
                        )


def runs_of(events: Sequence[Event]) -> list[list[Event]]:
    """Events in runs, between which nothing ran for half a gap."""
    runs: list[list[Event]] = []
    end = -float("inf")
    for event in events:
        if event.start - end > GAP / 2 * 1e6:
            runs.append([])
        runs[-1].append(event)
        end = max(end, event.start + event.length)
    return runs


def _summed(events: Sequence[Event], repeats: int) -> list[Kernel]:
    """Events as kernels of one call, the longest first."""
    lengths = defaultdict(list)
    for event in events:
        lengths[event.name].append(event.length)
    found = [
        Kernel(name, len(of_name) / repeats, sum(of_name) / repeats)
        for name, of_name in lengths.items()
    ]
    return sorted(found, key=lambda kernel: -kernel.microseconds)


def timed(of_call: Sequence[Kernel], seconds: float) -> dict[str, Any]:
    """The microseconds of one call's kernels, as a row's "us"; and those of queued calls.

    Where the profile saw no kernel, "us" is that of the calls, and a note says so.
    """
    wall = 1e6 * seconds
    us = sum(kernel.microseconds for kernel in of_call)
    if us:
        return {"us": us, "wall_us": wall}
    note = "no kernel in the profile: these are calls"
    return {"us": wall, "wall_us": wall, "note": note}
