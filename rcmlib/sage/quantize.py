"""8-bit copies of q, k and v, as `sage_attention.py` wants them.

    int8:  t ≈ scale·(round(t / scale)),  scale = max|t| / 127        (q and k; a scale a group
                                                                       of neighbouring tokens)
    E4M3:  v ≈ scale·(fp8(v / scale)),    scale = max|v| / limit      (a scale a channel)

t, v [B, H, N, D], any strides with a contiguous last dimension. The copies are padded with
zeros to whole tiles, [B, H, ⌈N⌉, BLOCK_D], so that the attention kernel needs no mask to read
them. V is stored transposed, [B, H, BLOCK_D, ⌈N⌉], its tokens in TOKEN_ORDER.

Smoothing subtracts a column mean first: of k, which shifts all scores of a query alike and so
leaves the softmax as it is (SageAttention, arXiv 2410.02367); of q and v with a correction
(SageAttention2, arXiv 2411.10958). Specification, bit for bit: `rcmlib.reference.eight_bit`.

HBM: each copy reads 2 bytes an element and writes 1; a mean or a range reads 2 more.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib.core import interpreting
from rcmlib.core.launch import Plan, by_layout

PAD = 128  # tokens are padded to whole tiles of any size in use
TINY = tl.constexpr(2.0**-110)  # a smaller maximum would overflow limit / maximum
# 1.5·2²³: a float32 of this size has no fraction bits, so adding it rounds to the nearest
# integer, ties to even, and leaves that integer in the low bits.
ROUNDER = tl.constexpr(12582912.0)
E4M3_MAX = 448.0


@triton.jit
def to_e4m3(x, NATIVE: tl.constexpr):
    """float32 to FP8 E4M3, to nearest, ties to even, at most ±448.

    A GPU that has the type has an instruction. Triton's interpreter truncates silently, so
    there the same is done on the bits: 4 exponent bits with bias 7, 3 mantissa bits.

    ptxas 12.8 and 12.9 (13.0 does not) leave garbage in the upper half of a word of two
    conversions that they can tell to be equal, such as constant zeros. So callers mask by what
    only the run knows, and do not specialise on lengths.
    """
    if NATIVE:
        return x.to(tl.float8e4nv)
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        magnitude = bits & 0x7FFFFFFF
        # Drop 20 of 23 mantissa bits, rounding half to even, and rebias from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2⁻⁶ the codes count steps of 2⁻⁹.
        small = tl.abs(x) * 512.0 + ROUNDER
        subnormal = small.to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)  # NaN
        return (code | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def load_tile(t, b, h, rows, length, stride_b, stride_h, stride_n,
              D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """(rows of head (b, h) as float32 [rows, BLOCK_D], which of them exist)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < length)[:, None] & (d < D)
    # In 64 bits: offsets pass 2³¹ in large tensors.
    head = tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
    tile = t + head + rows[:, None].to(tl.int64) * stride_n + d
    return tl.load(tile, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def int8_kernel(t, mean, out, scales, factor, heads, length, padded, groups,
                stride_b, stride_h, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_N: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """One program: BLOCK_N tokens of one head; a scale for each GROUP of them."""
    tiles = padded // BLOCK_N
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    x, inside = load_tile(t, head // heads, head % heads, rows, length,
                          stride_b, stride_h, stride_n, D, BLOCK_D)  # fmt: skip
    if mean is not None:
        x = tl.where(inside, x - tl.load(mean + head * BLOCK_D + d), 0.0)
    # [groups, GROUP, BLOCK_D]: one maximum for the first axis.
    x = x.reshape(BLOCK_N // GROUP, GROUP, BLOCK_D)
    top = tl.maximum(tl.max(tl.max(tl.abs(x), 2), 1), TINY)
    steps = x * tl.div_rn(127.0, top)[:, None, None] + ROUNDER
    q = steps.to(tl.int32, bitcast=True).to(tl.int8).reshape(BLOCK_N, BLOCK_D)
    head64 = tl.cast(head, tl.int64)
    tl.store(out + (head64 * padded + rows[:, None]) * BLOCK_D + d, q)
    group = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    tl.store(scales + head64 * groups + group, tl.div_rn(top, 127.0) * factor)


@triton.jit
def token_at(position):
    """The token stored at this position: TOKEN_ORDER within each 16."""
    # position = [quarter: 2 bits][half: 1][one: 1], token = [half][quarter][one]
    quarter, half, one = (position >> 2) & 3, (position >> 1) & 1, position & 1
    return (position & -16) | (half << 3) | (quarter << 1) | one


@triton.jit(do_not_specialize=["length"])  # see `to_e4m3`
def values_kernel(v, mean, top, out, limit, heads, length, padded,
                  stride_b, stride_h, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_N: tl.constexpr, FP8: tl.constexpr,
                  NATIVE: tl.constexpr):  # fmt: skip
    """v·limit/top, channel by channel: FP8 as [BLOCK_D, padded], or float16 as v is."""
    tiles = padded // BLOCK_N
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    positions = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = token_at(positions) if FP8 else positions
    d = tl.arange(0, BLOCK_D)
    x, _ = load_tile(v, head // heads, head % heads, rows, length,
                     stride_b, stride_h, stride_n, D, BLOCK_D)  # fmt: skip
    if mean is not None:  # 0 in channels of padding, where x is 0 too
        x -= tl.load(mean + head * BLOCK_D + d)[None, :]
        x = tl.where((rows < length)[:, None], x, 0.0)
    x *= tl.div_rn(limit, tl.load(top + head * BLOCK_D + d))[None, :]
    head64 = tl.cast(head, tl.int64)
    if FP8:
        place = (head64 * BLOCK_D + d[:, None]) * padded + positions[None, :]
        tl.store(out + place, to_e4m3(x.T, NATIVE))
    else:
        place = (head64 * padded + positions[:, None]) * BLOCK_D + d[None, :]
        tl.store(out + place, x.to(tl.float16))


@triton.jit
def columns_kernel(t, sums, highs, lows, heads, length, chunk,
                   stride_b, stride_h, stride_n, D: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """Per channel of `chunk` tokens: their sum, and (if not None) maximum and minimum."""
    chunks = tl.cdiv(length, chunk)
    head = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * chunk
    stop = tl.minimum(first + chunk, length)
    # In float64: unless their range is extreme, sums of 16-bit numbers are exact in it,
    # hence the same in any order.
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    high = tl.full([BLOCK_N, BLOCK_D], float("-inf"), tl.float32)
    low = tl.full([BLOCK_N, BLOCK_D], float("inf"), tl.float32)
    for row in tl.range(first, stop, BLOCK_N, num_stages=STAGES):
        x, inside = load_tile(t, head // heads, head % heads,
                              row + tl.arange(0, BLOCK_N), stop,
                              stride_b, stride_h, stride_n, D, BLOCK_D)  # fmt: skip
        total += x.to(tl.float64)
        if highs is not None:
            high = tl.maximum(high, tl.where(inside, x, float("-inf")))
            low = tl.minimum(low, tl.where(inside, x, float("inf")))
    place = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(sums + place, tl.sum(total, 0))
    if highs is not None:
        tl.store(highs + place, tl.max(high, 0))
        tl.store(lows + place, tl.min(low, 0))


@triton.jit
def combine_kernel(sums, highs, lows, mean, top, length, chunks,
                   BLOCK_D: tl.constexpr, COLS: tl.constexpr, CHUNKS: tl.constexpr,
                   SMOOTH: tl.constexpr):  # fmt: skip
    """From the chunks of COLS channels: the mean, and the largest |t − mean| (or |t|)."""
    parts: tl.constexpr = BLOCK_D // COLS
    head = tl.program_id(0) // parts
    d = tl.program_id(0) % parts * COLS + tl.arange(0, COLS)
    c = tl.arange(0, CHUNKS)[:, None]
    place = (head * chunks + c) * BLOCK_D + d[None, :]
    center = tl.zeros([COLS], tl.float32)
    if SMOOTH:
        total = tl.sum(tl.load(sums + place, mask=c < chunks, other=0.0), 0)
        center = (total / length).to(tl.float32)
        tl.store(mean + head * BLOCK_D + d, center)
    if top is not None:
        high = tl.max(tl.load(highs + place, mask=c < chunks, other=float("-inf")), 0)
        low = tl.min(tl.load(lows + place, mask=c < chunks, other=float("inf")), 0)
        largest = tl.maximum(tl.maximum(high - center, center - low), TINY)
        tl.store(top + head * BLOCK_D + d, largest)


class Columns(NamedTuple):
    """float32 [B, H, BLOCK_D] over the tokens: the mean, and the largest |t − mean|."""

    mean: torch.Tensor | None
    top: torch.Tensor | None


@by_layout
def columns_plans(t, smooth, ranged) -> tuple[Plan, Plan, int]:
    """The launches of `columns_kernel` and `combine_kernel` for a t of this layout, and the
    number of chunks between them."""
    batch, heads, length, dim = t.shape
    block_d = padded_dim(dim)
    block_n = 4096 // block_d
    # Long chunks keep loads in flight; there have to be enough to fill a GPU, and few enough
    # for one program to combine.
    chunks = min(triton.cdiv(length, 4 * block_n), triton.cdiv(1024, batch * heads), 64)
    chunk = triton.cdiv(triton.cdiv(length, chunks), block_n) * block_n
    chunks = triton.cdiv(length, chunk)
    parts = Plan(
        columns_kernel, batch * heads * chunks, heads, length, chunk, *t.strides[:3],
        D=dim, BLOCK_D=block_d, BLOCK_N=block_n, STAGES=3,
    )  # fmt: skip
    cols = 16
    whole = Plan(
        combine_kernel, batch * heads * block_d // cols, length, chunks,
        BLOCK_D=block_d, COLS=cols, CHUNKS=triton.next_power_of_2(chunks), SMOOTH=smooth,
    )  # fmt: skip
    return parts, whole, chunks


def columns(t: torch.Tensor, smooth: bool, ranged: bool) -> Columns:
    """The mean of t's tokens (if `smooth`) and their largest distance from it (if `ranged`).

    Exact, and so the same on every device, where float64 holds the sum exactly.
    """
    if not (smooth or ranged):
        return Columns(None, None)
    batch, heads, _, dim = t.shape
    block_d = padded_dim(dim)
    parts, whole, chunks = columns_plans(t, smooth, ranged)
    empty = _empty_like(t)
    sums = empty((batch * heads * chunks, block_d), torch.float64)
    highs = lows = top = mean = None
    if ranged:
        highs, lows = (empty(sums.shape, torch.float32) for _ in range(2))
        top = empty((batch, heads, block_d), torch.float32)
    if smooth:
        mean = empty((batch, heads, block_d), torch.float32)
    parts.launch(t, sums, highs, lows)
    whole.launch(sums, highs, lows, mean, top)
    return Columns(mean, top)


@by_layout
def int8_plan(t, mean, group) -> Plan:
    """The launch of `int8_kernel` for a t and a mean of these layouts."""
    batch, heads, length, dim = t.shape
    block_d = padded_dim(dim)
    padded = padded_length(length)
    block_n = max(group, min(PAD, 4096 // block_d))
    return Plan(
        int8_kernel, batch * heads * padded // block_n,
        heads, length, padded, padded // group, *t.strides[:3],
        D=dim, BLOCK_D=block_d, BLOCK_N=block_n, GROUP=group,
        enable_fp_fusion=False,  # the product is rounded before ROUNDER is added
        num_warps=max(4, block_n * block_d // 2048),  # 64 elements a thread
    )  # fmt: skip


def quantize_int8(
    t: torch.Tensor, group: int, mean: torch.Tensor | None = None, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [B, H, ⌈N⌉, BLOCK_D], float32 scales·factor [B, H, ⌈N⌉ / group]) of t − mean.

    group: tokens that share a scale, a power of two up to 128: 1 (per token), 32 or 64 (per
    warp or warp group of the attention kernel), 128 (per block). `factor` is for q: it takes
    the softmax's scale and log2 e along for free.
    """
    batch, heads, length, dim = t.shape
    padded = padded_length(length)
    empty = _empty_like(t)
    out = empty((batch, heads, padded, padded_dim(dim)), torch.int8)
    scales = empty((batch, heads, padded // group), torch.float32)
    plan = int8_plan(t, mean, group)
    plan.launch(t, mean, out, scales, factor)
    return out, scales


@by_layout
def values_plan(v, mean, top, fp8) -> Plan:
    """The launch of `values_kernel` for a v of this layout."""
    batch, heads, length, dim = v.shape
    block_d = padded_dim(dim)
    padded = padded_length(length)
    block_n = min(PAD, max(16, 16384 // block_d))
    return Plan(
        values_kernel, batch * heads * padded // block_n,
        heads, length, padded, *v.strides[:3],
        D=dim, BLOCK_D=block_d, BLOCK_N=block_n, FP8=fp8, NATIVE=not interpreting(),
        enable_fp_fusion=False,
    )  # fmt: skip


def quantize_values(
    v: torch.Tensor,
    limit: float,
    top: torch.Tensor,
    mean: torch.Tensor | None,
    fp8: bool,
) -> torch.Tensor:
    """(v − mean)·limit/top: FP8 E4M3 [B, H, BLOCK_D, ⌈N⌉] in TOKEN_ORDER, or float16 as v is.

    Multiply by top/limit to have v − mean back.
    """
    batch, heads, length, dim = v.shape
    padded, block_d = padded_length(length), padded_dim(dim)
    shape = (block_d, padded) if fp8 else (padded, block_d)
    dtype = torch.float8_e4m3fn if fp8 else torch.float16
    out = _empty_like(v)((batch, heads, *shape), dtype)
    plan = values_plan(v, mean, top, fp8)
    plan.launch(v, mean, top, out, limit)
    return out


def padded_length(length: int) -> int:
    return -(-length // PAD) * PAD


def padded_dim(dim: int) -> int:
    """8-bit matrix instructions take 32 channels at a time."""
    return max(32, 1 << (dim - 1).bit_length())


def _empty_like(t: torch.Tensor):
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=t.device)
