"""What the operations' gradients share: who wants one, how often, and sums in float64."""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def wants_grad(*tensors: Tensor | None) -> bool:
    """Will a backward pass need what this call could save?

    In forward mode, too, the call has to be seen by autograd: an operator alone would drop
    the tangents in silence, where a Function without a jvp says so.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )


def wanted(values: Sequence, needs_input_grad: Sequence[bool]) -> tuple:
    """The values whose input wants a gradient, None for the others."""
    return tuple(
        v if needed else None
        for v, needed in zip(values, needs_input_grad, strict=False)
    )


def signed(forward: Callable) -> Callable:
    """forward with its signature, which Function.apply would else work out at every call."""
    forward.__signature__ = inspect.signature(forward)
    return forward


def once_differentiable(backward: Callable) -> Callable:
    """A backward pass whose results, differentiated once more, raise instead of being zero.

    PyTorch's decorator of this name looks at the incoming gradients alone, and so lets a
    second derivative by the saved tensors vanish: after out.sum(), and in nested torch.func.
    """

    @functools.wraps(backward)
    def guarded(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None]
        some = [t for t in results if t is not None]
        if not some or not any(t.requires_grad for t in sources):
            return results
        tied = iter(_OnceOnly.apply(len(some), *some, *sources))
        return tuple(None if t is None else next(tied) for t in results)

    return guarded


class _OnceOnly(torch.autograd.Function):
    """The first `count` tensors, as functions of all of them that nobody can differentiate."""

    @staticmethod
    def forward(count, *tensors):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "trying to differentiate twice: rcmlib's kernels have first derivatives only"
        )


def dense_rows(grad: Tensor) -> Tensor:
    """A gradient as the kernels read it; autograd may hand over any strides."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def coefficient_grad(dots: Tensor, c: Tensor) -> Tensor:
    """The kernels' partial sums [B, …] added up in float64, as the gradient of c [B]."""
    return dots.flatten(1).sum(1, dtype=torch.float64).to(c.dtype)
