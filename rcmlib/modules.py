"""rCM attention as torch.nn modules: f(x, t) = c_skip(t)·x + c_out(t)·proj(attention(x)).

    BaselineRCMAttention      attention, projection, skip: PyTorch, the two-pass baseline
    FusedRCMAttention         the same, the skip as one PyTorch expression
    TritonFusedRCMAttention   two kernels of ours: attention, projection with the skip inside
    TransformerBlock          such an attention, then an MLP with its residual

x [B, N, dim], noise level t a number or [B] -> [B, N, dim]. The three share one state_dict
layout (`qkv.weight`, `qkv.bias`, `proj.weight`, `proj.bias`), so weights move between them
unchanged. `rcmlib.integrate.fuse` turns a model that has them into its fused form.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmlib.attention import attention, rcm_attention
from rcmlib.coefficients import Coefficients, check_number, edm
from rcmlib.core.checks import why_called
from rcmlib.projection import rcm_projection


class _RCMAttention(nn.Module):
    """The layers and the checks that the implementations share."""

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, sigma_data: float = 1.0
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        edm(0.0, sigma_data)  # raises if sigma_data is not a positive number
        self.num_heads = num_heads
        self.sigma_data = sigma_data
        # Attention sees norm(x), the skip carries x: a pre-norm block sets a LayerNorm here.
        self.norm = nn.Identity()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, D]: strided views of one packed [B, N, 3, H, D] projection."""
        if x.ndim != 3 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(f"x must be [B, N, {self.qkv.in_features}], got {list(x.shape)}")
        packed = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        return packed.permute(2, 0, 3, 1, 4).unbind(0)

    def exact_coefficients(self, x: Tensor, t: float | Tensor) -> Coefficients:
        """EDM's coefficients in float64: numbers, or tensors [] or [B]."""
        if isinstance(t, Tensor) and t.ndim and t.shape != x.shape[:1]:
            raise ValueError(
                f"t must be a number or of shape [{x.shape[0]}], got {list(t.shape)}"
            )
        compiling = torch.compiler.is_compiling()
        if isinstance(t, Tensor):
            if t.ndim or compiling:
                t = t.to(x.device)
        elif compiling:  # on x's device, where a CUDA graph finds it
            t = x.new_ones(x.shape[:1], dtype=torch.float64) * check_number(t)
        return edm(t, self.sigma_data)

    def coefficients(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """EDM's c_skip and c_out in x's dtype, shaped [B, 1, 1] or [1, 1, 1]."""
        exact = self.exact_coefficients(x, t)[:2]
        c_skip, c_out = (torch.as_tensor(c, dtype=x.dtype, device=x.device) for c in exact)
        return c_skip.view(-1, 1, 1), c_out.view(-1, 1, 1)


class BaselineRCMAttention(_RCMAttention):
    """The two-pass baseline: attention and projection write F, then the skip reads it back.

    naive=True materialises the [B, H, N, N] probabilities, like the textbook, without SDPA.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, sigma_data: float = 1.0,
        naive: bool = False,
    ):  # fmt: skip
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


class TritonFusedRCMAttention(_RCMAttention):
    """Attention in one kernel, the output projection with the skip in its epilogue in another.

    out_proj=False leaves the projection out (no `proj.*` in the state_dict): then the skip
    rides on attention, f(x, t) = c_skip(t)·x + c_out(t)·attention(x).

    The coefficients reach the kernels in float64, whatever x's dtype; PyTorch's modules
    round them to it. Differentiable in x, t and the parameters. Head dimensions 16 … 256;
    float32, float16 or bfloat16, or float32 inside torch.autocast. Where `proj` is more than a
    plain Linear (an adapter, a hook, a quantised weight) it is called, then PyTorch's skip.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, sigma_data: float = 1.0,
        out_proj: bool = True,
    ):  # fmt: skip
        super().__init__(dim, num_heads, qkv_bias, sigma_data)
        if not out_proj:
            self.proj = None

    def forward(self, x: Tensor, t: float | Tensor) -> Tensor:
        """x [B, N, dim], noise level t (a number or [B]) -> [B, N, dim]."""
        q, k, v = self.heads(x)
        c_skip, c_out, *_ = self.exact_coefficients(x, t)
        if x.numel() == 0:  # nothing to launch
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        elif self.proj is None:
            return rcm_attention(q, k, v, x, c_skip, c_out)
        else:
            attended = attention(q, k, v)
            if not why_called(self.proj, nn.Linear):
                weight, bias = self.proj.weight, self.proj.bias
                return rcm_projection(attended, weight, bias, x, c_skip, c_out)
        c_skip, c_out = self.coefficients(x, t)
        return c_skip * x + c_out * (attended if self.proj is None else self.proj(attended))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block whose attention carries the rCM skip.

        h = c_skip(t)·x + c_out(t)·proj(attention(norm(x)))
        y = h + mlp(norm(h)),   mlp = Linear to int(mlp_ratio·dim), GELU (tanh), Linear

    The order is that of a Wan or TurboDiffusion block, without text and modulation (for
    those: `rcmlib.wan`). At t = 0 attention falls away and h = x; the MLP remains.
    `rcmlib.integrate.fuse` replaces its attention. The MLP's residual is left to PyTorch:
    behind so long a product, an epilogue gains less than our product loses (chapter 9).
    Parameters: attn.norm.*, attn.qkv.*, attn.proj.*, norm.*, mlp.0.*, mlp.2.*.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, mlp_ratio: float = 4, qkv_bias: bool = True,
        sigma_data: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        hidden = int(mlp_ratio * dim)
        if hidden < 1:
            raise ValueError(f"mlp_ratio must be at least 1/dim, got {mlp_ratio}")
        self.attn = BaselineRCMAttention(dim, num_heads, qkv_bias, sigma_data)
        self.attn.norm = nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim)
        widen, narrow = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.mlp = nn.Sequential(widen, nn.GELU("tanh"), narrow)

    def forward(self, x: Tensor, t: float | Tensor) -> Tensor:
        """x [B, N, dim], noise level t (a number or [B]) -> [B, N, dim]."""
        x = self.attn(x, t)
        return x + self.mlp(self.norm(x))
