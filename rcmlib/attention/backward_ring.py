"""Who copies for Hopper's gradients (hopper_backward.py), and into which buffers.

Buffers, mbarriers and phases are as in ring.py. q has twice as many stages as g: scores of the
next tile are begun while this one's q is still multiplied.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hw
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from rcmlib.attention.ring import ROWS, SMEM, barriers, copy_rows, place


class Ring(NamedTuple):
    """A program's shared memory, and the mbarriers that say who may touch it (ring.py)."""

    k: SMEM  # [2, 1, 1, 64, block_d], a group's keys each; so v
    v: SMEM
    q: SMEM  # [2·stages, 1, 1, block_n, block_d]: scores are begun a tile ahead
    g: SMEM  # [stages, 1, 1, block_n, block_d]
    lse: SMEM  # [2·stages, block_n] float32, with q; so delta
    delta: SMEM
    ds: SMEM  # [4, 64, block_n]: of two tiles, of two groups
    k_full: SMEM
    v_full: SMEM
    q_full: SMEM
    q_free: SMEM
    g_full: SMEM
    g_free: SMEM
    ds_free: SMEM  # of a tile: both groups have multiplied it with k
    last: SMEM  # both have stored the last tile's; then, both have read k


class Task(NamedTuple):
    """128 keys, and the tiles of block_n queries that see them."""

    sample: gl.tensor
    head: gl.tensor
    row: gl.tensor  # the first key
    start: gl.tensor  # the first tile of queries
    masked: gl.tensor  # tiles before this one need a mask
    tiles: gl.tensor  # so many there are from `start` on
    q_len: gl.tensor
    kv_len: gl.tensor
    heads: gl.tensor


@gluon.jit
def copy_keys(source, task, full, to, HOW: gl.constexpr):
    """Both groups' rows of k or v."""
    mbarrier.expect(full, 4 * ROWS * HOW.block_d)
    for w in gl.static_range(2):
        copy_rows(source, task, task.row + ROWS * w, full, to.index(w))


@gluon.jit
def produce(q, k, v, g, ring, task, HOW: gl.constexpr):
    """One warp: k and v, each tile of q and g, and one of q more: scores are begun for a tile
    that does not exist."""
    M: gl.constexpr = HOW.block_n
    BYTES: gl.constexpr = 2 * M * HOW.block_d
    copy_keys(k, task, ring.k_full.index(0), ring.k, HOW)
    for i in range(task.tiles + 1):
        at, phase = place(i, 2 * HOW.stages)
        row = (task.start + i) * M
        mbarrier.wait(ring.q_free.index(at), phase ^ 1)
        mbarrier.expect(ring.q_full.index(at), BYTES)
        copy_rows(q, task, row, ring.q_full.index(at), ring.q.index(at))
        if i == 0:  # behind what the first scores need
            copy_keys(v, task, ring.v_full.index(0), ring.v, HOW)
        if i < task.tiles:
            at, phase = place(i, HOW.stages)
            mbarrier.wait(ring.g_free.index(at), phase ^ 1)
            mbarrier.expect(ring.g_full.index(at), BYTES)
            copy_rows(g, task, row, ring.g_full.index(at), ring.g.index(at))


@gluon.jit
def copy_numbers(lse, delta, ring, task, HOW: gl.constexpr):
    """One warp: lse and δ of each tile of queries, which the copy engine cannot address at any
    length. Beyond the last query lse = ∞ makes P = 0, so that nothing is added."""
    M: gl.constexpr = HOW.block_n
    rows = task.start * M + gl.arange(0, M, gl.BlockedLayout([1], [32], [1], [0]))
    for i in range(task.tiles + 1):
        at, phase = place(i, 2 * HOW.stages)
        mbarrier.wait(ring.q_free.index(at), phase ^ 1)
        inside = rows < task.q_len
        found = gl.load(lse + rows, mask=inside, other=float("inf"))
        ring.lse.index(at).store(found)
        found = gl.load(delta + rows, mask=inside, other=0.0)
        ring.delta.index(at).store(found)
        mbarrier.arrive(ring.q_full.index(at))
        rows += M


@gluon.jit
def new_ring(q, k, v, g, HOW: gl.constexpr):
    """Of a program."""
    M: gl.constexpr = HOW.block_n
    D: gl.constexpr = HOW.block_d
    STAGES: gl.constexpr = HOW.stages
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, M], q.dtype)
    ring = Ring(
        gl.allocate_shared_memory(k.dtype, [2, 1, 1, ROWS, D], k.layout),
        gl.allocate_shared_memory(v.dtype, [2, 1, 1, ROWS, D], v.layout),
        gl.allocate_shared_memory(q.dtype, [2 * STAGES, 1, 1, M, D], q.layout),
        gl.allocate_shared_memory(g.dtype, [STAGES, 1, 1, M, D], g.layout),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, M], flat),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, M], flat),
        gl.allocate_shared_memory(q.dtype, [4, ROWS, M], ds_layout),
        barriers(1, 1), barriers(1, 1), barriers(2 * STAGES, 2), barriers(2 * STAGES, 2),
        barriers(STAGES, 1), barriers(STAGES, 2), barriers(2, 2), barriers(1, 2),
    )  # fmt: skip
    hw.fence_async_shared()
    return ring
