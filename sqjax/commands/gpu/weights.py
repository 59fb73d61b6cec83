"""Random quantized weights, made on the device in the form that they have in memory.

No float weight is made first: a model that fits quantized need not fit in float, and the peak of
memory is the model's own.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax._trees import map_named
from sqjax.commands.gpu.notes import Notes, on_gpu
from sqjax.models import Model
from sqjax.numerics.formats import FORMATS
from sqjax.weights import schemes
from sqjax.weights.qtensor import QTensor
from sqjax.weights.quant_weight import QuantWeight
from sqjax.weights.quantize import quantize_weight
from sqjax.weights.schemes import Scheme
from sqjax.weights.sizes import weight_bytes

#: What every part measures beside bfloat16.
SCHEMES = {
    "W8A8_O1": schemes.W8A8_O1,
    "W8A8_O2": schemes.W8A8_O2,
    "W8A8_O3": schemes.W8A8_O3,
    "FP8": schemes.FP8,
    "W8A16": schemes.W8A16,
    "W4A16": schemes.W4A16,
    "W4A8": schemes.W4A8,
}
BF16 = "bf16"
#: The largest activation that a static scale of a random weight covers: four deviations.
LARGEST_ACTIVATION = 4.0
#: So many rows are drawn; the others repeat them, because drawing 58 million numbers takes more
#: memory than the numbers do.
_DRAWN = 128
#: Of float8 weights, as they fill its range of 448.
_FLOAT8_DEVIATION = 64.0


#: The row of part "check" that says whether the Mosaic kernels are right.
KERNELS = "Mosaic kernels"


def measures_mosaic(notes: Notes) -> bool:
    """Whether the Mosaic kernels are there, and part "check" did not find them wrong.

    Because a kernel that never ends, or reads beyond its arrays, takes all that its process would
    have measured after it.
    """
    if not has_mosaic():
        return False
    if notes.found_wrong("check", KERNELS):
        notes.leave_out([f"{KERNELS}: not right in part check"])
        return False
    return True


def has_mosaic() -> bool:
    """Whether jax has the Mosaic kernels, and the card is a Hopper, or is played by a processor."""
    card: Any = jax.devices()[0]
    is_hopper = not on_gpu() or str(card.compute_capability).startswith("9.")
    return jax.__version_info__ >= (0, 11) and is_hopper


@partial(jax.jit, static_argnames=("shape", "dtype", "largest"))
def random_integers(
    key: Array, shape: tuple[int, int], dtype: Any, largest: int
) -> Array:
    """Integers from -largest to largest, all as likely."""
    block = jax.random.randint(
        key, _drawn(shape), -largest, largest + 1, jnp.int8
    )
    return _repeated(block.astype(dtype), shape)


@partial(jax.jit, static_argnames=("shape", "dtype", "deviation"))
def random_floats(
    key: Array, shape: tuple[int, int], dtype: Any, deviation: float = 1.0
) -> Array:
    """Normal floats of this deviation."""
    block = jax.random.normal(key, _drawn(shape)) * deviation
    return _repeated(block.astype(dtype), shape)


def _drawn(shape: tuple[int, int]) -> tuple[int, int]:
    return math.gcd(shape[0], _DRAWN), shape[1]


def _repeated(block: Array, shape: tuple[int, int]) -> Array:
    return jnp.tile(block, (shape[0] // block.shape[0], 1))


def random_weight(
    key: Array, shape: tuple[int, int], scheme: Scheme | None
) -> QuantWeight | Array:
    """A weight whose product with activations of variance 1 has variance 1, for bfloat16 inputs.

    Args:
        key: what it is drawn with.
        shape: (inputs, outputs), of which the inputs are contracted.
        scheme: how it is quantized; None for a bfloat16 array.

    Returns:
        Of this shape, seen as a float array.
    """
    inputs, _ = shape
    if scheme is None:
        return random_floats(key, shape, jnp.bfloat16, inputs**-0.5)
    form = jax.eval_shape(
        lambda kernel, absmax: quantize_weight(kernel, (0,), scheme, absmax),
        jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((inputs,), jnp.float32),
    )
    input_scale = None
    if form.input_scale is not None:
        largest = FORMATS[form.activation_format].bound
        input_scale = jnp.float32(LARGEST_ACTIVATION / largest)
    tensor = _filled(form.tensor, key, inputs)
    return replace(form, tensor=tensor, input_scale=input_scale)


def _filled(form: QTensor, key: Array, inputs: int) -> QTensor:
    """A tensor with random values and constant scales, where `form` has their shapes."""
    shape, dtype, bound = form.values.shape, form.values.dtype, form.fmt.bound
    if form.fmt.floating:
        deviation = _FLOAT8_DEVIATION
        values = random_floats(key, shape, dtype, deviation)
    else:
        largest = int(bound)
        deviation = float(np.std(np.arange(-largest, largest + 1)))
        values = random_integers(key, shape, dtype, largest)
    group_scale = form.group_scale
    if group_scale is not None:
        # Seven steps of int4 stay inside int8 then.
        group_scale = jnp.full(group_scale.shape, 15, group_scale.dtype)
        deviation *= 15
    zero = form.zero
    if zero is not None:
        zero = jnp.zeros(zero.shape, zero.dtype)
    scale = jnp.full(form.scale.shape, inputs**-0.5 / deviation, jnp.float32)
    return replace(
        form, values=values, scale=scale, zero=zero, group_scale=group_scale
    )


def random_model(
    model: Model, scheme: Scheme | None, key: Array
) -> dict[str, Any]:
    """Parameters with every matmul in this scheme, or in bfloat16; gains are 1."""
    shapes = jax.eval_shape(partial(model.init, dtype=jnp.bfloat16), key)

    def drawn(path: str, leaf: Any) -> Any:
        if path.endswith("kernel"):
            return random_weight(key, leaf.shape, scheme)
        if leaf.ndim == 2:
            return random_floats(key, leaf.shape, jnp.bfloat16)
        return jnp.ones(leaf.shape, jnp.bfloat16)

    return map_named(drawn, shapes)


def in_turn(make: Callable[[Array], Any], rotated: int) -> list[Any]:
    """Several trees, of `rotated` bytes together, so that calls in turn find none in a cache."""
    first = make(jax.random.key(0))
    copies = min(12, rotated // weight_bytes(first))
    return [first, *(make(jax.random.key(1 + i)) for i in range(copies))]


def some_outputs(tensor: QTensor, count: int) -> np.ndarray:
    """The first outputs of a quantized matrix, (count, inputs) in float64, by numpy alone."""

    def part(array: Any) -> Any:
        """The first outputs of an array, each scale repeated for the channels that share it."""
        host = np.asarray(array)
        held = host[: count if host.shape[0] > 1 else 1].astype(np.float64)
        if held.shape[1] == 1:
            return held
        shared = tensor.group or 1
        return np.repeat(held, shared, axis=1)[:, :inputs]

    inputs = tensor.values.shape[1]
    values = np.asarray(tensor.values)[:count].astype(np.float64)
    if tensor.zero is not None:
        values = values - part(tensor.zero)
    if tensor.group_scale is not None:
        values = values * part(tensor.group_scale)
    return values * part(tensor.scale)
