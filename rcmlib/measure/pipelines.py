"""The implementations that are measured against each other, from inputs to result."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rcmlib
from rcmlib.functional import attention


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention with one backend, heads merged: q, k, v -> [B, N, H·D]."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            f = F.scaled_dot_product_attention(q, k, v)
        return f.transpose(1, 2).flatten(2)

    return run


flash, cudnn = sdpa(SDPBackend.FLASH_ATTENTION), sdpa(SDPBackend.CUDNN_ATTENTION)


def sage_one(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """SageAttention 1.0.6 (INT8 q kᵀ, FP16 p v), heads merged. It has to be installed.

    It subtracts k's mean from k in place, so it gets a k of its own.
    """
    from sageattention import sageattn

    own_k = k.clone()
    return lambda: sageattn(q, own_k, v).transpose(1, 2).flatten(2)


def eager_skip(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """The skip as PyTorch users write it: coefficients [B] in x's dtype, broadcast."""
    c_skip, c_out = (c.to(x.dtype).view(-1, 1, 1) for c in (c_skip, c_out))
    return c_skip * x + c_out * f


def compile_skip() -> Callable[..., Tensor]:
    """`eager_skip` compiled for one shape, the best that torch.compile can do."""
    return torch.compile(eager_skip, dynamic=False)


def attention_pipelines(q, k, v, x, c_skip, c_out) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute the skip of an attention layer, from q, k, v, x to out."""
    compiled_skip = compile_skip()
    heads = (q, k, v)
    return {
        "flash": lambda: flash(*heads),
        "flash_eager": lambda: eager_skip(x, flash(*heads), c_skip, c_out),
        "flash_compiled": lambda: compiled_skip(x, flash(*heads), c_skip, c_out),
        "cudnn": lambda: cudnn(*heads),
        "cudnn_eager": lambda: eager_skip(x, cudnn(*heads), c_skip, c_out),
        "cudnn_compiled": lambda: compiled_skip(x, cudnn(*heads), c_skip, c_out),
        "triton": lambda: attention(*heads),
        "triton_skip": lambda: rcmlib.rcm_skip(x, attention(*heads), c_skip, c_out),
        "fused": lambda: rcmlib.rcm_attention(*heads, x, c_skip, c_out),
    }


def attention_inputs(
    batch: int, heads: int, tokens: int, dim: int
) -> tuple[Tensor, ...]:
    """Random q, k, v, x and per-sample coefficients at random noise levels, seeded."""
    random = torch.Generator("cuda").manual_seed(batch + tokens)
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": random}
    packed = torch.randn(batch, tokens, 3, heads, dim, **options)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    x = torch.randn(batch, tokens, heads * dim, **options)
    c = rcmlib.edm(torch.rand(batch, device="cuda", generator=random) * 3)
    return q, k, v, x, c.c_skip, c.c_out
