"""Which queries a program of an attention kernel owns, which keys they see, and how rows reach
it; the 8-bit kernel loads its rows itself."""

from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """The rows of a tensor [B, H, N, D]."""

    source: tl.tensor  # its pointer, or its descriptor
    strides: tl.tuple  # between samples, heads and rows
    length: tl.tensor  # N


class Place(NamedTuple):
    """A block of rows: its sample, its head, its first row."""

    sample: tl.tensor
    head: tl.tensor
    row: tl.tensor


@triton.jit
def own_rows(heads, q_len, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """The Place of this program's queries. Neighbours share a head: its k and v stay in L2."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # longest rows first: no straggler ends the launch
    return Place(pid // tiles // heads, pid // tiles % heads, tile * BLOCK_M)


@triton.jit
def load_rows(rows, at, row, COUNT: tl.constexpr, HOW: tl.constexpr, MASK: tl.constexpr):
    """Rows row … row + COUNT of a head as [COUNT, block_d], zeros outside the tensor.

    HOW: a `launch.Variant`; with its tma the copy engine computes addresses and bounds.
    MASK says that rows may lie beyond the tensor's last.
    """
    BLOCK_D: tl.constexpr = HOW.block_d
    if HOW.tma:
        tile = rows.source.load([at.sample, at.head, row, 0])
        return tile.reshape(COUNT, BLOCK_D)
    else:
        r = tl.arange(0, COUNT)[:, None].to(tl.int64)
        d = tl.arange(0, BLOCK_D)[None, :]
        stride_b, stride_h, stride_n = rows.strides
        head = tl.cast(at.sample, tl.int64) * stride_b + tl.cast(at.head, tl.int64) * stride_h
        tile = rows.source + head + tl.cast(row, tl.int64) * stride_n
        tile += r * stride_n + d
        if MASK:
            inside = (row + r < rows.length) & (d < HOW.head_dim)
            return tl.load(tile, mask=inside, other=0.0)
        elif HOW.head_dim < BLOCK_D:
            return tl.load(tile, mask=d < HOW.head_dim, other=0.0)
        else:
            return tl.load(tile)


@triton.jit
def key_range(kv_len, first_row, ROWS: tl.constexpr, HOW: tl.constexpr):
    """(whole, stop): tiles in [0, whole) need no mask. Those in [whole, stop) do: they hold the
    last keys, or the causal diagonal of ROWS queries."""
    whole = kv_len // HOW.block_n * HOW.block_n
    stop = kv_len
    if HOW.causal:
        whole = tl.minimum(whole, first_row // HOW.block_n * HOW.block_n)
        stop = tl.minimum(stop, first_row + ROWS)
    return whole, stop


@triton.jit
def mask_scores(s, j, first_row, kv_len, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr):
    """s of rows first_row … and keys j …, scores or weights, with HIDDEN where none is seen."""
    cols = j + tl.arange(0, s.shape[1])[None, :]
    visible = cols < kv_len
    if CAUSAL:
        visible &= cols <= first_row + tl.arange(0, s.shape[0])[:, None]
    return tl.where(visible, s, HIDDEN)
