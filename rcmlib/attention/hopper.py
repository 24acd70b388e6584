"""Attention forward on Hopper with the skip fused in: `forward.py`'s contract, in Gluon.

There every warp copies, multiplies and waits. Here warps have jobs. One producer warp keeps
the copy engine busy: tiles of k and v into a ring of `stages` buffers, each guarded by two
mbarriers (full, free). `groups` of four warps own 64 queries each and share every tile: q kᵀ
of the next tile runs on the tensor core while they exponentiate this one's scores, and the
weights p stay in registers, where p v reads them.

q [B, H, Nq, D]; k, v [B, H, Nkv, D], D ≤ 128, 16 bits, rows that the copy engine can address;
x, out [B, Nq, H·D]. HBM: as in `forward.py`, whose kept maximum and second pass these are.
Shah et al. 2024 (FlashAttention-3): producer and consumers, turns on the tensor core.

`rcm_attention` does not choose this kernel yet; `attention_plan` takes a Team to launch it.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hw
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from rcmlib.attention.forward import LIMIT, LOWEST, Results, attention_forward
from rcmlib.attention.ring import ROWS, copy_rows, matrix, new_ring, own_task, produce, tile_of
from rcmlib.core import epilogue, launch

# The one skip, compiled as Gluon.
skip_epilogue = gluon.jit(epilogue.skip_epilogue.fn)
load_coefficient = gluon.jit(epilogue.load_coefficient.fn)


@gluon.constexpr_function
def in_registers(cols):
    """How a product [64, cols] lies in the registers of four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def begin_scores(G: gl.constexpr, ring, at, HOW: gl.constexpr):
    """q kᵀ with the tile in buffer `at`: [64, block_n], on its way."""
    N: gl.constexpr = HOW.block_n
    zero = gl.zeros([ROWS, N], gl.float32, in_registers(N))
    kt = matrix(ring.k.index(at)).permute((1, 0))
    return hw.warpgroup_mma(matrix(ring.q.index(G)), kt, zero, use_acc=False, is_async=True)


@gluon.jit
def hide(s, G: gl.constexpr, i, task, HOW: gl.constexpr):
    """The scores of the i-th tile; -inf where a query does not see the key."""
    layout: gl.constexpr = s.type.layout
    cols = tile_of(i, task) * HOW.block_n
    cols += gl.arange(0, HOW.block_n, gl.SliceLayout(0, layout))
    visible = (cols < task.kv_len)[None, :]
    if HOW.causal:
        rows = task.row + ROWS * G + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        visible = visible & (cols[None, :] <= rows[:, None])
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def weigh(s, m, l, qk_scale, FIXED: gl.constexpr):
    """(weights p, the maximum m [64], their sum l, what earlier sums are to be scaled by)."""
    alpha = m
    if not FIXED:
        larger = gl.maximum(m, gl.max(s, 1) * qk_scale)
        alpha = gl.exp2(m - larger)
        m, l = larger, l * alpha
    p = gl.exp2(s * qk_scale - m[:, None])
    return p, m, l + gl.sum(p, 1), alpha


