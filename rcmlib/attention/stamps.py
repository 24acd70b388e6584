"""The clocks at which a kernel's warps come to the moments of a tile, noted by themselves.

stamps: int64 [programs, LANES, MOST_TILES, 8], or None, as in every call of the library: then
no instruction of this file is compiled. A lane is a party of a program: a group of four warps,
Hopper's producer, or one of the plain kernel's two blocks of rows. All warps of an SM read one
clock. `python -m benchmarks suites timeline` asks for them.
"""

import triton
import triton.language as tl

LANES, MOST_TILES = tl.constexpr(4), tl.constexpr(2048)
PRODUCER = tl.constexpr(3)  # its lane
# "sm", the number of the SM, stands in a program's first lane, at its first tile.
MOMENTS = ("begins", "turn", "k here", "asked", "scores", "weights", "p v done", "sm")
PRODUCED = ("begins", "k free", "k asked", "v free", "v asked")


@triton.constexpr_function
def place_of(moment):
    return (PRODUCED if moment in PRODUCED else MOMENTS).index(moment)


@triton.jit
def stamp(stamps, lane, n, moment: tl.constexpr):
    """Notes that a lane comes to a moment of its n-th tile. One of its threads does."""
    if stamps is not None:
        if moment == "sm":
            asm: tl.constexpr = "{.reg .b32 n; mov.u32 n, %smid; cvt.u64.u32 $0, n;}"
        else:
            asm: tl.constexpr = "mov.u64 $0, %clock64;"
        # Not pure: where it stands it stays, between the waits around it.
        now = tl.inline_asm_elementwise(asm, "=l", [], tl.int64, is_pure=False, pack=1)
        own = (tl.program_id(0) * LANES + lane) * MOST_TILES + n
        tl.store(stamps + own * 8 + place_of(moment), now)
