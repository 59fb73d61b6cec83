"""Ratios of speed in one process: int8 to float32, and calibration to plain forward passes.

    python examples/speed.py [model]

Every figure is the median of interleaved runs; machines are noisy, so read the ratios.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import sqjax as sq
from sqjax.report.timing import interleaved

TOKENS, STEPS, REPEATS = 256, 48, 9


def main(name: str = "smollm2-135m") -> None:
    model, params = sq.models.load(name)
    ids = jnp.asarray(
        np.random.default_rng(0).integers(1000, 40000, (1, TOKENS)), jnp.int32
    )
    stats = sq.calibrate(model.apply, params, [ids])
    variants = {"float32": params}
    variants |= {
        k: sq.quantize(params, stats, s)
        for k, s in (("O1", sq.W8A8), ("O2", sq.W8A8_O2), ("O3", sq.W8A8_O3))
    }
    print(
        f"{name} on {jax.devices()[0].device_kind}, jax {jax.__version__}; "
        "every matmul in int8, lm_head too"
    )

    forward, read, cache = (
        jax.jit(sq.quantized(model.apply)),
        jax.jit(sq.quantized(model.decode)),
        model.init_cache(1, TOKENS),
    )
    report(
        f"forward, {TOKENS} tokens, all logits",
        TOKENS,
        {k: lambda p=p: forward(p, ids) for k, p in variants.items()},
    )
    report(
        f"prefill, {TOKENS} tokens",
        TOKENS,
        {k: lambda p=p: read(p, ids, cache)[0] for k, p in variants.items()},
    )
    prompt = ids[:, :1]
    report(
        "decode, batch 1",
        STEPS,
        {
            k: lambda p=p: sq.models.greedy(model, p, prompt, STEPS)
            for k, p in variants.items()
        },
    )

    plain = jax.jit(model.apply)
    print(
        "calibration / plain forward passes: "
        f"{calibration_ratio(model, params, ids, plain):.2f} (compile time apart)"
    )


def report(title: str, tokens: int, runs: dict) -> None:
    """Prints tokens/s of each run, and its ratio to float32."""
    seconds = interleaved(runs, REPEATS, title)
    figures = [
        f"{k} {tokens / s:.1f} tok/s ({seconds['float32'] / s:.2f}x)"
        for k, s in seconds.items()
    ]
    print(f"{title}: " + ", ".join(figures), flush=True)


def calibration_ratio(
    model, params, ids, plain, few: int = 2, many: int = 14
) -> float:
    """(time of `many` batches - of `few`) / as many forward passes: what is compiled cancels."""
    ratios = []
    for _ in range(3):
        elapsed = []
        for count in (few, many):
            start = time.perf_counter()
            jax.block_until_ready(
                sq.calibrate(model.apply, params, [ids] * count).absmax
            )
            elapsed.append(time.perf_counter() - start)
        jax.block_until_ready(plain(params, ids))
        start = time.perf_counter()
        for _ in range(many - few):
            jax.block_until_ready(plain(params, ids))
        ratios.append((elapsed[1] - elapsed[0]) / (time.perf_counter() - start))
    return float(np.median(ratios))


if __name__ == "__main__":
    main(*sys.argv[1:])
