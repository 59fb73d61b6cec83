"""A quantized matmul as a Pallas-Triton kernel for NVIDIA GPUs.

It is used by explicit choice: nothing in sqjax calls it.

It has never run on a GPU. It is checked in Pallas's interpreter against plain XLA, and compiled
ahead of time for sm_80 and sm_90a; its block sizes were never tuned, and nothing is claimed about
its speed. Pallas's Triton backend is deprecated: jax 0.12 warns when it compiles this for a GPU,
and a later jax will not have it.

What it is for: XLA does not fuse a per-token scale that the same program computes into the matmul,
and writes the product to memory before it is scaled. Nor does it fuse float32 scales of groups: it
writes a float copy of the weight, or one product for each group. Here they stay in registers.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from sqjax.numerics.dots import LAST_AXES, LONGEST_CONTRACTION


class Blocks(NamedTuple):
    """The block of the result that one program computes, and how it is compiled.

    For a few rows take 16.

    Attributes:
        rows: a power of two, at least 16.
        outputs: likewise.
        warps: of 32 threads, that share a block.
        stages: of the pipeline that loads the next channels while the last are multiplied.
    """

    rows: int = 64
    outputs: int = 64
    warps: int = 4
    stages: int = 3


_DEFAULT = Blocks()


#: Channels that are multiplied at once: the int8 matrix units take 32; more than 128 would crowd
#: the shared memory.
_SHORTEST, _LONGEST = 32, 128


def matmul(
    x: Shaped[Array, "..."],
    values: Shaped[Array, "..."],
    scale: Shaped[Array, "..."],
    *,
    x_scale: Shaped[Array, "..."] | None = None,
    zero: Shaped[Array, "..."] | None = None,
    dtype: DTypeLike = jnp.float32,
    blocks: Blocks = _DEFAULT,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """A quantized matmul in groups, in one kernel.

    out[m, n] = x_scale[m] sum_g scale[n, g] sum_{k in g} x[m, k] (values[n, k] - zero[n, g])

    Channels are in `groups` equal runs. An int8 `x` makes every inner sum exact in int32; it is
    then multiplied by its float32 scale, and groups are added in float32. A bfloat16 (or float16)
    `x` meets the values as that float: products are exact (both factors have few enough bits), sums
    in float32. Never run on a GPU: see the module.

    Args:
        x: int8 (rows, channels), or bfloat16 or float16.
        values: int8 or int4 (`jnp.int4`; two to a byte in a GPU's memory) of shape (outputs,
            channels).
        scale: float32 (outputs, groups); one group in all is a scale for each output.
        x_scale: float32 (rows,), for an int8 `x`; it may be computed in the same program. None: 1.
        zero: int8 (outputs, groups), zero points of int4 values, or None: 0.
        dtype: of the result.
        blocks: the block of one program. Rows and outputs need not be its multiples: what is beyond
            is masked.
        interpret: run in Pallas's interpreter, on any machine.

    Raises:
        ValueError: other dtypes or shapes; groups whose length is no multiple of 32 channels; an
            int32 sum could overflow; blocks that are no powers of two from 16.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sqjax import triton
        >>> x, w = jnp.ones((3, 64), jnp.int8), jnp.full((2, 64), 5, jnp.int4)
        >>> triton.matmul(x, w, jnp.array([[1.0, 0.5], [1.0, 2.0]]), interpret=True)[0].tolist()
        [240.0, 480.0]
    """
    operands = {"x": x, "values": values, "scale": scale}
    if zero is not None:
        operands["zero"] = zero
    if x_scale is not None:
        operands["x_scale"] = x_scale
    form = _form(operands)
    if any(size < 16 or size & (size - 1) for size in blocks[:2]):
        raise ValueError(
            "triton.matmul: expected blocks of powers of two, at least 16, got "
            f"{blocks.rows, blocks.outputs}"
        )
    rows, outputs = form.shape
    if not rows * outputs:  # a grid of no programs can not be launched
        return jnp.zeros(form.shape, dtype)
    # Channels are an axis of tiles, because a kernel may index a whole axis, but not slice one.
    for name in ("x", "values"):
        operands[name] = operands[name].reshape(
            operands[name].shape[0], -1, form.tile
        )
    specs = {
        name: _block(name, array.shape, blocks)
        for name, array in operands.items()
    }
    call = pl.pallas_call(
        partial(_kernel, form),
        out_shape=jax.ShapeDtypeStruct(form.shape, dtype),
        grid=(pl.cdiv(rows, blocks.rows), pl.cdiv(outputs, blocks.outputs)),
        in_specs=[specs],
        out_specs=pl.BlockSpec(
            (blocks.rows, blocks.outputs), lambda i, j: (i, j)
        ),
        compiler_params=plgpu.CompilerParams(
            num_warps=blocks.warps, num_stages=blocks.stages
        ),
        interpret=interpret,
        name="quantized_matmul",
    )
    return call(operands)


class _Form(NamedTuple):
    """The sizes of a call: of the result, and how its channels are walked."""

    shape: tuple[int, int]
    groups: int
    tiles: int  # in a group
    tile: int  # channels


def _form(operands: dict[str, Array]) -> _Form:
    """The sizes of a call, after a check that its operands fit together (ValueError if not)."""
    _check_dtypes(operands)
    x, scale = operands["x"], operands["scale"]
    if x.ndim != 2 or scale.ndim != 2:
        raise ValueError(
            "triton.matmul: expected x (rows, channels) and scale (outputs, groups), got "
            f"{x.shape} and {scale.shape}"
        )
    (rows, channels), (outputs, groups) = x.shape, scale.shape
    expected = {
        "values": (outputs, channels),
        "x_scale": (rows,),
        "zero": (outputs, groups),
    }
    for name, array in operands.items():
        if array.shape != expected.get(name, array.shape):
            raise ValueError(
                f"triton.matmul: x {x.shape} and scale {scale.shape} ask for {name} of shape "
                f"{expected[name]}, got {array.shape}"
            )
    length = channels // max(groups, 1)
    # A tile must not reach into the next group, so it divides the group's length.
    tile = math.gcd(length, _LONGEST)
    if length * groups != channels or tile < _SHORTEST:
        raise ValueError(
            f"triton.matmul: {channels} channels in {groups} groups; expected groups of equal "
            f"length, a multiple of {_SHORTEST}; pad x and the values with channels of zero"
        )
    if x.dtype == jnp.int8 and length > LONGEST_CONTRACTION:
        raise ValueError(
            f"triton.matmul: groups of {length} channels; int32 sums are exact up to "
            f"{LONGEST_CONTRACTION}: use more groups"
        )
    return _Form((rows, outputs), groups, length // tile, tile)


_DTYPES: dict[str, tuple[Any, ...]] = {
    "x": (jnp.int8, jnp.bfloat16, jnp.float16),
    "values": (jnp.int8, jnp.int4),
    "scale": (jnp.float32,),
    "x_scale": (jnp.float32,),
    "zero": (jnp.int8,),
}


def _check_dtypes(operands: dict[str, Array]) -> None:
    """Raises ValueError if an operand has a dtype that the kernel does not take."""
    for name, array in operands.items():
        if array.dtype not in _DTYPES[name]:
            names = " or ".join(
                jnp.dtype(dtype).name for dtype in _DTYPES[name]
            )
            raise ValueError(
                f"triton.matmul: expected {name} of dtype {names}, got {array.dtype.name}"
            )
    if "zero" in operands and operands["values"].dtype != jnp.int4:
        raise ValueError(
            "triton.matmul: zero points are for int4 values: int8 values less a zero point may not "
            "fit"
        )
    if "x_scale" in operands and operands["x"].dtype != jnp.int8:
        raise ValueError(
            f"triton.matmul: x_scale is for an int8 x, got an x of dtype {operands['x'].dtype.name}"
        )


def _block(name: str, shape: tuple[int, ...], blocks: Blocks) -> pl.BlockSpec:
    """Blocks along the first axis, which is of rows or of outputs; the other axes whole."""
    rest = (0,) * (len(shape) - 1)
    if name in ("x", "x_scale"):
        return pl.BlockSpec((blocks.rows, *shape[1:]), lambda i, j: (i, *rest))
    return pl.BlockSpec((blocks.outputs, *shape[1:]), lambda i, j: (j, *rest))


def _kernel(form: _Form, refs: dict[str, Any], out_ref: Any) -> None:
    """One block of the result."""
    rows = _inside(0, form.shape[0], out_ref.shape[0])
    outputs = _inside(1, form.shape[1], out_ref.shape[1])
    sum_dtype = jnp.int32 if refs["x"].dtype == jnp.int8 else jnp.float32

    def weight(group: Any, tile: Any) -> Array:
        """A tile of the weight, zero points taken away, in the dtype of x."""
        values = _load(refs["values"].at[:, tile, :], outputs).astype(jnp.int8)
        if "zero" in refs:
            values = values - _load(refs["zero"].at[:, group], outputs)[:, None]
        return values.astype(refs["x"].dtype)

    def add_tile(group: Any, step: Any, sums: Array) -> Array:
        tile = group * form.tiles + step
        x = _load(refs["x"].at[:, tile, :], rows)
        w = weight(group, tile)
        return sums + lax.dot_general(
            x, w, LAST_AXES, preferred_element_type=sum_dtype
        )

    def add_group(group: Any, out: Array) -> Array:
        zeros = jnp.zeros(out_ref.shape, sum_dtype)
        sums = lax.fori_loop(0, form.tiles, partial(add_tile, group), zeros)
        scale = _load(refs["scale"].at[:, group], outputs)
        return out + sums.astype(jnp.float32) * scale[None, :]

    out = lax.fori_loop(
        0, form.groups, add_group, jnp.zeros(out_ref.shape, jnp.float32)
    )
    if "x_scale" in refs:
        out = out * _load(refs["x_scale"], rows)[:, None]
    plgpu.store(out_ref, out.astype(out_ref.dtype), mask=_both(rows, outputs))


def _inside(axis: int, size: int, block: int) -> Array | None:
    """Which rows (or outputs) of this block the result has; None: all."""
    if size % block == 0:
        return None
    return (
        pl.program_id(axis) * block + jnp.arange(block, dtype=jnp.int32) < size
    )


def _load(ref: Any, inside: Array | None) -> Array:
    """What is outside is never read; its value means nothing, and does not reach what is inside."""
    if inside is None:
        return plgpu.load(ref)
    ones = (1,) * (len(ref.shape) - 1)
    return plgpu.load(ref, mask=inside.reshape(-1, *ones))


def _both(rows: Array | None, outputs: Array | None) -> Array | None:
    """The mask of a block of the result."""
    if rows is None:
        return None if outputs is None else outputs[None, :]
    if outputs is None:
        return rows[:, None]
    return jnp.logical_and(rows[:, None], outputs[None, :])
