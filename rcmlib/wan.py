"""Wan's self-attention block, small and whole: the production home of a fused epilogue.

    e0 … e5 = modulation + e                                            [B, dim] each
    x = x + e2·o(attention(rope(norm_q(q h)), rope(norm_k(k h)), v h))  h = norm1(x)·(1+e1) + e0
    x = x + e5·ffn(h)                                                   h = norm2(x)·(1+e4) + e3

x [B, N, dim] holds N = frames·height·width tokens; the attention has num_heads heads of
dim/num_heads channels; ffn = Linear, GELU (tanh), Linear. There is no rCM skip in here: rCM's
skip acts on the whole network's output, and a block has these two gated residuals, each
behind a linear layer. `rcmlib.gated_projection` takes the first into that layer's epilogue.

Written from the published facts of Wan 2.1 (arXiv 2503.20314) and TurboDiffusion (arXiv
2512.16093), with Wan's parameter names. Left out: the cross-attention to the text (`norm3`,
`cross_attn`), which a Wan block has between the two lines, and padded or split sequences.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmlib.attention import attention
from rcmlib.core.checks import why_called
from rcmlib.projection import gated_projection

Grid = tuple[int, int, int]  # frames, height, width
ROPE_THETA = 10_000.0  # RoPE's base wavelength, as in RoFormer (arXiv 2104.09864)


def rope_tables(
    grid: Grid, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's rotation angles, [N, 1, head_dim/2], in dtype.

    A head's channel pairs are shared out among the axes: a third each to height and width,
    rounded down, the rest to the frames (44, 42 and 42 of 128 channels). Pair i of an axis
    with d channels turns by position·θ^(−2i/d). Angles are computed in float64.
    """
    third = 2 * (head_dim // 6)
    angles = []
    for axis, channels in enumerate((head_dim - 2 * third, third, third)):
        exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=device)
        positions = torch.arange(grid[axis], dtype=torch.float64, device=device)
        turns = torch.outer(positions, ROPE_THETA ** -(exponents / max(channels, 1)))
        shape = [1, 1, 1, channels // 2]
        shape[axis] = grid[axis]
        angles.append(turns.view(shape))

    def table(function) -> Tensor:
        parts = [function(a).to(dtype).expand(*grid, a.shape[-1]) for a in angles]
        return torch.cat(parts, dim=-1).view(-1, 1, head_dim // 2)

    return table(torch.cos), table(torch.sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each channel pair (2i, 2i+1) of x [B, N, H, D] by its token's angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class WanRMSNorm(nn.RMSNorm):
    """x / √(mean x² + eps) · weight over all of dim; the norm is taken in float32 or wider."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight


class WanSelfAttention(nn.Module):
    """Self-attention with normalised, rotated queries and keys, and projection o."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = True, eps: float = 1e-6):
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(
                f"dim must be an even multiple of num_heads, got {dim} and {num_heads}"
            )
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()

    def heads(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, D] of x [B, N, dim], as views of token-major tensors."""
        projected = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in projected)
        dtype = torch.promote_types(q.dtype, torch.float32)
        cos, sin = rope_tables(grid, q.shape[-1], dtype, q.device)
        q, k = (rotate(t, cos, sin).to(v.dtype) for t in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x [B, N, dim] of a (frames, height, width) grid -> o(attention), [B, N, dim]."""
        attended = F.scaled_dot_product_attention(*self.heads(x, grid))
        return self.o(attended.transpose(1, 2).flatten(2))


class WanBlock(nn.Module):
    """Wan's block without cross-attention, in PyTorch: SDPA and eager gated residuals.

    Norms and modulation are computed in float32 (float64 in a float64 module). What the
    linears see, the gates and the result have x's dtype, as in TurboDiffusion; a residual
    stream x in float32 beside 16-bit products runs inside torch.autocast, as in Wan.
    """

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, qk_norm: bool = True, eps: float = 1e-6
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = WanSelfAttention(dim, num_heads, qk_norm, eps)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        widen, narrow = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.ffn = nn.Sequential(widen, nn.GELU("tanh"), narrow)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def forward(self, x: Tensor, e: Tensor, grid: Grid) -> Tensor:
        """x [B, N, dim], e [B, 6, dim], grid (frames, height, width) -> [B, N, dim].

        e is the time embedding's projection, in float32. ValueError or TypeError if the
        three do not fit.
        """
        self._check(x, e, grid)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            (self.modulation + e).unsqueeze(2).unbind(1)  # [B, 1, dim] each
        )
        h = self.norm1(x) * (1 + scale) + shift
        x = self.add_attention(x, h.to(x.dtype), gate, grid)
        h = self.norm2(x) * (1 + ffn_scale) + ffn_shift
        return x + ffn_gate.to(x.dtype) * self.ffn(h.to(x.dtype))

    def add_attention(self, x: Tensor, h: Tensor, gate: Tensor, grid: Grid) -> Tensor:
        """x + gate·o(attention(h)); x and h [B, N, dim], gate [B, 1, dim]."""
        return x + gate.to(x.dtype) * self.self_attn(h, grid)

    def _check(self, x: Tensor, e: Tensor, grid: Grid) -> None:
        dim = self.modulation.shape[-1]
        if x.ndim != 3 or x.shape[-1] != dim:
            raise ValueError(f"x must be [B, N, {dim}], got {list(x.shape)}")
        if e.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"e must be torch.float32, got {e.dtype}")
        if e.shape != (x.shape[0], 6, dim):
            raise ValueError(f"e must be [{x.shape[0]}, 6, {dim}], got {list(e.shape)}")
        if len(grid) != 3 or math.prod(grid) != x.shape[1] or min(grid) < 1:
            raise ValueError(
                f"grid must be (frames, height, width) with product {x.shape[1]}, "
                f"the tokens of x, got {tuple(grid)}"
            )


class FusedWanBlock(WanBlock):
    """What `fuse` makes of a WanBlock: our attention, and its residual in o's epilogue.

    The same parameters and function; the gate stays in float32. `self_attn` and `self_attn.o`
    lend their weights to the kernels; each is called instead where it is more than it was (an
    adapter, a hook, a quantised weight), and PyTorch does the rest. The FFN's residual is
    left to PyTorch: behind so long a product (K = 8960), an epilogue gains less than our
    product loses against cuBLAS (chapter 9).
    """

    def add_attention(self, x: Tensor, h: Tensor, gate: Tensor, grid: Grid) -> Tensor:
        """x + gate·o(attention(h)), the residual in o's epilogue."""
        if not x.numel() or why_called(self.self_attn, WanSelfAttention):
            return super().add_attention(x, h, gate, grid)
        attended = attention(*self.self_attn.heads(h, grid))
        o = self.self_attn.o
        if why_called(o, nn.Linear):
            return x + gate.to(x.dtype) * o(attended)
        return gated_projection(attended, o.weight, o.bias, x, gate.squeeze(1))
