"""Part "check": whether results on this device are right."""

import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.commands.gpu import exact
from sqjax.commands.gpu.notes import Notes, on_gpu
from sqjax.commands.gpu.weights import KERNELS, has_mosaic
from sqjax.commands.gpu.wholes import MODELS, generation, of_model, relative
from sqjax.commands.gpu.wholes import SHAPES as MODEL_SHAPES
from sqjax.files.loading import load
from sqjax.files.saving import save
from sqjax.layers import linen, nnx
from sqjax.models.slots import CACHE_FORMATS
from sqjax.runtime.quantized import quantized
from sqjax.weights.kernels import with_kernel
from sqjax.weights.qtensor import dequantize
from sqjax.weights.quantize import quantize_weight
from sqjax.weights.schemes import FP8, W8A8_O1, W8A8_O2, W8A8_O3, Scheme

#: (rows, inputs, outputs) of the products.
SHAPES = (32, 256, 192), (5, 384, 72)
#: Of the layer that may hold no copy of its weight: larger than an activation, and than the 32 MB
#: that XLA may give cuBLAS to work with.
LAYER = 48, 4096, 14336
#: Of what the Mosaic kernels multiply: few rows, and many, have tiles of their own, and in both
#: there are more blocks than a card has multiprocessors, which take turns then.
KERNEL_SHAPES = (5, 256, 32768), (300, 512, 16384)
TINY_KERNEL = 5, 256, 384
#: The schemes that they have programs for.
IN_KERNELS = ("W8A8_O1", "W8A8_O2", "W8A8_O3", "FP8", "W8A16", "W4A16")
#: How far float products may be from numpy's: results of the last two are rounded to bfloat16.
BFLOAT16_ERROR = 2.0**-8
Figures = Mapping[str, Any]


def check(notes: Notes) -> None:
    """Runs every check; a row says whether it holds, with what was measured."""
    # A tiny run leaves out what is the same again, because compiling takes a processor minutes.
    most = 1 if notes.tiny else None
    for shape in SHAPES[:most]:
        _attempt(notes, f"products {_by(shape)}", partial(products, shape))
    _attempt(notes, f"as on a CPU {_by(SHAPES[0])}", as_on_a_cpu)
    for shape in SHAPES[:most]:
        _attempt(notes, f"layers {_by(shape)}", partial(layers, shape))
    _attempt(notes, "gradients", gradients)
    _attempt(notes, "save, load", saved_and_loaded)
    _attempt(notes, f"no float copy {_by(LAYER)}", no_float_copy)
    shapes = MODEL_SHAPES[:most]
    caches = list(CACHE_FORMATS)[:most]
    first, *others = MODELS
    _attempt(notes, first, partial(of_model, first, shapes))
    _attempt(notes, "generation", partial(generation, caches))
    for name in [] if notes.tiny else others:
        _attempt(notes, name, partial(of_model, name, shapes))
    _kernels(notes, (TINY_KERNEL,) if notes.tiny else KERNEL_SHAPES)


def _kernels(notes: Notes, shapes: Sequence[tuple[int, int, int]]) -> None:
    """The row of the Mosaic kernels, the last one: see `measures_mosaic`."""
    if not has_mosaic() or notes.has(KERNELS) or notes.left() < 0:
        return
    # It stands there if this process is ended.
    notes.add(KERNELS, {"error": "begun, and not ended"})
    _attempt(notes, KERNELS, partial(kernels, shapes))


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _attempt(notes: Notes, name: str, run: Callable[[], Figures]) -> None:
    """Adds the row of one check, if there is none yet and there is time."""
    if notes.has(name):
        return
    if notes.left() < 0:
        notes.leave_out([name])
        return
    try:
        notes.add(name, run())
    except Exception as error:
        traceback.print_exc(limit=-3)
        notes.failed(name, error)


def _product(params: Any, x: Any) -> Any:
    return x @ params["w"]


