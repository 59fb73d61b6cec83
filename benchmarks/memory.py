"""Peak memory of a model that is quantized while it is read, and of calibration by layers.

    python benchmarks/memory.py --record benchmarks/records/memory.json

Writes a random checkpoint of a Llama with 2 billion parameters, in bfloat16 and in shards (4.1 GB;
`--directory` says where, `--layers` makes a smaller one). Each job runs in a process of its own,
whose peak is what Linux says was resident at most (VmHWM).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sqjax as sq
from sqjax.commands.cells import text
from sqjax.commands.layouts_of_speed import memory
from sqjax.commands.records import (
    Row,
    check_writable,
    make_record,
    write_record,
)

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 2560, 6912, 20, 32000
LAYERS, TOKENS = 24, 64
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
STATUS = Path("/proc/self/status")

# The checkpoint -----------------------------------------------------------------------------------


def of_layer(layer: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors of one layer."""
    square = (HIDDEN, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    prefix = f"model.layers.{layer}"
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def write_checkpoint(directory: Path, layers: int) -> int:
    """Writes a random checkpoint, a shard for each layer; returns its number of parameters."""
    shards = [of_layer(layer) for layer in range(layers)]
    shards.append(
        {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
            "lm_head.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
    )
    count = 0
    weight_map = {}
    rng = np.random.default_rng(0)
    for number, shapes in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        count += write_shard(directory / file, shapes, rng)
        weight_map.update(dict.fromkeys(shapes, file))
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    config = {**CONFIG, "num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    return count


def write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> int:
    """Writes random tensors, one in memory at a time; returns how many numbers they have."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shapes.values():
            values = rng.standard_normal(shape, np.float32)
            # Gains are near 1; weights keep the size of what they multiply.
            scaled = 1 + 0.1 * values if len(shape) == 1 else values / 50
            file.write(scaled.astype(jnp.bfloat16).tobytes())
    return end // 2


# The jobs, each in a process of its own -----------------------------------------------------------


def prefill(directory: Path) -> None:
    """Loads a model in W8A8, and reads 64 tokens into a cache."""
    model, qparams = sq.load_quantized(directory, sq.W8A8)
    ids = jnp.asarray(np.arange(TOKENS)[None])
    step = jax.jit(sq.quantized(model.decode))
    logits, _ = step(qparams, ids, model.init_cache(1, TOKENS))
    assert np.isfinite(np.asarray(logits)).all()


def calibration(directory: Path) -> None:
    """Calibrates a model layer by layer, on 4 batches of 64 tokens."""
    rng = np.random.default_rng(1)
    batches = rng.integers(0, VOCABULARY, (4, 1, TOKENS))
    sq.calibrate_layers(directory, list(batches), dtype=jnp.bfloat16)


def nothing(directory: Path) -> None:
    """Runs a program that is as small as can be: what Python, jax and flax take."""
    sq.models.llama_config(32, 8, 16, 1, 2, 1, 4)
    jax.jit(jnp.sum)(jnp.ones(3)).block_until_ready()


JOBS = {"nothing": nothing, "calibration": calibration, "prefill": prefill}


def peak_of(job: str, directory: Path) -> tuple[int, float]:
    """(bytes that were resident at most, seconds) of a job in a new process."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--job", job, "--directory", directory]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout.split()[-1]), time.perf_counter() - begin


def own_peak() -> int:
    """The bytes of this process that were resident at most."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.removesuffix("kB")) * 1024
    raise OSError(f"{STATUS}: expected VmHWM, which Linux gives")


def measured(directory: Path, layers: int) -> list[Row]:
    """A row for each job."""
    parameters = write_checkpoint(directory, layers)
    layer = sum(int(np.prod(shape)) for shape in of_layer(0).values())
    rows: list[Row] = []
    for job in JOBS:
        peak, seconds = peak_of(job, directory)
        rows.append(
            {
                "job": job,
                "parameters": parameters,
                "parameters_of_a_layer": layer,
                "peak_bytes": peak,
                "seconds": round(seconds, 1),
            }
        )
        print(text(memory(rows)), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--directory", type=Path, help="of the checkpoint")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--job", choices=JOBS, help="run one; print its peak")
    options = parser.parse_args(arguments)
    if options.job:
        JOBS[options.job](options.directory)
        print(own_peak())
        return []
    if options.record:
        check_writable(options.record)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rows = measured(Path(directory), options.layers)
    if options.record:
        run = ["python", "benchmarks/memory.py"]
        seconds = time.perf_counter() - begin
        write_record(options.record, make_record(run, rows, seconds))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
