"""Chapter 8: forward and backward of attention with the skip, and the parts of ours."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rcmlib
from benchmarks.host import graph
from benchmarks.suites.suite import INPUTS, Suite
from rcmlib import reference
from rcmlib.attention import attention
from rcmlib.measure import timing
from rcmlib.measure.benchmark import case, check
from rcmlib.measure.implementations import (
    Inputs,
    attention_inputs,
    implementation,
    installed,
)  # fmt: skip

GRADIENTS = {  # (B, H, N, D)
    "D64_N2048": (4, 12, 2048, 64),
    "D64_N4096": (2, 16, 4096, 64),
    "D64_N8192": (2, 16, 8192, 64),
    "D128_N2048": (4, 16, 2048, 128),
    "D128_N4096": (2, 16, 4096, 128),
    "D128_N8192": (2, 16, 8192, 128),
    "D128_N32768": (1, 12, 32768, 128),
}
# triton_skip is our own kernels in two passes: what sets it apart from fused is fusion.
TRAINED = (
    "flash_eager", "flash_compiled", "cudnn_compiled", "fa4_compiled", "triton_skip", "fused",
)  # fmt: skip


def training_step(label: str, inputs: Inputs, g: Tensor) -> Callable[[], tuple]:
    """Forward and backward: a call that returns the gradients of q, k, v and x."""
    leaves = [t.detach().requires_grad_() for t in inputs[:4]]
    run = implementation(label, Inputs(*leaves, *inputs[4:]))
    return lambda: torch.autograd.grad(run(), leaves, g)


def parts(inputs, g: Tensor) -> dict[str, Callable[[], object]]:
    """The launches of the fused layer alone, as `rcmlib.attention` makes them."""
    from rcmlib.attention.backward import attention_backward, backward_launches
    from rcmlib.attention.forward import attention_forward
    from rcmlib.skip.kernel import skip_backward

    q, k, v, x, c_skip, c_out = inputs
    scale = q.shape[-1] ** -0.5
    _, f, lse = attention_forward(*inputs, scale, False, True)
    one_pass = partial(
        skip_backward, g, None, f, c_skip, c_out, q.shape[-1], x.dtype, None
    )
    delta = one_pass()[3]
    arguments = (g, q, k, v, lse, delta, c_out, scale, False)
    dkdv, dq = backward_launches(*arguments)[1]
    return {
        "fused_forward": partial(rcmlib.rcm_attention, *inputs),
        "fused_saving": partial(attention_forward, *inputs, scale, False, True),
        "triton": partial(attention, q, k, v),
        "delta": one_pass,
        "backward": partial(attention_backward, *arguments),
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


def gradients_case(name: str) -> Iterator[dict]:
    inputs = attention_inputs(*GRADIENTS[name])
    g = torch.randn_like(inputs.x)
    steps = {label: training_step(label, inputs, g) for label in installed(TRAINED)}

    def error(_, gradients):
        return gradient_error(gradients, inputs, g)

    checked = check(name, steps, error, lambda _: 0.02)
    peaks = {label: timing.peak_bytes(step) for label, step in checked.runs.items()}
    graphs = {label: graph(step) for label, step in checked.runs.items()}
    times = timing.compare(graphs | parts(inputs, g), failed=checked.failed)
    sizes = dict(zip("BHND", GRADIENTS[name], strict=True)) | {"peak_bytes": peaks}
    yield case(name, sizes, times, checked)


SUITES = {
    "gradients": Suite(
        "Forward and backward of attention with the skip (gradients of q, k, v and x), and "
        "the parts of the fused one.",
        f"{INPUTS} Whole steps are replayed from a CUDA graph. Gradients of the first head "
        "checked against float64 first. peak_bytes: the most memory that a step holds, "
        "above its inputs. backward: as the layer does it; dkdv and dq: the two walks.",
        gradients_case,
        [(name,) for name in GRADIENTS],
    )
}
