"""The second look at sqjax on a GPU: where the time goes, and what a kernel could reach.

python gpu_second.py --out DIR [--tiny] [--part NAME ...] [--seconds 285]
Parts: card precision matmul model mosaic torch pallas. Each is a process of its own with a time limit; all add rows to DIR/gpu2.json.
Times of kernels come from the profiler's device trace (inside a kernel, no launch gaps); "wall" is a host clock around queued calls.
"""

import argparse
import collections
import glob
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
BUDGETS = {
    "card": 20,
    "precision": 20,
    "matmul": 75,
    "model": 98,
    "mosaic": 28,
    "torch": 26,
    "pallas": 18,
}  # seconds
parser = argparse.ArgumentParser()
parser.add_argument("--out", default=".")
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--part", nargs="*")
parser.add_argument("--seconds", type=float, default=285)
parser.add_argument("--child")
O = parser.parse_args()
if O.tiny and not O.child:
    BUDGETS = {p: 5 * b for p, b in BUDGETS.items()}
    O.seconds *= 5  # on a slow machine
START = time.time()
FILE = os.path.join(O.out, "gpu2.json")
PART = O.child


def left():
    return O.seconds - (time.time() - START)


def note(name, shown=None, **figures):
    """A row: printed (only `shown` of the figures if given) and written at once."""
    try:
        with open(FILE) as f:
            record = json.load(f)
    except Exception:
        record = {"rows": []}
    record["rows"].append({"part": PART, "name": name, **figures})
    with open(FILE + ".new", "w") as f:
        json.dump(record, f, indent=0)
    os.replace(FILE + ".new", FILE)
    shown = figures if shown is None else {k: figures[k] for k in shown if k in figures}
    print(
        f"{time.time() - START:5.1f} {PART:6} {name:40} "
        + " ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
        ),
        flush=True,
    )


def failed(name, error):
    note(name, error=f"{type(error).__name__}: {str(error)[:300]}")
    if not isinstance(error, TimeoutError):
        traceback.print_exc(limit=-3)


# ------------------------------------------------------------------------------------------------ the driver
def drive():
    os.makedirs(O.out, exist_ok=True)
    end = time.time() + O.seconds
    log = open(os.path.join(O.out, "log.txt"), "a")
    for part in O.part or list(BUDGETS):
        rest = end - time.time()
        later = list(BUDGETS)[list(BUDGETS).index(part) + 1 :]
        budget = min(
            rest - 4,
            BUDGETS[part]
            + max(
                0,
                rest - BUDGETS[part] - sum(BUDGETS[p] for p in later if not O.part or p in O.part),
            ),
        )
        if O.part:
            budget = max(budget, min(rest, BUDGETS[part]))
        if budget < 12:
            print(f"-- {part}: skipped, {rest:.0f} s left", flush=True)
            continue
        command = [
            sys.executable,
            os.path.abspath(__file__),
            "--child",
            part,
            "--out",
            O.out,
            "--seconds",
            f"{budget:.0f}",
        ] + (["--tiny"] if O.tiny else [])
        print(f"-- {part}: {budget:.0f} s of {rest:.0f} s left", flush=True)
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=False,
        )
        import threading

        timer = threading.Timer(budget + 6, child.kill)
        timer.start()
        t = time.time()
        for line in child.stdout:
            log.write(line)
            log.flush()
            if (
                "cuda_executor" not in line
                and not re.match(r"[IWE]\d{4} ", line)
                and "WARNING: All log" not in line
            ):
                print(line[:230], end="", flush=True)
        rc = child.wait()
        timer.cancel()
        print(f"-- {part}: rc {rc}, {time.time() - t:.0f} s", flush=True)
    print(f"{time.time() - START:.0f} s in all")


if PART is None:
    drive()
    sys.exit()

# ------------------------------------------------------------------------------------------------ shared by children
sys.path[:0] = [HERE]
if PART != "torch":
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    GPU = jax.default_backend() == "gpu"
POOL = ThreadPoolExecutor(6)