@gluon.jit
def rescale(acc, alpha):
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def as_operand(p, acc, dtype: gl.constexpr):
    """The weights in 16 bits, as the left operand of acc += p v takes them from registers."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, acc.type.layout, 2))


@gluon.jit
def consume_tiles(G: gl.constexpr, ring, task, m, l, acc, p, start, stop, qk_scale,
                  HOW: gl.constexpr, MASK: gl.constexpr, FIXED: gl.constexpr):  # fmt: skip
    """For each tile i in [start, stop): q kᵀ of it, and behind it acc += p v of the one before
    while this one's scores become weights. So acc lacks the last p v."""
    for i in range(start, stop):
        at, before = i % HOW.stages, (i - 1) % HOW.stages
        if HOW.turns:
            mbarrier.wait(ring.turn.index(G), i & 1)
        mbarrier.wait(ring.k_full.index(at), (i // HOW.stages) & 1)
        s = begin_scores(G, ring, at, HOW)
        mbarrier.wait(ring.v_full.index(before), ((i - 1) // HOW.stages) & 1)
        acc = hw.warpgroup_mma(p, matrix(ring.v.index(before)), acc, is_async=True)
        if HOW.turns:
            mbarrier.arrive(ring.turn.index((G + 1) % HOW.groups))
        s = hw.warpgroup_mma_wait(1, [s])
        mbarrier.arrive(ring.k_free.index(at))
        if MASK:
            s = hide(s, G, i, task, HOW)
        w, m, l, alpha = weigh(s, m, l, qk_scale, FIXED)
        acc = hw.warpgroup_mma_wait(0, [acc])
        if not FIXED:
            acc = rescale(acc, alpha)
        mbarrier.arrive(ring.v_free.index(before))
        p = as_operand(w, acc, ring.v.dtype)
    return m, l, acc, p


@gluon.jit
def no_sums(HOW: gl.constexpr):
    """(m, l, acc) of no tiles."""
    D: gl.constexpr = HOW.block_d
    rows: gl.constexpr = gl.SliceLayout(1, in_registers(HOW.block_n))
    m = gl.full([ROWS], LOWEST, gl.float32, rows)
    acc = gl.zeros([ROWS, D], gl.float32, in_registers(D))
    return m, gl.zeros([ROWS], gl.float32, rows), acc


@gluon.jit
def consume_again(G: gl.constexpr, k, v, ring, task, qk_scale, HOW: gl.constexpr):
    """All tiles once more, against a running maximum; the group copies them for itself."""
    BYTES: gl.constexpr = 4 * HOW.block_n * HOW.block_d
    m, l, acc = no_sums(HOW)
    mbarrier.wait(ring.done.index(0), 0)
    if G > 0:
        mbarrier.wait(ring.next.index(G), 0)
    full, free = ring.again.index(2 * G), ring.again.index(2 * G + 1)
    for i in range(task.tiles):
        mbarrier.expect(full, BYTES)
        row = tile_of(i, task) * HOW.block_n
        copy_rows(k, task, row, full, ring.k.index(0))
        copy_rows(v, task, row, full, ring.v.index(0))
        mbarrier.wait(full, i & 1)
        s = hw.warpgroup_mma_wait(0, [begin_scores(G, ring, 0, HOW)])
        if HOW.ragged or HOW.causal:
            s = hide(s, G, i, task, HOW)
        w, m, l, alpha = weigh(s, m, l, qk_scale, False)
        acc = rescale(acc, alpha)
        p = as_operand(w, acc, ring.v.dtype)
        acc = hw.warpgroup_mma(p, matrix(ring.v.index(0)), acc, is_async=True)
        acc = hw.warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free)
        mbarrier.wait(free, i & 1)  # all four warps are done with these tiles
    return m, l, acc


@gluon.jit
def overflowed(acc, l):
    """Did a weight make one of these sums too large for float32, or not a number?"""
    fine = gl.min(gl.min((gl.abs(acc) < LIMIT).to(gl.int32), 1), 0)
    return gl.minimum(fine, gl.min((l < LIMIT).to(gl.int32), 0)) == 0


@gluon.jit
def finish(G: gl.constexpr, m, l, acc, task, to, HOW: gl.constexpr):
    """The epilogue of a group: f = acc / l, the skip, the stores."""
    D: gl.constexpr = HOW.head_dim
    layout: gl.constexpr = acc.type.layout
    f = rescale(acc, 1 / l)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    d = gl.arange(0, HOW.block_d, gl.SliceLayout(0, layout))[None, :]
    first = task.row + ROWS * G
    inside = (rows < to.q_len - first) & (d < D)
    # In 64 bits up to the first row; within 64 rows of a result 32 will do.
    sample, first = task.sample.to(gl.int64), first.to(gl.int64)
    start = (sample * to.q_len + first) * to.heads * D + task.head * D
    tile = rows * (to.heads * D) + d
    if to.saved_f is not None:
        gl.store(to.saved_f + start + tile, f.to(to.saved_f.dtype.element_ty), mask=inside)
    if to.x is not None:
        stride_b, stride_n = to.x_strides
        own = to.x + sample * stride_b + first * stride_n + task.head * D
        xt = gl.load(own + rows.to(gl.int64) * stride_n + d, mask=inside)
        f = skip_epilogue(xt.to(gl.float32), f,
                          load_coefficient(to.c_skip, task.sample, HOW.per_sample),
                          load_coefficient(to.c_out, task.sample, HOW.per_sample))  # fmt: skip
    gl.store(to.out + start + tile, f.to(to.out.dtype.element_ty), mask=inside)
    if to.lse is not None:  # in units of log2, as m
        layout_m: gl.constexpr = m.type.layout
        n = first + gl.arange(0, ROWS, layout_m)
        own = (sample * to.heads + task.head) * to.q_len + n
        gl.store(to.lse + own, m + gl.log2(l), mask=n < to.q_len)


@gluon.jit
def consume(G: gl.constexpr, work, HOW: gl.constexpr):
    """Four warps: 64 queries, from the first score to the stored result."""
    k, v, ring, task, to, qk_scale = work
    EDGE: gl.constexpr = HOW.ragged or HOW.causal
    m, l, acc = no_sums(HOW)
    mbarrier.wait(ring.q_full.index(0), 0)
    if HOW.turns:
        mbarrier.wait(ring.turn.index(G), 0)
    mbarrier.wait(ring.k_full.index(0), 0)
    s = begin_scores(G, ring, 0, HOW)
    if HOW.turns:
        mbarrier.arrive(ring.turn.index((G + 1) % HOW.groups))
    s = hw.warpgroup_mma_wait(0, [s])
    mbarrier.arrive(ring.k_free.index(0))
    if EDGE:
        s = hide(s, G, 0, task, HOW)
    w, m, l, _ = weigh(s, m, l, qk_scale, False)
    p = as_operand(w, acc, ring.v.dtype)

    masked, tiles = task.tiles - task.whole, task.tiles
    if HOW.fixed or EDGE:
        m, l, acc, p = consume_tiles(G, ring, task, m, l, acc, p, 1, masked, qk_scale, HOW,
                                     EDGE, False)  # fmt: skip
    m, l, acc, p = consume_tiles(G, ring, task, m, l, acc, p, masked, tiles, qk_scale, HOW,
                                 False, HOW.fixed)  # fmt: skip
    last = (tiles - 1) % HOW.stages
    mbarrier.wait(ring.v_full.index(last), ((tiles - 1) // HOW.stages) & 1)
    acc = hw.warpgroup_mma(p, matrix(ring.v.index(last)), acc, is_async=True)
    acc = hw.warpgroup_mma_wait(0, [acc])
    if HOW.fixed:
        mbarrier.arrive(ring.done.index(0))
        if overflowed(acc, l):
            m, l, acc = consume_again(G, k, v, ring, task, qk_scale, HOW)
    finish(G, m, l, acc, task, to, HOW)
    if HOW.fixed and HOW.groups > G + 1:  # pass the ring on, once it has come here
        if G > 0:
            mbarrier.wait(ring.next.index(G), 0)
        mbarrier.arrive(ring.next.index(G + 1))


@gluon.jit
def hopper_attention_kernel(q, k, v, x, out, saved_f, lse, c_skip, c_out, qk_scale,
                            heads, q_len, kv_len, x_strides, HOW: gl.constexpr):  # fmt: skip
    """q, k, v: descriptors of [B, H, N, D]. HOW: a TeamVariant."""
    GROUPS: gl.constexpr = HOW.groups
    ring = new_ring(q, k, v, HOW)
    task = own_task(heads, q_len, kv_len, HOW)
    to = Results(x, x_strides, c_skip, c_out, out, saved_f, lse, heads, q_len)
    work = (k, v, ring, task, to, qk_scale)
    if GROUPS == 2:
        gl.warp_specialize(
            [(consume, (0, work, HOW)), (consume, (1, work, HOW)),
             (produce, (q, k, v, ring, task, HOW))],
            [4, 1], [HOW.registers, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(consume, (0, work, HOW)), (consume, (1, work, HOW)), (consume, (2, work, HOW)),
             (produce, (q, k, v, ring, task, HOW))],
            [4, 4, 1], [HOW.registers, HOW.registers, 24],
        )  # fmt: skip


def hopper_plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor | None,
    per_sample: bool, is_causal: bool, team: launch.Team,
) -> launch.Plan:  # fmt: skip
    """As `forward.attention_plan`, of `hopper_attention_kernel`. ValueError for heads that it
    cannot read: not of 16 bits, D > 128, or not to be addressed by the copy engine."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    if q.itemsize != 2 or head_dim > 128 or not launch.descriptors_allowed(q, k, v):
        raise ValueError("Hopper's kernel reads 16-bit heads, D ≤ 128, through the copy engine")
    assert team.groups in (2, 3), team
    n, block_d = team.block_n, max(64, triton.next_power_of_2(head_dim))
    how = launch.TeamVariant(
        **vars(team), head_dim=head_dim, block_d=block_d, causal=is_causal,
        ragged=kv_len % n != 0, per_sample=per_sample,
    )  # fmt: skip
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    boxes = (
        (*box, gl.NVMMASharedLayout.get_default_for(box[2], dtype))
        for box in launch.boxes_of_rows((q, k, v), (ROWS.value, n, n), block_d)
    )
    x_strides = (0, 0) if x is None else x.stride()[:2]
    programs = batch * heads * triton.cdiv(q_len, ROWS.value * team.groups)
    return launch.Plan(hopper_attention_kernel, programs, heads, q_len, kv_len, x_strides,
                       HOW=how, boxes=tuple(boxes))  # fmt: skip


def hopper_forward(team: launch.Team, q, k, v, x, c_skip, c_out, scale, is_causal, save=False):
    """`forward.attention_forward` by this team."""
    plan = hopper_plan(q, k, v, x, isinstance(c_skip, torch.Tensor), is_causal, team)
    return attention_forward(q, k, v, x, c_skip, c_out, scale, is_causal, save, plan)
