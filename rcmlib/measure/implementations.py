"""The implementations that are measured against each other, one row each.

    run = implementation("cudnn_compiled", attention_inputs(4, 12, 2048, 64))
    out = run()  # [B, N, H·D]

What is known about one stands in its row of IMPLEMENTATIONS, where suites, ledger, roofline and
figures read it. It is built when it is asked for: nothing is compiled for the others.
"""

import importlib.metadata
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rcmlib
from rcmlib.attention import attention
from rcmlib.reference import merge_heads

Run = Callable[[], Tensor]


class Inputs(NamedTuple):
    """q, k, v [B, H, N, D], x [B, N, H·D], and coefficients [B] in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    c_skip: Tensor
    c_out: Tensor


def attention_inputs(
    batch: int, heads: int, tokens: int, dim: int, dtype=torch.bfloat16, seed: int = 0
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


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, with the backend that it chooses."""
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


def sdpa_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


flash = partial(sdpa_by, SDPBackend.FLASH_ATTENTION)
cudnn = partial(sdpa_by, SDPBackend.CUDNN_ATTENTION)


def fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-4 (CuTe DSL), which takes [B, N, H, D]."""
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).flatten(2)


def flex_then_skip(q, k, v, x, c_skip, c_out) -> Tensor:
    """FlexAttention without a score function, and the skip. For use inside torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    return eager_skip(x, merge_heads(flex_attention(q, k, v)), c_skip, c_out)


