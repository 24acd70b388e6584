"""The implementations that are measured against each other, from inputs to result.

    run = implementation("cudnn_compiled", attention_inputs(4, 12, 2048, 64))
    out = run()  # [B, N, H·D]

Each is built when it is asked for: nothing is compiled or allocated for the others.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rcmlib
from rcmlib import reference
from rcmlib.attention import attention
from rcmlib.reference import merge_heads
from rcmlib.sage import PV


class Inputs(NamedTuple):
    """q, k, v [B, H, N, D], x [B, N, H·D], and coefficients [B] in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    c_skip: Tensor
    c_out: Tensor


def attention_inputs(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Inputs:
    """Random q, k, v, x and per-sample coefficients at random noise levels, on the GPU."""
    random = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "dtype": dtype, "generator": random}
    packed = torch.randn(batch, tokens, 3, heads, dim, **options)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    x = torch.randn(batch, tokens, heads * dim, **options)
    c = rcmlib.edm(torch.rand(batch, device="cuda", generator=random) * 3)
    return Inputs(q, k, v, x, c.c_skip, c.c_out)


# ---- attention, heads merged: q, k, v -> [B, N, H·D] ----


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook formula: scores and probabilities [B, H, N, N] go through memory."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return merge_heads(torch.softmax(scores, dim=-1) @ v)


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention with one backend."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return merge_heads(F.scaled_dot_product_attention(q, k, v))

    return run


flash, cudnn = sdpa(SDPBackend.FLASH_ATTENTION), sdpa(SDPBackend.CUDNN_ATTENTION)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's FlexAttention without a score function. For use inside torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    return merge_heads(flex_attention(q, k, v))


def has_sage_one() -> bool:
    """Is SageAttention installed?"""
    return importlib.util.find_spec("sageattention") is not None


