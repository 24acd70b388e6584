"""The gradients of attention with the skip, for g = ∂L/∂out, out = c_skip·x + c_out·P v:

    P = exp2(q kᵀ·scale·log2 e − lse)        recomputed tile by tile, from the saved lse
    δ = Σ_d g·f                              one number a query row (ops/skip.py)
    dS = P·(g vᵀ − δ)
    dv = c_out·Pᵀ g,   dk = c_out·scale·dSᵀ q,   dq = c_out·scale·dS k

q [B, H, Nq, D]; k, v [B, H, Nkv, D]; g [B, Nq, H·D]; lse, δ [B, H, Nq] float32. The gradients
are [B, H, N, D] in token layout, the heads of a token side by side (Dao 2023 has the
equations; c_out is applied to the float32 sums, so a small one costs no precision).

Two kernels, so that every sum has one owner and one order: a program of `dkdv_kernel` owns
BLOCK_N keys and walks over the queries, one of `dq_kernel` owns BLOCK_M queries and walks
over the keys. Scores are computed twice; in exchange there are no atomics, and two runs
agree bit for bit.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from rcmlib.attention.forward import LOG2_E, Tile
from rcmlib.core.device import copy_engine, device_capability, dot_precision
from rcmlib.core.epilogue import kernel_coefficients, load_coefficient
from rcmlib.core.launch import Plan, box_of_rows, by_layout, descriptors_allowed
from rcmlib.core.rows import key_range, load_rows, own_rows


@triton.jit
def store_rows(dst, tile, scale, b, h, row, length, heads,
               D: tl.constexpr):  # fmt: skip
    """scale·tile to rows row … of head (b, h) of a contiguous [B, length, heads, D].

    A scale of 0 stores zeros, whatever the tile holds: at t = 0 nothing reaches q, k, v.
    """
    ROWS: tl.constexpr = tile.shape[0]
    BLOCK_D: tl.constexpr = tile.shape[1]
    r = (row + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    at = ((tl.cast(b, tl.int64) * length + r) * heads + h) * D + d
    tile = tl.where(scale == 0.0, 0.0, tile * scale)
    tl.store(dst + at, tile.to(dst.dtype.element_ty), mask=(r < length) & (d < D))


@triton.jit
def gather_keys(dk, dv, kt, vt, q, g, lse, delta, b, h, start, stop, first_key, q_len,
                qk_scale, stride_qb, stride_qh, stride_qn,
                stride_gb, stride_gh, stride_gn,
                BLOCK_M: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
                MASK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What the query tiles in [start, stop) add to dk and dv of one key tile.

    Everything is transposed, [keys, queries]: P and dS are then in registers what the matrix
    unit takes as its left operand. MASK: some of these queries come before some keys.
    """
    BLOCK_N: tl.constexpr = kt.shape[0]
    BLOCK_D: tl.constexpr = kt.shape[1]
    for i in tl.range(start, stop, BLOCK_M):
        qt = load_rows(q, b, h, i, q_len, stride_qb, stride_qh, stride_qn,
                       BLOCK_M, D, BLOCK_D, TMA, True)  # fmt: skip
        rows = i + tl.arange(0, BLOCK_M)
        # Beyond the end: lse = ∞ makes P = 0, and so nothing is added.
        lse_t = tl.load(lse + rows, mask=rows < q_len, other=float("inf"))
        st = tl.dot(kt, qt.T, input_precision=PRECISION)
        pt = tl.exp2(st * qk_scale - lse_t[None, :])
        if MASK:
            keys = first_key + tl.arange(0, BLOCK_N)
            pt = tl.where(keys[:, None] <= rows[None, :], pt, 0.0)
        gt = load_rows(g, b, h, i, q_len, stride_gb, stride_gh, stride_gn,
                       BLOCK_M, D, BLOCK_D, TMA, True)  # fmt: skip
        dv = tl.dot(pt.to(gt.dtype), gt, dv, input_precision=PRECISION)
        delta_t = tl.load(delta + rows, mask=rows < q_len, other=0.0)
        dpt = tl.dot(vt, gt.T, input_precision=PRECISION)
        dst = pt * (dpt - delta_t[None, :])
        dk = tl.dot(dst.to(qt.dtype), qt, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(q, k, v, g, dk, dv, lse, delta, c_out, scale, qk_scale,
                heads, q_len, kv_len, stride_qb, stride_qh, stride_qn,
                stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                stride_gb, stride_gh, stride_gn,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
                BLOCK_D: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr,
                PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(kv_len, BLOCK_N)
    pid = tl.program_id(0)
    b = pid // tiles // heads
    h = pid // tiles % heads
    first_key = pid % tiles * BLOCK_N
    kt = load_rows(k, b, h, first_key, kv_len, stride_kb, stride_kh, stride_kn,
                   BLOCK_N, D, BLOCK_D, TMA, True)  # fmt: skip
    vt = load_rows(v, b, h, first_key, kv_len, stride_vb, stride_vh, stride_vn,
                   BLOCK_N, D, BLOCK_D, TMA, True)  # fmt: skip
    lse += (tl.cast(b, tl.int64) * heads + h) * q_len
    delta += (tl.cast(b, tl.int64) * heads + h) * q_len
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = 0
    if CAUSAL:  # earlier queries see none of these keys; the diagonal needs a mask
        first_row = first_key // BLOCK_M * BLOCK_M
        start = tl.cdiv(first_key + BLOCK_N, BLOCK_M) * BLOCK_M
        dk_tile, dv_tile = gather_keys(
            dk_tile, dv_tile, kt, vt, q, g, lse, delta, b, h, first_row,
            tl.minimum(start, q_len), first_key, q_len, qk_scale,
            stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
            BLOCK_M, D, TMA, True, PRECISION)  # fmt: skip
    dk_tile, dv_tile = gather_keys(
        dk_tile, dv_tile, kt, vt, q, g, lse, delta, b, h, start, q_len, first_key, q_len,
        qk_scale, stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
        BLOCK_M, D, TMA, False, PRECISION)  # fmt: skip
    c = load_coefficient(c_out, b, PER_SAMPLE)
    store_rows(dv, dv_tile, c, b, h, first_key, kv_len, heads, D)
    store_rows(dk, dk_tile, c * scale, b, h, first_key, kv_len, heads, D)


@triton.jit
def gather_queries(dq, qt, gt, lse_t, delta_t, k, v, b, h, start, stop, first_row, kv_len,
                   qk_scale, stride_kb, stride_kh, stride_kn,
                   stride_vb, stride_vh, stride_vn,
                   BLOCK_N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
                   CAUSAL: tl.constexpr, MASK: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """What the key tiles in [start, stop) add to dq of one query tile."""
    BLOCK_M: tl.constexpr = qt.shape[0]
    BLOCK_D: tl.constexpr = qt.shape[1]
    for j in tl.range(start, stop, BLOCK_N):
        kt = load_rows(k, b, h, j, kv_len, stride_kb, stride_kh, stride_kn,
                       BLOCK_N, D, BLOCK_D, TMA, MASK)  # fmt: skip
        s = tl.dot(qt, kt.T, input_precision=PRECISION)
        p = tl.exp2(s * qk_scale - lse_t[:, None])
        if MASK:
            cols = j + tl.arange(0, BLOCK_N)[None, :]
            visible = cols < kv_len
            if CAUSAL:
                visible &= cols <= first_row + tl.arange(0, BLOCK_M)[:, None]
            p = tl.where(visible, p, 0.0)
        vt = load_rows(v, b, h, j, kv_len, stride_vb, stride_vh, stride_vn,
                       BLOCK_N, D, BLOCK_D, TMA, MASK)  # fmt: skip
        dp = tl.dot(gt, vt.T, input_precision=PRECISION)
        ds = p * (dp - delta_t[:, None])
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(q, k, v, g, dq, lse, delta, c_out, scale, qk_scale,
              heads, q_len, kv_len, stride_qb, stride_qh, stride_qn,
              stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
              stride_gb, stride_gh, stride_gn,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
              BLOCK_D: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr,
              RAGGED: tl.constexpr, PER_SAMPLE: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    b, h, first_row = own_rows(heads, q_len, BLOCK_M, CAUSAL)
    qt = load_rows(q, b, h, first_row, q_len, stride_qb, stride_qh, stride_qn,
                   BLOCK_M, D, BLOCK_D, TMA, True)  # fmt: skip
    gt = load_rows(g, b, h, first_row, q_len, stride_gb, stride_gh, stride_gn,
                   BLOCK_M, D, BLOCK_D, TMA, True)  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_M)
    at = (tl.cast(b, tl.int64) * heads + h) * q_len + rows
    lse_t = tl.load(lse + at, mask=rows < q_len, other=float("inf"))
    delta_t = tl.load(delta + at, mask=rows < q_len, other=0.0)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole, stop = key_range(kv_len, first_row, BLOCK_M, BLOCK_N, CAUSAL)
    dq_tile = gather_queries(
        dq_tile, qt, gt, lse_t, delta_t, k, v, b, h, 0, whole, first_row, kv_len, qk_scale,
        stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        BLOCK_N, D, TMA, CAUSAL, False, PRECISION)  # fmt: skip
    if RAGGED or CAUSAL:
        dq_tile = gather_queries(
            dq_tile, qt, gt, lse_t, delta_t, k, v, b, h, whole, stop, first_row, kv_len,
            qk_scale, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            BLOCK_N, D, TMA, CAUSAL, True, PRECISION)  # fmt: skip
    c = load_coefficient(c_out, b, PER_SAMPLE)
    store_rows(dq, dq_tile, c * scale, b, h, first_row, q_len, heads, D)


def choose_backward_tiles(
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tma: bool,
    is_causal: bool,
) -> tuple[Tile, Tile]:
    """(`dkdv_kernel`'s tile, `dq_kernel`'s), both without a register spilled anywhere.

    D ≤ 128 on sm_90 was measured (chapter 7). Two stages also keep loop-invariant operands in
    shared memory, where one stage has the compiler hold them in registers, and spill.
    """
    block_d = triton.next_power_of_2(head_dim)
    if dtype == torch.float32:
        if block_d <= 64:
            return Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)
        if block_d == 256:
            return Tile(16, 16, 16, 1), Tile(16, 16, 8, 2)
        return Tile(16, 32, 8, 1), Tile(16, 16, 8, 2)
    if copy_engine(dtype, capability):
        if block_d == 256:
            return Tile(16, 64, 8, 2), Tile(64, 32, 8, 2)
        # Masks, and addresses where there is no copy engine, need registers, too.
        if block_d == 128 and tma and not is_causal:
            return Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)
        return Tile(32, 64, 4, 3), Tile(64, 64, 4, 2)
    if block_d == 256:
        return Tile(16, 64, 8, 1), Tile(64, 32, 8, 1)
    if block_d == 128:
        return Tile(32, 64, 8, 2), Tile(64, 32, 8, 2)
    block_m = 16 if is_causal else 32  # the mask needs registers, too
    return Tile(block_m, 64, 4, 2), Tile(64, 32, 4, 2)


@by_layout
def backward_plans(q, k, v, g, lse, delta, c_out, is_causal) -> tuple[Plan, Plan]:
    """The launches of the two kernels for these layouts. g: as [B, H, Nq, D]."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    block_d = triton.next_power_of_2(head_dim)
    capability = device_capability(q.device)
    sources = (q, k, v, g)
    tma = copy_engine(q.dtype, capability) and descriptors_allowed(*sources)
    for_keys, for_queries = choose_backward_tiles(
        head_dim, q.dtype, capability, tma, is_causal
    )

    def plan(kernel, tile, programs, **constants):
        m, n = tile.block_m, tile.block_n
        boxes = ()
        if tma:
            boxes = tuple(map(box_of_rows, sources, (m, n, n, m), (block_d,) * 4))
        return Plan(
            kernel, batch * heads * programs,
            heads, q_len, kv_len, *q.strides[:3], *k.strides[:3], *v.strides[:3],
            *g.strides[:3], BLOCK_M=m, BLOCK_N=n, D=head_dim,
            BLOCK_D=block_d, TMA=tma, CAUSAL=is_causal, PER_SAMPLE=c_out is not None,
            PRECISION=dot_precision(q.dtype), num_warps=tile.num_warps,
            num_stages=tile.num_stages, boxes=boxes, **constants,
        )  # fmt: skip

    key_tiles = triton.cdiv(kv_len, for_keys.block_n)
    query_tiles = triton.cdiv(q_len, for_queries.block_m)
    ragged = kv_len % for_queries.block_n != 0
    return (
        plan(dkdv_kernel, for_keys, key_tiles),
        plan(dq_kernel, for_queries, query_tiles, RAGGED=ragged),
    )


def backward_launches(
    g, q, k, v, lse, delta, c_out, scale, is_causal
) -> tuple[tuple[torch.Tensor, ...], tuple[Callable[[], None], ...]]:
    """The results dq, dk, dv [B, N, H, D], and the two launches that fill them."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    sources = (q, k, v, g.unflatten(-1, (heads, head_dim)).transpose(1, 2))
    dq, dk, dv = (
        torch.empty((batch, n, heads, head_dim), dtype=q.dtype, device=q.device)
        for n in (q_len, kv_len, kv_len)
    )
    c_out, _, _ = kernel_coefficients(c_out, c_out)
    for_keys, for_queries = backward_plans(*sources, lse, delta, c_out, is_causal)

    def launch(plan, *results):
        plan.launch(*sources, *results, lse, delta, c_out, scale, scale * LOG2_E)

    dkdv = functools.partial(launch, for_keys, dk, dv)
    return (dq, dk, dv), (dkdv, functools.partial(launch, for_queries, dq))


def attention_backward(
    g, q, k, v, lse, delta, c_out, scale, is_causal
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) [B, H, N, D] in token layout, from g [B, Nq, H·D] of q's dtype."""
    results, launches = backward_launches(
        g, q, k, v, lse, delta, c_out, scale, is_causal
    )
    for launch in launches:
        launch()
    return tuple(t.transpose(1, 2) for t in results)
