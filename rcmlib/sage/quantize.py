"""8-bit copies of q, k and v, as kernel.py wants them.

    int8:  t ≈ scale·(round(t / scale)),  scale = max|t| / 127      (q, k; of a group of tokens)
    E4M3:  v ≈ scale·(fp8(v / scale)),    scale = max|v| / limit    (v; of a channel)

t, v [B, H, N, D], any strides with a contiguous last dimension. The copies are padded with
zeros to whole tiles, [B, H, ⌈N⌉, BLOCK_D], so that the attention kernel needs no mask to read
them. V is stored transposed, [B, H, BLOCK_D, ⌈N⌉], in `eight_bit.TOKEN_ORDER`.

Smoothing subtracts a column mean first: of k, which shifts all scores of a query alike and so
leaves the softmax as it is (SageAttention, arXiv 2410.02367); of q and v with a correction
(SageAttention2, arXiv 2411.10958). Specification, bit for bit: `rcmlib.reference.eight_bit`.

HBM: each copy reads 2 bytes an element and writes 1; a mean or a range reads 2 more.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rcmlib.attention.tiles import LOG2_E, choose_sage_tile
from rcmlib.core import device_capability, interpreting, launch
from rcmlib.sage.columns import TINY, column_statistics, load_tile, padded_dim

PAD = 128  # tokens are padded to whole tiles of any size in use
# 1.5·2²³: a float32 of this size has no fraction bits, so adding it rounds to the nearest
# integer, ties to even, and leaves that integer in the low bits.
ROUNDER = tl.constexpr(12582912.0)
E4M3_MAX = 448.0
# |v8| whose sums with any p8 ≤ 448 over 64 keys stay below float16's 65504 (2++).
V_MAX_FP16_SUM = 2.25


@triton.jit
def to_e4m3(x, NATIVE: tl.constexpr):
    """float32 to FP8 E4M3, to nearest, ties to even, at most ±448.

    A GPU that has the type has an instruction. Triton's interpreter truncates silently, so
    there the same is done on the bits: 4 exponent bits with bias 7, 3 mantissa bits.

    ptxas 12.8 and 12.9 (13.0 does not) leave garbage in the upper half of a word of two
    conversions that they can tell to be equal, such as constant zeros. So callers mask by what
    only the run knows, and do not specialise on lengths.
    """
    if NATIVE:
        return x.to(tl.float8e4nv)
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        magnitude = bits & 0x7FFFFFFF
        # Drop 20 of 23 mantissa bits, rounding half to even, and rebias from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2⁻⁶ the codes count steps of 2⁻⁹.
        small = tl.abs(x) * 512.0 + ROUNDER
        subnormal = small.to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)  # NaN
        return (code | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def int8_kernel(t, mean, out, scales, factor, heads, length, padded, groups, strides,
                D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """One program: BLOCK_N tokens of one head; a scale for each GROUP of them."""
    tiles = padded // BLOCK_N
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    x, inside = load_tile(t, head // heads, head % heads, rows, length, strides, D, BLOCK_D)
    if mean is not None:
        x = tl.where(inside, x - tl.load(mean + head * BLOCK_D + d), 0.0)
    # [groups, GROUP, BLOCK_D]: one maximum for the first axis.
    x = x.reshape(BLOCK_N // GROUP, GROUP, BLOCK_D)
    size = tl.where(x == x, tl.abs(x), float("inf"))  # a maximum would pass over NaN
    top = tl.maximum(tl.max(tl.max(size, 2), 1), TINY)
    steps = x * tl.div_rn(127.0, top)[:, None, None] + ROUNDER
    q = steps.to(tl.int32, bitcast=True).to(tl.int8).reshape(BLOCK_N, BLOCK_D)
    head64 = tl.cast(head, tl.int64)
    tl.store(out + (head64 * padded + rows[:, None]) * BLOCK_D + d, q)
    group = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    scale = tl.where(top < float("inf"), tl.div_rn(top, 127.0) * factor, float("nan"))
    tl.store(scales + head64 * groups + group, scale)


@triton.jit
def token_at(position):
    """The token stored at this position: `eight_bit.TOKEN_ORDER` within each 16."""
    # position = [quarter: 2 bits][half: 1][one: 1], token = [half][quarter][one]
    quarter, half, one = (position >> 2) & 3, (position >> 1) & 1, position & 1
    return (position & -16) | (half << 3) | (quarter << 1) | one


@triton.jit(do_not_specialize=["length"])  # see `to_e4m3`
def values_kernel(v, mean, top, out, limit, heads, length, padded, strides,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                  FP8: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """v·limit/top, channel by channel: FP8 as [BLOCK_D, padded], or float16 as v is."""
    tiles = padded // BLOCK_N
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    positions = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = token_at(positions) if FP8 else positions
    d = tl.arange(0, BLOCK_D)
    x, _ = load_tile(v, head // heads, head % heads, rows, length, strides, D, BLOCK_D)
    if mean is not None:  # 0 in channels of padding, where x is 0 too
        x -= tl.load(mean + head * BLOCK_D + d)[None, :]
        x = tl.where((rows < length)[:, None], x, 0.0)
    x *= tl.div_rn(limit, tl.load(top + head * BLOCK_D + d))[None, :]
    head64 = tl.cast(head, tl.int64)
    if FP8:
        place = (head64 * BLOCK_D + d[:, None]) * padded + positions[None, :]
        tl.store(out + place, to_e4m3(x.T, NATIVE))
    else:
        place = (head64 * padded + positions[:, None]) * BLOCK_D + d[None, :]
        tl.store(out + place, x.to(tl.float16))


def int8_plan(t: torch.Tensor, group: int) -> launch.Plan:
    """The launch of `int8_kernel` for a t like this."""
    batch, heads, length, dim = t.shape
    block_d, padded = padded_dim(dim), padded_length(length)
    block_n = max(group, min(PAD, 4096 // block_d))
    return launch.Plan(
        int8_kernel, batch * heads * padded // block_n,
        heads, length, padded, padded // group, t.stride()[:3],
        D=dim, BLOCK_D=block_d, BLOCK_N=block_n, GROUP=group,
        enable_fp_fusion=False,  # the product is rounded before ROUNDER is added
        num_warps=max(4, block_n * block_d // 2048),  # 64 elements a thread
    )  # fmt: skip


def quantize_int8(
    t: torch.Tensor, group: int, mean: torch.Tensor | None = None, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [B, H, ⌈N⌉, BLOCK_D], float32 scales·factor [B, H, ⌈N⌉ / group]) of t − mean.

    group: tokens that share a scale, a power of two up to 128 (1: per token). `factor` is for
    q: it takes the softmax's scale and log2 e along for free.
    """
    batch, heads, length, dim = t.shape
    padded = padded_length(length)
    out = launch.result(t, (batch, heads, padded, padded_dim(dim)), torch.int8)
    scales = launch.result(t, (batch, heads, padded // group), torch.float32)
    key = launch.key_of("int8", (t, mean), group)
    plan = launch.planned(key, lambda: int8_plan(t, group))
    plan.launch(t, mean, out, scales, factor)
    return out, scales


def values_plan(v: torch.Tensor, fp8: bool) -> launch.Plan:
    """The launch of `values_kernel` for a v like this."""
    batch, heads, length, dim = v.shape
    block_d, padded = padded_dim(dim), padded_length(length)
    block_n = min(PAD, max(16, 16384 // block_d))
    return launch.Plan(
        values_kernel, batch * heads * padded // block_n,
        heads, length, padded, v.stride()[:3],
        D=dim, BLOCK_D=block_d, BLOCK_N=block_n, FP8=fp8, NATIVE=not interpreting(),
        enable_fp_fusion=False,
    )  # fmt: skip


def quantize_values(
    v: torch.Tensor, limit: float, top: torch.Tensor, mean: torch.Tensor | None, fp8: bool
) -> torch.Tensor:
    """(v − mean)·limit/top: FP8 E4M3 [B, H, BLOCK_D, ⌈N⌉] in TOKEN_ORDER, or float16 as v is.
    Times top/limit it is v − mean again."""
    batch, heads, length, dim = v.shape
    padded, block_d = padded_length(length), padded_dim(dim)
    shape = (block_d, padded) if fp8 else (padded, block_d)
    dtype = torch.float8_e4m3fn if fp8 else torch.float16
    out = launch.result(v, (batch, heads, *shape), dtype)
    key = launch.key_of("values", (v, mean, top), fp8)
    plan = launch.planned(key, lambda: values_plan(v, fp8))
    plan.launch(v, mean, top, out, limit)
    return out


def padded_length(length: int) -> int:
    return -(-length // PAD) * PAD


class Operands(NamedTuple):
    """q, k and v in 8 bits (`quantize_operands`), and what turns them back."""

    q: torch.Tensor  # int8 [B, H, ⌈Nq⌉, BLOCK_D]
    k: torch.Tensor  # int8 [B, H, ⌈Nkv⌉, BLOCK_D]
    v: torch.Tensor  # E4M3 [B, H, BLOCK_D, ⌈Nkv⌉], or float16 [B, H, ⌈Nkv⌉, BLOCK_D]
    q_scale: torch.Tensor  # float32 [B, H, ⌈Nq⌉ / q_group], times scale·log2 e
    k_scale: torch.Tensor  # float32 [B, H, ⌈Nkv⌉ / k_group]
    v_top: torch.Tensor  # float32 [B, H, BLOCK_D], what v's limit stands for
    v_mean: torch.Tensor | None  # float32 [B, H, BLOCK_D]
    bias: torch.Tensor | None  # float32 [B, H, ⌈Nkv⌉]: what smoothing q took from scores
    v_limit: float
    pv: str


def quantize_operands(
    q, k, v, scale, smooth_q, smooth_k, smooth_v, pv, q_group=1, k_group=None
) -> Operands:
    """All of a call's 8-bit copies (see `rcmlib.rcm_sage_attention`).

    q_group, k_group: tokens that share a scale (`quantize_int8`); k_group has to be a multiple
    of the kernel's block_n, which is also what it is unless given.
    """
    if k_group is None:
        k_group = choose_sage_tile(q.shape[-1], pv, device_capability(q.device)).block_n
    factor = scale * LOG2_E
    k_mean = column_statistics(k, smooth_k, False).mean
    q_mean = column_statistics(q, smooth_q, False).mean
    q8, q_scale = quantize_int8(q, q_group, q_mean, factor)
    k8, k_scale = quantize_int8(k, k_group, k_mean)
    bias = None
    if smooth_q:  # (q − q̄) kᵀ lacks q̄ kᵀ: one number a key, the same for all queries
        dim, length = k.shape[-1], k.shape[2]
        center = (q_mean[..., :dim] * factor)[..., None]
        smooth = k.float() - k_mean[..., None, :dim] if smooth_k else k.float()
        bias = k.new_zeros((*k.shape[:2], padded_length(length)), dtype=torch.float32)
        # Autocast would round this product to 16 bits.
        with torch.autocast(q.device.type, enabled=False):
            bias[..., :length] = (smooth @ center)[..., 0]
    limit = V_MAX_FP16_SUM if pv == "fp8_fp16" else E4M3_MAX
    v_mean, v_top = column_statistics(v, smooth_v, True)
    v8 = quantize_values(v, limit, v_top, v_mean, fp8=pv != "fp16")
    return Operands(q8, k8, v8, q_scale, k_scale, v_top, v_mean, bias, limit, pv)
