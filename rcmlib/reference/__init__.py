"""The specification: what every kernel must compute, in float64, and how errors are measured.

Read these few lines and you know the operation. Nothing here is fast, and the attention
matrix is materialised: use short sequences, or a few query rows of a long one (each row of
the result depends on its own query only).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rcmlib.reference import eight_bit as eight_bit


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(q kᵀ·scale) v in float64; [B, H, Nq, D] × [B, H, Nkv, D]² → [B, H, Nq, D].

    scale defaults to 1/√D. is_causal lets query i see keys 0 … i (as PyTorch's SDPA does,
    also where Nq ≠ Nkv).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return probabilities(q, k, scale, is_causal) @ v.double()


def probabilities(q: Tensor, k: Tensor, scale: float, is_causal: bool) -> Tensor:
    """softmax(q kᵀ·scale) in float64, [B, H, Nq, Nkv]."""
    scores = q.double() @ k.double().mT * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.softmax(scores, dim=-1)


def merge_heads(f: Tensor) -> Tensor:
    """[B, H, N, D] → [B, N, H·D]: the heads of a token stand side by side."""
    return f.transpose(1, 2).flatten(2)


def skip(x: Tensor, f: Tensor, c_skip: float | Tensor, c_out: float | Tensor) -> Tensor:
    """c_skip·x + c_out·f in float64; x, f [B, …], each coefficient a number or [B]."""
    return per_sample(c_skip, x) * x.double() + per_sample(c_out, x) * f.double()


def rcm_attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, c_skip: float | Tensor, c_out: float | Tensor,
    scale: float | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """c_skip·x + c_out·merge_heads(attention(q, k, v)) in float64; x, result [B, Nq, H·D]."""
    return skip(x, merge_heads(attention(q, k, v, scale, is_causal)), c_skip, c_out)


class Gradients(NamedTuple):
    """∂L/∂(each input) of `rcm_attention`, in float64; dc_skip, dc_out [B]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dx: Tensor
    dc_skip: Tensor
    dc_out: Tensor


def rcm_attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor, c_skip: float | Tensor,
    c_out: float | Tensor, scale: float | None = None, is_causal: bool = False,
) -> Gradients:  # fmt: skip
    """The gradients of `rcm_attention` for g = ∂L/∂out [B, Nq, H·D], by their formulas.

    Written out, rather than left to autograd, because these are the lines that the kernels
    compute (Dao 2023, FlashAttention-2, algorithm 2, with the skip around it).
    """
    q, k, v, x, g = (a.double() for a in (q, k, v, x, g))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    g_heads = g.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
    p = probabilities(q, k, scale, is_causal)
    f = p @ v
    delta = (g_heads * f).sum(-1, keepdim=True)
    ds = p * (g_heads @ v.mT - delta)
    c = per_sample(c_out, q)
    return Gradients(
        dq=c * scale * (ds @ k),
        dk=c * scale * (ds.mT @ q),
        dv=c * (p.mT @ g_heads),
        dx=per_sample(c_skip, x) * g,
        dc_skip=(g * x).sum((1, 2)),
        dc_out=(g * merge_heads(f)).sum((1, 2)),
    )


def projection(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """a Wᵀ + bias in float64; [B, N, K], [C, K], [C] → [B, N, C]."""
    f = a.double() @ weight.double().mT
    return f if bias is None else f + bias.double()


def rcm_projection(
    a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, c_skip: float | Tensor,
    c_out: float | Tensor,
) -> Tensor:  # fmt: skip
    """c_skip·x + c_out·(a Wᵀ + bias) in float64; x, result [B, N, C]."""
    return skip(x, projection(a, weight, bias), c_skip, c_out)


def gated_projection(
    a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor
) -> Tensor:
    """x + gate·(a Wᵀ + bias) in float64; gate [B, C] (for all tokens) or [B, N, C]."""
    gate = gate[:, None] if gate.ndim == 2 else gate
    return x.double() + gate.double() * projection(a, weight, bias)


def per_sample(c: float | Tensor, x: Tensor) -> Tensor:
    """A number or a [B] tensor as float64, shaped to multiply x [B, …] sample by sample."""
    c = torch.as_tensor(c, dtype=torch.float64, device=x.device)
    return c.reshape(-1, *[1] * (x.ndim - 1))


# ---- how far is `out` from `ref`? Both are compared in float64. ----


def relative_l2(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖₂ / ‖ref‖₂ (0 where both are zero)."""
    return _ratio((out.double() - ref.double()).norm(), ref.double().norm())


def relative_l1(out: Tensor, ref: Tensor) -> float:
    """Σ|out − ref| / Σ|ref|, the SageAttention papers' measure."""
    return _ratio((out.double() - ref.double()).abs().sum(), ref.double().abs().sum())


def rmse(out: Tensor, ref: Tensor) -> float:
    """√mean (out − ref)²."""
    return (out.double() - ref.double()).square().mean().sqrt().item()


def max_abs(out: Tensor, ref: Tensor) -> float:
    """max |out − ref|."""
    return (out.double() - ref.double()).abs().max().item()


def cosine(out: Tensor, ref: Tensor) -> float:
    """⟨out, ref⟩ / (‖out‖·‖ref‖): 1 for the same direction."""
    a, b = out.double().flatten(), ref.double().flatten()
    return _ratio(a @ b, a.norm() * b.norm())


def error_bound(ref: Tensor, peer: Tensor) -> float:
    """The relative L2 error that a kernel of peer's precision may have against ref.

    2·‖peer − ref‖/‖ref‖ + 2·‖round(ref) − ref‖/‖ref‖: twice the error PyTorch makes in the
    same precision, plus twice what rounding the exact result costs. No other constants
    (the rule of FlashAttention's own tests).
    """
    return 2 * relative_l2(peer, ref) + 2 * relative_l2(ref.to(peer.dtype), ref)


def _ratio(error: Tensor, size: Tensor) -> float:
    return 0.0 if error == 0 else (error / size).item()
