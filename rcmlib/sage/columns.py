"""What a column, all tokens of one channel, tells a quantiser: its mean and its largest number.

t [B, H, N, D], any strides with a contiguous last dimension -> float32 [B, H, BLOCK_D].

A few large tokens move the mean away from all others: subtracted, it would make those large,
and their errors too. So where it makes a sample of the tokens larger, 0 takes its place.

HBM: t is read once, by programs that each own a chunk of a head's tokens; a second launch
combines what they found, and reads the sample.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib.core import launch

TINY = tl.constexpr(2.0**-110)  # a smaller maximum would overflow limit / maximum
SAMPLE = tl.constexpr(128)  # tokens, one in each of as many stretches of equal length,
PRIME = tl.constexpr(40507)  # at changing places: a video's columns come back at equal ones
# The mean is not used where Σ√|t − mean| > WORSE·Σ√|t|: a root, so that few say little.
WORSE = tl.constexpr(1.12)


@triton.jit
def load_tile(t, b, h, rows, length, strides, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows of head (b, h) as float32 [rows, BLOCK_D], which of them exist)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < length)[:, None] & (d < D)
    # In 64 bits: offsets pass 2³¹ in large tensors.
    head = tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    tile = t + head + rows[:, None].to(tl.int64) * strides[2] + d
    return tl.load(tile, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def columns_kernel(t, sums, highs, lows, heads, length, chunk, strides, D: tl.constexpr,
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
        rows = row + tl.arange(0, BLOCK_N)
        x, inside = load_tile(t, head // heads, head % heads, rows, stop, strides, D, BLOCK_D)
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
def combine_kernel(t, sums, highs, lows, mean, top, heads, length, chunks, strides,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, COLS: tl.constexpr,
                   CHUNKS: tl.constexpr, SMOOTH: tl.constexpr):  # fmt: skip
    """From the chunks of COLS channels: the mean, and the largest |t − mean| (or |t|), which
    is NaN where a number is not finite."""
    parts: tl.constexpr = BLOCK_D // COLS
    head = tl.program_id(0) // parts
    d = tl.program_id(0) % parts * COLS + tl.arange(0, COLS)
    c = tl.arange(0, CHUNKS)[:, None]
    place = (head * chunks + c) * BLOCK_D + d[None, :]
    center = tl.zeros([COLS], tl.float32)
    total = tl.sum(tl.load(sums + place, mask=c < chunks, other=0.0), 0)
    if SMOOTH:
        center = (total / length).to(tl.float32)
        i, stretch = tl.arange(0, SAMPLE)[:, None], tl.cdiv(length, SAMPLE)
        rows = i * stretch + i * PRIME % stretch
        inside = (rows < length) & (d < D)[None, :]
        t += tl.cast(head // heads, tl.int64) * strides[0]
        t += tl.cast(head % heads, tl.int64) * strides[1]
        some = tl.load(t + rows.to(tl.int64) * strides[2] + d[None, :], mask=inside, other=0.0)
        some = some.to(tl.float64)
        moved = tl.where(inside, tl.abs(some - center.to(tl.float64)[None, :]), 0.0)
        worse = tl.sum(tl.sqrt(moved), 0) > tl.sum(tl.sqrt(tl.abs(some)), 0) * WORSE
        center = tl.where(worse, 0.0, center)
        tl.store(mean + head * BLOCK_D + d, center)
    if top is not None:
        high = tl.max(tl.load(highs + place, mask=c < chunks, other=float("-inf")), 0)
        low = tl.min(tl.load(lows + place, mask=c < chunks, other=float("inf")), 0)
        largest = tl.maximum(tl.maximum(high - center, center - low), TINY)
        largest = tl.where(tl.abs(total) < float("inf"), largest, float("nan"))
        tl.store(top + head * BLOCK_D + d, largest)


class ColumnStatistics(NamedTuple):
    """float32 [B, H, BLOCK_D] over the tokens: the mean (or 0), and the largest |t − mean|."""

    mean: torch.Tensor | None
    top: torch.Tensor | None


def columns_plans(t: torch.Tensor, smooth: bool) -> tuple[launch.Plan, launch.Plan, int]:
    """The launches of `columns_kernel` and `combine_kernel` for a t like this, and the
    number of chunks between them."""
    batch, heads, length, dim = t.shape
    block_d = padded_dim(dim)
    block_n = 4096 // block_d
    # Long chunks keep loads in flight; there have to be enough to fill a GPU, and few enough
    # for one program to combine.
    chunks = min(triton.cdiv(length, 4 * block_n), triton.cdiv(1024, batch * heads), 64)
    chunk = triton.cdiv(triton.cdiv(length, chunks), block_n) * block_n
    chunks = triton.cdiv(length, chunk)
    parts = launch.Plan(
        columns_kernel, batch * heads * chunks, heads, length, chunk, t.stride()[:3],
        D=dim, BLOCK_D=block_d, BLOCK_N=block_n, STAGES=3,
    )  # fmt: skip
    cols = 16
    whole = launch.Plan(
        combine_kernel, batch * heads * block_d // cols,
        heads, length, chunks, t.stride()[:3],
        D=dim, BLOCK_D=block_d, COLS=cols, CHUNKS=triton.next_power_of_2(chunks), SMOOTH=smooth,
    )  # fmt: skip
    return parts, whole, chunks


def column_statistics(t: torch.Tensor, smooth: bool, ranged: bool) -> ColumnStatistics:
    """The mean of t's tokens (if `smooth`) and their largest distance from it (if `ranged`):
    exact, so the same on every device, where float64 holds the sum exactly."""
    if not (smooth or ranged):
        return ColumnStatistics(None, None)
    batch, heads, _, dim = t.shape
    block_d = padded_dim(dim)
    key = launch.key_of("columns", (t,), smooth, ranged)
    parts, whole, chunks = launch.planned(key, lambda: columns_plans(t, smooth))
    sums = launch.result(t, (batch * heads * chunks, block_d), torch.float64)
    highs = lows = top = mean = None
    if ranged:
        highs, lows = (launch.result(t, sums.shape, torch.float32) for _ in range(2))
        top = launch.result(t, (batch, heads, block_d), torch.float32)
    if smooth:
        mean = launch.result(t, (batch, heads, block_d), torch.float32)
    parts.launch(t, sums, highs, lows)
    whole.launch(t, sums, highs, lows, mean, top)
    return ColumnStatistics(mean, top)


def padded_dim(dim: int) -> int:
    """8-bit matrix instructions take 32 channels at a time."""
    return max(32, 1 << (dim - 1).bit_length())
