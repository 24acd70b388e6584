"""Attention forward on Hopper with the skip fused in: `forward.py`'s contract, in Gluon.

There every warp copies, multiplies and waits. Here warps have jobs. One producer warp keeps
the copy engine busy: tiles of k and v into a ring of `stages` buffers, each guarded by two
mbarriers (full, free). `groups` of four warps own 64 queries each and share every tile: q kᵀ
of the next tile runs on the tensor core while they exponentiate this one's scores, and the
weights p stay in registers, where p v reads them.

q [B, H, Nq, D]; k, v [B, H, Nkv, D], D ≤ 128, 16 bits, rows that the copy engine can address;
x, out [B, Nq, H·D]. HBM: as in `forward.py`, whose kept maximum and second pass these are.
Shah et al. 2024 (FlashAttention-3): producer and consumers, turns on the tensor core.

`tiles.choose_team` says where this kernel runs. Chapter 7 builds it up.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hw
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from rcmlib import core
from rcmlib.attention.forward import Results, sources
from rcmlib.attention.registers import (
    as_operand,
    hide,
    in_registers,
    no_sums,
    overflowed,
    rescale,
    weigh,
)  # fmt: skip
from rcmlib.attention.ring import (
    ROWS,
    Source,
    boxes_of,
    copy_rows,
    matrix,
    new_ring,
    own_rounds,
    own_task,
    place,
    produce,
    stamp,
    tile_of,
)  # fmt: skip
from rcmlib.core import epilogue, launch

MOST_ROUNDS = 31  # tasks of a program: which it has to do again is noted in the bits of an int
# The one skip, compiled as Gluon.
skip_epilogue = gluon.jit(epilogue.skip_epilogue.fn)
load_coefficient = gluon.jit(epilogue.load_coefficient.fn)


@gluon.jit
def begin_scores(G: gl.constexpr, ring, at, HOW: gl.constexpr):
    """q kᵀ with the tile in buffer `at`: [64, block_n], on its way."""
    N: gl.constexpr = HOW.block_n
    zero = gl.zeros([ROWS, N], gl.float32, in_registers(N))
    kt = matrix(ring.k.index(at)).permute((1, 0))
    return hw.warpgroup_mma(matrix(ring.q.index(G)), kt, zero, use_acc=False, is_async=True)


@gluon.jit
def consume_tile(G: gl.constexpr, source, ring, task, done, m, l, acc, p, n, qk_scale,
                 HOW: gl.constexpr, MASK: gl.constexpr, FIXED: gl.constexpr):  # fmt: skip
    """q kᵀ of the program's n-th tile, and behind it acc += p v of the one before while this
    one's scores become weights. So acc lacks the last p v. done: tiles of earlier tasks."""
    at, phase = place(n, HOW.stages)
    before, phase_before = place(n - 1, HOW.stages)
    stamp(source.stamps, G, n, "begins")
    if HOW.turns:
        mbarrier.wait(ring.turn.index(G), n & 1)
    stamp(source.stamps, G, n, "turn")
    mbarrier.wait(ring.k_full.index(at), phase)
    stamp(source.stamps, G, n, "k here")
    s = begin_scores(G, ring, at, HOW)
    mbarrier.wait(ring.v_full.index(before), phase_before)
    acc = hw.warpgroup_mma(p, matrix(ring.v.index(before)), acc, is_async=True)
    stamp(source.stamps, G, n, "asked")
    if HOW.turns:
        mbarrier.arrive(ring.turn.index((G + 1) % HOW.groups))
    s = hw.warpgroup_mma_wait(1, [s])
    stamp(source.stamps, G, n, "scores")
    mbarrier.arrive(ring.k_free.index(at))
    if MASK:
        s = hide(s, G, n - done, task, HOW)
    w, m, l, alpha = weigh(s, m, l, qk_scale, FIXED)
    stamp(source.stamps, G, n, "weights")
    acc = hw.warpgroup_mma_wait(0, [acc])
    stamp(source.stamps, G, n, "p v done")
    if not FIXED:
        acc = rescale(acc, alpha)
    mbarrier.arrive(ring.v_free.index(before))
    return m, l, acc, as_operand(w, acc, ring.v.dtype)


