"""Part "matmul": products of Llama-3-8B's shapes in every scheme, beside what the card can do.

The time is the kernels' own. Beside each product stands the share of the card's arithmetic that it
reaches, measured in the same run by one large bfloat16 product, and the share of its memory's
bandwidth, measured by one copy.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from sqjax.commands.gpu import profile
from sqjax.commands.gpu.notes import Notes, on_gpu
from sqjax.commands.gpu.sizes import FULL, TINY, Size
from sqjax.commands.gpu.weights import (
    BF16,
    SCHEMES,
    in_turn,
    measures_mosaic,
    random_floats,
    random_integers,
    random_weight,
    some_outputs,
)
from sqjax.commands.gpu.wholes import relative
from sqjax.numerics import mosaic, triton
from sqjax.numerics.dots import LAST_AXES
from sqjax.numerics.formats import INT8, to_format
from sqjax.numerics.weight_products import activation_scale
from sqjax.runtime.quantized import quantized
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.sizes import weight_bytes

#: The rows that say what the card can do, and what they measure.
PRODUCT, COPY = "card: bf16 product", "card: copy"
#: Results are compared at so many rows and outputs.
COMPARED = 4, 64
#: How far they may be from numpy's: float8 activations are off by 0.03.
ALLOWED = 0.1
#: Longest time that PyTorch may take, in seconds.
TORCH = 60


class Variant(NamedTuple):
    """One form of a product.

    Attributes:
        run: (weight, activation) -> product.
        scheme: the name of the scheme that its weight is stored in, or "bf16".
        narrow: whether its activation is int8 already.
    """

    run: Callable[[Any, Array], Array]
    scheme: str
    narrow: bool = False


def matmul(notes: Notes) -> None:
    """Measures the card, PyTorch where it is there, and all variants at all shapes."""
    size = TINY if notes.tiny else FULL
    try:
        _card(notes, size)
    except Exception as error:  # the products have no shares then
        notes.failed(PRODUCT, error)
    _beside_torch(notes, size)
    hopper = HOPPER if measures_mosaic(notes) else {}
    variants = VARIANTS | hopper
    others = [name for name in VARIANTS if name not in FIRST]
    of_shape = product(size.shapes, size.rows, (FIRST, tuple(hopper)))
    of_others = product(size.shapes, size.rows, (tuple(others),))
    took: dict[Any, float] = {}
    for shape, rows, names in (*of_shape, *of_others):
        title_of = {name: _name(shape, rows, name) for name in names}
        asked = [name for name in names if not notes.has(title_of[name])]
        # As long as the same took at another shape: tuning is slow where there are many rows.
        if asked and notes.left() < took.get((rows, names), 0.0):
            notes.leave_out([title_of[name] for name in asked])
        elif asked:
            start = time.monotonic()
            chosen = {name: variants[name] for name in asked}
            _attempt(notes, size, shape, rows, chosen)
            took[rows, names] = time.monotonic() - start


def _attempt(
    notes: Notes,
    size: Size,
    shape: tuple[int, int],
    rows: int,
    variants: Mapping[str, Variant],
) -> None:
    """`_measured`; if it fails, what it did not come to is noted, and the next ones go on."""
    try:
        _measured(notes, size, shape, rows, variants)
    except Exception as error:
        for name in variants:
            title = _name(shape, rows, name)
            if not notes.has(title):
                notes.failed(title, error)


def _name(shape: tuple[int, int], rows: int, variant: str) -> str:
    inputs, outputs = shape
    return f"{rows}x{inputs}x{outputs} {variant}"


# The variants -------------------------------------------------------------------------------------


def _in_scheme(weight: Any, x: Array) -> Array:
    return quantized(lambda params, x: x @ params["w"])({"w": weight}, x)


def _bare(weight: QuantWeight, x: Array) -> Array:
    """The int8 product alone."""
    values = weight.tensor.values
    return lax.dot_general(
        x, values, LAST_AXES, preferred_element_type=jnp.int32
    )


def _blocks(rows: int) -> triton.Blocks:
    """The fastest of those that were tried on an H200 (benchmarks/gpu/second_h200.json)."""
    if rows <= 16:
        return triton.Blocks(16, 32, 4, 5)
    return triton.Blocks() if rows <= 128 else triton.Blocks(128, 128, 8, 3)


def _triton_w8a8(weight: QuantWeight, x: Array) -> Array:
    x_scale = activation_scale(x, "per_token", None, INT8)
    return triton.matmul(
        to_format(x, x_scale),
        weight.tensor.values,
        weight.tensor.scale,
        x_scale=x_scale.squeeze(1),
        dtype=jnp.bfloat16,
        blocks=_blocks(x.shape[0]),
        interpret=not on_gpu(),
    )


def _triton_w4a16(weight: QuantWeight, x: Array) -> Array:
    tensor = weight.tensor
    return triton.matmul(
        x,
        tensor.values.astype(jnp.int4),
        tensor.scale,
        zero=tensor.zero,
        dtype=jnp.bfloat16,
        blocks=_blocks(x.shape[0]),
        interpret=not on_gpu(),
    )


def _mosaic_w8a8(weight: QuantWeight, x: Array) -> Array:
    x_scale = activation_scale(x, "per_token", None, INT8)
    return mosaic.matmul(
        to_format(x, x_scale),
        weight.tensor.values,
        weight.tensor.scale,
        x_scale=x_scale.squeeze(1),
        **_mosaic_options(),
    )


def _mosaic_weight_only(weight: QuantWeight, x: Array) -> Array:
    tensor = weight.tensor
    return mosaic.matmul(
        x,
        tensor.values.astype(tensor.fmt.dtype),
        tensor.scale,
        zero=tensor.zero,
        **_mosaic_options(),
    )


def _mosaic_options() -> dict[str, Any]:
    if on_gpu():
        card: Any = jax.devices()[0]
        return {"multiprocessors": card.core_count}
    return {"multiprocessors": 2, "interpret": True}


#: The Mosaic kernels.
HOPPER = {
    "W8A8_O1, Mosaic": Variant(_mosaic_w8a8, "W8A8_O1"),
    "W4A16, Mosaic": Variant(_mosaic_weight_only, "W4A16"),
    "W8A16, Mosaic": Variant(_mosaic_weight_only, "W8A16"),
}
VARIANTS = {
    BF16: Variant(lambda w, x: x @ w, BF16),
    "bare int8": Variant(_bare, "W8A8_O1", narrow=True),
    **{name: Variant(_in_scheme, name) for name in SCHEMES},
    "W8A8_O1, Triton": Variant(_triton_w8a8, "W8A8_O1"),
    "W4A16, Triton": Variant(_triton_w4a16, "W4A16"),
}
#: What says most is measured at all shapes first, because tuning takes seconds a program.
FIRST = (BF16, "bare int8", "W8A8_O1", "W8A8_O3", "FP8", "W4A16")


# Measuring ----------------------------------------------------------------------------------------


def _card(notes: Notes, size: Size) -> None:
    """What the card can do: one large product by its vendor's library, one pass over memory."""
    if notes.has(PRODUCT) and notes.has(COPY):
        return
    n = size.square
    a, b = (
        random_floats(jax.random.key(i), (n, n), jnp.bfloat16, n**-0.5)
        for i in range(2)
    )
    whole = jnp.zeros((size.copied,), jnp.int32)
    # No other generators are tried, which takes long at this size.
    plain: Any = {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_autotune_level": 0,
    }
    product = jax.jit(lambda a, b: a @ b).lower(a, b)
    calls: dict[str, profile.Call] = {
        PRODUCT: partial(_ignoring, product.compile(plain), a, b),
        COPY: partial(_ignoring, jax.jit(lambda x: x + 1), whole),
    }
    work = {PRODUCT: 2.0 * n**3, COPY: 2.0 * whole.nbytes}
    for name, call in calls.items():
        seconds = profile.queued(call, size.repeats)
        kernels = profile.kernels({name: call}, size.repeats)[name]
        figures = profile.timed(kernels, seconds)
        rate = work[name] / figures["us"] / 1e6
        notes.add(name, {**figures, "tera_per_s": rate})


