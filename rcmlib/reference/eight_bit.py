"""The specification of the 8-bit attention: what is rounded, when, and to what.

The quantisers are plain PyTorch in float32 and agree with `rcmlib.sage.quantize` bit for bit.
`sage_attention` follows the kernel tile by tile, but in float64 wherever the kernel does not
round on purpose; each rounding can be switched off, which gives an error budget.
"""

import math

import torch
from torch import Tensor

TINY = 2.0**-110  # the smallest maximum a scale is made of
E4M3_MAX = 448.0
P_MAX = 256.0  # a row's largest weight: a number of E4M3, so alone it is exact
TOKEN_ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


def column_mean(t: Tensor) -> Tensor:
    """What smoothing takes off t [B, H, N, D], float32 [B, H, D]: the mean over the tokens,
    or 0 in channels where it makes most of 128 sampled tokens larger."""
    mean = (t.sum(2, dtype=torch.float64) / t.shape[2]).float()
    i, stretch = torch.arange(128, device=t.device), -(-t.shape[2] // 128)
    rows = i * stretch + i * 40507 % stretch  # a video's columns come back at equal distances
    some = t[:, :, rows[rows < t.shape[2]]].double()
    moved = (some - mean.double()[:, :, None]).abs().sqrt().sum(2)
    return torch.where(moved > 1.12 * some.abs().sqrt().sum(2), 0.0, mean)


def quantize_int8(
    t: Tensor, group: int, mean: Tensor | None = None, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """t − mean [B, H, N, D] as (int8 [B, H, N, D], float32 scales·factor [B, H, ⌈N/group⌉]).

    Symmetric: a group of neighbouring tokens shares scale = max|t| / 127, so that int8 · scale
    is the number nearest to t − mean that the scale allows (ties to even). The scale of a
    group with a NaN or an infinity is NaN.
    """
    t = _centred(t, mean)
    top = _finite(_groups(t, group).abs().amax((3, 4))).clamp_min(TINY)
    inverse = _divide(127.0, top).repeat_interleave(group, 2)[:, :, : t.shape[2], None]
    scale = _divide(top, 127.0) * torch.tensor(factor)
    return (t * inverse).round().to(torch.int8), scale


def dequantize_int8(t8: Tensor, scale: Tensor) -> Tensor:
    """int8 · scale in float64; scale [B, H, groups] as `quantize_int8` returns it."""
    group = 1 << (-(-t8.shape[2] // scale.shape[2]) - 1).bit_length()  # a power of two
    rows = scale.double().repeat_interleave(group, 2)[:, :, : t8.shape[2]]
    return t8.double() * rows[..., None]


def column_top(v: Tensor, mean: Tensor | None = None) -> Tensor:
    """The largest |v − mean| of each channel, float32 [B, H, D]: what a scale is made of."""
    return _finite(_centred(v, mean).abs().amax(2)).clamp_min(TINY)


def quantize_values(
    v: Tensor, limit: float = E4M3_MAX, mean: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """v − mean [B, H, N, D] as (v8 in `dtype`, scale [B, H, D]): v8·scale ≈ v − mean.
    The largest |v − mean| of a channel becomes `limit`."""
    top = column_top(v, mean)
    scaled = _centred(v, mean) * _divide(limit, top)[:, :, None]
    return scaled.to(dtype), top * torch.tensor(1 / limit)


def e4m3(x: Tensor) -> Tensor:
    """x rounded to FP8 E4M3 and back, in x's dtype; |x| ≤ 448."""
    return x.float().to(torch.float8_e4m3fn).to(x.dtype)


def short_sum(a: Tensor, b: Tensor, acc: Tensor, bits: int = 13, step: int = 32) -> Tensor:
    """acc + a b as an FP8 tensor core with a short accumulator sums it, [..., M, N].

    One instruction takes `step` of the inner dimension. It shifts acc and every product to the
    largest exponent among them, keeps `bits` bits below that one's leading bit, cuts off the
    rest, and adds. (A model: NVIDIA documents no details. Chapter 11 compares it with a GPU.)
    """
    for i in range(0, a.shape[-1], step):
        inner = range(i, min(i + step, a.shape[-1]))
        products = [a[..., n, None] * b[..., None, n, :] for n in inner]
        largest = acc.abs()
        for product in products:
            largest = torch.maximum(largest, product.abs())
        unit = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-300))) - bits)
        acc = torch.trunc(acc / unit) * unit
        for product in products:
            acc = acc + torch.trunc(product / unit) * unit
    return acc


def sage_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, is_causal: bool = False, *,
    smooth_k: bool = True, smooth_v: bool = True, q_group: int | None = 1,
    k_group: int | None = 128, fp8_p: bool = True, fp8_v: bool = True,
    sums: str | None = "fp8", block_n: int = 128,
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ·scale) v with the kernel's roundings, float64 [B, H, Nq, D].

    q_group, k_group: tokens that share an INT8 scale; None leaves q or k unrounded.
    fp8_p, fp8_v: round the weights, tile by tile, and the values to E4M3.
    sums: "fp8" and None sum exactly; "fp8_short" in a short accumulator over all keys;
    "fp8_fp16" in float16 over 64 keys, v being scaled to 2.25 (see `rcm_sage_attention`).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k_mean = column_mean(k) if smooth_k else None
    v_mean = column_mean(v) if smooth_v else None
    q_hat, k_hat = q.double(), _centred(k, k_mean).double()
    if q_group is not None:
        q_hat = dequantize_int8(*quantize_int8(q, q_group))
    if k_group is not None:
        k_hat = dequantize_int8(*quantize_int8(k, k_group, k_mean))
    limit = 2.25 if sums == "fp8_fp16" else E4M3_MAX
    v_hat, v_scale = quantize_values(v, limit, v_mean)
    v_hat = v_hat.double()
    if not fp8_v:
        v_hat = _centred(v, v_mean).double() / v_scale.double()[:, :, None]
    f = _online(q_hat, k_hat, v_hat, scale, is_causal, fp8_p, sums, block_n)
    f = f * v_scale.double()[:, :, None]
    return f if v_mean is None else f + v_mean.double()[:, :, None]


