"""The gradients of attention with the skip, for g = ∂L/∂out, out = c_skip·x + c_out·P v:

    P = exp2(q kᵀ·scale·log2 e − lse)        recomputed tile by tile, from the saved lse
    δ = Σ_d g·f                              one number a query row (skip/kernel.py)
    dS = P·(g vᵀ − δ)
    dv = c_out·Pᵀ g,   dk = c_out·scale·dSᵀ q,   dq = c_out·scale·dS k

q [B, H, Nq, D]; k, v [B, H, Nkv, D]; g [B, Nq, H·D]; lse, δ [B, H, Nq] float32. The gradients
are [B, H, N, D] in token layout, the heads of a token side by side (Dao 2023 has the
equations; c_out is applied to the float32 sums, so a small one costs no precision).

Two kernels, so that every sum has one owner and one order: a program of `dkdv_kernel` owns
block_n keys and walks over the queries, one of `dq_kernel` owns block_m queries and walks
over the keys. Scores are computed twice; in exchange there are no atomics, and two runs
agree bit for bit. On Hopper `hopper_backward.py` computes the scores once.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmlib import core
from rcmlib.attention.forward import sources
from rcmlib.attention.tiles import LOG2_E, choose_backward_tiles, hopper_gradients
from rcmlib.core import launch
from rcmlib.core.epilogue import load_coefficient
from rcmlib.core.rows import Place, Rows, key_range, load_rows, mask_scores, own_rows


class Saved(NamedTuple):
    """One number a query of the head: the forward pass's lse, and δ."""

    lse: tl.tensor
    delta: tl.tensor


