"""`rcm_skip`: the skip as one launch, with its gradient."""

import torch
from torch import Tensor

from rcmlib.core import check_device, checks, gradients, load
from rcmlib.core.launch import known, run_on_device


def rcm_skip(x: Tensor, f: Tensor, c_skip: float | Tensor, c_out: float | Tensor) -> Tensor:
    """c_skip·x + c_out·f in one Triton launch, per sample.

    x, f: [B, …] of one shape and device, float32, float16 or bfloat16; f has x's dtype, or 16
    bits beside an x in float32. Contiguous, or viewable as [B, R, C] with a contiguous last
    dimension (such as a slice of the channels).
    c_skip, c_out: a number, or a floating tensor [B]. Arithmetic is float32, rounded once.
    Returns a new contiguous tensor like x. Where c_out is 0 that is c_skip·x exactly.
    Differentiable in all four.

    Raises TypeError or ValueError for anything else, RuntimeError where Triton is missing.
    """
    plan = known("rcm_skip", (x, f, c_skip, c_out))
    if plan is not None:
        return _launch_skip(x, f, c_skip, c_out, plan)
    for name, t in (("x", x), ("f", f)):
        checks.tensor(name, t, rank=None)
    checks.residual("x", x, "f", f)
    checks.shape("f", f, ("have x's shape", x.shape))
    checked = checks.coefficients(c_skip, c_out, x)
    training = gradients.wants_grad(x, f, *checked)
    if not training and x.is_contiguous() and f.is_contiguous():  # no need of views
        return torch.ops.rcmlib.skip(x, f, *checked)
    tiles = [_rows_of_samples(name, t) for name, t in (("x", x), ("f", f))]
    if tiles[0].shape != tiles[1].shape:  # one is contiguous, the other has gaps
        tiles = [t.view(tiles[0].shape[0], -1, x.shape[-1]) for t in tiles]
    function = _Skip.apply if training else torch.ops.rcmlib.skip
    return function(*tiles, *checked).view(x.shape)


def _rows_of_samples(name: str, t: Tensor) -> Tensor:
    """t [B, …] as a view [B, 1, M] if its samples are dense, else [B, R, C]."""
    batch = t.shape[0]
    if t[0].is_contiguous():
        return t.view(batch, 1, -1)
    try:
        rows = t.view(batch, -1, t.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or rows.stride(-1) != 1:
        raise ValueError(
            f"{name} must be viewable as [B, R, C] with a contiguous last dimension, got shape "
            f"{checks.dims(t)} with strides {t.stride()}; call {name}.contiguous()"
        )
    return rows


# ---- the registered operators: torch.compile and opcheck see these ----


@gradients.operator
def _skip(x: Tensor, f: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """x, f: [B, R, C], or contiguous [B, …]."""
    check_device("x", x.device)
    return _launch_skip(x, f, *checks.as_launched(c_skip, c_out), None)


def _launch_skip(x, f, c_skip, c_out, plan) -> Tensor:
    skip_forward = load("rcmlib.skip.kernel").skip_forward
    return run_on_device(skip_forward, [x.dtype], x, f, c_skip, c_out, plan)


@torch.library.register_fake("rcmlib::skip")
def _(x, f, c_skip, c_out):
    return x.new_empty(x.shape)


@gradients.operator
def _skip_backward(
    grad: Tensor, x: Tensor | None, f: Tensor | None,
    c_skip: Tensor | None, c_out: Tensor | None,  # None: 1
    width: int | None, dx_dtype: torch.dtype | None, df_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    skip_backward = load("rcmlib.skip.kernel").skip_backward
    dtypes = (dx_dtype or grad.dtype, df_dtype or grad.dtype, *[torch.float32] * 2)
    c = checks.as_launched(c_skip, c_out, default=1.0)
    return run_on_device(skip_backward, dtypes, grad, x, f, *c, width, dx_dtype, df_dtype)


@torch.library.register_fake("rcmlib::skip_backward")
def _(grad, x, f, c_skip, c_out, width, dx_dtype, df_dtype):
    skip_results = load("rcmlib.skip.kernel").skip_results
    return skip_results(grad, x, f, width, dx_dtype, df_dtype)


class _Skip(torch.autograd.Function):
    """What torch.func asks for and `register_autograd` (torch 2.11) cannot give."""

    @staticmethod
    @gradients.signed
    def forward(x, f, c_skip, c_out):
        return torch.ops.rcmlib.skip(x, f, c_skip, c_out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, f, c_skip, c_out = inputs
        ctx.dtypes = x.dtype, f.dtype
        x_needed, f_needed = ctx.needs_input_grad[2:]  # each for its coefficient
        ctx.save_for_backward(x if x_needed else None, f if f_needed else None, c_skip, c_out)

    @staticmethod
    @gradients.once_differentiable
    def backward(ctx, grad):
        x, f, c_skip, c_out = ctx.saved_tensors
        dx, df, x_dots, f_dots = torch.ops.rcmlib.skip_backward(
            gradients.dense_rows(grad), x, f, c_skip, c_out, None,
            *gradients.wanted(ctx.dtypes, ctx.needs_input_grad),
        )  # fmt: skip
        return (
            *gradients.wanted((dx, df), ctx.needs_input_grad),
            gradients.coefficient_grad(x_dots, c_skip) if ctx.needs_input_grad[2] else None,
            gradients.coefficient_grad(f_dots, c_out) if ctx.needs_input_grad[3] else None,
        )