def _online(q, k, v, scale, is_causal, fp8_p, sums, block_n):
    """The kernel's loop: weights relative to the running maximum, times 256, tile by tile."""
    kv_len = k.shape[2]
    scores = q @ k.mT * (scale * math.log2(math.e))
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    m = torch.full_like(scores[..., :1], -math.inf)
    l = torch.zeros_like(m)
    acc = torch.zeros_like(q[..., :1] * v[:, :, :1])
    whole = kv_len // block_n * block_n
    starts = [*([whole] if whole < kv_len else []), *range(0, whole, block_n)]
    for j in starts:
        s = scores[..., j : j + block_n]
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        safe = torch.where(m_new == -math.inf, 0.0, m_new)  # a row that has seen no key yet
        p = torch.exp2(s - safe) * P_MAX
        alpha = torch.exp2(m - safe)
        l = l * alpha + p.sum(-1, keepdim=True)
        p = e4m3(p) if fp8_p else p
        values = v[:, :, j : j + block_n]
        if sums == "fp8_short":
            acc = short_sum(p, values, acc * alpha)
        elif sums == "fp8_fp16":
            parts = [p[..., i : i + 64] @ values[:, :, i : i + 64] for i in (0, 64)]
            acc = acc * alpha + sum(part.half().double() for part in parts)
        else:
            acc = acc * alpha + p @ values
        m = m_new
    return acc / l


def _divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b, correctly rounded. With a number, PyTorch multiplies by a reciprocal instead."""
    like = a if isinstance(a, Tensor) else b
    a, b = (t if isinstance(t, Tensor) else torch.full_like(like, t) for t in (a, b))
    return a / b


def _finite(top: Tensor) -> Tensor:
    return torch.where(top < math.inf, top, math.nan)


def _centred(t: Tensor, mean: Tensor | None) -> Tensor:
    return t.float() if mean is None else t.float() - mean[:, :, None]


def _groups(t: Tensor, group: int) -> Tensor:
    """[B, H, N, D] as [B, H, groups, group, D]; zeros fill the last group."""
    missing = -t.shape[2] % group
    return torch.nn.functional.pad(t, (0, 0, 0, missing)).unflatten(2, (-1, group))
