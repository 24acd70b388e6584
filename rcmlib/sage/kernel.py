"""Attention in 8 bits with the skip fused in: INT8 q kᵀ, FP8 p v (SageAttention2 and 2++).

    out = c_skip·x + c_out·softmax(q kᵀ·scale) v

The loop of attention/forward.py on the 8-bit copies of quantize.py. One program owns block_m
queries of one head and walks over the keys block_n at a time.

    s  = q8 k8ᵀ                       int32, exact
    p  = 256·exp2(qk·s − m)           qk = q_scale·k_scale, log2 e included; 256: E4M3's range
    acc = alpha·acc + fp8(p) v8       l sums p, so 256 and v's scale leave in the epilogue

SageAttention2: arXiv 2411.10958; 2++: arXiv 2505.21136. x, out [B, Nq, H·D].
HBM: the 8-bit copies and x are read, out is written.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib.attention.tiles import choose_sage_tile
from rcmlib.core import copy_engine, device_capability, interpreting, launch
from rcmlib.core.epilogue import load_coefficient, skip_epilogue
from rcmlib.core.rows import key_range, mask_scores, own_rows
from rcmlib.sage.quantize import Operands, quantize_operands, to_e4m3

# Weights are relative to 2⁸, which E4M3 holds exactly and with room above. In float32 LIFT is
# subtracted from numbers that large scores make large: rounded to their last bit it becomes 8,
# or 0. A larger LIFT may become 9, or 16: weights beyond 448 would be cut off.
LIFT = tl.constexpr(8 - 2.0**-20)
# 2²⁴ as float32 bits. Adding a negative integer n to the bits gives 2²⁴ + n, exactly, down to
# n = −2²³: an int32 becomes a float32 by one integer addition.
TWO_24_BITS = tl.constexpr(0x4B800000)
TWO_24 = tl.constexpr(2.0**24)
NEVER = tl.constexpr(-(2**30))  # below every score


@dataclass(frozen=True, kw_only=True)
class SageVariant(launch.Variant):
    """How the kernel is compiled. block_d: of the 8-bit copies (`padded_dim`)."""

    q_group: int  # tokens that share an INT8 scale
    k_group: int
    pv: str  # the number formats of p v (`rcm_sage_attention`)
    native: bool  # the GPU converts to FP8 (`to_e4m3`)


class Matrix(NamedTuple):
    """An operand [B, H, rows, cols] as one matrix: all heads below one another."""

    source: tl.tensor  # its pointer, or its descriptor
    cols: tl.tensor


class Keys(NamedTuple):
    """What one head's keys and values are."""

    k: tl.tuple  # Matrix
    v: tl.tuple  # Matrix
    shifts: tl.tensor  # what smoothing q took from the scores, a number a key; or None
    head: tl.tensor  # its number among all samples' heads
    length: tl.tensor  # Nkv, and with the padding of the copies
    padded: tl.tensor


