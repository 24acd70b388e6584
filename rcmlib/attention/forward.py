"""Attention forward with the skip fused in: out = c_skip·x + c_out·softmax(q kᵀ·scale) v.

q [B, H, Nq, D]; k, v [B, H, Nkv, D], any strides with a contiguous last dimension;
x, out [B, Nq, H·D]. One program owns BLOCK_M queries of one head and walks over the keys
BLOCK_N at a time (online softmax: Milakov & Gimelshein 2018; this loop order: Dao 2023,
FlashAttention-2). Storing f at column h·D merges the heads; the skip is applied just before.

HBM: q, k, v, x are read, out is written. f exists only in registers, D float32 numbers a row.
For a backward pass (attention_backward.py) f and lse [B, H, Nq] are written too.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib.core.device import copy_engine, device_capability, dot_precision
from rcmlib.core.epilogue import kernel_coefficients, load_coefficient, skip_epilogue
from rcmlib.core.launch import Plan, box_of_rows, by_layout, descriptors_allowed
from rcmlib.core.rows import key_range, load_rows, own_rows

LOG2_E = math.log2(math.e)  # exp(s) = exp2(s·log2 e), and exp2 is one GPU instruction
SHORT = 512  # keys: below, one loop that keeps track of the maximum is faster than two
LIMIT = tl.constexpr(2.0**120)  # of a sum of weights; 1 / LIMIT is a normal number, too
LOWEST = tl.constexpr(-3.0e38)  # of all maxima: -inf - -inf would be a NaN in exp2


@triton.jit
def weigh(s, acc, m, l, qk_scale, j, first_row, kv_len, CAUSAL: tl.constexpr,
          MASK: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    """The softmax's step for the scores s of the key tile at j: (p, acc, m, l).

    Per query row: m is the largest score so far (in units of log2), l the sum of the weights
    p = exp2(score − m), in eight parts: on Hopper each is one thread's own. A larger m
    rescales what was summed before. FIXED: m stays what it is, whatever the scores are.
    """
    if MASK:
        cols = j + tl.arange(0, s.shape[1])[None, :]
        visible = cols < kv_len
        if CAUSAL:
            visible &= cols <= first_row + tl.arange(0, s.shape[0])[:, None]
        s = tl.where(visible, s, float("-inf"))
    if not FIXED:
        larger = tl.maximum(m, tl.max(s, 1) * qk_scale)
        alpha = tl.exp2(m - larger)[:, None]
        acc, m, l = acc * alpha, larger, l * alpha
    p = tl.exp2(s * qk_scale - m[:, None])
    return p, acc, m, l + tl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 8), 1)


@triton.jit
def attend(acc, m, l, acc_b, m_b, l_b, qt, qt_b, k, v, b, h, start, stop, first_row,
           kv_len, qk_scale,
           stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
           BLOCK_N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
           CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
           TWO: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    """One softmax step for each key tile in [start, stop).

    acc sums v weighted by p. With TWO there is a second block of rows, whose names end in _b:
    a key tile, once fetched, serves both.
    """
    BLOCK_M: tl.constexpr = qt.shape[0]
    BLOCK_D: tl.constexpr = qt.shape[1]
    for j in tl.range(start, stop, BLOCK_N):
        kt = load_rows(k, b, h, j, kv_len, stride_kb, stride_kh, stride_kn,
                       BLOCK_N, D, BLOCK_D, TMA, MASK)  # fmt: skip
        s = tl.dot(qt, kt.T, input_precision=PRECISION)
        if TWO:
            s_b = tl.dot(qt_b, kt.T, input_precision=PRECISION)
        p, acc, m, l = weigh(s, acc, m, l, qk_scale, j, first_row, kv_len, CAUSAL, MASK,
                             FIXED)  # fmt: skip
        vt = load_rows(v, b, h, j, kv_len, stride_vb, stride_vh, stride_vn,
                       BLOCK_N, D, BLOCK_D, TMA, MASK)  # fmt: skip
        acc = tl.dot(p.to(vt.dtype), vt, acc, input_precision=PRECISION)
        if TWO:  # while the tensor core does that product, the other block's softmax
            p, acc_b, m_b, l_b = weigh(s_b, acc_b, m_b, l_b, qk_scale, j,
                                       first_row + BLOCK_M, kv_len, CAUSAL, MASK,
                                       FIXED)  # fmt: skip
            acc_b = tl.dot(p.to(vt.dtype), vt, acc_b, input_precision=PRECISION)
    return acc, m, l, acc_b, m_b, l_b


@triton.jit
def overflowed(acc, l):
    """Did a weight make one of these sums too large for float32, or not a number?"""
    fine = (tl.abs(acc) < LIMIT) & (tl.sum(l, 1) < LIMIT)[:, None]
    return tl.min(tl.min(fine.to(tl.int32), 1), 0) == 0


@triton.jit
def finish(acc, m, l, xt, x, out, saved_f, lse, c_skip, c_out, b, h, first_row,
           heads, q_len, stride_xb, stride_xn, D: tl.constexpr,
           PER_SAMPLE: tl.constexpr):  # fmt: skip
    """The epilogue of one block of rows: f = acc / l, then `merge` for all its channels."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_D: tl.constexpr = acc.shape[1]
    l = tl.sum(l, 1)
    f = acc * (1 / l)[:, None]
    if BLOCK_D == 128:  # by halves: for all of x and f there are too few registers
        left, right = tl.split(f.reshape(BLOCK_M, 2, BLOCK_D // 2).permute(0, 2, 1))
        merge(left, 0, None, x, out, saved_f, c_skip, c_out, b, h, first_row, heads, q_len,
              stride_xb, stride_xn, D, PER_SAMPLE)  # fmt: skip
        merge(right, BLOCK_D // 2, None, x, out, saved_f, c_skip, c_out, b, h, first_row,
              heads, q_len, stride_xb, stride_xn, D, PER_SAMPLE)  # fmt: skip
    else:
        merge(f, 0, xt, x, out, saved_f, c_skip, c_out, b, h, first_row, heads, q_len,
              stride_xb, stride_xn, D, PER_SAMPLE)  # fmt: skip
    if lse is not None:  # in units of log2, as m
        n = first_row + tl.arange(0, BLOCK_M)
        at = (tl.cast(b, tl.int64) * heads + h) * q_len + n
        tl.store(lse + at, m + tl.log2(l), mask=n < q_len)


@triton.jit
def merge(f, channel, xt, x, out, saved_f, c_skip, c_out, b, h, first_row, heads, q_len,
          stride_xb, stride_xn, D: tl.constexpr, PER_SAMPLE: tl.constexpr):  # fmt: skip
    """The skip on f, which is head h's channels from `channel` on, and the stores."""
    rows = first_row + tl.arange(0, f.shape[0])[:, None]
    d = channel + tl.arange(0, f.shape[1])[None, :]
    inside = (rows < q_len) & (d < D)
    # In 64 bits: offsets pass 2³¹ in large tensors.
    b64, n64 = tl.cast(b, tl.int64), rows.to(tl.int64)
    out_tile = (b64 * q_len + n64) * heads * D + h * D + d
    if saved_f is not None:
        tl.store(saved_f + out_tile, f.to(saved_f.dtype.element_ty), mask=inside)
    if x is not None:
        if xt is None:
            xt = load_residual(x, b, h, channel, first_row, q_len, stride_xb, stride_xn,
                               f.shape[0], D, f.shape[1])  # fmt: skip
        f = skip_epilogue(xt.to(tl.float32), f,
                          load_coefficient(c_skip, b, PER_SAMPLE),
                          load_coefficient(c_out, b, PER_SAMPLE))  # fmt: skip
    # No program comes back to x or out: in L2 they make room for k and v.
    tl.store(out + out_tile, f.to(out.dtype.element_ty), mask=inside,
             eviction_policy="evict_first")  # fmt: skip


@triton.jit
def load_residual(x, b, h, channel, first_row, q_len, stride_xb, stride_xn,
                  ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """x's channels of head h from `channel` on, [ROWS, BLOCK_D]."""
    rows = first_row + tl.arange(0, ROWS)[:, None]
    d = channel + tl.arange(0, BLOCK_D)[None, :]
    tile = (
        x + tl.cast(b, tl.int64) * stride_xb + rows.to(tl.int64) * stride_xn + h * D + d
    )
    return tl.load(tile, mask=(rows < q_len) & (d < D), eviction_policy="evict_first")


@triton.jit
def attention_kernel(q, k, v, x, out, saved_f, lse, c_skip, c_out, qk_scale,
                     heads, q_len, kv_len,
                     stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                     stride_vb, stride_vh, stride_vn, stride_xb, stride_xn,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
                     BLOCK_D: tl.constexpr, TWO: tl.constexpr, TMA: tl.constexpr,
                     CAUSAL: tl.constexpr, RAGGED: tl.constexpr, FIXED: tl.constexpr,
                     PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    ROWS: tl.constexpr = 2 * BLOCK_M if TWO else BLOCK_M
    b, h, first_row = own_rows(heads, q_len, ROWS, CAUSAL)
    second_row = first_row + BLOCK_M
    qt = load_rows(q, b, h, first_row, q_len, stride_qb, stride_qh, stride_qn,
                   BLOCK_M, D, BLOCK_D, TMA, True)  # fmt: skip
    qt_b = qt
    if TWO:
        qt_b = load_rows(q, b, h, second_row, q_len, stride_qb, stride_qh, stride_qn,
                         BLOCK_M, D, BLOCK_D, TMA, True)  # fmt: skip
    # Where registers allow, x is fetched now and arrives in the loop's shadow. Not before q:
    # all programs start together, and the loop would wait for x in the queue to HBM.
    xt = None
    if x is not None and TMA and BLOCK_D <= 64 and not RAGGED:
        xt = load_residual(x, b, h, 0, first_row, q_len, stride_xb, stride_xn,
                           BLOCK_M, D, BLOCK_D)  # fmt: skip
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M, 8], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_b, m_b, l_b = acc, m, l

    # The last tiles first: only they may need a mask, and they find the maximum that is kept.
    EDGE: tl.constexpr = RAGGED or CAUSAL
    whole, stop = key_range(kv_len, first_row, ROWS, BLOCK_N, CAUSAL)
    if FIXED:
        # Of half a tile at least (not along the diagonal): one key's score may be far too low.
        whole = tl.minimum(whole, (stop - BLOCK_N // 2) // BLOCK_N * BLOCK_N)
    if FIXED or EDGE:
        acc, m, l, acc_b, m_b, l_b = attend(
            acc, m, l, acc_b, m_b, l_b, qt, qt_b, k, v, b, h, whole, stop, first_row,
            kv_len, qk_scale, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
            stride_vn, BLOCK_N, D, TMA, CAUSAL, EDGE, PRECISION, TWO, False)  # fmt: skip
    acc, m, l, acc_b, m_b, l_b = attend(
        acc, m, l, acc_b, m_b, l_b, qt, qt_b, k, v, b, h, 0, whole, first_row,
        kv_len, qk_scale, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
        stride_vn, BLOCK_N, D, TMA, CAUSAL, False, PRECISION, TWO, FIXED)  # fmt: skip
    if FIXED:
        again = overflowed(acc, l)
        if TWO:
            again |= overflowed(acc_b, l_b)
        if again:
            # Scores some 80 above that maximum (2¹²⁰ = e⁸³), or something not finite.
            m = tl.full([BLOCK_M], LOWEST, tl.float32)
            l = tl.zeros([BLOCK_M, 8], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            acc, m, l, acc_b, m_b, l_b = attend(
                acc, m, l, acc, m, l, qt, qt_b, k, v, b, h, 0, stop, first_row,
                kv_len, qk_scale, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                stride_vn, BLOCK_N, D, TMA, CAUSAL, EDGE, PRECISION, TWO, False)  # fmt: skip
    finish(acc, m, l, xt, x, out, saved_f, lse, c_skip, c_out, b, h, first_row,
           heads, q_len, stride_xb, stride_xn, D, PER_SAMPLE)  # fmt: skip
    if TWO:
        finish(acc_b, m_b, l_b, None, x, out, saved_f, lse, c_skip, c_out, b, h,
               second_row, heads, q_len, stride_xb, stride_xn, D, PER_SAMPLE)  # fmt: skip


class Tile(NamedTuple):
    """How much of the problem one program holds, and with how many warps and buffers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # the most registers a thread may have (None: no limit)
    two: bool = False  # a program owns two blocks of block_m queries
    fixed: bool = False  # all weights are relative to the last tiles' maximum


def choose_tile(
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tma: bool = True,
    pairs: bool = True,
    long: bool = True,
) -> Tile:
    """The tile for a GPU of this compute capability, without a register spilled in its loop.

    tma: the copy engine reads q, k and v, where that pays (`copy_engine`).
    pairs: a program may own two blocks of rows.
    long: there are more than SHORT keys.

    D ≤ 128 on sm_90 was measured (chapter 6); the other lines compile without spills
    (tests/test_compilation.py). Weights relative to a fixed maximum may be as large as 2¹²⁰:
    float16 cannot hold them, and for sm_100 Triton 3.6 does not compile the check of their
    sums. float32 uses the ordinary FMA units, for IEEE products, and keeps its operands in
    registers, so its tiles are small. sm_90 and sm_100 have 227 KiB of shared memory, enough
    for two or three programs on an SM; sm_89 and sm_120 have 99.
    """
    block_d = triton.next_power_of_2(head_dim)
    if dtype == torch.float32:
        if block_d == 256:
            return Tile(32, 16, num_warps=16, num_stages=1)
        return Tile(32, 32, num_warps=8, num_stages=1)
    if block_d == 256:
        return Tile(64, 32, num_warps=8, num_stages=2)
    if capability[0] == 9:
        fixed = dtype == torch.bfloat16 and long
        tile = Tile(64, 64, num_warps=4, num_stages=3, fixed=fixed)
        if block_d == 128:
            return tile._replace(num_stages=2, two=True) if tma and pairs else tile
        # Limits under which three programs fit on an SM.
        if tma and fixed:
            return tile._replace(maxnreg=128)
        if tma:
            return Tile(64, 128, num_warps=4, num_stages=2, maxnreg=168)
        return tile
    if copy_engine(dtype, capability):
        if block_d == 128:
            return Tile(64, 64, num_warps=4, num_stages=3)
        return Tile(64, 128, num_warps=4, num_stages=2)
    if block_d == 128:
        return Tile(128, 32, num_warps=8, num_stages=3)
    return Tile(64, 64, num_warps=4, num_stages=3)


def few_rows(blocks: int, device: torch.device) -> bool:
    """Are so many blocks of 128 rows too few to keep the SMs of this GPU busy?

    Then a program owns one block of 64, so that there are more of them. And it reads by
    pointers, which is as fast here: encoding three descriptors for the copy engine takes a
    third of the launch, and a small launch takes longer than its kernel. (Measured on an H100.)
    """
    if device.type != "cuda":
        return False
    return blocks < 1.5 * torch.cuda.get_device_properties(device).multi_processor_count


@by_layout
def attention_plan(q, k, v, x, c_skip, c_out, is_causal, save) -> Plan:
    """The launch of `attention_kernel` for these layouts."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    block_d = triton.next_power_of_2(head_dim)
    capability = device_capability(q.device)
    few = few_rows(batch * heads * triton.cdiv(q_len, 128), q.device)
    tma = copy_engine(q.dtype, capability) and not few and descriptors_allowed(q, k, v)
    # Along the diagonal, one of two blocks would wait for the other.
    pairs, long = not (few or is_causal), kv_len > SHORT
    tile = choose_tile(head_dim, q.dtype, capability, tma, pairs, long)
    if q.device.type != "cuda" and q.dtype == torch.float32:
        tile = tile._replace(fixed=long)  # the interpreter's stand-in for bfloat16
    boxes = ()
    if tma:
        rows = (tile.block_m, tile.block_n, tile.block_n)
        boxes = tuple(map(box_of_rows, (q, k, v), rows, (block_d,) * 3))
    return Plan(
        attention_kernel, batch * heads * triton.cdiv(q_len, tile.block_m << tile.two),
        heads, q_len, kv_len,
        *q.strides[:3], *k.strides[:3], *v.strides[:3],
        *(x.strides[:2] if x is not None else (0, 0)),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, D=head_dim, BLOCK_D=block_d,
        TWO=tile.two, TMA=tma, CAUSAL=is_causal, RAGGED=kv_len % tile.block_n != 0,
        FIXED=tile.fixed,
        PER_SAMPLE=c_skip is not None, PRECISION=dot_precision(q.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
        boxes=boxes,
    )  # fmt: skip


def attention_forward(
    q, k, v, x, c_skip, c_out, scale, is_causal, save=False, plan: Plan | None = None
) -> tuple[torch.Tensor, ...]:
    """Launches `attention_kernel` on checked inputs (see `rcmlib.rcm_attention`).

    Returns (out,), or with `save` what the backward pass needs: (out, f, lse). With x = None
    it is attention alone, [B, Nq, H·D], pass one of a two-pass pipeline; then out is f, and
    the f returned is empty.
    plan: `attention_plan`'s for these arguments, if it is known already; the coefficients are
    then as the kernel takes them.
    """
    batch, heads, q_len, head_dim = q.shape
    device, dtype = q.device, q.dtype
    tokens = (batch, q_len, heads * head_dim)
    out = torch.empty(tokens, dtype=dtype if x is None else x.dtype, device=device)
    f = lse = None
    if save:
        lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device)
        f = torch.empty(tokens if x is not None else (0,), dtype=dtype, device=device)
    if plan is None:
        if x is not None:
            c_skip, c_out, _ = kernel_coefficients(c_skip, c_out)
        plan = attention_plan(q, k, v, x, c_skip, c_out, is_causal, save)
    f_out = None if x is None else f
    plan.launch(q, k, v, x, out, f_out, lse, c_skip, c_out, scale * LOG2_E)
    return (out, f, lse) if save else (out,)
