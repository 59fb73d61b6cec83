"""PyTorch's products of the same shapes, for `matmul`; it loads no jax.

    python -m sqjax.commands.gpu.beside_torch '{"shapes": [[4096, 1024]], "rows": [16], "bytes": 0}'

Each line that it prints is a row. The times are those of a CUDA graph, so without the host's.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: `torch._int_mm` takes no fewer rows.
INT_ROWS = 17
#: Calls in one graph, and how often it is played.
CALLS, PLAYED = 12, 7


def main(asked: dict[str, Any]) -> None:
    """Prints a row for each product."""
    try:
        import torch
    except ImportError:
        _row("torch", {"note": "not installed"})
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _row("torch", {"version": torch.__version__, "device": device})
    torch.manual_seed(0)
    for shape in asked["shapes"]:
        for rows in asked["rows"]:
            for name, run, weights in _products(
                torch, device, rows, shape, asked["bytes"]
            ):
                us = _microseconds(torch, device, run, weights)
                operations = 2.0 * rows * shape[0] * shape[1] / us / 1e6
                full = f"{rows}x{shape[0]}x{shape[1]} torch {name}"
                _row(full, {"us": us, "tera_ops": operations})


def _row(name: str, figures: dict[str, Any]) -> None:
    print(json.dumps({"name": name, **figures}), flush=True)


def _products(
    torch: Any, device: str, rows: int, shape: Sequence[int], nbytes: int
) -> Iterator[tuple[str, Callable[[Any], Any], list[Any]]]:
    """(name, a product with a weight, the weights that take turns), one after the other."""
    inputs, outputs = shape
    wide = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    yield "bf16", lambda w: x @ w.T, _in_turn(wide, nbytes)
    if rows < INT_ROWS:
        return
    codes = torch.randint(
        -127, 128, (outputs, inputs), device=device, dtype=torch.int8
    )
    x8 = torch.randint(
        -127, 128, (rows, inputs), device=device, dtype=torch.int8
    )
    yield "_int_mm", lambda w: torch._int_mm(x8, w.T), _in_turn(codes, nbytes)


def _in_turn(weight: Any, nbytes: int) -> list[Any]:
    size = weight.numel() * weight.element_size()
    return [weight, *(weight.clone() for _ in range(min(12, nbytes // size)))]


def _microseconds(
    torch: Any, device: str, run: Callable[[Any], Any], weights: list[Any]
) -> float:
    """The mean time of one of several calls, the median of several rounds."""
    if device == "cpu":
        return _on_a_cpu(run, weights)
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for weight in weights:
            run(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            run(weights[call % len(weights)])
    milliseconds = []
    for _ in range(PLAYED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end) / CALLS)
    return 1e3 * statistics.median(milliseconds)


def _on_a_cpu(run: Callable[[Any], Any], weights: list[Any]) -> float:
    seconds = []
    for _ in range(PLAYED):
        start = time.perf_counter()
        run(weights[0])
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
