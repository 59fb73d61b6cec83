"""A small language model trained here in float, and what int4 weights cost it.

    python benchmarks/small_lm.py --record benchmarks/records/small_lm.json

Its weights lie on no grid, other than those of SmolLM2, whose checkpoint is of 4 bits already. It
reads bytes: it is trained on the calibration text that comes with sqjax (300 kB), and judged on the
evaluation text. Training stops after `--minutes`, so the model differs with the machine; all rows
of a record are of one model.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sqjax as sq
from sqjax.commands.records import (
    Row,
    check_writable,
    make_record,
    write_record,
)
from sqjax.commands.shared import shipped
from sqjax.models.decoder import embed, run_layer
from sqjax.models.evaluation.perplexity import perplexity, windows

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS = 256, 256, 768, 4, 4
TOKENS, BATCH, MOST_STEPS = 128, 16, 1500
CALIBRATED, JUDGED = 64, 60
#: The head and the embeddings stay float, as in all measurements of int4 here.
RULES = {"embed_tokens": None, "lm_head": None, ".*": sq.W4A16_G64}


def small_model() -> sq.models.Model:
    """A Llama of about 3.5 million parameters, over bytes."""
    head_dim = HIDDEN // HEADS
    config = sq.models.llama_config(
        VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEADS, head_dim
    )
    return sq.models.Model(config)


def text_bytes(name: str) -> np.ndarray:
    """A text that comes with sqjax as tokens, one for each byte."""
    return np.frombuffer(shipped(name).encode(), np.uint8).astype(np.int32)


def trained(model: sq.models.Model, minutes: float) -> tuple[Any, int]:
    """(parameters, steps): Adam with a warm-up and a cosine, for so many minutes at most."""
    text = text_bytes("calibration")
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 2e-3, 50, MOST_STEPS, 1e-5
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1)
    )

    def loss(params, ids):
        logits = model.apply(params, ids[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, ids[:, 1:]
        )
        return losses.mean()

    @jax.jit
    def step(params, state, ids):
        value, gradient = jax.value_and_grad(loss)(params, ids)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    params = model.init(jax.random.key(0))
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    done = 0
    while done < MOST_STEPS and time.perf_counter() - begin < 60 * minutes:
        starts = rng.integers(0, len(text) - TOKENS - 1, BATCH)
        ids = np.stack([text[i : i + TOKENS + 1] for i in starts])
        params, state, value = step(params, state, jnp.asarray(ids))
        done += 1
        if done % 50 == 0:
            print(f"step {done}: {float(value):.3f} nats a byte", flush=True)
    return params, done


def quantized_versions(model: sq.models.Model, params: Any) -> dict[str, Any]:
    """{recipe: what it makes of the parameters}."""
    rows = windows(text_bytes("calibration"), TOKENS, CALIBRATED)
    batches = list(rows.reshape(-1, BATCH, TOKENS))
    stats = sq.calibrate(model.apply, params, batches, gram=True)
    clips = sq.awq(params, stats, RULES, grid=[0.0]).clips
    found = sq.awq(params, stats, RULES)
    folded = sq.fold(params, stats.graph, found.s)
    after = sq.fold_stats(stats, found.s)
    clipped = {"clips": found.clips}
    return {
        "float32": params,
        "rounding": sq.quantize(params, stats, RULES),
        "AWQ": sq.quantize(folded, after, RULES, **clipped),
        "GPTQ": sq.gptq(params, stats, RULES),
        "clips, GPTQ": sq.gptq(params, stats, RULES, clips=clips),
        "AWQ, GPTQ": sq.gptq(folded, after, RULES, **clipped),
        "by layers": by_layers(model, params, batches),
    }


def by_layers(
    model: sq.models.Model, params: Any, batches: list[np.ndarray]
) -> Any:
    """The parameters after `gptq_blocks`."""
    names = list(map(str, range(LAYERS)))
    block = partial(run_layer, model.config, 0)
    layers = [params["model"]["layers"][name] for name in names]
    read = [embed(model.config, params, jnp.asarray(ids)) for ids in batches]
    made = sq.gptq_blocks(block, layers, read, sq.W4A16_G64)
    inner = params["model"] | {"layers": dict(zip(names, made, strict=True))}
    return params | {"model": inner}


def measured(minutes: float) -> list[Row]:
    """A row for each recipe."""
    model = small_model()
    params, steps = trained(model, minutes)
    judged = windows(text_bytes("evaluation"), TOKENS, JUDGED)
    rows: list[Row] = []
    exact = None
    for name, tree in quantized_versions(model, params).items():
        found = perplexity(model, tree, judged)
        exact = found if exact is None else exact
        rows.append(
            {
                "name": name,
                "perplexity": found,
                "ratio": found / exact,
                "steps": steps,
            }
        )
        print(f"{name:22} {found:8.4f} {found / exact:8.4f}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    options = parser.parse_args(arguments)
    if options.record:
        check_writable(options.record)
    begin = time.perf_counter()
    rows = measured(options.minutes)
    if options.record:
        run = ["python", "benchmarks/small_lm.py"]
        seconds = time.perf_counter() - begin
        write_record(options.record, make_record(run, rows, seconds))
    return rows


if __name__ == "__main__":
    main()
