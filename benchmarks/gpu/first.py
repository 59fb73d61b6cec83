"""A first look at sqjax on a real GPU: is it right, and how fast beside bfloat16. Needs the repository's root on PYTHONPATH.

python gpu_first.py [--tiny] [--out FILE]: about 4 minutes on an H100; prints each row as it is measured, writes JSON after each part.
"""

import argparse
import json
import statistics
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--out", default="gpu_first.json")
options = parser.parse_args()
import sqjax as sq
from sqjax.models import LlamaConfig, Model, generate

record = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "date": time.strftime("%Y-%m-%d"),
    "rows": [],
}
start = time.time()


def note(part, name, **figures):
    record["rows"].append({"part": part, "name": name, **figures})
    print(
        f"{time.time() - start:6.1f} s  {part:7} {name:34} "
        + "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()
        ),
        flush=True,
    )
    with open(options.out, "w") as file:
        json.dump(record, file, indent=1)


def attempt(part, name, run):
    try:
        note(part, name, **run())
    except Exception as error:
        note(part, name, error=f"{type(error).__name__}: {str(error)[:200]}")
        traceback.print_exc(limit=2)


def seconds(run, *args, repeats=20):
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(3 if options.tiny else repeats):
        t = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - t)
    return statistics.median(times)


def rel(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


SCHEMES = {
    n: getattr(sq, n)
    for n in ("W8A8_O1", "W8A8_O2", "W8A8_O3", "FP8", "W8A16", "W4A16", "W4A8")
    if hasattr(sq, n)
}


def check_matmul(name):
    scheme = SCHEMES[name]
    x, w = (
        jnp.asarray(np.random.default_rng(i).normal(size=s), jnp.float32)
        for i, s in ((0, (32, 256)), (1, (256, 192)))
    )
    fn, p = (lambda p, x: x @ p["w"]), {"w": w}
    q = sq.quantize(p, sq.calibrate(fn, p, [x]), scheme)
    run = jax.jit(sq.quantized(fn))
    here = run(q, x)
    (
        jax.devices("cpu")[0]
        if "cpu" in {d.platform for d in jax.devices()} or jax.default_backend() != "cpu"
        else None
    )
    with jax.default_device(jax.devices("cpu")[0]):
        there = jax.jit(sq.quantized(fn))(
            jax.device_put(q, jax.devices("cpu")[0]), jax.device_put(x, jax.devices("cpu")[0])
        )
    return {"to_float": rel(here, x @ w), "gpu_to_cpu": rel(here, there)}


def check_model(cache):
    model = Model(LlamaConfig(256, 64, 160, 2, 4, 2, 16))
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 32), 0, 256)
    stats = sq.calibrate(model.apply, params, [ids])
    smoothed = sq.smooth(params, stats, 0.5)
    q = sq.quantize(smoothed, stats, sq.W8A8)
    out = generate(model, q, [[1, 2, 3], [4]], 8, cache=cache, stop=())
    return {
        "groups": len(stats.graph.groups),
        "smooth": rel(model.apply(smoothed, ids), model.apply(params, ids)),
        "w8a8": rel(jax.jit(sq.quantized(model.apply))(q, ids), model.apply(params, ids)),
        "tokens": sum(map(len, out.tokens)),
    }


def matmuls(m, k, n):
    key = jax.random.key(0)
    x = jax.random.normal(key, (m, k), jnp.bfloat16)
    w = jax.random.normal(key, (k, n), jnp.bfloat16) / 64
    fn, p, flops = (lambda p, x: x @ p["w"]), {"w": w}, 2 * m * k * n
    base = seconds(jax.jit(fn), p, x)
    note("matmul", f"{m}x{k}x{n} bf16", ms=1e3 * base, tflops=flops / base / 1e12)
    a, b = (jnp.ones(s, jnp.int8) for s in ((m, k), (n, k)))
    bare = jax.jit(
        lambda a, b: jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
    )
    t = seconds(bare, a, b)
    note("matmul", f"{m}x{k}x{n} bare int8", ms=1e3 * t, tops=flops / t / 1e12, to_bf16=base / t)
    stats = sq.calibrate(fn, p, [x[: min(m, 64)]])
    for name, scheme in SCHEMES.items():

        def run(scheme=scheme):
            q = sq.quantize(p, stats, scheme)
            q = jax.tree.map(lambda l: l, q)
            t = seconds(jax.jit(sq.quantized(fn)), q, x)
            return {"ms": 1e3 * t, "tops": flops / t / 1e12, "to_bf16": base / t}

        attempt("matmul", f"{m}x{k}x{n} {name}", run)


def model_speed():
    c = (
        LlamaConfig(256, 64, 160, 2, 4, 2, 16)
        if options.tiny
        else LlamaConfig(32000, 4096, 14336, 4, 32, 8, 128, max_length=4096)
    )
    model = Model(c)
    params = jax.jit(lambda k: jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(k)))(
        jax.random.key(0)
    )
    long = 32 if options.tiny else 2048
    ids = jax.random.randint(jax.random.key(1), (1, long), 0, c.vocab_size)
    stats = sq.calibrate(model.apply, params, [ids[:, :64]])
    trees = {"bf16": params} | {n: None for n in SCHEMES}
    base = {}
    for name in trees:
        try:
            q = params if name == "bf16" else sq.quantize(params, stats, SCHEMES[name])
            read = jax.jit(sq.quantized(model.decode))
            t = seconds(read, q, ids, model.init_cache(1, long + 8, jnp.bfloat16), repeats=10)
            base.setdefault("prefill", t)
            note(
                "model",
                f"4 layers, prefill {long}, {name}",
                ms=1e3 * t,
                to_bf16=base["prefill"] / t,
            )
            for batch in (1, 16, 64):
                cache = model.init_cache(batch, 1024 if not options.tiny else 64, jnp.bfloat16)
                t = seconds(read, q, ids[:, :1].repeat(batch, 0), cache, repeats=20)
                base.setdefault(batch, t)
                note(
                    "model",
                    f"4 layers, decode batch {batch}, {name}",
                    ms=1e3 * t,
                    to_bf16=base[batch] / t,
                )
        except Exception as error:
            note("model", name, error=f"{type(error).__name__}: {str(error)[:200]}")


for name in SCHEMES:
    attempt("check", f"matmul {name}", lambda name=name: check_matmul(name))
for cache in ("float", "int8", "e4m3", "int4"):
    attempt("check", f"tiny Llama, {cache} cache", lambda cache=cache: check_model(cache))
for m, k, n in (
    ((8, 64, 64),)
    if options.tiny
    else ((2048, 4096, 4096), (2048, 4096, 14336), (16, 4096, 14336), (1, 4096, 14336))
):
    attempt("matmul", f"{m}x{k}x{n}", lambda m=m, k=k, n=n: matmuls(m, k, n) or {})
attempt("model", "done", lambda: model_speed() or {})
print(f"{time.time() - start:.0f} s in all")
