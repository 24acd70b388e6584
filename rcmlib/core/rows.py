"""Which queries a program owns, which keys they see, and how rows reach a kernel.

Used by every attention kernel: forward, backward and 8-bit.
"""

import triton
import triton.language as tl


@triton.jit
def own_rows(heads, q_len, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """(sample, head, first query) of this program.

    Neighbouring programs share a head, hence its keys and values in L2.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # longest rows first: no straggler ends the launch
    return pid // tiles // heads, pid // tiles % heads, tile * BLOCK_M


@triton.jit
def load_rows(src, b, h, row, length, stride_b, stride_h, stride_n,
              ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              TMA: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """Rows row … row + ROWS of head (b, h) as [ROWS, BLOCK_D], zeros outside the tensor.

    src is a tensor descriptor (TMA: the copy engine computes addresses and bounds) or a
    pointer. MASK says that rows may lie beyond `length`.
    """
    if TMA:
        return src.load([b, h, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        r = tl.arange(0, ROWS)[:, None].to(tl.int64)
        d = tl.arange(0, BLOCK_D)[None, :]
        head = tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
        tile = src + head + tl.cast(row, tl.int64) * stride_n + (r * stride_n + d)
        if MASK:
            return tl.load(tile, mask=(row + r < length) & (d < D), other=0.0)
        elif D < BLOCK_D:
            return tl.load(tile, mask=d < D, other=0.0)
        else:
            return tl.load(tile)


@triton.jit
def key_range(kv_len, first_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              CAUSAL: tl.constexpr):  # fmt: skip
    """(whole, stop): tiles in [0, whole) need no mask, those in [whole, stop) do.

    They hold the last keys, or the causal diagonal.
    """
    whole = kv_len // BLOCK_N * BLOCK_N
    stop = kv_len
    if CAUSAL:
        whole = tl.minimum(whole, first_row // BLOCK_N * BLOCK_N)
        stop = tl.minimum(stop, first_row + BLOCK_M)
    return whole, stop
