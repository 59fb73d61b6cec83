"""A quantized matmul for Hopper GPUs (sm_90a), as a Pallas Mosaic-GPU kernel.

It is used by explicit choice: for weights that `sqjax.with_kernel` gives it, and by `sqjax bench
gpu`, which measures it.

This form of it has not run on a GPU yet; a prototype with the same steps has (benchmarks/gpu). It
is checked in Pallas's interpreter against numpy, and lowered ahead of time for sm_90a. It needs jax
0.11 or later, because its interface in jax 0.10 is another.

What it is for: sums are scaled while they are in registers, where XLA writes int32 sums to memory
and scales them there; and int4 weights become floats in registers, where XLA writes a float copy of
the weight.

One warpgroup loads tiles of both operands; two others multiply, each with half of the tile's rows:

    out[r, c] = row_scale[r] col_scale[c] sum_k a[r, k] b[c, k]

Example: W8A8 with 300 rows and 1,024 outputs has a = x, padded to 512 rows, and b = the weight, in
blocks of 256 rows and 128 outputs. With few rows, or a float x, the sides change: a is the weight,
which may be converted on its way to the matrix units, as only their first operand may come from
registers.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from sqjax.numerics.dots import LONGEST_CONTRACTION

#: Channels that are loaded at once: a row of int8 fills the 128 bytes of a swizzle.
_CHANNELS = 128
#: Warpgroups that multiply.
_MULTIPLYING = 2
#: Rows of activations up to which the weight is the first operand.
_FEW = 64
#: A piece of the result that is written at once has so many rows, and columns of so many bytes.
_PIECE_ROWS, _PIECE_BYTES = 64, 128
#: Blocks that follow one another share so many columns of blocks, which then are in the L2 cache.
_SNAKE = 8


class Tiles(NamedTuple):
    """What one warpgroup multiplies at once, by the names of the kernel's own sides.

    Attributes:
        rows: of the first operand; a multiple of 64.
        cols: of the second operand; a multiple of 8.
        stages: of the pipeline that loads the next channels while the last are multiplied.
    """

    rows: int
    cols: int
    stages: int


def matmul(
    x: Shaped[Array, "..."],
    values: Shaped[Array, "..."],
    scale: Shaped[Array, "..."],
    *,
    x_scale: Shaped[Array, "..."] | None = None,
    zero: Shaped[Array, "..."] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    multiprocessors: int = 132,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """A quantized matmul in one kernel; see the module, and `sqjax.triton.matmul` for the formula.

    An int8 `x` makes every sum exact in int32. A float8 `x` meets float8 values as Hopper's matrix
    units add them, with fewer bits than float32 has. A bfloat16 `x` meets the weight as bfloat16:
    with one scale for an output its integers are exact there; in groups they are multiplied by
    their scale first, and rounded as XLA's own bfloat16 copy of the weight would be.

    Args:
        x: int8, float8_e4m3fn or bfloat16 (rows, channels).
        values: (outputs, channels), of x's dtype; int8 or int4 for a bfloat16 x.
        scale: float32 (outputs, groups); one group but for a bfloat16 x.
        x_scale: float32 (rows,), but for a bfloat16 x. None: 1.
        zero: int8 (outputs, groups), zero points of int4 values, or None: 0.
        dtype: of the result, bfloat16 or float32.
        multiprocessors: blocks that run at once, the others take turns. An H100 or H200 in SXM
            form has 132 multiprocessors.
        interpret: run in Pallas's interpreter, on any machine; with few multiprocessors, because it
            plays all of them.

    Raises:
        ValueError: other dtypes or shapes; channels or outputs that are no multiples of 128; groups
            whose length is none; an int32 sum that could overflow; jax 0.10.

    Examples:
        >>> import jax.numpy as jnp
        >>> import sqjax as sq
        >>> x, w = jnp.ones((3, 100), jnp.int8), jnp.ones((128, 100), jnp.int8)
        >>> sq.mosaic.matmul(x, w, jnp.ones((128, 1)))
        Traceback (most recent call last):
        ValueError: mosaic.matmul: expected channels and outputs in multiples of 128, got 100 and
            128
    """
    _check(x, values, scale, x_scale, zero)
    rows, outputs = x.shape[0], values.shape[0]
    if not rows:
        return jnp.zeros((0, outputs), dtype)
    if x_scale is None:
        x_scale = jnp.ones((rows,), jnp.float32)
    is_swapped = x.dtype != values.dtype or rows <= _FEW
    tiles = _tiles(rows, is_swapped)
    step = tiles.cols if is_swapped else _MULTIPLYING * tiles.rows
    beyond = -rows % step
    x = jnp.pad(x, ((0, beyond), (0, 0)))
    x_scale = jnp.pad(x_scale, (0, beyond))
    in_groups, output_scale = _of_groups(values, scale, zero)
    call = partial(_call, tiles, dtype, multiprocessors, interpret)
    if is_swapped:
        out = call(values, x, output_scale, x_scale, *in_groups)
        return out.T[:rows]
    return call(x, values, x_scale, output_scale)[:rows]


def _tiles(rows: int, is_swapped: bool) -> Tiles:
    """Those that were the fastest of some on an H200 (benchmarks/gpu/second_h200.json)."""
    if not is_swapped:
        return Tiles(128, 128, 4) if rows > 128 else Tiles(64, 128, 6)
    cols = next(size for size in (16, 32, 64, 128) if size >= min(rows, 128))
    return Tiles(64, cols, 8 if cols <= 32 else 4)


def _of_groups(
    values: Array, scale: Array, zero: Array | None
) -> tuple[list[Array], Array]:
    """([what is multiplied and subtracted for each run of channels], the scale of each output).

    The first are float32 (channels / 128, outputs): a run is what is loaded at once.
    """
    outputs, channels = values.shape
    if scale.shape[1] == 1 and zero is None:
        return [], scale[:, 0]
    runs = channels // _CHANNELS
    of_run = [scale] if zero is None else [scale, zero.astype(jnp.float32)]
    repeated = [
        jnp.repeat(array.T, runs // scale.shape[1], axis=0) for array in of_run
    ]
    return repeated, jnp.ones((outputs,), jnp.float32)


def _check(
    x: Array,
    values: Array,
    scale: Array,
    x_scale: Array | None,
    zero: Array | None,
) -> None:
    """Raises ValueError for operands that the kernel does not take, or that do not fit."""
    kinds = x.dtype.name, values.dtype.name
    allowed = [
        ("int8", "int8"),
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("bfloat16", "int8"),
        ("bfloat16", "int4"),
    ]
    if kinds not in allowed:
        raise ValueError(
            f"mosaic.matmul: expected dtypes of x and the values among {allowed}, got {kinds}"
        )
    (rows, channels), (outputs, groups) = x.shape, scale.shape
    expected = {
        "values": (values, (outputs, channels)),
        "x_scale": (x_scale, (rows,)),
        "zero": (zero, (outputs, groups)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"mosaic.matmul: x {x.shape} and scale {scale.shape} ask for {name} of shape "
                f"{shape}, got {array.shape}"
            )
    if channels % _CHANNELS or outputs % _CHANNELS:
        raise ValueError(
            f"mosaic.matmul: expected channels and outputs in multiples of {_CHANNELS}, got "
            f"{channels} and {outputs}"
        )
    _check_groups(x, values, groups, x_scale, zero)
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise ValueError(
            f"mosaic.matmul: expected jax 0.11 or later, got {jax.__version__}; "
            "take sqjax.triton.matmul, or install a later jax"
        )


def _check_groups(
    x: Array, values: Array, groups: int, x_scale: Any, zero: Any
) -> None:
    """Raises ValueError for groups, scales and zero points that do not go with the dtypes."""
    channels = x.shape[1]
    if channels % (groups * _CHANNELS):
        raise ValueError(
            f"mosaic.matmul: {channels} channels in {groups} groups; expected groups of equal "
            f"length, a multiple of {_CHANNELS}"
        )
    is_narrow = x.dtype != jnp.bfloat16
    if is_narrow and (groups > 1 or channels > LONGEST_CONTRACTION):
        raise ValueError(
            f"mosaic.matmul: expected one group of at most {LONGEST_CONTRACTION} channels for an "
            f"x of {x.dtype.name}, got {groups} of {channels // groups}"
        )
    if x_scale is not None and not is_narrow:
        raise ValueError(
            "mosaic.matmul: x_scale is for an int8 or float8 x, got an x of dtype bfloat16"
        )
    if zero is not None and values.dtype != jnp.int4:
        raise ValueError(
            "mosaic.matmul: zero points are for int4 values: int8 values less a zero point may "
            "not fit"
        )


# The kernel ---------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """A call's sizes.

    Attributes:
        tiles: of one warpgroup.
        grid: blocks along rows, columns and channels.
        dtypes: of the first operand, of the second, and of the result.
        piece: rows and columns of the result that are written at once.
        slots: pieces that may be on their way to memory at once.
        interpret: whether the interpreter runs it, which multiplies nothing that is in registers.
    """

    tiles: Tiles
    grid: tuple[int, int, int]
    dtypes: tuple[Any, Any, Any]
    piece: tuple[int, int]
    slots: int
    interpret: bool

    @property
    def block_rows(self) -> int:
        """Rows of both warpgroups."""
        return _MULTIPLYING * self.tiles.rows

    @property
    def running(self) -> int:
        """Products that may run still while the next step begins: none where there is one step."""
        return min(1, self.grid[2] - 1)


def _call(
    tiles: Tiles,
    dtype: DTypeLike,
    multiprocessors: int,
    interpret: bool,
    a: Array,
    b: Array,
    row_scale: Array,
    col_scale: Array,
    *in_groups: Array,
) -> Array:
    """The kernel on operands whose sizes are multiples of its blocks."""
    (rows, channels), cols = a.shape, b.shape[0]
    grid = (
        rows // (_MULTIPLYING * tiles.rows),
        cols // tiles.cols,
        channels // _CHANNELS,
    )
    of_bytes = _PIECE_BYTES // jnp.dtype(dtype).itemsize
    piece = min(_PIECE_ROWS, tiles.rows), min(of_bytes, tiles.cols)
    pieces = tiles.rows * tiles.cols // (piece[0] * piece[1])
    dtypes = a.dtype, b.dtype, jnp.dtype(dtype)
    plan = _Plan(tiles, grid, dtypes, piece, min(2, pieces), interpret)
    leaving = plgpu.SMEM(
        (_MULTIPLYING, plan.slots, *piece),
        dtype,
        transforms=_transforms(piece[1], dtypes[2]),
    )
    scratch = [leaving]
    if interpret:
        converted = _MULTIPLYING, tiles.rows, _CHANNELS
        scratch.append(plgpu.SMEM(converted, dtypes[1]))
    call = plgpu.kernel(
        partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct((rows, cols), dtype),
        grid=(multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=_MULTIPLYING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        scratch_types=scratch,
        interpret=_interpreter() if interpret else None,
    )
    return call(a, b, row_scale, col_scale, *in_groups)


def _interpreter() -> Any:
    pallas: Any = plgpu  # jax 0.10, which mypy may read, has none
    return pallas.InterpretGPUParams()


def _transforms(length: int, dtype: Any) -> tuple[Any, Any]:
    """How rows of so many elements lie in shared memory, as the matrix units read them."""
    is_float = jnp.issubdtype(dtype, jnp.floating)
    bits = (jnp.finfo if is_float else jnp.iinfo)(dtype).bits
    swizzle = plgpu.find_swizzle(length * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)


class _Refs(NamedTuple):
    """Where a kernel's arrays are, but the two operands.

    Attributes:
        row_scale, col_scale: in memory.
        in_groups: what weights are multiplied with, and what is subtracted before.
        out: the result, in memory.
        leaving: pieces of it on their way, in shared memory.
        spare: of the interpreter: converted weights.
    """

    row_scale: Any
    col_scale: Any
    in_groups: list[Any]
    out: Any
    leaving: Any
    spare: Any


class _Place(NamedTuple):
    """A warpgroup, and the first row and column of its part of the result."""

    warpgroup: Any
    row: Any
    col: Any


def _kernel(plan: _Plan, a: Any, b: Any, *arrays: Any) -> None:
    """Every multiprocessor's share of the blocks, one after another."""
    row_scale, col_scale, *others = arrays
    spare = others.pop() if plan.interpret else None
    *in_groups, out, leaving = others
    refs = _Refs(row_scale, col_scale, in_groups, out, leaving, spare)

    def nothing(*_: Any, **__: Any) -> None:
        """Stands for steps where only the memory of the pipeline is asked for."""

    allocations = _pipeline(plan, nothing, nothing).get_allocations(a, b)

    @partial(
        pl.run_scoped, allocations=allocations, collective_axes="warpgroup"
    )
    def _(allocations: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        blocks = plan.grid[0] * plan.grid[1]

        @plgpu.nd_loop((blocks,), collective_axes="multiprocessor")
        def _(info: Any) -> None:
            i, j = plgpu.planar_snake(info.index[0], plan.grid[:2], 1, _SNAKE)
            first, col = i * plan.block_rows, j * plan.tiles.cols
            row = first + warpgroup * plan.tiles.rows
            place = _Place(warpgroup, row, col)
            multiply = partial(_multiply, plan, refs, place)
            _pipeline(plan, multiply, partial(_block, plan, refs, place))(
                a.at[pl.ds(first, plan.block_rows), :],
                b.at[pl.ds(col, plan.tiles.cols), :],
                allocations=allocations,
            )

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _block(plan: _Plan, refs: _Refs, place: _Place, run: Any) -> None:
    """A warpgroup's part of a block: `run` sums the products, which are then scaled and written."""
    shape = plan.tiles.rows, plan.tiles.cols

    @partial(pl.run_scoped, sums=plgpu.ACC(shape, _sum_dtype(plan)))
    def _(sums: Any) -> None:
        run(sums)
        _write(plan, refs, place, _scaled(plan, refs, place, sums))


def _sum_dtype(plan: _Plan) -> Any:
    return jnp.int32 if plan.dtypes[1] == jnp.int8 else jnp.float32


def _pipeline(plan: _Plan, body: Any, around: Any) -> Any:
    """Steps over the channels, whose tiles a warpgroup of its own loads."""
    sizes = plan.block_rows, plan.tiles.cols
    specs = []
    for size, dtype in zip(sizes, plan.dtypes[:2], strict=True):
        spec = plgpu.BlockSpec(
            (size, _CHANNELS),
            lambda step: (0, step),
            transforms=_transforms(_CHANNELS, dtype),
            memory_space=plgpu.SMEM,
            delay_release=plan.running,
        )
        specs.append(spec)
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(plan.grid[2],),
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=_MULTIPLYING,
        max_concurrent_steps=min(plan.tiles.stages, plan.grid[2]),
        compute_context=around,
        in_specs=specs,
    )