@gluon.jit
def consume_again(G: gl.constexpr, r, source, ring, copied, tiles, qk_scale,
                  HOW: gl.constexpr):  # fmt: skip
    """The r-th task once more, against a running maximum; the group copies for itself.
    copied, tiles: how often it did so before, and with how many tiles."""
    BYTES: gl.constexpr = 2 * ROWS * HOW.block_d
    TILES: gl.constexpr = 4 * HOW.block_n * HOW.block_d
    task = own_task(r, source, HOW)
    m, l, acc = no_sums(HOW)
    full, free = ring.again.index(2 * G), ring.again.index(2 * G + 1)
    row = task.row + ROWS * G
    if source.x is None:
        mbarrier.expect(full, BYTES)
    else:
        mbarrier.expect(full, BYTES + source.x.block_type.nbytes)
        copy_rows(source.x, task, row, full, ring.x.index(G))
    copy_rows(source.q, task, row, full, ring.q.index(G))
    mbarrier.wait(full, (copied + tiles) & 1)
    for i in range(task.tiles):
        mbarrier.expect(full, TILES)
        row = tile_of(i, task) * HOW.block_n
        copy_rows(source.k, task, row, full, ring.k.index(0))
        copy_rows(source.v, task, row, full, ring.v.index(0))
        mbarrier.wait(full, (copied + tiles + i + 1) & 1)
        s = hw.warpgroup_mma_wait(0, [begin_scores(G, ring, 0, HOW)])
        if HOW.ragged or HOW.causal:
            s = hide(s, G, i, task, HOW)
        w, m, l, alpha = weigh(s, m, l, qk_scale, False)
        acc = rescale(acc, alpha)
        p = as_operand(w, acc, ring.v.dtype)
        acc = hw.warpgroup_mma(p, matrix(ring.v.index(0)), acc, is_async=True)
        acc = hw.warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free)
        mbarrier.wait(free, (tiles + i) & 1)  # all four warps are done with these tiles
    return task, m, l, acc


@gluon.jit
def finish(G: gl.constexpr, m, l, acc, xt, c_skip, c_out, task, to, HOW: gl.constexpr):
    """The epilogue of a group: f = acc / l, the skip with the tile xt, the stores."""
    D: gl.constexpr = HOW.head_dim
    layout: gl.constexpr = acc.type.layout
    l = gl.convert_layout(gl.sum(l, 1), m.type.layout)
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
    if xt is not None:
        f = skip_epilogue(xt.to(gl.float32), f, c_skip, c_out)
    gl.store(to.out + start + tile, f.to(to.out.dtype.element_ty), mask=inside)
    if to.lse is not None:  # in units of log2, as m
        layout_m: gl.constexpr = m.type.layout
        n = first + gl.arange(0, ROWS, layout_m)
        own = (sample * to.heads + task.head) * to.q_len + n
        gl.store(to.lse + own, m + gl.log2(l), mask=n < to.q_len)


@gluon.jit
def consume(G: gl.constexpr, work, HOW: gl.constexpr):
    """Four warps: 64 queries a task, from the first score to the stored result."""
    source, ring, to, qk_scale = work
    EDGE: gl.constexpr = HOW.ragged or HOW.causal
    rounds = own_rounds(source, HOW)
    done = 0
    again = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, in_registers(HOW.block_d)))
    for r in range(rounds):
        task = own_task(r, source, HOW)
        tiles = task.tiles
        m, l, acc = no_sums(HOW)
        mbarrier.wait(ring.q_full.index(0), r & 1)
        if HOW.turns:
            mbarrier.wait(ring.turn.index(G), done & 1)
        at, phase = place(done, HOW.stages)
        mbarrier.wait(ring.k_full.index(at), phase)
        s = begin_scores(G, ring, at, HOW)
        if HOW.turns:
            mbarrier.arrive(ring.turn.index((G + 1) % HOW.groups))
        s = hw.warpgroup_mma_wait(0, [s])
        mbarrier.arrive(ring.k_free.index(at))
        if EDGE:
            s = hide(s, G, 0, task, HOW)
        w, m, l, _ = weigh(s, m, l, qk_scale, False)
        p = as_operand(w, acc, ring.v.dtype)

        masked, end = done + tiles - task.whole, done + tiles
        if HOW.fixed or EDGE:
            for n in range(done + 1, masked):
                m, l, acc, p = consume_tile(G, source, ring, task, done, m, l, acc, p, n,
                                            qk_scale, HOW, EDGE, False)  # fmt: skip
        if masked < end:
            # One by itself: p from two loops would be unpacked and packed in each iteration.
            m, l, acc, p = consume_tile(G, source, ring, task, done, m, l, acc, p, masked,
                                        qk_scale, HOW, False, HOW.fixed)  # fmt: skip
            for n in range(masked + 1, end):
                m, l, acc, p = consume_tile(G, source, ring, task, done, m, l, acc, p, n,
                                            qk_scale, HOW, False, HOW.fixed)  # fmt: skip
        mbarrier.arrive(ring.q_free.index(0))
        done = end
        at, phase = place(done - 1, HOW.stages)
        mbarrier.wait(ring.v_full.index(at), phase)
        acc = hw.warpgroup_mma(p, matrix(ring.v.index(at)), acc, is_async=True)
        xt, c_skip, c_out = None, None, None
        if to.x is not None:  # while the last product runs
            c_skip = load_coefficient(to.c_skip, task.sample, HOW.per_sample)
            c_out = load_coefficient(to.c_out, task.sample, HOW.per_sample)
            mbarrier.wait(ring.x_full.index(0), r & 1)
            xt = matrix(ring.x.index(G)).load(in_registers(HOW.block_d))
            # A barrier of threads does not wait for loads that are under way, and the copy
            # engine does not queue behind them: without the fence it may overwrite x first.
            hw.fence_async_shared()
            mbarrier.arrive(ring.x_free.index(0))
        acc = hw.warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(ring.v_free.index(at))
        if HOW.fixed:
            again |= overflowed(acc, l) << r
        finish(G, m, l, acc, xt, c_skip, c_out, task, to, HOW)

    if HOW.fixed:
        mbarrier.arrive(ring.done.index(0))
        again = gl.reduce_or(again, 0)
        if again != 0:
            mbarrier.wait(ring.done.index(0), 0)
            if G > 0:
                mbarrier.wait(ring.next.index(G), 0)
            copied, tiles = 0, 0
            for r in range(rounds):
                if (again >> r) & 1 != 0:
                    task, m, l, acc = consume_again(G, r, source, ring, copied, tiles, qk_scale,
                                                    HOW)  # fmt: skip
                    xt, c_skip, c_out = None, None, None
                    if to.x is not None:
                        c_skip = load_coefficient(to.c_skip, task.sample, HOW.per_sample)
                        c_out = load_coefficient(to.c_out, task.sample, HOW.per_sample)
                        xt = matrix(ring.x.index(G)).load(acc.type.layout)
                        hw.fence_async_shared()
                    finish(G, m, l, acc, xt, c_skip, c_out, task, to, HOW)
                    copied += 1
                    tiles += task.tiles
        if HOW.groups > G + 1:  # pass the ring on, once it has come here
            if G > 0:
                mbarrier.wait(ring.next.index(G), 0)
            mbarrier.arrive(ring.next.index(G + 1))