@triton.jit
def store_rows(dst, tile, scale, at, length, heads, D: tl.constexpr):
    """scale·tile to the rows of a contiguous [B, length, heads, D] that begin at `at`; for a
    scale of 0 zeros, whatever the tile holds: at t = 0 nothing reaches q, k, v."""
    ROWS: tl.constexpr = tile.shape[0]
    BLOCK_D: tl.constexpr = tile.shape[1]
    r = (at.row + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    here = ((tl.cast(at.sample, tl.int64) * length + r) * heads + at.head) * D + d
    tile = tl.where(scale == 0.0, 0.0, tile * scale)
    tl.store(dst + here, tile.to(dst.dtype.element_ty), mask=(r < length) & (d < D))


@triton.jit
def gather_keys(dk, dv, kt, vt, queries, grads, saved, at, start, stop, qk_scale,
                HOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """What the query tiles in [start, stop) add to dk and dv of one key tile.

    Everything is transposed, [keys, queries]: P and dS are then in registers what the matrix
    unit takes as its left operand. MASK: some of these queries come before some keys.
    """
    M: tl.constexpr = HOW.block_m
    N: tl.constexpr = HOW.block_n
    PRECISION: tl.constexpr = HOW.precision
    for i in tl.range(start, stop, M):
        qt = load_rows(queries, at, i, M, HOW, True)  # [M, block_d]
        rows = i + tl.arange(0, M)
        # Beyond the end: lse = ∞ makes P = 0, and so nothing is added.
        inside = rows < queries.length
        lse = tl.load(saved.lse + rows, mask=inside, other=float("inf"))
        st = tl.dot(kt, qt.T, input_precision=PRECISION)  # [N, M]
        pt = tl.exp2(st * qk_scale - lse[None, :])
        if MASK:
            keys = at.row + tl.arange(0, N)
            pt = tl.where(keys[:, None] <= rows[None, :], pt, 0.0)
        gt = load_rows(grads, at, i, M, HOW, True)  # [M, block_d]
        dv = tl.dot(pt.to(gt.dtype), gt, dv, input_precision=PRECISION)
        delta = tl.load(saved.delta + rows, mask=inside, other=0.0)
        dpt = tl.dot(vt, gt.T, input_precision=PRECISION)
        dst = pt * (dpt - delta[None, :])
        dk = tl.dot(dst.to(qt.dtype), qt, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(q, k, v, g, dk, dv, lse, delta, c_out, scale, qk_scale,
                heads, q_len, kv_len, strides, HOW: tl.constexpr):  # fmt: skip
    """strides: between samples, heads and rows of q, k, v and g."""
    M: tl.constexpr = HOW.block_m
    N: tl.constexpr = HOW.block_n
    BLOCK_D: tl.constexpr = HOW.block_d
    queries, grads = Rows(q, strides[0], q_len), Rows(g, strides[3], q_len)
    tiles = tl.cdiv(kv_len, N)
    pid = tl.program_id(0)
    at = Place(pid // tiles // heads, pid // tiles % heads, pid % tiles * N)
    kt = load_rows(Rows(k, strides[1], kv_len), at, at.row, N, HOW, True)  # [N, block_d]
    vt = load_rows(Rows(v, strides[2], kv_len), at, at.row, N, HOW, True)
    head = (tl.cast(at.sample, tl.int64) * heads + at.head) * q_len
    saved = Saved(lse + head, delta + head)
    dk_tile = tl.zeros([N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([N, BLOCK_D], tl.float32)
    start = 0
    if HOW.causal:  # earlier queries see none of these keys; the diagonal needs a mask
        first_row = at.row // M * M
        start = tl.cdiv(at.row + N, M) * M
        dk_tile, dv_tile = gather_keys(
            dk_tile, dv_tile, kt, vt, queries, grads, saved, at, first_row,
            tl.minimum(start, q_len), qk_scale, HOW, True)  # fmt: skip
    dk_tile, dv_tile = gather_keys(
        dk_tile, dv_tile, kt, vt, queries, grads, saved, at, start, q_len, qk_scale, HOW,
        False)  # fmt: skip
    c = load_coefficient(c_out, at.sample, HOW.per_sample)
    store_rows(dv, dv_tile, c, at, kv_len, heads, HOW.head_dim)
    store_rows(dk, dk_tile, c * scale, at, kv_len, heads, HOW.head_dim)


@triton.jit
def gather_queries(dq, qt, gt, saved, keys, values, at, start, stop, qk_scale,
                   HOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """What the key tiles in [start, stop) add to dq of one query tile."""
    N: tl.constexpr = HOW.block_n
    PRECISION: tl.constexpr = HOW.precision
    for j in tl.range(start, stop, N):
        kt = load_rows(keys, at, j, N, HOW, MASK)  # [N, block_d]
        s = tl.dot(qt, kt.T, input_precision=PRECISION)  # [M, N]
        p = tl.exp2(s * qk_scale - saved.lse[:, None])
        if MASK:
            p = mask_scores(p, j, at.row, keys.length, 0.0, HOW.causal)
        vt = load_rows(values, at, j, N, HOW, MASK)
        dp = tl.dot(gt, vt.T, input_precision=PRECISION)
        ds = p * (dp - saved.delta[:, None])
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(q, k, v, g, dq, lse, delta, c_out, scale, qk_scale,
              heads, q_len, kv_len, strides, HOW: tl.constexpr):  # fmt: skip
    """strides: between samples, heads and rows of q, k, v and g."""
    M: tl.constexpr = HOW.block_m
    BLOCK_D: tl.constexpr = HOW.block_d
    keys, values = Rows(k, strides[1], kv_len), Rows(v, strides[2], kv_len)
    at = own_rows(heads, q_len, M, HOW.causal)
    qt = load_rows(Rows(q, strides[0], q_len), at, at.row, M, HOW, True)  # [M, block_d]
    gt = load_rows(Rows(g, strides[3], q_len), at, at.row, M, HOW, True)
    rows = at.row + tl.arange(0, M)
    here = (tl.cast(at.sample, tl.int64) * heads + at.head) * q_len + rows
    saved = Saved(tl.load(lse + here, mask=rows < q_len, other=float("inf")),
                  tl.load(delta + here, mask=rows < q_len, other=0.0))  # fmt: skip
    dq_tile = tl.zeros([M, BLOCK_D], tl.float32)
    whole, stop = key_range(kv_len, at.row, M, HOW)
    dq_tile = gather_queries(dq_tile, qt, gt, saved, keys, values, at, 0, whole, qk_scale,
                             HOW, False)  # fmt: skip
    if HOW.ragged or HOW.causal:
        dq_tile = gather_queries(dq_tile, qt, gt, saved, keys, values, at, whole, stop,
                                 qk_scale, HOW, True)  # fmt: skip
    c = load_coefficient(c_out, at.sample, HOW.per_sample)
    store_rows(dq, dq_tile, c * scale, at, q_len, heads, HOW.head_dim)


def backward_plans(q, k, v, g, per_sample: bool, is_causal: bool) -> tuple[launch.Plan, ...]:
    """The launches of the two kernels for tensors like these. g: as [B, H, Nq, D]."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    block_d = triton.next_power_of_2(head_dim)
    capability = core.device_capability(q.device)
    read = (q, k, v, g)
    tma = core.copy_engine(q.dtype, capability) and launch.descriptors_allowed(*read)

    def plan(kernel, tile, programs, ragged=False):
        m, n = tile.block_m, tile.block_n
        how = launch.Variant(
            **vars(tile), head_dim=head_dim, block_d=block_d, tma=tma, causal=is_causal,
            ragged=ragged, per_sample=per_sample, precision=core.dot_precision(q.dtype),
        )  # fmt: skip
        return launch.Plan(
            kernel, batch * heads * programs,
            heads, q_len, kv_len, tuple(t.stride()[:3] for t in read), HOW=how,
            boxes=launch.boxes_of_rows(read, (m, n, n, m), block_d) if tma else (),
        )  # fmt: skip

    for_keys, for_queries = choose_backward_tiles(head_dim, q.dtype, capability, tma, is_causal)
    key_tiles = triton.cdiv(kv_len, for_keys.block_n)
    query_tiles = triton.cdiv(q_len, for_queries.block_m)
    ragged = kv_len % for_queries.block_n != 0
    dkdv = plan(dkdv_kernel, for_keys, key_tiles)  # masks its keys whenever it loads them
    return dkdv, plan(dq_kernel, for_queries, query_tiles, ragged)


def backward_launches(
    g, q, k, v, lse, delta, c_out, scale, is_causal
) -> tuple[tuple[Tensor, ...], tuple[Callable[[], None], ...]]:
    """The results dq, dk, dv [B, N, H, D], and the two launches that fill them."""
    batch, heads, _, head_dim = q.shape
    read = sources(q, k, v, g)
    dq, dk, dv = (launch.result(t, (batch, t.shape[2], heads, head_dim)) for t in (q, k, v))
    key = launch.key_of("attention_backward", (*read, lse, delta, c_out), is_causal)
    per_sample = isinstance(c_out, Tensor)
    plans = launch.planned(key, lambda: backward_plans(*read, per_sample, is_causal))

    def run(plan, *results):
        plan.launch(*read, *results, lse, delta, c_out, scale, scale * LOG2_E)

    dkdv = functools.partial(run, plans[0], dk, dv)
    return (dq, dk, dv), (dkdv, functools.partial(run, plans[1], dq))


def plain_backward(*arguments) -> tuple[Tensor, ...]:
    """`attention_backward` by these two kernels."""
    results, launches = backward_launches(*arguments)
    for run in launches:
        run()
    return tuple(t.transpose(1, 2) for t in results)


def attention_backward(g, q, k, v, lse, delta, c_out, scale, is_causal) -> tuple[Tensor, ...]:
    """(dq, dk, dv) [B, H, N, D] in token layout, from g [B, Nq, H·D] of q's dtype and
    c_out, a float or [B]. On Hopper by its own kernel, unless dq's last bit has to be the same
    in every run (torch.use_deterministic_algorithms)."""
    run = plain_backward
    if not (core.interpreting() or torch.are_deterministic_algorithms_enabled()):
        shape = q.shape[0] * q.shape[1], q.shape[2], k.shape[2], q.shape[3]
        gpu = core.device_capability(q.device), core.multiprocessors(q.device)
        wanted = hopper_gradients(shape, q.dtype, *gpu)
        if wanted and launch.descriptors_allowed(*sources(q, k, v, g)):
            run = core.load("rcmlib.attention.hopper_backward").hopper_backward
    return run(g, q, k, v, lse, delta, c_out, scale, is_causal)