def _multiply(
    plan: _Plan,
    refs: _Refs,
    place: _Place,
    step: Any,
    a_tile: Any,
    b_tile: Any,
    sums: Any,
) -> Any:
    """Adds the product of one run of channels."""
    mine = pl.ds(place.warpgroup * plan.tiles.rows, plan.tiles.rows)
    second = b_tile.transpose((1, 0))
    if plan.dtypes[0] == plan.dtypes[1]:
        first = a_tile.at[mine]
    else:
        first = _converted(plan, refs, place, step[0], a_tile[mine])
    if plan.interpret and plan.dtypes[0] != plan.dtypes[1]:
        refs.spare[place.warpgroup] = first
        first = refs.spare.at[place.warpgroup]
    plgpu.wgmma(sums, first, second)
    plgpu.wgmma_wait(plan.running)
    return sums


def _converted(
    plan: _Plan, refs: _Refs, place: _Place, run: Any, weight: Array
) -> Array:
    """Integers of the weight as floats, in registers; those of groups less their zero, scaled."""
    dtype = plan.dtypes[1]
    floats = weight.astype(dtype)
    of_rows = []
    for ref in refs.in_groups:
        here = ref.at[run, pl.ds(place.row, plan.tiles.rows)]
        vector = _vector(here, 1).astype(dtype)
        of_rows.append(lax.broadcast_in_dim(vector, floats.shape, [0]))
    if not of_rows:
        return floats
    scale, *zero = of_rows
    if zero:
        floats = floats - zero[0]
    return floats * scale