def rel(a, b):
    a, b = (
        np.asarray(v.astype(jnp.float32) if hasattr(v, "astype") else v, np.float64) for v in (a, b)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def events_of(folder):
    """[(start us, duration us, name)] of the kernels and copies on the device, by start."""
    found, error = [], None
    try:
        for file in glob.glob(folder + "/**/*.xplane.pb", recursive=True):
            for plane in jax.profiler.ProfileData.from_file(file).planes:
                if not plane.name.startswith("/device:GPU" if GPU else "/host:CPU"):
                    continue
                for line in plane.lines:
                    if GPU and "Stream" not in line.name:
                        continue
                    if not GPU and not line.name.startswith(("tf_XLA", "tf_", "XLA")):
                        continue
                    found += [(e.start_ns / 1e3, e.duration_ns / 1e3, e.name) for e in line.events]
    except Exception as e:
        error = e
    if not found:
        found = json_events(folder)
    if not found:
        print(
            f"  trace: no events; {error!r}; files {[(os.path.basename(f), os.path.getsize(f)) for f in glob.glob(folder + '/**/*.*', recursive=True)]}",
            flush=True,
        )
        for file in glob.glob(folder + "/**/*.xplane.pb", recursive=True):
            print(
                "  ",
                [
                    (p.name, [l.name for l in p.lines][:8])
                    for p in jax.profiler.ProfileData.from_file(file).planes
                ],
                flush=True,
            )
    if not found and error:
        raise error
    return sorted(found)


def json_events(folder):
    """The same from trace.json.gz."""
    found = []
    for file in glob.glob(folder + "/**/*.trace.json.gz", recursive=True):
        events = json.load(gzip.open(file))["traceEvents"]
        names = {}
        for e in events:
            if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name"):
                names[e["pid"], e.get("tid") if e["name"] == "thread_name" else None] = e["args"][
                    "name"
                ]
        for e in events:
            if e.get("ph") != "X":
                continue
            process, thread = names.get((e["pid"], None), ""), names.get((e["pid"], e["tid"]), "")
            if (
                ("/device:GPU" in process and "Stream" in thread)
                if GPU
                else ("/host:CPU" in process and thread.startswith(("tf_XLA", "tf_", "XLA")))
            ):
                found.append((float(e["ts"]), float(e["dur"]), e["name"]))
    return found


def traced(runs, repeats, gap=0.03):
    """{name: [(kernel, calls, mean us)] per call} of runs {name: f(i)}, warm before. One trace; runs are told apart by idle gaps."""
    folder = tempfile.mkdtemp()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1 if GPU else 2
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        for run in runs.values():
            time.sleep(gap)
            jax.block_until_ready([run(i) for i in range(repeats)])
    finally:
        time.sleep(gap)
        jax.profiler.stop_trace()
    parts, last = [[]], None
    for start, length, name in events_of(folder):
        if last is not None and start - last > gap * 5e5:
            parts.append([])
        parts[-1].append((name, length))
        last = max(last or 0, start + length)
    os.system(f"rm -rf {folder}")
    if len(parts) != len(runs):
        if len(runs) == 1:
            parts = [sum(parts, [])]
        elif GPU and any(parts):
            print(f"  trace: {len(parts)} runs of events for {len(runs)}; each alone", flush=True)
            return {
                k: v
                for name, run in runs.items()
                for k, v in traced({name: run}, repeats, gap).items()
            }
        else:
            parts = [sum(parts, [])] * len(runs)  # on a CPU, or nothing was seen
    out = {}
    for name, part in zip(runs, parts):
        table = collections.defaultdict(list)
        for kernel, length in part:
            table[kernel].append(length)
        out[name] = sorted(
            ((k, len(v) / repeats, sum(v) / len(v)) for k, v in table.items()),
            key=lambda r: -r[1] * r[2],
        )
    return out


def total(rows):
    return float(sum(n * t for _, n, t in rows))


def short(rows, n=3):
    return "; ".join(f"{k[:34]} {c:g}x{t:.1f}" for k, c, t in rows[:n])


def queued(run, repeats):
    """Mean seconds of calls that are queued at once."""
    jax.block_until_ready(run(0))
    t = time.perf_counter()
    jax.block_until_ready([run(i) for i in range(repeats)])
    return (time.perf_counter() - t) / repeats


def alone(run, repeats):
    """Median seconds of calls that are waited for."""
    times = []
    for i in range(repeats):
        t = time.perf_counter()
        jax.block_until_ready(run(i))
        times.append(time.perf_counter() - t)
    return statistics.median(times)


def compile_all(jobs, seconds):
    """{name: compiled} of {name: (jitted, args)}: traced here, compiled in a pool; those that fail are noted, those not ready in time left out."""
    pending = {}
    for name, (run, args) in jobs.items():
        try:
            pending[name] = POOL.submit(run.lower(*args).compile)
        except Exception as error:
            failed(name + " lower", error)
    end = time.time() + seconds
    done = {}
    for name, future in pending.items():
        try:
            done[name] = future.result(max(0.1, end - time.time()))
        except Exception as error:
            failed(name + " compile", error)
            future.cancel()
    return done


# ------------------------------------------------------------------------------------------------ 1 card
def card():
    note(
        "device",
        kind=jax.devices()[0].device_kind,
        jax=jax.__version__,
        core_count=getattr(jax.devices()[0], "core_count", 0),
        flags=os.environ.get("XLA_FLAGS", ""),
    )
    n, reps = (128, 2) if O.tiny else (8192, 8)
    key = jax.random.key(0)
    a = jax.random.normal(key, (n, n), jnp.bfloat16)
    b = (jax.random.normal(jax.random.key(1), (n, n)) / n**0.5).astype(jnp.bfloat16)
    ai, bi = (jax.random.randint(jax.random.key(i), (n, n), -127, 128, jnp.int8) for i in (2, 3))
    big = jnp.zeros((1 << (16 if O.tiny else 29),), jnp.int32)

    def chain(a, b):
        for _ in range(reps):
            a = a @ b
        return a

    def ints(a, b):
        return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    jobs = {
        "bf16": (jax.jit(chain), (a, b)),
        "int8": (jax.jit(ints), (ai, bi)),
        "copy": (jax.jit(lambda x: x + 1), (big,)),
    }

    def e4m3(v):
        return (v.astype(jnp.float32)).astype(jnp.float8_e4m3fn)

    if not O.tiny:
        jobs["fp8"] = (
            jax.jit(
                lambda a, b: lax.dot_general(
                    a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
                )
            ),
            (e4m3(a), e4m3(b)),
        )
    done = compile_all(jobs, left() - 8)
    runs = {k: (lambda i, k=k: done[k](*jobs[k][1])) for k in done}
    walls = {k: queued(run, 3 if k == "bf16" else 8) for k, run in runs.items()}
    try:
        kernels = traced(runs, 3)
    except Exception as error:
        failed("trace", error)
        kernels = {}
    for k in done:
        per = reps if k == "bf16" else 1
        wall = walls[k] / per
        k_us = total(kernels.get(k, [])) / per
        work = 2 * big.nbytes if k == "copy" else 2 * n**3
        note(
            f"{k} {'2 GB read + written' if k == 'copy' else f'{n}^3'}",
            wall_ms=1e3 * wall,
            kernel_ms=k_us / 1e3,
            tera_per_s=work / wall / 1e12,
            kernel_tera_per_s=work / (k_us or 1e30) / 1e6,
            kernels=short(kernels.get(k, [])),
        )


# ------------------------------------------------------------------------------------------------ 4 precision
def precision():
    import sqjax as sq
    from sqjax.models import LlamaConfig, Model

    m, k, n = (32, 64, 32) if O.tiny else (256, 4096, 256)
    x, w = (
        np.random.default_rng(i).normal(size=s).astype(np.float32)
        for i, s in ((0, (m, k)), (1, (k, n)))
    )
    exact = x.astype(np.float64) @ w.astype(np.float64)
    for p in ("default", "high", "highest"):
        note(
            f"float32 matmul, precision {p}",
            error_to_float64=rel(
                jax.jit(lambda x, w, p=p: jnp.dot(x, w, precision=p))(x, w), exact
            ),
        )
    model = Model(LlamaConfig(256, 64, 160, 2, 4, 2, 16))
    params = jax.jit(model.init)(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 32), 0, 256)
    smoothed = sq.smooth(params, sq.calibrate(model.apply, params, [ids]), 0.5)
    outs = {}
    for p in ("default", "highest"):
        if left() < 2:
            note(f"tiny Llama under {p}", skipped="time")
            continue
        with jax.default_matmul_precision(None if p == "default" else p):
            run = jax.jit(lambda q, ids: model.apply(q, ids))
            outs[p] = run(params, ids)
            note(f"tiny Llama, matmul precision {p}", smooth=rel(run(smoothed, ids), outs[p]))
    if len(outs) == 2:
        note("tiny Llama, default beside highest", error=rel(outs["default"], outs["highest"]))


