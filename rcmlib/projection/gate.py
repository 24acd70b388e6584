"""The gate of a gated residual, out = x + gate·f: how a kernel loads it, and its gradient.

    df = gate·g,   dgate = g·f, summed over the tokens that share a gate     (g = ∂L/∂out)

x, f, g [B, N, C]; gate [B, C], one for all tokens of a sample, or [B, N, C].

HBM, backward: reads g and f, writes df (and dgate, where every token has its own).
"""

import torch
import triton
import triton.language as tl

from rcmlib.core import launch


@triton.jit
def load_gate(gate, b, n, c, inside, strides, PER_TOKEN: tl.constexpr):
    """The gate of a tile in float32: [BLOCK_M, BLOCK_N], or [1, BLOCK_N] for all tokens."""
    row = gate + tl.cast(b, tl.int64) * strides[0] + c
    if PER_TOKEN:
        return tl.load(row + n * strides[1], mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.load(row, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gate_backward_kernel(grad, f, gate, df, dgate, rows, cols,
                         g_strides, c_strides,
                         BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                         PER_TOKEN: tl.constexpr):  # fmt: skip
    """df = gate·g and dgate = g·f, each if not None. Unless the gate is PER_TOKEN, dgate is
    summed over BLOCK_R tokens, [B, ⌈N / BLOCK_R⌉, C]. The caller adds up those."""
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(cols, BLOCK_C)
    row_tiles = tl.cdiv(rows, BLOCK_R)
    tile = pid // col_tiles
    b = tile // row_tiles
    n = (tile % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = (pid % col_tiles * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (n < rows) & (c < cols)
    b64, n64 = tl.cast(b, tl.int64), n.to(tl.int64)
    g = tl.load(grad + b64 * g_strides[0] + n64 * g_strides[1] + c, mask=inside, other=0.0)
    g = g.to(tl.float32)
    here = (b64 * rows + n64) * cols + c
    if df is not None:
        scale = load_gate(gate, b, n64, c, inside if PER_TOKEN else c < cols,
                          c_strides, PER_TOKEN)  # fmt: skip
        tl.store(df + here, (scale * g).to(df.dtype.element_ty), mask=inside)
    if f is not None:
        product = g * tl.load(f + here, mask=inside, other=0.0).to(tl.float32)
        if PER_TOKEN:
            tl.store(dgate + here, product.to(dgate.dtype.element_ty), mask=inside)
        else:
            sums = tl.sum(product, 0)[None, :]
            tl.store(dgate + tl.cast(tile, tl.int64) * cols + c, sums, mask=c < cols)


ROWS, COLS = 32, 128  # of one program's tile


def gate_backward_plan(grad: torch.Tensor, gate: torch.Tensor) -> launch.Plan:
    """The launch of `gate_backward_kernel` for tensors like these."""
    batch, rows, cols = grad.shape
    return launch.Plan(
        gate_backward_kernel, batch * triton.cdiv(rows, ROWS) * triton.cdiv(cols, COLS),
        rows, cols, grad.stride()[:2], gate_strides(gate),
        BLOCK_R=ROWS, BLOCK_C=COLS, PER_TOKEN=gate.ndim == 3,
    )  # fmt: skip


def gate_backward(grad, f, gate, df_dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(df, dgate) from g = grad [B, N, C], f (contiguous) and the gate. df is computed if its
    dtype is given, dgate, in the gate's shape and dtype, if f is; else they are empty."""
    batch, rows, cols = grad.shape
    per_token = gate.ndim == 3
    df = launch.result(grad, grad.shape, df_dtype, df_dtype)
    shape = grad.shape if per_token else (batch, triton.cdiv(rows, ROWS), cols)
    dtype = gate.dtype if per_token else torch.float32
    dgate = launch.result(grad, shape, dtype, f is not None)
    key = launch.key_of("gate_backward", (grad, f, gate), df_dtype)
    plan = launch.planned(key, lambda: gate_backward_plan(grad, gate))
    plan.launch(grad, f, gate, df if df_dtype else None, dgate)
    if f is not None and not per_token:
        dgate = dgate.sum(1, dtype=torch.float64).to(gate.dtype)
    return df, dgate


def gate_strides(gate: torch.Tensor) -> tuple[int, int]:
    """Between samples and between tokens (0 for a gate [B, C]: all tokens share it)."""
    return gate.stride(0), gate.stride(1) if gate.ndim == 3 else 0
