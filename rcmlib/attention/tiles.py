"""Which tile of attention a GPU gets: forward, backward and 8-bit, by head size and dtype.

D ≤ 128 on sm_90 was measured (chapters 6, 8 and 12); the other tiles compile without a register
spilled in a loop (tests/test_compilation.py).
"""

import math
from dataclasses import replace

import torch
import triton

from rcmlib import core
from rcmlib.core.launch import Team, Tile

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
    if core.copy_engine(dtype, capability):
        if block_d == 128:
            return Tile(64, 64, num_warps=4, num_stages=3)
        return Tile(64, 128, num_warps=4, num_stages=2)
    if block_d == 128:
        return Tile(128, 32, num_warps=8, num_stages=3)
    return Tile(64, 64, num_warps=4, num_stages=3)


# TFLOP/s of long sequences on an H200 (one run, in no record yet): of the plain kernel, of two
# groups, of three; without and with a causal mask.
RATES = {64: ((541, 528, 613), (486, 489, 469)), 128: ((650, 768, 0), (570, 706, 0))}


def choose_team(
    shape: tuple[int, int, int, int], dtype: torch.dtype, capability: tuple[int, int],
    is_causal: bool, sms: int | None,
) -> Team | None:  # fmt: skip
    """Who computes attention on Hopper; None where the plain kernel is faster, or has to.

    The fastest by a count: of the rounds in which so many SMs do all blocks of queries (causal:
    pairs of blocks), of the queries in a block, and of the rate on long sequences.
    shape: heads of all samples, queries, keys, D. sms: of the GPU; None where there is none:
    then only the rates count.
    """
    heads, q_len, kv_len, head_dim = shape
    if capability[0] != 9 or dtype == torch.float32 or head_dim > 128:
        return None

    def blocks(rows):
        return triton.cdiv(heads * triton.cdiv(q_len, rows), 2 if is_causal else 1)

    def time(rows, rate, least=1):
        rounds = max(least, triton.cdiv(blocks(rows), sms)) if sms else 1 / rows
        return rounds * rows / rate if rate else math.inf

    plain, two, three = RATES[max(64, triton.next_power_of_2(head_dim))][is_causal]
    # Of the plain kernel's programs an SM has two or three at a time.
    times = {1: time(64, plain, least=2), 2: time(128, two), 3: time(192, three)}
    if sms and blocks(128) < sms / 2:  # too few to be worth the longer start
        return None
    groups = min(times, key=times.get)
    if groups == 1:
        return None
    fixed = dtype == torch.bfloat16 and kv_len > SHORT
    registers = 160 if groups == 3 else 240
    return Team(128, groups, 2, registers, turns=True, fixed=fixed)


LONG = 1024  # queries and keys; gradients of fewer were not timed


def hopper_gradients(
    shape: tuple[int, int, int, int], dtype: torch.dtype, capability: tuple[int, int],
    sms: int | None,
) -> bool:  # fmt: skip
    """Does Hopper's own kernel compute the gradients?

    Where each of so many SMs gets 128 keys, and lengths are such that a head's dq, padded to
    128 queries and 64 or 128 channels, is not much larger than it would be. The copy engine
    has to be able to address dk and dv, too: D in multiples of 8.
    shape, sms: as for `choose_team`; with None it computes whatever it can.
    """
    heads, q_len, kv_len, head_dim = shape
    if capability[0] != 9 or dtype == torch.float32 or head_dim > 128 or head_dim % 8 != 0:
        return False
    enough = heads * triton.cdiv(kv_len, 128) >= (sms or 0)
    return sms is None or (enough and min(q_len, kv_len) >= LONG)


def few_rows(blocks: int, device: torch.device) -> bool:
    """Are so many blocks of 128 rows too few to keep the SMs of this GPU busy?

    Then a program owns one block of 64, so that there are more of them, and reads by pointers:
    encoding three descriptors takes a third of a launch that takes longer than its kernel.
    """
    sms = core.multiprocessors(device)
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
    if core.copy_engine(dtype, capability):
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