# ------------------------------------------------------------------------------------------------ 2 matmul
def matmul():
    import sqjax as sq

    schemes = ("W8A8_O1", "W8A8_O3", "FP8", "W8A16", "W4A16")
    shapes = ((128, 256),) if O.tiny else ((4096, 14336), (14336, 4096))
    rows = (1, 8) if O.tiny else (2048, 16, 1, 128)

    def fn(p, x):
        return x @ p["w"]

    def ints(a, b):
        return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    def sets(tree):
        return [tree] + [
            jax.tree.map(lambda l: jnp.array(l, copy=True), tree)
            for _ in range(
                0
                if O.tiny
                else min(
                    12,
                    2
                    * 10**8
                    // max(
                        1,
                        sum(
                            l.size
                            * max(
                                4,
                                jnp.iinfo(l.dtype).bits
                                if jnp.issubdtype(l.dtype, jnp.integer)
                                else jnp.finfo(l.dtype).bits,
                            )
                            // 8
                            for l in jax.tree.leaves(tree)
                        ),
                    ),
                )
            )
        ]

    for number, (k, n) in enumerate(shapes):
        begin = time.time()
        w = (jax.random.normal(jax.random.key(1), (k, n)) / k**0.5).astype(jnp.bfloat16)
        xs = {m: jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16) for m in rows}
        trees = {
            "bf16": sets({"w": w}),
            "bare int8": sets(jax.random.randint(jax.random.key(2), (n, k), -127, 128, jnp.int8)),
        }
        stats = sq.calibrate(fn, {"w": w}, [xs[max(rows)][:64]])
        for s in schemes:
            try:
                trees[s] = sets(sq.quantize({"w": w}, stats, getattr(sq, s)))
            except Exception as error:
                failed(s, error)
        note(
            f"{k}x{n} weights ready",
            seconds=time.time() - begin,
            sets={s: len(t) for s, t in trees.items()},
            dtypes={
                s: sorted({str(l.dtype) for l in jax.tree.leaves(t[0])}) for s, t in trees.items()
            },
        )
        for m in rows if number == 0 else [r for r in rows if r != 128]:
            if left() < 12:
                note(f"{m}x{k}x{n}", skipped="time")
                continue
            begin = time.time()
            x8 = jax.random.randint(jax.random.key(3), (m, k), -127, 128, jnp.int8)
            cases = {}
            for s, t in trees.items():
                if s == "bare int8":
                    cases[s] = jax.jit(lambda p, x: ints(x, p)), x8
                else:
                    cases[s] = jax.jit(fn if s == "bf16" else sq.quantized(fn)), xs[m]
            done = compile_all(
                {s: (run, (trees[s][0], x)) for s, (run, x) in cases.items()}, left() - 6
            )
            built = time.time() - begin
            runs = {
                s: (lambda i, s=s: done[s](trees[s][i % len(trees[s])], cases[s][1])) for s in done
            }
            walls = {s: queued(run, 10) for s, run in runs.items()}
            try:
                kernels = traced(runs, 12)
            except Exception as error:
                failed(f"{m}x{k}x{n} trace", error)
                kernels = {}
            base = total(kernels.get("bf16", [])) or None
            for s in done:
                rows_ = kernels.get(s, [])
                us = total(rows_)
                note(
                    f"{m}x{k}x{n} {s}",
                    shown=("us", "tops", "tb_s", "to_bf16", "wall_us", "top"),
                    us=us,
                    wall_us=1e6 * walls[s],
                    tops=2e-6 * m * k * n / us if us else 0.0,
                    tb_s=k * n * {"bf16": 2, "W4A16": 0.5}.get(s, 1) / us / 1e6 if us else 0.0,
                    to_bf16=base / us if base and us else 0.0,
                    top=short(rows_),
                    kernels=rows_[:6],
                    compile_s=built,
                )
        # the same without the profiler: products that follow each other in one program, each on a row that the last one changed
        if number == 0 and left() > 14:
            reps = 8
            for m, s in [(max(rows), "bf16"), (max(rows), "W8A8_O1")] + (
                []
                if base
                else [(m, s) for m in (16, 1) if m in xs for s in trees if s != "bare int8"]
            ):
                if left() < 10:
                    break
                try:
                    run = sq.quantized(fn)

                    def chain(ps, x):
                        for i in range(reps):
                            y = lax.optimization_barrier(run(ps[i % len(ps)], x))
                            x = x.at[0, 0].add((y[0, 0] * 1e-6).astype(x.dtype))
                            x = lax.optimization_barrier(x) if i < reps - 1 else x
                            keep = y if i == 0 else keep.at[0].add(y[0])
                        return keep

                    both = jax.jit(chain)
                    t = queued(lambda i: both(trees[s], xs[m]), 4) / reps
                    note(
                        f"{m}x{k}x{n} {s} chained in one program",
                        wall_us=1e6 * t,
                        tops=2e-12 * m * k * n / t,
                    )
                except Exception as error:
                    failed(f"{m} {s} chained", error)


