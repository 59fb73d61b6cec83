"""Parts "layer", "model" and "decode": a model of Llama-3-8B's shapes in every scheme.

Its weights are random and made on the device in the form that they have there, so that the peak of
memory is the model's own. "layer" is one layer that reads a prompt, and says which kernels take the
time; "model" is eight of them; "decode" is steps of these eight with a full cache.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.commands.gpu import profile
from sqjax.commands.gpu.notes import Notes
from sqjax.commands.gpu.sizes import FULL, TINY, Size
from sqjax.commands.gpu.weights import (
    BF16,
    SCHEMES,
    measures_mosaic,
    random_model,
)
from sqjax.models import Model
from sqjax.models.cache import KVCache
from sqjax.runtime.quantized import quantized
from sqjax.weights.kernels import with_kernel
from sqjax.weights.sizes import weight_bytes

#: Schemes that are compiled together, because that takes longest. The first three stand
#: in the order of their memory, so that each peak is seen; a tiny run has these alone.
BATCHES = (
    ("W4A16", "W8A8_O1", BF16),
    ("W8A8_O3", "FP8", "W8A16", "W8A8_O2", "W4A8"),
)
#: Stands behind the name of a scheme whose matmuls are the Mosaic kernels, where there are any.
MOSAIC = ", Mosaic"
IN_KERNELS = tuple(name + MOSAIC for name in ("W4A16", "W8A8_O1", "FP8"))
#: Slots of a cache beyond its context, for the steps that are timed.
STEPS = 64
#: Kernels of a layer that the record names.
NAMED = 25


class Case(NamedTuple):
    """What is run.

    Attributes:
        name: as rows have it.
        ids: the tokens that are read.
        cache: makes the cache that they are read into.
        grows: whether the cache goes from one call to the next, as in a loop.
    """

    name: str
    ids: Array
    cache: Callable[[], KVCache]
    grows: bool


def layer(notes: Notes) -> None:
    """One layer that reads a prompt, with a table of its kernels."""
    size = _size(notes)
    _all(notes, size, _model(size, 1), _prefill, named=NAMED)


def model(notes: Notes) -> None:
    """The whole model reads a prompt."""
    size = _size(notes)
    _all(notes, size, _model(size, size.layers), _prefill)


def decode(notes: Notes) -> None:
    """Steps of the whole model at several batch sizes, with a full cache."""
    size = _size(notes)
    _all(notes, size, _model(size, size.layers), _steps)


def _size(notes: Notes) -> Size:
    return TINY if notes.tiny else FULL


def _model(size: Size, layers: int) -> Model:
    return Model(replace(size.config, num_layers=layers))


def _ids(size: Size, rows: int, tokens: int) -> Array:
    """Tokens; which they are does not change how long it takes."""
    numbers = np.arange(rows * tokens).reshape(rows, tokens)
    return jnp.asarray(numbers % size.config.vocab_size, jnp.int32)


def _prefill(size: Size, model: Model) -> Iterable[Case]:
    def cache() -> KVCache:
        return model.init_cache(1, size.prompt, jnp.bfloat16)

    name = f"prefill {size.prompt}"
    yield Case(name, _ids(size, 1, size.prompt), cache, grows=False)


def _steps(size: Size, model: Model) -> Iterable[Case]:
    for batch in size.batches:

        def cache(batch: int = batch) -> KVCache:
            room = size.context + STEPS
            empty = model.init_cache(batch, room, jnp.bfloat16)
            return empty._replace(length=jnp.int32(size.context))

        name = f"decode, batch {batch}"
        yield Case(name, _ids(size, batch, 1), cache, grows=True)


def _all(
    notes: Notes,
    size: Size,
    model: Model,
    cases: Callable[[Size, Model], Iterable[Case]],
    named: int = 0,
) -> None:
    """Measures all cases in all schemes, then says how many times as fast as bfloat16 each is."""
    longest = 0.0
    for schemes in _batches(notes):
        # Kernels are not tuned, which takes most of the others' time.
        needed = 0.0 if schemes[0] in IN_KERNELS else longest
        missing = {
            f"{case.name} {scheme}": (scheme, case)
            for scheme in schemes
            for case in cases(size, model)
            if not notes.has(f"{case.name} {scheme}")
        }
        if missing and notes.left() < needed:
            notes.leave_out(list(missing))
        elif missing:
            start = time.monotonic()
            _measured(notes, size, model, missing, named)
            longest = max(longest, time.monotonic() - start)
    for case in cases(size, model):
        _sum_up(notes, case.name)


def _batches(notes: Notes) -> list[tuple[str, ...]]:
    """Names of schemes, and of kernels, that are compiled together."""
    first, *others = BATCHES[:1] if notes.tiny else BATCHES
    in_kernels = IN_KERNELS[:1] if notes.tiny else IN_KERNELS
    return [first, *[in_kernels] * measures_mosaic(notes), *others]


def _measured(
    notes: Notes,
    size: Size,
    model: Model,
    rows: Mapping[str, tuple[str, Case]],
    named: int,
) -> None:
    """Rows {name: (scheme, case)}: all compiled together, then timed one after another.

    Nothing is on the device while it compiles, because kernels that are tried out need memory too.
    """
    shapes = {
        scheme: jax.eval_shape(partial(_params, model, scheme))
        for scheme, _ in rows.values()
    }
    jobs = {}
    for row, (scheme, case) in rows.items():
        run = jax.jit(
            quantized(model.decode),
            donate_argnums=(2,) if case.grows else (),
        )
        cache = jax.eval_shape(case.cache)
        jobs[row] = run, (shapes[scheme], case.ids, cache)
    programs = profile.compiled(jobs, notes)
    held, params = None, None
    for row, (scheme, case) in rows.items():
        if row not in programs:
            continue
        try:
            if scheme != held:
                params = None  # before the next ones are made
                held, params = scheme, _params(model, scheme)
            notes.add(row, _timed(programs[row], params, case, size, named))
        except Exception as error:
            notes.failed(row, error)


def _params(model: Model, scheme: str) -> Any:
    of_scheme = SCHEMES.get(scheme.removesuffix(MOSAIC))
    params = random_model(model, of_scheme, jax.random.key(0))
    return with_kernel(params, "pallas") if MOSAIC in scheme else params


class _Calls:
    """Calls of a program; a cache that grows is given away to each, and comes back from it."""

    def __init__(self, program: Any, params: Any, case: Case):
        self.program = program
        self.params = params
        self.case = case
        self.cache = case.cache()

    def __call__(self, number: int) -> Any:
        logits, cache = self.program(self.params, self.case.ids, self.cache)
        if self.case.grows:
            self.cache = cache
        return logits


def _timed(
    program: Any, params: Any, case: Case, size: Size, named: int
) -> dict[str, Any]:
    """Times, rates and memory of one program."""
    before = _peak()
    call = _Calls(program, params, case)
    finite = bool(jnp.isfinite(call(0)).all())
    single = profile.alone(call, size.repeats)
    after = _peak()  # before calls queue up, each with results of its own
    wall = profile.queued(call, size.repeats)
    kernels = profile.kernels({"": call}, size.repeats)[""]
    times = profile.timed(kernels, wall)
    us = times["us"]
    weights, held = weight_bytes(params), weight_bytes(call.cache)
    operations = 2.0 * _multiplied(params) * case.ids.size
    figures: dict[str, Any] = {
        "ms": us / 1e3,
        "wall_ms": times["wall_us"] / 1e3,
        "alone_ms": 1e3 * single,
        "tera_ops": operations / us / 1e6,
        "tera_bytes": (weights + held) / us / 1e6,
        "weight_bytes": weights,
        "cache_bytes": held,
        "program_bytes": _planned(program),
        "launches": sum(kernel.launches for kernel in kernels),
        "kinds": _kinds(kernels),
        "holds": finite,
    }
    if "note" in times:
        figures["note"] = times["note"]
    if after > before:  # else a program before this one held more
        figures["peak_bytes"] = after
    if named:
        figures["kernels"] = _explained(kernels[:named], program.as_text())
    return figures


def _peak() -> int:
    """The most bytes that this process has held on the device so far; 0 where nobody counts."""
    counted = jax.devices()[0].memory_stats() or {}
    return counted.get("peak_bytes_in_use", 0)


def _planned(program: Any) -> int:
    """The bytes that the compiler plans for arguments, results and what is between them."""
    plan = program.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )


def _multiplied(params: Any) -> int:
    """The weights that every token meets: all kernels, but not the table of embeddings."""
    kernels = {**params["model"]["layers"], "lm_head": params["lm_head"]}
    leaves = jax.tree.leaves(
        kernels, is_leaf=lambda leaf: hasattr(leaf, "shape")
    )
    return sum(int(np.prod(leaf.shape)) for leaf in leaves if leaf.ndim == 2)


# What kernels do ----------------------------------------------------------------------------------

#: {what a kernel does: a pattern of its name}; the first that is found counts.
KINDS = {
    "copy": r"memcpy|memset|copy",
    "matmul": r"gemm|nvjet|cublas|cutlass|xmma|wgmma|dot|quantized_matmul|mosaic",
    "transpose": r"transpose",
    "reduce": r"reduce|softmax",
    "elementwise": r"fusion|wrapped",
}


def kind_of(name: str) -> str:
    """What a kernel does, by its name; "other" where it tells nothing."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name.lower()):
            return kind
    return "other"


