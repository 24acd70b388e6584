"""Chapter 7: forward and backward of attention with the skip, and the parts of ours."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import rcmlib
from benchmarks.suites.suite import (
    INPUTS,
    Suite,
    case,
    one_by_one,
    right_ones,
)
from rcmlib import reference
from rcmlib.attention import attention
from rcmlib.measure import timing
from rcmlib.measure.implementations import (
    attention_inputs,
    compile_skip,
    cudnn,
    eager_skip,
    flash,
)

SHAPES = {  # (B, H, N, D)
    "D64_N2048": (4, 12, 2048, 64),
    "D64_N4096": (2, 16, 4096, 64),
    "D64_N8192": (2, 16, 8192, 64),
    "D128_N2048": (4, 16, 2048, 128),
    "D128_N4096": (2, 16, 4096, 128),
    "D128_N8192": (2, 16, 8192, 128),
}


def training_step(layer: Callable[..., Tensor], inputs, g: Tensor):
    """layer's forward and backward: a call that returns the gradients of q, k, v and x."""
    *leaves, c_skip, c_out = inputs
    leaves = [t.detach().requires_grad_() for t in leaves]
    return lambda: torch.autograd.grad(layer(*leaves, c_skip, c_out), leaves, g)


def layers() -> dict[str, Callable[..., Tensor]]:
    """Functions of q, k, v, x, c_skip, c_out: the two-pass pipelines and the fused kernel.

    triton_skip is our own kernels in two passes: what sets it apart from `fused` is fusion.
    """
    compiled_skip = compile_skip()
    return {
        "flash_eager": lambda q, k, v, x, *c: eager_skip(x, flash(q, k, v), *c),
        "flash_compiled": lambda q, k, v, x, *c: compiled_skip(x, flash(q, k, v), *c),
        "cudnn_compiled": lambda q, k, v, x, *c: compiled_skip(x, cudnn(q, k, v), *c),
        "triton_skip": lambda q, k, v, x, *c: rcmlib.rcm_skip(
            x, attention(q, k, v), *c
        ),
        "fused": rcmlib.rcm_attention,
    }


def parts(inputs, g: Tensor) -> dict[str, Callable[[], object]]:
    """The launches of the fused layer alone, as `rcmlib.attention` makes them."""
    from rcmlib.attention.backward import backward_launches
    from rcmlib.attention.forward import attention_forward
    from rcmlib.skip.kernel import skip_backward

    q, k, v, x, c_skip, c_out = inputs
    scale = q.shape[-1] ** -0.5
    _, f, lse = attention_forward(*inputs, scale, False, True)
    one_pass = partial(
        skip_backward, g, None, f, c_skip, c_out, q.shape[-1], x.dtype, None
    )
    delta = one_pass()[3]
    dkdv, dq = backward_launches(g, q, k, v, lse, delta, c_out, scale, False)[1]
    return {
        "fused_forward": partial(rcmlib.rcm_attention, *inputs),
        "fused_saving": partial(attention_forward, *inputs, scale, False, True),
        "triton": partial(attention, q, k, v),
        "delta": one_pass,
        "dkdv": dkdv,
        "dq": dq,
    }


def gradient_error(gradients, inputs, g: Tensor) -> float:
    """Of dq, dk, dv of the first sample's first head, and dx, against float64: the largest."""
    q, k, v, x, c_skip, c_out = inputs
    dim = q.shape[-1]
    one = (*(t[:1, :1] for t in (q, k, v)), x[:1, :, :dim], c_skip[:1], c_out[:1])
    ref = reference.rcm_attention_backward(g[:1, :, :dim], *one)
    ours = (*(t[:1, :1] for t in gradients[:3]), gradients[3][:1, :, :dim])
    return max(reference.relative_l2(a, b) for a, b in zip(ours, ref[:4], strict=True))


def gradients_case(name: str) -> dict:
    inputs = attention_inputs(*SHAPES[name])
    g = torch.randn_like(inputs[3])
    steps = {n: training_step(f, inputs, g) for n, f in layers().items()}
    steps = right_ones(steps, lambda _, out: gradient_error(out, inputs, g), 0.02, name)
    memory = {label: timing.peak_bytes(step) for label, step in steps.items()}
    graphs = {label: timing.graph(step) for label, step in steps.items()}
    times = timing.compare(graphs | parts(inputs, g))
    sizes = dict(zip("BHND", SHAPES[name], strict=True))
    result = case(name, sizes | {"peak_bytes": memory}, times)
    timing.free()
    return result


SUITES = {
    "gradients": Suite(
        "Forward and backward of attention with the skip (gradients of q, k, v and x), and "
        "the parts of the fused one.",
        f"{INPUTS} Whole steps are replayed from a CUDA graph. Gradients of the first head "
        "checked against float64 first. peak_bytes: the most memory that a step holds, "
        "above its inputs.",
        one_by_one(gradients_case, [(name,) for name in SHAPES]),
    )
}