def sage_one(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """SageAttention 1.0.6 (INT8 q kᵀ, FP16 p v). It changes k, so it gets a k of its own."""
    from sageattention import sageattn

    own_k = k.clone()
    return lambda: merge_heads(sageattn(q, own_k, v))


def eager_skip(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """The skip as PyTorch users write it: coefficients [B] in x's dtype, broadcast."""
    c_skip, c_out = (c.to(x.dtype).view(-1, 1, 1) for c in (c_skip, c_out))
    return c_skip * x + c_out * f


def addcmul_skip(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """The one expression of `rcmlib.FusedRCMAttention`."""
    c_skip, c_out = (c.to(x.dtype).view(-1, 1, 1) for c in (c_skip, c_out))
    return torch.addcmul(c_skip * x, c_out, f)


def compile_skip() -> Callable[..., Tensor]:
    """`eager_skip` compiled for one shape, the best that torch.compile can do. After eight
    shapes it would be eager, silently: fullgraph makes that an error."""
    return torch.compile(eager_skip, dynamic=False, fullgraph=True)


# ---- whole implementations: Inputs -> a call without arguments ----


def alone(attend: Callable[..., Tensor], inputs: Inputs) -> Run:
    return partial(attend, *inputs[:3])


def two_pass(attend: Callable[..., Tensor], skip: Callable[..., Tensor], inputs: Inputs) -> Run:
    q, k, v, x, c_skip, c_out = inputs
    return lambda: skip(x, attend(q, k, v), c_skip, c_out)


def then_compiled_skip(attend: Callable[..., Tensor], inputs: Inputs) -> Run:
    return two_pass(attend, compile_skip(), inputs)


def flex_compiled(inputs: Inputs) -> Run:
    return partial(torch.compile(flex_then_skip, dynamic=False, fullgraph=True), *inputs)


def sage_one_compiled(inputs: Inputs) -> Run:
    run = sage_one(*inputs[:3])
    return then_compiled_skip(lambda *_: run(), inputs)


def quantized_kernel(pv: str, with_skip: bool, inputs: Inputs) -> Run:
    """Our 8-bit kernel alone, its operands quantised here, before it is called."""
    from rcmlib.sage import kernel as op

    q, k, v, *rest = inputs
    *_, tokens, dim = q.shape
    operands = op.quantize_operands(q, k, v, dim**-0.5, False, True, True, pv)
    rest = rest if with_skip else (None, None, None)
    sizes = (False, tokens, dim, tokens, inputs.x.dtype)
    return partial(op.attend_quantized, operands, *rest, *sizes)


# ---- what they move, for `rcmlib.measure.ledger`: (pass, reads, writes) ----

ATTENTION = ("attention", "q k v", "F")
# As PyTorch runs c_skip·x + c_out·F: two products and a sum.
EAGER = (("c_skip·x", "x", "a"), ("c_out·F", "F", "b"), ("a + b", "a b", "out"))
SKIP = ("skip", "x F", "out")  # torch.compile's, or `rcmlib.rcm_skip`
FUSED = ("attention + skip", "q k v x", "out")
FUSED_8 = ("8-bit attention + skip", "q8 k8 v8 x", "out")
# torch.matmul copies views of a packed QKV. S, scaled and P are N×N, in q's dtype.
NAIVE = (
    ("copy q", "q", "q2"), ("copy k", "k", "k2"), ("q kᵀ", "q2 k2", "S"),
    ("scale", "S", "scaled"), ("softmax", "scaled", "P"), ("copy v", "v", "v2"),
    ("P v", "P v2", "F2"), ("merge heads", "F2", "F"),
)  # fmt: skip
QUANTISE = (
    ("mean of k", "k", ""), ("q to INT8", "q", "q8"), ("k to INT8", "k", "k8"),
    ("mean and range of v", "v", ""), ("v to FP8", "v", "v8"),
)  # fmt: skip
# SageAttention 1.0.6: k loses its mean in place, v becomes float16, F comes as [B, H, N, D].
SAGE1 = (
    ("mean of k", "k", ""), ("k - mean", "k", "k"), ("v to float16", "v", "v16"),
    ("q to INT8", "q", "q8"), ("k to INT8", "k", "k8"),
    ("8-bit attention", "q8 k8 v16", "F2"), ("merge heads", "F2", "F"),
)  # fmt: skip


class Implementation(NamedTuple):
    """One row: what the book knows about one way to compute c_skip·x + c_out·Attention(x)."""

    label: str  # in records
    title: str  # in figures
    colour: str  # in figures; told apart by the colour-blind, too
    build: Callable[[Inputs], Run]
    passes: tuple[tuple[str, str, str], ...] = ()  # what it moves; (): not counted
    products: tuple[str, str] = ("bf16", "bf16")  # of q kᵀ and of p v; float16 has bf16's rate
    bound: float = 0.01  # the relative L2 error from which on it counts as wrong
    skip: bool = True  # False: attention alone
    package: str | None = None  # that pip has to have installed for it


FLASH, CUDNN, FA4 = "#E69F00", "#7F7F7F", "#661100"
OURS, EIGHT = "#CC79A7", "#882255"
alone_row = partial(Implementation, passes=(ATTENTION,), skip=False)
eight_bit_row = partial(Implementation, products=("int8", "fp8"), bound=0.06)
# fmt: off
IMPLEMENTATIONS = {row.label: row for row in (
    Implementation("naive", "N×N softmax, eager skip", "#332288",
        partial(two_pass, naive, eager_skip), (*NAIVE, *EAGER)),
    alone_row("flash", "flash SDPA, no skip", FLASH, partial(alone, flash)),
    Implementation("flash_eager", "flash SDPA, eager skip", FLASH,
        partial(two_pass, flash, eager_skip), (ATTENTION, *EAGER)),
    Implementation("flash_compiled", "flash SDPA, compiled skip", "#B8860B",
        partial(then_compiled_skip, flash), (ATTENTION, SKIP)),
    alone_row("cudnn", "cuDNN SDPA, no skip", CUDNN, partial(alone, cudnn)),
    Implementation("cudnn_eager", "cuDNN SDPA, eager skip", CUDNN,
        partial(two_pass, cudnn, eager_skip), (ATTENTION, *EAGER)),
    Implementation("cudnn_compiled", "cuDNN SDPA, compiled skip", CUDNN,
        partial(then_compiled_skip, cudnn), (ATTENTION, SKIP)),
    alone_row("fa4", "FlashAttention-4, no skip", FA4, partial(alone, fa4),
        package="flash-attn-4"),
    Implementation("fa4_compiled", "FlashAttention-4, compiled skip", FA4,
        partial(then_compiled_skip, fa4), (ATTENTION, SKIP), package="flash-attn-4"),
    Implementation("flex_compiled", "FlexAttention, compiled skip", "#44AA99",
        flex_compiled, (ATTENTION, SKIP)),
    Implementation("fused_pytorch", "PyTorch's choice of SDPA, addcmul", FLASH,
        partial(two_pass, sdpa, addcmul_skip)),
    alone_row("triton", "our kernel, no skip", OURS, partial(alone, attention)),
    Implementation("triton_skip", "our kernel, then rcm_skip", OURS,
        partial(two_pass, attention, rcmlib.rcm_skip), (ATTENTION, SKIP)),
    Implementation("fused", "bf16, fused", "#0072B2",
        lambda inputs: partial(rcmlib.rcm_attention, *inputs), (FUSED,)),
    eight_bit_row("sage", "8 bits, fused", EIGHT,
        lambda inputs: partial(rcmlib.rcm_sage_attention, *inputs), (*QUANTISE, FUSED_8)),
    eight_bit_row("sage_kernel_fp8", "8 bits, fused: its kernel alone", EIGHT,
        partial(quantized_kernel, "fp8", True), (FUSED_8,)),
    eight_bit_row("sage_kernel_fp8_fp16", "8 bits: its kernel, sums in float16", EIGHT,
        partial(quantized_kernel, "fp8_fp16", True)),
    eight_bit_row("sage_kernel_fp8_short", "8 bits: its kernel, sums of fewer bits", EIGHT,
        partial(quantized_kernel, "fp8_short", True)),
    eight_bit_row("sage_kernel_fp16", "8 bits: its kernel, values in float16", EIGHT,
        partial(quantized_kernel, "fp16", True), products=("int8", "bf16")),
    eight_bit_row("sage_kernel_no_skip", "8 bits: its kernel, no skip", EIGHT,
        partial(quantized_kernel, "fp8", False), skip=False),
    eight_bit_row("sage1_compiled", "SageAttention 1.0.6, compiled skip", "#117733",
        sage_one_compiled, (*SAGE1, SKIP), products=("int8", "bf16"),
        package="sageattention"),
)}
# fmt: on
TWO_PASS = ("flash_compiled", "cudnn_compiled", "fa4_compiled")  # the strongest peers


def installed(labels: Iterable[str]) -> list[str]:
    """labels without those whose package is missing here."""
    needs = ((n, IMPLEMENTATIONS[n].package) for n in labels)
    return [n for n, p in needs if p is None or any(importlib.metadata.distributions(name=p))]


def implementation(label: str, inputs: Inputs) -> Run:
    """The implementation of this label on these inputs: a call that returns [B, N, H·D].

    The first call compiles. KeyError for an unknown label; what an implementation does not
    support, it says in its own error, here or when it is called.
    """
    return IMPLEMENTATIONS[label].build(inputs)
