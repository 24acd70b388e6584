"""The ring of buffers between the warp that copies and those that multiply (hopper.py).

A buffer has two mbarriers. Each counts arrivals and turns a phase when all are there; who
waits for a phase needs no lock. full: the copy engine arrives with a tile's last byte.
free: every group of consumers arrives once it has read the tile. The n-th tile of a program
goes into buffer n mod stages, in round r = n / stages of the ring: waiting for full is waiting
for phase r mod 2, and for free for the phase before. q and x have a buffer each, so that for
them a round is a task.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hw
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from rcmlib.attention import stamps
from rcmlib.attention.stamps import PRODUCER
from rcmlib.core import launch

ROWS = gl.constexpr(64)  # of a group: one wgmma's
SMEM = gl.shared_memory_descriptor
GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
stamp = gluon.jit(stamps.stamp.fn)


class Ring(NamedTuple):
    """A program's shared memory, and the mbarriers that say who may touch it."""

    q: SMEM  # [groups, 1, 1, 64, block_d]; so x, where there is one
    k: SMEM  # [stages, 1, 1, block_n, block_d]; so v
    v: SMEM
    x: SMEM
    q_full: SMEM
    q_free: SMEM
    x_full: SMEM
    x_free: SMEM
    k_full: SMEM  # a stage: its copy has arrived
    k_free: SMEM  # a stage: all groups have read it
    v_full: SMEM
    v_free: SMEM
    turn: SMEM  # a group: it may issue products
    done: SMEM  # no group needs the ring any more
    again: SMEM  # two a group, full and free, of its second pass
    next: SMEM  # a group: its second pass may begin


