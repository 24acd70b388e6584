"""The ring of buffers between the warp that copies and those that multiply (hopper.py).

A buffer has two mbarriers. Each counts arrivals and turns a phase when all are there; who
waits for a phase needs no lock. full: the copy engine arrives with a tile's last byte.
free: every group of consumers arrives once it has read the tile. In round r of the ring,
waiting for full is waiting for phase r mod 2, and for free for the phase before.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hw
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS = gl.constexpr(64)  # of a group: one wgmma's
SMEM = gl.shared_memory_descriptor


class Ring(NamedTuple):
    """A program's shared memory, and the mbarriers that say who may touch it."""

    q: SMEM  # [groups, 1, 1, 64, block_d]
    k: SMEM  # [stages, 1, 1, block_n, block_d]; so v
    v: SMEM
    q_full: SMEM
    k_full: SMEM  # a stage: its copy has arrived
    k_free: SMEM  # a stage: all groups have read it
    v_full: SMEM
    v_free: SMEM
    turn: SMEM  # a group: it may issue products
    done: SMEM  # no group needs the ring any more
    again: SMEM  # two a group, full and free, of its second pass
    next: SMEM  # a group: its second pass may begin


class Task(NamedTuple):
    """A program's queries, and their key tiles: first `whole` … `tiles`, then 0 … `whole`."""

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
def own_task(heads, q_len, kv_len, HOW: gl.constexpr):
    BLOCK: gl.constexpr = ROWS * HOW.groups
    N: gl.constexpr = HOW.block_n
    blocks = gl.cdiv(q_len, BLOCK)
    pid = gl.program_id(0)
    block = pid % blocks
    if HOW.causal:
        block = blocks - 1 - block  # longest rows first: no straggler ends the launch
    row = block * BLOCK
    whole, stop = kv_len // N, kv_len
    if HOW.causal:
        whole = gl.minimum(whole, row // N)
        stop = gl.minimum(stop, row + BLOCK)
    tiles = gl.cdiv(stop, N)
    if HOW.fixed:  # a maximum of half a tile at least: one key's may be far too low
        whole = gl.minimum(whole, (stop - N // 2) // N)
    whole = gl.maximum(gl.minimum(whole, tiles - 1), 0)
    return Task(pid // blocks // heads, pid // blocks % heads, row, whole, tiles, kv_len)


@gluon.jit
def tile_of(i, task):
    """The i-th tile in the order of work."""
    masked = task.tiles - task.whole
    return gl.where(i < masked, task.whole + i, i - masked)


@gluon.jit
def copy_rows(source, task, row, full, to):
    tma.async_copy_global_to_shared(source, [task.sample, task.head, row, 0], full, to)


@gluon.jit
def produce(q, k, v, ring, task, HOW: gl.constexpr):
    """One warp: q once, then every tile of k and v as soon as its buffer is free."""
    BYTES: gl.constexpr = 2 * HOW.block_n * HOW.block_d
    GROUPS: gl.constexpr = HOW.groups
    mbarrier.expect(ring.q_full.index(0), 2 * GROUPS * ROWS * HOW.block_d)
    for g in gl.static_range(GROUPS):
        copy_rows(q, task, task.row + ROWS * g, ring.q_full.index(0), ring.q.index(g))
    for i in range(task.tiles):
        at = i % HOW.stages
        turned = ((i // HOW.stages) & 1) ^ 1  # the first round waits for nobody
        row = tile_of(i, task) * HOW.block_n
        mbarrier.wait(ring.k_free.index(at), turned)
        mbarrier.expect(ring.k_full.index(at), BYTES)
        copy_rows(k, task, row, ring.k_full.index(at), ring.k.index(at))
        mbarrier.wait(ring.v_free.index(at), turned)
        mbarrier.expect(ring.v_full.index(at), BYTES)
        copy_rows(v, task, row, ring.v_full.index(at), ring.v.index(at))


@gluon.jit
def matrix(tile):
    """A buffer [1, 1, rows, block_d] as [rows, block_d]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def new_ring(q, k, v, HOW: gl.constexpr):
    """Of a program, for tiles of these descriptors."""
    GROUPS: gl.constexpr = HOW.groups
    STAGES: gl.constexpr = HOW.stages
    D: gl.constexpr = HOW.block_d
    N: gl.constexpr = HOW.block_n
    ring = Ring(
        gl.allocate_shared_memory(q.dtype, [GROUPS, 1, 1, ROWS, D], q.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, N, D], k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, N, D], v.layout),
        barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(STAGES, 1),
        barriers(STAGES, GROUPS), barriers(GROUPS, 1), barriers(1, GROUPS),
        barriers(2 * GROUPS, 1), barriers(GROUPS, 1),
    )  # fmt: skip
    hw.fence_async_shared()
    if HOW.turns:
        mbarrier.arrive(ring.turn.index(0))
    return ring