# ------------------------------------------------------------------------------------------------ 3 model
def kind_of(name):
    n = name.lower()
    if "memcpy" in n or "memset" in n:
        return "copy"
    if re.search(r"gemm|nvjet|cublas|cutlass|xmma|wgmma|_dot|dot_", n):
        return "matmul"
    if "transpose" in n:
        return "transpose"
    if "reduce" in n:
        return "reduce"
    return "elementwise" if "fusion" in n or "wrapped" in n else "other"


def from_hlo(text):
    """{kernel name: result shape and op_name} of a compiled program."""
    out = {}
    for match in re.finditer(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) [\w-]+\(.*?$", text, re.M):
        op = re.search(r'op_name="([^"]*)"', match.group(0))
        out[re.sub(r"[.-]", "_", match.group(1))] = (
            f"{match.group(2)[:70]} {op.group(1)[-90:] if op else ''}"
        )
    return out


def model():
    import sqjax as sq
    from sqjax.models import LlamaConfig, Model

    c = (
        LlamaConfig(256, 64, 160, 2, 4, 2, 16)
        if O.tiny
        else LlamaConfig(32000, 4096, 14336, 4, 32, 8, 128, max_length=4096)
    )
    net = Model(c)
    params = jax.jit(lambda k: jax.tree.map(lambda x: x.astype(jnp.bfloat16), net.init(k)))(
        jax.random.key(0)
    )
    long, room = (32, 64) if O.tiny else (2048, 1024)
    ids = jax.random.randint(jax.random.key(1), (1, long), 0, c.vocab_size)
    stats = sq.calibrate(net.apply, params, [ids[:, :64]])
    trees = {"bf16": params}
    for s in ("W8A8_O1", "W4A16", "W8A16", "W8A8_O3", "FP8"):
        try:
            trees[s] = sq.quantize(params, stats, getattr(sq, s))
        except Exception as error:
            failed(s, error)
    jax.block_until_ready(trees)
    note("parameters ready")
    batches = {b: ids[:, :1].repeat(b, 0) for b in (1, 64)}
    cases = [("prefill", s, None) for s in ("bf16", "W8A8_O1")] + [
        ("decode", s, 1) for s in ("bf16", "W8A8_O1", "W4A16", "W8A16")
    ]
    more = [("prefill", s, None) for s in ("W8A8_O3", "FP8")] + [
        ("decode", s, 64) for s in ("bf16", "W8A8_O1", "W8A16", "W4A16")
    ]

    def cache_of(what, b):
        return (
            net.init_cache(1, long + 8, jnp.bfloat16)
            if what == "prefill"
            else net.init_cache(b, room, jnp.bfloat16)
        )

    for group in (cases, more):
        if left() < 20:
            note("the rest", skipped="time")
            return
        begin = time.time()
        jobs = {}
        for what, s, b in group:
            if s not in trees:
                continue
            fn = sq.quantized(
                net.decode
            )  # a decode step gives its cache away, as a loop would; the first record did not
            jobs[f"{what} {b or long} {s}"] = (
                jax.jit(fn, donate_argnums=(2,) if what == "decode" else ()),
                (trees[s], ids if what == "prefill" else batches[b], cache_of(what, b)),
            )
        done = compile_all(jobs, left() - 10)
        note("compiled", seconds=time.time() - begin, programs=len(done))
        for name, program in done.items():
            if left() < 4:
                note(name, skipped="time")
                continue
            try:
                tree, tokens, cache = jobs[name][1]
                what = name.split()[0]
                state = [cache]

                def run(i):
                    out, new = program(tree, tokens, state[0])
                    if what == "decode":
                        state[0] = new
                    return out

                run(0)
                run(0)
                reps = 8 if what == "prefill" else 16
                single = alone(run, reps)
                wall = queued(run, reps)
                rows = traced({name: run}, reps)[name]
                us = total(rows) or 1e-9
                text = program.as_text()
                ops = from_hlo(text)
                kinds = collections.Counter()
                for k, n, t in rows:
                    kinds[kind_of(k)] += n * t
                table = [
                    [k, n, n * t, n * t / us, ops.get(re.sub(r"[.-]", "_", k), "")]
                    for k, n, t in rows[:25]
                ]
                note(
                    name,
                    shown=("alone_ms", "wall_ms", "kernel_ms", "launches", "kinds"),
                    alone_ms=1e3 * single,
                    wall_ms=1e3 * wall,
                    kernel_ms=us / 1e3,
                    launches=float(sum(n for _, n, _ in rows)),
                    kinds={k: round(v) for k, v in kinds.most_common()},
                    kernels=table,
                )
                for k, n, t, share, op in table[:7]:
                    print(
                        f"       {t:8.1f} us {100 * share:4.1f}% {n:5.1f}x {k[:56]:56} {op[:110]}"
                    )
                if name in (
                    f"prefill {long} W8A8_O1",
                    "decode 1 W4A16",
                    f"prefill {long} bf16",
                    "decode 1 W8A8_O1",
                ):
                    with gzip.open(
                        os.path.join(O.out, "hlo_" + re.sub(r"\W+", "_", name) + ".txt.gz"), "wt"
                    ) as f:
                        f.write(text)
            except Exception as error:
                failed(name, error)


# ------------------------------------------------------------------------------------------------ 5 prototypes
def report(label, flops, bytes_, runs, extra, repeats=10):
    walls = {name: 1e6 * queued(run, repeats) for name, run in runs.items()}
    for name, rows in traced(runs, repeats).items() if runs else ():
        us = total(rows)
        note(
            f"{label} {name}",
            us=us,
            wall_us=walls[name],
            tops=flops / us / 1e6 if us else 0.0,
            tb_s=bytes_ / us / 1e6 if us else 0.0,
            **extra.get(name, {}),
            top=short(rows, 2),
        )


def mosaic():
    if not GPU:
        return print("mosaic: needs a GPU, skipped ")
    import mosaic as mg

    T = mg.Tiles
    sms = getattr(jax.devices()[0], "core_count", 132)
    rng = np.random.default_rng(0)

    def group(label, m, k, n, builds, arguments, expected, flops, bytes_):
        """Builds {name: f(*arguments)}, checks each against `expected` (a few columns or rows), times all in one trace."""
        done = compile_all(
            {f"{label} {s}": (jax.jit(f), arguments(s)) for s, f in builds.items()}, left() - 4
        )
        runs, extra = {}, {}
        for s in builds:
            if f"{label} {s}" not in done:
                continue
            try:
                sets = [arguments(s)] + [
                    tuple(jnp.array(v, copy=True) for v in arguments(s)) for _ in range(3)
                ]
                out = jax.block_until_ready(done[f"{label} {s}"](*sets[0]))
                extra[s] = expected(s, out)
                again = done[f"{label} {s}"](*sets[1])
                extra[s]["same_twice"] = bool((again == out).all())
                runs[s] = lambda i, s=s, sets=sets: done[f"{label} {s}"](*sets[i % 4])
            except Exception as error:
                failed(f"{label} {s}", error)
        report(label, flops, bytes_, runs, extra)

    for m, k, n in ((2048, 4096, 14336), (2048, 14336, 4096)):
        if left() < 8:
            note(f"{m}x{k}x{n}", skipped="time")
            continue
        x8, w8 = (jnp.asarray(rng.integers(-127, 128, s, np.int8)) for s in ((m, k), (n, k)))
        xs, ws = (jnp.asarray(rng.uniform(1e-3, 2e-3, s), jnp.float32) for s in (m, n))
        some = np.array([0, 1, 77, m // 2 + 9, m - 1])
        exact = (
            np.asarray(x8[some], np.float64)
            @ np.asarray(w8, np.float64).T
            * np.asarray(xs, np.float64)[some, None]
            * np.asarray(ws, np.float64)
        )

        def xla(a, b, r, c):
            return (
                lax.dot_general(
                    a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
                ).astype(jnp.float32)
                * r[:, None]
                * c
            ).astype(jnp.bfloat16)

        whole = jax.jit(xla)(x8, w8, xs, ws)
        tiles = {
            "XLA": None,
            "128x256": T(),
            "128x256 delay": T(delay=1),
            "256x128 delay": T(split="rows", delay=1),
            "64x256 rows delay": T(64, 256, split="rows", delay=1),
            "cluster rows delay": T(cluster="rows", delay=1),
            "cluster cols delay": T(cluster="cols", delay=1),
            "128x128 6 stages delay": T(64, 128, 128, 6, "rows", delay=1),
            "128x256 width 16": T(delay=1, width=16),
        }
        if k > n:
            tiles = {
                s: tiles[s]
                for s in ("XLA", "128x256 delay", "256x128 delay", "128x128 6 stages delay")
            }
        builds = {
            s: xla if t is None else (lambda a, b, r, c, t=t: mg.matmul(a, b, r, c, t, sms=sms))
            for s, t in tiles.items()
        }
        group(
            f"W8A8 {m}x{k}x{n}",
            m,
            k,
            n,
            builds,
            lambda s: (x8, w8, xs, ws),
            lambda s, out: {
                "error": rel(out[some], exact),
                "share_unlike_xla": float((out != whole).mean()),
            },
            2 * m * k * n,
            k * n,
        )
    m, k, n = 16, 4096, 14336  # swapped: the weight's outputs are rows, the few tokens are columns
    if left() < 7:
        return note("decode", skipped="time")
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    x8 = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
    w8 = jnp.asarray(rng.integers(-127, 128, (n, k), np.int8))
    w4 = jnp.asarray(rng.integers(-8, 8, (n, k), np.int8)).astype(jnp.int4)
    xs, ws, one = (
        jnp.asarray(rng.uniform(1e-3, 2e-3, m), jnp.float32),
        jnp.asarray(rng.uniform(1e-3, 2e-3, n), jnp.float32),
        jnp.ones((m,), jnp.float32),
    )
    gs = jnp.asarray(rng.choice([0.5, 0.75, 1, 1.5], (k // 128, n)), jnp.float32)
    args = {
        "W8A8": (w8, x8, ws, xs),
        "W8A16": (w8, x, ws, one),
        "W4A16": (w4, x, ws, one),
        "W4A16 groups": (w4, x, ws, one, gs),
    }

    def f64(v):
        return np.asarray(v.astype(jnp.float32), np.float64)

    @__import__("functools").cache
    def exact(s):
        a, b, r, c, *g = args[s]
        a = f64(a)
        if g:
            a = a * np.repeat(f64(g[0]), 128, 0).T
        return (a @ f64(b).T) * f64(r)[:, None] * f64(c)

    for stages in (8, 4):
        t = T(64, 16, 128, stages, "rows", 1, 64)
        builds = {
            f"{s} {stages}": (
                lambda *a, t=t: mg.matmul(*a[:4], t, groups=a[4] if len(a) > 4 else None, sms=sms)
            )
            for s in args
        }
        if left() > 7:
            group(
                f"swapped {m}x{k}x{n}",
                m,
                k,
                n,
                builds,
                lambda s: args[s.rsplit(" ", 1)[0]],
                lambda s, out: {"error": rel(out, exact(s.rsplit(" ", 1)[0]))},
                2 * m * k * n,
                k * n,
            )


def pallas():
    from sqjax import triton as st

    rng = np.random.default_rng(0)
    B = st.Blocks
    k, n = (256, 128) if O.tiny else (4096, 14336)
    w8, w4 = (
        jnp.asarray(rng.integers(-127, 128, (n, k), np.int8)),
        jnp.asarray(rng.integers(-8, 8, (n, k), np.int8)).astype(jnp.int4),
    )
    ws, zs = (
        jnp.asarray(rng.uniform(1e-3, 2e-3, (n, 1)), jnp.float32),
        jnp.asarray(rng.integers(-8, 8, (n, k // 128)), jnp.int8),
    )
    gs = jnp.asarray(rng.uniform(1e-3, 2e-3, (n, k // 128)), jnp.float32)

    def f64(v):
        return np.asarray(v.astype(jnp.float32), np.float64)

    exact8 = (f64(w8) * f64(ws)).T
    exact4 = ((f64(w4) - np.repeat(f64(zs), 128, 1)) * np.repeat(f64(gs), 128, 1)).T
    for m in (8, 20) if O.tiny else (2048, 16, 1):
        if left() < 5:
            note(f"M {m}", skipped="time")
            continue
        x8, xs = (
            jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8),
            jnp.asarray(rng.uniform(1e-3, 2e-3, m), jnp.float32),
        )
        x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
        blocks = (
            (B(16, 32), B(16, 64))
            if O.tiny
            else (B(), B(128, 128, 8, 3), B(128, 64, 4, 4), B(128, 256, 8, 3))
            if m > 16
            else (B(16, 32, 4, 5), B(16, 64, 4, 4), B(16, 128, 4, 3))
        )

        def a8(b):
            return lambda x, w, s, xs: st.matmul(
                x, w, s, x_scale=xs, dtype=jnp.bfloat16, blocks=b, interpret=not GPU
            )

        def a16(b):
            return lambda x, w, s, z: st.matmul(
                x, w, s, zero=z, dtype=jnp.bfloat16, blocks=b, interpret=not GPU
            )

        few = blocks if m <= 16 or O.tiny else blocks[:2]
        jobs = {f"W8A8 {tuple(b)}": (jax.jit(a8(b)), (x8, w8, ws, xs)) for b in blocks} | {
            f"W4A16 {tuple(b)}": (jax.jit(a16(b)), (x, w4, gs, zs)) for b in few
        }
        done = compile_all(jobs, left() - 4)
        some = np.arange(m)[:: max(1, m // 8)]
        extra, runs = {}, {}
        want = {
            "W8A8": f64(x8)[some] @ exact8 * f64(xs)[some, None],
            "W4A16": f64(x)[some] @ exact4,
        }
        for s in done:
            try:
                sets = [jobs[s][1]] + [
                    tuple(jnp.array(v, copy=True) for v in jobs[s][1])
                    for _ in range(0 if O.tiny else 5)
                ]
                out = jax.block_until_ready(done[s](*sets[0]))
                extra[s] = {"error": rel(out[some], want[s.split()[0]])}
                runs[s] = lambda i, s=s, sets=sets: done[s](*sets[i % len(sets)])
            except Exception as error:
                failed(f"M {m} {s}", error)
        report(f"{m}x{k}x{n}", 2 * m * k * n, k * n, runs, extra)


def torch_part():
    try:
        import torch
        import triton
        import triton_kernels as tk
    except Exception as error:
        return print(f"torch: skipped, {error}")
    if not torch.cuda.is_available():
        return print(
            "torch: needs a GPU, skipped (Triton kernels compiled ahead of time by aot_triton.py instead)"
        )
    dev = "cuda"
    torch.manual_seed(0)
    note("versions", torch=torch.__version__, triton=triton.__version__)

    def clock(run, sets, calls=12):
        """Mean us of a call, in a CUDA graph that goes through several copies of the weights."""
        run(*sets[0])
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for s in sets:
                run(*s)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                run(*sets[i % len(sets)])
        times = []
        for _ in range(7):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b) / calls)
        return 1e3 * statistics.median(times)

    def row(name, run, sets, flops, bytes_, **extra):
        try:
            us = clock(run, sets)
            note(name, us=us, tops=flops / us / 1e6, tb_s=bytes_ / us / 1e6, **extra)
        except Exception as error:
            failed(name, error)

    def err(a, b):
        return float((a.double() - b).norm() / b.norm())

    def copies(t, k):
        return [t] + [t.clone() for _ in range(k - 1)]

    for k, n in ((4096, 14336), (14336, 4096)):
        wb, w8 = (
            torch.randn(n, k, device=dev, dtype=torch.bfloat16) / k**0.5,
            torch.randint(-127, 128, (n, k), device=dev, dtype=torch.int8),
        )
        wbs, w8s = copies(wb, 3), copies(w8, 5)
        ws = torch.rand(n, device=dev) * 1e-3 + 1e-3
        w4 = torch.randint(0, 256, (n, k // 2), device=dev, dtype=torch.uint8)
        w4s = copies(w4, 9)
        gs = torch.rand(k // 128, n, device=dev) * 1e-3 + 1e-3
        zs = torch.randint(0, 16, (k // 128, n), device=dev, dtype=torch.int8)
        b3 = w4.view(n, k // 128, 64)
        w4f = (
            (torch.cat([b3 & 15, b3 >> 4], 2).double() - zs.T[:, :, None])
            * gs.T[:, :, None].double()
        ).view(n, k)
        for m in (2048, 16, 1) if k > n else (2048, 16, 1, 128):
            if left() < 4:
                note(f"{m}x{k}x{n}", skipped="time")
                continue
            x, x8, xs = (
                torch.randn(m, k, device=dev, dtype=torch.bfloat16),
                torch.randint(-127, 128, (m, k), device=dev, dtype=torch.int8),
                torch.rand(m, device=dev) * 1e-3 + 1e-3,
            )
            flops, label = 2 * m * k * n, f"{m}x{k}x{n}"
            row(f"{label} torch bf16", lambda w: x @ w.T, [(w,) for w in wbs], flops, 2 * k * n)
            if m > 16:
                row(
                    f"{label} torch _int_mm",
                    lambda w: torch._int_mm(x8, w.T),
                    [(w,) for w in w8s],
                    flops,
                    k * n,
                )
            if m >= 16:
                try:
                    xf, wf = x.to(torch.float8_e4m3fn), [w.to(torch.float8_e4m3fn) for w in wbs]
                    row(
                        f"{label} torch fp8 rowwise",
                        lambda w: torch._scaled_mm(
                            xf,
                            w.T,
                            scale_a=xs[:, None],
                            scale_b=ws[None, :],
                            out_dtype=torch.bfloat16,
                        ),
                        [(w,) for w in wf],
                        flops,
                        k * n,
                    )
                except Exception as error:
                    failed(f"{label} fp8", error)
                row(f"{label} triton quantize rows", lambda a: tk.quantize(a), [(x,)], 0, 3 * m * k)
            want8 = (
                (x8[:16].double() @ w8.double().T) * xs[:16, None].double() * ws.double()
                if m > 1
                else None
            )
            tiles = (
                [
                    (128, 256, 128, 8, 3, "tma"),
                    (128, 256, 128, 8, 4, "ptr"),
                    (128, 128, 128, 8, 4, "tma"),
                    (128, 128, 128, 4, 4, "ptr"),
                ]
                if m > 128
                else [(64, 128, 128, 4, 4, "ptr"), (128, 64, 128, 4, 5, "ptr")]
                if m > 16
                else [
                    (16, 64, 256, 4, 4, "ptr"),
                    (16, 128, 128, 4, 5, "ptr"),
                    (16, 32, 256, 4, 5, "ptr"),
                ]
            )
            for t in tiles if m > 1 else []:
                if left() < 4:
                    break
                try:

                    def run(w):
                        return tk.w8a8(x8, w, xs, ws, t)

                    out = run(w8)
                    row(
                        f"{label} triton W8A8 {t}",
                        run,
                        [(w,) for w in w8s],
                        flops,
                        k * n,
                        error=err(out[:16], want8),
                    )
                except Exception as error:
                    failed(f"{label} triton W8A8 {t}", error)
            if m <= 16:
                want4 = x.double() @ w4f.T
                for t in (
                    ((16, 64, 4, 4), (16, 32, 4, 5), (16, 128, 4, 4))
                    if m > 1
                    else ((1, 16, 4, 4), (1, 8, 2, 6), (16, 32, 4, 5))
                ):
                    if left() < 4:
                        break
                    try:

                        def run(w):
                            return tk.w4a16(x, w, gs, zs, t)

                        out = run(w4)
                        row(
                            f"{label} triton W4A16 {t}",
                            run,
                            [(w,) for w in w4s],
                            flops,
                            k * n / 2,
                            error=err(out, want4),
                        )
                    except Exception as error:
                        failed(f"{label} triton W4A16 {t}", error)


try:
    {"torch": torch_part}.get(PART, globals().get(PART))()
except Exception as error:
    failed("part", error)
print(f"{PART}: {time.time() - START:.0f} s", flush=True)
sys.stdout.flush()
os._exit(0)  # compilations still in the pool do not hold it up