class Source(NamedTuple):
    """What is copied: descriptors of q, x [B, H, Nq, D] and k, v [B, H, Nkv, D]."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    x: tma.tensor_descriptor  # None: attention alone
    tasks: gl.tensor  # of all programs
    heads: gl.tensor
    q_len: gl.tensor
    kv_len: gl.tensor
    stamps: gl.tensor  # None, unless somebody asks when (stamps.py)


class Task(NamedTuple):
    """64·groups queries, and their key tiles: first `whole` … `tiles`, then 0 … `whole`."""

    sample: gl.tensor
    head: gl.tensor
    row: gl.tensor
    whole: gl.tensor  # so many tiles need no mask, and are weighed against the kept maximum
    tiles: gl.tensor
    kv_len: gl.tensor


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), ARRIVALS)
    return bars


@gluon.jit
def place(n, STAGES: gl.constexpr):
    """(buffer, phase) of the n-th tile. stages is a power of two: no division."""
    return n & (STAGES - 1), (n & STAGES) // STAGES


@gluon.jit
def own_rounds(source, HOW: gl.constexpr):
    """So many tasks a program works on, one behind the other."""
    programs, own = gl.num_programs(0), gl.program_id(0)
    if HOW.causal:  # in pairs; of an odd number the middle one is alone, and the last
        pairs = gl.cdiv(source.tasks, 2)
        alone = (source.tasks % 2 == 1) & ((pairs - 1 - own) % programs == 0)
        rounds = 2 * gl.cdiv(pairs - own, programs) - alone.to(gl.int32)
    else:
        rounds = gl.cdiv(source.tasks - own, programs)
    return rounds


@gluon.jit
def own_index(r, source, HOW: gl.constexpr):
    """Of the r-th task among all. Causal: one from their front, and one as far from their end,
    which together have as many tiles as any other two."""
    index = gl.program_id(0) + r * gl.num_programs(0)
    if HOW.causal:
        index = gl.program_id(0) + r // 2 * gl.num_programs(0)
        index = gl.where(r % 2 == 0, index, source.tasks - 1 - index)
    return index


@gluon.jit
def own_task(r, source, HOW: gl.constexpr):
    """The r-th."""
    BLOCK: gl.constexpr = ROWS * HOW.groups
    N: gl.constexpr = HOW.block_n
    kv_len = source.kv_len
    blocks = gl.cdiv(source.q_len, BLOCK)
    index = own_index(r, source, HOW)
    block = index % blocks
    if HOW.causal:
        block = blocks - 1 - block  # long ones first
    row = block * BLOCK
    whole, stop = kv_len // N, kv_len
    if HOW.causal:
        whole = gl.minimum(whole, row // N)
        stop = gl.minimum(stop, row + BLOCK)
    tiles = gl.cdiv(stop, N)
    if HOW.fixed:  # a maximum of half a tile at least: one key's may be far too low
        whole = gl.minimum(whole, (stop - N // 2) // N)
    whole = gl.maximum(gl.minimum(whole, tiles - 1), 0)
    head = index // blocks
    return Task(head // source.heads, head % source.heads, row, whole, tiles, kv_len)


@gluon.jit
def tile_of(i, task):
    """The i-th tile in the order of work."""
    masked = task.tiles - task.whole
    return gl.where(i < masked, task.whole + i, i - masked)


@gluon.jit
def copy_rows(source, task, row, full, to):
    tma.async_copy_global_to_shared(source, [task.sample, task.head, row, 0], full, to)


@gluon.jit
def produce(source, ring, HOW: gl.constexpr):
    """One warp: q, then every tile of k and v as soon as its buffer is free, and x."""
    BYTES: gl.constexpr = 2 * HOW.block_n * HOW.block_d
    GROUPS: gl.constexpr = HOW.groups
    done = 0  # tiles of earlier tasks
    for r in range(own_rounds(source, HOW)):
        task = own_task(r, source, HOW)
        mbarrier.wait(ring.q_free.index(0), (r & 1) ^ 1)  # in the first round for nobody
        mbarrier.expect(ring.q_full.index(0), 2 * GROUPS * ROWS * HOW.block_d)
        for g in gl.static_range(GROUPS):
            copy_rows(source.q, task, task.row + ROWS * g, ring.q_full.index(0),
                      ring.q.index(g))  # fmt: skip
        for i in range(task.tiles):
            at, phase = place(done + i, HOW.stages)
            turned = phase ^ 1
            row = tile_of(i, task) * HOW.block_n
            stamp(source.stamps, PRODUCER, done + i, "begins")
            mbarrier.wait(ring.k_free.index(at), turned)
            stamp(source.stamps, PRODUCER, done + i, "k free")
            mbarrier.expect(ring.k_full.index(at), BYTES)
            copy_rows(source.k, task, row, ring.k_full.index(at), ring.k.index(at))
            stamp(source.stamps, PRODUCER, done + i, "k asked")
            mbarrier.wait(ring.v_free.index(at), turned)
            stamp(source.stamps, PRODUCER, done + i, "v free")
            mbarrier.expect(ring.v_full.index(at), BYTES)
            copy_rows(source.v, task, row, ring.v_full.index(at), ring.v.index(at))
            stamp(source.stamps, PRODUCER, done + i, "v asked")
        done += task.tiles
        if source.x is not None:  # behind the keys: it is the last that they wait for
            mbarrier.wait(ring.x_free.index(0), (r & 1) ^ 1)
            mbarrier.expect(ring.x_full.index(0), GROUPS * source.x.block_type.nbytes)
            for g in gl.static_range(GROUPS):
                copy_rows(source.x, task, task.row + ROWS * g, ring.x_full.index(0),
                          ring.x.index(g))  # fmt: skip


@gluon.jit
def matrix(tile):
    """A buffer [1, 1, rows, block_d] as [rows, block_d]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def new_ring(source, HOW: gl.constexpr):
    """Of a program."""
    GROUPS: gl.constexpr = HOW.groups
    STAGES: gl.constexpr = HOW.stages
    D: gl.constexpr = HOW.block_d
    N: gl.constexpr = HOW.block_n
    q, k, v = source.q, source.k, source.v
    own_q = gl.allocate_shared_memory(q.dtype, [GROUPS, 1, 1, ROWS, D], q.layout)
    own_x = own_q  # without x nobody touches it
    if source.x is not None:
        x = source.x
        own_x = gl.allocate_shared_memory(x.dtype, [GROUPS, 1, 1, ROWS, D], x.layout)
    ring = Ring(
        own_q,
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, N, D], k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, N, D], v.layout), own_x,
        barriers(1, 1), barriers(1, GROUPS), barriers(1, 1), barriers(1, GROUPS),
        barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(STAGES, 1),
        barriers(STAGES, GROUPS), barriers(GROUPS, 1), barriers(1, GROUPS),
        barriers(2 * GROUPS, 1), barriers(GROUPS, 1),
    )  # fmt: skip
    hw.fence_async_shared()
    stamp(source.stamps, 0, 0, "sm")
    if HOW.turns:
        mbarrier.arrive(ring.turn.index(0))
    return ring


def boxes_of(read: tuple[torch.Tensor, ...], rows, block_d: int) -> tuple[launch.Box, ...]:
    """`launch.boxes_of_rows` of q and what else is read, with their layouts in shared memory.
    ValueError for heads that Hopper's kernels cannot read: not of 16 bits, D > 128, or not to
    be addressed by the copy engine."""
    if read[0].itemsize != 2 or read[0].shape[3] > 128 or not launch.descriptors_allowed(*read):
        raise ValueError("Hopper's kernel reads 16-bit heads, D ≤ 128, through the copy engine")
    boxes = launch.boxes_of_rows(read, rows[: len(read)], block_d)
    return tuple(
        (*box, gl.NVMMASharedLayout.get_default_for(box[2], GLUON[t.dtype]))
        for t, box in zip(read, boxes, strict=True)
    )
