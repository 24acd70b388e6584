"""`rcm_projection` and `gated_projection`: a linear layer with the skip in its epilogue."""

import math

import torch
from torch import Tensor

from rcmlib.core import check_device, checks, gradients, load
from rcmlib.core.launch import known, run_on_device


def rcm_projection(
    a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, c_skip: float | Tensor,
    c_out: float | Tensor,
) -> Tensor:  # fmt: skip
    """c_skip·x + c_out·(a Wᵀ + bias), in one kernel.

    a: [B, N, K]; weight: [C, K], as nn.Linear keeps it; bias: [C] or None; every size ≥ 1, any
    strides with a contiguous last dimension. One dtype: float32 (IEEE products), float16 or
    bfloat16 (float32 accumulation and skip; one rounding at the end). Inside torch.autocast
    they are cast to its dtype.
    x and the result: [B, N, C], in a's dtype or float32.
    c_skip, c_out: a number, or a floating tensor [B], one a sample.

    Where c_skip = 1 and c_out = 0 the result is x, bit for bit.
    Differentiable in all six, deterministically. A call that wants the gradient of c_out also
    saves F = a Wᵀ + bias in a's dtype, so that it is right at any noise level, t = 0 included.
    The matrix products of the backward pass are PyTorch's. Second derivatives and forward
    mode (torch.func.jvp) raise an error.
    Raises TypeError or ValueError for anything else, RuntimeError where Triton is missing.
    Specification: `rcmlib.reference.rcm_projection`. Equation: rCM, arXiv 2510.08431.
    """
    return _call("rcm_projection", (a, weight, bias, x, c_skip, c_out))


def gated_projection(
    a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor
) -> Tensor:
    """x + gate·(a Wᵀ + bias), in one kernel: the gated residual of a DiT or Wan block.

    gate: [B, C], one for all tokens of a sample, or [B, N, C]; in a's dtype or float32, with
    a contiguous last dimension. It is not cast by torch.autocast.
    The other arguments, gradients and errors as `rcm_projection`'s; where the gate is 0, the
    result is x, bit for bit. A call that wants the gate's gradient saves F.
    Specification: `rcmlib.reference.gated_projection`.
    """
    return _call("gated_projection", (a, weight, bias, x, 1.0, gate))


def _call(kind: str, arguments: tuple) -> Tensor:
    plan = known(kind, arguments, False)
    if plan is not None:
        return _launch_projection(*arguments, False, plan)[0]
    a, weight, bias, x, c_skip, c_out = arguments
    a, weight, bias = checks.autocast(a, weight, bias)
    _check_projection(a, weight, bias, x)
    if kind == "rcm_projection":
        c_skip, c_out = checks.coefficients(c_skip, c_out, x)
    else:
        _check_gate(c_out, a, x)
        c_skip = None
    arguments = (a, weight, bias, x, c_skip, c_out, gradients.wants_grad(c_out))
    if gradients.wants_grad(*arguments[:6]):
        return _Projection.apply(*arguments)[0]
    return torch.ops.rcmlib.projection(*arguments)[0]


def _check_projection(a, weight, bias, x) -> None:
    checks.tensor("a", a, rank=3)
    checks.tensor("weight", weight, rank=2)
    checks.like("weight", weight, "a", a)
    cols, depth = weight.shape[0], a.shape[2]
    if weight.shape[1] != depth:
        raise ValueError(
            f"weight must be [C, K] with a's K = {depth}, got {checks.dims(weight)}"
        )
    if bias is not None:
        checks.tensor("bias", bias, rank=1)
        checks.like("bias", bias, "a", a)
        checks.shape("bias", bias, ("be None or [C] =", (cols,)))
    checks.tensor("x", x, rank=3)
    checks.residual("x", x, "a", a)
    checks.shape("x", x, ("be [B, N, C] =", (*a.shape[:2], cols)))
    for name, t in (("a", a), ("weight", weight), ("bias", bias), ("x", x)):
        if t is not None:
            checks.contiguous_rows(name, t)