def _ignoring(program: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a program on its first arguments; the last is the call's number."""
    *operands, _ = arguments
    return program(*operands)


@lru_cache(1)
def _weights(
    shape: tuple[int, int], rotated: int
) -> Callable[[str], list[Any]]:
    """A function of a scheme's name that gives weights which take turns.

    Those of the last shape are kept.
    """

    @cache
    def of_scheme(name: str) -> list[Any]:
        make = partial(random_weight, shape=shape, scheme=SCHEMES.get(name))
        return in_turn(make, rotated)

    return of_scheme


def _measured(
    notes: Notes,
    size: Size,
    shape: tuple[int, int],
    rows: int,
    variants: Mapping[str, Variant],
) -> None:
    """Variants at one shape and number of rows: compiled together, timed in one trace."""
    calls = _calls(notes, size, shape, rows, variants)
    walls = {
        name: profile.queued(call, size.repeats) for name, call in calls.items()
    }
    kernels = profile.kernels(calls, size.repeats)
    for name, call in calls.items():
        figures = profile.timed(kernels[name], walls[name])
        us = figures["us"]
        base = _name(shape, rows, BF16)
        if name == BF16:
            figures["to_bf16"] = 1.0
        elif notes.has(base):
            figures["to_bf16"] = notes.row(base)["us"] / us
        figures |= _rates(notes, shape, rows, call.weights[0], us)
        off = _error(call(0), call.weights[0], call.x)
        figures |= {"off": off, "holds": off < ALLOWED}
        plan = call.program.memory_analysis()
        figures["temporary_bytes"] = plan.temp_size_in_bytes
        figures["kernels"] = list(kernels[name][:6])
        notes.add(_name(shape, rows, name), figures)


def _calls(
    notes: Notes,
    size: Size,
    shape: tuple[int, int],
    rows: int,
    variants: Mapping[str, Variant],
) -> dict[str, "_Turns"]:
    """{variant: its calls}, each of which ran once; what fails is noted."""
    key = jax.random.key(rows)
    across = rows, shape[0]
    wide = random_floats(key, across, jnp.bfloat16)
    narrow = random_integers(key, across, jnp.int8, 127)
    jobs, turns = {}, {}
    for name, variant in variants.items():
        x = narrow if variant.narrow else wide
        weights = _weights(shape, size.rotated)(variant.scheme)
        jobs[_name(shape, rows, name)] = jax.jit(variant.run), (weights[0], x)
        turns[name] = weights, x
    programs = profile.compiled(jobs, notes)
    calls = {}
    for name, (weights, x) in turns.items():
        row = _name(shape, rows, name)
        if row not in programs:
            continue
        call = _Turns(programs[row], weights, x)
        try:
            jax.block_until_ready(call(0))
            calls[name] = call
        except Exception as error:
            notes.failed(row, error)
    return calls


class _Turns:
    """Calls of a program on weights that take turns."""

    def __init__(self, program: Any, weights: list[Any], x: Array):
        self.program = program
        self.weights = weights
        self.x = x

    def __call__(self, number: int) -> Any:
        return self.program(self.weights[number % len(self.weights)], self.x)


def _rates(
    notes: Notes,
    shape: tuple[int, int],
    rows: int,
    weight: Any,
    us: float,
) -> dict[str, float]:
    """Operations and bytes of weights a second, and the shares of what the card can do."""
    inputs, outputs = shape
    operations = 2.0 * rows * inputs * outputs / us / 1e6
    read = weight_bytes(weight) / us / 1e6
    figures = {"tera_ops": operations, "tera_bytes": read}
    if notes.has(PRODUCT) and notes.has(COPY):
        figures["of_product"] = operations / notes.row(PRODUCT)["tera_per_s"]
        figures["of_copy"] = read / notes.row(COPY)["tera_per_s"]
    return figures


def _error(found: Array, weight: Any, x: Array) -> float:
    """Relative error of a few results beside numpy's float64 on the stored weight."""
    rows, outputs = COMPARED
    part = np.asarray(x[:rows].astype(jnp.float32), np.float64)
    if isinstance(weight, QuantWeight):
        matrix = some_outputs(weight.tensor, outputs)
        if x.dtype == jnp.int8:  # a product without scales
            matrix = np.asarray(weight.tensor.values[:outputs], np.float64)
    else:
        matrix = np.asarray(weight[:, :outputs].astype(jnp.float32)).T
    got = found[:rows, :outputs].astype(jnp.float32)
    return relative(got, part @ matrix.T.astype(np.float64))


def _beside_torch(notes: Notes, size: Size) -> None:
    """PyTorch's bfloat16 and int8 products, in a process of their own, which shares no memory."""
    if notes.has("torch"):
        return
    asked = {"shapes": size.shapes, "rows": size.rows, "bytes": size.rotated}
    command = [sys.executable, "-m", "sqjax.commands.gpu.beside_torch"]
    failure: Any = None
    try:
        printed: Any = subprocess.run(
            [*command, json.dumps(asked)],
            capture_output=True,
            text=True,
            timeout=TORCH,
            check=True,
        ).stdout
    except (subprocess.SubprocessError, OSError) as error:
        failure, printed = error, getattr(error, "stdout", None) or ""
    if isinstance(printed, bytes):  # as they are after a timeout
        printed = printed.decode()
    # A line that was cut off has no end.
    for line in printed.split("\n")[:-1]:
        row = json.loads(line)
        notes.add(row.pop("name"), row)
    if failure is not None:
        said = getattr(failure, "stderr", None) or str(failure)
        notes.add("torch", {"note": str(said).strip()[-200:]})
