"""rCM attention as torch.nn modules: f(x, t) = c_skip(t)·x + c_out(t)·proj(attention(x)).

Both share one state_dict layout (`qkv.weight`, `qkv.bias`, `proj.weight`, `proj.bias`), so
weights move between them unchanged. Plain PyTorch: they run on any device.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmlib.coefficients import edm


class _RCMAttention(nn.Module):
    """The layers and the checks that the implementations share."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        sigma_data: float = 1.0,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads, got {dim} and {num_heads}"
            )
        edm(0.0, sigma_data)  # raises if sigma_data is not a positive number
        self.num_heads = num_heads
        self.sigma_data = sigma_data
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, D]: strided views of one packed [B, N, 3, H, D] projection."""
        if x.ndim != 3 or x.shape[-1] != self.proj.in_features:
            raise ValueError(
                f"x must be [B, N, {self.proj.in_features}], got {list(x.shape)}"
            )
        batch, tokens, dim = x.shape
        packed = self.qkv(x).view(
            batch, tokens, 3, self.num_heads, dim // self.num_heads
        )
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def coefficients(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """EDM's c_skip and c_out in x's dtype, shaped [B, 1, 1] or [1, 1, 1]."""
        if isinstance(t, Tensor) and t.ndim and t.shape != x.shape[:1]:
            raise ValueError(
                f"t must be a number or of shape [{x.shape[0]}], got {list(t.shape)}"
            )
        c = edm(t, self.sigma_data)
        c_skip, c_out = (
            torch.as_tensor(value, dtype=x.dtype, device=x.device).view(-1, 1, 1)
            for value in (c.c_skip, c.c_out)
        )
        return c_skip, c_out


class BaselineRCMAttention(_RCMAttention):
    """The two-pass baseline: attention and projection write F, then the skip reads it back.

    naive=True materialises the [B, H, N, N] probabilities instead of calling SDPA, as the
    textbook formula does.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        sigma_data: float = 1.0,
        naive: bool = False,
    ):
        super().__init__(dim, num_heads, qkv_bias, sigma_data)
        self.naive = naive

    def forward(self, x: Tensor, t: float | Tensor) -> Tensor:
        """x [B, N, dim], noise level t (a number or [B]) -> [B, N, dim]."""
        q, k, v = self.heads(x)
        if self.naive:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            attended = torch.softmax(scores, dim=-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        f = self.proj(attended.transpose(1, 2).reshape(x.shape))
        c_skip, c_out = self.coefficients(x, t)
        return c_skip * x + c_out * f


class FusedRCMAttention(_RCMAttention):
    """One forward and one expression, still PyTorch: the skip is an `addcmul`.

    That saves a launch and a temporary against the baseline. It does not fuse anything into
    the attention kernel: chapter 3 counts what is really launched.
    """

    def forward(self, x: Tensor, t: float | Tensor) -> Tensor:
        """x [B, N, dim], noise level t (a number or [B]) -> [B, N, dim]."""
        attended = F.scaled_dot_product_attention(*self.heads(x))
        f = self.proj(attended.transpose(1, 2).reshape(x.shape))
        c_skip, c_out = self.coefficients(x, t)
        return torch.addcmul(c_skip * x, c_out, f)