@triton.jit
def in_token_order(p):
    """p [M, N]'s columns in the order of V's tokens (`quantize.token_at`).

    After q kᵀ a thread holds the scores of keys 2i, 2i+1, 2i+8, 2i+9 of each 16; as an operand
    of p v it must hold four neighbours. Renamed like this they are neighbours, and p stays
    where it is.
    """
    M: tl.constexpr = p.shape[0]
    N: tl.constexpr = p.shape[1]
    # [half, quarter, one] -> [quarter, half, one]; two 16s at a time make one instruction's 32.
    p = p.reshape(M, N // 32, 2, 2, 4, 2)
    return p.trans(0, 1, 2, 4, 3, 5).reshape(M, N)


@triton.jit
def to_operand(p, PV: tl.constexpr, NATIVE: tl.constexpr):
    """p in the format and order of the second product's left operand."""
    if PV == "fp16":
        return p.to(tl.float16)
    else:
        return in_token_order(to_e4m3(p, NATIVE))


@triton.jit
def add_values(acc, alpha, p, v, PV: tl.constexpr):
    """acc·alpha + p v, summed as PV says."""
    if PV == "fp8_short":
        return tl.dot(p, v, acc * alpha[:, None])
    elif PV == "fp8_fp16":
        half = tl.dot(p, v, out_dtype=tl.float16)
        return acc * alpha[:, None] + half.to(tl.float32)
    else:
        # Two levels: the tensor core sums one tile, float32 registers sum the tiles.
        return acc * alpha[:, None] + tl.dot(p, v)


@triton.jit
def weigh_products(s, qk, m, l, keys, j, first_row, HOW: tl.constexpr,
                   MASK: tl.constexpr):  # fmt: skip
    """The softmax's step for the int32 products s of the key tile at j: (p, alpha, m, l).

    Every row sees one of its keys at least. l [M, 8] holds sums of every eighth weight:
    columns of one thread, so the loop exchanges nothing between threads for them.
    """
    M: tl.constexpr = HOW.block_m
    N: tl.constexpr = HOW.block_n
    if keys.shifts is None:
        # The maximum of integers, then one float product a row.
        if MASK:
            s = mask_scores(s, j, first_row, keys.length, NEVER, HOW.causal)
        top = tl.max(s, 1)
        highest = top.to(tl.float32) * qk
        m_new = tl.maximum(m, highest)
        # s − top ≤ 0 becomes a float; the fma takes off again what that added.
        below = tl.maximum(m_new - highest, 0.0)
        offset = qk * TWO_24 + (below - LIFT)
        t = (s + (-top + TWO_24_BITS)[:, None]).to(tl.float32, bitcast=True)
        p = tl.exp2(t * qk[:, None] - offset[:, None])
        if MASK:
            p = tl.where(s == NEVER, 0.0, p)
    else:
        shift = tl.load(keys.shifts + j + tl.arange(0, N))
        t = s.to(tl.float32) * qk[:, None] + shift[None, :]
        if MASK:
            t = mask_scores(t, j, first_row, keys.length, float("-inf"), HOW.causal)
        m_new = tl.maximum(m, tl.max(t, 1))
        p = tl.exp2(t - (m_new - LIFT)[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha[:, None] + tl.sum(p.reshape(M, N // 8, 8), 1)
    return p, alpha, m_new, l


@triton.jit
def load_box(matrix, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """[ROWS, COLS] of a matrix, by the copy engine or by pointers."""
    if TMA:
        return matrix.source.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)[:, None].to(tl.int64)
        c = col + tl.arange(0, COLS)[None, :]
        return tl.load(matrix.source + r * matrix.cols + c)


@triton.jit
def sage_step(acc, m, l, qk, qt, keys, j, first_row, HOW: tl.constexpr,
              MASK: tl.constexpr):  # fmt: skip
    """One online-softmax step: the key tile at j."""
    N: tl.constexpr = HOW.block_n
    BLOCK_D: tl.constexpr = HOW.block_d
    PV: tl.constexpr = HOW.pv
    row = keys.head * keys.padded + j
    kt = load_box(keys.k, row, 0, N, BLOCK_D, HOW.tma)
    s = tl.dot(qt, kt.T)  # int32, exact
    p, alpha, m, l = weigh_products(s, qk, m, l, keys, j, first_row, HOW, MASK)
    if PV == "fp16":
        vt = load_box(keys.v, row, 0, N, BLOCK_D, HOW.tma)
    else:
        vt = load_box(keys.v, keys.head * BLOCK_D, j, BLOCK_D, N, HOW.tma).T
    p = to_operand(p, PV, HOW.native)
    return add_values(acc, alpha, p, vt, PV), m, l


@triton.jit(do_not_specialize=["q_len", "kv_len"])  # see `to_e4m3`
def sage_attention_kernel(q, k, v, q_scale, k_scale, v_top, v_mean, bias, x, out,
                          c_skip, c_out, v_unit, heads, q_len, kv_len, q_padded,
                          kv_padded, x_strides, HOW: tl.constexpr):  # fmt: skip
    M: tl.constexpr = HOW.block_m
    N: tl.constexpr = HOW.block_n
    D: tl.constexpr = HOW.head_dim
    BLOCK_D: tl.constexpr = HOW.block_d
    at = own_rows(heads, q_len, M, HOW.causal)
    head = at.sample * heads + at.head
    rows = at.row + tl.arange(0, M)
    qt = load_box(Matrix(q, BLOCK_D), head * q_padded + at.row, 0, M, BLOCK_D, HOW.tma)
    # Rows of padding have scales too; they are computed and not stored.
    row_scale = tl.load(q_scale + head * (q_padded // HOW.q_group) + rows // HOW.q_group)
    k_scale += head * (kv_padded // HOW.k_group)
    shifts = None if bias is None else bias + head * kv_padded
    values = Matrix(v, BLOCK_D if HOW.pv == "fp16" else kv_padded)
    keys = Keys(Matrix(k, BLOCK_D), values, shifts, head, kv_len, kv_padded)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M, 8], tl.float32)
    acc = tl.zeros([M, BLOCK_D], tl.float32)

    # The tile that needs a mask comes first, while acc is zero and needs no registers.
    whole, stop = key_range(kv_len, at.row, M, HOW)
    if HOW.ragged or HOW.causal:
        tl.static_assert(N >= M)  # so there is one at most
        if whole < stop:
            qk = row_scale * tl.load(k_scale + whole // HOW.k_group)
            acc, m, l = sage_step(acc, m, l, qk, qt, keys, whole, at.row, HOW, True)
    # A tile's scale is fetched one tile ahead. Fetched where it is used, it would be made
    # part of the pipeline of k and v, and the loop would wait for it.
    tile_scale = tl.load(k_scale)
    for j in tl.range(0, whole, N):
        qk = row_scale * tile_scale
        tile_scale = tl.load(k_scale + tl.minimum(j + N, kv_len - 1) // HOW.k_group)
        acc, m, l = sage_step(acc, m, l, qk, qt, keys, j, at.row, HOW, False)

    r, d = tl.arange(0, M)[:, None], tl.arange(0, BLOCK_D)
    unit = tl.load(v_top + head * BLOCK_D + d) * v_unit
    f = acc * (1 / tl.sum(l, 1))[:, None] * unit[None, :]
    if v_mean is not None:
        f += tl.load(v_mean + head * BLOCK_D + d)[None, :]
    # Tile corners in 64 bits; offsets within a tile are small, but for x's token stride.
    corner = tl.cast(at.sample, tl.int64) * q_len + at.row
    inside = (rows < q_len)[:, None] & (d < D)[None, :]
    if x is not None:
        x += (
            tl.cast(at.sample, tl.int64) * x_strides[0]
            + tl.cast(at.row, tl.int64) * x_strides[1]
            + at.head * D
        )
        xt = tl.load(x + (r.to(tl.int64) * x_strides[1] + d[None, :]), mask=inside)
        f = skip_epilogue(xt.to(tl.float32), f,
                          load_coefficient(c_skip, at.sample, HOW.per_sample),
                          load_coefficient(c_out, at.sample, HOW.per_sample))  # fmt: skip
    out += corner * heads * D + at.head * D
    tl.store(out + (r * heads * D + d[None, :]), f.to(out.dtype.element_ty), mask=inside)


def sage_attention_forward(
    q, k, v, x, c_skip, c_out, scale, is_causal, smooth_q, smooth_k, smooth_v, pv
) -> torch.Tensor:
    """Quantises and attends, on checked inputs; c_skip, c_out: two floats or two [B]."""
    kind = "sage_attention" if x is None else "rcm_sage_attention"
    options = (is_causal, smooth_q, smooth_k, smooth_v, pv)
    key = launch.key_of(kind, (q, k, v, x, c_skip, c_out), *options)
    tile = launch.planned(
        key, lambda: choose_sage_tile(q.shape[-1], pv, device_capability(q.device))
    )
    smooth = (smooth_q, smooth_k, smooth_v)
    operands = quantize_operands(q, k, v, scale, *smooth, pv, k_group=tile.block_n)
    dtype = q.dtype if x is None else x.dtype
    sizes = (*q.shape[2:], k.shape[2])
    return attend_quantized(operands, x, c_skip, c_out, is_causal, *sizes, dtype)


def sage_plan(
    operands: Operands, x, is_causal, q_len, head_dim, kv_len, per_sample
) -> launch.Plan:
    """The launch of `sage_attention_kernel` for operands and x like these."""
    q, k, v, pv = operands.q, operands.k, operands.v, operands.pv
    batch, heads, q_padded, block_d = q.shape
    kv_padded = k.shape[2]
    capability = device_capability(q.device)
    tile = choose_sage_tile(head_dim, pv, capability)
    tma = copy_engine(torch.int8, capability)
    m, n = tile.block_m, tile.block_n
    # What one copy brings, of q, k and v seen as matrices: all rows below one another.
    blocks = [m, block_d], [n, block_d], [n, block_d] if pv == "fp16" else [block_d, n]
    matrices = zip((t.flatten(0, -2) for t in (q, k, v)), blocks, strict=True)
    boxes = tuple((list(t.shape), list(t.stride()), block) for t, block in matrices)
    how = SageVariant(
        **vars(tile), head_dim=head_dim, block_d=block_d, tma=tma, causal=is_causal,
        ragged=kv_len % tile.block_n != 0, per_sample=per_sample,
        q_group=q_padded // operands.q_scale.shape[2],
        k_group=kv_padded // operands.k_scale.shape[2],
        pv=pv, native=not interpreting(),
    )  # fmt: skip
    return launch.Plan(
        sage_attention_kernel, batch * heads * triton.cdiv(q_len, tile.block_m),
        heads, q_len, kv_len, q_padded, kv_padded,
        (0, 0) if x is None else x.stride()[:2], HOW=how, boxes=boxes if tma else (),
    )  # fmt: skip


def attend_quantized(
    operands: Operands, x, c_skip, c_out, is_causal, q_len, head_dim, kv_len, dtype
) -> torch.Tensor:
    """Launches `sage_attention_kernel`: [B, Nq, H·D] in `dtype`; without x, attention alone."""
    *tensors, v_limit, pv = operands
    batch, heads = operands.q.shape[:2]
    out = launch.result(operands.q, (batch, q_len, heads * head_dim), dtype)
    sizes = (is_causal, q_len, head_dim, kv_len)
    per_sample = isinstance(c_skip, torch.Tensor)
    key = launch.key_of("quantized", (*tensors, x, c_skip, c_out), pv, dtype, *sizes)
    plan = launch.planned(key, lambda: sage_plan(operands, x, *sizes, per_sample))
    plan.launch(*tensors, x, out, c_skip, c_out, 1 / v_limit)
    return out
