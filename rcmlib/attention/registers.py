"""What four warps hold in registers (hopper.py): scores, weights, and their sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rcmlib.attention.forward import LIMIT, LOWEST
from rcmlib.attention.ring import ROWS, tile_of


@gluon.constexpr_function
def in_registers(cols):
    """How a product [64, cols] lies in the registers of four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def hide(s, G: gl.constexpr, i, task, HOW: gl.constexpr):
    """The scores of the i-th tile; -inf where a query does not see the key."""
    layout: gl.constexpr = s.type.layout
    # A thread's columns are 8 apart: its own part against constants. As columns in registers,
    # which the compiler would keep, they would be spilled.
    cols = gl.arange(0, HOW.block_n, gl.SliceLayout(0, layout))
    own, constant = (cols & 7)[None, :], (cols & -8)[None, :]
    start = tile_of(i, task) * HOW.block_n
    visible = own < task.kv_len - start - constant
    if HOW.causal:
        rows = task.row - start + ROWS * G + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        visible = visible & (own - rows[:, None] <= -constant)
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def weigh(s, m, l, qk_scale, FIXED: gl.constexpr):
    """(weights p, the maximum m [64], their sum l, what earlier sums are to be scaled by)."""
    alpha = m
    if not FIXED:
        larger = gl.maximum(m, gl.max(s, 1) * qk_scale)
        alpha = gl.exp2(m - larger)
        m, l = larger, rescale(l, alpha)
    p = gl.exp2(s * qk_scale - m[:, None])
    parts = gl.sum(p.reshape([ROWS, p.shape[1] // 8, 8]), 1)
    return p, m, l + gl.convert_layout(parts, l.type.layout), alpha


@gluon.jit
def rescale(acc, alpha):
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def as_operand(p, acc, dtype: gl.constexpr):
    """The weights in 16 bits, as the left operand of acc += p v takes them from registers."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, acc.type.layout, 2))


@gluon.jit
def no_sums(HOW: gl.constexpr):
    """(m [64], l [64, 8], acc [64, block_d]) of no tiles. l: the weights' sum in eight parts,
    each one thread's own."""
    D: gl.constexpr = HOW.block_d
    rows: gl.constexpr = gl.SliceLayout(1, in_registers(HOW.block_n))
    m = gl.full([ROWS], LOWEST, gl.float32, rows)
    acc = gl.zeros([ROWS, D], gl.float32, in_registers(D))
    return m, gl.zeros([ROWS, 8], gl.float32, in_registers(8)), acc


@gluon.jit
def overflowed(acc, l):
    """A row: 1 where a weight made a sum too large for float32, or not a number; or 0."""
    fine = gl.min((gl.abs(acc) < LIMIT).to(gl.int32), 1)
    sums = gl.convert_layout((gl.sum(l, 1) < LIMIT).to(gl.int32), fine.type.layout)
    return 1 - gl.minimum(fine, sums)
