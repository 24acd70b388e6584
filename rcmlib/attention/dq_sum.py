"""The scratch in which Hopper's programs add up dq (hopper_backward.py), and its last pass.

dq_sum, float32: of each head and tile of queries SCRATCH numbers, two products [64, 64], each
in the order in which registers hold it.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rcmlib.core.epilogue import load_coefficient

SCRATCH = tl.constexpr(8192)


@triton.jit
def in_order_of_registers(rows, cols):
    """Where an element of a product [64, 64] lies: four registers of a thread are together, and
    so are a warp's threads. So an addition is of 16 bytes, and a warp's fill whole lines."""
    thread = rows // 16 * 32 + rows % 8 * 4 + cols % 8 // 2
    return cols // 8 * 512 + thread * 4 + rows // 8 % 2 * 2 + cols % 2


in_order = gluon.jit(in_order_of_registers.fn)


@gluon.jit
def add_to_dq(own, dq):
    """dq [64, 64] to the scratch at `own`. (gl.atomic_add would add 4 bytes at a time.)"""
    layout: gl.constexpr = dq.type.layout
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    own = (own + in_order(rows, cols)).to(gl.int64)
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};",
        "=r,=r,=r,=r,l,l,l,l,r,r,r,r", [own, dq.to(gl.int32, bitcast=True)],
        gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@triton.jit
def scale_kernel(dq_sum, dq, c_out, scale, heads, q_len, tiles, HOW: tl.constexpr):
    """dq [B, Nq, H, D] = c_out·scale·dq_sum, a tile of queries a program; or zeros for a factor
    of 0. HOW: the TeamVariant that filled dq_sum."""
    M: tl.constexpr = HOW.block_n
    D: tl.constexpr = HOW.head_dim
    pid = tl.program_id(0)
    head, tile = pid // tiles, pid % tiles
    sample = head // heads
    factor = load_coefficient(c_out, sample, HOW.per_sample) * scale
    rows, cols = tl.arange(0, M)[:, None], tl.arange(0, HOW.block_d)[None, :]
    part = rows // 64 + cols // 64  # one of them is 0
    own = dq_sum + tl.cast(pid, tl.int64) * SCRATCH + part * (SCRATCH // 2)
    found = tl.load(own + in_order_of_registers(rows % 64, cols % 64))
    found = tl.where(factor == 0.0, 0.0, found * factor)
    n = tile * M + rows
    to = (tl.cast(sample, tl.int64) * q_len + n) * heads * D + head % heads * D + cols
    tl.store(dq + to, found.to(dq.dtype.element_ty), mask=(n < q_len) & (cols < D))
