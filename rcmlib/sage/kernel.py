"""Attention in 8 bits with the skip fused in: INT8 q kᵀ, FP8 p v (SageAttention2 and 2++).

    out = c_skip·x + c_out·softmax(q kᵀ·scale) v

The loop of `attention.py` on the 8-bit copies of `quantize.py`. One program owns BLOCK_M
queries of one head and walks over the keys BLOCK_N at a time.

    s  = q8 k8ᵀ                       int32, exact
    p  = 256·exp2(qk·s − m)           qk = q_scale·k_scale, log2 e included; 256: E4M3's range
    acc = alpha·acc + fp8(p) v8       l sums p, so 256 and v's scale leave in the epilogue

SageAttention2: arXiv 2411.10958; 2++: arXiv 2505.21136. x, out [B, Nq, H·D].
HBM: the 8-bit copies and x are read, out is written.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib.attention.forward import LOG2_E, Tile
from rcmlib.core import interpreting
from rcmlib.core.device import copy_engine, device_capability
from rcmlib.core.epilogue import kernel_coefficients, load_coefficient, skip_epilogue
from rcmlib.core.launch import Plan, box_of_matrix, by_layout
from rcmlib.core.rows import key_range, own_rows
from rcmlib.sage.quantize import (
    E4M3_MAX,
    columns,
    padded_dim,
    padded_length,
    quantize_int8,
    quantize_values,
    to_e4m3,
)

# Weights are relative to 2⁸, which E4M3 holds exactly and with room above. In float32 LIFT is
# subtracted from numbers that large scores make large: rounded to their last bit it becomes 8,
# or 0. A larger LIFT may become 9, or 16: weights beyond 448 would be cut off.
LIFT = tl.constexpr(8 - 2.0**-20)
# 2²⁴ as float32 bits. Adding a negative integer n to the bits gives 2²⁴ + n, exactly, down to
# n = −2²³: an int32 becomes a float32 by one integer addition.
TWO_24_BITS = tl.constexpr(0x4B800000)
TWO_24 = tl.constexpr(2.0**24)
NEVER = tl.constexpr(-(2**30))  # below every score
# |v8| whose sums with any p8 ≤ 448 over 64 keys stay below float16's 65504 (2++).
V_MAX_FP16_SUM = 2.25


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
def weigh(s, qk, shifts, m, l, j, first_row, kv_len, CAUSAL: tl.constexpr,
          MASK: tl.constexpr):  # fmt: skip
    """The softmax's step for the scores s of the key tile at j: (p, alpha, m, l).

    Every row sees one of its keys at least. l [BLOCK_M, 8] holds sums of every eighth weight:
    columns of one thread, so the loop exchanges nothing between threads for them.
    """
    BLOCK_M: tl.constexpr = s.shape[0]
    BLOCK_N: tl.constexpr = s.shape[1]
    if MASK:
        cols = j + tl.arange(0, BLOCK_N)[None, :]
        visible = cols < kv_len
        if CAUSAL:
            visible &= cols <= first_row + tl.arange(0, BLOCK_M)[:, None]
    if shifts is None:
        # The maximum of integers, then one float product a row.
        if MASK:
            s = tl.where(visible, s, NEVER)
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
        shift = tl.load(shifts + j + tl.arange(0, BLOCK_N))
        t = s.to(tl.float32) * qk[:, None] + shift[None, :]
        if MASK:
            t = tl.where(visible, t, float("-inf"))
        m_new = tl.maximum(m, tl.max(t, 1))
        p = tl.exp2(t - (m_new - LIFT)[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha[:, None] + tl.sum(p.reshape(BLOCK_M, BLOCK_N // 8, 8), 1)
    return p, alpha, m_new, l


@triton.jit
def load_box(src, row, col, cols, ROWS: tl.constexpr, COLS: tl.constexpr,
             TMA: tl.constexpr):  # fmt: skip
    """[ROWS, COLS] of a matrix with `cols` columns, by the copy engine or by pointers."""
    if TMA:
        return src.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)[:, None].to(tl.int64)
        return tl.load(src + r * cols + col + tl.arange(0, COLS)[None, :])


@triton.jit
def step(acc, m, l, qk, qt, k, v, shifts, head, j, first_row, kv_len, kv_padded,
         BLOCK_N: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr,
         MASK: tl.constexpr, PV: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """One online-softmax step: the key tile at j."""
    BLOCK_D: tl.constexpr = qt.shape[1]
    kt = load_box(k, head * kv_padded + j, 0, BLOCK_D, BLOCK_N, BLOCK_D, TMA)
    s = tl.dot(qt, kt.T)  # int32, exact
    p, alpha, m, l = weigh(s, qk, shifts, m, l, j, first_row, kv_len, CAUSAL, MASK)
    if PV == "fp16":
        vt = load_box(v, head * kv_padded + j, 0, BLOCK_D, BLOCK_N, BLOCK_D, TMA)
    else:
        vt = load_box(v, head * BLOCK_D, j, kv_padded, BLOCK_D, BLOCK_N, TMA).T
    return add_values(acc, alpha, to_operand(p, PV, NATIVE), vt, PV), m, l


@triton.jit(do_not_specialize=["q_len", "kv_len"])  # see `to_e4m3`
def sage_attention_kernel(q, k, v, q_scale, k_scale, v_top, v_mean, bias, x, out,
                          c_skip, c_out, v_unit, heads, q_len, kv_len, q_padded, kv_padded,
                          stride_xb, stride_xn,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
                          BLOCK_D: tl.constexpr, Q_GROUP: tl.constexpr,
                          K_GROUP: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr,
                          RAGGED: tl.constexpr, PER_SAMPLE: tl.constexpr,
                          PV: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    b, h, first_row = own_rows(heads, q_len, BLOCK_M, CAUSAL)
    head = b * heads + h
    rows = first_row + tl.arange(0, BLOCK_M)
    qt = load_box(q, head * q_padded + first_row, 0, BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    # Rows of padding have scales too; they are computed and not stored.
    row_scale = tl.load(q_scale + head * (q_padded // Q_GROUP) + rows // Q_GROUP)
    k_scale += head * (kv_padded // K_GROUP)
    shifts = None if bias is None else bias + head * kv_padded
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M, 8], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # The tile that needs a mask comes first, while acc is zero and needs no registers.
    whole, stop = key_range(kv_len, first_row, BLOCK_M, BLOCK_N, CAUSAL)
    if RAGGED or CAUSAL:
        tl.static_assert(BLOCK_N >= BLOCK_M)  # so there is one at most
        if whole < stop:
            qk = row_scale * tl.load(k_scale + whole // K_GROUP)
            acc, m, l = step(acc, m, l, qk, qt, k, v, shifts, head, whole, first_row, kv_len,
                             kv_padded, BLOCK_N, TMA, CAUSAL, True, PV, NATIVE)  # fmt: skip
    # A tile's scale is fetched one tile ahead. Fetched where it is used, it would be made
    # part of the pipeline of k and v, and the loop would wait for it.
    tile_scale = tl.load(k_scale)
    for j in tl.range(0, whole, BLOCK_N):
        qk = row_scale * tile_scale
        tile_scale = tl.load(k_scale + tl.minimum(j + BLOCK_N, kv_len - 1) // K_GROUP)
        acc, m, l = step(acc, m, l, qk, qt, k, v, shifts, head, j, first_row, kv_len,
                         kv_padded, BLOCK_N, TMA, CAUSAL, False, PV, NATIVE)  # fmt: skip

    r, d = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_D)
    unit = tl.load(v_top + head * BLOCK_D + d) * v_unit
    f = acc * (1 / tl.sum(l, 1))[:, None] * unit[None, :]
    if v_mean is not None:
        f += tl.load(v_mean + head * BLOCK_D + d)[None, :]
    # Tile corners in 64 bits; offsets within a tile are small, but for x's token stride.
    corner = tl.cast(b, tl.int64) * q_len + first_row
    inside = (rows < q_len)[:, None] & (d < D)[None, :]
    if x is not None:
        x += (
            tl.cast(b, tl.int64) * stride_xb
            + tl.cast(first_row, tl.int64) * stride_xn
            + h * D
        )
        xt = tl.load(x + (r.to(tl.int64) * stride_xn + d[None, :]), mask=inside)
        f = skip_epilogue(xt.to(tl.float32), f,
                          load_coefficient(c_skip, b, PER_SAMPLE),
                          load_coefficient(c_out, b, PER_SAMPLE))  # fmt: skip
    out += corner * heads * D + h * D
    tl.store(
        out + (r * heads * D + d[None, :]), f.to(out.dtype.element_ty), mask=inside
    )


class Operands(NamedTuple):
    """q, k and v in 8 bits (`quantize_operands`), and what turns them back."""

    q: torch.Tensor  # int8 [B, H, ⌈Nq⌉, BLOCK_D]
    k: torch.Tensor  # int8 [B, H, ⌈Nkv⌉, BLOCK_D]
    v: torch.Tensor  # E4M3 [B, H, BLOCK_D, ⌈Nkv⌉], or float16 [B, H, ⌈Nkv⌉, BLOCK_D]
    q_scale: torch.Tensor  # float32 [B, H, ⌈Nq⌉ / q_group], times scale·log2 e
    k_scale: torch.Tensor  # float32 [B, H, ⌈Nkv⌉ / k_group]
    v_top: torch.Tensor  # float32 [B, H, BLOCK_D], what v's limit stands for
    v_mean: torch.Tensor | None  # float32 [B, H, BLOCK_D]
    bias: (
        torch.Tensor | None
    )  # float32 [B, H, ⌈Nkv⌉]: what smoothing q takes from scores
    v_limit: float
    pv: str


def quantize_operands(
    q, k, v, scale, smooth_q, smooth_k, smooth_v, pv, q_group=1, k_group=None
) -> Operands:
    """All of a call's 8-bit copies (see `rcmlib.rcm_sage_attention`).

    q_group, k_group: tokens that share a scale (`quantize_int8`); k_group has to be a multiple
    of the kernel's BLOCK_N, which is also what it is unless given.
    """
    if k_group is None:
        capability = device_capability(q.device)
        k_group = choose_sage_tile(q.shape[-1], pv, capability).block_n
    factor = scale * LOG2_E
    k_mean = columns(k, smooth_k, False).mean
    q_mean = columns(q, smooth_q, False).mean
    q8, q_scale = quantize_int8(q, q_group, q_mean, factor)
    k8, k_scale = quantize_int8(k, k_group, k_mean)
    bias = None
    if smooth_q:  # (q − q̄) kᵀ lacks q̄ kᵀ: one number a key, the same for all queries
        dim, length = k.shape[-1], k.shape[2]
        center = (q_mean[..., :dim] * factor)[..., None]
        smooth = k.float() - k_mean[..., None, :dim] if smooth_k else k.float()
        bias = k.new_zeros((*k.shape[:2], padded_length(length)), dtype=torch.float32)
        # Autocast would round this product to 16 bits.
        with torch.autocast(q.device.type, enabled=False):
            bias[..., :length] = (smooth @ center)[..., 0]
    limit = V_MAX_FP16_SUM if pv == "fp8_fp16" else E4M3_MAX
    v_mean, v_top = columns(v, smooth_v, True)
    v8 = quantize_values(v, limit, v_top, v_mean, fp8=pv != "fp16")
    return Operands(q8, k8, v8, q_scale, k_scale, v_top, v_mean, bias, limit, pv)


def sage_attention_forward(
    q, k, v, x, c_skip, c_out, scale, is_causal, smooth_q, smooth_k, smooth_v, pv
) -> torch.Tensor:
    """Quantises and attends, on checked inputs (see `rcmlib.rcm_sage_attention`)."""
    operands = quantize_operands(q, k, v, scale, smooth_q, smooth_k, smooth_v, pv)
    dtype = q.dtype if x is None else x.dtype
    sizes = (*q.shape[2:], k.shape[2])
    return attend_quantized(operands, x, c_skip, c_out, is_causal, *sizes, dtype)


@by_layout
def sage_plan(
    q, k, v, q_scale, k_scale, v_top, v_mean, bias, x, c_skip, c_out,
    pv, is_causal, q_len, head_dim, kv_len, dtype,
) -> Plan:  # fmt: skip
    """The launch of `sage_attention_kernel` for these layouts."""
    batch, heads, q_padded, block_d = q.shape
    kv_padded = k.shape[2]
    capability = device_capability(q.device)
    tile = choose_sage_tile(head_dim, pv, capability)
    tma = copy_engine(torch.int8, capability)
    boxes = ()
    if tma:
        boxes = tuple(map(box_of_matrix, (q, k, v), operand_boxes(tile, block_d, pv)))
    return Plan(
        sage_attention_kernel, batch * heads * triton.cdiv(q_len, tile.block_m),
        heads, q_len, kv_len, q_padded, kv_padded,
        *(x.strides[:2] if x is not None else (0, 0)),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, D=head_dim, BLOCK_D=block_d,
        Q_GROUP=q_padded // q_scale.shape[2], K_GROUP=kv_padded // k_scale.shape[2],
        TMA=tma, CAUSAL=is_causal, RAGGED=kv_len % tile.block_n != 0,
        PER_SAMPLE=c_skip is not None, PV=pv, NATIVE=not interpreting(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
        boxes=boxes,
    )  # fmt: skip


def attend_quantized(
    operands: Operands, x, c_skip, c_out, is_causal, q_len, head_dim, kv_len, dtype
) -> torch.Tensor:
    """Launches `sage_attention_kernel`: [B, Nq, H·D] in `dtype`; without x, attention alone."""
    *tensors, v_limit, pv = operands
    batch, heads = operands.q.shape[:2]
    shape = (batch, q_len, heads * head_dim)
    out = torch.empty(shape, dtype=dtype, device=operands.q.device)
    if x is not None:
        c_skip, c_out, _ = kernel_coefficients(c_skip, c_out)
    plan = sage_plan(
        *tensors, x, c_skip, c_out, pv, is_causal, q_len, head_dim, kv_len, dtype
    )
    plan.launch(*tensors, x, out, c_skip, c_out, 1 / v_limit)
    return out


def operand_boxes(tile, block_d: int, pv: str) -> list[list[int]]:
    """What one copy of the copy engine brings, of q, k and v seen as matrices."""
    v_box = [tile.block_n, block_d] if pv == "fp16" else [block_d, tile.block_n]
    return [[tile.block_m, block_d], [tile.block_n, block_d], v_box]


def choose_sage_tile(head_dim: int, pv: str, capability: tuple[int, int]) -> Tile:
    """The tile of `sage_attention_kernel` for a GPU of this compute capability.

    D ≤ 128 on sm_90 was measured; the other lines compile without spills
    (tests/test_compilation.py).
    """
    block_d = padded_dim(head_dim)
    if capability[0] == 9:
        if block_d == 256:
            return Tile(64, 64, num_warps=8, num_stages=2)
        block_n = 64 if pv == "fp8_fp16" else 128
        if block_d == 128:
            return Tile(64, block_n, num_warps=4, num_stages=2, maxnreg=168)
        return Tile(64, block_n, num_warps=4, num_stages=3, maxnreg=128)
    if block_d == 256:
        return Tile(32, 64, num_warps=8, num_stages=2)
    return Tile(64, 64, num_warps=8, num_stages=3)
