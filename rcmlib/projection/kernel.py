"""The output projection with the skip in its epilogue: out = c_skip·x + c_out·(a Wᵀ + bias).

a [B, N, K], weight [C, K] (as nn.Linear keeps it), bias [C]; x, out [B, N, C]. One program owns
block_m tokens of one sample and block_n channels, and walks over K in steps of block_k.
c_out is a number, [B], or a gate [B, C] or [B, N, C], which is a c_out for each channel.

    df = c_out·g,   da = df W,   dW = dfᵀ a,   dbias = Σ df,   dgate: gate.py  (g = ∂L/∂out)

HBM: a, weight and x are read, out is written; f = a Wᵀ + bias exists only in registers. It is
written too where the backward pass needs it (for dc_out or dgate). Recomputing it would cost a
matrix product, and (out − c_skip·x)/c_out loses all digits as c_out → 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib import core
from rcmlib.core import launch
from rcmlib.core.epilogue import load_coefficient, skip_epilogue
from rcmlib.projection.gate import gate_strides, load_gate


@dataclass(frozen=True)
class ProjectionTile:
    """How much of the problem one program holds, and with how many warps and buffers."""

    block_m: int  # tokens
    block_n: int  # channels
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1  # the epilogue works on 1, 2 or 4 parts of block_n: fewer registers
    persistent: bool = False  # one program an SM, which computes tile after tile
    group: int = 8  # row tiles that share the columns' weights in L2


@dataclass(frozen=True, kw_only=True)
class ProjectionVariant(ProjectionTile):
    """How `projection_kernel` is compiled: its constants, as one argument."""

    tma: bool  # the copy engine reads a and weight
    ragged: bool  # the last step over K is not full
    c_out_rank: int  # 0: numbers, 1: [B], 2 and 3: a gate [B, C] or [B, N, C]
    precision: str


class Problem(NamedTuple):
    """What all tiles share: the tensors and sizes of the docstring above."""

    a: tl.tensor  # a pointer or a descriptor; so weight
    weight: tl.tensor
    bias: tl.tensor
    x: tl.tensor
    out: tl.tensor
    f: tl.tensor
    c_skip: tl.tensor
    c_out: tl.tensor
    batch: tl.tensor
    rows: tl.tensor
    cols: tl.tensor
    depth: tl.tensor
    strides: tl.tuple  # of a, weight (as [1, C, K]), x and gate: samples, rows


@triton.jit
def load_block(src, b, row, k, rows, depth, strides, ROWS: tl.constexpr,
               HOW: tl.constexpr):  # fmt: skip
    """src[b, row : row + ROWS, k : k + block_k], with zeros beyond column `depth`.

    HOW.ragged says that columns may lie beyond it. What stands in rows beyond `rows` does not
    matter: results of these rows are not stored.
    """
    K: tl.constexpr = HOW.block_k
    if HOW.tma:
        return src.load([b, 0, row, k]).reshape(ROWS, K)
    else:
        r = tl.minimum(row + tl.arange(0, ROWS), rows - 1)[:, None].to(tl.int64)
        c = k + tl.arange(0, K)[None, :]
        tile = src + tl.cast(b, tl.int64) * strides[0] + (r * strides[1] + c)
        if HOW.ragged:
            return tl.load(tile, mask=c < depth, other=0.0)
        else:
            return tl.load(tile)


@triton.jit
def load_x(on, b, first_row, first_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    n = first_row + tl.arange(0, ROWS)[:, None]
    c = first_col + tl.arange(0, COLS)[None, :]
    stride_b, stride_n = on.strides[2]
    row = on.x + tl.cast(b, tl.int64) * stride_b + n.to(tl.int64) * stride_n
    return tl.load(row + c, mask=(n < on.rows) & (c < on.cols))


@triton.jit
def split_columns(tile, PARTS: tl.constexpr):
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
def finish_tile(acc, xt, on, c_skip, c_out, b, first_row, first_col, HOW: tl.constexpr):
    """The epilogue of a tile acc of a Wᵀ: adds the bias, applies the skip, stores it."""
    n = first_row + tl.arange(0, acc.shape[0])[:, None]
    c = first_col + tl.arange(0, acc.shape[1])[None, :]
    inside = (n < on.rows) & (c < on.cols)
    n64 = n.to(tl.int64)  # offsets pass 2³¹ in large tensors
    row = (tl.cast(b, tl.int64) * on.rows + n64) * on.cols
    if on.bias is not None:
        acc += tl.load(on.bias + c, mask=c < on.cols, other=0.0).to(tl.float32)
    if on.f is not None:
        tl.store(on.f + row + c, acc.to(on.f.dtype.element_ty), mask=inside)
    if HOW.c_out_rank >= 2:
        c_out = load_gate(c_out, b, n64, c, inside if HOW.c_out_rank == 3 else c < on.cols,
                          on.strides[3], HOW.c_out_rank == 3)  # fmt: skip
    result = skip_epilogue(xt.to(tl.float32), acc, c_skip, c_out)
    tl.store(on.out + row + c, result.to(on.out.dtype.element_ty), mask=inside)


@triton.jit
def project_tile(pid, on, HOW: tl.constexpr):
    """Tile number pid of out, from the first product to the store."""
    M: tl.constexpr = HOW.block_m
    N: tl.constexpr = HOW.block_n
    # HOW.group row tiles go through all columns together: the programs that run at one time
    # share few rows of a and few of weight, and find them in L2.
    tiles = tl.cdiv(on.rows, M)
    in_group = HOW.group * tl.cdiv(on.cols, N)
    group = pid // in_group * HOW.group
    height = tl.minimum(on.batch * tiles - group, HOW.group)
    row_tile = group + pid % in_group % height
    b = row_tile // tiles
    first_row = row_tile % tiles * M
    first_col = pid % in_group // height * N
    acc = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, on.depth, HOW.block_k):
        at = load_block(on.a, b, first_row, k, on.rows, on.depth, on.strides[0], M,
                        HOW)  # fmt: skip
        wt = load_block(on.weight, 0, first_col, k, on.cols, on.depth, on.strides[1], N,
                        HOW)  # fmt: skip
        acc = tl.dot(at, wt.T, acc, input_precision=HOW.precision)  # [M, N]

    c_skip = load_coefficient(on.c_skip, b, HOW.c_out_rank == 1)
    c_out = on.c_out
    if HOW.c_out_rank <= 1:
        c_out = load_coefficient(c_out, b, HOW.c_out_rank == 1)
    PARTS: tl.constexpr = HOW.parts
    WIDTH: tl.constexpr = N // PARTS
    xt = load_x(on, b, first_row, first_col, M, WIDTH)
    parts = split_columns(acc, PARTS)
    for i in tl.static_range(PARTS):
        col = first_col + i * WIDTH
        here = xt
        # The next part of x is fetched while this one is finished, unless a row of gates
        # already takes the registers for it.
        if i > 0 and HOW.c_out_rank == 2:
            here = load_x(on, b, first_row, col, M, WIDTH)
        elif i + 1 < PARTS and HOW.c_out_rank != 2:
            xt = load_x(on, b, first_row, col + WIDTH, M, WIDTH)
        finish_tile(parts[i], here, on, c_skip, c_out, b, first_row, col, HOW)


@triton.jit
def projection_kernel(a, weight, bias, x, out, f, c_skip, c_out,
                      batch, rows, cols, depth, strides, HOW: tl.constexpr):  # fmt: skip
    """One program computes one tile of out; HOW.persistent, one an SM, goes on to the next.

    Then the loops over tiles and over K are one (flatten), so that the copy engine fetches
    the next tile's first blocks while this one's epilogue runs.
    """
    on = Problem(a, weight, bias, x, out, f, c_skip, c_out, batch, rows, cols, depth,
                 strides)  # fmt: skip
    if HOW.persistent:
        tiles = batch * tl.cdiv(rows, HOW.block_m) * tl.cdiv(cols, HOW.block_n)
        for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            project_tile(pid, on, HOW)
    else:
        project_tile(tl.program_id(0), on, HOW)


def choose_projection_tile(
    rows: int, cols: int, depth: int, gated: bool, dtype: torch.dtype,
    capability: tuple[int, int],
) -> ProjectionTile:  # fmt: skip
    """The tile for a [rows, depth] × [depth, cols] product on a GPU of this architecture.

    gated: c_out is a tile, which wants registers. Every line compiles without spills
    (tests/test_compilation.py); sm_90's were measured (chapter 9). float32 uses the ordinary
    FMA units, for IEEE products, and keeps its operands in registers. Where rows of memory do
    not start at multiples of 16 numbers, each number is a load with an address of its own, and
    the tile is small.
    """
    if core.interpreting():  # it pays by the step, not by the number
        return ProjectionTile(128, 128, 128, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return ProjectionTile(64, 64, 16, num_warps=8, num_stages=2)
    if cols % 16 or depth % 16:
        return ProjectionTile(64, 64, 32, num_warps=8, num_stages=3)
    if core.copy_engine(dtype, capability):
        # Large tiles read less. But with fewer than two of them an SM, some SMs idle: then
        # smaller ones, and if the product is short, three on an SM, one of which
        # multiplies while another ends.
        few = rows * cols < 2 * 132 * 128 * 256
        if few and depth < 2048:
            parts = 2 if gated else 1  # at most 168 registers, or only two fit
            return ProjectionTile(64, 128, 64, num_warps=4, num_stages=3, parts=parts)
        n, stages = (128, 4) if few else (256, 3)
        return ProjectionTile(128, n, 64, 8, num_stages=stages, parts=4, persistent=True)
    return ProjectionTile(128, 128, 32, num_warps=8, num_stages=3, parts=4)


def projection_plan(a, weight, x, gate: torch.Tensor | None, per_sample: bool) -> launch.Plan:
    """The launch of `projection_kernel` for tensors like these."""
    batch, rows, depth = a.shape
    cols = weight.shape[0]
    rank = int(per_sample) if gate is None else gate.ndim
    capability = core.device_capability(a.device)
    tile = choose_projection_tile(batch * rows, cols, depth, rank > 1, a.dtype, capability)
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    sources = a[:, None], weight[None, None]
    tma = core.copy_engine(a.dtype, capability) and launch.descriptors_allowed(*sources)
    tiles = batch * triton.cdiv(rows, m) * triton.cdiv(cols, n)
    if tile.persistent:
        tiles = min(tiles, core.multiprocessors(a.device) or tiles)
    how = ProjectionVariant(
        **vars(tile), tma=tma, ragged=depth % k != 0, c_out_rank=rank,
        precision=core.dot_precision(a.dtype),
    )  # fmt: skip
    strides = (
        a.stride()[:2], (0, weight.stride(0)), x.stride()[:2],
        (0, 0) if gate is None else gate_strides(gate),
    )  # fmt: skip
    boxes = launch.boxes_of_rows(sources, (m, n), k) if tma else ()
    sizes = (batch, rows, cols, depth)
    return launch.Plan(projection_kernel, tiles, *sizes, strides, HOW=how, boxes=boxes)


def projection_forward(
    a, weight, bias, x, c_skip, c_out, save_f, plan: launch.Plan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches `projection_kernel` on checked inputs (see `rcmlib.rcm_projection`).

    c_skip, c_out: two floats or two [B]; or 1.0 and a gate [B, C] or [B, N, C]. plan: the one
    of these arguments, if it is known.
    Returns (out, f); f, in a's dtype, is empty unless `save_f`.
    """
    out = launch.result(x, x.shape)
    f = launch.result(a, x.shape, wanted=save_f)
    if plan is None:
        per_sample = isinstance(c_out, torch.Tensor)
        gate = c_out if per_sample and c_out.ndim > 1 else None
        kind = "rcm_projection" if gate is None else "gated_projection"
        key = launch.key_of(kind, (a, weight, bias, x, c_skip, c_out), save_f)
        plan = launch.planned(key, lambda: projection_plan(a, weight, x, gate, per_sample))
    plan.launch(a, weight, bias, x, out, f if save_f else None, c_skip, c_out)
    return out, f