def sage_one(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """SageAttention 1.0.6 (INT8 q kᵀ, FP16 p v). It has to be installed.

    It subtracts k's mean from k in place, so it gets a k of its own.
    """
    from sageattention import sageattn

    own_k = k.clone()
    return lambda: merge_heads(sageattn(q, own_k, v))


# ---- the skip ----


def eager_skip(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """The skip as PyTorch users write it: coefficients [B] in x's dtype, broadcast."""
    c_skip, c_out = (c.to(x.dtype).view(-1, 1, 1) for c in (c_skip, c_out))
    return c_skip * x + c_out * f


def addcmul_skip(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """The one expression of `rcmlib.FusedRCMAttention`."""
    c_skip, c_out = (c.to(x.dtype).view(-1, 1, 1) for c in (c_skip, c_out))
    return torch.addcmul(c_skip * x, c_out, f)


def compile_skip() -> Callable[..., Tensor]:
    """`eager_skip` compiled for one shape, the best that torch.compile can do.

    torch.compile finds a shape again by the function's code: a second call compiles nothing.
    After eight shapes it would fall back to eager PyTorch, silently; fullgraph makes that an
    error, and torch.compiler.reset() a fresh start.
    """
    return torch.compile(eager_skip, dynamic=False, fullgraph=True)


def flex_then_skip(q, k, v, x, c_skip, c_out) -> Tensor:
    return eager_skip(x, flex(q, k, v), c_skip, c_out)


# ---- whole implementations: Inputs -> a call without arguments ----


def alone(attend: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Tensor]:
    return partial(attend, *inputs[:3])


def two_pass(
    attend: Callable[..., Tensor], skip: Callable[..., Tensor], inputs: Inputs
) -> Callable[[], Tensor]:
    q, k, v, x, c_skip, c_out = inputs
    return lambda: skip(x, attend(q, k, v), c_skip, c_out)


def sage_one_compiled(inputs: Inputs) -> Callable[[], Tensor]:
    run, skip = sage_one(*inputs[:3]), compile_skip()
    return lambda: skip(inputs.x, run(), inputs.c_skip, inputs.c_out)


def quantized_kernel(pv: str, with_skip: bool, inputs: Inputs) -> Callable[[], Tensor]:
    """Our 8-bit kernel alone, its operands quantised here, before it is called."""
    from rcmlib.sage import kernel as op

    q, k, v, *rest = inputs
    *_, tokens, dim = q.shape
    operands = op.quantize_operands(q, k, v, dim**-0.5, False, True, True, pv)
    rest = rest if with_skip else (None, None, None)
    sizes = (False, tokens, dim, tokens, inputs.x.dtype)
    return partial(op.attend_quantized, operands, *rest, *sizes)


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Callable[[], Tensor]]] = {
    "naive": partial(two_pass, naive, eager_skip),
    "flash": partial(alone, flash),
    "flash_eager": partial(two_pass, flash, eager_skip),
    "flash_compiled": lambda inputs: two_pass(flash, compile_skip(), inputs),
    "cudnn": partial(alone, cudnn),
    "cudnn_eager": partial(two_pass, cudnn, eager_skip),
    "cudnn_compiled": lambda inputs: two_pass(cudnn, compile_skip(), inputs),
    "flex_compiled": lambda inputs: partial(
        torch.compile(flex_then_skip, dynamic=False, fullgraph=True), *inputs
    ),
    "fused_pytorch": partial(
        two_pass,
        lambda *heads: merge_heads(F.scaled_dot_product_attention(*heads)),
        addcmul_skip,
    ),
    "triton": partial(alone, attention),
    "triton_skip": partial(two_pass, attention, rcmlib.rcm_skip),
    "fused": lambda inputs: partial(rcmlib.rcm_attention, *inputs),
    "sage": lambda inputs: partial(rcmlib.rcm_sage_attention, *inputs),
    **{f"sage_kernel_{pv}": partial(quantized_kernel, pv, True) for pv in PV},
    "sage_kernel_no_skip": partial(quantized_kernel, "fp8", False),
    "sage1_compiled": sage_one_compiled,
}
# Without the skip: they are checked against attention alone.
ALONE = frozenset({"flash", "cudnn", "triton", "sage_kernel_no_skip"})


def implementation(label: str, inputs: Inputs) -> Callable[[], Tensor]:
    """The implementation of this label on these inputs: a call that returns [B, N, H·D].

    Building it allocates what it needs before it is timed (8-bit copies for sage_kernel_*);
    the first call compiles. KeyError for an unknown label; what an implementation does not
    support, it says in its own error, here or when it is called.
    """
    return IMPLEMENTATIONS[label](inputs)


def distance(inputs: Inputs) -> Callable[[str, Tensor], float]:
    """A function of a label and its result: the relative L2 error on three query rows.

    Against float64. A row of attention depends on its own query only, so three stand for
    all, at any length.
    """
    q, k, v, x, c_skip, c_out = inputs
    tokens = q.shape[2]
    rows = torch.tensor([0, tokens // 2, tokens - 1], device=x.device)
    without = merge_heads(reference.attention(q[:, :, rows], k, v))
    with_skip = reference.skip(x[:, rows], without, c_skip, c_out)

    def error(label: str, out: Tensor) -> float:
        ref = without if label in ALONE else with_skip
        return reference.relative_l2(out[:, rows], ref)

    return error


def allowed(label: str) -> float:
    """The error from which on an implementation counts as wrong."""
    return 0.06 if label.startswith("sage") else 0.01


# The bf16 implementations of chapter 6's table.
BF16 = (
    "flash", "flash_eager", "flash_compiled", "cudnn", "cudnn_eager", "cudnn_compiled",
    "triton", "triton_skip", "fused",
)  # fmt: skip


def attention_pipelines(q, k, v, x, c_skip, c_out) -> dict[str, Callable[[], Tensor]]:
    """Those implementations on these inputs."""
    inputs = Inputs(q, k, v, x, c_skip, c_out)
    return {label: implementation(label, inputs) for label in BF16}
