"""Prototypes: quantized matmuls for Hopper in Pallas Mosaic GPU (wgmma, TMA, one loading and two computing warpgroups).

out[r, c] = rows[r] cols[c] sum_k a[r, k] b[c, k]. Both operands have the contracted axis last.
    a int8, b int8: s8 wgmma, int32 sums (W8A8).
    a int8 or int4, b bfloat16: a is converted in registers (weight-only; a is the weight: "swapped", the result is out.T).
        int4 with `groups` (R, K/128) float32: a scale for each run of 128 channels, applied to the float weight.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int = 128  # of one warpgroup
    cols: int = 128
    k: int = 128
    stages: int = 4
    split: str = "cols"  # which side the two computing warpgroups share out
    width: int = 8  # of the snake over blocks
    epi: int = 64
    delay: int = 0  # steps whose wgmma may still run while the next are issued
    cluster: str = ""  # "rows" or "cols": two blocks along it share what they both load


def matmul(a, b, rows, cols, tiles=Tiles(), out_dtype=jnp.bfloat16, groups=None, sms=132):
    t = tiles
    (r, k), (c, _) = a.shape, b.shape
    byrow = t.split == "rows"
    block_r, block_c = t.rows * (1 + byrow), t.cols * (2 - byrow)
    clu = 1 + bool(t.cluster)
    span_r, span_c = block_r * (1 + (t.cluster == "rows")), block_c * (1 + (t.cluster == "cols"))
    if r % span_r or c % span_c or k % t.k:
        raise ValueError(f"{r}x{c}x{k} is no multiple of {span_r}x{span_c}x{t.k}")
    mixed = a.dtype != b.dtype
    acc_dtype = jnp.float32 if mixed else jnp.int32
    epi_r, epi_c = min(t.epi, t.rows), min(t.epi, t.cols)
    slots = min(2, (t.rows * t.cols) // (epi_r * epi_c))

    def transforms(length, dtype):
        bits = (
            jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits
        )
        swizzle = plgpu.find_swizzle(length * bits)
        return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)

    grid_r, grid_c, grid_k = r // span_r, c // span_c, k // t.k

    def kernel(*refs):
        if groups is None:
            a_gmem, b_gmem, rows_gmem, cols_gmem, out_gmem, out_smem = refs
            groups_gmem = None
        else:
            a_gmem, b_gmem, rows_gmem, cols_gmem, groups_gmem, out_gmem, out_smem = refs

        def pipeline(body, context):
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(grid_k,),
                memory_registers=40,
                wg_axis="wg",
                num_compute_wgs=2,
                max_concurrent_steps=min(t.stages, grid_k),
                compute_context=context,
                in_specs=[
                    plgpu.BlockSpec(
                        (block_r, t.k),
                        lambda k: (0, k),
                        transforms=transforms(t.k, a.dtype),
                        memory_space=plgpu.SMEM,
                        delay_release=t.delay,
                        collective_axes=("cluster",) if t.cluster == "cols" else (),
                    ),
                    plgpu.BlockSpec(
                        (block_c, t.k),
                        lambda k: (0, k),
                        transforms=transforms(t.k, b.dtype),
                        memory_space=plgpu.SMEM,
                        delay_release=t.delay,
                        collective_axes=("cluster",) if t.cluster == "rows" else (),
                    ),
                ],
            )

        ignore = lambda *_, **__: None

        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(ignore, ignore).get_allocations(a_gmem, b_gmem),
            collective_axes="wg",
        )
        def _scope(allocations):
            wg, cta = lax.axis_index("wg"), lax.axis_index("cluster")

            @plgpu.nd_loop((grid_r * grid_c,), collective_axes="cluster_grid")
            def _blocks(info):
                (linear,) = info.index
                i, j = plgpu.planar_snake(linear, (grid_r, grid_c), 1, t.width)
                i = i * 2 + cta if t.cluster == "rows" else i
                j = j * 2 + cta if t.cluster == "cols" else j
                r0, c0 = i * block_r, j * block_c
                if byrow:
                    mine_r, mine_c, r1, c1 = (
                        pl.ds(wg * t.rows, t.rows),
                        slice(None),
                        r0 + wg * t.rows,
                        c0,
                    )
                else:
                    mine_r, mine_c, r1, c1 = (
                        slice(None),
                        pl.ds(wg * t.cols, t.cols),
                        r0,
                        c0 + wg * t.cols,
                    )

                def context(run):
                    @functools.partial(
                        pl.run_scoped, acc_ref=plgpu.ACC((t.rows, t.cols), acc_dtype)
                    )
                    def _acc(acc_ref):
                        run(acc_ref)
                        acc = acc_ref[...].astype(jnp.float32)
                        rs = plgpu.load(
                            rows_gmem.at[pl.ds(r1, t.rows)],
                            layout=plgpu.Layout.WGMMA.reduce(1),
                            optimized=False,
                        )
                        cs = plgpu.load(
                            cols_gmem.at[pl.ds(c1, t.cols)],
                            layout=plgpu.Layout.WGMMA.reduce(0),
                            optimized=False,
                        )
                        acc = (
                            acc
                            * lax.broadcast_in_dim(rs, acc.shape, [0])
                            * lax.broadcast_in_dim(cs, acc.shape, [1])
                        )
                        out = acc.astype(out_dtype)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        for er in range(t.rows // epi_r):
                            for ec in range(t.cols // epi_c):
                                slot = (er * (t.cols // epi_c) + ec) % slots
                                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                                out_smem[wg, slot] = out[
                                    er * epi_r : (er + 1) * epi_r, ec * epi_c : (ec + 1) * epi_c
                                ]
                                plgpu.commit_smem()
                                plgpu.copy_smem_to_gmem(
                                    out_smem.at[wg, slot],
                                    out_gmem.at[
                                        pl.ds(r1 + er * epi_r, epi_r), pl.ds(c1 + ec * epi_c, epi_c)
                                    ],
                                )

                def body(step, a_smem, b_smem, acc_ref):
                    b_part = plgpu.transpose_ref(b_smem.at[mine_c], (1, 0))
                    if mixed:
                        part = a_smem[mine_r].astype(b.dtype)
                        if groups_gmem is not None:
                            (ki,) = step
                            gs = plgpu.load(
                                groups_gmem.at[ki, pl.ds(r1, t.rows)],
                                layout=plgpu.Layout.WGMMA.reduce(1),
                                optimized=False,
                            )
                            part = part * lax.broadcast_in_dim(gs.astype(b.dtype), part.shape, [0])
                        plgpu.wgmma(acc_ref, part, b_part)
                    else:
                        plgpu.wgmma(acc_ref, a_smem.at[mine_r], b_part)
                    plgpu.wgmma_wait(t.delay)
                    return acc_ref

                pipeline(body, context)(
                    a_gmem.at[pl.ds(r0, block_r), :],
                    b_gmem.at[pl.ds(c0, block_c), :],
                    allocations=allocations,
                )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((r, c), out_dtype),
        grid=(sms // clu,),
        grid_names=("cluster_grid",),
        cluster=(clu,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=[
            plgpu.SMEM((2, slots, epi_r, epi_c), out_dtype, transforms=transforms(epi_c, out_dtype))
        ],
    )
    return call(a, b, rows, cols) if groups is None else call(a, b, rows, cols, groups)