def _vector(ref: Any, axis: int) -> Array:
    """A number for each row (axis 1 is reduced) or column (axis 0) of what matrix units hold."""
    layout = plgpu.Layout.WGMMA.reduce(axis)
    load: Any = plgpu.load  # jax 0.10, which mypy may read, has other arguments
    return load(ref, layout=layout, optimized=False)


def _scaled(plan: _Plan, refs: _Refs, place: _Place, sums: Any) -> Array:
    """The sums times their scales, in registers."""
    found = sums[...].astype(jnp.float32)
    rows, cols = (
        pl.ds(place.row, plan.tiles.rows),
        pl.ds(place.col, plan.tiles.cols),
    )
    of_rows = _vector(refs.row_scale.at[rows], 1)
    of_cols = _vector(refs.col_scale.at[cols], 0)
    found = found * lax.broadcast_in_dim(of_rows, found.shape, [0])
    found = found * lax.broadcast_in_dim(of_cols, found.shape, [1])
    return found.astype(plan.dtypes[2])


def _write(plan: _Plan, refs: _Refs, place: _Place, found: Array) -> None:
    """Copies a result to memory piece by piece, by way of shared memory."""
    height, width = plan.piece
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    corners = itertools.product(
        range(0, plan.tiles.rows, height), range(0, plan.tiles.cols, width)
    )
    for number, (i, j) in enumerate(corners):
        slot = number % plan.slots
        plgpu.wait_smem_to_gmem(plan.slots - 1, wait_read_only=True)
        piece = found[i : i + height, j : j + width]
        refs.leaving[place.warpgroup, slot] = piece
        plgpu.commit_smem()
        there = pl.ds(place.row + i, height), pl.ds(place.col + j, width)
        plgpu.copy_smem_to_gmem(
            refs.leaving.at[place.warpgroup, slot], refs.out.at[there]
        )