@gluon.jit
def hopper_attention_kernel(q, k, v, x, out, saved_f, lse, c_skip, c_out, qk_scale, tasks,
                            heads, q_len, kv_len, stamps, HOW: gl.constexpr):  # fmt: skip
    """q, k, v, x: descriptors of [B, H, N, D]. tasks: of 64·groups queries. stamps: see
    `stamps.py`, or None. HOW: a TeamVariant."""
    GROUPS: gl.constexpr = HOW.groups
    source = Source(q, k, v, x, tasks, heads, q_len, kv_len, stamps)
    ring = new_ring(source, HOW)
    to = Results(x, None, c_skip, c_out, out, saved_f, lse, heads, q_len)
    work = (source, ring, to, qk_scale)
    if GROUPS == 2:
        gl.warp_specialize(
            [(consume, (0, work, HOW)), (consume, (1, work, HOW)),
             (produce, (source, ring, HOW))],
            [4, 1], [HOW.registers, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(consume, (0, work, HOW)), (consume, (1, work, HOW)), (consume, (2, work, HOW)),
             (produce, (source, ring, HOW))],
            [4, 4, 1], [HOW.registers, HOW.registers, 24],
        )  # fmt: skip


def hopper_plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor | None,
    per_sample: bool, is_causal: bool, team: launch.Team,
) -> launch.Plan:  # fmt: skip
    """As `forward.attention_plan`, of `hopper_attention_kernel`; errors as of `boxes_of`."""
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    m, n, block_d = ROWS.value, team.block_n, max(64, triton.next_power_of_2(head_dim))
    boxes = boxes_of(sources(q, k, v, x), (m, n, n, m), block_d)
    if team.fixed and q.dtype == torch.float16:
        raise ValueError("float16 cannot hold weights relative to a maximum that is kept")
    assert team.groups in (2, 3) and team.stages.bit_count() == 1, team
    how = launch.TeamVariant(
        **vars(team), head_dim=head_dim, block_d=block_d, causal=is_causal,
        ragged=kv_len % n != 0, per_sample=per_sample,
    )  # fmt: skip
    tasks = batch * heads * triton.cdiv(q_len, m * team.groups)
    each = 2 if is_causal else 1  # tasks a round
    rounds = triton.cdiv(tasks, each)
    sms = core.multiprocessors(q.device) or rounds
    turns = triton.cdiv(rounds, sms * (MOST_ROUNDS // each))  # of programs on an SM
    programs = min(rounds, sms * turns)
    return launch.Plan(hopper_attention_kernel, programs, tasks, heads, q_len, kv_len,
                       HOW=how, stamps=None, boxes=boxes)  # fmt: skip
