"""The gradients of attention on Hopper, in Gluon: `backward.py`'s sums with five products.

    Sᵀ = k qᵀ,  dPᵀ = v gᵀ,  dv += Pᵀ g,  dk += dSᵀ q,  dq += dS k

A program owns 128 keys, two groups of four warps 64 each; a producer warp copies tiles of q
and g into a ring. P and dS of a group's keys are in registers what its sums dv and dk take as
their left operand. dq of a tile of queries is a sum over all programs: dS goes through shared
memory, each group multiplies it with k for half of the channels (D = 128), or the two take
turns (D = 64), and adds its part to a float32 tensor in global memory. Who adds first is not
decided: two runs may differ in the last bit.

q [B, H, Nq, D]; k, v [B, H, Nkv, D]; g [B, H, Nq, D] as a view of [B, Nq, H·D]; 16 bits.
dq_sum [B, Nq, H, D] float32, zeros before; dk, dv [B, Nkv, H, D]. Shah et al. 2024.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hw
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from rcmlib.attention.hopper import in_registers, load_coefficient
from rcmlib.attention.ring import ROWS, SMEM, barriers, matrix
from rcmlib.attention.tiles import LOG2_E
from rcmlib.core import launch


class Ring(NamedTuple):
    k: SMEM  # [2, 1, 1, 64, block_d], a group's keys each; so v
    v: SMEM
    q: SMEM  # [stages, 1, 1, block_m, block_d]; so g
    g: SMEM
    lse: SMEM  # [stages, block_m] float32; so delta
    delta: SMEM
    ds: SMEM  # [4, 64, block_m]: of two iterations, of two groups
    keys_full: SMEM
    q_full: SMEM
    q_free: SMEM
    g_full: SMEM
    g_free: SMEM
    ds_full: SMEM  # of two iterations


class Task(NamedTuple):
    sample: gl.tensor
    head: gl.tensor
    row: gl.tensor  # the first key
    start: gl.tensor  # tiles of queries: from here
    masked: gl.tensor  # … to here with a mask
    tiles: gl.tensor  # … and to here without
    q_len: gl.tensor
    kv_len: gl.tensor
    heads: gl.tensor


class Saved(NamedTuple):
    lse: gl.tensor  # of this head, as delta
    delta: gl.tensor
    dq: gl.tensor


@gluon.jit
def copy(source, task, row, full, to):
    tma.async_copy_global_to_shared(source, [task.sample, task.head, row, 0], full, to)


@gluon.jit
def produce(q, k, v, g, ring, saved, task, HOW: gl.constexpr):
    M: gl.constexpr = HOW.block_n
    BYTES: gl.constexpr = 2 * M * HOW.block_d
    mbarrier.expect(ring.keys_full.index(0), 8 * ROWS * HOW.block_d)
    for w in gl.static_range(2):
        copy(k, task, task.row + ROWS * w, ring.keys_full.index(0), ring.k.index(w))
        copy(v, task, task.row + ROWS * w, ring.keys_full.index(0), ring.v.index(w))
    for i in range(task.start, task.tiles):
        turn = i - task.start
        at, free = turn % HOW.stages, ((turn // HOW.stages) & 1) ^ 1
        mbarrier.wait(ring.q_free.index(at), free)
        mbarrier.expect(ring.q_full.index(at), BYTES)
        copy(q, task, i * M, ring.q_full.index(at), ring.q.index(at))
        rows = i * M + gl.arange(0, M, gl.BlockedLayout([1], [32], [1], [0]))
        inside = rows < task.q_len  # beyond: lse = ∞ makes P = 0, and so nothing is added
        ring.lse.index(at).store(gl.load(saved.lse + rows, mask=inside, other=float("inf")))
        ring.delta.index(at).store(gl.load(saved.delta + rows, mask=inside, other=0.0))
        mbarrier.arrive(ring.q_full.index(at))
        mbarrier.wait(ring.g_free.index(at), free)
        mbarrier.expect(ring.g_full.index(at), BYTES)
        copy(g, task, i * M, ring.g_full.index(at), ring.g.index(at))


@gluon.jit
def add_to_dq(G: gl.constexpr, ring, saved, task, i, turn, HOW: gl.constexpr):
    """This group's part of dS k for the i-th tile of queries."""
    M: gl.constexpr = HOW.block_n
    D: gl.constexpr = HOW.head_dim
    COLS: gl.constexpr = 64
    HALVES: gl.constexpr = HOW.block_d == 128
    layout: gl.constexpr = in_registers(COLS)
    dq = gl.zeros([M, COLS], gl.float32, layout)
    for w in gl.static_range(2):
        ds = ring.ds.index(2 * (turn & 1) + w).permute((1, 0))  # [M, 64 keys]
        kt = matrix(ring.k.index(w))
        if HALVES:
            kt = kt.slice(COLS * G, COLS, dim=1)
        dq = hw.warpgroup_mma(ds, kt, dq, is_async=True)
    dq = hw.warpgroup_mma_wait(0, [dq])
    rows = gl.arange(0, M, gl.SliceLayout(1, layout))[:, None]
    d = gl.arange(0, COLS, gl.SliceLayout(0, layout))[None, :]
    first = task.sample.to(gl.int64) * task.q_len + i * M
    own = saved.dq + (first * task.heads + task.head) * D + (COLS * G if HALVES else 0)
    inside = (rows < task.q_len - i * M) & (d < D - (COLS * G if HALVES else 0))
    gl.atomic_add(own + rows * (task.heads * D) + d, dq, mask=inside, sem="relaxed")


