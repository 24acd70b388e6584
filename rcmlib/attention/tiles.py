"""Which tile of attention a GPU gets: forward, backward and 8-bit, by head size and dtype.

D ≤ 128 on sm_90 was measured (chapters 6, 7 and 11); the other lines compile without a register
spilled in a loop (tests/test_compilation.py).
"""

import math
from dataclasses import replace

import torch
import triton

from rcmlib.core import copy_engine, multiprocessors
from rcmlib.core.launch import Tile

LOG2_E = math.log2(math.e)  # exp(s) = exp2(s·log2 e), and exp2 is one GPU instruction
SHORT = 512  # keys: below, one loop that keeps track of the maximum is faster than two


def choose_tile(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], tma: bool = True,
    pairs: bool = True, long: bool = True,
) -> Tile:  # fmt: skip
    """The tile for a GPU of this compute capability, without a register spilled in its loop.

    tma: the copy engine reads q, k and v, where that pays (`copy_engine`). pairs: a program
    may own two blocks of rows. long: there are more than SHORT keys.
    Weights relative to a fixed maximum may be as large as 2¹²⁰: float16 cannot hold them, and
    for sm_100 Triton 3.6 does not compile the check of their sums. float32 uses the ordinary
    FMA units, for IEEE products, and keeps its operands in registers, so its tiles are small.
    sm_90 and sm_100 have 227 KiB of shared memory, enough for two or three programs on an SM;
    sm_89 and sm_120 have 99.
    """
    block_d = triton.next_power_of_2(head_dim)
    if dtype == torch.float32:
        if block_d == 256:
            return Tile(32, 16, num_warps=16, num_stages=1)
        return Tile(32, 32, num_warps=8, num_stages=1)
    if block_d == 256:
        return Tile(64, 32, num_warps=8, num_stages=2)
    if capability[0] == 9:
        fixed = dtype == torch.bfloat16 and long
        tile = Tile(64, 64, num_warps=4, num_stages=3, fixed=fixed)
        if block_d == 128:
            return replace(tile, num_stages=2, two=True) if tma and pairs else tile
        # Limits under which three programs fit on an SM.
        if tma and fixed:
            return replace(tile, maxnreg=128)
        if tma:
            return Tile(64, 128, num_warps=4, num_stages=2, maxnreg=168)
        return tile
    if copy_engine(dtype, capability):
        if block_d == 128:
            return Tile(64, 64, num_warps=4, num_stages=3)
        return Tile(64, 128, num_warps=4, num_stages=2)
    if block_d == 128:
        return Tile(128, 32, num_warps=8, num_stages=3)
    return Tile(64, 64, num_warps=4, num_stages=3)


def few_rows(blocks: int, device: torch.device) -> bool:
    """Are so many blocks of 128 rows too few to keep the SMs of this GPU busy?

    Then a program owns one block of 64, so that there are more of them, and reads by pointers:
    encoding three descriptors takes a third of a launch that takes longer than its kernel.
    """
    sms = multiprocessors(device)
    return sms is not None and blocks < 1.5 * sms


def choose_backward_tiles(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], tma: bool, is_causal: bool
) -> tuple[Tile, Tile]:
    """(`dkdv_kernel`'s tile, `dq_kernel`'s), both without a register spilled in a loop.

    Two stages also keep loop-invariant operands in shared memory, where one stage has the
    compiler hold them in registers, and spill.
    """
    block_d = triton.next_power_of_2(head_dim)
    if dtype == torch.float32:
        if block_d <= 64:
            return Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)
        if block_d == 256:
            return Tile(16, 16, 16, 1), Tile(16, 16, 8, 2)
        return Tile(16, 32, 8, 1), Tile(16, 16, 8, 2)
    if copy_engine(dtype, capability):
        if block_d == 256:
            return Tile(16, 64, 8, 2), Tile(64, 32, 8, 2)
        # Masks, and addresses where there is no copy engine, need registers, too.
        if block_d == 128 and tma and not is_causal:
            return Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)
        return Tile(32, 64, 4, 3), Tile(64, 64, 4, 2)
    if block_d == 256:
        return Tile(16, 64, 8, 1), Tile(64, 32, 8, 1)
    if block_d == 128:
        return Tile(32, 64, 8, 2), Tile(64, 32, 8, 2)
    block_m = 16 if is_causal else 32  # the mask needs registers, too
    return Tile(block_m, 64, 4, 2), Tile(64, 32, 4, 2)


def choose_sage_tile(head_dim: int, pv: str, capability: tuple[int, int]) -> Tile:
    """The tile of `sage_attention_kernel` for a GPU of this compute capability."""
    block_d = max(32, triton.next_power_of_2(head_dim))
    if capability[0] == 9:
        if block_d == 256:
            return Tile(64, 64, num_warps=8, num_stages=2)
        block_n = 64 if pv == "fp8_fp16" else 128
        if block_d == 128:
            return Tile(64, block_n, num_warps=4, num_stages=2, maxnreg=168)
        return Tile(64, block_n, num_warps=4, num_stages=3, maxnreg=128)
    if block_d == 256:
        return Tile(32, 64, num_warps=8, num_stages=2)
    return Tile(64, 64, num_warps=8, num_stages=3)
