"""The skip alone: out = c_skip·x + c_out·f, pass two of the two-pass baseline.

x, f, out [B, R, C], any strides with a contiguous last dimension; out is contiguous.
c_skip, c_out are one number each, or [B] (one a sample). One program owns a
BLOCK_R × BLOCK_C tile of one sample.

HBM: reads x and f once, writes out once. Nothing else: the roofline is a copy's.
"""

import torch
import triton
import triton.language as tl

from rcmlib.ops.epilogue import kernel_coefficients, load_coefficient, skip_epilogue

TILE = 4096  # elements a program: 8 KiB a tensor in bf16, 32 elements a thread


@triton.jit
def skip_kernel(x, f, out, c_skip, c_out, rows, cols,
                stride_xb, stride_xr, stride_fb, stride_fr,
                BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                PER_SAMPLE: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(cols, BLOCK_C)
    row_tiles = tl.cdiv(rows, BLOCK_R)
    b = pid // col_tiles // row_tiles
    r = (pid // col_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = (pid % col_tiles * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (r < rows) & (c < cols)

    b64, r64 = tl.cast(b, tl.int64), r.to(tl.int64)  # offsets pass 2³¹ in large tensors
    x_tile = tl.load(x + b64 * stride_xb + r64 * stride_xr + c, mask=inside)
    f_tile = tl.load(f + b64 * stride_fb + r64 * stride_fr + c, mask=inside)
    result = skip_epilogue(x_tile.to(tl.float32), f_tile.to(tl.float32),
                           load_coefficient(c_skip, b, PER_SAMPLE),
                           load_coefficient(c_out, b, PER_SAMPLE))  # fmt: skip
    tl.store(
        out + (b64 * rows + r64) * cols + c, result.to(out.dtype.element_ty), inside
    )


def skip_forward(x, f, c_skip, c_out) -> torch.Tensor:
    """Launches `skip_kernel` on checked inputs x, f [B, R, C] (see `rcmlib.rcm_skip`)."""
    batch, rows, cols = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_c = min(triton.next_power_of_2(cols), TILE)
    block_r = min(triton.next_power_of_2(rows), TILE // block_c)
    grid = (batch * triton.cdiv(rows, block_r) * triton.cdiv(cols, block_c),)
    c_skip, c_out, per_sample = kernel_coefficients(c_skip, c_out)
    skip_kernel[grid](
        x, f, out, c_skip, c_out, rows, cols, *x.stride()[:2], *f.stride()[:2],
        BLOCK_R=block_r, BLOCK_C=block_c, PER_SAMPLE=per_sample,
    )  # fmt: skip
    return out
