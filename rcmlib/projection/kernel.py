"""The output projection with the skip in its epilogue: out = c_skip·x + c_out·(a Wᵀ + bias).

a [B, N, K], weight [C, K] (as nn.Linear keeps it), bias [C]; x, out [B, N, C]. One program owns
BLOCK_M tokens of one sample and BLOCK_N channels, and walks over K in steps of BLOCK_K.
c_out is a number, [B], or a gate [B, C] or [B, N, C], which is a c_out for each channel.

    df = c_out·g,   da = df W,   dW = dfᵀ a,   dbias = Σ df,   dgate: ops/gate.py  (g = ∂L/∂out)

HBM: a, weight and x are read, out is written; f = a Wᵀ + bias exists only in registers. It is
written too where the backward pass needs it (for dc_out or dgate). Recomputing it would cost a
matrix product, and (out − c_skip·x)/c_out loses all digits as c_out → 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib.core import interpreting
from rcmlib.core.device import copy_engine, device_capability, dot_precision
from rcmlib.core.epilogue import kernel_coefficients, load_coefficient, skip_epilogue
from rcmlib.core.launch import Plan, box_of_rows, by_layout, descriptors_allowed
from rcmlib.projection.gate import load_gate, strides_of_gate


@triton.jit
def load_block(src, b, row, k, rows, depth, stride_b, stride_r,
               ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
               TMA: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """src[b, row : row + ROWS, k : k + BLOCK_K], with zeros beyond column `depth`.

    src is a tensor descriptor (TMA: the copy engine computes addresses and bounds) or a
    pointer. RAGGED says that columns may lie beyond `depth`. What stands in rows beyond
    `rows` does not matter: results of these rows are not stored.
    """
    if TMA:
        return src.load([b, 0, row, k]).reshape(ROWS, BLOCK_K)
    else:
        r = tl.minimum(row + tl.arange(0, ROWS), rows - 1)[:, None].to(tl.int64)
        c = k + tl.arange(0, BLOCK_K)[None, :]
        tile = src + tl.cast(b, tl.int64) * stride_b + (r * stride_r + c)
        if RAGGED:
            return tl.load(tile, mask=c < depth, other=0.0)
        else:
            return tl.load(tile)


@triton.jit
def load_x(x, b, first_row, first_col, rows, cols, stride_b, stride_n,
           ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    n = first_row + tl.arange(0, ROWS)[:, None]
    c = first_col + tl.arange(0, COLS)[None, :]
    row = x + tl.cast(b, tl.int64) * stride_b + n.to(tl.int64) * stride_n
    return tl.load(row + c, mask=(n < rows) & (c < cols))


@triton.jit
def columns(tile, PARTS: tl.constexpr):
    """A tile's columns in PARTS (1, 2 or 4) equal parts, from left to right. No data moves."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    if PARTS == 1:
        return (tile,)
    else:
        left, right = tile.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        if PARTS == 2:
            return (left, right)
        else:
            a, b = left.reshape(M, 2, N // 4).permute(0, 2, 1).split()
            c, d = right.reshape(M, 2, N // 4).permute(0, 2, 1).split()
            return (a, b, c, d)


@triton.jit
def finish(acc, xt, bias, out, f, c_skip, c_out, b, first_row, first_col, rows, cols,
           stride_gb, stride_gn, C_OUT_RANK: tl.constexpr):  # fmt: skip
    """The epilogue of a tile acc of a Wᵀ: adds the bias, applies the skip, stores it."""
    n = first_row + tl.arange(0, acc.shape[0])[:, None]
    c = first_col + tl.arange(0, acc.shape[1])[None, :]
    inside = (n < rows) & (c < cols)
    n64 = n.to(tl.int64)  # offsets pass 2³¹ in large tensors
    row = (tl.cast(b, tl.int64) * rows + n64) * cols
    if bias is not None:
        acc += tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)
    if f is not None:
        tl.store(f + row + c, acc.to(f.dtype.element_ty), mask=inside)
    if C_OUT_RANK >= 2:
        c_out = load_gate(c_out, b, n64, c, inside if C_OUT_RANK == 3 else c < cols,
                          stride_gb, stride_gn, C_OUT_RANK == 3)  # fmt: skip
    result = skip_epilogue(xt.to(tl.float32), acc, c_skip, c_out)
    tl.store(out + row + c, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project_tile(pid, a, weight, bias, x, out, f, c_skip, c_out,
                 batch, rows, cols, depth,
                 stride_ab, stride_an, stride_wc, stride_xb, stride_xn,
                 stride_gb, stride_gn,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 GROUP: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
                 RAGGED: tl.constexpr, C_OUT_RANK: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Tile number pid of out, from the first product to the store."""
    # GROUP row tiles go through all columns together: the programs that run at one time
    # share few rows of a and few of weight, and find them in L2.
    tiles = tl.cdiv(rows, BLOCK_M)
    in_group = GROUP * tl.cdiv(cols, BLOCK_N)
    group = pid // in_group * GROUP
    height = tl.minimum(batch * tiles - group, GROUP)
    row_tile = group + pid % in_group % height
    b = row_tile // tiles
    first_row = row_tile % tiles * BLOCK_M
    first_col = pid % in_group // height * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, depth, BLOCK_K):
        at = load_block(a, b, first_row, k, rows, depth, stride_ab, stride_an,
                        BLOCK_M, BLOCK_K, TMA, RAGGED)  # fmt: skip
        wt = load_block(weight, 0, first_col, k, cols, depth, 0, stride_wc,
                        BLOCK_N, BLOCK_K, TMA, RAGGED)  # fmt: skip
        acc = tl.dot(at, wt.T, acc, input_precision=PRECISION)

    c_skip = load_coefficient(c_skip, b, C_OUT_RANK == 1)
    if C_OUT_RANK <= 1:
        c_out = load_coefficient(c_out, b, C_OUT_RANK == 1)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    xt = load_x(x, b, first_row, first_col, rows, cols, stride_xb, stride_xn,
                BLOCK_M, WIDTH)  # fmt: skip
    parts = columns(acc, PARTS)
    for i in tl.static_range(PARTS):
        col = first_col + i * WIDTH
        here = xt
        # The next part of x is fetched while this one is finished, unless a row of gates
        # already takes the registers for it.
        if i > 0 and C_OUT_RANK == 2:
            here = load_x(x, b, first_row, col, rows, cols, stride_xb, stride_xn,
                          BLOCK_M, WIDTH)  # fmt: skip
        elif i + 1 < PARTS and C_OUT_RANK != 2:
            xt = load_x(x, b, first_row, col + WIDTH, rows, cols, stride_xb, stride_xn,
                        BLOCK_M, WIDTH)  # fmt: skip
        finish(parts[i], here, bias, out, f, c_skip, c_out, b, first_row, col, rows, cols,
               stride_gb, stride_gn, C_OUT_RANK)  # fmt: skip


@triton.jit
def projection_kernel(a, weight, bias, x, out, f, c_skip, c_out,
                      batch, rows, cols, depth,
                      stride_ab, stride_an, stride_wc, stride_xb, stride_xn,
                      stride_gb, stride_gn,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
                      PERSISTENT: tl.constexpr, TMA: tl.constexpr, RAGGED: tl.constexpr,
                      C_OUT_RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program computes one tile of out; PERSISTENT, one an SM, it goes on to the next.

    Then the loops over tiles and over K are one (flatten), so that the copy engine fetches
    the next tile's first blocks while this one's epilogue runs.
    """
    if PERSISTENT:
        tiles = batch * tl.cdiv(rows, BLOCK_M) * tl.cdiv(cols, BLOCK_N)
        for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            project_tile(pid, a, weight, bias, x, out, f, c_skip, c_out,
                         batch, rows, cols, depth,
                         stride_ab, stride_an, stride_wc, stride_xb, stride_xn,
                         stride_gb, stride_gn, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS,
                         TMA, RAGGED, C_OUT_RANK, PRECISION)  # fmt: skip
    else:
        project_tile(tl.program_id(0), a, weight, bias, x, out, f, c_skip, c_out,
                     batch, rows, cols, depth,
                     stride_ab, stride_an, stride_wc, stride_xb, stride_xn,
                     stride_gb, stride_gn, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS,
                     TMA, RAGGED, C_OUT_RANK, PRECISION)  # fmt: skip


class Tile(NamedTuple):
    """How much of the problem one program holds, and with how many warps and buffers."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1  # the epilogue works on 1, 2 or 4 parts of block_n: fewer registers
    persistent: bool = False  # one program an SM, which computes tile after tile
    group: int = 8  # row tiles that share the columns' weights in L2


def choose_tile(
    rows: int,
    cols: int,
    depth: int,
    gated: bool,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> Tile:
    """The tile for a [rows, depth] × [depth, cols] product on a GPU of this architecture.

    gated: c_out is a tile, which wants registers.

    Every line compiles without spills (tests/test_compilation.py); sm_90's were measured
    (chapter 8). float32 uses the ordinary FMA units, for IEEE products, and keeps its
    operands in registers. Where rows of memory do not start at multiples of 16 numbers, each
    number is a load with an address of its own, and the tile is small.
    """
    if interpreting():  # it pays by the step, not by the number
        return Tile(128, 128, 128, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return Tile(64, 64, 16, num_warps=8, num_stages=2)
    if cols % 16 or depth % 16:
        return Tile(64, 64, 32, num_warps=8, num_stages=3)
    if copy_engine(dtype, capability):
        # Large tiles read less. But with fewer than two of them an SM, some SMs idle: then
        # smaller ones, and if the product is short, three on an SM, one of which
        # multiplies while another ends.
        if rows * cols < 2 * 132 * 128 * 256:
            if depth < 2048:
                parts = 2 if gated else 1  # at most 168 registers, or only two fit
                return Tile(64, 128, 64, num_warps=4, num_stages=3, parts=parts)
            return Tile(
                128, 128, 64, num_warps=8, num_stages=4, parts=4, persistent=True
            )
        return Tile(128, 256, 64, num_warps=8, num_stages=3, parts=4, persistent=True)
    return Tile(128, 128, 32, num_warps=8, num_stages=3, parts=4)


@by_layout
def projection_plan(a, weight, bias, x, c_skip, c_out, save_f) -> Plan:
    """The launch of `projection_kernel` for these layouts."""
    batch, rows, depth = a.shape
    cols = weight.shape[0]
    rank = 0 if c_out is None else len(c_out.shape)
    capability = device_capability(a.device)
    tile = choose_tile(batch * rows, cols, depth, rank > 1, a.dtype, capability)
    a4 = a._replace(
        shape=(batch, 1, rows, depth), strides=(a.strides[0], 0, *a.strides[1:])
    )
    w4 = weight._replace(shape=(1, 1, cols, depth), strides=(0, 0, *weight.strides))
    boxes = ()
    tma = copy_engine(a.dtype, capability) and descriptors_allowed(a4, w4)
    if tma:
        boxes = (
            box_of_rows(a4, tile.block_m, tile.block_k),
            box_of_rows(w4, tile.block_n, tile.block_k),
        )
    tiles = batch * triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    if tile.persistent and a.device.type == "cuda":
        sms = torch.cuda.get_device_properties(a.device).multi_processor_count
        tiles = min(tiles, sms)
    return Plan(
        projection_kernel, tiles, batch, rows, cols, depth,
        *a.strides[:2], weight.strides[0], *x.strides[:2],
        *(strides_of_gate(c_out) if rank > 1 else (0, 0)),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        GROUP=tile.group, PARTS=tile.parts, PERSISTENT=tile.persistent, TMA=tma,
        RAGGED=depth % tile.block_k != 0, C_OUT_RANK=rank,
        PRECISION=dot_precision(a.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, boxes=boxes,
    )  # fmt: skip


def projection_forward(
    a, weight, bias, x, c_skip, c_out, save_f, plan: Plan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches `projection_kernel` on checked inputs (see `rcmlib.rcm_projection`).

    c_skip, c_out: two numbers or two [B]; or the number 1 and a gate [B, C] or [B, N, C].
    Returns (out, f); f, in a's dtype, is empty unless `save_f`.
    plan: `projection_plan`'s for these arguments, if it is known already; c_skip and c_out
    are then as the kernel takes them.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    f = torch.empty(x.shape if save_f else (0,), dtype=a.dtype, device=a.device)
    if plan is None:
        if isinstance(c_out, float) or c_out.ndim < 2:
            c_skip, c_out, _ = kernel_coefficients(c_skip, c_out)
        else:
            c_skip, _, _ = kernel_coefficients(c_skip, c_skip)
        plan = projection_plan(a, weight, bias, x, c_skip, c_out, save_f)
    plan.launch(a, weight, bias, x, out, f if save_f else None, c_skip, c_out)
    return out, f