def _check_gate(gate, a, x) -> None:
    checks.tensor("gate", gate, rank=None)
    checks.residual("gate", gate, "a", a)
    checks.shape("gate", gate, ("be [B, C] =", x.shape[::2]), ("[B, N, C] =", x.shape))
    checks.contiguous_rows("gate", gate)


# ---- the registered operators: torch.compile and opcheck see these ----


@gradients.operator
def _projection(
    a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor,
    c_skip: Tensor | None, c_out: Tensor, save_f: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, f); f is empty unless save_f. c_out may be a gate; c_skip None is 1."""
    check_device("a", a.device)
    c = checks.as_launched(c_skip, c_out, default=1.0)
    return _launch_projection(a, weight, bias, x, *c, save_f)


def _launch_projection(a, weight, bias, x, *arguments) -> tuple[Tensor, Tensor]:
    projection_forward = load("rcmlib.projection.kernel").projection_forward
    return run_on_device(projection_forward, (x.dtype, a.dtype), a, weight, bias, x, *arguments)


@torch.library.register_fake("rcmlib::projection")
def _(a, weight, bias, x, c_skip, c_out, save_f):
    return x.new_empty(x.shape), a.new_empty(x.shape if save_f else (0,))


@gradients.operator
def _gate_backward(
    grad: Tensor, f: Tensor | None, gate: Tensor, df_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    gate_backward = load("rcmlib.projection.gate").gate_backward
    dtypes = (df_dtype or grad.dtype, gate.dtype)
    return run_on_device(gate_backward, dtypes, grad, f, gate, df_dtype)


@torch.library.register_fake("rcmlib::gate_backward")
def _(grad, f, gate, df_dtype):
    df = grad.new_empty(grad.shape if df_dtype else (0,), dtype=df_dtype or grad.dtype)
    return df, gate.new_empty(gate.shape if f is not None else (0,))


@gradients.count_flops("projection")
def _(a, weight, *_, **__):
    return 2 * math.prod(a) * weight[0]


class _Projection(torch.autograd.Function):
    """What torch.func asks for and `register_autograd` (torch 2.11) cannot give."""

    @staticmethod
    @gradients.signed
    def forward(a, weight, bias, x, c_skip, c_out, save_f):
        return torch.ops.rcmlib.projection(a, weight, bias, x, c_skip, c_out, save_f)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, weight, _, x, c_skip, c_out, _ = inputs
        f = output[1]
        ctx.mark_non_differentiable(f)
        ctx.set_materialize_grads(False)  # f gets none: no zeros for it
        ctx.dtypes = x.dtype, a.dtype
        a_needed, weight_needed, _, _, x_needed, f_needed, _ = ctx.needs_input_grad
        # Each factor of a product for the other's gradient.
        needed = (weight_needed, a_needed, x_needed, f_needed)
        ctx.save_for_backward(*gradients.wanted((a, weight, x, f), needed), c_skip, c_out)

    @staticmethod
    @gradients.once_differentiable
    def backward(ctx, grad, _f):
        if grad is None:  # what came after passed none on
            return (None,) * 7
        a, weight, x, f, c_skip, c_out = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad = gradients.dense_rows(grad)
        x_dtype, f_dtype = gradients.wanted(ctx.dtypes, (needed[3], any(needed[:3])))
        if c_out.ndim < 2:
            dx, df, x_dots, f_dots = torch.ops.rcmlib.skip_backward(
                grad, x, f, c_skip, c_out, None, x_dtype, f_dtype
            )
            dc_out = gradients.coefficient_grad(f_dots, c_out) if needed[5] else None
        else:  # a gate
            dx = grad
            df, dc_out = torch.ops.rcmlib.gate_backward(grad, f, c_out, f_dtype)
        # Batched gradients know reshape, but no flatten.
        return (
            df @ weight if needed[0] else None,
            df.reshape(-1, df.shape[-1]).mT @ a.reshape(-1, a.shape[-1]) if needed[1] else None,
            df.sum((0, 1)) if needed[2] else None,
            dx if needed[3] else None,
            gradients.coefficient_grad(x_dots, c_skip) if needed[4] else None,
            dc_out if needed[5] else None,
            None,
        )