@jax.jit
def _stored(weights: Any, absmaxes: Any) -> Any:
    """{scheme: its quantized weight}, all in one program."""
    return {
        name: quantize_weight(weight, (0,), exact.SCHEMES[name], absmaxes[name])
        for name, weight in weights.items()
    }


@jax.jit
def _products(stored: Any, activations: Any) -> Any:
    """{scheme: its product}, all in one program."""
    return {
        name: quantized(_product)({"w": weight}, activations[name])
        for name, weight in stored.items()
    }


def _quantized(operands: Mapping[str, Any]) -> Any:
    """{scheme: its weight} of {scheme: (activation, weight)}."""
    weights = {name: jnp.asarray(w) for name, (_, w) in operands.items()}
    absmaxes = {
        name: jnp.asarray(np.abs(x).max(0)) for name, (x, _) in operands.items()
    }
    return _stored(weights, absmaxes)


def _run(operands: Mapping[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    """({scheme: its weight}, {scheme: its product}) of {scheme: (activation, weight)}."""
    activations = {name: jnp.asarray(x) for name, (x, _) in operands.items()}
    stored = _quantized(operands)
    return stored, jax.tree.map(np.asarray, _products(stored, activations))


def products(shape: tuple[int, int, int]) -> Figures:
    """Every scheme beside numpy's integers: equal to the bit; float8 to its sums' rounding."""
    operands = {
        name: exact.operands(scheme, *shape)
        for name, scheme in exact.SCHEMES.items()
    }
    stored, found = _run(operands)
    wrong = []
    for name, scheme in exact.SCHEMES.items():
        expected = exact.expected(operands[name][0], stored[name].tensor)
        if scheme.weight.fmt.floating:
            right = relative(found[name], expected) < exact.FLOAT8_ERROR
        else:
            right = np.array_equal(found[name], expected)
        if not right:
            wrong.append(name)
    return {
        "holds": not wrong,
        "schemes": len(found),
        "wrong": ", ".join(wrong) or "none",
    }


def kernels(shapes: Sequence[tuple[int, int, int]]) -> Figures:
    """What the Mosaic kernels multiply beside numpy: equal to the bit where x is int8."""
    wrong, errors = [], []
    for shape in shapes:
        operands = {
            name: exact.operands(exact.SCHEMES[name], *shape)
            for name in IN_KERNELS
        }
        for name, weight in _quantized(operands).items():
            try:
                error = _error_of_kernel(name, operands[name][0], weight)
            except Exception as failure:
                traceback.print_exc(limit=-3)
                wrong.append(f"{name} {_by(shape)}: {type(failure).__name__}")
                continue
            errors.append(error)
            is_exact = name.startswith("W8A8")
            if error > (0 if is_exact else BFLOAT16_ERROR):
                wrong.append(f"{name} {_by(shape)}")
    return {
        "holds": not wrong,
        "off": max(errors, default=None),
        "wrong": ", ".join(wrong) or "none",
    }


def _product_as_read(tree: Any, x: Any) -> Any:
    return x @ tree["w"].astype(x.dtype)


def _error_of_kernel(name: str, x: np.ndarray, weight: Any) -> float:
    """How far the kernel's product is from numpy's."""
    tree = with_kernel({"w": weight}, "pallas")
    is_quantized = exact.SCHEMES[name].quantizes_activation
    rows = jnp.asarray(x, jnp.float32 if is_quantized else jnp.bfloat16)
    found = jax.jit(quantized(_product_as_read))(tree, rows)
    return relative(found.astype(jnp.float32), exact.expected(x, weight.tensor))


def as_on_a_cpu() -> Figures:
    """Random numbers, which are rounded: int8 products are the same bits as on the processor."""
    rows, inputs, outputs = SHAPES[0]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = rng.normal(size=(inputs, outputs)).astype(np.float32)
    operands = dict.fromkeys(exact.SCHEMES, (x, w))
    _, here = _run(operands)
    with jax.default_device(jax.devices("cpu")[0]):
        _, there = _run(operands)
    errors = {name: relative(here[name], there[name]) for name in here}
    same = [
        name
        for name, scheme in exact.SCHEMES.items()
        if _has_one_integer_sum(scheme)
    ]
    return {
        "holds": all(errors[name] == 0 for name in same),
        "one_integer_sum": max(errors[name] for name in same),
        "all": max(errors.values()),
    }


def _has_one_integer_sum(scheme: Scheme) -> bool:
    """Whether an output is one sum of integers, scaled: sums of groups are added as floats."""
    weight: Any = scheme.weight
    in_integers = getattr(weight, "two_level", False)
    return (
        scheme.quantizes_activation
        and not weight.fmt.floating
        and (weight.group_size is None or in_integers)
    )


def layers(shape: tuple[int, int, int]) -> Figures:
    """The Dense layers of linen and NNX beside numpy's integers."""
    x, w = map(jnp.asarray, exact.operands(W8A8_O1, *shape))
    _, inputs, outputs = shape
    params = linen.quantize_dense({"kernel": w}, W8A8_O1)
    of_linen: Any = linen.QuantDense(outputs, use_bias=False).apply(
        {"params": params}, x
    )
    flax_nnx: Any = import_module("flax.nnx")
    layer = flax_nnx.Linear(
        inputs, outputs, use_bias=False, rngs=flax_nnx.Rngs(0)
    )
    layer.kernel.set_value(w)
    of_nnx = nnx.QuantLinear.from_linear(layer, W8A8_O1)(x)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    return {
        "holds": bool(
            np.array_equal(of_linen, expected)
            and np.array_equal(of_nnx, expected)
        )
    }


def gradients() -> Figures:
    """The gradient for x goes straight through the rounding: it is g W^T of the stored weight."""
    x, w = map(jnp.asarray, exact.operands(W8A8_O1, *SHAPES[0]))
    weight = quantize_weight(w, (0,), W8A8_O1)
    g = jnp.asarray(
        np.random.default_rng(1).normal(size=(x.shape[0], w.shape[1])),
        jnp.float32,
    )

    def loss(x: Any) -> Any:
        return jnp.sum(quantized(_product)({"w": weight}, x) * g)

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.grad(loss))(x)
    stored = np.asarray(dequantize(weight.tensor), np.float64)
    error = relative(found, np.asarray(g, np.float64) @ stored.T)
    return {"holds": error < 1e-5, "off": error}


def saved_and_loaded() -> Figures:
    """A tree with a weight in every scheme, read from a file again: the same bits."""
    operands = {
        name: exact.operands(scheme, *SHAPES[0])
        for name, scheme in exact.SCHEMES.items()
    }
    before, _ = _run(operands)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.safetensors"
        save(path, before)
        after = load(path)
        same = jax.tree.map(
            lambda a, b: a.dtype == b.dtype and bool((a == b).all()),
            before,
            after,
        )
    leaves = jax.tree.leaves(same)
    return {"holds": all(leaves), "leaves": len(leaves)}


def no_float_copy() -> Figures:
    """What programs hold beside arguments and results is less than the weight in int8."""
    rows, inputs, outputs = LAYER
    x = jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    absmax = jax.ShapeDtypeStruct((inputs,), jnp.float32)
    schemes = {
        "O1": W8A8_O1,
        "O2": W8A8_O2,
        "O3": W8A8_O3,
        "FP8": FP8,
    }
    held = {}
    for name, scheme in schemes.items():
        weight = jax.eval_shape(
            lambda w, a, how=scheme: quantize_weight(w, (0,), how, a),
            kernel,
            absmax,
        )
        run = jax.jit(quantized(_product))
        program: Any = run.lower({"w": weight}, x).compile()
        held[name] = program.memory_analysis().temp_size_in_bytes
    # A processor packs weights in its own way.
    enough = max(held.values()) < inputs * outputs
    return {"holds": enough or not on_gpu(), "temporary_bytes": held}
