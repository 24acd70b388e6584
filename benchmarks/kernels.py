"""Two kernels that do one thing only, so that what they cost is known."""

import triton
import triton.language as tl


@triton.jit
def flush_l2_kernel(buffer, sink, BLOCK: tl.constexpr):
    """Reads BLOCK float32 a program. Of a buffer larger than L2, nothing else stays in it.

    Reading leaves clean lines: what is evicted after it costs no write of ours. The store
    keeps the compiler from dropping the loads; on a buffer of zeros it never happens.
    """
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.max(tl.abs(tl.load(buffer + at)), 0)
    tl.store(sink, found, mask=found > 0)


@triton.jit
def exp2_kernel(out, steps, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """BLOCK chains x ← 2^(-x) of steps·UNROLL links a program, in registers.

    The same ex2.approx.ftz that the attention kernels use. A chain settles at 0.64, so no
    number overflows. The sign costs one addition, of which an SM does eight in the time of
    one exp2; each exp2 needs the last, so none can be folded (tests/test_roofline.py).
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = at.to(tl.float32)
    for _ in range(steps):
        for _ in tl.static_range(UNROLL):
            x = tl.exp2(-x)
    tl.store(out + at, x)
