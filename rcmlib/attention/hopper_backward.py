"""The gradients of attention on Hopper, in Gluon: `backward.py`'s sums with five products.

    Sᵀ = k qᵀ,  dPᵀ = v gᵀ,  dv += Pᵀ g,  dk += dSᵀ q,  dq += dS k

A program owns 128 keys, two groups of four warps 64 each. One warp copies tiles of q and g
into rings, one lse and δ. P and dS of a group's keys are in registers what its sums dv and dk
take as their left operand. For dq, dS goes through shared memory, and each group computes
half of dS k, one tile later: so neither waits for the other's dS of the same tile. dk and dv
leave through the buffers of k and v.

dq of a tile of queries is a sum over all programs. They add to float32 scratch in global
memory (dq_sum.py), in the order in which they come: two runs may differ in dq's last bit. So
with torch.use_deterministic_algorithms, `backward.py` does the work.

q [B, H, Nq, D]; k, v [B, H, Nkv, D]; g [B, H, Nq, D] as a view of [B, Nq, H·D]; 16 bits,
D ≤ 128. dk, dv [B, Nkv, H, D]. HBM, beside those: dq's scratch, 4 bytes an element and padded,
is zeroed, added to in L2, and read. Shah et al. 2024 (FlashAttention-3): warps with jobs.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hw
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from rcmlib.attention.backward_ring import Task, copy_numbers, new_ring, produce
from rcmlib.attention.dq_sum import SCRATCH, add_to_dq, scale_kernel
from rcmlib.attention.forward import sources
from rcmlib.attention.hopper import load_coefficient
from rcmlib.attention.registers import as_operand, in_registers
from rcmlib.attention.ring import ROWS, boxes_of, matrix, place
from rcmlib.attention.tiles import LOG2_E
from rcmlib.core import launch


@gluon.jit
def unknown_zero(i):
    """0 for the i-th tile (i ≥ 0), but the compiler cannot know. Added to the index of a buffer
    that is the same for all tiles, it keeps that buffer's addresses, two registers for each
    wgmma, from being worked out before the loop and being kept: that would spill others."""
    return i >> 30


@gluon.jit
def begin_scores(G: gl.constexpr, ring, i, HOW: gl.constexpr):
    """Sᵀ of the i-th tile: [64, block_n], on its way."""
    M: gl.constexpr = HOW.block_n
    zero = gl.zeros([ROWS, M], gl.float32, in_registers(M))
    at, _ = place(i, 2 * HOW.stages)
    qt = matrix(ring.q.index(at)).permute((1, 0))
    kt = matrix(ring.k.index(G + unknown_zero(i)))
    return hw.warpgroup_mma(kt, qt, zero, use_acc=False, is_async=True)


@gluon.jit
def begin_dq(G: gl.constexpr, ring, i, HOW: gl.constexpr):
    """This group's part of dS k for the i-th tile: [64, 64], on its way. Of 64 queries half of
    the channels, of 128 queries half."""
    COLS: gl.constexpr = 64
    dq = gl.zeros([ROWS, COLS], gl.float32, in_registers(COLS))
    for w in gl.static_range(2):
        ds = ring.ds.index(2 * (i & 1) + w)
        kt = matrix(ring.k.index(w + unknown_zero(i + 2)))
        if HOW.block_d == 128:
            kt = kt.slice(COLS * G, COLS, dim=1)
        else:
            ds = ds.slice(ROWS * G, ROWS, dim=1)
        dq = hw.warpgroup_mma(ds.permute((1, 0)), kt, dq, use_acc=w > 0, is_async=True)
    return dq


@gluon.jit
def hide(pt, G: gl.constexpr, tile, task, HOW: gl.constexpr):
    """Weights of 64 keys and a tile of queries; 0 where a query does not see the key."""
    M: gl.constexpr = HOW.block_n
    keys = task.row + ROWS * G + gl.arange(0, ROWS, gl.SliceLayout(1, pt.type.layout))
    visible = (keys < task.kv_len)[:, None]
    if HOW.causal:
        # keys ≤ first + cols, such that a thread compares few numbers with constants: its
        # columns are 8 apart. As columns in registers they would be spilled.
        cols = gl.arange(0, M, gl.SliceLayout(0, pt.type.layout))
        beyond = (keys - tile * M)[:, None] - (cols & 7)[None, :]
        visible = visible & (beyond <= (cols & -8)[None, :])
    return gl.where(visible, pt, 0.0)


@gluon.jit
def gather(G: gl.constexpr, ring, dq_sum, task, qk_scale, HOW: gl.constexpr):
    """(dk, dv) of 64 keys, [64, block_d] each; dq is added to scratch tile by tile."""
    M: gl.constexpr = HOW.block_n
    D: gl.constexpr = HOW.block_d
    columns: gl.constexpr = gl.SliceLayout(0, in_registers(M))
    dk = gl.zeros([ROWS, D], gl.float32, in_registers(D))
    dv = gl.zeros([ROWS, D], gl.float32, in_registers(D))
    zero = gl.zeros([ROWS, M], gl.float32, in_registers(M))
    vt = matrix(ring.v.index(G))
    mbarrier.wait(ring.k_full.index(0), 0)
    mbarrier.wait(ring.q_full.index(0), 0)
    st = hw.warpgroup_mma_wait(0, [begin_scores(G, ring, 0, HOW)])
    mbarrier.wait(ring.v_full.index(0), 0)
    own_dq = dq_sum + (G - 2) * (SCRATCH // 2)  # of the tile before
    for i in range(task.tiles):
        at, phase = place(i, HOW.stages)  # of g
        now, _ = place(i, 2 * HOW.stages)  # of q
        after, phase_after = place(i + 1, 2 * HOW.stages)
        qt, gt = matrix(ring.q.index(now)), matrix(ring.g.index(at))
        less = zero - ring.delta.index(now).load(columns)[None, :]  # dPᵀ − δ is what counts
        mbarrier.wait(ring.g_full.index(at), phase)
        dpt = hw.warpgroup_mma(vt, gt.permute((1, 0)), less, is_async=True)
        lse = ring.lse.index(now).load(columns)
        pt = gl.exp2(st * qk_scale - lse[None, :])
        if HOW.ragged or HOW.causal:
            tile = task.start + i
            if tile < task.masked:
                pt = hide(pt, G, tile, task, HOW)
        dv = hw.warpgroup_mma(as_operand(pt, dv, ring.g.dtype), gt, dv, is_async=True)
        dpt = hw.warpgroup_mma_wait(1, [dpt])
        dst = (pt * dpt).to(ring.q.dtype)
        turned = ((i + 1) // 2 & 1) ^ 1
        mbarrier.wait(ring.ds_free.index(i & 1), turned)
        ring.ds.index(2 * (i & 1) + G).store(dst)
        hw.fence_async_shared()
        # dq of the tile before, whose dS both groups stored before they freed this one's
        # buffer; in the first round of nothing, whatever is in the buffer.
        dq = begin_dq(G, ring, i - 1, HOW)
        dk = hw.warpgroup_mma(as_operand(dst, dk, ring.q.dtype), qt, dk, is_async=True)
        dv, dq = hw.warpgroup_mma_wait(1, [dv, dq])
        mbarrier.arrive(ring.g_free.index(at))
        mbarrier.arrive(ring.ds_free.index((i - 1) & 1))
        if i > 0:
            add_to_dq(own_dq, dq)
        own_dq += SCRATCH
        mbarrier.wait(ring.q_full.index(after), phase_after)
        st = begin_scores(G, ring, i + 1, HOW)
        dk, st = hw.warpgroup_mma_wait(0, [dk, st])
        mbarrier.arrive(ring.q_free.index(now))
    return dk, dv


@gluon.jit
def store_keys(G: gl.constexpr, to, tile, factor, task, buffer):
    """factor·tile, or zeros for a factor of 0, as in `backward.store_rows`: into a buffer, from
    where the copy engine fetches it."""
    tile = gl.where(factor == 0.0, 0.0, tile * factor)
    matrix(buffer).store(tile.to(buffer.dtype))
    hw.fence_async_shared()
    here = [task.sample, task.head, task.row + ROWS * G, 0]
    tma.async_copy_shared_to_global(to, here, buffer)


@gluon.jit
def consume(G: gl.constexpr, work, HOW: gl.constexpr):
    ring, dq_sum, task, to_dk, to_dv, c_out, scale, qk_scale = work
    dk, dv = gather(G, ring, dq_sum, task, qk_scale, HOW)
    mbarrier.arrive(ring.last.index(0))
    c = load_coefficient(c_out, task.sample, HOW.per_sample)
    store_keys(G, to_dv, dv, c, task, ring.v.index(G))  # which this group alone has read
    mbarrier.wait(ring.last.index(0), 0)
    last = task.tiles - 1
    if last >= 0:
        dq = hw.warpgroup_mma_wait(0, [begin_dq(G, ring, last, HOW)])
        add_to_dq(dq_sum + (2 * last + G).to(gl.int64) * (SCRATCH // 2), dq)
    mbarrier.arrive(ring.last.index(0))
    mbarrier.wait(ring.last.index(0), 1)  # neither reads k any more
    store_keys(G, to_dk, dk, c * scale, task, ring.k.index(G))
    tma.store_wait(0)


@gluon.jit
def hopper_backward_kernel(q, k, v, g, dk, dv, dq_sum, lse, delta, c_out, scale, qk_scale,
                           heads, q_len, kv_len, HOW: gl.constexpr):  # fmt: skip
    """q, k, v, g, dk, dv: descriptors of [B, H, N, D]. dq_sum: zeros. HOW: a TeamVariant, whose
    block_n is a tile of queries."""
    M: gl.constexpr = HOW.block_n
    ring = new_ring(q, k, v, g, HOW)
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
    task = Task(sample, head, row, start, masked, tiles - start, q_len, kv_len, heads)
    here = (sample.to(gl.int64) * heads + head) * q_len
    own_dq = dq_sum + ((sample * heads + head).to(gl.int64) * tiles + start) * SCRATCH
    work = (ring, own_dq, task, dk, dv, c_out, scale, qk_scale)
    gl.warp_specialize(
        [(consume, (0, work, HOW)), (consume, (1, work, HOW)),
         (produce, (q, k, v, g, ring, task, HOW)),
         (copy_numbers, (lse + here, delta + here, ring, task, HOW))],
        [4, 1, 1], [HOW.registers, 24, 24],
    )  # fmt: skip


def variant(
    q, kv_len: int, is_causal: bool, per_sample: bool
) -> tuple[launch.TeamVariant, int]:
    """How the kernel is compiled, and how many tiles of queries a head has."""
    block_d = max(64, triton.next_power_of_2(q.shape[3]))
    m = 64 if block_d == 128 else 128
    how = launch.TeamVariant(
        block_n=m, groups=2, stages=2, registers=240, head_dim=q.shape[3], block_d=block_d,
        causal=is_causal, ragged=kv_len % 128 != 0, per_sample=per_sample,
    )  # fmt: skip
    return how, triton.cdiv(q.shape[2], m)


def seen(k, v, q_len: int, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys that a query may see. What the copy engine finds beyond them is zeros."""
    return (k[:, :, :q_len], v[:, :, :q_len]) if is_causal else (k, v)


