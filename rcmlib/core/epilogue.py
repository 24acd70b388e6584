"""The skip, as one jit function that every forward kernel calls before it stores its tile.

    out = c_skip·x + c_out·f               (the f_θ of rCM, arXiv 2510.08431, and of EDM)

x and f are float32 register tiles; the coefficients float32 scalars of one sample, or c_out
a tile of them (a gate, which has one for each channel).
"""

import triton
import triton.language as tl


@triton.jit
def skip_epilogue(x, f, c_skip, c_out):
    """c_skip·x + c_out·f, and exactly c_skip·x where c_out is 0.

    The select makes t = 0 return x bit for bit: adding 0·f would turn -0.0 into 0.0 and an
    overflowed f into NaN. Beside the loads and the store, this costs nothing.
    """
    skip = c_skip * x
    return tl.where(c_out == 0.0, skip, skip + c_out * f)


@triton.jit
def load_coefficient(c, sample, PER_SAMPLE: tl.constexpr):
    """c is a pointer to [B] numbers (PER_SAMPLE), or the one number for all samples."""
    if PER_SAMPLE:
        return tl.load(c + sample).to(tl.float32)
    else:
        return c
