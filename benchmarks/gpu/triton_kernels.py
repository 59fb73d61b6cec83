"""Yardsticks in Triton's own language: fused W8A8, per-token quantization, and int4 weights in groups of 128."""

import triton
import triton.language as tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None


@triton.jit
def place(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    nm, nn = tl.cdiv(M, BM), tl.cdiv(N, BN)
    per = GROUP * nn
    first = (pid // per) * GROUP
    size = min(nm - first, GROUP)
    return first + (pid % per) % size, (pid % per) // size


@triton.jit
def w8a8_ptr(
    x,
    w,
    xs,
    ws,
    out,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    pm, pn = place(tl.program_id(0), M, N, BM, BN, GROUP)
    rm, rn, rk = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    am, an = rm % M, rn % N
    a = x + am[:, None] * K + rk[None, :]
    b = w + an[None, :] * K + rk[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for _ in range(0, tl.cdiv(K, BK)):
        acc = tl.dot(tl.load(a), tl.load(b), acc, out_dtype=tl.int32)
        a += BK
        b += BK
    y = acc.to(tl.float32) * tl.load(xs + am)[:, None] * tl.load(ws + an)[None, :]
    tl.store(
        out + rm[:, None] * N + rn[None, :],
        y.to(tl.bfloat16),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def w8a8_tma(
    x,
    w,
    xs,
    ws,
    out,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    pm, pn = place(tl.program_id(0), M, N, BM, BN, GROUP)
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, tl.cdiv(K, BK)):
        a = x.load([pm * BM, k * BK])
        b = w.load([pn * BN, k * BK])
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
    rm, rn = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    y = acc.to(tl.float32) * tl.load(xs + rm)[:, None] * tl.load(ws + rn)[None, :]
    tl.store(out + rm[:, None] * N + rn[None, :], y.to(tl.bfloat16))


@triton.jit
def quantize_rows(x, q, s, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * K + c, mask=c < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(v), 0) / 127.0, 1e-30)
    y = v / scale
    y = tl.where(y >= 0, tl.floor(y + 0.5), tl.ceil(y - 0.5))
    tl.store(q + row * K + c, y.to(tl.int8), mask=c < K)
    tl.store(s + row, scale)


@triton.jit
def w4a16_dot(x, w, gs, zs, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr):
    rm, rn, rk = (
        tl.program_id(1) * BM + tl.arange(0, BM),
        tl.program_id(0) * BN + tl.arange(0, BN),
        tl.arange(0, 64),
    )
    inside = rm[:, None] < M
    acc = tl.zeros((BM, BN), tl.float32)
    for g in range(0, K // 128):
        b = tl.load(w + rn[:, None] * (K // 2) + g * 64 + rk[None, :])
        z = tl.load(zs + g * N + rn).to(tl.int8)[:, None]
        lo = ((b & 15).to(tl.int8) - z).to(tl.bfloat16)
        hi = ((b >> 4).to(tl.int8) - z).to(tl.bfloat16)
        xl = tl.load(x + rm[:, None] * K + g * 128 + rk[None, :], mask=inside, other=0.0)
        xh = tl.load(x + rm[:, None] * K + g * 128 + 64 + rk[None, :], mask=inside, other=0.0)
        part = tl.dot(xl, lo.T)
        part = tl.dot(xh, hi.T, part)
        acc += part * tl.load(gs + g * N + rn)[None, :]
    tl.store(out + rm[:, None] * N + rn[None, :], acc.to(tl.bfloat16), mask=inside)


@triton.jit
def w4a16_row(x, w, gs, zs, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr):
    """One row, without the matrix units."""
    rn, rk = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 64)
    acc = tl.zeros((BN, 64), tl.float32)
    for g in range(0, K // 128):
        b = tl.load(w + rn[:, None] * (K // 2) + g * 64 + rk[None, :])
        z = tl.load(zs + g * N + rn).to(tl.float32)[:, None]
        xl = tl.load(x + g * 128 + rk).to(tl.float32)[None, :]
        xh = tl.load(x + g * 128 + 64 + rk).to(tl.float32)[None, :]
        part = ((b & 15).to(tl.float32) - z) * xl + ((b >> 4).to(tl.float32) - z) * xh
        acc += part * tl.load(gs + g * N + rn)[:, None]
    tl.store(out + rn, tl.sum(acc, 1).to(tl.bfloat16))


def w8a8(x, w, xs, ws, tiles):
    import torch

    bm, bn, bk, warps, stages, how = tiles
    (m, k), n = x.shape, w.shape[0]
    out = torch.empty((m, n), device=x.device, dtype=torch.bfloat16)
    grid = (triton.cdiv(m, bm) * triton.cdiv(n, bn),)
    if how == "tma":
        a, b = TensorDescriptor.from_tensor(x, [bm, bk]), TensorDescriptor.from_tensor(w, [bn, bk])
        w8a8_tma[grid](
            a,
            b,
            xs,
            ws,
            out,
            m,
            n,
            k,
            BM=bm,
            BN=bn,
            BK=bk,
            GROUP=8,
            num_warps=warps,
            num_stages=stages,
        )
    else:
        w8a8_ptr[grid](
            x,
            w,
            xs,
            ws,
            out,
            m,
            n,
            k,
            BM=bm,
            BN=bn,
            BK=bk,
            GROUP=8,
            num_warps=warps,
            num_stages=stages,
        )
    return out


def quantize(x):
    import torch

    q, s = (
        torch.empty(x.shape, device=x.device, dtype=torch.int8),
        torch.empty(x.shape[0], device=x.device),
    )
    quantize_rows[(x.shape[0],)](
        x, q, s, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8
    )
    return q, s


def w4a16(x, w, gs, zs, tiles):
    import torch

    bm, bn, warps, stages = tiles
    (m, k), n = x.shape, w.shape[0]
    out = torch.empty((m, n), device=x.device, dtype=torch.bfloat16)
    kernel = w4a16_row if bm == 1 else w4a16_dot
    kernel[(n // bn, triton.cdiv(m, bm))](
        x, w, gs, zs, out, m, n, k, BM=bm, BN=bn, num_warps=warps, num_stages=stages
    )
    return out
