"""`rcm_sage_attention` and plain `sage_attention`: 8-bit operands, no gradients."""

import torch
from torch import Tensor

from rcmlib import attention
from rcmlib.core import check_device, checks, device_capability, gradients, load
from rcmlib.core.launch import known, run_on_device

# The number formats of p v, best first for GPUs that have FP8.
PV = ("fp8", "fp8_fp16", "fp8_short", "fp16")


def rcm_sage_attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, c_skip: float | Tensor, c_out: float | Tensor,
    *, scale: float | None = None, is_causal: bool = False, smooth_k: bool = True,
    smooth_q: bool = False, smooth_v: bool = True, pv: str | None = None,
) -> Tensor:  # fmt: skip
    """c_skip·x + c_out·merge_heads(softmax(q kᵀ·scale) v), with 8-bit matrix products.

    Arguments, shapes, dtypes and errors as `rcm_attention`'s; x and the coefficients are not
    quantised, and where c_skip = 1 and c_out = 0 the result is x, bit for bit.

    q and k are rounded to INT8 (a scale for each query, and for each tile of keys), and v to
    FP8 E4M3 (a scale for each channel); the softmax's weights are rounded to FP8 tile by tile.
    smooth_k subtracts k's mean over the tokens first, which changes no weight and removes the
    channel offsets that keys have in practice. smooth_q does so for q and corrects the scores.
    smooth_v does so for v and adds the mean to the result. Where the mean would make
    most of 128 sampled tokens larger (a few large ones have moved it), 0 takes its place.
    pv: the number formats of the second product:
      "fp8"       FP8 operands; a tile is summed by the tensor core, tiles in float32
                  (SageAttention2). The default from compute capability 8.9 on.
      "fp8_fp16"  FP8 operands, 64 keys at a time summed in float16 (SageAttention2++).
      "fp8_short" FP8 operands, all keys summed by the tensor core (fewer bits: chapter 11).
      "fp16"      float16 operands, float32 sums. The default on GPUs without FP8.

    Quantising q, k and v is a cost like N beside the attention's N²: short sequences lose
    (chapter 12). On an H200 `rcm_attention` with Hopper's own kernel was ahead wherever both
    were timed (heads of 64 up to 32 760 tokens, of 128 at 4096).
    A NaN or an infinity in q, k or v makes the queries that see it NaN, and may take others of
    its head along.
    Nothing here is differentiable: a call that wants a gradient raises RuntimeError. Train with
    `rcm_attention`.
    Specification: `rcmlib.reference.eight_bit.sage_attention`; arXiv 2411.10958 and 2505.21136.
    """
    smooth = {"smooth_q": smooth_q, "smooth_k": smooth_k, "smooth_v": smooth_v}
    arguments = (q, k, v, x, c_skip, c_out)
    return _call("rcm_sage_attention", arguments, scale, is_causal, smooth, pv)


def sage_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, is_causal: bool = False,
    smooth_k: bool = True, smooth_q: bool = False, smooth_v: bool = True,
    pv: str | None = None,
) -> Tensor:  # fmt: skip
    """merge_heads(softmax(q kᵀ·scale) v), [B, Nq, H·D]: `rcm_sage_attention` without x."""
    smooth = {"smooth_q": smooth_q, "smooth_k": smooth_k, "smooth_v": smooth_v}
    arguments = (q, k, v, None, None, None)
    return _call("sage_attention", arguments, scale, is_causal, smooth, pv)


def _call(kind, arguments, scale, is_causal, smooth, pv) -> Tensor:
    q, k, v, x, *c = arguments
    options = (is_causal, *smooth.values(), _check_pv(pv, q))
    if known(kind, arguments, *options) is not None:
        return _launch_sage(*arguments, attention.check_scale(scale, q), *options)
    if gradients.wants_grad(*(a for a in arguments if isinstance(a, Tensor))):
        raise RuntimeError(
            "rcm_sage_attention has no gradients, and an argument requires one; call it under "
            "torch.no_grad(), or train with rcm_attention"
        )
    q, k, v = checks.autocast(q, k, v)
    attention.check_attention(q, k, v, is_causal)
    scale = attention.check_scale(scale, q)
    if kind == "rcm_sage_attention":
        attention.check_attention_residual(x, q)
        c = checks.coefficients(*c, x)
    for name, value in smooth.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return torch.ops.rcmlib.sage_attention(q, k, v, x, *c, scale, *options)


def _check_pv(pv: str | None, q: Tensor) -> str:
    """pv, or the default for q's device. ValueError where the GPU lacks the data type."""
    on_gpu = getattr(q, "is_cuda", False)  # q is checked later
    fp8 = not on_gpu or device_capability(q.device) >= (8, 9)
    if pv is None:
        return "fp8" if fp8 else "fp16"
    if pv not in PV:
        raise ValueError(f"pv must be None or one of {', '.join(PV)}, got {pv!r}")
    if not fp8 and pv != "fp16":
        raise ValueError(
            f'pv must be "fp16" on a GPU without FP8 (compute capability below 8.9), got {pv!r}'
        )
    return pv


# ---- the registered operator: torch.compile and opcheck see this ----


@gradients.operator
def _sage_attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor | None,
    c_skip: Tensor | None, c_out: Tensor | None, scale: float, is_causal: bool,
    smooth_q: bool, smooth_k: bool, smooth_v: bool, pv: str,
) -> Tensor:  # fmt: skip
    check_device("q", q.device)
    c = checks.as_launched(c_skip, c_out)
    smooth = (smooth_q, smooth_k, smooth_v)
    return _launch_sage(q, k, v, x, *c, scale, is_causal, *smooth, pv)


def _launch_sage(q, k, v, x, *arguments) -> Tensor:
    sage_attention_forward = load("rcmlib.sage.kernel").sage_attention_forward
    dtype = q.dtype if x is None else x.dtype
    return run_on_device(sage_attention_forward, [dtype], q, k, v, x, *arguments)


torch.library.register_fake("rcmlib::sage_attention")(attention.empty_result)
gradients.count_flops("sage_attention")(attention.two_products)