def hopper_plans(q, k, v, g, dk, dv, per_sample: bool, is_causal: bool) -> tuple:
    """(the two launches for tensors like these, the elements of scratch). All [B, H, N, D].
    ValueError as `ring.boxes_of`."""
    many, q_len, kv_len = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    how, tiles = variant(q, kv_len, is_causal, per_sample)
    m = how.block_n
    tensors = (q, *seen(k, v, q_len, is_causal), g, dk, dv)
    boxes = boxes_of(tensors, (m, 64, 64, m, 64, 64), how.block_d)
    programs, lengths = many * triton.cdiv(kv_len, 2 * ROWS.value), (q.shape[1], q_len, kv_len)
    products = launch.Plan(hopper_backward_kernel, programs, *lengths, HOW=how, boxes=boxes)
    scale = launch.Plan(scale_kernel, many * tiles, q.shape[1], q_len, tiles, HOW=how)
    return products, scale, many * tiles * SCRATCH.value


def hopper_backward(
    g, q, k, v, lse, delta, c_out, scale, is_causal
) -> tuple[torch.Tensor, ...]:
    """As `backward.attention_backward`."""
    batch, heads, _, head_dim = q.shape
    read = sources(q, k, v, g)
    dq, dk, dv = (launch.result(t, (batch, t.shape[2], heads, head_dim)) for t in (q, k, v))
    results = tuple(t.transpose(1, 2) for t in (dq, dk, dv))
    key = launch.key_of("hopper_backward", (*read, lse, delta, c_out), is_causal)
    per_sample = isinstance(c_out, torch.Tensor)
    plans = launch.planned(
        key, lambda: hopper_plans(*read, *results[1:], per_sample, is_causal)
    )
    products, last, size = plans
    dq_sum = launch.result(q, (size,), torch.float32).zero_()
    products.launch(*read, dk, dv, dq_sum, lse, delta, c_out, scale, scale * LOG2_E)
    last.launch(dq_sum, dq, c_out, scale)
    return results