def _kinds(kernels: Sequence[profile.Kernel]) -> dict[str, float]:
    """Microseconds of each kind, the longest first."""
    sums: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        sums[kind_of(kernel.name)] += kernel.microseconds
    return dict(sorted(sums.items(), key=lambda kind: -kind[1]))


_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = (\S+) [\w-]+\(.*?$", re.MULTILINE
)


def _explained(
    kernels: Sequence[profile.Kernel], program: str
) -> list[list[Any]]:
    """[name, launches, microseconds, result and source] of kernels, by the program's text."""
    sources = {}
    for found in _INSTRUCTION.finditer(program):
        source = re.search(r'op_name="([^"]*)"', found[0])
        name = re.sub(r"[.-]", "_", found[1])
        sources[name] = f"{found[2]} {source[1][-90:] if source else ''}"
    return [
        [*kernel, sources.get(re.sub(r"[.-]", "_", kernel.name), "")]
        for kernel in kernels
    ]


def _sum_up(notes: Notes, case: str) -> None:
    """How many times as fast as bfloat16 each scheme is, by kernels and by calls."""
    base = f"{case} {BF16}"
    if not notes.has(base):
        return
    ratios = {}
    for scheme in (*SCHEMES, *IN_KERNELS):
        row = f"{case} {scheme}"
        if notes.has(row) and "ms" in notes.row(row):
            ratios[scheme] = notes.row(base)["ms"] / notes.row(row)["ms"]
    notes.add(f"{case}, times as fast as {BF16}", ratios)
