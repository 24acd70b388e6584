"""Inputs to judge 8-bit attention on: Gaussian ones, and ones like a video model's."""

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian(
    batch: int, heads: int, tokens: int, dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, D], standard normal, float32 on the CPU: the same on every machine."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, tokens, dim, generator=random)
    return q, k, v


def video_like(
    batch: int, heads: int, grid: tuple[int, int, int], dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, T·H·W, D] with what quantisation meets in a video model, float32, CPU.

    Neighbouring tokens resemble each other (a smooth random field over frames, rows and
    columns, plus white noise); some channels are loud, the same ones in q and k (log-normal
    gains); k has a bias, and in 8 of 128 channels a large one (±8 to 25), q a weaker one; v's
    channels have log-normal scales, and means.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    def field():
        """A smooth field plus 0.7 of white noise: [B, H, T·H·W, D] of unit variance."""
        coarse = [max(2, -(-n // 4)) for n in grid]
        smooth = F.interpolate(
            draw(batch * heads, dim, *coarse),
            size=grid,
            mode="trilinear",
            align_corners=True,
        )
        smooth = smooth / smooth.std()
        tokens = smooth.flatten(2).mT.unflatten(0, (batch, heads))
        noise = draw(batch, heads, tokens.shape[2], dim)
        return ((tokens + 0.7 * noise) / (1 + 0.7**2) ** 0.5).contiguous()

    gain = torch.exp(0.6 * draw(1, heads, 1, dim))
    gain = gain / gain.square().mean(-1, keepdim=True).sqrt()
    q, k, v = field() * gain, field() * gain, field()
    bias = draw(1, heads, 1, dim)
    loud = torch.rand(1, heads, 1, dim, generator=random).argsort(-1) < dim // 16
    size = 8 + 17 * torch.rand(1, heads, 1, dim, generator=random)
    k = k + torch.where(loud, size * draw(1, heads, 1, dim).sign(), bias)
    q = q + 0.5 * draw(1, heads, 1, dim)
    v = (v + 0.25 * draw(1, heads, 1, dim)) * torch.exp(0.5 * draw(1, heads, 1, dim))
    return q, k, v