@gluon.jit
def hide(pt, G: gl.constexpr, i, task, HOW: gl.constexpr):
    """Weights of 64 keys and the i-th tile of queries; 0 where a query does not see the key."""
    M: gl.constexpr = HOW.block_n
    keys = task.row + ROWS * G + gl.arange(0, ROWS, gl.SliceLayout(1, pt.type.layout))
    visible = (keys < task.kv_len)[:, None]
    if HOW.causal:
        # keys ≤ i·M + cols, such that a thread compares four numbers with constants: its
        # columns are 8 apart. Sixteen columns in registers would be spilled.
        cols = gl.arange(0, M, gl.SliceLayout(0, pt.type.layout))
        beyond = (keys - i * M)[:, None] - (cols & 7)[None, :]
        visible = visible & (beyond <= (cols & -8)[None, :])
    return gl.where(visible, pt, 0.0)


@gluon.jit
def gather(G: gl.constexpr, ring, saved, task, dk, dv, qk_scale, HOW: gl.constexpr):
    """What the tiles of queries add to dk and dv of 64 keys, and to dq."""
    M: gl.constexpr = HOW.block_n
    scores: gl.constexpr = in_registers(M)
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    columns: gl.constexpr = gl.SliceLayout(0, scores)
    zero = gl.zeros([ROWS, M], gl.float32, scores)
    kt, vt = matrix(ring.k.index(G)), matrix(ring.v.index(G))
    for i in range(task.start, task.tiles):
        turn = i - task.start
        at, phase = turn % HOW.stages, (turn // HOW.stages) & 1
        qt, gt = matrix(ring.q.index(at)), matrix(ring.g.index(at))
        mbarrier.wait(ring.q_full.index(at), phase)
        less = zero - ring.delta.index(at).load(columns)[None, :]  # dPᵀ − δ is what counts
        st = hw.warpgroup_mma(kt, qt.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(ring.g_full.index(at), phase)
        dpt = hw.warpgroup_mma(vt, gt.permute((1, 0)), less, is_async=True)
        st = hw.warpgroup_mma_wait(1, [st])
        lse = ring.lse.index(at).load(columns)
        pt = gl.exp2(st * qk_scale - lse[None, :])
        if (HOW.ragged or HOW.causal) and i < task.masked:
            pt = hide(pt, G, i, task, HOW)
        left = gl.convert_layout(pt.to(ring.g.dtype), operand)
        dv = hw.warpgroup_mma(left, gt, dv, is_async=True)
        dpt = hw.warpgroup_mma_wait(1, [dpt])
        dst = (pt * dpt).to(ring.q.dtype)
        ring.ds.index(2 * (turn & 1) + G).store(dst)
        hw.fence_async_shared()
        mbarrier.arrive(ring.ds_full.index(turn & 1))
        dk = hw.warpgroup_mma(gl.convert_layout(dst, operand), qt, dk, is_async=True)
        dv = hw.warpgroup_mma_wait(1, [dv])
        mbarrier.arrive(ring.g_free.index(at))
        dk = hw.warpgroup_mma_wait(0, [dk])
        mbarrier.wait(ring.ds_full.index(turn & 1), (turn // 2) & 1)
        if HOW.block_d == 128 or (turn & 1) == G:
            add_to_dq(G, ring, saved, task, i, turn, HOW)
        mbarrier.arrive(ring.q_free.index(at))
    return dk, dv


@gluon.jit
def store_keys(G: gl.constexpr, dst, tile, factor, task, HOW: gl.constexpr):
    D: gl.constexpr = HOW.head_dim
    layout: gl.constexpr = tile.type.layout
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    d = gl.arange(0, HOW.block_d, gl.SliceLayout(0, layout))[None, :]
    first = task.row + ROWS * G
    own = dst + ((task.sample.to(gl.int64) * task.kv_len + first) * task.heads + task.head) * D
    tile = gl.where(factor == 0.0, 0.0, tile * factor)
    inside = (rows < task.kv_len - first) & (d < D)
    gl.store(own + rows * (task.heads * D) + d, tile.to(dst.dtype.element_ty), mask=inside)


@gluon.jit
def consume(G: gl.constexpr, work, HOW: gl.constexpr):
    ring, saved, task, dk_out, dv_out, c_out, scale, qk_scale = work
    D: gl.constexpr = HOW.block_d
    dk = gl.zeros([ROWS, D], gl.float32, in_registers(D))
    dv = gl.zeros([ROWS, D], gl.float32, in_registers(D))
    mbarrier.wait(ring.keys_full.index(0), 0)
    dk, dv = gather(G, ring, saved, task, dk, dv, qk_scale, HOW)
    c = load_coefficient(c_out, task.sample, HOW.per_sample)
    store_keys(G, dv_out, dv, c, task, HOW)
    store_keys(G, dk_out, dk, c * scale, task, HOW)


@gluon.jit
def hopper_backward_kernel(q, k, v, g, dq_sum, dk, dv, lse, delta, c_out, scale, qk_scale,
                           heads, q_len, kv_len, HOW: gl.constexpr):  # fmt: skip
    M: gl.constexpr = HOW.block_n
    D: gl.constexpr = HOW.block_d
    STAGES: gl.constexpr = HOW.stages
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, M], q.dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = Ring(
        gl.allocate_shared_memory(k.dtype, [2, 1, 1, ROWS, D], k.layout),
        gl.allocate_shared_memory(v.dtype, [2, 1, 1, ROWS, D], v.layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, M, D], q.layout),
        gl.allocate_shared_memory(g.dtype, [STAGES, 1, 1, M, D], g.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, M], flat),
        gl.allocate_shared_memory(gl.float32, [STAGES, M], flat),
        gl.allocate_shared_memory(q.dtype, [4, ROWS, M], ds_layout),
        barriers(1, 1), barriers(STAGES, 2), barriers(STAGES, 2), barriers(STAGES, 1),
        barriers(STAGES, 2), barriers(2, 2),
    )  # fmt: skip
    hw.fence_async_shared()
    blocks = gl.cdiv(kv_len, 2 * ROWS)
    pid = gl.program_id(0)
    sample, head, row = pid // blocks // heads, pid // blocks % heads, pid % blocks * 2 * ROWS
    tiles = gl.cdiv(q_len, M)
    start, masked = 0, 0
    if HOW.causal:  # earlier queries see none of these keys; the diagonal needs a mask
        start = gl.minimum(row // M, tiles)
        masked = gl.minimum(gl.cdiv(row + 2 * ROWS, M), tiles)
    if HOW.ragged:  # of the last keys some do not exist
        masked = gl.where(row + 2 * ROWS > kv_len, tiles, masked)
    task = Task(sample, head, row, start, masked, tiles, q_len, kv_len, heads)
    here = (sample.to(gl.int64) * heads + head) * q_len
    saved = Saved(lse + here, delta + here, dq_sum)
    work = (ring, saved, task, dk, dv, c_out, scale, qk_scale)
    gl.warp_specialize(
        [(consume, (0, work, HOW)), (consume, (1, work, HOW)),
         (produce, (q, k, v, g, ring, saved, task, HOW))],
        [4, 1], [240, 24],
    )  # fmt: skip


def hopper_backward(g, q, k, v, lse, delta, c_out, scale, is_causal):
    """`backward.attention_backward` by this kernel. ValueError as `hopper.hopper_plan`."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    sources = (q, k, v, g.unflatten(-1, (heads, head_dim)).transpose(1, 2))
    if q.itemsize != 2 or head_dim > 128 or not launch.descriptors_allowed(*sources):
        raise ValueError("Hopper's kernel reads 16-bit heads, D ≤ 128, through the copy engine")
    dq_sum = torch.zeros(batch, q_len, heads, head_dim, dtype=torch.float32, device=q.device)
    dk, dv = (launch.result(t, (batch, kv_len, heads, head_dim)) for t in (k, v))
    block_d, m = max(64, triton.next_power_of_2(head_dim)), 64
    how = launch.TeamVariant(
        block_n=m, groups=2, stages=2, registers=240, head_dim=head_dim, block_d=block_d,
        causal=is_causal, ragged=kv_len % 128 != 0, per_sample=isinstance(c_out, torch.Tensor),
    )  # fmt: skip
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    boxes = launch.boxes_of_rows(sources, (m, 64, 64, m), block_d)
    boxes = tuple((*b, gl.NVMMASharedLayout.get_default_for(b[2], dtype)) for b in boxes)
    plan = launch.Plan(
        hopper_backward_kernel, batch * heads * triton.cdiv(kv_len, 128), heads, q_len, kv_len,
        HOW=how, boxes=boxes,
    )  # fmt: skip
    plan.launch(*sources, dq_sum, dk, dv, lse, delta, c_out, scale, scale * LOG2_E)
    factor = c_out * scale
    if isinstance(c_out, torch.Tensor):
        factor = (c_out.float() * scale).view(-1, 1, 1, 1)
        dq = torch.where(factor == 0.0, 0.0, dq_sum * factor).to(q.dtype)
    else:
        dq = (dq_sum * factor if factor else torch.zeros_like(dq_sum)).to(q.dtype)
    return tuple(t.transpose(1, 2) for t in (dq, dk, dv))
