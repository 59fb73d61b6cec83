"""What rotations cost: at run time in an int8 prefill, and to find them in a large program.

    python benchmarks/rotation_costs.py --record benchmarks/records/rotation_costs.json

The prefill is SmolLM2's. The large programs have the shapes of Llama-3-8B and hold no number.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sqjax as sq
from sqjax.commands.defaults import MODEL
from sqjax.commands.records import (
    Row,
    check_writable,
    make_record,
    write_record,
)
from sqjax.folding.apply import fold
from sqjax.folding.find_graph import find_graph
from sqjax.folding.graph import Graph
from sqjax.folding.groups import Survey
from sqjax.folding.turn import turned, with_gains_of_one
from sqjax.models import LlamaConfig, Model
from sqjax.program.facts import Program
from sqjax.program.trace import trace

PROMPT = 512
#: The rotations of what a down projection reads: 1536 channels of SmolLM2.
ROTATIONS: dict[str, sq.weights.schemes.Rotation | None] = {
    "none": None,
    "all channels": "hadamard",
    "blocks of 256": 256,
    "blocks of 64": 64,
}
#: So many layers have the large programs, each twice as many as the one before.
LAYERS = 8, 16, 32

# At run time --------------------------------------------------------------------------------------


def prefills(repeats: int) -> list[Row]:
    """A row for each rotation: what an int8 prefill takes, by the median of runs in turns.

    The seconds of the cores are beside those of the clock, because others may use the machine.
    """
    model, params = sq.models.load(MODEL)
    ids = jnp.asarray(np.arange(PROMPT)[None] % 1000, jnp.int32)
    stats = sq.calibrate(model.apply, params, [ids[:, :64]])
    cache = model.init_cache(1, PROMPT)
    runs: dict[str, Callable[[], Any]] = {}
    for name, rotation in ROTATIONS.items():
        rules = {"down_proj": sq.W8A8.replace(rotation=rotation), ".*": sq.W8A8}
        qparams = sq.quantize(params, stats, rules)
        decode = jax.jit(sq.quantized(model.decode))
        runs[name] = partial(decode, qparams, ids, cache)
    rows: list[Row] = []
    for name, found in in_turns(runs, repeats).items():
        clock, cores = map(float, np.median(found, axis=0))
        row: Row = {"table": "prefill", "rotation": name}
        row |= {"seconds": clock, "core_seconds": cores}
        print(row, flush=True)
        rows.append(row)
    return rows


def in_turns(
    runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, np.ndarray]:
    """{name: (repeats, 2): the seconds of each run by the clock and of all cores}."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            clock, cores = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            taken = time.perf_counter() - clock, time.process_time() - cores
            found[name].append(taken)
    # Without the first run, which compiles.
    return {name: np.array(times[1:]) for name, times in found.items()}


# In a large program -------------------------------------------------------------------------------


def searches() -> list[Row]:
    """A row for each number of layers: what it takes to trace, to find all that folds, to fold it.

    Scales and rotations are found together, with the certificate of each.
    """
    rows: list[Row] = []
    for layers in (
        1,
        *LAYERS,
    ):  # the first one is not written: it imports what is used
        model = large(layers)
        params = jax.eval_shape(model.init, jax.random.key(0))
        ids = jax.ShapeDtypeStruct((1, 16), np.int32)
        start = time.perf_counter()
        program = Program(trace(model.apply, params, (ids,), {})[0])
        traced = time.perf_counter()
        graph = find_graph(Survey.of(program, {}), (), {})
        found = time.perf_counter()
        jax.eval_shape(partial(folded, graph), params)
        end = time.perf_counter()
        row: Row = {"table": "finding", "layers": layers}
        row |= {"trace_seconds": traced - start, "find_seconds": found - traced}
        row |= {"fold_seconds": end - found}
        row |= {"groups": len(graph.groups), "spaces": len(graph.spaces)}
        print(row, flush=True)
        rows.append(row)
    return rows[1:]


def folded(graph: Graph, params: Any) -> Any:
    """Parameters with a scale and a rotation wherever there may be one."""
    s = {group.name: jnp.ones(group.size) for group in graph.groups}
    turns = [(space, jnp.eye(space.size)) for space in graph.spaces]
    scaled = fold(params, graph, s)
    return turned(with_gains_of_one(scaled, graph, graph.spaces), turns)


def large(layers: int) -> Model:
    """A decoder of Llama-3-8B's shapes."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_layers=layers,
        tie_embeddings=False,
        max_length=64,
    )
    return Model(config)


def main() -> None:
    """Prints the rows, and writes the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE.json")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if options.record is not None:
        check_writable(options.record)
    start = time.perf_counter()
    rows = searches() + prefills(options.repeats)
    if options.record is not None:
        command = ["python", "benchmarks/rotation_costs.py"]
        seconds = time.perf_counter() - start
        write_record(options.record, make_record(command, rows, seconds))


if __name__ == "__main__":
    main()
