"""The skip alone, out = c_skip·x + c_out·f, and its gradients.

    dx = c_skip·g,   df = c_out·g,   dc_skip = Σ g·x,   dc_out = Σ g·f      (g = ∂L/∂out)

x, f, g [B, R, C], any strides with a contiguous last dimension; results are contiguous.
c_skip, c_out are one number each, or [B] (one a sample). One program owns a
BLOCK_R × BLOCK_C tile of one sample.

HBM: forward reads x and f once and writes out once, backward reads g and writes dx and df
(and reads x and f, if their coefficients want a gradient). The roofline is a copy's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmlib.core import launch
from rcmlib.core.epilogue import load_coefficient, skip_epilogue

TILE = 4096  # elements a program: 8 KiB a tensor in bf16, 32 elements a thread


@triton.jit
def skip_kernel(x, f, out, c_skip, c_out, rows, cols, x_strides, f_strides,
                BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                PER_SAMPLE: tl.constexpr):  # fmt: skip
    """x_strides, f_strides: between samples and rows."""
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(cols, BLOCK_C)
    row_tiles = tl.cdiv(rows, BLOCK_R)
    b = pid // col_tiles // row_tiles
    r = (pid // col_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = (pid % col_tiles * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (r < rows) & (c < cols)

    b64, r64 = tl.cast(b, tl.int64), r.to(tl.int64)  # offsets pass 2³¹ in large tensors
    x_tile = tl.load(x + b64 * x_strides[0] + r64 * x_strides[1] + c, mask=inside)
    f_tile = tl.load(f + b64 * f_strides[0] + r64 * f_strides[1] + c, mask=inside)
    result = skip_epilogue(x_tile.to(tl.float32), f_tile.to(tl.float32),
                           load_coefficient(c_skip, b, PER_SAMPLE),
                           load_coefficient(c_out, b, PER_SAMPLE))  # fmt: skip
    tl.store(out + (b64 * rows + r64) * cols + c, result.to(out.dtype.element_ty), inside)


@triton.jit
def skip_backward_kernel(grad, x, f, dx, df, x_dots, f_dots, c_skip, c_out, rows, cols,
                         g_strides, x_strides, f_strides,
                         WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
                         BLOCK_C: tl.constexpr,
                         PER_SAMPLE: tl.constexpr):  # fmt: skip
    """dx and df, if not None; and for x and f, if not None, their products with g,
    summed over WIDTH columns, as [B, cols / WIDTH, R]. The caller adds up those."""
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(cols, WIDTH)
    row_tiles = tl.cdiv(rows, BLOCK_R)
    b = pid // col_tiles // row_tiles
    r = pid // col_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_C)[None, :]
    c = pid % col_tiles * WIDTH + inner
    inside = (r < rows)[:, None] & (inner < WIDTH) & (c < cols)

    b64, r64 = tl.cast(b, tl.int64), r[:, None].to(tl.int64)
    g_tile = grad + b64 * g_strides[0] + r64 * g_strides[1] + c
    g = tl.load(g_tile, mask=inside, other=0.0).to(tl.float32)
    here = (b64 * rows + r64) * cols + c
    dots_here = (b64 * col_tiles + pid % col_tiles) * rows + r
    if dx is not None:
        result = load_coefficient(c_skip, b, PER_SAMPLE) * g
        tl.store(dx + here, result.to(dx.dtype.element_ty), inside)
    if df is not None:
        result = load_coefficient(c_out, b, PER_SAMPLE) * g
        tl.store(df + here, result.to(df.dtype.element_ty), inside)
    if x is not None:
        x_tile = x + b64 * x_strides[0] + r64 * x_strides[1] + c
        x_tile = tl.load(x_tile, inside, other=0.0).to(tl.float32)
        tl.store(x_dots + dots_here, tl.sum(g * x_tile, 1), r < rows)
    if f is not None:
        f_tile = f + b64 * f_strides[0] + r64 * f_strides[1] + c
        f_tile = tl.load(f_tile, inside, other=0.0).to(tl.float32)
        tl.store(f_dots + dots_here, tl.sum(g * f_tile, 1), r < rows)


def skip_plan(x: Tensor, f: Tensor, per_sample: bool) -> launch.Plan:
    """The launch of `skip_kernel` for tensors like these."""
    if x.is_contiguous() and f.is_contiguous():  # one row a sample: every tile is full
        x, f = (t.view(t.shape[0], 1, -1) for t in (x, f))
    batch, rows, cols = x.shape
    block_r, block_c = block_of(rows, cols)
    return launch.Plan(
        skip_kernel, batch * triton.cdiv(rows, block_r) * triton.cdiv(cols, block_c),
        rows, cols, x.stride()[:2], f.stride()[:2],
        BLOCK_R=block_r, BLOCK_C=block_c, PER_SAMPLE=per_sample,
    )  # fmt: skip


def skip_forward(x, f, c_skip, c_out, plan: launch.Plan | None = None) -> torch.Tensor:
    """Launches `skip_kernel` on checked inputs (see `rcmlib.rcm_skip`).

    x, f: [B, R, C] with a contiguous last dimension, or contiguous [B, …]. c_skip, c_out: two
    floats or two [B]. plan: the one of these arguments, if it is known.
    """
    out = launch.result(x, x.shape)
    if plan is None:
        per_sample = isinstance(c_skip, torch.Tensor)
        key = launch.key_of("rcm_skip", (x, f, c_skip, c_out))
        plan = launch.planned(key, lambda: skip_plan(x, f, per_sample))
    plan.launch(x, f, out, c_skip, c_out)
    return out


def skip_backward_plan(grad, x, f, width: int | None, per_sample: bool) -> launch.Plan:
    """The launch of `skip_backward_kernel` for tensors like these."""
    batch, rows, cols = grad.shape
    width = width or block_of(rows, cols)[1]
    block_r, block_c = block_of(rows, width)
    x_strides, f_strides = ((0, 0) if t is None else t.stride()[:2] for t in (x, f))
    return launch.Plan(
        skip_backward_kernel,
        batch * triton.cdiv(rows, block_r) * triton.cdiv(cols, width),
        rows, cols, grad.stride()[:2], x_strides, f_strides,
        WIDTH=width, BLOCK_R=block_r, BLOCK_C=block_c, PER_SAMPLE=per_sample,
    )  # fmt: skip


def skip_backward(grad, x, f, c_skip, c_out, width, dx_dtype, df_dtype) -> tuple[Tensor, ...]:
    """(dx, df, x_dots, f_dots) from g = grad, x, f [B, R, C]; empty where not asked for.

    dx and df are computed if their dtype is given, the dots of g with x and f if those are
    given: float32 [B, C / width, R], each over `width` neighbouring columns (an attention
    head, say; None leaves the choice here). c_skip, c_out: two floats or two [B].
    """
    dx, df, x_dots, f_dots = results = skip_results(grad, x, f, width, dx_dtype, df_dtype)
    options = (width, dx_dtype, df_dtype)
    key = launch.key_of("skip_backward", (grad, x, f, c_skip, c_out), *options)
    per_sample = isinstance(c_skip, torch.Tensor)
    plan = launch.planned(key, lambda: skip_backward_plan(grad, x, f, width, per_sample))
    plan.launch(
        grad, x, f, dx if dx_dtype else None, df if df_dtype else None, x_dots, f_dots,
        c_skip, c_out,
    )  # fmt: skip
    return results


def skip_results(grad, x, f, width, dx_dtype, df_dtype) -> tuple[Tensor, ...]:
    """What `skip_backward` fills."""
    batch, rows, cols = grad.shape
    dots = batch, triton.cdiv(cols, width or block_of(rows, cols)[1]), rows
    return (
        launch.result(grad, grad.shape, dx_dtype, dx_dtype),
        launch.result(grad, grad.shape, df_dtype, df_dtype),
        launch.result(grad, dots, torch.float32, x is not None),
        launch.result(grad, dots, torch.float32, f is not None),
    )


def block_of(rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns of one program's tile, powers of two, TILE elements in all."""
    block_c = min(triton.next_power_of_2(cols), TILE)
    return min(triton.next_power_of_2(rows), TILE // block_c), block_c
